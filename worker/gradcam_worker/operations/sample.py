"""Photos with the right class of each: a folder of folders that are named by class, or a CSV.

The CSV has a header with `path` (relative to the CSV's folder) and `label`. It may have columns that are
named by classes, with the probabilities that the owner's own program gives them; for two classes, one named
`probability` may hold that of class 1. Columns that are named by further inputs of the network hold their
values.
"""

import csv
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from gradcam_worker.backfill.inputs.open import IMAGE_SUFFIXES
from gradcam_worker.errors import AmbiguousClass, InvalidInput, UnknownClass
from gradcam_worker.gradcam.classes import ClassIndex, fold
from gradcam_worker.gradcam.network import Classifier
from gradcam_worker.text.visible import counted

PATH_HEADERS, LABEL_HEADERS = ("path", "file", "filename", "image"), ("label", "class")
SINGLE_HEADER = "probability"  # of class 1 of two
MAX_NAMED = 5  # folders, lines or classes in a message


@dataclass(frozen=True)
class Photo:
    """A photo and its class.

    Attributes:
        path: Of its file.
        class_id: Its class.
        probabilities: That its owner's program gives classes, by their ids.
        inputs: The values of further inputs of the network, by name.
    """

    path: Path
    class_id: int
    probabilities: Mapping[int, float] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """Photos, and the columns of their CSV that were not used."""

    photos: tuple[Photo, ...]
    unused_columns: tuple[str, ...] = ()

    @property
    def has_probabilities(self) -> bool:
        """Whether the owner's own probabilities are known."""
        return any(photo.probabilities for photo in self.photos)

    def choose(self, limit: int) -> "Sample":
        """Choose at most `limit` photos, of all classes as evenly as possible; always the same ones."""
        order = random.Random(0).sample(range(len(self.photos)), len(self.photos))  # noqa: S311  # no secret
        seen: Counter[int] = Counter()
        turns = {}
        for index in order:
            class_id = self.photos[index].class_id
            turns[index] = seen[class_id]
            seen[class_id] += 1
        chosen = sorted(sorted(order, key=turns.__getitem__)[:limit])
        return Sample(tuple(self.photos[index] for index in chosen), self.unused_columns)


def read(source: Path, network: Classifier) -> Sample:
    """Read a sample.

    Args:
        source: A folder, or a CSV.
        network: Names the classes, and its further inputs.

    Returns:
        The photos, in the order of their names, or of the lines.

    Raises:
        InvalidInput: There are no photos, or folders, labels or columns that name no class.
    """
    sample = _read_folder(source, network) if source.is_dir() else _read_table(source, network)
    if not sample.photos:
        message = f"{source} holds no photos."
        raise InvalidInput(message)
    return sample


def _read_folder(folder: Path, network: Classifier) -> Sample:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))
    folders = [path for path in entries if path.is_dir()]
    if not folders:
        message = (
            f"{folder} has no folders: put the photos of each class into a folder that is named by the class,"
            " or name a CSV with the columns path and label."
        )
        raise InvalidInput(message)
    classes, unknown = {}, []
    for path in folders:
        try:
            classes[path] = network.labels.find(path.name).id
        except UnknownClass:
            unknown.append(path.name)
        except AmbiguousClass as error:
            message = f"The folder {path.name!r}: {error}"
            raise InvalidInput(message) from error
    if unknown:
        are = "The folder {} names" if len(unknown) == 1 else "The folders {} name"
        reason = _why_unknown(network, sorted(path.name for path in folders))
        message = f"{are.format(_listed(unknown))} no class of {network.facts.name}: {reason}"
        raise InvalidInput(message)
    photos = (
        Photo(path, class_id)
        for parent, class_id in classes.items()
        for path in sorted(parent.rglob("*"))
        if path.suffix.casefold() in IMAGE_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    return Sample(tuple(photos))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(map(repr, names[:MAX_NAMED])) + more


def _why_unknown(network: Classifier, names: Sequence[str]) -> str:
    """What to do about labels of photos that name no class."""
    labels = network.labels
    is_numbered = labels == ClassIndex.numbered(len(labels))
    if is_numbered and len(names) == len(labels):
        quoted = ", ".join(f'"{name}"' for name in names)
        return (
            "its classes have no names. If it was trained on such folders in alphabetical order, as Keras "
            f"reads them, add labels = [{quoted}] to networks.{network.facts.name}."
        )
    if is_numbered:
        return f"its {counted(len(labels), 'class', 'classes')} have no names, only ids from 0: set labels."
    return f"it has {_listed([label.name for label in labels.labels])}; a class is named by name, id or wnid."


def _read_table(path: Path, network: Classifier) -> Sample:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, skipinitialspace=True, strict=True)
            header = [name.strip() for name in next(lines, [])]
            return _Table(path, header, network).read(lines)
    except OSError as error:
        message = f"{path}: {error.strerror}."
        raise InvalidInput(message) from error
    except (csv.Error, UnicodeDecodeError) as error:
        message = f"{path} is neither a folder nor a CSV in UTF-8: {error}."
        raise InvalidInput(message) from error


