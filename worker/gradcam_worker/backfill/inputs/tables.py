"""Reads lists of images as text, line by line: JSON Lines, CSV, an S3 inventory, a URI a line.

A line that cannot be read becomes a row with a problem, and reading goes on. It stops if the start of the
next row is uncertain: a quote that is never closed, for example, would hide the rows after it.
"""

import codecs
import csv
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import unquote_plus

from gradcam_worker.backfill.inputs.rows import MAX_SHOWN, RowParser
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.shard import Row
from gradcam_worker.schemas.strict_json import Unreadable, loads

MAX_LINE_BYTES = 4 * 1024 * 1024  # a row has a few hundred, unless its image is a data URI
IMAGE_NAMES = ("image", "uri", "url", "path")
_SIGNATURES = {  # first bytes of files that are not UTF-8 text, and their format
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"PAR1": "Parquet",
    b"BZh": "a bzip2 file",
    b"PK\x03\x04": "a zip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
}
NO_INPUTS: Mapping[str, str] = MappingProxyType({})
_TOO_LONG = f"it is longer than {MAX_LINE_BYTES:,} bytes"
_MAX_NAMED = 20  # columns in an error message


class Columns(NamedTuple):
    """The positions of a table's columns; None: there is no such column."""

    image: int
    id: int | None
    sha256: int | None


def columns(names: Sequence[str], wanted: str | None, hint: str = "") -> Columns:
    """Find the columns, in any case. Raises InvalidInput, with the names of the columns and `hint`."""
    folded = [name.strip().casefold() for name in names]
    candidates = IMAGE_NAMES if wanted is None else (wanted.strip().casefold(),)
    positions = [folded.index(name) for name in candidates if name in folded]
    if not positions:
        shown = ", ".join(repr(name[:60].partition("?")[0]) for name in names[:_MAX_NAMED])
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        message = (
            f"has the columns {shown}{more}, none of which is {' or '.join(map(repr, candidates))}: "
            f"name the one with the URIs with --column{hint}."
        )
        raise InvalidInput(message)
    twice = next((name for name in (folded[positions[0]], "id", "sha256") if folded.count(name) > 1), None)
    if twice:
        message = f"has more than one column {twice!r}: it must be plain which one is meant."
        raise InvalidInput(message)
    others = (folded.index(name) if name in folded else None for name in ("id", "sha256"))
    return Columns(positions[0], *others)


def input_columns(names: Sequence[str], wanted: Mapping[str, str]) -> dict[str, int]:
    """Find the columns with the inputs of the network, in any case.

    Args:
        names: Of all columns.
        wanted: Column by input.

    Returns:
        Its position by input.

    Raises:
        InvalidInput: There is no such column, or more than one.
    """
    folded = [name.strip().casefold() for name in names]
    positions = {}
    for name, column in wanted.items():
        count = folded.count(column.strip().casefold())
        if count != 1:
            shown = ", ".join(repr(one[:60].partition("?")[0]) for one in names[:_MAX_NAMED])
            message = f"has {count or 'no'} columns {column!r} for the input {name!r}; it has {shown}."
            raise InvalidInput(message)
        positions[name] = folded.index(column.strip().casefold())
    return positions


def json_rows(
    file: BinaryIO, parser: RowParser, column: str | None, inputs: Mapping[str, str] = NO_INPUTS
) -> Iterator[Row]:
    """Read a JSON value a line: a URI, or an object with one in `image`, `uri`, `url`, `path` or `column`.

    An object may have `inputs` for the network, by name; those in fields of their own are named by `inputs`.
    """
    fields = IMAGE_NAMES if column is None else (column,)
    for number, line in _lines(file):
        try:
            value = loads(line, "it") if len(line) <= MAX_LINE_BYTES else None
        except Unreadable as error:
            yield parser.bad_row(number, line, str(error))
            continue
        if isinstance(value, str):
            yield parser.parse(number, value)
        elif isinstance(value, dict):
            yield _from_object(parser, number, value, fields, inputs)
        elif len(line) > MAX_LINE_BYTES:
            yield parser.bad_row(number, line, _TOO_LONG)
        else:
            yield parser.bad_row(number, line, "it is neither an object nor a URI")


def _from_object(
    parser: RowParser,
    number: int,
    value: dict[str, Any],
    fields: Sequence[str],
    inputs: Mapping[str, str],
) -> Row:
    name = next((name for name in fields if value.get(name) is not None), None)
    if name is None:
        present = ", ".join(map(repr, value))[:300] or "no field"
        return parser.bad_row(
            number, value, f"it names no image: {' or '.join(map(repr, fields))}; it has {present}"
        )
    image, sha256 = value[name], value.get("sha256")
    if isinstance(image, dict):
        inner = image.get("sha256")
        if None not in (inner, sha256) and inner != sha256:
            return parser.bad_row(number, image.get("uri"), "it names two checksums of one image")
        image, sha256 = image.get("uri"), sha256 if inner is None else inner
    given = value.get("inputs")
    if not isinstance(given, dict | None):
        return parser.bad_row(number, value, 'its inputs must be an object, as in {"age": 61}')
    if inputs:
        fields_given = {name: value[field] for name, field in inputs.items() if value.get(field) is not None}
        given = {**(given or {}), **fields_given}
    return parser.parse(number, image, value.get("id", value.get("custom_id")), sha256, given)


