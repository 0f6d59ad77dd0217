"""What a row has beside its image: what is known about it, what is asked of it alone, what is carried along.

Which columns are carried, and with which types, is fixed when the input is opened: all files of a dataset
have the same columns.
"""

import fnmatch
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from gradcam_worker.artifacts.dataset import own_columns
from gradcam_worker.backfill.inputs.known import (
    NO_MAP,
    CocoBoxes,
    LabelMap,
    NoArea,
    UnreadableCell,
    parse_boxes,
    parse_classes,
    parse_mask,
)
from gradcam_worker.backfill.inputs.options import (
    CORNERS,
    DEFAULT_OPTIONS,
    NO_COLUMNS,
    InputOptions,
    box_columns,
)
from gradcam_worker.errors import InvalidInput
from gradcam_worker.schemas.annotations import AnnotatedBox, Annotations
from gradcam_worker.schemas.model import describe
from gradcam_worker.schemas.shard import MAX_COLUMNS
from gradcam_worker.text.visible import counted, visible

TEXT = "string"
MAX_NAME = 256  # characters of a column's name: see `gradcam_worker.schemas.shard.CarriedColumns`
MAX_CELL = 65_536  # characters of a text that is carried, or entries of a list
MAX_LOST = 200  # characters of the first value that was lost, or of why
MAX_TOLD = 20  # sentences about values that were lost
MAX_COUNTED = 1000  # of their kinds
NOT_UTF_8, TOO_LONG = "not UTF-8", f"longer than {MAX_CELL:,}"
NO_AREA = "a box without an area"
ROLES = ("classes_from", "label", "mask")  # options that name a single column
Kinds = Sequence[tuple[str, str]]  # columns and their Arrow types; a name may be there twice


