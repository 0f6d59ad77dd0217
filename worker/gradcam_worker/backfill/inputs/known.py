"""Reads what a list says about its images: true classes, boxes, masks, in the shapes that lists have them.

Classes are ids, wnids or names, as in `--classes`: several in one cell are separated by commas, or are a JSON
list. Boxes are JSON: four numbers, a list of such, objects with `bbox` and `category`, or one object with a
list of each. A mask is the URI of a picture, or COCO's run lengths.
"""

import csv
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO
from urllib.parse import unquote

from pydantic import ValidationError

from gradcam_worker.backfill.inputs.options import BOX_FORMATS
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.annotations import MAX_LABELS, AnnotatedBox, AnnotatedMask
from gradcam_worker.schemas.model import describe
from gradcam_worker.schemas.strict_json import Unreadable, loads
from gradcam_worker.text import comma_lists
from gradcam_worker.text.urls import has_credentials

Class = int | str
BOX_NAMES = ("bbox", "bboxes", "box", "boxes", "xyxy", "xywh")
CATEGORY_NAMES = ("label", "labels", "category", "categories", "class", "classes")
MAX_CLASS_NAME = 128  # characters: see `gradcam_worker.schemas.options.RequestedClass`
MAX_LABEL_MAP_BYTES = 64 * 1024 * 1024
CORNERS = 4
STEPS_UP = re.compile(
    r"(\.{0,2}/)*"
)  # at the beginning of a path: they say nothing about where the file is now
LabelMap = Mapping[str, tuple[Class, ...]]
NO_MAP: LabelMap = {}


class UnreadableCell(ValueError):
    """Why a cell cannot be read, as part of a sentence."""


class NoArea(UnreadableCell):
    """A box has no area, or numbers that are not finite."""


def parse_classes(cell: object, label_map: LabelMap = NO_MAP) -> tuple[Class, ...]:
    """Read the classes in a cell, each once. Raises UnreadableCell."""
    if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
        return ()
    if isinstance(cell, str) and cell.strip() in label_map:
        return label_map[cell.strip()]
    values: Sequence[object]
    if isinstance(cell, str):
        values = _json(cell) if cell.lstrip().startswith("[") else _comma_list(cell)
    else:
        values = cell if isinstance(cell, list | tuple) else [cell]
    found: dict[Class, None] = {}
    for value in values:
        one = _class(value)
        found |= dict.fromkeys(label_map.get(str(one), (one,)))
    if len(found) > MAX_LABELS:
        message = f"has {len(found)} classes; at most {MAX_LABELS} are allowed"
        raise UnreadableCell(message)
    return tuple(found)


def _class(value: object) -> Class:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and 0 < len(value.strip()) <= MAX_CLASS_NAME and value.isprintable():
        return value.strip()
    message = f"has {_shown(value)}, which is no class: write an id, a wnid or a name"
    raise UnreadableCell(message)


def _comma_list(text: str) -> tuple[str, ...]:
    try:
        return comma_lists.parse(text)
    except ValueError as error:
        message = f"has {_shown(text)}: {error}"
        raise UnreadableCell(message) from error


def _json(text: str) -> Any:
    try:
        return loads(text.encode(errors="surrogateescape"), "it")
    except (Unreadable, UnicodeEncodeError) as error:
        message = f"has {_shown(text)}, which cannot be read as JSON: {error}"
        raise UnreadableCell(message) from error


def _shown(value: object) -> str:
    return repr(value)[:80]


def parse_boxes(
    cell: object,
    form: str = BOX_FORMATS[0],
    label_map: LabelMap = NO_MAP,
    leave_out: Callable[[NoArea], None] | None = None,
) -> list[AnnotatedBox]:
    """Read the boxes in a cell.

    Args:
        cell: Of a table, or a value of JSON.
        form: One of `BOX_FORMATS`.
        label_map: For the categories of boxes.
        leave_out: Called for each box that has no area, instead of raising NoArea.

    Returns:
        The boxes.

    Raises:
        UnreadableCell: They cannot be read.
    """
    if isinstance(cell, str):
        text = cell.strip()
        cell = _json(text if text[:1] in {"", "[", "{"} else f"[{text}]") if text else None
    if isinstance(cell, dict):
        cell = _from_object(cell)
    if cell is None:
        return []
    if not isinstance(cell, list | tuple):
        message = f"has {_shown(cell)}, which is no box: write [x, y, width, height], or a list of such"
        raise UnreadableCell(message)
    if len(cell) == CORNERS and all(isinstance(one, int | float) for one in cell):
        cell = [cell]
    found: list[AnnotatedBox] = []
    for one in cell:
        try:
            found += _boxes(one, form, label_map)
        except NoArea as error:
            if leave_out is None:
                raise
            leave_out(error)
    return found


