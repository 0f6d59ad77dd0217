"""Opens the INPUT of a backfill: a list of images, a folder, an S3 prefix, or standard input.

A bad row becomes a row with a problem, see `gradcam_worker.backfill.inputs.rows`. An input that cannot be
read raises InvalidInput, when it is opened or between two rows.
"""

import gzip
import io
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from gradcam_worker.backfill.inputs.rows import RowParser
from gradcam_worker.backfill.inputs.tables import (
    NO_INPUTS,
    columns,
    input_columns,
    inventory_rows,
    json_rows,
    table_rows,
    text_rows,
)
from gradcam_worker.backfill.output import OwnFileFilter
from gradcam_worker.errors import InvalidInput, WeightsUnavailable
from gradcam_worker.schemas.shard import Row
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_user
from gradcam_worker.text.visible import counted, visible

FORMS = ("auto", "jsonl", "csv", "tsv", "text", "inventory", "parquet", "folder")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
}
IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
COMPRESSED = "it looks packed: unpack it, or pack it with gzip; or "
HINTS = {  # for suffixes of formats that are not supported, or whose content is not known
    ".json": "JSON is read a line at a time, and of an S3 inventory the files that its manifest.json names; ",
    ".orc": "ORC is not read: write it as Parquet, or as CSV; or ",
    ".avro": "Avro is not read: write it as Parquet, or as JSON Lines; or ",
    **dict.fromkeys((".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz"), COMPRESSED),
}
STDIN = "-"
PARQUET_BATCH_ROWS = 8192
PARQUET_BUFFER_BYTES = 1024 * 1024  # of each column: a column may have ten million values
_GZIP = b"\x1f\x8b"


