"""Reads Parquet and ORC, batch by batch, without the columns that nobody needs."""

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from gradcam_worker.artifacts.columns import arrow_type
from gradcam_worker.backfill.inputs.further import (
    MAX_CELL,
    NOT_UTF_8,
    TEXT,
    TOO_LONG,
    FurtherColumns,
    Kinds,
)
from gradcam_worker.backfill.inputs.options import NO_COLUMNS, InputOptions
from gradcam_worker.backfill.inputs.rows import RowParser
from gradcam_worker.backfill.inputs.tables import (
    SURROGATE,
    columns,
    input_columns,
    positions_of,
    used_columns,
)
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.shard import Row
from gradcam_worker.text.visible import counted

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_BATCH_ROWS = 8192
PARQUET_BUFFER_BYTES = 1024 * 1024  # of each column: a column may have ten million values
PLAIN_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-. ")
Lose = Callable[[int, str, object], None]  # index in the batch, reason, value


class ArrowFile:
    """An open Parquet or ORC file. Raises InvalidInput if it is none."""

    def __init__(self, file: BinaryIO, form: str) -> None:
        """Read what says of its columns; `form` is parquet or orc."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._form, name = form, {"parquet": "Parquet", "orc": "ORC"}[form]
        try:
            if form == "orc":
                from pyarrow import orc

                self._orc = orc.ORCFile(file)
                self.schema, self.num_rows = self._orc.schema, self._orc.nrows
                return
            self._parquet = pq.ParquetFile(
                file, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES, page_checksum_verification=True
            )
            self.schema, self.num_rows = self._parquet.schema_arrow, self._parquet.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            message = f"cannot be read as {name}: {error}"
            raise InvalidInput(message) from error

    def batches(self, names: Sequence[str]) -> "Iterator[pa.RecordBatch]":
        """Yield these columns of all rows."""
        wanted = [*dict.fromkeys(names)]
        if self._form == "parquet":
            yield from self._parquet.iter_batches(PARQUET_BATCH_ROWS, columns=wanted, use_threads=False)
            return
        for stripe in range(self._orc.nstripes):
            yield self._orc.read_stripe(stripe, columns=wanted)


class ArrowTable:
    """Rows that are in memory: see `ArrowFile`."""

    def __init__(self, table: "pa.Table") -> None:
        """`table`: the rows."""
        self._table, self.schema, self.num_rows = table, table.schema, table.num_rows

    def batches(self, names: Sequence[str]) -> "Iterator[pa.RecordBatch]":
        """Yield these columns of all rows."""
        yield from self._table.select([*dict.fromkeys(names)]).to_batches(PARQUET_BATCH_ROWS)


@contextmanager
def told_as_damage(rows: Callable[[], int]) -> Iterator[None]:
    """Raise InvalidInput for errors of Arrow; `rows` returns how many rows were read."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        message = f"is damaged after {counted(rows(), 'row')}, or soon after: {error}"
        raise InvalidInput(message) from error


