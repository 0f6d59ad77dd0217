"""Reads lists of images as text, line by line: JSON Lines, CSV, an S3 inventory, a URI a line.

A line that cannot be read becomes a row with a problem, and reading goes on. It stops if the start of the
next row is uncertain: a quote that is never closed, for example, would hide the rows after it.
"""

import codecs
import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from gradcam_worker.backfill.inputs.further import (
    MAX_CELL,
    NOT_UTF_8,
    ROLES,
    TEXT,
    TOO_LONG,
    FurtherColumns,
    JsonTypes,
    Kinds,
    as_kind,
)
from gradcam_worker.backfill.inputs.known import UnreadableCell, parse_classes
from gradcam_worker.backfill.inputs.options import InputOptions, box_columns
from gradcam_worker.backfill.inputs.rows import MAX_SHOWN, RowParser
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.shard import Row
from gradcam_worker.schemas.strict_json import Unreadable, loads

MAX_LINE_BYTES = 4 * 1024 * 1024  # a row has a few hundred, unless its image is a data URI
IMAGE_NAMES = ("image", "uri", "url", "path")
FAILED_FIELDS = {"row", "error", "annotations", "classes"}  # of a list of failed rows
SAMPLE_ROWS, SAMPLE_BYTES = 4096, 8 * 1024 * 1024  # of JSON, from which the types of its fields are known
SURROGATE = re.compile("[\ud800-\udfff]")
_SIGNATURES = {  # first bytes of files that are not UTF-8 text, and their format
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"PAR1": "Parquet",
    b"ORC": "ORC",
    b"PK\x03\x04": "a zip file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
}
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


