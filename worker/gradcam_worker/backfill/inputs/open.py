"""Opens the INPUT of a backfill: a list of images, a folder, an S3 prefix, or standard input.

What is wrong with one row is that row's problem, see `gradcam_worker.backfill.inputs.rows`. An input that
cannot be read raises InvalidInput, when it is opened or between two rows.
"""

import gzip
import io
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from gradcam_worker.backfill.inputs.rows import RowParser
from gradcam_worker.backfill.inputs.tables import columns, inventory_rows, json_rows, table_rows, text_rows
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
IMAGES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
COMPRESSED = "it looks packed: unpack it, or pack it with gzip; or "
HINTS = {  # by the ending of what is read in no form, or in none that could be guessed
    ".json": "JSON is read a line at a time, and of an S3 inventory the files that its manifest.json names; ",
    ".orc": "ORC is not read: write it as Parquet, or as CSV; or ",
    ".avro": "Avro is not read: write it as Parquet, or as JSON Lines; or ",
    **dict.fromkeys((".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz"), COMPRESSED),
}
STDIN = "-"
BATCH = 8192  # rows of a Parquet file that are read at once
BUFFER = 1024 * 1024  # bytes of each of its columns in memory: a column may hold ten million values
_GZIP = b"\x1f\x8b"


class Input:
    """An input that is open; `name` is without secrets."""

    def __init__(
        self,
        name: str,
        unit: str,
        read: Callable[[RowParser], Iterator[Row]],
        share: Callable[[int], float | None] = lambda _: None,
        own_files: Callable[[], int] = lambda: 0,
    ) -> None:
        """An input that has not been read yet.

        Args:
            name: What it is called, without secrets.
            unit: What the numbers of its rows count.
            read: Yields its rows, from the first one on.
            share: How much of it a number of rows is, from 0 to 1.
            own_files: How many files were left out because backfills have written them.
        """
        self.own_files = own_files
        self.name = name
        self._unit = unit
        self._read = read
        self._share = share
        self._count = 0

    def share(self) -> float | None:
        """How much of it has been read, from 0 to 1; None where its end is not known."""
        return self._share(self._count)

    def rows(self) -> Iterator[Row]:
        """Its rows in order, from the first one; from a pipe they can be had once.

        Raises InvalidInput where nothing more can be read, and where there is no row at all.
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
) -> Iterator[Input]:
    """Open an input: a path, `s3://bucket/prefix`, `s3://bucket/list.jsonl`, or `-`, for standard input.

    `form` is one of FORMS; auto goes by the ending of the name. `column` names the column, or the field,
    with the URIs. What is compressed with gzip is read as well, whatever its name. Of a folder, and of a
    prefix, what backfills have written is left out, in `output` and in theirs. Raises InvalidInput.
    """
    asked, form = form, _form(where, form)
    with ExitStack() as stack:
        if form == "folder":
            yield _folder(where, settings, output, explicit=asked == "folder")
            return
        file = _open(where, settings, stack)
        if form == "parquet":
            yield _parquet(file, _display_name(where), column, stack)
            return
        start = file.tell() if file.seekable() else None
        size = os.fstat(file.fileno()).st_size
        kinds: dict[str, Callable[[BinaryIO, RowParser], Iterator[Row]]] = {
            "jsonl": partial(json_rows, column=column),
            "csv": partial(table_rows, delimiter=",", column=column),
            "tsv": partial(table_rows, delimiter="\t", column=column),
            "text": text_rows,
            "inventory": inventory_rows,
        }

        def read_text(parser: RowParser) -> Iterator[Row]:
            if start is not None:
                file.seek(start)
            return kinds[form](_decompressed(file), parser)

        def share(_: int) -> float | None:
            return None if start is None or file.closed else file.tell() / max(size, file.tell(), 1)

        yield Input(_display_name(where), "Line", read_text, share)


def _folder(where: str, settings: Settings, output: str | None, *, explicit: bool) -> Input:
    """The files below a folder, or the objects below a prefix. Raises InvalidInput where there is none.

    `explicit`: the user has said that it is no list.
    """
    from gradcam_worker.backfill.inputs import scan

    own_files = [_own_file_filter(where, output)]

    def read(parser: RowParser) -> Iterator[Row]:
        own_files[0] = _own_file_filter(where, output)  # for each reading anew
        if not _on_s3(where):
            return scan.list_files(where, parser, own_files[0])
        return scan.list_objects(
            where, settings, parser, own_files[0], (lambda _: None) if explicit else _not_a_prefix
        )

    found = Input(_display_name(where), "Row", read, own_files=lambda: own_files[0].count)
    next(found.rows(), None)  # whatever is wrong with it is told before anything is written
    return found


def _own_file_filter(where: str, output: str | None) -> OwnFileFilter:
    """Tells which files of a folder, or of a prefix, backfills have written."""
    if output is None or _on_s3(where) != _on_s3(output):
        return OwnFileFilter()
    if not _on_s3(where):
        return OwnFileFilter(os.path.realpath(unquote(output.partition("://")[2])).rstrip("/") + "/")
    bucket, _, key = output[5:].rstrip("/").partition("/")
    return (
        OwnFileFilter(f"{key}/" if key else "") if bucket == where[5:].partition("/")[0] else OwnFileFilter()
    )


def _not_a_prefix(key: str) -> str | None:
    """What an object is that was taken for a prefix, unless it is an image."""
    ending = Path(key.casefold()).suffix
    if ending in IMAGES:
        return None
    return f"is an object, and its name does not say what is in it: {_format_hint(key)}"


def _format_hint(name: str) -> str:
    ending = Path(name.casefold()).suffix
    hint = HINTS.get(ending, "")
    forms = ", ".join(FORMS[1:-1])
    return f"{hint}say with --format what it is, one of {forms}; or folder, for all whose names begin so."


def _form(where: str, form: str) -> str:
    """What an input is. Raises InvalidInput where that cannot be told."""
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
    ending = Path(where.casefold().removesuffix(".gz")).suffix
    found = "folder" if folder else SUFFIXES.get(ending, "folder" if remote else None)
    if found is None:
        message = (
            f"{_display_name(where)} does not end in {', '.join(SUFFIXES)}, or one of these and .gz: "
            f"{HINTS.get(ending, '')}say with --format what it is, one of {', '.join(FORMS[1:-1])}."
        )
        raise InvalidInput(message)
    return found


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


def _open(where: str, settings: Settings, stack: ExitStack) -> io.BufferedReader:
    """A file to be read. Raises InvalidInput."""
    try:
        if where == STDIN:
            return cast("io.BufferedReader", sys.stdin.buffer)
        if not _on_s3(where):
            return stack.enter_context(Path(where).open("rb"))
        from gradcam_worker.storage.s3 import S3

        copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        S3(settings).download("s3://" + where[5:], _Copy(copy))
        copy.seek(0)
        return cast("io.BufferedReader", copy)
    except WeightsUnavailable as error:
        raise InvalidInput(str(error)) from error
    except OSError as error:
        message = f"{_display_name(where)} cannot be read: {error.strerror or error}."
        raise InvalidInput(message) from error


class _Copy:
    """See `gradcam_worker.gradcam.models.weights.Sink`."""

    def __init__(self, file: Any) -> None:
        self.write = file.write

    def expect(self, size: int) -> None:
        """As much as the disk holds."""


def _decompressed(file: io.BufferedReader) -> BinaryIO:
    if file.peek(2)[:2] != _GZIP:
        return file
    return io.BufferedReader(cast("Any", gzip.GzipFile(fileobj=file)))


def _parquet(file: io.BufferedReader, name: str, column: str | None, stack: ExitStack) -> Input:
    """The rows of a Parquet file, a few thousand at a time, and no other columns. Raises InvalidInput."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole: Any = file
    if not file.seekable():
        whole = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        shutil.copyfileobj(file, whole)
    try:
        table = stack.enter_context(
            pq.ParquetFile(whole, pre_buffer=False, buffer_size=BUFFER, page_checksum_verification=True)
        )
        names = table.schema_arrow.names
        try:
            at = columns(names, column)
        except InvalidInput as error:
            message = f"{name} {error}"
            raise InvalidInput(message) from error
        kind = table.schema_arrow.field(at.image).type
    except (pa.ArrowException, OSError) as error:
        message = f"{name} cannot be read as Parquet: {error}"
        raise InvalidInput(message) from error
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_dictionary)
    if not any(fits(kind) for fits in texts):
        message = f"{name} has a column {names[at.image]!r} of {kind}: it must hold URIs, as strings."
        raise InvalidInput(message)
    wanted = [names[place] for place in at if place is not None]

    def read(parser: RowParser) -> Iterator[Row]:
        number = 0
        try:
            for batch in table.iter_batches(BATCH, columns=wanted, use_threads=False):
                cells = {name: _cells(batch.column(name), pa) for name in wanted}
                given = [cells[names[place]] if place is not None else [None] * len(batch) for place in at]
                for uri, row_id, sha256 in zip(*given, strict=True):
                    yield parser.parse(number, uri, row_id, sha256)
                    number += 1
        except pa.ArrowException as error:
            message = f"is damaged after {counted(number, 'row')}, or soon after: {error}"
            raise InvalidInput(message) from error

    return Input(name, "Row", read, lambda given: given / max(table.metadata.num_rows, 1))


def _cells(cells: Any, pa: Any) -> list[Any]:
    """A column's values, with halves of characters in what is not UTF-8: it is told by them."""
    try:
        return list(cells.to_pylist())
    except UnicodeDecodeError:
        plain = cells.dictionary_decode() if pa.types.is_dictionary(cells.type) else cells
        raw = plain.cast(pa.large_binary() if pa.types.is_large_string(plain.type) else pa.binary())
        return [None if one is None else one.decode(errors="surrogateescape") for one in raw.to_pylist()]
