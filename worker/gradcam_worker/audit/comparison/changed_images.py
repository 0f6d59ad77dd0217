"""The images whose heat for a class moved farthest between two datasets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import SHOWN_COLUMN, read_batches
from gradcam_worker.audit.comparison.compared_datasets import ReadDataset
from gradcam_worker.audit.comparison.report import ChangedImage, ImageSide
from gradcam_worker.audit.dataset.heat_table import ClassNames, HeatRecords, ImageKey
from gradcam_worker.audit.dataset.statistics import READ_TIMEOUT_S
from gradcam_worker.audit.report import HeatCells
from gradcam_worker.audit.significance import Difference
from gradcam_worker.errors import InvalidInput
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.storage.store import Store

IMAGES_OF_A_CLASS = 4  # of each class that moved, at most, before all others
DIGITS = 6  # of the report's numbers, after the point


class ComparedRows(NamedTuple):
    """The records of a class that are compared: of pairs, in the same order."""

    a: HeatRecords
    b: HeatRecords
    images_a: int  # that count for the class, also without heat, and also if they are in one dataset only
    images_b: int


@dataclass(frozen=True)
class ComparedClass:
    """A class and its tests."""

    a: ClassNames
    b: ClassNames
    rows: ComparedRows
    heat: Difference
    inside: Difference | None
    inside_change: float


@dataclass(frozen=True)
class _Changed:
    """An image that changed: its class among the tested ones, and its row in the records of that class."""

    distance: float
    tested: ComparedClass
    index: int


def most_changed(tested: Sequence[ComparedClass], moved: set[int], limit: int) -> list[_Changed]:
    """The images whose heat moved farthest: a few of each class that moved, then of all classes."""
    chosen: list[_Changed] = []
    rest: list[_Changed] = []
    for one in tested:
        apart = one.rows.a.heat.astype(np.float32) - one.rows.b.heat.astype(np.float32)
        distances = np.abs(apart).sum(axis=1) / 2
        order = np.lexsort((one.rows.a.rows, -distances))[:limit]
        found = [
            _Changed(float(distances[index]), one, int(index)) for index in order if distances[index] > 0
        ]
        first = IMAGES_OF_A_CLASS if one.a.id in moved else 0
        chosen, rest = chosen + found[:first], rest + found[first:]

    def farthest(found: Sequence[_Changed]) -> list[_Changed]:
        return sorted(found, key=lambda one: (-one.distance, one.tested.a.id, one.index))

    return (farthest(chosen) + farthest(rest))[:limit]


def read_changed_images(
    stores: tuple[Store, Store],
    read: tuple[ReadDataset, ReadDataset],
    changed: Sequence[_Changed],
    by: ImageKey,
) -> list[ChangedImage]:
    """Read the records of the images that changed most once more, with their heatmaps as they are stored."""
    sides: list[list[ImageSide]] = []
    facts: list[list[Mapping[str, Any]]] = []
    for side, (store, dataset) in enumerate(zip(stores, read, strict=True)):
        rows = [one.tested.rows.b if side else one.tested.rows.a for one in changed]
        places = [
            (int(records.files[one.index]), int(records.rows[one.index]), int(records.indexes[one.index]))
            for one, records in zip(changed, rows, strict=True)
        ]
        found = _read_records(store, dataset.files, set(places))
        first = dataset.records.take(dataset.records.ranks == 1)
        images = first.images(by)
        order = np.argsort(images, kind="stable")
        predicted = []
        for one, records in zip(changed, rows, strict=True):
            image = records.images(by)[one.index]
            at = int(np.searchsorted(images, image, sorter=order))
            is_there = at < len(order) and images[order[at]] == image
            predicted.append(dataset.classes[int(first.class_ids[order[at]])] if is_there else None)
        sides.append(
            [_image_side(*found[place], names) for place, names in zip(places, predicted, strict=True)]
        )
        facts.append([found[place][0] for place in places])
    return [
        ChangedImage(
            uri=record["uri"],
            sha256=record["sha256"],
            width=record["width"],
            height=record["height"],
            class_a=one.tested.a.id,
            class_name=one.tested.a.name,
            distance=rounded(one.distance),
            a=side_a,
            b=side_b,
        )
        for one, record, side_a, side_b in zip(changed, facts[0], *sides, strict=True)
    ]


_Place = tuple[int, int, int]  # number of the file, row, index


def _read_records(
    store: Store, files: Sequence[str], places: set[_Place]
) -> dict[_Place, tuple[Mapping[str, Any], NDArray[np.float16]]]:
    """Read single records with their heatmaps."""
    found: dict[_Place, tuple[Mapping[str, Any], NDArray[np.float16]]] = {}
    for number in sorted({place[0] for place in places}):
        data = store.find(files[number], Deadline(READ_TIMEOUT_S))
        if data is None:
            message = f"{store.uri(files[number])} was there a moment ago: is the backfill still running?"
            raise InvalidInput(message)
        for batch in read_batches(data):
            rows = batch.other_columns["row"].to_pylist()
            for index, place in enumerate(zip(rows, batch.other_columns["index"].to_pylist(), strict=True)):
                if (number, *place) in places:
                    found[number, *place] = batch.record(index), batch.heatmaps[index]
    return found


def _image_side(
    record: Mapping[str, Any], heatmap: NDArray[np.float16], predicted: ClassNames | None
) -> ImageSide:
    inside = record.get("heat_inside")
    return ImageSide(
        row=record["row"],
        index=record["index"],
        rank=record["rank"],
        probability=rounded(record["probability"]),
        predicted=predicted.id if predicted else None,
        predicted_name=predicted.name if predicted else None,
        heat_inside=rounded(inside) if inside is not None else None,
        shown=record.get(SHOWN_COLUMN),
        heat=HeatCells.of(heatmap),
    )


def rounded(value: float) -> float:
    """A number for the report."""
    return round(value, DIGITS)