class ArrowReader:
    """Reads rows from Parquet, or from ORC."""

    def __init__(self, options: InputOptions, form: str) -> None:
        """`options`: the input's."""
        self._options, self._form = options, form

    def kinds(self, file: BinaryIO, constants: Mapping[str, str]) -> Kinds:
        """Return the columns and their types. Raises InvalidInput if there is none with URIs."""
        return self.kinds_of(ArrowFile(file, self._form).schema, constants)

    def kinds_of(self, schema: "pa.Schema", constants: Mapping[str, str] = NO_COLUMNS) -> Kinds:
        """`kinds`, of a schema."""
        from pyarrow import types

        found = columns(schema.names, self._options.column)
        kind = schema.field(found.image).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        if not is_text(value):
            name = schema.names[found.image]
            message = f"has a column {name!r} of {kind}: it must hold URIs, as strings."
            raise InvalidInput(message)
        return [*((one.name, kind_of(one.type)) for one in schema), *((name, TEXT) for name in constants)]

    def used(self, names: Sequence[str]) -> set[str]:
        """Return the columns that mean something to us. Raises InvalidInput if one of these is not there."""
        return used_columns(names, columns(names, self._options.column), self._options)

    def rows(self, file: BinaryIO, parser: RowParser, constants: Mapping[str, str]) -> Iterator[Row]:
        """Read the rows. Raises InvalidInput if the file is damaged."""
        return self.rows_of(ArrowFile(file, self._form), parser, constants)

    def rows_of(
        self,
        opened: ArrowFile | ArrowTable,
        parser: RowParser,
        constants: Mapping[str, str] = NO_COLUMNS,
    ) -> Iterator[Row]:
        """`rows`, of what is open already."""
        further, number = parser.further, 0
        names = opened.schema.names
        found = columns(names, self._options.column)
        inputs = input_columns(names, self._options.inputs)
        all_names = [*names, *constants]
        special = [all_names[position] for position in positions_of(all_names, further.special)]
        carried = dict(zip(further.carried, positions_of(all_names, tuple(further.carried)), strict=True))
        own = [names[position] for position in (*found, *inputs.values()) if position is not None]
        wanted = [
            name for name in (*own, *special, *(all_names[p] for p in carried.values())) if name in names
        ]
        with told_as_damage(lambda: number):
            for batch in opened.batches(wanted):
                rows = len(batch)
                plain = [
                    [None] * rows if position is None else plain_values(batch.column(names[position]))
                    for position in (*found, *inputs.values())
                ]
                more: list[Sequence[Any]] = [
                    [constants[name]] * rows if name in constants else plain_values(batch.column(name))
                    for name in special
                ]
                more += carried_values(
                    batch, further, constants, {n: all_names[p] for n, p in carried.items()}, parser, number
                )
                further_values = zip(*more, strict=True) if more else iter([()] * rows)
                for values, (uri, row_id, sha256, *given) in zip(
                    further_values, zip(*plain, strict=True), strict=True
                ):
                    asked = dict(zip(inputs, given, strict=True))
                    yield parser.parse(number, uri, row_id, sha256, asked, values)
                    number += 1


def carried_values(
    batch: "pa.RecordBatch",
    further: FurtherColumns,
    constants: Mapping[str, str],
    names: Mapping[str, str],
    parser: RowParser,
    first: int,
) -> list[Sequence[Any]]:
    """The values of the carried columns, as JSON of their types.

    Args:
        batch: Rows of a file.
        further: Says which columns are carried; counts the values that do not fit.
        constants: Values that all rows of the file have.
        names: Names of carried columns, and of the same columns in this file.
        parser: The rows'.
        first: The number of the first row of the batch.

    Returns:
        The values of each column.
    """
    found: list[Sequence[Any]] = []
    for name, kind in further.carried.items():

        def lose(index: int, reason: str, value: object, name: str = name) -> None:
            further.lose(name, reason, parser.place(first + index), value)

        if names[name] in constants:
            found.append([constants[names[name]]] * len(batch))
        else:
            found.append(json_values(batch.column(names[name]), kind, lose))
    return found


def is_text(kind: "pa.DataType") -> bool:
    """Return whether a type holds text."""
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def kind_of(kind: "pa.DataType") -> str:
    """Return the type, as text, with which a column is carried: text where no other holds it as it is.

    Empty: a column of nulls alone, whose type is not known.
    """
    from pyarrow import types

    if types.is_dictionary(kind):
        return kind_of(kind.value_type)
    if types.is_null(kind):
        return ""
    if is_text(kind):
        return TEXT
    if types.is_nested(kind):
        return str(kind) if _is_plain(kind) else TEXT
    return "binary" if "binary" in str(kind) else str(kind)


