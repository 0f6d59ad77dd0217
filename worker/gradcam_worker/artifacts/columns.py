"""Columns of an input that are carried into the dataset: their types as text, and their values as JSON.

A type is written as Arrow prints it: `int64`, `timestamp[us, tz=UTC]`, `list<item: string>`. Values travel
in JSON. What JSON does not have is a text there: times and dates as ISO 8601, decimals, bytes as base64, and
the numbers `nan`, `inf` and `-inf`.
"""

import base64
import re
from collections.abc import Iterator, Sequence
from datetime import time
from typing import TYPE_CHECKING, Any

from gradcam_worker.errors import InvalidInput

if TYPE_CHECKING:
    import pyarrow as pa

ALIASES = {"date32[day]": "date32", "date64[ms]": "date64"}  # what Arrow prints, and reads differently
DECIMAL = re.compile(r"decimal(32|64|128|256)\((\d+), ?(-?\d+)\)")
TIMESTAMP = re.compile(r"timestamp\[(s|ms|us|ns), tz=(.+)\]")
FIXED = re.compile(r"fixed_size_(?:list|binary)\[(\d+)\]|fixed_size_list<(.+)>\[(\d+)\]", re.DOTALL)
NESTED = re.compile(r"(list|large_list|struct|map|dictionary)<(.*)>", re.DOTALL)
NOT_NULL = " not null"
OPEN, CLOSE = "<[(", ">])"


def arrow_type(text: str) -> "pa.DataType":
    """Find the Arrow type that a text names.

    Args:
        text: What `str` returns for the type. A dictionary is read as the type of its values.

    Returns:
        The type.

    Raises:
        InvalidInput: It is no type that a dataset can carry.
    """
    import pyarrow as pa

    try:
        return _type(text.strip())
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        message = (
            f"{text[:200]!r} is no type of a column that can be carried; "
            "int64, double, string, bool, timestamp[us, tz=UTC] or list<item: string> would be."
        )
        raise InvalidInput(message) from error


def _type(text: str) -> "pa.DataType":
    import pyarrow as pa

    if match := DECIMAL.fullmatch(text):
        bits, precision, scale = match.groups()
        decimal: pa.DataType = getattr(pa, f"decimal{bits}")(int(precision), int(scale))
        return decimal
    if match := TIMESTAMP.fullmatch(text):
        return pa.timestamp(*match.groups())
    if match := FIXED.fullmatch(text):
        bytes_, item, length = match.groups()
        return pa.binary(int(bytes_)) if bytes_ else pa.list_(_field(item), int(length))
    if match := NESTED.fullmatch(text):
        return _nested(*match.groups())
    return pa.type_for_alias(ALIASES.get(text, text))


def _nested(kind: str, inside: str) -> "pa.DataType":
    import pyarrow as pa

    parts = [*_parts(inside)]
    if kind == "struct":
        return pa.struct([_field(part) for part in parts])
    if kind == "dictionary":
        return _type(parts[0].partition("=")[2])
    if kind == "map":
        return pa.map_(_type(parts[0]), _type(parts[1].partition(" ('")[0]))
    return pa.list_(_field(inside)) if kind == "list" else pa.large_list(_field(inside))


def _field(text: str) -> "pa.Field":
    import pyarrow as pa

    name, _, kind = text.partition(": ")
    return pa.field(name, _type(kind.removesuffix(NOT_NULL)), nullable=not kind.endswith(NOT_NULL))


def _parts(text: str) -> Iterator[str]:
    """Split at commas that are in no brackets."""
    depth, begin = 0, 0
    for index, letter in enumerate(text):
        depth += (letter in OPEN) - (letter in CLOSE)
        if letter == "," and not depth:
            yield text[begin:index].strip()
            begin = index + 1
    yield text[begin:].strip()


def carried_array(values: Sequence[Any], kind: "pa.DataType") -> "pa.Array":
    """Make a column of values that came as JSON.

    Args:
        values: The values; None is null.
        kind: The type of the column, from `arrow_type`.

    Returns:
        The column. A value that does not fit its type is null.
    """
    import pyarrow as pa

    try:
        return _array(values, kind)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return pa.concat_arrays([_value(value, kind) for value in values])


def _value(value: Any, kind: "pa.DataType") -> "pa.Array":
    import pyarrow as pa

    try:
        return _array([value], kind)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return pa.nulls(1, kind)


def _array(values: Sequence[Any], kind: "pa.DataType") -> "pa.Array":
    import pyarrow as pa
    from pyarrow import types

    if types.is_integer(kind) and any(isinstance(value, float) for value in values):
        message = "a number with a fraction, which Arrow would cut"
        raise ValueError(message)
    if types.is_floating(kind):
        numbers = [float(value) if isinstance(value, str) else value for value in values]
        return pa.array(numbers, pa.float64()).cast(kind, safe=False)
    if types.is_time(kind):
        return pa.array([value and time.fromisoformat(value) for value in values], kind)
    if (types.is_temporal(kind) and not types.is_duration(kind)) or types.is_decimal(kind):
        return pa.array(values, pa.string()).cast(kind)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        data = [None if value is None else base64.b64decode(value, validate=True) for value in values]
        return pa.array(data, kind)
    return pa.array(values, kind)
