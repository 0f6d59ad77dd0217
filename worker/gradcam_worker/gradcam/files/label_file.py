"""The names of classes as people store them.

    benign                             a text file: one name a line,
    0 benign                           each after its number perhaps, as Teachable Machine writes them
    ["benign", "malignant"]            JSON: a list,
    {"benign": 0, "malignant": 1}      names with their ids, as Keras's `class_indices`,
    {"0": "benign", "1": "malignant"}  ids with their names, as `id2label`, alone or in a whole config.json
    id,name                            CSV: with a header, in any order, or names alone

Ids count from 0, in the order of the network's scores.
"""

import csv
import io
import json
from collections.abc import Iterable, KeysView, Mapping, Sequence
from collections.abc import Set as AbstractSet
from numbers import Integral
from pathlib import Path
from typing import Any

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.classes import ClassIndex, fold, imagenet

Labels = Sequence[str] | Mapping[str, int] | Mapping[int, str] | Path  # in Python, see `given`
IMAGENET, IMAGENET_CLASSES = "imagenet", 1000  # stands for the labels of ImageNet, and their number
MAX_NAME_LENGTH = 256  # characters of the name of a class
TABLES = (".csv", ".tsv")  # endings; `.json` is the third one that counts, and all others are lines of text
ID_HEADERS = {"id", "index", "idx", "class_id", "class_index", "class_idx", "label_id", "label_index"}
NAME_HEADERS = {"name", "names", "class", "classes", "class_name", "label", "labels", "label_name"}
SHAPES = (
    'a list of names, names with their ids ({"benign": 0}), or ids with their names ({"0": "benign"}, alone '
    "or as id2label of a config)"
)


def parse(text: str, path: Path) -> tuple[str, ...]:
    """Parse a file of labels by its ending: `.json`, `.csv`, `.tsv`; any other is lines of text.

    Args:
        text: What the file holds.
        path: Its path, for the ending and for messages.

    Returns:
        The names, in the order of the ids.

    Raises:
        ValueError: They cannot be read, an id is missing or has two names, or one is no name.
    """
    ending = path.suffix.casefold()
    if ending == ".json":
        return _parse_json(text, path)
    if ending in TABLES:
        return _parse_table(text.rstrip(), ending)
    lines = text.rstrip().split("\n")
    numbered = [line.split(maxsplit=1) for line in lines]
    if len(lines) > 1 and all(
        len(parts) > 1 and parts[0] == str(class_id) for class_id, parts in enumerate(numbered)
    ):
        lines = [name for _, name in numbered]
    return check(lines)


def check(names: Any) -> tuple[str, ...]:
    """Return the names without surrounding spaces. Raises ValueError for the first that is no name."""
    if not isinstance(names, Iterable):
        message = f"{names!r} is none of {SHAPES}, and not the path of a file"
        raise ValueError(message)  # noqa: TRY004  # as for all that cannot be read
    if isinstance(names, AbstractSet) and not isinstance(names, KeysView):
        message = "a set has no order: give a list, in the order of the outputs"
        raise ValueError(message)  # noqa: TRY004  # as for all that cannot be read
    names = [*names]
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str) or not name.strip():
            message = f"number {number} is {name!r}, which is no name"
            raise ValueError(message)
        if len(name.strip()) > MAX_NAME_LENGTH or not name.strip().isprintable():
            message = (
                f"number {number} is {name[:40]!r}...: a name is printable, of at most {MAX_NAME_LENGTH} "
                "letters"
            )
            raise ValueError(message)
    return tuple(name.strip() for name in names)


def from_mapping(mapping: Mapping[Any, Any]) -> tuple[str, ...]:
    """Read names with their ids, ids with their names, or a config that holds either.

    Args:
        mapping: `class_indices`, `id2label`, or a config with `id2label` or `label2id`.

    Returns:
        The names, in the order of the ids.

    Raises:
        ValueError: It is neither, an id is missing or has two names, or one is no name.
    """
    for key in ("id2label", "label2id"):
        if isinstance(mapping.get(key), Mapping):
            mapping = mapping[key]
            break
    if mapping and all(
        isinstance(value, Integral) and not isinstance(value, bool) for value in mapping.values()
    ):
        return _in_order((int(class_id), name) for name, class_id in mapping.items())
    for key, value in mapping.items():
        if not (_is_id(key) and isinstance(value, str)):
            message = f"it must hold {SHAPES}; of {str(key)[:40]!r} it holds {str(value)[:40]!r}"
            raise ValueError(message)
    return _in_order((int(class_id), name) for class_id, name in mapping.items())


def given(labels: Labels) -> tuple[str, ...] | None:
    """Read labels in Python: names, a mapping as in `from_mapping`, or the path of a file of labels.

    Args:
        labels: As said; `imagenet` stands for the classes of ImageNet.

    Returns:
        The names, in the order of the ids; empty if classes have numbers; None for those of ImageNet.

    Raises:
        NetworkIncompatible: They cannot be read; the message gives the reason.
    """
    try:
        if isinstance(labels, str | Path):
            if labels == IMAGENET:
                return None
            return parse(Path(labels).read_text("utf-8-sig"), Path(labels))
        return from_mapping(labels) if isinstance(labels, Mapping) else check(labels)
    except (OSError, ValueError) as error:
        message = f"The labels cannot be used: {describe(error)}."
        raise NetworkIncompatible(message) from error


