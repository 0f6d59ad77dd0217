"""An explanation as one HTML page that needs nothing else, and that no text of a job can change.

The page draws the heatmaps itself, from their numbers, so that opacity, threshold and colour map can be
changed by whoever reads it. See `gradcam_worker.gradcam.imaging.html` for how it gets them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import numpy as np

from gradcam_worker.gradcam.classes import percent
from gradcam_worker.gradcam.explain import Explanation, Prediction
from gradcam_worker.gradcam.imaging.html import fill_template, to_base64
from gradcam_worker.gradcam.imaging.overlay import COLORMAPS, Pixels, colors, enlarge, shrink_to_edge

LIMIT = 1_000_000  # bytes of a page: small enough for a mail
CELLS = 120_000  # of all heatmaps together: 320 KB of the page; 50 classes may have 48 x 48 each
PIXELS = (2_000_000, 1_280_000, 820_000, 520_000, 330_000, 210_000)  # of the photo: each side shrinks by 0.8
SHORTEST = 1415  # pixels of the photo's shorter side, at most: the root of the first
SIDE = 8192  # pixels; browsers draw no canvas that is much longer
QUALITIES = (90, 80, 70, 60)  # of its JPEG; below, a smaller photo looks better than a worse one
LONGEST = 1000  # characters of a fact, or of the title
FULL = 65_535  # how 1 is written


def page(
    seen: Explanation, pixels: Pixels, *, name: str, facts: Mapping[str, str], method: str = "gradcam"
) -> bytes:
    """The report on a photo (height, width, 3), called `name`, in UTF-8; always the same bytes.

    `facts` are shown below it, in their order; what the colours mean depends on the `method`. The photo is
    made smaller, and its JPEG worse, until the page stays below `LIMIT` bytes. The heatmaps (k, rows,
    columns) are rounded to 1/65535 and written as little-endian uint16 in base64, which is shorter than
    digits; only where they have more than `CELLS` cells together, or more than the photo has pixels, are they
    made smaller first, as an overlay would.
    """
    data = _data(seen, pixels, name, facts) | _meaning(method)
    rest = len(fill_template("report.html", {**data, "photo": ""}))
    for photo in _photos(pixels):
        data["photo"] = f"data:image/jpeg;base64,{to_base64(photo)}"
        if rest + len(data["photo"]) < LIMIT:
            break
    return fill_template("report.html", data)


def _data(seen: Explanation, pixels: Pixels, name: str, facts: Mapping[str, str]) -> dict[str, Any]:
    grid, dark = seen.heatmaps.shape[1:], seen.zero_heatmaps
    rows, columns = _size(seen, pixels)
    heatmaps = np.stack([enlarge(heatmap, (rows, columns)) for heatmap in seen.shown])
    shown = "" if (rows, columns) == grid else f", shown as {columns} x {rows}"
    facts = {**facts, "Heatmap": f"{grid[1]} x {grid[0]} cells{shown}"}
    return {
        "title": _shortened(f"{seen.network.name} · {name}"),
        "rows": rows,
        "columns": columns,
        "heatmaps": to_base64(np.rint(heatmaps * FULL).astype("<u2").tobytes()),
        "explained": [
            {
                **_class(one),
                "more": _more(seen, index),
                "zero": one.id in dark,
            }
            for index, one in enumerate(seen.explained)
        ],
        "predictions": [_class(one) for one in seen.predictions],
        "colors": {colormap: to_base64(colors(colormap).tobytes()) for colormap in COLORMAPS},
        "facts": [[str(label), _shortened(str(value))] for label, value in facts.items()],
    }


def _meaning(method: str) -> dict[str, str]:
    """What the colours tell, and what it means where there are none."""
    counts, nothing = {
        "counterfactual": ("counts against the class that is chosen", "speaks against this class"),
        "eigencam": ("stands out to the layer, whichever class is chosen", "stands out"),
    }.get(method, ("counts for the class that is chosen", "speaks for this class"))
    return {
        "about": f"The colours show how much each region of the photo {counts}, from 0 to the strongest "
        "region. They tell where the network looked, not whether it is right.",
        "nothing": f"Nothing in the image {nothing}.",
    }


def _more(seen: Explanation, index: int) -> str:
    """What else is known of one explained class, in sentences."""
    one, metrics = seen.explained[index], seen.metrics[index] if seen.metrics else {}
    rank = ", ".join(filter(None, (f"Rank {one.rank}", one.wnid)))
    raw = f"Raw map from {seen.raw_min[index]:.4g} to {seen.raw_max[index]:.4g}"
    areas = ", ".join(f"{metric} {area:.3f}" for metric, area in metrics.items())
    return " ".join(f"{part}." for part in (rank, raw, areas.capitalize()) if part)


def _class(one: Prediction) -> dict[str, Any]:
    return {
        "rank": one.rank,
        "id": one.id,
        "wnid": one.wnid,
        "name": one.name.replace("_", " "),
        "probability": round(one.probability, 6),
        "percent": percent(one.probability),
    }


def _size(seen: Explanation, pixels: Pixels) -> tuple[int, int]:
    """Rows and columns of the heatmaps on the page."""
    count, rows, columns = seen.heatmaps.shape
    scale = min((CELLS / (count * rows * columns)) ** 0.5, 1)
    return (
        max(min(int(rows * scale), pixels.shape[0]), 1),
        max(min(int(columns * scale), pixels.shape[1]), 1),
    )


def _photos(pixels: Pixels) -> Iterator[bytes]:
    """The photo as ever smaller JPEGs."""
    short, long = sorted(pixels.shape[:2])
    for area in PIXELS:
        edge = min(int((area * long / short) ** 0.5), SIDE)
        swapped = cv2.cvtColor(shrink_to_edge(pixels, edge), cv2.COLOR_RGB2BGR)
        for quality in QUALITIES:
            yield cv2.imencode(".jpg", swapped, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
