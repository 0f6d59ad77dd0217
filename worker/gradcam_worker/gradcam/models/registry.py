"""The networks that a job can name: the catalog's, and an operator's own, described in a TOML file.

    [networks.tumours]
    model = "s3://models/tumours-v7.keras"  # or a path; a relative one starts at the registry's folder
    sha256 = "..."
    labels = "tumours.txt"                  # a file, a list, or "imagenet"; left out: numbers
    preprocessing = "torch"                 # or { scale = 0.00784, offset = -1.0, channels = "bgr" }
    input_size = [384, 384]                 # height, width

    [networks.birds]
    architecture = "efficientnetb0"         # of keras.applications
    weights = "birds.weights.h5"
    sha256 = "..."
    classes = 200                           # where there are no labels
    pretrained = true                       # built with weights="imagenet"; left out: as the file says

The file is read again when it has changed. Nothing in it is trusted to be right, and nothing that it names
is opened here but the labels.
"""

import json
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pydantic import ValidationError

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.gradcam import catalog
from gradcam_worker.gradcam.catalog import CATALOG, ModelFile, NetworkRow
from gradcam_worker.gradcam.models.registry_file import (
    IMAGENET,
    IMAGENET_CLASSES,
    OwnNetwork,
    RegistryFile,
    findings,
    parse_toml,
)

log = logging.getLogger("gradcam")

MAX_NAME = 256  # letters of a class
MAX_TEXT_BYTES = 1_000_000  # of the registry and of each file of labels

Stamp = tuple[int, int, int]  # a file's time of change in ns, size, inode


class Registry:
    """Every network by name. Threads may share it. To ask costs a `stat` of each file it was read from."""

    def __init__(self, path: Path | None = None) -> None:
        """Without a file there are the catalog's networks. Raises InvalidSettings."""
        self._path = path
        self._lock = threading.Lock()
        self._rows: Mapping[str, NetworkRow] = CATALOG
        self._stamps: dict[Path, Stamp | None] = {}
        if path:
            self._read(path)

    def find(self, name: str) -> NetworkRow:
        """The row of a network, as the file has it now. Raises UnknownNetwork with names that are near."""
        return CATALOG[name] if name in CATALOG else catalog.find(name, self.rows())

    def rows(self) -> Mapping[str, NetworkRow]:
        """The catalog's networks and the operator's.

        Where the file has changed and cannot be used any more, the networks stay as they were, and the log
        says why, once.
        """
        if self._path is None:
            return self._rows
        with self._lock:
            if any(_stamp(path) != stamp for path, stamp in self._stamps.items()):
                try:
                    self._read(self._path)
                    log.info("%s was read again: %s", self._path, ", ".join(self._own()) or "no networks")
                except InvalidSettings as error:
                    log.error("the networks stay as they were: %s", error)  # noqa: TRY400  # a sentence is enough
            return self._rows

    def own(self) -> tuple[NetworkRow, ...]:
        """The operator's networks alone."""
        self.rows()
        return tuple(self._own().values())

    def _own(self) -> dict[str, NetworkRow]:
        return {name: row for name, row in self._rows.items() if row.file}

    def _read(self, path: Path) -> None:
        """Raises InvalidSettings with all that is wrong; what was read is watched even so."""
        files = _Files()
        self._stamps = files.stamps
        try:
            described = RegistryFile.model_validate(parse_toml(files.text(path)))
        except ValidationError as error:
            raise _invalid(path, findings(error)) from error
        except RecursionError as error:
            raise _invalid(path, ["it is nested too deeply"]) from error
        except (OSError, ValueError) as error:
            raise _invalid(path, [_reason(error)]) from error
        rows, wrong = {}, []
        for name, table in described.networks.items():
            try:
                rows[name] = _row(name, table, path.absolute().parent, files)
            except (OSError, ValueError) as error:
                wrong.append(f"networks.{name}.labels: {_reason(error)}")
        if wrong:
            raise _invalid(path, wrong)
        self._rows = {**CATALOG, **rows}


