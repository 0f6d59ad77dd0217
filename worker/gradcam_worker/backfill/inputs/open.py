"""Opens the INPUT of a backfill: a list of images, a folder, an S3 prefix, or standard input.

A bad row becomes a row with a problem, see `gradcam_worker.backfill.inputs.rows`. An input that cannot be
read raises InvalidInput, when it is opened or between two rows.
"""

import io
import lzma
import os
import shutil
import stat
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, cast
from urllib.parse import unquote

from gradcam_worker.backfill.inputs.arrow_tables import ArrowFile, ArrowReader
from gradcam_worker.backfill.inputs.files import (
    STDIN,
    display_name,
    on_s3,
    open_file,
    packed_name,
    unpacked,
)
from gradcam_worker.backfill.inputs.filters import NameFilter
from gradcam_worker.backfill.inputs.further import (
    ROLES,
    FurtherColumns,
    Kinds,
    choose_carried,
)
from gradcam_worker.backfill.inputs.inventory import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    InventoryReader,
    read_manifest,
)
from gradcam_worker.backfill.inputs.known import NO_MAP, CocoBoxes, read_label_map
from gradcam_worker.backfill.inputs.options import (
    DEFAULT_OPTIONS,
    FORMS,
    InputOptions,
    box_columns,
    is_coco,
)
from gradcam_worker.backfill.inputs.parts import Part, parts_below, table_form
from gradcam_worker.backfill.inputs.rows import RowParser
from gradcam_worker.backfill.inputs.tables import JsonReader, TableReader, TextReader
from gradcam_worker.backfill.output import OwnFileFilter
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.shard import Row
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
    ".orc": "orc",
}
IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
ARCHIVE = "it looks like an archive: unpack it; or "
HINTS = {  # for suffixes of formats that are not supported, or whose content is not known
    ".json": "JSON is read a line at a time, and of an S3 inventory the files that its manifest.json names; ",
    ".avro": "Avro is not read: write it as Parquet, or as JSON Lines; or ",
    **dict.fromkeys((".zip", ".7z", ".tar", ".tgz"), ARCHIVE),
}
TABLES = ("jsonl", "csv", "tsv", "parquet", "orc")  # forms with columns
ARROW = ("parquet", "orc")
MAX_TENANT_COCO_BYTES = 64 * 1024 * 1024  # some hundred thousand boxes
TYPED_PARTS = 16  # files of a folder that are asked for the types of columns, until all are known
READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError)


class Reader(Protocol):
    """Reads one form of list. All methods may raise InvalidInput; its message begins with the verb."""

    def kinds(self, file: BinaryIO, constants: Mapping[str, str]) -> Kinds:
        """Return the columns and their Arrow types, without reading all rows."""

    def used(self, names: Sequence[str]) -> set[str]:
        """Return those columns that mean something to us."""

    def rows(self, file: BinaryIO, parser: RowParser, constants: Mapping[str, str]) -> Iterator[Row]:
        """Yield the rows; `constants` are columns with one value in all of them."""