def text_rows(file: BinaryIO, parser: RowParser) -> Iterator[Row]:
    """Read a URI a line."""
    for number, line in _lines(file):
        if len(line) > MAX_LINE_BYTES:
            yield parser.bad_row(number, line, _TOO_LONG)
            continue
        try:
            yield parser.parse(number, line.decode().strip())
        except UnicodeDecodeError:
            yield parser.bad_row(number, line, "it is not UTF-8")


def table_rows(
    file: BinaryIO,
    parser: RowParser,
    delimiter: str,
    column: str | None,
    inputs: Mapping[str, str] = NO_INPUTS,
) -> Iterator[Row]:
    """Read CSV with a header. Raises InvalidInput if it has no column of images, or none of an input."""
    records = _records(file, parser, delimiter)
    for first in records:
        if isinstance(first, Row):
            message = f"has a header that cannot be read: {first.problem.detail if first.problem else ''}"
            raise InvalidInput(message)
        header = first[1]
        break
    else:
        return
    positions = columns(header, column, ", or say --format inventory if it has bucket and key, and no header")
    further = input_columns(header, inputs)
    for record in records:
        if isinstance(record, Row):
            yield record
            continue
        number, fields = record
        if len(fields) != len(header):
            received = fields[positions.image] if positions.image < len(fields) else None
            yield parser.bad_row(
                number,
                received if len(fields) < len(header) and received else delimiter.join(fields),
                f"it has {len(fields)} fields, and the header {len(header)}: a URI with {delimiter!r} "
                "in it must stand in quotes",
            )
            continue
        row_id, sha256 = (
            None if position is None else fields[position] or None for position in positions[1:]
        )
        given = {name: fields[position].strip() for name, position in further.items()}
        yield parser.parse(number, fields[positions.image], row_id, sha256, given)


def inventory_rows(file: BinaryIO, parser: RowParser) -> Iterator[Row]:
    """Read bucket, key and further fields, without a header.

    Keys are encoded as in S3's inventories: a space as + or %20, a plus as %2B.
    """
    for record in _records(file, parser, ","):
        if isinstance(record, Row):
            yield record
            continue
        number, fields = record
        bucket, key = (*fields, "")[:2]
        if not bucket or not key or "/" in bucket:
            yield parser.bad_row(number, ",".join(fields), "it must begin with a bucket, a comma and a key")
        else:
            yield parser.parse(number, f"s3://{bucket}/{unquote_plus(key, errors='surrogateescape')}")


def _records(file: BinaryIO, parser: RowParser, delimiter: str) -> Iterator[tuple[int, list[str]] | Row]:
    """Records of CSV with the numbers of their first lines; bad rows for records that cannot be read."""
    last, start, long = 0, b"", False

    def texts() -> Iterator[str]:
        nonlocal last, start, long
        for number, line in _lines(file, blank=True):
            last, start = number, line[:MAX_SHOWN]
            if len(line) > MAX_LINE_BYTES:
                long = True
                yield "too long"
            else:
                yield line.decode(errors="surrogateescape")

    csv.field_size_limit(2 * MAX_LINE_BYTES)
    records = csv.reader(texts(), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        first, long = last + 1, False
        try:
            fields = next(records, None)
        except csv.Error as error:
            if last > first:
                message = (
                    f"cannot be told into rows from line {first} on: a quote that is opened there is not "
                    f"closed as it should be, by line {last} ({error})."
                )
                raise InvalidInput(message) from error
            yield parser.bad_row(first, start, f"it cannot be read as CSV: {error}")
            continue
        if fields is None:
            return
        if long:
            yield parser.bad_row(first, start, _TOO_LONG)
        elif fields and (len(fields) > 1 or fields[0].strip()):
            yield first, fields


def _lines(file: BinaryIO, *, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, from 1; lines over MAX_LINE_BYTES are cut off one byte after the limit.

    Raises InvalidInput if the file is not UTF-8 text.
    """
    for number, line in enumerate(iter(partial(file.readline, MAX_LINE_BYTES + 1), b""), 1):
        if number == 1:
            line = _without_bom(line)  # noqa: PLW2901  # without its byte-order mark
        rest = line
        while len(line) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
            if not rest:
                break
        if blank or line.strip():
            yield number, line


def _without_bom(line: bytes) -> bytes:
    """The first line without its byte-order mark. Raises InvalidInput."""
    kind = next((kind for signature, kind in _SIGNATURES.items() if line.startswith(signature)), None)
    if kind is None and b"\0" in line[:4]:
        kind = "UTF-16 or no text"
    if kind:
        message = f"is {kind}, not text in UTF-8: write it as UTF-8, or say with --format what it is."
        raise InvalidInput(message)
    return line.removeprefix(codecs.BOM_UTF8)