def _from_object(cell: Mapping[str, Any]) -> list[Any]:
    """The boxes of one object, each with its category, if there are categories."""
    boxes: Any = next((cell[name] for name in BOX_NAMES if cell.get(name) is not None), [])
    labels = next((cell[name] for name in CATEGORY_NAMES if cell.get(name) is not None), None)
    if boxes == []:
        return []
    if not isinstance(boxes, list | tuple) or not isinstance(boxes[0], list | tuple | dict):
        return [{"bbox": boxes, "label": labels}]
    if isinstance(labels, list | tuple) and len(labels) == len(boxes):
        return [{"bbox": box, "label": label} for box, label in zip(boxes, labels, strict=True)]
    return [{"bbox": box, "label": labels} for box in boxes]


def _boxes(one: object, form: str, label_map: LabelMap) -> list[AnnotatedBox]:
    """A box, or several where its label stands for several classes."""
    label: object = None
    if isinstance(one, dict):
        label = next((one[name] for name in CATEGORY_NAMES if one.get(name) is not None), None)
        one = next((one[name] for name in BOX_NAMES if one.get(name) is not None), None)
    if not isinstance(one, list | tuple) or len(one) != CORNERS:
        message = f"has {_shown(one)}, which is no box: write [x, y, width, height], or a list of such"
        raise UnreadableCell(message)
    corners, _, relative = form.partition("-")
    try:
        x, y, third, fourth = (float(number) for number in one)
        xyxy = (x, y, third, fourth) if corners == "xyxy" else (x, y, x + third, y + fourth)
        labels: Sequence[Class | None] = parse_classes(label, label_map) or (None,)
        return [AnnotatedBox(xyxy=xyxy, relative=bool(relative), label=name) for name in labels]
    except ValidationError as error:
        message = f"has the box {_shown(one)} as {form}: {describe(error).removeprefix('the message: ')}"
        raise NoArea(message) from error
    except (TypeError, ValueError) as error:
        if isinstance(error, UnreadableCell):
            raise
        message = f"has {_shown(one)}, which is no box: it must hold four numbers"
        raise UnreadableCell(message) from error


def parse_mask(cell: object) -> AnnotatedMask | None:
    """Read the mask in a cell. Raises UnreadableCell."""
    if isinstance(cell, str):
        text = cell.strip()
        if text[:1] != "{":
            return _mask_of_uri(text) if text else None
        cell = _json(text)
    if cell is None:
        return None
    if not isinstance(cell, dict):
        message = f'has {_shown(cell)}, which is no mask: write a URI, or {{"size": [h, w], "counts": ...}}'
        raise UnreadableCell(message)
    if isinstance(cell.get("uri"), str):
        return _mask_of_uri(cell["uri"])
    counts = cell.get("counts")
    cell = {**cell, "counts": counts.decode(errors="replace") if isinstance(counts, bytes) else counts}
    try:
        return AnnotatedMask.model_validate({"rle": cell})
    except ValidationError as error:
        message = f"has a mask that cannot be read: {describe(error)}"
        raise UnreadableCell(message) from error


def _mask_of_uri(uri: str) -> AnnotatedMask:
    if "://" not in uri and not uri.startswith("data:"):
        message = f"has the mask {_shown(uri)}, which is no URI: a path is written as file:///folder/name"
        raise UnreadableCell(message)
    if not uri.isprintable() or has_credentials(uri):
        message = "has a mask whose URI holds a user, a password or control characters"
        raise UnreadableCell(message)
    try:
        return AnnotatedMask(uri=uri)
    except ValidationError as error:
        message = f"has a mask whose URI cannot be read: {describe(error)}"
        raise UnreadableCell(message) from error


