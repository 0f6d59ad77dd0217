"""A comparison of two datasets as one HTML page: what moved, and which images changed most, side by side."""

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import SHOWN_COLUMN
from gradcam_worker.audit.comparison.report import (
    ChangedImage,
    ClassComparison,
    ComparedDataset,
    ComparisonReport,
    ImageSide,
)
from gradcam_worker.audit.pages.photos import image_key, photo_bytes, placement_of, read_photos, truncate
from gradcam_worker.audit.report import HeatCells
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.gradcam.imaging.html import encode_heatmaps, fill_template, page_placement
from gradcam_worker.gradcam.imaging.resize import enlarge
from gradcam_worker.images.prepare import ImageFetcher

TEMPLATES = Path(__file__).parents[1] / "data"
MAX_PAGE_BYTES = 20_000_000  # what a browser opens without delay
MAX_CARDS = 100  # classes with mean heatmaps and images; the others are lines of a table
MAX_CELLS_PER_SIDE = 24  # of a heatmap on the page
MAX_LEVEL = 255
PHOTO_EDGE = 256  # of an image without a photo, in pixels
SHOWN_DIGITS = 12  # of a checksum


@dataclass(frozen=True)
class ComparisonPage:
    """A page, and what it lacks."""

    page: bytes
    missing: Mapping[str, int]  # error code -> number of images that could not be fetched


def comparison_page(report: ComparisonReport, images: ImageFetcher, limits: Limits) -> ComparisonPage:
    """Make the page of a comparison. Its images are embedded; of those that are gone it shows the heat alone.

    Args:
        report: The comparison.
        images: Fetches the images.
        limits: The largest size of an image.

    Returns:
        The page, of at most `MAX_PAGE_BYTES` bytes.
    """
    cards = _cards(report)
    chosen = {one.a.id for one in cards}
    changed = [one for one in report.images if one.class_a in chosen]
    records = [{"uri": one.uri, "sha256": one.sha256} for one in changed]
    distinct = {image_key(record): record for record in records}
    data = _page_data(report, cards, changed)
    room = (MAX_PAGE_BYTES - len(_page(data))) // max(len(distinct), 1)
    photos = list(read_photos(list(distinct.values()), images, limits, photo_bytes(room)))
    numbers = {key: number for number, key in enumerate(distinct)}
    data["photos"] = photos
    for shown, record in zip(data["images"], records, strict=True):
        shown["photo"] = numbers[image_key(record)]
    missing = Counter(photo["code"] for photo in photos if "code" in photo)
    return ComparisonPage(_page(data), missing)


def _page(data: Mapping[str, Any]) -> bytes:
    return fill_template("comparison.html", data, folder=TEMPLATES)


def _page_data(
    report: ComparisonReport, cards: Sequence[ClassComparison], images: Sequence[ChangedImage]
) -> dict[str, Any]:
    """The data of the page, without the photos.

    Args:
        report: The comparison.
        cards: The classes that are shown with heatmaps.
        images: The images of these.
    """
    chosen = {one.a.id for one in cards}
    grids = [one.a.heat for one in cards] + [side.heat for one in images for side in (one.a, one.b)]
    rows, columns = (
        min(max((getattr(heat, name) for heat in grids), default=1), MAX_CELLS_PER_SIDE)
        for name in ("rows", "columns")
    )
    return {
        "title": f"{_label(report.a)} and {_label(report.b)}",
        "datasets": [_facts(report.a), _facts(report.b)],
        "pairing": _pairing(report),
        "differences": [
            [one.what, *(_short(value) for value in (one.a, one.b))] for one in report.differences
        ],
        "remarks": list(report.remarks),
        "conditions": [[truncate(one.condition), one.met] for one in report.conditions],
        "figures": report.figures,
        "thresholds": report.thresholds.model_dump(mode="json"),
        "rows": rows,
        "columns": columns,
        "photos": [],
        "classes": [_card(one, (rows, columns)) for one in cards],
        "others": [_line(one) for one in report.classes if one.a.id not in chosen],
        "left_out": [
            [truncate(one.name or one.wnid), one.images_a, one.images_b, one.reason]
            for one in report.left_out
        ],
        "images": [_image(one, (rows, columns)) for one in images],
    }