class Input:
    """An open input; `name` is without secrets."""

    def __init__(
        self,
        name: str,
        unit: str,
        read: Callable[[RowParser], Iterator[Row]],
        share: Callable[[int], float | None] = lambda _: None,
        own_files: Callable[[], int] = lambda: 0,
    ) -> None:
        """Nothing is read yet.

        Args:
            name: Its name for messages, without secrets.
            unit: What the numbers of its rows count, such as Line.
            read: Yields its rows, from the first one.
            share: Returns the share of the input that a number of rows is, from 0 to 1; None: unknown.
            own_files: Returns the number of files left out because backfills wrote them.
        """
        self.own_files = own_files
        self.name = name
        self._unit = unit
        self._read = read
        self._share = share
        self._count = 0

    def share(self) -> float | None:
        """Return the share that has been read, from 0 to 1; None if the size is unknown."""
        return self._share(self._count)

    def total(self) -> int | None:
        """Estimate the number of rows from what has been read; None: unknown."""
        share = self.share()
        return round(self._count / share) if share and self._count else None

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order, from the first one. A pipe can be read only once.

        Raises InvalidInput if the input cannot be read further, or has no row.
        """
        self._count = 0
        try:
            for row in self._read(RowParser(self._unit)):
                self._count += 1
                yield row
        except InvalidInput as error:
            message = f"{self.name} {error}"
            raise InvalidInput(message) from error
        except (EOFError, OSError, zlib.error) as error:
            so_far = counted(self._count, "row")
            message = f"{self.name} is damaged, or cannot be read further, after {so_far}: {error}"
            raise InvalidInput(message) from error
        if not self._count:
            message = f"{self.name} is empty: there is no image in it."
            raise InvalidInput(message)


@contextmanager
def open_input(
    where: str,
    settings: Settings,
    *,
    form: str = "auto",
    column: str | None = None,
    output: str | None = None,
    inputs: Mapping[str, str] = NO_INPUTS,
) -> Iterator[Input]:
    """Open an input. Files compressed with gzip are recognized, whatever their name.

    Args:
        where: A path, `s3://bucket/prefix`, `s3://bucket/list.jsonl`, or `-` for standard input.
        settings: For S3.
        form: One of FORMS; auto: by the suffix of the name.
        column: The column, or the field, with the URIs.
        output: This backfill's. Its files, and those of other backfills, are left out of a folder or prefix.
        inputs: The columns, or the fields, with what the network takes beside the image, by its names.

    Yields:
        The input.

    Raises:
        InvalidInput: It cannot be read, or its format is unknown.
    """
    requested, form = form, _resolve_form(where, form)
    if inputs and form not in {"jsonl", "csv", "tsv", "parquet"}:
        message = f"{_display_name(where)} is read as {form}, which has no columns for {', '.join(inputs)}."
        raise InvalidInput(message)
    with ExitStack() as stack:
        if form == "folder":
            yield _folder(where, settings, output, explicit=requested == "folder")
            return
        file = _open_file(where, settings, stack)
        if form == "parquet":
            yield _parquet(file, _display_name(where), column, inputs, stack)
            return
        start = file.tell() if file.seekable() else None
        size = os.fstat(file.fileno()).st_size
        readers: dict[str, Callable[[BinaryIO, RowParser], Iterator[Row]]] = {
            "jsonl": partial(json_rows, column=column, inputs=inputs),
            "csv": partial(table_rows, delimiter=",", column=column, inputs=inputs),
            "tsv": partial(table_rows, delimiter="\t", column=column, inputs=inputs),
            "text": text_rows,
            "inventory": inventory_rows,
        }

        def read_text(parser: RowParser) -> Iterator[Row]:
            if start is not None:
                file.seek(start)
            return readers[form](_decompressed(file), parser)

        def share(_: int) -> float | None:
            return None if start is None or file.closed else file.tell() / max(size, file.tell(), 1)

        yield Input(_display_name(where), "Line", read_text, share)


def _folder(where: str, settings: Settings, output: str | None, *, explicit: bool) -> Input:
    """The files below a folder, or the objects below a prefix. Raises InvalidInput if there is none.

    `explicit`: the user asked for a folder, so an object is not taken for a list.
    """
    from gradcam_worker.backfill.inputs import scan

    own_files = [_own_file_filter(where, output)]

    def read(parser: RowParser) -> Iterator[Row]:
        own_files[0] = _own_file_filter(where, output)  # a new one for each reading
        if not _on_s3(where):
            return scan.list_files(where, parser, own_files[0])
        return scan.list_objects(
            where, settings, parser, own_files[0], (lambda _: None) if explicit else _not_a_prefix
        )

    opened = Input(_display_name(where), "Row", read, own_files=lambda: own_files[0].count)
    next(opened.rows(), None)  # so that its errors are raised before anything is written
    return opened


def _own_file_filter(where: str, output: str | None) -> OwnFileFilter:
    """A filter for the files of a folder, or of a prefix, that backfills wrote."""
    if output is None or _on_s3(where) != _on_s3(output):
        return OwnFileFilter()
    if not _on_s3(where):
        return OwnFileFilter(os.path.realpath(unquote(output.partition("://")[2])).rstrip("/") + "/")
    bucket, _, key = output[5:].rstrip("/").partition("/")
    return (
        OwnFileFilter(f"{key}/" if key else "") if bucket == where[5:].partition("/")[0] else OwnFileFilter()
    )


def _not_a_prefix(key: str) -> str | None:
    """An error message for an object whose key was given as a prefix; None if it is an image."""
    suffix = Path(key.casefold()).suffix
    if suffix in IMAGE_SUFFIXES:
        return None
    return f"is an object, and its name does not say what is in it: {_format_hint(key)}"


def _format_hint(name: str) -> str:
    suffix = Path(name.casefold()).suffix
    hint = HINTS.get(suffix, "")
    forms = ", ".join(FORMS[1:-1])
    return f"{hint}say with --format what it is, one of {forms}; or folder, for all whose names begin so."


def _resolve_form(where: str, form: str) -> str:
    """The form of an input. Raises InvalidInput if it is unknown."""
    if form not in FORMS:
        message = f"There is no form {form!r}: it is one of {', '.join(FORMS)}."
        raise InvalidInput(message)
    remote = _on_s3(where)
    folder = not remote and where != STDIN and _is_folder(where)
    if form == "folder" and not (folder or remote):
        message = f"{_display_name(where)} is no folder."
        raise InvalidInput(message)
    if folder and form not in {"auto", "folder"}:
        message = f"{_display_name(where)} is a folder: it cannot be read as {form}."
        raise InvalidInput(message)
    if form != "auto" or where == STDIN:
        return "jsonl" if form == "auto" else form
    suffix = Path(where.casefold().removesuffix(".gz")).suffix
    resolved = "folder" if folder else SUFFIXES.get(suffix, "folder" if remote else None)
    if resolved is None:
        message = (
            f"{_display_name(where)} does not end in {', '.join(SUFFIXES)}, or one of these and .gz: "
            f"{HINTS.get(suffix, '')}say with --format what it is, one of {', '.join(FORMS[1:-1])}."
        )
        raise InvalidInput(message)
    return resolved


def _is_folder(where: str) -> bool:
    if "://" in where:
        message = (
            f"{_display_name(where)} cannot be read: name a path, s3://bucket/..., or - for standard input."
        )
        raise InvalidInput(message)
    try:
        return stat.S_ISDIR(Path(where).stat().st_mode)
    except (OSError, ValueError) as error:
        message = f"{_display_name(where)} cannot be read: {getattr(error, 'strerror', error)}."
        raise InvalidInput(message) from error


def _on_s3(where: str) -> bool:
    return where[:5].casefold() == "s3://"


def _display_name(where: str) -> str:
    if where == STDIN:
        return "Standard input"
    return visible(without_user(where) if "://" in where else where)[:4096]


def _open_file(where: str, settings: Settings, stack: ExitStack) -> io.BufferedReader:
    """Open a file for reading; an object is copied first. Raises InvalidInput."""
    try:
        if where == STDIN:
            return cast("io.BufferedReader", sys.stdin.buffer)
        if not _on_s3(where):
            return stack.enter_context(Path(where).open("rb"))
        from gradcam_worker.storage.s3 import S3

        copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        S3(settings).download("s3://" + where[5:], _FileSink(copy))
        copy.seek(0)
        return cast("io.BufferedReader", copy)
    except WeightsUnavailable as error:
        raise InvalidInput(str(error)) from error
    except OSError as error:
        message = f"{_display_name(where)} cannot be read: {error.strerror or error}."
        raise InvalidInput(message) from error


class _FileSink:
    """See `gradcam_worker.gradcam.files.weights.Sink`."""

    def __init__(self, file: Any) -> None:
        self.write = file.write

    def expect(self, size: int) -> None:
        """Any size is accepted."""


def _decompressed(file: io.BufferedReader) -> BinaryIO:
    if file.peek(2)[:2] != _GZIP:
        return file
    return io.BufferedReader(cast("Any", gzip.GzipFile(fileobj=file)))


def _parquet(
    file: io.BufferedReader, name: str, column: str | None, inputs: Mapping[str, str], stack: ExitStack
) -> Input:
    """The rows of a Parquet file, read in batches, without other columns. Raises InvalidInput."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source: Any = file
    if not file.seekable():
        source = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        shutil.copyfileobj(file, source)
    try:
        table = stack.enter_context(
            pq.ParquetFile(
                source, pre_buffer=False, buffer_size=PARQUET_BUFFER_BYTES, page_checksum_verification=True
            )
        )
        names = table.schema_arrow.names
        try:
            positions = columns(names, column)
            further = input_columns(names, inputs)
        except InvalidInput as error:
            message = f"{name} {error}"
            raise InvalidInput(message) from error
        kind = table.schema_arrow.field(positions.image).type
    except (pa.ArrowException, OSError) as error:
        message = f"{name} cannot be read as Parquet: {error}"
        raise InvalidInput(message) from error
    text_types = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_dictionary,
    )
    if not any(is_type(kind) for is_type in text_types):
        message = f"{name} has a column {names[positions.image]!r} of {kind}: it must hold URIs, as strings."
        raise InvalidInput(message)
    wanted = [names[position] for position in (*positions, *further.values()) if position is not None]

    def read(parser: RowParser) -> Iterator[Row]:
        number = 0
        try:
            for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=wanted, use_threads=False):
                cells = {name: _cells(batch.column(name), pa) for name in wanted}
                values = [
                    cells[names[position]] if position is not None else [None] * len(batch)
                    for position in positions
                ]
                values += [cells[names[position]] for position in further.values()]
                for uri, row_id, sha256, *given in zip(*values, strict=True):
                    yield parser.parse(number, uri, row_id, sha256, dict(zip(further, given, strict=True)))
                    number += 1
        except pa.ArrowException as error:
            message = f"is damaged after {counted(number, 'row')}, or soon after: {error}"
            raise InvalidInput(message) from error

    return Input(name, "Row", read, lambda rows: rows / max(table.metadata.num_rows, 1))


def _cells(cells: Any, pa: Any) -> list[Any]:
    """A column's values. Text that is not UTF-8 gets lone surrogates, by which it is recognized later."""
    try:
        return list(cells.to_pylist())
    except UnicodeDecodeError:
        plain = cells.dictionary_decode() if pa.types.is_dictionary(cells.type) else cells
        raw = plain.cast(pa.large_binary() if pa.types.is_large_string(plain.type) else pa.binary())
        return [
            None if value is None else value.decode(errors="surrogateescape") for value in raw.to_pylist()
        ]