def read_label_map(file: BinaryIO, name: str) -> LabelMap:
    """Read a label map: a JSON object, or CSV of two columns, label and class.

    Args:
        file: It.
        name: For messages.

    Returns:
        The classes by label.

    Raises:
        InvalidInput: It cannot be read.
    """
    data = file.read(MAX_LABEL_MAP_BYTES + 1)
    try:
        if len(data) > MAX_LABEL_MAP_BYTES:
            message = f"is longer than {MAX_LABEL_MAP_BYTES:,} bytes"
            raise UnreadableCell(message)  # one sentence for all that can be wrong
        text = data.decode("utf-8-sig")
        pairs = _pairs(text)
        return {str(label).strip(): parse_classes(cell) for label, cell in pairs}
    except (UnicodeDecodeError, ValueError, csv.Error, RecursionError) as error:
        reason = str(error) if isinstance(error, UnreadableCell) else f"cannot be read ({error})"
        message = f'{name} is no label map: it {reason}; it is {{"label": "class"}}, or CSV of label,class.'
        raise InvalidInput(message) from error


def _pairs(text: str) -> Sequence[tuple[object, object]]:
    if text.lstrip().startswith("{"):
        return [*json.loads(text).items()]
    rows = [row for row in csv.reader(io.StringIO(text), skipinitialspace=True, strict=True) if row]
    if bad := next((row for row in rows if len(row) != 2), None):  # noqa: PLR2004  # label and class
        message = f"has the row {_shown(bad)}"
        raise UnreadableCell(message)
    header = [name.strip().casefold() for name in rows[0]] if rows else []
    return [(label, cell) for label, cell in rows[header == ["label", "class"] :]]


class CocoBoxes:
    """The boxes of a COCO annotation file, by file name or by image id."""

    def __init__(self, file: BinaryIO, name: str, label_map: LabelMap = NO_MAP) -> None:
        """Read the file, without its outlines, which are most of it.

        Args:
            file: It.
            name: For messages.
            label_map: For its categories.

        Raises:
            InvalidInput: It is no such file.
        """
        try:
            content = json.load(file, object_hook=_without_outline)
            categories = {
                _key(one["id"]): parse_classes(one["name"], label_map)
                for one in content.get("categories", ())
            }
            # Kept as it came: a file has a million boxes, and a list may need a few of them.
            boxes: dict[str, list[tuple[Sequence[float], tuple[Class, ...]]]] = defaultdict(list)
            self.without_area = 0
            for one in content["annotations"]:
                if not one.get("bbox") or one.get("iscrowd"):
                    continue
                x, y, width, height = one["bbox"]
                if width > 0 and height > 0 and math.isfinite(x + y + width + height):
                    labels = categories.get(_key(one.get("category_id")), ())
                    boxes[_key(one["image_id"])].append((one["bbox"], labels))
                else:
                    self.without_area += 1
            self._by_id = {_key(image["id"]): boxes[_key(image["id"])] for image in content["images"]}
            self._by_name: dict[str, list[tuple[str, Any]]] = defaultdict(list)
            for image in content["images"]:
                path = _path(str(image["file_name"]))
                self._by_name[path.rpartition("/")[2]].append((path, boxes[_key(image["id"])]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else str(error)
            message = (
                f"{name} is no COCO annotation file: {what}; it has images with id and file_name, and "
                "annotations with image_id and bbox."
            )
            raise InvalidInput(message) from error

    def find(self, uri: str, row_id: str | None) -> list[AnnotatedBox]:
        """Return the boxes of an image.

        Args:
            uri: Of the image. Its end must be a file name of the file, which only one of its images may have.
            row_id: The image's id in the file, which counts where the name is not known.

        Raises:
            UnreadableCell: The file does not know it, or its boxes cannot be read.
        """
        path = _path(uri)
        named = [
            found for name, found in self._by_name.get(path.rpartition("/")[2], ()) if path.endswith(name)
        ]
        found = named[0] if len(named) == 1 else self._by_id.get(row_id or "")
        if found is None:
            message = "has no image of this name in the COCO file"
            raise UnreadableCell(message)
        form = BOX_FORMATS[0]
        return [
            box for bbox, labels in found for box in _boxes({"bbox": bbox, "label": labels}, form, NO_MAP)
        ]


def _key(value: object) -> str:
    """An id, as a number or a text: writers of COCO files mix both, and pandas makes 7.0 of 7."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _path(name: str) -> str:
    """The path of a URI or of a file name, which may come from Windows, with one slash before it."""
    scheme, is_uri, path = name.partition("://")
    if not is_uri:
        path = name
    elif scheme != "s3":
        path = unquote(path.partition("?")[0])
    return "/" + STEPS_UP.sub("", path.replace("\\", "/"), count=1)


def _without_outline(fields: dict[str, Any]) -> dict[str, Any]:
    fields.pop("segmentation", None)
    return fields
