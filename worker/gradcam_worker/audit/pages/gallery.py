"""A backfill's dataset as one HTML page: the most and least confident images of each class.

The images of the rows are fetched, as the operator's settings allow, and shrunk. The script of the page draws
the heatmaps over them. If an image is no longer available, the page shows the heatmap alone, with the reason.
`gradcam_worker.audit.dataset.statistics` chooses the rows.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.audit.dataset.statistics import (
    READ_TIMEOUT_S,
    ClassStatistics,
    ClassSummary,
    ReportProgress,
    TopRow,
    open_dataset,
    read_statistics,
)
from gradcam_worker.audit.pages.photos import (
    PHOTO_EDGES,
    image_key,
    photo_bytes,
    placement_of,
    read_photos,
    truncate,
)
from gradcam_worker.errors import InvalidInput
from gradcam_worker.gradcam.classes import percent
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.gradcam.imaging.html import (
    encode_heatmaps,
    fill_template,
    page_placement,
)
from gradcam_worker.gradcam.imaging.resize import enlarge
from gradcam_worker.images.fetch import UriFetcher
from gradcam_worker.images.prepare import ImageFetcher
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import FolderStore, Store

MAX_PAGE_BYTES = 20_000_000  # what a browser opens without delay
MAX_PICTURES = 1000  # images with a heatmap, on one page
MAX_CELLS_PER_SIDE = 24  # of a heatmap on the page: on such small photos more would not be visible
GROUPS = ("Most confident", "Least confident")
MAX_URI_LENGTH = 400  # characters
TINY = 1e-9  # a smaller sum of heatmaps counts as zero


@dataclass(frozen=True)
class GalleryOptions:
    """What to show.

    Attributes:
        classes: Ids, wnids or names; None: the classes that came first most often.
        per_class: Number of the most confident images of each class, and of the least confident ones.
        max_classes: Number of classes, if `classes` is None.
    """

    classes: tuple[str, ...] | None = None
    per_class: int = 4
    max_classes: int = 50


@dataclass(frozen=True)
class Gallery:
    """A page, and what it shows."""

    page: bytes
    classes: int
    pictures: int  # images with a heatmap
    missing: Mapping[str, int]  # error code -> number of images that could not be fetched
    complete: bool  # False: the backfill has not ended, and rows of its input are missing


def make(
    dataset: str,
    output: Path,
    options: GalleryOptions,
    settings: Settings,
    report_progress: ReportProgress = lambda *_: None,
) -> Gallery:
    """Write the page of a dataset to a file, in one step.

    Args:
        dataset: A folder, or s3://bucket/prefix.
        output: The file.
        options: What to show.
        settings: Which images may be fetched, and how.
        report_progress: Is called after each file and each image.

    Returns:
        The page.

    Raises:
        InvalidInput: There is no dataset, or it has nothing to show.
        StorageUnavailable: The dataset cannot be read.
    """
    s3 = S3(settings)
    limits = Limits(
        settings.max_image_pixels, settings.max_image_side, convert_colors=settings.convert_colors
    )
    result = gallery(open_dataset(dataset, s3), UriFetcher(settings, s3), limits, options, report_progress)
    FolderStore(output.parent).put(output.name, result.page, "text/html")
    return result


def gallery(
    store: Store,
    images: ImageFetcher,
    limits: Limits,
    options: GalleryOptions,
    report_progress: ReportProgress = lambda *_: None,
) -> Gallery:
    """Make the page of a dataset. The same images always give the same page.

    Args:
        store: Where the dataset is.
        images: Fetches the images.
        limits: The largest size of an image.
        options: What to show.
        report_progress: Is called after each file and each image.

    Returns:
        The page, of at most `MAX_PAGE_BYTES` bytes.

    Raises:
        InvalidInput: There is no dataset, or it has nothing to show.
        StorageUnavailable: The dataset cannot be read.
    """
    statistics = read_statistics(store, options.per_class, report_progress)
    complete = store.find("dataset.json", Deadline(READ_TIMEOUT_S)) is not None
    classes = statistics.choose_classes(options.classes, options.max_classes)
    records = [row.record for summary in classes for group in summary.top_rows() for row in group]
    if len(records) > MAX_PICTURES:
        message = f"That would be {len(records):,} pictures, and a page may have {MAX_PICTURES:,}: "
        raise InvalidInput(message + "show fewer classes, or fewer images of each.")
    data = _page_data(statistics, classes, complete=complete)
    distinct = {image_key(record): record for record in records}  # an image may be of several classes
    room = (MAX_PAGE_BYTES - len(fill_template("gallery.html", data))) // len(distinct)
    max_photo_bytes = photo_bytes(room)
    for photo in read_photos(list(distinct.values()), images, limits, max_photo_bytes):
        data["photos"].append(photo)
        report_progress("images", len(data["photos"]), len(distinct))
    photo_indices = {key: index for index, key in enumerate(distinct)}
    page_rows = (row for class_ in data["classes"] for group in class_["groups"] for row in group["rows"])
    for row, record in zip(page_rows, records, strict=True):
        row["photo"] = photo_indices[image_key(record)]
    missing = Counter(photo["code"] for photo in data["photos"] if "code" in photo)
    return Gallery(fill_template("gallery.html", data), len(classes), len(records), missing, complete)


def _page_data(
    statistics: ClassStatistics, classes: Sequence[ClassSummary], *, complete: bool
) -> dict[str, Any]:
    """The data of the page, without the photos."""
    rows, columns = (min(side, MAX_CELLS_PER_SIDE) for side in classes[0].total.shape)
    method = statistics.method.name
    counts = {
        "counterfactual": "counts against the class",
        "eigencam": "stands out to the layer, whichever the class",
    }.get(method, "counts for the class")
    facts = {
        "Images": f"{statistics.rows:,}",
        "Failed": ", ".join(f"{code} {count:,}" for code, count in statistics.codes.most_common()) or "none",
        "Classes": f"{len(classes):,} of {len(statistics.classes):,}",
        "Network, layer": "; ".join(statistics.networks),
        "Method": method,
    }
    if statistics.against:
        counts += ", rather than for those that it is explained against"
        facts["Against"] = ", ".join(map(str, statistics.against))
    if not complete:
        facts["Incomplete"] = "the backfill has not ended"

    def heatmap(values: NDArray[Any]) -> str:
        finite = np.nan_to_num(values.astype(np.float32))
        cells = enlarge(np.clip(finite, 0, 1), (rows, columns))
        return encode_heatmaps(cells)

    def row_data(row: TopRow) -> dict[str, Any]:
        record, longer_side = row.record, max(row.record["width"], row.record["height"])
        return {
            "row": record["row"],
            "id": truncate(record["id"] or ""),
            "uri": truncate(record["uri"], MAX_URI_LENGTH),
            "rank": record["rank"],
            "percent": percent(record["probability"]),
            "probability": round(record["probability"], 6),
            "raw_min": record["raw_min"],
            "raw_max": record["raw_max"],
            "full": [record["width"], record["height"]],
            "width": max(round(record["width"] * PHOTO_EDGES[0] / longer_side), 1),
            "height": max(round(record["height"] * PHOTO_EDGES[0] / longer_side), 1),
            "heatmap": heatmap(row.heatmap),
            **page_placement(placement_of(record)),
        }

    return {
        "title": truncate(
            "Gallery · " + "; ".join(network.partition(",")[0] for network in statistics.networks)
        ),
        "about": f"The colours show how much each region of an image {counts}, from 0 to its own strongest "
        "region: each heatmap has its own scale. They tell where the network looked, not whether it is "
        "right. Images in which the class came first go before all others.",
        "facts": [[label, truncate(value)] for label, value in facts.items()],
        "rows": rows,
        "columns": columns,
        "photos": [],
        "grid": classes[0].total.shape,
        "manifest": {
            "method": {"name": method, "normalize": statistics.method.normalize},
            "predictions": [],
        },
        "classes": [
            {
                "id": summary.id,
                "wnid": truncate(summary.wnid),
                "name": truncate(summary.name.replace("_", " ")),
                "first": summary.first,
                "count": summary.count,
                "percent": percent(summary.probability / summary.count),
                "probability": round(summary.probability / summary.count, 6),
                "mean": heatmap(summary.total / max(float(summary.total.max()), TINY)),
                "groups": [
                    {"title": title, "rows": [row_data(row) for row in group]}
                    for title, group in zip(GROUPS, summary.top_rows(), strict=True)
                    if group
                ],
            }
            for summary in classes
        ],
    }
