"""An explanation as a self-contained HTML page. No text of a job can inject HTML.

The page shows a viewer document in `<gradcam-viewer>` (`data/gradcam-viewer.js`), which draws the heatmaps
from their values. See `gradcam_worker.gradcam.imaging.html`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gradcam_worker.gradcam.explain import Explanation, Prediction
from gradcam_worker.gradcam.imaging.html import (
    encode_heatmaps,
    fill_template,
    page_placement,
    to_base64,
)
from gradcam_worker.gradcam.imaging.overlay import encode_jpeg
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
MAX_PHOTO_FACT_BYTES = 100  # of the line that says how large the photo on the page is
MAX_TEXT_LENGTH = 1000  # characters of a fact, or of the title
LEAD = ("Date", "Network", "Method", "Layer")  # facts that stand above the picture


def page(
    explanation: Explanation,
    pixels: Pixels,
    *,
    name: str,
    facts: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
    method: str = "gradcam",
    normalize: str = "per_class",
    warnings: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """Make the report on an image. The same arguments always give the same bytes.

    The photo is shrunk and compressed until the page has less than `MAX_PAGE_BYTES`. Heatmaps are rounded to
    1/65535; they are shrunk only if they have more than `MAX_CELLS` cells together, or more rows or columns
    than the photo has pixels.

    Args:
        explanation: The explanation.
        pixels: The image (height, width, 3), uint8, RGB.
        name: The name of the image.
        facts: What is listed below the image, in this order; those of `LEAD` above it.
        metadata: The job's own names and values, which are listed apart; None: there are none.
        method: The name of the formula, which decides how the colours are explained.
        normalize: How it was normalized, which decides whether the classes begin with one scale.
        warnings: As the manifest has them, with `class_id` and `detail`.

    Returns:
        The page, in UTF-8.
    """
    data = _page_data(explanation, pixels, name, facts) | {"metadata": _listed(metadata or {})}
    data["manifest"] |= {
        "method": {"name": method, "normalize": normalize},
        "warnings": [dict(warning) for warning in warnings],
    }
    page_bytes = len(fill_template("report.html", {**data, "photo": ""}))
    facts_without_photo = data["facts"]
    for photo, (height, width) in _photos(pixels):
        data["photo"] = f"data:image/jpeg;base64,{to_base64(photo)}"
        data["facts"] = [*facts_without_photo, ["Photo on this page", f"{width} x {height} pixels"]]
        if page_bytes + len(data["photo"]) < MAX_PAGE_BYTES - MAX_PHOTO_FACT_BYTES:
            break
    return fill_template("report.html", data)


def _page_data(
    explanation: Explanation, pixels: Pixels, name: str, facts: Mapping[str, str]
) -> dict[str, Any]:
    """A viewer document without its photo, and the texts of the page."""
    grid = explanation.heatmaps.shape[1:]
    rows, columns = _heatmap_size(explanation, pixels)
    heatmaps = np.stack([enlarge(heatmap, (rows, columns)) for heatmap in explanation.shown])
    shown_size = "" if (rows, columns) == grid else f", shown as {columns} x {rows}"
    facts = {**facts, "Heatmap": f"{grid[1]} x {grid[0]} cells{shown_size}"}
    return {
        "title": _truncate(f"{explanation.network.name} · {name}"),
        "lead": _listed({label: facts[label] for label in LEAD if label in facts}),
        "facts": _listed({label: value for label, value in facts.items() if label not in LEAD}),
        "maps": {"rows": rows, "columns": columns, "grid": grid, "uint16": encode_heatmaps(heatmaps)},
        **page_placement(explanation.placement),
        "manifest": {
            "input": {"width": pixels.shape[1], "height": pixels.shape[0]},
            "network": {"name": explanation.network.name, "layer": explanation.layer},
            "explanations": [
                _explained_class(explanation, index) for index in range(len(explanation.explained))
            ],
            "predictions": [_score(prediction) for prediction in explanation.predictions],
            "against": [{"id": label.id, "name": label.name} for label in explanation.against],
        },
    }


def _explained_class(explanation: Explanation, index: int) -> dict[str, Any]:
    score = _score(explanation.explained[index])
    error = explanation.completeness_error
    return {
        "class": {"id": score["id"], "wnid": score["wnid"], "name": score["name"]},
        "rank": score["rank"],
        "probability": score["probability"],
        "raw_min": float(explanation.raw_min[index]),
        "raw_max": float(explanation.raw_max[index]),
        "metrics": dict(explanation.metrics[index]) if explanation.metrics else {},
        "completeness_error": None if error is None else float(error[index]),
    }


def _score(prediction: Prediction) -> dict[str, Any]:
    return {**vars(prediction), "probability": round(prediction.probability, 6)}


def _listed(facts: Mapping[str, str]) -> list[list[str]]:
    return [[_truncate(str(label)), _truncate(str(value))] for label, value in facts.items()]


def _heatmap_size(explanation: Explanation, pixels: Pixels) -> tuple[int, int]:
    """The rows and columns of the heatmaps on the page."""
    count, rows, columns = explanation.heatmaps.shape
    scale = min((MAX_CELLS / (count * rows * columns)) ** 0.5, 1)
    down, across = spans(explanation.placement, (pixels.shape[0], pixels.shape[1]))
    return (
        max(min(int(rows * scale), down.pixels), 1),
        max(min(int(columns * scale), across.pixels), 1),
    )


def _photos(pixels: Pixels) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The photo as smaller and smaller JPEGs, with their (height, width)."""
    short, long = sorted(pixels.shape[:2])
    for area in PHOTO_AREAS:
        edge = min(int((area * long / short) ** 0.5), MAX_SIDE)
        shrunk = shrink_to_edge(pixels, edge)
        for quality in QUALITIES:
            yield encode_jpeg(shrunk, quality), (shrunk.shape[0], shrunk.shape[1])


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_TEXT_LENGTH else text[: MAX_TEXT_LENGTH - 1] + "…"