def class_index(row: NetworkRow, units: int) -> ClassIndex:
    """The labels of a row, one for each of the classes that the units of a network stand for.

    Args:
        row: Of the network.
        units: The number of its outputs; one decides between two classes.

    Returns:
        The labels.

    Raises:
        NetworkIncompatible: There are more or fewer labels than classes.
    """
    classes = max(units, 2)
    if row.labels == ():
        return ClassIndex.numbered(classes)
    labels = imagenet() if row.labels is None else ClassIndex.of(row.labels)
    if len(labels) != classes:
        message = f"{row.name} has {classes} classes, but {len(labels)} labels are given for them."
        if units == 1:
            message += (
                " It ends in one unit, which decides between two: name class 0, for which the unit is low, "
                "before class 1."
            )
        raise NetworkIncompatible(message)
    return labels


def describe(error: OSError | ValueError) -> str:
    """Describe why a text file cannot be used, as a part of a sentence."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start}"
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _is_id(value: Any) -> bool:
    is_number = isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's, too
    return is_number or (isinstance(value, str) and value.isascii() and value.isdecimal())


def _in_order(pairs: Iterable[tuple[int, Any]]) -> tuple[str, ...]:
    """The names in the order of their ids, which must be 0, 1, 2, ... without a gap. Raises ValueError."""
    names: dict[int, Any] = {}
    for class_id, name in pairs:
        if class_id in names:
            message = f"id {class_id} has two names, {names[class_id]!r} and {name!r}"
            raise ValueError(message)
        names[class_id] = name
    if not names:
        message = f"it is empty: it must hold {SHAPES}"
        raise ValueError(message)
    first, last = min(names), max(names)
    if first == 1 and last == len(names):
        message = f"ids run from 1 to {last}, but the outputs of a network count from 0: subtract 1 from each"
        raise ValueError(message)
    if first < 0:
        message = f"id {first} is less than 0"
        raise ValueError(message)
    if last != len(names) - 1:
        missing = next(class_id for class_id in range(last) if class_id not in names)
        message = f"id {missing} has no name, and the highest id is {last}"
        raise ValueError(message)
    return check([names[class_id] for class_id in range(len(names))])


def _parse_json(text: str, path: Path) -> tuple[str, ...]:
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        message = f"{path} is nested too deeply"
        raise ValueError(message) from error
    if isinstance(value, dict):
        return from_mapping(value)
    if not isinstance(value, list) or not value:
        message = f"{path} must hold {SHAPES}"
        raise ValueError(message)
    return check(value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len({*keys}) < len(keys):
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        message = f"it names {twice[:40]!r} twice"
        raise ValueError(message)
    return dict(pairs)


def _parse_table(text: str, ending: str) -> tuple[str, ...]:
    """Parse CSV. Raises ValueError."""
    first_line = text.partition("\n")[0]
    separator = "\t" if ending == ".tsv" else ";" if ";" in first_line and "," not in first_line else ","
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
        )
        rows = [[cell.strip() for cell in row] or [""] for row in reader]
    except csv.Error as error:
        message = f"it is no CSV ({error})"
        raise ValueError(message) from error
    for line, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            message = (
                f"line {line} has {len(row)} columns, the first has {len(rows[0])}: a name that holds "
                f"{separator!r} stands in double quotes"
            )
            raise ValueError(message)
    if not rows or len(rows[0]) == 1:
        names = [row[0] for row in rows]
        return check(names[1:] if names and fold(names[0]) in NAME_HEADERS else names or [""])
    has_header = not any(map(_is_id, rows[0]))
    header = [fold(cell) for cell in rows[0]] if has_header else []
    columns = [[row[index] for row in rows[int(has_header) :]] for index in range(len(rows[0]))]
    ids, names = _ids_and_names(header, columns)
    for line, class_id in enumerate(ids, start=1 + has_header):
        if not _is_id(class_id):
            message = f"line {line} has the id {class_id[:40]!r}, which is no number from 0 up"
            raise ValueError(message)
    return _in_order(zip(map(int, ids), names, strict=True))


def _ids_and_names(header: list[str], columns: list[list[str]]) -> tuple[list[str], list[str]]:
    """The columns of ids and of names, told by the header, else by what they hold. Raises ValueError."""
    numbers = [index for index, column in enumerate(columns) if all(map(_is_id, column))]
    ids = [index for index, name in enumerate(header) if name in ID_HEADERS]
    if not ids and len(numbers) == 1:
        ids = numbers
    names = [index for index, name in enumerate(header) if name in NAME_HEADERS and index not in ids]
    if not names and len(columns) == 2:  # noqa: PLR2004  # an id and a name
        names = [index for index in range(2) if index not in ids]
    if len(ids) != 1 or len(names) != 1:
        found = f"its header is {','.join(header)!r}" if header else "it has no header"
        message = f"{found}: it must name one column id and one column name"
        raise ValueError(message)
    return columns[ids[0]], columns[names[0]]