class Input:
    """An open input; `name` is without secrets."""

    def __init__(
        self,
        name: str,
        unit: str,
        read: Callable[[RowParser], Iterator[Row]],
        names: NameFilter,
        further: FurtherColumns,
        *,
        share: Callable[[int], float | None] = lambda _: None,
        filter_rows: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        """Nothing is read yet.

        Args:
            name: Its name for messages, without secrets.
            unit: What the numbers of its rows count, such as Line.
            read: Yields its rows, from the first one.
            names: What leaves files out.
            further: Its further columns.
            share: Returns the share of the input that a number of rows is, from 0 to 1; None: unknown.
            filter_rows: Whether rows are left out by `names`, as `read` does not do it.
            notes: What is to be told of it.
        """
        self.name, self.carried, self.annotated = name, further.carried, further.annotated
        self._unit, self._read, self._share = unit, read, share
        self._names, self._further, self._filter_rows = names, further, filter_rows
        self._notes, self._count = notes, 0

    def share(self) -> float | None:
        """Return the share that has been read, from 0 to 1; None if the size is unknown."""
        return self._share(self._count)

    def total(self) -> int | None:
        """Estimate the number of rows from what has been read; None: unknown."""
        share = self.share()
        return round(self._count / share) if share and self._count else None

    def notes(self) -> list[str]:
        """Return sentences about what was left out so far."""
        return [*self._notes, *self._names.notes(), *self._further.notes()]

    def rows(self) -> Iterator[Row]:
        """Yield the rows in order, from the first one. A pipe can be read only once.

        Raises InvalidInput if the input cannot be read further, or has no row.
        """
        self._count = yielded = 0
        self._names.skipped.clear()
        self._further.forget()
        try:
            for row in self._read(RowParser(self._unit, self._further)):
                self._count += 1
                if self._filter_rows and not row.problem and self._names.is_unwanted(_path(row.uri)):
                    continue
                yielded += 1
                yield row
        except InvalidInput as error:
            message = f"{self.name} {error}"
            raise InvalidInput(message) from error
        except READ_ERRORS as error:
            so_far = counted(self._count, "row")
            message = f"{self.name} is damaged, or cannot be read further, after {so_far}: {error}"
            raise InvalidInput(message) from error
        if not yielded:
            left_out = f" {' '.join(self._names.notes())}" if self._names.skipped else ""
            message = f"{self.name} is empty: there is no image in it.{left_out}"
            raise InvalidInput(message)


def _path(uri: str) -> str:
    """The path of a URI, to which patterns are applied."""
    scheme, slashes, rest = uri.partition("://")
    if not slashes:
        return ""
    path = rest.partition("/")[2]
    return path if scheme.casefold() == "s3" else unquote(path.partition("?")[0])


@contextmanager
def open_input(
    where: str,
    settings: Settings,
    options: InputOptions = DEFAULT_OPTIONS,
    *,
    output: str | None = None,
    fixed: Mapping[str, str] | None = None,
    may_read: Callable[[str], bool] | None = None,
) -> Iterator[Input]:
    """Open an input. Packed files are recognized, whatever their name.

    Args:
        where: A path, `s3://bucket/prefix`, `s3://bucket/list.jsonl`, or `-` for standard input.
        settings: For S3.
        options: How it is read, and what is left out.
        output: This backfill's. Its files, and those of other backfills, are left out.
        fixed: Types of carried columns that an earlier run has found.
        may_read: Whether files that an input or its options name may be read, by URI; None: all may.

    Yields:
        The input.

    Raises:
        InvalidInput: It cannot be read, or its format is unknown.
    """
    form = _resolve_form(where, options.form, settings)
    _check_columns(where, form, options)
    with ExitStack() as stack:
        names = NameFilter(options.include, options.exclude, _own_file_filter(where, output, form))
        opening = _Opening(where, settings, options, stack, names, fixed, may_read)
        if form == "folder":
            yield _folder(opening, output, explicit=options.form == "folder")
        else:
            yield _list(opening, form)


@dataclass(frozen=True)
class _Opening:
    """What an input is opened with."""

    where: str
    settings: Settings
    options: InputOptions
    stack: ExitStack
    names: NameFilter
    fixed: Mapping[str, str] | None
    may_read: Callable[[str], bool] | None
    notes: list[str] = field(default_factory=list)

    def check(self, where: str) -> None:
        """Raise InvalidInput if a file that the input or an option names may not be read."""
        if self.may_read and not self.may_read(where):
            message = f"{display_name(where)} may not be read by this tenant."
            raise InvalidInput(message)

    def further(self, reader: Reader | None = None, kinds: Kinds = (), name: str = "") -> FurtherColumns:
        """The further columns of the input; messages about its columns begin with `name`."""
        options, settings = self.options, self.settings
        label_map, coco = NO_MAP, None
        carried: Mapping[str, str] = {}
        if options.label_map:
            self.check(options.label_map)
            with ExitStack() as stack:
                file = unpacked(open_file(options.label_map, settings, stack))
                label_map = read_label_map(file, display_name(options.label_map))
        if options.boxes and is_coco(options.boxes):
            self.check(options.boxes)
            with ExitStack() as stack:
                file = unpacked(open_file(options.boxes, settings, stack))
                if self.may_read:
                    file = _limited(file, display_name(options.boxes))
                coco = CocoBoxes(file, display_name(options.boxes), label_map)
            if coco.without_area:
                many = counted(coco.without_area, "box", "boxes")
                self.notes.append(f"Left out {many} of {display_name(options.boxes)}, without an area.")
        if kinds and reader:
            with _told_with(name):
                used = reader.used([column for column, _ in kinds])
                carried, notes = choose_carried(kinds, used, options, self.fixed)
            self.notes.extend(notes)
        return FurtherColumns(options, carried, label_map, coco)


def _limited(file: BinaryIO, name: str) -> BinaryIO:
    """A COCO file of a tenant, which is read as a whole into the memory of the gateway's process."""
    data = file.read(MAX_TENANT_COCO_BYTES + 1)
    if len(data) > MAX_TENANT_COCO_BYTES:
        message = (
            f"{name} is longer than {MAX_TENANT_COCO_BYTES:,} bytes: name the boxes in a column of the list."
        )
        raise InvalidInput(message)
    return io.BytesIO(data)


def _check_columns(where: str, form: str, options: InputOptions) -> None:
    """Raise InvalidInput if columns are named where there are none."""
    named = [*options.inputs, *(name for role in ROLES if (name := getattr(options, role)))]
    named += box_columns(options)
    if named and form not in TABLES:
        message = f"{display_name(where)} is read as {form}, which has no columns for {', '.join(named)}."
        raise InvalidInput(message)


def _folder(opening: _Opening, output: str | None, *, explicit: bool) -> Input:
    """The files below a folder, or the objects below a prefix. Raises InvalidInput if there is none.

    `explicit`: the user asked for a folder, so an object is not taken for a list.
    """
    from gradcam_worker.backfill.inputs import scan

    where, names = opening.where, opening.names

    def read(parser: RowParser) -> Iterator[Row]:
        names.restart(_own_file_filter(where, output, "folder"))
        if not on_s3(where):
            return scan.list_files(where, parser, names)
        allowed: Callable[[str], str | None] = (lambda _: None) if explicit else _not_a_prefix
        return scan.list_objects(where, opening.settings, parser, names, allowed)

    opened = Input(display_name(where), "Row", read, names, opening.further())
    next(opened.rows(), None)  # so that its errors are raised before anything is written
    return opened


def _with_later_types(
    kinds: Kinds, reader: ArrowReader, parts: Sequence[Part], settings: Settings, form: str
) -> Kinds:
    """The types of columns; of those that are null in the whole first file, from the files after it."""
    for part in parts:
        if all(kind for _, kind in kinds):
            break
        # A file that cannot be read is told when its rows are.
        with suppress(InvalidInput, *READ_ERRORS), ExitStack() as stack:
            later = dict(reader.kinds(_OpenPart(part, settings, stack, form).content(), part.constants))
            kinds = [(name, kind or later.get(name, "")) for name, kind in kinds]
    return kinds


def _list(opening: _Opening, form: str) -> Input:
    """The rows of a list, in one file or in many. Raises InvalidInput."""
    name = display_name(opening.where)
    try:
        parts, reader, form = _parts_and_reader(opening, form)
        told = name if len(parts) == 1 else f"{name}: {parts[0].name}"
        with _told_with(told):
            first = _OpenPart(parts[0], opening.settings, opening.stack, form)
            # Lines of URIs have no columns: a stream of them is not waited for.
            kinds = (
                () if isinstance(reader, TextReader) else reader.kinds(first.content(), parts[0].constants)
            )
            if isinstance(reader, ArrowReader):
                kinds = _with_later_types(kinds, reader, parts[1:TYPED_PARTS], opening.settings, form)
        further = opening.further(reader, kinds, told)
    except READ_ERRORS as error:
        message = f"{name} is damaged, or cannot be read: {error}"
        raise InvalidInput(message) from error
    if getattr(reader, "has_annotations", False):
        further.annotated = True
    now: list[_OpenPart] = [first]

    def read(parser: RowParser) -> Iterator[Row]:
        for index, part in enumerate(parts):
            with ExitStack() as stack:
                now[:] = [_OpenPart(part, opening.settings, stack, form) if index else first]
                parser.part = part.name if len(parts) > 1 else ""
                done[0] = index
                yield from reader.rows(now[0].content(), parser, part.constants)

    done = [0]

    def share(rows: int) -> float | None:
        inside = now[0].share(rows if len(parts) == 1 else None)
        return None if inside is None else min((done[0] + inside) / len(parts), 1.0)

    unit = "Row" if form in ARROW else "Line"
    by_row = not isinstance(reader, InventoryReader)
    return Input(
        name,
        unit,
        read,
        opening.names,
        further,
        share=share,
        filter_rows=by_row and _has_patterns(opening.options),
        notes=opening.notes,
    )


def _has_patterns(options: InputOptions) -> bool:
    return bool(options.include or options.exclude)


@contextmanager
def _told_with(name: str) -> Iterator[None]:
    """Put the name of the input before the messages of its reader."""
    try:
        yield
    except InvalidInput as error:
        message = f"{name} {error}"
        raise InvalidInput(message) from error


def _parts_and_reader(opening: _Opening, form: str) -> tuple[Sequence[Part], Reader, str]:
    """The files of a list, what reads them, and their form. Raises InvalidInput."""
    where, options, settings = opening.where, opening.options, opening.settings
    name = display_name(where)
    if form == "manifest":
        with ExitStack() as stack, _told_with(name):
            manifest = read_manifest(where, open_file(where, settings, stack).read(MAX_MANIFEST_BYTES))
        for file in manifest.files:
            opening.check(file)
        parts = [Part(file, file.rpartition("/")[2]) for file in manifest.files]
        if not parts:
            message = f"{name} is empty: it names no files."
            raise InvalidInput(message)
        return parts, InventoryReader(manifest.form, manifest.names, opening.names), manifest.form
    if form == "inventory":
        return [Part(where, "")], InventoryReader("csv", (), opening.names), "csv"
    readers: dict[str, Callable[[], Reader]] = {
        "jsonl": lambda: JsonReader(options),
        "csv": lambda: TableReader(options, ","),
        "tsv": lambda: TableReader(options, "\t"),
        "text": TextReader,
        "parquet": lambda: ArrowReader(options, "parquet"),
        "orc": lambda: ArrowReader(options, "orc"),
    }
    parts = parts_below(where, form, settings) if _is_table_folder(where) else [Part(where, "")]
    return parts, readers[form](), form


def _is_table_folder(where: str) -> bool:
    return where.endswith("/") if on_s3(where) else where != STDIN and Path(where).is_dir()


class _OpenPart:
    """A file of a list that can be read several times; a pipe once beyond what was read of it first."""

    def __init__(self, part: Part, settings: Settings, stack: ExitStack, form: str) -> None:
        self._file, self._form = open_file(part.where, settings, stack), form
        self._replayed: _Replayed | None = None
        self._rows: int | None = None
        if form in ARROW:
            if not self._file.seekable():
                copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
                shutil.copyfileobj(self._file, copy)
                self._file = cast("io.BufferedReader", copy)
            return
        self._start = self._file.tell() if self._file.seekable() else None
        self._size = os.fstat(self._file.fileno()).st_size

    def content(self) -> BinaryIO:
        """The file from its beginning, unpacked."""
        if self._form in ARROW:
            self._file.seek(0)
            self._rows = ArrowFile(self._file, self._form).num_rows
            return self._file
        if self._start is not None:
            self._file.seek(self._start)
            return unpacked(self._file)
        if self._replayed is None:
            self._replayed = _Replayed(unpacked(self._file))
        else:
            self._replayed.rewind()
        return cast("BinaryIO", self._replayed)

    def share(self, rows: int | None) -> float | None:
        """The share that has been read of it, if `rows` are that many rows of it."""
        if self._form in ARROW:
            return rows / max(self._rows or 0, 1) if rows is not None else 0.0
        if self._start is None or self._file.closed:
            return None
        return self._file.tell() / max(self._size, self._file.tell(), 1)


class _Replayed:
    """The lines of a pipe; those read before `rewind` come again, once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: deque[bytes] = deque()
        self._recording = True

    def rewind(self) -> None:
        """Begin again with the first line."""
        self._recording = False

    def readline(self, size: int = -1) -> bytes:
        """See `io.IOBase`. It must be called with the same sizes again."""
        if not self._recording and self._lines:
            return self._lines.popleft()
        line = self._file.readline(size)
        if self._recording:
            self._lines.append(line)
        return line


def _own_file_filter(where: str, output: str | None, form: str) -> OwnFileFilter:
    """A filter for the files of a folder, of a prefix or of an inventory that backfills wrote."""
    if form in {"manifest", "inventory"}:
        remote = output is not None and on_s3(output)
        return OwnFileFilter(f"{(output or '')[5:].rstrip('/')}/", below=True) if remote else OwnFileFilter()
    if form != "folder" or output is None or on_s3(where) != on_s3(output):
        return OwnFileFilter()
    if not on_s3(where):
        own = os.path.realpath(unquote(output.partition("://")[2])).rstrip("/") + "/"
        base = os.path.realpath(where).rstrip("/") + "/"
        return OwnFileFilter(own, below=own != base and own.startswith(base))
    bucket, _, key = output[5:].rstrip("/").partition("/")
    listed, _, prefix = where[5:].partition("/")
    if bucket != listed:
        return OwnFileFilter()
    below = bool(key) and f"{key}/".startswith(prefix) and key != prefix.rstrip("/")
    return OwnFileFilter(f"{key}/" if key else "", below=below)


def _not_a_prefix(key: str) -> str | None:
    """An error message for an object whose key was given as a prefix; None if it is an image."""
    suffix = Path(key.casefold()).suffix
    if suffix in IMAGE_SUFFIXES:
        return None
    return f"is an object, and its name does not say what is in it: {_format_hint(key)}"


def _format_hint(name: str) -> str:
    suffix = Path(packed_name(name)).suffix
    hint = HINTS.get(suffix, "")
    forms = ", ".join(FORMS[1:-1])
    return f"{hint}say with --format what it is, one of {forms}; or folder, for all whose names begin so."


def _resolve_form(where: str, form: str, settings: Settings) -> str:
    """The form of an input. Raises InvalidInput if it is unknown."""
    if form not in FORMS:
        message = f"There is no form {form!r}: it is one of {', '.join(FORMS)}."
        raise InvalidInput(message)
    remote = on_s3(where)
    folder = not remote and where != STDIN and _is_folder(where)
    if form == "folder" and not (folder or remote):
        message = f"{display_name(where)} is no folder."
        raise InvalidInput(message)
    if folder and form not in {"auto", "folder", *TABLES, "text"}:
        message = f"{display_name(where)} is a folder: it cannot be read as {form}."
        raise InvalidInput(message)
    if form in {"auto", "inventory"} and where.rpartition("/")[2].casefold() == MANIFEST:
        return "manifest"
    if form != "auto" or where == STDIN:
        return "jsonl" if form == "auto" else form
    if folder or (remote and where.endswith("/")):
        return table_form(where, settings) or "folder"
    suffix = Path(packed_name(where)).suffix
    resolved = SUFFIXES.get(suffix, "folder" if remote else None)
    if resolved is None:
        message = (
            f"{display_name(where)} does not end in {', '.join(SUFFIXES)}, "
            "or one of these and .gz, .bz2, .xz or .zst: "
            f"{HINTS.get(suffix, '')}say with --format what it is, one of {', '.join(FORMS[1:-1])}."
        )
        raise InvalidInput(message)
    return resolved


def _is_folder(where: str) -> bool:
    if "://" in where:
        message = (
            f"{display_name(where)} cannot be read: name a path, s3://bucket/..., or - for standard input."
        )
        raise InvalidInput(message)
    try:
        return stat.S_ISDIR(Path(where).stat().st_mode)
    except (OSError, ValueError) as error:
        message = f"{display_name(where)} cannot be read: {getattr(error, 'strerror', error)}."
        raise InvalidInput(message) from error