class FurtherColumns:
    """The further columns of an input, and how to read their values."""

    def __init__(
        self,
        options: InputOptions = DEFAULT_OPTIONS,
        carried: Mapping[str, str] = NO_COLUMNS,
        label_map: LabelMap = NO_MAP,
        coco: CocoBoxes | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            options: The input's.
            carried: The columns that are carried, and their Arrow types as text.
            label_map: The classes of labels.
            coco: The boxes of images, if they are in a file of their own.
        """
        self._options, self.carried, self._label_map, self._coco = options, dict(carried), label_map, coco
        self._boxes = box_columns(options)
        self.special = (*(name for role in ROLES if (name := getattr(options, role))), *self._boxes)
        self.annotated = self._reads_known = bool(options.label or options.boxes or options.mask)
        self.is_empty = not (self.special or self.carried or coco)
        self._lost: Counter[tuple[str, str]] = Counter()  # by column and reason
        self._first_lost: dict[tuple[str, str], str] = {}

    def read(
        self, place: str, uri: str, row_id: str | None, values: Sequence[Any]
    ) -> tuple[dict[str, Any], str | None]:
        """Read the values of a row.

        Args:
            place: Where it is, such as Line 7.
            uri: Of its image.
            row_id: Its id.
            values: Those of the columns `special`, as they came, and of `carried`, as JSON.

        Returns:
            Fields of the row, and what is wrong with the classes that it asks for, if so.
        """
        cells, options, problem = iter(values), self._options, None
        fields: dict[str, Any] = {}
        if options.classes_from:
            try:
                fields["classes"] = parse_classes(next(cells), self._label_map) or None
            except UnreadableCell as error:
                problem = f"its column {options.classes_from!r} {error}"
        if self._reads_known:
            fields["annotations"] = self._annotations(place, uri, row_id, cells)
        if self.carried:
            carried = tuple(cells)
            fields["carried"] = None if carried.count(None) == len(carried) else carried
        return fields, problem

    def _annotations(
        self, place: str, uri: str, row_id: str | None, cells: Iterable[Any]
    ) -> Annotations | None:
        """What is known of an image. What cannot be read is counted, and the image is explained without."""
        cells, options = iter(cells), self._options
        found: dict[str, Any] = {}
        if options.label:
            found["labels"] = self._known(options.label, place, parse_classes, next(cells), self._label_map)
        if options.mask:
            found["mask"] = self._known(options.mask, place, parse_mask, next(cells))
        if self._coco:
            boxes = self._known(str(options.boxes), place, self._coco.find, uri, row_id)
            found["boxes"] = boxes
            if boxes is not None and not options.label:
                labels = (box.label for box in boxes if box.label is not None)
                found["labels"] = tuple(dict.fromkeys(labels))
        elif self._boxes:
            values = [next(cells) for _ in self._boxes]
            cell = values if len(values) > 1 else values[0]
            found["boxes"] = self._known(str(options.boxes), place, self._parse_boxes, cell, place)
        known = {name: value for name, value in found.items() if value}
        return self.valid_annotations(place, known) if known else None

    def valid_annotations(self, place: str, known: Mapping[str, Any]) -> Annotations | None:
        """Return annotations with these fields; None if they are invalid, which is counted."""
        try:
            return Annotations.model_validate(known)
        except ValidationError as error:
            self.lose("annotations", "not valid", place, describe(error))
            return None

    def _parse_boxes(self, cell: Any, place: str) -> list[AnnotatedBox]:
        if len(self._boxes) == CORNERS:
            if all(value in (None, "") for value in cell):
                return []
            try:
                cell = [float(value) for value in cell]
            except (TypeError, ValueError) as error:
                message = f"has {cell!r}, which is no box: each of its columns must hold a number"
                raise UnreadableCell(message) from error

        def leave_out(error: NoArea) -> None:
            self.lose(str(self._options.boxes), NO_AREA, place, str(error).removeprefix("has "))

        return parse_boxes(cell, self._options.boxes_format, self._label_map, leave_out)

    def _known(self, column: str, place: str, parse: Any, cell: Any, *more: Any) -> Any:
        try:
            return parse(cell, *more)
        except UnreadableCell as error:
            self.lose(column, "not readable", place, str(error).removeprefix("has "))
            return None

    def lose(self, column: str, reason: str, place: str, value: object) -> None:
        """Count a value that is not kept; `reason` completes the sentence "It is ..."."""
        key = column, reason
        if key not in self._lost and len(self._lost) >= MAX_COUNTED:
            key = "others", "too many to name"
        self._lost[key] += 1
        if key not in self._first_lost:
            self._first_lost[key] = f"{place}: {visible(str(value))[:MAX_LOST]}"

    def forget(self) -> None:
        """Count from the start again."""
        self._lost.clear()
        self._first_lost.clear()

    def notes(self) -> list[str]:
        """Return sentences about the values that were lost so far."""
        sentences = [
            f"Column {column[:MAX_NAME]!r}: {counted(count, 'value is', 'values are')} left out, being "
            f"{reason}; the first in {self._first_lost[column, reason]}"
            for (column, reason), count in self._lost.most_common(MAX_TOLD)
        ]
        if more := len(self._lost) - len(sentences):
            sentences.append(f"Values of {counted(more, 'other column', 'other columns')} are left out, too.")
        return sentences


def choose_carried(
    kinds: Kinds, used: Iterable[str], options: InputOptions, fixed: Mapping[str, str] | None
) -> tuple[dict[str, str], list[str]]:
    """Choose the columns that are carried into the dataset.

    Args:
        kinds: All columns of the input, with their Arrow types.
        used: Those that mean something to us, such as the one with the URIs.
        options: The input's.
        fixed: Types of an earlier run, which its columns keep where they hold what is there now.

    Returns:
        The columns with their types, and sentences about those that are left out by themselves.

    Raises:
        InvalidInput: A name is one of the dataset's own, is there twice, is too long, or is not there.
    """
    names, types = [name for name, _ in kinds if name and name.isprintable()], dict(kinds)
    left, notes = {*used}, []
    if options.keep is not None:
        kept = _matching(names, options.keep, "--keep-columns")
        chosen = [name for name in names if name in kept]
    else:
        binary = [name for name in names if "binary" in types[name] and name not in left]
        if binary:
            notes.append(f"Not carried, because of their type: {_list(binary)}. --keep-columns carries them.")
        chosen = [name for name in names if name not in left and name not in binary]
    dropped = _matching(names, options.drop, "--drop-columns")
    chosen = [name for name in chosen if name not in dropped]
    if len(names) < len(kinds):
        notes.append("A column without a name that can be printed is not carried.")
    own = own_columns()
    clashing = [name for name in chosen if name.casefold() in own]
    if clashing:
        message = (
            f"has {_list(clashing)}, as the dataset itself: give another name, or leave out with "
            f"--drop-columns {','.join(clashing)}."
        )
        raise InvalidInput(message)
    folded = Counter(name.casefold() for name in chosen)
    if twice := [name for name in chosen if folded[name.casefold()] > 1]:
        message = (
            f"has columns of one name, {_list(twice)}: leave them out with --drop-columns, or rename one."
        )
        raise InvalidInput(message)
    if long := [name for name in chosen if len(name) > MAX_NAME]:
        message = f"has a column {long[0][:60]!r}... whose name is longer than {MAX_NAME} characters."
        raise InvalidInput(message)
    if len(chosen) > MAX_COLUMNS:
        message = (
            f"has {len(chosen):,} further columns; at most {MAX_COLUMNS:,} can be carried: choose with "
            "--keep-columns or --drop-columns."
        )
        raise InvalidInput(message)
    return {name: _type_of(types[name], (fixed or {}).get(name)) for name in chosen}, notes


def _type_of(kind: str, before: str | None) -> str:
    """The type of a column: that of an earlier run, if it holds what is there now."""
    return before if before and _joined({before, kind} - {""}) == before else kind or TEXT


def _matching(names: Sequence[str], patterns: Iterable[str], option: str) -> frozenset[str]:
    """The columns that are named. Raises InvalidInput for a name that is not there."""
    found: set[str] = set()
    for text in patterns:
        folded = text.casefold()
        now = {name for name in names if folded in {name.casefold(), name.strip().casefold()}}
        if {*text} & {*"*?["}:
            now |= {name for name in names if fnmatch.fnmatchcase(name.casefold(), folded)}
        elif not now:
            message = f"has no column {text!r} for {option}; it has {_list(names)}."
            raise InvalidInput(message)
        found |= now
    return frozenset(found)


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:MAX_TOLD])
    return (
        f"the column {shown}"
        if len(names) == 1
        else f"the columns {shown}" + (f" and {len(names) - MAX_TOLD} more" if len(names) > MAX_TOLD else "")
    )


INT64 = range(-(2**63), 2**63)
SCALARS: Mapping[type, str] = {bool: "bool", int: "int64", float: "double", str: TEXT}
LIST = "list<item: {}>"


class JsonTypes:
    """Finds the types of fields of JSON, from the first objects."""

    def __init__(self) -> None:
        """Nothing is seen yet."""
        self._seen: dict[str, set[str]] = {}

    def add(self, value: Mapping[str, Any]) -> None:
        """See an object."""
        for name, one in value.items():
            self._seen.setdefault(name, set()).add(_kind(one))

    def kinds(self) -> Kinds:
        """Return all fields with their Arrow types, as they were seen; '': nothing is known of it."""
        return [(name, _joined(kinds - {""}) if kinds - {""} else "") for name, kinds in self._seen.items()]


def _kind(value: Any) -> str:
    """The type of a value; empty: it says nothing; text where there is none for it."""
    if value is None:
        return ""
    if isinstance(value, list):
        inner = _joined({_kind(one) for one in value} - {""}) if value else ""
        return LIST.format(inner) if inner in SCALARS.values() else LIST.format("") if not value else TEXT
    if type(value) is int and value not in INT64:
        return TEXT
    return SCALARS.get(type(value), TEXT)


def _joined(kinds: set[str]) -> str:
    """The type that holds values of these types."""
    if kinds == {"int64", "double"}:
        return "double"
    lists = {kind for kind in kinds if kind.startswith("list<")}
    if lists and lists == kinds:
        inner = _joined({kind[len("list<item: ") : -1] for kind in kinds} - {""})
        return LIST.format(inner)
    return kinds.pop() if len(kinds) == 1 else TEXT


def as_kind(value: Any, kind: str) -> Any:
    """Return a value of JSON as one of an Arrow type.

    Args:
        value: The value.
        kind: From `JsonTypes.kinds`; of any other type values are returned as they are.

    Returns:
        It.

    Raises:
        ValueError: It does not fit; the message completes the sentence "It is ...".
    """
    if value is None or type(value) is str is _TYPES.get(kind):
        return _limited(value)
    if kind == TEXT:
        return _limited(json.dumps(value, ensure_ascii=False))
    if kind == "double" and type(value) in {int, float}:
        return float(value)
    if kind == "int64" and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is _TYPES.get(kind) and (kind != "int64" or value in INT64):
        return value
    if kind.startswith("list<item: ") and isinstance(value, list) and len(value) <= MAX_CELL:
        return [as_kind(one, kind[len("list<item: ") : -1]) for one in value]
    if kind not in _TYPES and not kind.startswith("list<item: "):
        return value
    message = f"no {kind}"
    raise ValueError(message)


def _limited(text: str | None) -> str | None:
    if text is not None and len(text) > MAX_CELL:
        raise ValueError(TOO_LONG)
    return text


_TYPES = {kind: python for python, kind in SCALARS.items()}
