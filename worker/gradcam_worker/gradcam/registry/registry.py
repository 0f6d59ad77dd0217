"""The networks that jobs can use: those of the catalog, and an operator's, which a TOML file describes.

    [networks.tumours]
    model = "s3://models/tumours-v7.keras"  # or a path, relative to this file
    sha256 = "..."
    labels = "tumours.txt"                  # a file of any usual kind, a list, or "imagenet"
    preprocessing = "torch"                 # or { scale = 0.00784, offset = -1.0, channels = "bgr" }
    input_size = [384, 384]                 # height, width
    sizing = "keras.load_img"               # or { resize = "bilinear", fit = "letterbox", color = 114 }

    [networks.birds]
    architecture = "efficientnetb0"         # of keras.applications
    weights = "birds.weights.h5"
    sha256 = "..."
    classes = 200                           # if there are no labels
    pretrained = true                       # built with weights="imagenet"; default: read from the file

The file is read again after each change. It is validated completely. Of the files that it names, only those
of labels are opened here.
"""

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from pydantic import ValidationError

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.gradcam import catalog
from gradcam_worker.gradcam.catalog import CATALOG, ModelFile, NetworkRow
from gradcam_worker.gradcam.files import label_file
from gradcam_worker.gradcam.files.label_file import IMAGENET, IMAGENET_CLASSES
from gradcam_worker.gradcam.registry.registry_file import (
    OperatorNetwork,
    RegistryFile,
    describe_errors,
    parse_toml,
)
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

MAX_TEXT_BYTES = 1_000_000  # of the registry, and of each file of labels

Stamp = tuple[int, int, int]  # of a file: time of change in ns, size in bytes, inode


class Registry:
    """All networks by name. Thread-safe. Each access costs a `stat` of each file that was read."""

    def __init__(self, path: Path | None = None) -> None:
        """Read the registry.

        Args:
            path: The TOML file; None: only the networks of the catalog.

        Raises:
            InvalidSettings: The file is invalid; the message lists all errors.
        """
        self._path = path
        self._lock = threading.Lock()
        self._rows: Mapping[str, NetworkRow] = CATALOG
        self._stamps: dict[Path, Stamp | None] = {}
        if path:
            self._read(path)

    def find(self, name: str) -> NetworkRow:
        """Find the current row of a network. Raises UnknownNetwork, with suggestions of similar names."""
        return CATALOG[name] if name in CATALOG else catalog.find(name, self.rows())

    def rows(self) -> Mapping[str, NetworkRow]:
        """All networks by name.

        If the file has become invalid, the networks stay as they were, and the error is logged once.
        """
        if self._path is None:
            return self._rows
        with self._lock:
            if any(_stamp(path) != stamp for path, stamp in self._stamps.items()):
                try:
                    self._read(self._path)
                    log.info("registry_reloaded", path=self._path, networks=[*self._operator_networks()])
                except InvalidSettings as error:
                    log.error("registry_reload_failed", error=error)  # noqa: TRY400  # without a traceback
            return self._rows

    def operator_networks(self) -> tuple[NetworkRow, ...]:
        """The operator's networks."""
        self.rows()
        return tuple(self._operator_networks().values())

    def _operator_networks(self) -> dict[str, NetworkRow]:
        return {name: row for name, row in self._rows.items() if row.file}

    def _read(self, path: Path) -> None:
        """Read the file. Raises InvalidSettings with all errors; later changes are noticed even then."""
        files = _Files()
        self._stamps = files.stamps
        try:
            registry_file = RegistryFile.model_validate(parse_toml(files.text(path)))
        except ValidationError as error:
            raise _invalid(path, describe_errors(error)) from error
        except RecursionError as error:
            raise _invalid(path, ["it is nested too deeply"]) from error
        except (OSError, ValueError) as error:
            raise _invalid(path, [label_file.describe(error)]) from error
        rows, errors = {}, []
        for name, table in registry_file.networks.items():
            try:
                rows[name] = _row(name, table, path.absolute().parent, files)
            except (OSError, ValueError) as error:
                errors.append(f"networks.{name}.labels: {label_file.describe(error)}")
        if errors:
            raise _invalid(path, errors)
        self._rows = {**CATALOG, **rows}


def _invalid(path: Path, errors: list[str]) -> InvalidSettings:
    reasons = "; ".join(errors)
    full_stop = "" if reasons.endswith("?") else "."
    return InvalidSettings(f"GRADCAM_NETWORKS: {path} cannot be used: {reasons}{full_stop}")


class _Files:
    """Reads text files and remembers their stamps."""

    def __init__(self) -> None:
        self.stamps: dict[Path, Stamp | None] = {}

    def text(self, path: Path) -> str:
        """Read a file. Raises OSError, ValueError."""
        self.stamps[path] = None
        with path.open("rb") as file:
            self.stamps[path] = _stamp_of(os.fstat(file.fileno()))
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            message = f"{path} has more than {MAX_TEXT_BYTES:,} bytes, the most that is read"
            raise ValueError(message)
        return data.decode("utf-8-sig")


def _stamp_of(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _stamp(path: Path) -> Stamp | None:
    try:
        return _stamp_of(path.stat())
    except OSError:
        return None


def _row(name: str, table: OperatorNetwork, folder: Path, files: _Files) -> NetworkRow:
    """Make a row of a table of the file. Raises OSError, ValueError for its labels."""
    labels = _labels(table.labels, folder, files)
    count = IMAGENET_CLASSES if labels is None else len(labels)
    if table.classes and count and table.classes != count:
        message = f"there are {count}, but classes is {table.classes}"
        raise ValueError(message)
    architecture, size, preprocessing = table.architecture_row, table.input_size, table.to_preprocessing()
    if architecture:
        row = replace(
            architecture,
            name=name,
            input_size=size or architecture.input_size,
            preprocessing=preprocessing or architecture.preprocessing,
            map_size=architecture.map_size if size in {None, architecture.input_size} else None,
            parameters=None,  # with another head
            keras_files=(),
            classes=table.classes or count,
            pretrained=table.pretrained,
        )
    elif size and preprocessing:
        row = NetworkRow(name, size, preprocessing)
    else:
        message = "a model needs input_size and preprocessing"  # `OperatorNetwork` checks that
        raise AssertionError(message)
    return replace(
        row,
        file=ModelFile(_resolve_uri(table.model or table.weights or "", folder), table.sha256),
        labels=labels,
        head=table.to_head(),
        sizing=table.to_sizing(),
        target_layer=table.target_layer or row.target_layer,
        scores_only=table.only_gives_scores,
        layout=table.layout,
        imports=table.imports,
        inputs=table.to_inputs(),
        image_input=table.image_input,
    )


def _resolve_uri(address: str, folder: Path) -> str:
    """Resolve an address in the file to `s3://...` or an absolute path."""
    if address.startswith("s3://"):
        return address
    if address.startswith("file://"):
        return unquote(address.removeprefix("file://"))
    return str(folder / address)


def _labels(labels: str | tuple[str, ...], folder: Path, files: _Files) -> tuple[str, ...] | None:
    """The names of the classes; empty if they have numbers; None for those of ImageNet."""
    if labels in {IMAGENET, ()}:
        return None if labels else ()
    if not isinstance(labels, str):
        return label_file.check(labels)
    if "://" in labels and not labels.startswith("file://"):
        message = f"{labels!r} must be a file on this machine, or the names themselves in a list"
        raise ValueError(message)
    path = Path(_resolve_uri(labels, folder))
    return label_file.parse(files.text(path), path)
