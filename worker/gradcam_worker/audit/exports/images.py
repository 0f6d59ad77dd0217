"""The explained images of a dataset, one by one, as exports need them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import Batch, read_batches
from gradcam_worker.audit.dataset.image_grid import heat_on_images
from gradcam_worker.audit.dataset.statistics import ReportProgress, read_files
from gradcam_worker.storage.store import Store

MAX_CELLS = 64  # along each side of an exported heatmap
METRICS = (
    *("heat_inside", "inside_area", "heat_at_border", "iou", "pointing_hit"),
    *("deletion", "insertion", "confidence_drop", "confidence_increase", "raw_max"),
)
XYXY = tuple[float, float, float, float]


@dataclass(frozen=True)
class ExportedExplanation:
    """One explained class of an image."""

    index: int
    class_id: int
    wnid: str
    class_name: str
    rank: int
    probability: float
    hot_box: XYXY | None  # of the region around the peak, in pixels of the image
    overlay: str | None
    metrics: Mapping[str, float]  # those that are known
    heat: NDArray[np.uint8] = field(repr=False)  # (rows, columns) on the whole image; 255 is its peak


@dataclass(frozen=True)
class ExportedImage:
    """An image of the dataset, with its explanations."""

    row: int
    id: str | None
    uri: str
    sha256: str | None
    width: int
    height: int
    truths: tuple[int, ...]  # ids of its true classes
    truth_boxes: tuple[XYXY, ...]  # in pixels
    correct: bool | None
    carried: Mapping[str, Any]  # columns of the backfill's input
    explanations: tuple[ExportedExplanation, ...]

    @property
    def prediction(self) -> ExportedExplanation:
        """Of the explained classes, the most probable one."""
        return min(self.explanations, key=lambda one: one.rank)

    @property
    def relative_path(self) -> str:
        """Where an export expects the image: below `images/`, as its bucket or host and key."""
        path = unquote(self.uri.partition("://")[2]).lstrip("/")
        return f"images/{'/'.join(part for part in path.split('/') if part not in ('', '.', '..'))}"


def read_images(
    store: Store, limit: int, report_progress: ReportProgress = lambda *_: None
) -> Iterator[ExportedImage]:
    """Read the explained images of a dataset.

    Args:
        store: Where it is.
        limit: The most images.
        report_progress: Is called after each file.

    Yields:
        The images in the order of the dataset.

    Raises:
        InvalidInput: There is no dataset.
        StorageUnavailable: It cannot be read.
    """
    held: list[tuple[dict[str, Any], ExportedExplanation]] = []
    count = 0
    for _, data in read_files(store, report_progress):
        for batch in read_batches(data):
            for record, explanation in _explanations(batch):
                if held and held[0][0]["row"] != record["row"]:
                    yield _image(held)
                    held, count = [], count + 1
                    if count == limit:
                        return
                held.append(({**record, "": [*batch.carried]}, explanation))
    if held:
        yield _image(held)


def _explanations(batch: Batch) -> Iterator[tuple[dict[str, Any], ExportedExplanation]]:
    rows, columns = (min(side, MAX_CELLS) for side in batch.heatmaps.shape[1:])
    heat = heat_on_images(batch, (rows, columns))
    peaks = heat.max(axis=(1, 2), keepdims=True)
    cells = np.round(255 * np.divide(heat, peaks, out=np.zeros_like(heat), where=peaks > 0)).astype(np.uint8)
    for record, of_class in zip(batch.other_columns.to_pylist(), cells, strict=True):
        box = record["box_xyxy"]
        yield (
            record,
            ExportedExplanation(
                record["index"],
                record["class_id"],
                record["wnid"] or "",
                record["class_name"] or "",
                record["rank"],
                float(record["probability"]),
                (box[0], box[1], box[2], box[3]) if box else None,
                record["overlay"],
                {name: float(record[name]) for name in METRICS if record.get(name) is not None},
                of_class,
            ),
        )


def _image(held: Sequence[tuple[dict[str, Any], ExportedExplanation]]) -> ExportedImage:
    record = held[0][0]
    boxes = record.get("truth_boxes") or ()
    return ExportedImage(
        record["row"],
        record["id"],
        record["uri"],
        record["sha256"],
        record["width"],
        record["height"],
        tuple(record.get("truth_ids") or ()),
        tuple((box[0], box[1], box[2], box[3]) for box in boxes),
        record.get("correct"),
        {name: record[name] for name in record[""]},
        tuple(explanation for _, explanation in held),
    )