def _is_plain(kind: "pa.DataType") -> bool:
    """Whether all values of a type are JSON of the same type."""
    from pyarrow import types

    if types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return bool(fields) and all(PLAIN_NAME.issuperset(one.name) and _is_plain(one.type) for one in fields)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    scalars = (types.is_boolean, types.is_integer, types.is_floating, types.is_string)
    return any(is_one(kind) for is_one in scalars)


def plain_values(column: "pa.Array") -> list[Any]:
    """A column's values. Text that is not UTF-8 gets lone surrogates, by which it is recognized later."""
    import pyarrow as pa
    from pyarrow import types

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        plain = column.dictionary_decode() if types.is_dictionary(column.type) else column
        if not is_text(plain.type):
            return [None] * len(plain)
        raw = plain.cast(pa.large_binary() if types.is_large_string(plain.type) else pa.binary())
        return [
            None if value is None else value.decode(errors="surrogateescape") for value in raw.to_pylist()
        ]


def json_values(column: "pa.Array", kind: str, lose: Lose) -> Sequence[Any]:
    """Return a column's values as JSON of an Arrow type: see `gradcam_worker.artifacts.columns`.

    Args:
        column: The column.
        kind: The type, from `kind_of`, or of another file of the input.
        lose: Called for each value that does not fit, and is None.

    Returns:
        The values.
    """
    from pyarrow import types

    if types.is_null(column.type):
        return [None] * len(column)
    column = _as_json_type(column, kind, lose)
    values, nested = plain_values(column), types.is_nested(column.type)
    if types.is_floating(column.type):
        return [repr(one) if one is not None and not math.isfinite(one) else one for one in values]
    if nested and kind != TEXT:
        return [_finite(index, one, lose) for index, one in enumerate(values)]
    if nested:
        values = [one if one is None else json.dumps(one, default=str) for one in values]
    elif kind == "binary":
        values = [one if one is None else base64.b64encode(one).decode() for one in values]
    return _texts(values, lose) if kind in {TEXT, "binary"} else values


def _as_json_type(column: "pa.Array", kind: str, lose: Lose) -> "pa.Array":
    """A column as a type whose values JSON has, if there is one."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if kind_of(column.type) != kind and kind != TEXT:
        column = _cast(column, arrow_type(kind), lose)
    if types.is_timestamp(column.type):
        column = column.cast(pa.timestamp(column.type.unit, column.type.tz and "UTC"))
    if types.is_duration(column.type):
        return column.cast(pa.int64())
    as_text = types.is_temporal(column.type) or types.is_decimal(column.type)
    if as_text or (kind == TEXT and types.is_primitive(column.type)):
        return column.cast(pa.string())
    return column


def _cast(column: "pa.Array", kind: "pa.DataType", lose: Lose) -> "pa.Array":
    """The column as another type; null where a value does not fit."""
    import pyarrow as pa

    try:
        return column.cast(kind)
    except pa.ArrowException:
        parts = []
        for index, one in enumerate(column):
            try:
                parts.append(pa.array([one.as_py()], column.type).cast(kind))
            except pa.ArrowException:
                lose(index, f"no {kind}", one)
                parts.append(pa.nulls(1, kind))
        return pa.concat_arrays(parts) if parts else pa.nulls(0, kind)


def _texts(values: list[Any], lose: Lose) -> list[Any]:
    """Texts without those that cannot be carried."""
    for index, text in enumerate(values):
        if text is None or (text.isascii() and len(text) <= MAX_CELL):
            continue
        if len(text) > MAX_CELL or SURROGATE.search(text):
            lose(index, TOO_LONG if len(text) > MAX_CELL else NOT_UTF_8, text)
            values[index] = None
    return values


def _finite(index: int, value: Any, lose: Lose) -> Any:
    """A list or an object that JSON can hold."""
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        lose(index, "no finite number", value)
        return None
    if len(text) > 8 * MAX_CELL:
        lose(index, TOO_LONG, text[:100])
        return None
    return value
