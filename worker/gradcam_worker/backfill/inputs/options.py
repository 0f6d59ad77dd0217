"""What is asked of an input: how it is read, what its columns mean, what is left out."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

NO_COLUMNS: Mapping[str, str] = MappingProxyType({})
BoxFormat = Literal["xywh", "xyxy", "xywh-relative", "xyxy-relative"]
BOX_FORMATS: tuple[str, ...] = get_args(BoxFormat)
CORNERS = 4
FORMS = ("auto", "jsonl", "csv", "tsv", "text", "inventory", "parquet", "orc", "folder")


@dataclass(frozen=True)
class InputOptions:
    """How an input is read. Columns are fields, where it is JSON."""

    form: str = "auto"  # one of FORMS; auto: by the name
    column: str | None = None  # with the URIs
    inputs: Mapping[str, str] = field(default_factory=lambda: NO_COLUMNS)  # of the network, beside the image
    include: tuple[str, ...] = ()  # patterns of names; none: all
    exclude: tuple[str, ...] = ()
    keep: tuple[str, ...] | None = None  # further columns that the dataset gets; None: all
    drop: tuple[str, ...] = ()  # those that it does not get
    classes_from: str | None = None  # column with the row's own classes, explained beside the others
    label: str | None = None  # column with the true classes
    label_map: str | None = None  # file: label in the input -> class of the network
    boxes: str | None = None  # column, four columns with commas, or a COCO file, which ends in .json
    boxes_format: str = BOX_FORMATS[0]  # of a column: a COCO file says it itself
    mask: str | None = None  # column with the URI of a picture, or with run lengths


DEFAULT_OPTIONS = InputOptions()


def box_columns(options: InputOptions) -> tuple[str, ...]:
    """The column with boxes, or the four with the corners of one; none: they are in no column."""
    if not options.boxes or is_coco(options.boxes):
        return ()
    names = tuple(name.strip() for name in options.boxes.split(","))
    return names if len(names) == CORNERS else (options.boxes,)


def is_coco(boxes: str) -> bool:
    """Return whether boxes are in a COCO file, not in a column."""
    return boxes.casefold().removesuffix(".gz").endswith(".json")