class _Table:
    """The columns of a CSV."""

    def __init__(self, path: Path, header: Sequence[str], network: Classifier) -> None:
        """Find out what each column is. Raises InvalidInput."""
        labels = network.labels
        self._where, self._width, self._network = path, len(header), network
        folded = [fold(name) for name in header]
        self._path, self._label = (self._find(folded, names) for names in (PATH_HEADERS, LABEL_HEADERS))
        self._classes: dict[int, int] = {}  # position of a column -> id of its class
        self._inputs: dict[int, str] = {}  # position of a column -> name of a further input
        inputs = {fold(one.name): one.name for one in network.facts.inputs if not one.constant}
        unused, is_single = [], len(labels) == 2  # noqa: PLR2004  # of one unit, as a rule
        for position, name in enumerate(header):
            if position in {self._path, self._label}:
                continue
            if fold(name) in inputs:
                self._inputs[position] = inputs[fold(name)]
                continue
            try:
                class_id = 1 if is_single and fold(name) == SINGLE_HEADER else labels.find(name).id
            except (UnknownClass, AmbiguousClass):
                unused.append(name)
                continue
            if class_id in self._classes.values():
                message = f"{path}: two columns name the class {labels[class_id]}."
                raise InvalidInput(message)
            self._classes[position] = class_id
        self._unused = tuple(unused)

    def _find(self, folded: Sequence[str], names: Sequence[str]) -> int:
        found = [folded.index(name) for name in names if name in folded]
        if not found:
            message = (
                f"{self._where} must begin with a header that names the columns path and label; it begins "
                f"with {_listed(folded) or 'nothing'}."
            )
            raise InvalidInput(message)
        return found[0]

    def read(self, lines: Iterator[list[str]]) -> Sample:
        """Read the photos. Raises InvalidInput, with all lines of which the label is unknown."""
        photos: list[Photo] = []
        unknown: dict[str, int] = {}
        for number, cells in enumerate(lines, start=2):
            if not any(map(str.strip, cells)):
                continue
            if len(cells) != self._width:
                message = (
                    f"{self._where}, row {number}: it has {len(cells)} columns, the header {self._width}; "
                    "what holds a comma stands in double quotes."
                )
                raise InvalidInput(message)
            label = cells[self._label].strip()
            try:
                class_id = self._network.labels.find(label).id
            except UnknownClass:
                unknown.setdefault(label, number)
                continue
            except AmbiguousClass as error:
                message = f"{self._where}, row {number}: {error}"
                raise InvalidInput(message) from error
            own = {
                of: self._probability(cells[at], number)
                for at, of in self._classes.items()
                if cells[at].strip()
            }
            inputs = {name: cells[at].strip() for at, name in self._inputs.items() if cells[at].strip()}
            photos.append(Photo(self._where.parent / cells[self._path].strip(), class_id, own, inputs))
        if unknown:
            rows = ", ".join(
                f"{label!r} (row {number})" for label, number in islice(unknown.items(), MAX_NAMED)
            )
            reason = _why_unknown(self._network, sorted(unknown))
            message = f"{self._where}: no class of {self._network.facts.name} is called {rows}: {reason}"
            raise InvalidInput(message)
        return Sample(tuple(photos), self._unused)

    def _probability(self, text: str, row: int) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 <= value <= 1:
            message = f"{self._where}, row {row}: {text!r} is no probability from 0 to 1."
            raise InvalidInput(message)
        return value