class JsonReader:
    """Reads a JSON value a line: a URI, or an object with one in `image`, `uri`, `url` or `path`.

    An object may have `inputs` for the network, by name. A list of failed rows that a backfill has written
    also has `annotations` and `classes`.
    """

    def __init__(self, options: InputOptions) -> None:
        """`options`: the input's."""
        self._options = options
        self._image_fields = IMAGE_NAMES if options.column is None else (options.column,)
        self._is_failed_list = self.has_annotations = False
        self._known: frozenset[str] | None = None  # fields of the first objects

    def kinds(self, file: BinaryIO, constants: Mapping[str, str]) -> Kinds:
        """Find the fields and their types, from the first objects."""
        types = JsonTypes()
        size = 0
        for count, (_, line) in enumerate(_lines(file)):
            size += len(line)
            with suppress(Unreadable):
                value = loads(line, "it") if len(line) <= MAX_LINE_BYTES else None
                if isinstance(value, dict):
                    self._is_failed_list = self._is_failed_list or (count == 0 and _is_failed_row(value))
                    self.has_annotations |= self._is_failed_list and "annotations" in value
                    types.add(value)
            if count + 1 >= SAMPLE_ROWS or size > SAMPLE_BYTES:
                break
        kinds = types.kinds()
        self._known = frozenset({*dict(kinds), *constants})
        wanted = [name for role in ROLES if (name := getattr(self._options, role))]
        missing = [name for name in (*wanted, *box_columns(self._options)) if name not in self._known]
        if missing and kinds:
            present = ", ".join(map(repr, dict(kinds)))[:300]
            message = f"has no field {missing[0]!r} in its first rows; it has {present}."
            raise InvalidInput(message)
        return [*kinds, *((name, TEXT) for name in constants)]

    def used(self, names: Sequence[str]) -> set[str]:  # noqa: ARG002  # a row need not have all fields
        """Return the fields that mean something to us; not those with labels."""
        options = self._options
        fields = {*self._image_fields, "id", "custom_id", "sha256", "inputs", *options.inputs.values()}
        fields |= {name for name in (options.classes_from, options.mask, *box_columns(options)) if name}
        return (fields | (FAILED_FIELDS if self._is_failed_list else set())) - {options.label or ""}

    def rows(self, file: BinaryIO, parser: RowParser, constants: Mapping[str, str]) -> Iterator[Row]:
        """Read the rows."""
        for number, line in _lines(file):
            try:
                value = loads(line, "it") if len(line) <= MAX_LINE_BYTES else None
            except Unreadable as error:
                yield parser.bad_row(number, line, str(error))
                continue
            if isinstance(value, str):
                value = {self._image_fields[0]: value}
            if isinstance(value, dict):
                yield self._row(parser, number, {**value, **constants})
            elif len(line) > MAX_LINE_BYTES:
                yield parser.bad_row(number, line, _TOO_LONG)
            else:
                yield parser.bad_row(number, line, "it is neither an object nor a URI")

    def _row(self, parser: RowParser, number: int, value: dict[str, Any]) -> Row:
        name = next((name for name in self._image_fields if value.get(name) is not None), None)
        if name is None:
            present = ", ".join(map(repr, value))[:300] or "no field"
            expected = " or ".join(map(repr, self._image_fields))
            return parser.bad_row(number, value, f"it names no image: {expected}; it has {present}")
        image, sha256 = value[name], value.get("sha256")
        if isinstance(image, dict):
            inner = image.get("sha256")
            if None not in (inner, sha256) and inner != sha256:
                return parser.bad_row(number, image.get("uri"), "it names two checksums of one image")
            image, sha256 = image.get("uri"), sha256 if inner is None else inner
        given = value.get("inputs")
        if not isinstance(given, dict | None):
            return parser.bad_row(number, value, 'its inputs must be an object, as in {"age": 61}')
        if inputs := self._options.inputs:
            fields = {name: value[field] for name, field in inputs.items() if value.get(field) is not None}
            given = {**(given or {}), **fields}
        row_id = value.get("id", value.get("custom_id"))
        further = parser.further
        if further.is_empty and not self._is_failed_list:
            return parser.parse(number, image, row_id, sha256, given)
        values = [value.get(name) for name in further.special]
        place = parser.place(number)
        values += [
            _carried(further, place, name, kind, value.get(name)) for name, kind in further.carried.items()
        ]
        for unknown in value.keys() - self._known if self._known is not None else ():
            further.lose(unknown, "not in the first rows", place, value[unknown])
        return parser.parse(
            number, image, row_id, sha256, given, values, self._failed_fields(further, place, value)
        )

    def _failed_fields(self, further: FurtherColumns, place: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """What a failed row of a backfill says of itself."""
        if not self._is_failed_list:
            return {}
        fields: dict[str, Any] = {}
        if (classes := value.get("classes")) is not None:
            try:
                fields["classes"] = parse_classes(classes) or None
            except UnreadableCell as error:
                further.lose("classes", "not readable", place, error)
        if isinstance(annotations := value.get("annotations"), dict):
            fields["annotations"] = further.valid_annotations(place, annotations)
        return fields


def _is_failed_row(value: Mapping[str, Any]) -> bool:
    error = value.get("error")
    return isinstance(error, dict) and "code" in error and isinstance(value.get("row"), int)


def _carried(further: FurtherColumns, place: str, name: str, kind: str, value: Any) -> Any:
    """A value as one of its column's type; None, counted, if it does not fit."""
    try:
        return as_kind(value, kind)
    except ValueError as error:
        further.lose(name, str(error), place, value)
        return None


class TextReader:
    """Reads a URI a line."""

    def kinds(self, file: BinaryIO, constants: Mapping[str, str]) -> Kinds:  # noqa: ARG002  # a reader's
        """There are no columns."""
        return ()

    def used(self, names: Sequence[str]) -> set[str]:  # noqa: ARG002  # a reader's
        """There are no columns."""
        return set()

    def rows(self, file: BinaryIO, parser: RowParser, constants: Mapping[str, str]) -> Iterator[Row]:  # noqa: ARG002
        """Read the rows."""
        for number, line in _lines(file):
            if len(line) > MAX_LINE_BYTES:
                yield parser.bad_row(number, line, _TOO_LONG)
                continue
            try:
                yield parser.parse(number, line.decode().strip())
            except UnicodeDecodeError:
                yield parser.bad_row(number, line, "it is not UTF-8")


class TableReader:
    """Reads CSV with a header. All of its columns are text."""

    def __init__(self, options: InputOptions, delimiter: str) -> None:
        """`options`: the input's."""
        self._options, self._delimiter = options, delimiter

    def kinds(self, file: BinaryIO, constants: Mapping[str, str]) -> Kinds:
        """Return the columns and their types. Raises InvalidInput if the header cannot be read."""
        header, _ = self._header(file, RowParser())
        return [(name.strip(), TEXT) for name in (*header, *constants)]

    def used(self, names: Sequence[str]) -> set[str]:
        """Return the columns that mean something to us. Raises InvalidInput if one of these is not there."""
        return used_columns(names, self._columns(names), self._options) if names else set()

    def _header(
        self, file: BinaryIO, parser: RowParser
    ) -> tuple[list[str], Iterator[tuple[int, list[str]] | Row]]:
        records = csv_records(file, parser, self._delimiter)
        for first in records:
            if isinstance(first, Row):
                message = f"has a header that cannot be read: {first.problem.detail if first.problem else ''}"
                raise InvalidInput(message)
            return first[1], records
        return [], records

    def _columns(self, header: Sequence[str]) -> "Columns":
        hint = ", or say --format inventory if it has bucket and key, and no header"
        return columns(header, self._options.column, hint) if header else Columns(0, None, None)

    def rows(self, file: BinaryIO, parser: RowParser, constants: Mapping[str, str]) -> Iterator[Row]:
        """Read the rows. Raises InvalidInput if there is no column of images, or of an input."""
        header, records = self._header(file, parser)
        if not header:
            return
        positions, delimiter = self._columns(header), self._delimiter
        inputs = input_columns(header, self._options.inputs)
        names, more, further = [*header, *constants], tuple(constants.values()), parser.further
        wanted = positions_of(names, (*further.special, *further.carried))
        values: Sequence[str | None] = ()
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
            given = {name: fields[position].strip() for name, position in inputs.items()}
            if wanted:
                fields += more
                values = [fields[position] or None for position in wanted]
                values = without_unreadable(further, parser.place(number), values)
            yield parser.parse(number, fields[positions.image], row_id, sha256, given, values)


def without_unreadable(
    further: FurtherColumns, place: str, values: Sequence[str | None]
) -> Sequence[str | None]:
    """Return texts of a row without those that cannot be carried, which are counted.

    Args:
        further: Counts them.
        place: Where the row is.
        values: Of the special columns, and of those that are carried.
    """
    together = "".join(filter(None, values))  # one look at most rows: a row has many values
    if together.isascii() and len(together) <= MAX_CELL:
        return values
    kept = [*values]
    for index, name in enumerate(further.carried, len(further.special)):
        text = kept[index] or ""
        if len(text) > MAX_CELL or SURROGATE.search(text):
            further.lose(name, TOO_LONG if len(text) > MAX_CELL else NOT_UTF_8, place, text)
            kept[index] = None
    return kept


def positions_of(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Find columns, as they are written, else in any case. Raises InvalidInput for one that is not there."""
    stripped = [name.strip() for name in names]
    folded = [name.casefold() for name in stripped]
    found = []
    for name in wanted:
        one = name.strip().casefold()
        if one not in folded:
            shown = ", ".join(repr(one[:60].partition("?")[0]) for one in names[:_MAX_NAMED])
            message = f"has no column {name!r}; it has {shown}."
            raise InvalidInput(message)
        found.append(stripped.index(name) if name in stripped else folded.index(one))
    return found


def used_columns(names: Sequence[str], found: "Columns", options: InputOptions) -> set[str]:
    """The columns that mean something to us, as they are written; not those with labels."""
    inputs = input_columns(names, options.inputs).values()
    others = [name for name in (options.classes_from, options.mask, *box_columns(options)) if name]
    positions = [*(position for position in found if position is not None), *inputs]
    label = positions_of(names, [options.label] if options.label else [])
    used = {*positions, *positions_of(names, others)} - {*label}
    return {names[position].strip() for position in used}


def csv_records(file: BinaryIO, parser: RowParser, delimiter: str) -> Iterator[tuple[int, list[str]] | Row]:
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