def _invalid(path: Path, wrong: list[str]) -> InvalidSettings:
    reasons = "; ".join(wrong)
    full_stop = "" if reasons.endswith("?") else "."
    return InvalidSettings(f"GRADCAM_NETWORKS: {path} cannot be used: {reasons}{full_stop}")


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}"
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


class _Files:
    """Reads text files and remembers what they were when they were read."""

    def __init__(self) -> None:
        self.stamps: dict[Path, Stamp | None] = {}

    def text(self, path: Path) -> str:
        """Raises OSError, ValueError."""
        self.stamps[path] = None
        with path.open("rb") as file:
            self.stamps[path] = _identity(os.fstat(file.fileno()))
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            message = f"{path} has more than {MAX_TEXT_BYTES:,} bytes, the most that is read"
            raise ValueError(message)
        return data.decode("utf-8-sig")


def _identity(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _stamp(path: Path) -> Stamp | None:
    try:
        return _identity(path.stat())
    except OSError:
        return None


def _row(name: str, table: OwnNetwork, folder: Path, files: _Files) -> NetworkRow:
    """One table of the file -> a row like the catalog's. Raises OSError, ValueError for its labels."""
    labels = _labels(table.labels, folder, files)
    count = IMAGENET_CLASSES if labels is None else len(labels)
    if table.classes and count and table.classes != count:
        message = f"there are {count}, but classes is {table.classes}"
        raise ValueError(message)
    like, size, how = table.like, table.input_size, table.how()
    if like:
        row = replace(
            like,
            name=name,
            input_size=size or like.input_size,
            preprocessing=how or like.preprocessing,
            map_size=like.map_size if size in {None, like.input_size} else None,
            parameters=None,  # its head is another one
            keras_files=(),
            classes=table.classes or count,
            pretrained=table.pretrained,
        )
    elif size and how:
        row = NetworkRow(name, size, how)
    else:
        message = "a model needs input_size and preprocessing"  # which `OwnNetwork` has seen to
        raise AssertionError(message)
    return replace(
        row,
        file=ModelFile(_place(table.model or table.weights or "", folder), table.sha256),
        labels=labels,
        head=table.read_as(),
        target_layer=table.target_layer or row.target_layer,
    )


def _place(address: str, folder: Path) -> str:
    """An address of the file -> `s3://...`, or an absolute path."""
    if address.startswith("s3://"):
        return address
    if address.startswith("file://"):
        return unquote(address.removeprefix("file://"))
    return str(folder / address)


def _labels(given: str | tuple[str, ...], folder: Path, files: _Files) -> tuple[str, ...] | None:
    """The names of the classes; none where they have numbers; None for ImageNet's."""
    if given in {IMAGENET, ()}:
        return None if given else ()
    names = _names(given, folder, files) if isinstance(given, str) else given
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str) or not name.strip():
            message = f"number {number} is {name!r}, which is no name"
            raise ValueError(message)
        if len(name.strip()) > MAX_NAME or not name.strip().isprintable():
            message = (
                f"number {number} is {name[:40]!r}...: a name is printable, of at most {MAX_NAME} letters"
            )
            raise ValueError(message)
    return tuple(name.strip() for name in names)


def _names(address: str, folder: Path, files: _Files) -> Sequence[Any]:
    """A file of labels: one name a line, or, called `.json`, a list of names."""
    if "://" in address and not address.startswith("file://"):
        message = f"{address!r} must be a file on this machine, or the names themselves in a list"
        raise ValueError(message)
    path = Path(_place(address, folder))
    text = files.text(path)
    if path.suffix != ".json":
        return text.rstrip().split("\n")
    try:
        names = json.loads(text)
    except RecursionError as error:
        message = f"{path} is nested too deeply"
        raise ValueError(message) from error
    if not isinstance(names, list) or not names:
        message = f"{path} must hold a list of names"
        raise ValueError(message)
    return names