def _cards(report: ComparisonReport) -> list[ClassComparison]:
    """The classes that moved, and then those of which images are shown."""
    with_images = {one.class_a for one in report.images}
    shown = [one for one in report.classes if one.moved_by or one.a.id in with_images]
    return shown[:MAX_CARDS] or list(report.classes[:1])


def _label(dataset: ComparedDataset) -> str:
    return truncate(dataset.uri.rstrip("/").rpartition("/")[2] or dataset.uri, 60)


def _facts(dataset: ComparedDataset) -> dict[str, Any]:
    return {
        "label": _label(dataset),
        "uri": truncate(dataset.uri),
        "network": truncate(f"{dataset.network}, {dataset.layer}"),
        "weights": (dataset.weights_sha256 or "")[:SHOWN_DIGITS],
        "images": dataset.explained,
        "failed": dataset.failed,
    }


def _pairing(report: ComparisonReport) -> str:
    if report.pairing.by is None:
        return "Different images: each class is compared as two groups."
    by = {"sha256": "checksum", "uri": "address"}[report.pairing.by]
    return f"Each of {report.pairing.in_both:,} images is compared with itself, found by its {by}."


def _short(value: object) -> str:
    text = str(value)
    is_checksum = len(text) == 64 and text.isalnum()  # noqa: PLR2004  # hexadecimal digits of a sha256
    return text[:SHOWN_DIGITS] if is_checksum else truncate(text)


def _line(one: ClassComparison) -> dict[str, Any]:
    inside = one.heat_inside
    return {
        "id": one.a.id,
        "wnid": truncate(one.wnid),
        "name": truncate((one.name or one.wnid).replace("_", " ")),
        "moved_by": list(one.moved_by),
        "tested": one.tested,
        "distance": one.heat.change,
        "by_chance": one.heat.by_chance,
        "effect": one.heat.effect,
        "q": min(one.heat.q, inside.q) if inside else one.heat.q,
        "sides": [
            {
                "images": side.images,
                "inside": side.heat_inside,
                "border": side.heat_at_border,
                "precision": side.precision,
                "probability": side.probability,
            }
            for side in (one.a, one.b)
        ],
    }


def _card(one: ClassComparison, grid: tuple[int, int]) -> dict[str, Any]:
    line = _line(one)
    for shown, side in zip(line["sides"], (one.a, one.b), strict=True):
        shown["heat"] = _heatmap(side.heat, grid)
    return line


def _image(one: ChangedImage, grid: tuple[int, int]) -> dict[str, Any]:
    longer_side = max(one.width, one.height)
    return {
        "class_id": one.class_a,
        "uri": truncate(one.uri, 400),
        "distance": one.distance,
        "full": [one.width, one.height],
        "width": max(round(one.width * PHOTO_EDGE / longer_side), 1),
        "height": max(round(one.height * PHOTO_EDGE / longer_side), 1),
        "sides": [_image_side(side, one, grid) for side in (one.a, one.b)],
    }


def _image_side(side: ImageSide, image: ChangedImage, grid: tuple[int, int]) -> dict[str, Any]:
    record = {SHOWN_COLUMN: side.shown, "width": image.width, "height": image.height}
    is_predicted = side.rank == 1 or side.predicted_name is None
    return {
        "row": side.row,
        "rank": side.rank,
        "probability": side.probability,
        "predicted": None if is_predicted else truncate(str(side.predicted_name).replace("_", " ")),
        "inside": side.heat_inside,
        "heat": _heatmap(side.heat, grid),
        **page_placement(placement_of(record)),
    }


def _heatmap(heat: HeatCells, grid: tuple[int, int]) -> str:
    cells: NDArray[np.uint8] = np.frombuffer(base64.b64decode(heat.cells), np.uint8)
    shares: NDArray[np.float32] = cells.reshape(heat.rows, heat.columns).astype(np.float32)
    return encode_heatmaps(np.clip(enlarge(shares / np.float32(MAX_LEVEL), grid), 0, 1))
