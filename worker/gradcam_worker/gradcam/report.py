"""An explanation as a self-contained HTML page. No text of a job can inject HTML.

The script of the page draws the heatmaps from their values, so that readers can change opacity, threshold and
colour map. See `gradcam_worker.gradcam.imaging.html`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from gradcam_worker.gradcam.classes import percent, versus
from gradcam_worker.gradcam.explain import Explanation, Prediction
from gradcam_worker.gradcam.imaging.html import (
    encode_heatmaps,
    fill_template,
    page_placement,
    to_base64,
)
from gradcam_worker.gradcam.imaging.overlay import COLORMAPS, colors, encode_jpeg
from gradcam_worker.gradcam.imaging.resize import Pixels, enlarge, shrink_to_edge
from gradcam_worker.gradcam.sizing import spans

MAX_PAGE_BYTES = 1_000_000  # small enough for an e-mail
MAX_CELLS = 120_000  # of all heatmaps: 320 KB of the page; 50 classes may have 48 x 48 each
PHOTO_AREAS = (
    2_000_000,
    1_280_000,
    820_000,
    520_000,
    330_000,
    210_000,
)  # in pixels: each step shrinks the sides by 0.8
MAX_SHORT_SIDE = 1415  # of the photo in pixels: the root of the first area
MAX_SIDE = 8192  # in pixels; browsers draw no canvas that is much longer
QUALITIES = (90, 80, 70, 60)  # of its JPEG; a smaller photo looks better than a lower quality
MAX_TEXT_LENGTH = 1000  # characters of a fact, or of the title


def page(
    explanation: Explanation,
    pixels: Pixels,
    *,
    name: str,
    facts: Mapping[str, str],
    method: str = "gradcam",
) -> bytes:
    """Make the report on an image. The same arguments always give the same bytes.

    The photo is shrunk and compressed until the page has less than `MAX_PAGE_BYTES`. Heatmaps are rounded to
    1/65535; they are shrunk only if they have more than `MAX_CELLS` cells together, or more rows or columns
    than the photo has pixels.

    Args:
        explanation: The explanation.
        pixels: The image (height, width, 3), uint8, RGB.
        name: The name of the image.
        facts: What is listed below the image, in this order.
        method: The name of the formula, which decides how the colours are explained.

    Returns:
        The page, in UTF-8.
    """
    data = _page_data(explanation, pixels, name, facts) | _legend(method, versus(explanation.against))
    if explanation.placement and explanation.placement.is_inside:
        data["about"] += " What is not coloured was cut off before the network saw the photo."
    page_bytes = len(fill_template("report.html", {**data, "photo": ""}))
    for photo in _photos(pixels):
        data["photo"] = f"data:image/jpeg;base64,{to_base64(photo)}"
        if page_bytes + len(data["photo"]) < MAX_PAGE_BYTES:
            break
    return fill_template("report.html", data)


def _page_data(
    explanation: Explanation, pixels: Pixels, name: str, facts: Mapping[str, str]
) -> dict[str, Any]:
    grid, zero_ids = explanation.heatmaps.shape[1:], explanation.zero_heatmaps
    rows, columns = _heatmap_size(explanation, pixels)
    heatmaps = np.stack([enlarge(heatmap, (rows, columns)) for heatmap in explanation.shown])
    shown_size = "" if (rows, columns) == grid else f", shown as {columns} x {rows}"
    facts = {**facts, "Heatmap": f"{grid[1]} x {grid[0]} cells{shown_size}"}
    return {
        "title": _truncate(f"{explanation.network.name} · {name}"),
        "rows": rows,
        "columns": columns,
        **page_placement(explanation.placement),
        "heatmaps": encode_heatmaps(heatmaps),
        "explained": [
            {
                **_prediction_data(prediction),
                "more": _details(explanation, index),
                "zero": prediction.id in zero_ids,
            }
            for index, prediction in enumerate(explanation.explained)
        ],
        "predictions": [_prediction_data(prediction) for prediction in explanation.predictions],
        "colors": {colormap: to_base64(colors(colormap).tobytes()) for colormap in COLORMAPS},
        "facts": [[str(label), _truncate(str(value))] for label, value in facts.items()],
    }


def _legend(method: str, against: str) -> dict[str, str]:
    """The explanation of the colours, and of their absence, for a method and what `versus` says."""
    counts, nothing = {
        "counterfactual": ("counts against the class that is chosen", "speaks against this class"),
        "eigencam": ("stands out to the layer, whichever class is chosen", "stands out"),
    }.get(method, ("counts for the class that is chosen", "speaks for this class"))
    others = f", {against}" if against else ""
    return {
        "about": f"The colours show how much each region of the photo {counts}{others}, from 0 to the "
        "strongest region. They tell where the network looked, not whether it is right.",
        "nothing": f"Nothing in the image {nothing}{others}.",
    }


def _details(explanation: Explanation, index: int) -> str:
    """Rank, wnid, raw values and metrics of an explained class, in sentences."""
    prediction = explanation.explained[index]
    metrics = explanation.metrics[index] if explanation.metrics else {}
    rank = ", ".join(filter(None, (f"Rank {prediction.rank}", prediction.wnid)))
    raw = f"Raw map from {explanation.raw_min[index]:.4g} to {explanation.raw_max[index]:.4g}"
    error = explanation.completeness_error
    complete = "" if error is None else f"Sum of the attributions off by {error[index]:.1%}"
    areas = ", ".join(f"{metric} {area:.3f}" for metric, area in metrics.items())
    return " ".join(f"{part}." for part in (rank, raw, complete, areas.capitalize()) if part)


def _prediction_data(prediction: Prediction) -> dict[str, Any]:
    return {
        "rank": prediction.rank,
        "id": prediction.id,
        "wnid": prediction.wnid,
        "name": prediction.name.replace("_", " "),
        "probability": round(prediction.probability, 6),
        "percent": percent(prediction.probability),
    }


def _heatmap_size(explanation: Explanation, pixels: Pixels) -> tuple[int, int]:
    """The rows and columns of the heatmaps on the page."""
    count, rows, columns = explanation.heatmaps.shape
    scale = min((MAX_CELLS / (count * rows * columns)) ** 0.5, 1)
    down, across = spans(explanation.placement, (pixels.shape[0], pixels.shape[1]))
    return (
        max(min(int(rows * scale), down.pixels), 1),
        max(min(int(columns * scale), across.pixels), 1),
    )


def _photos(pixels: Pixels) -> Iterator[bytes]:
    """The photo as smaller and smaller JPEGs."""
    short, long = sorted(pixels.shape[:2])
    for area in PHOTO_AREAS:
        edge = min(int((area * long / short) ** 0.5), MAX_SIDE)
        shrunk = shrink_to_edge(pixels, edge)
        for quality in QUALITIES:
            yield encode_jpeg(shrunk, quality)


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_TEXT_LENGTH else text[: MAX_TEXT_LENGTH - 1] + "…"
