"""A backfill's dataset as one HTML page: by class, what the network was most and least sure of.

The images of the rows that it shows are fetched, as the operator's settings allow, and made small. The page
lays the heatmaps over them itself; where an image cannot be had any more it shows the heatmap alone and says
why. See `gradcam_worker.audit.statistics` for how those rows are found.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from gradcam_worker.audit.statistics import (
    READ_S,
    ClassStatistics,
    ClassSummary,
    Report,
    TopRow,
    read_statistics,
)
from gradcam_worker.errors import GradcamError, InvalidInput, InvalidRow
from gradcam_worker.gradcam.classes import percent
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.imaging.html import fill_template, to_base64
from gradcam_worker.gradcam.imaging.overlay import COLORMAPS, colors, enlarge, shrink_to_edge
from gradcam_worker.images.fetch import UriFetcher
from gradcam_worker.images.prepare import ImageFetcher
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import FolderStore, S3Store, Store
from gradcam_worker.text.urls import without_secrets

LIMIT = 20_000_000  # bytes of a page: what a browser opens at once
MOST_PICTURES = 1000  # on one page
PHOTO_BYTES = 32_000  # of one small photo, at most
AROUND = 100  # bytes of the page around it
EDGES = (256, 192, 128, 96, 64)  # pixels of its longer side: the first with which it is small enough
QUALITY = 80  # of its JPEG
SIDE = 24  # cells of a heatmap's side on the page: under such photos more would not be seen
GROUPS = ("Most confident", "Least confident")
LONGEST, LONGEST_URI = 200, 400  # characters of a name, an id or a reason; of a URI
TINY = 1e-9  # below it a sum of heatmaps is dark
FULL = 65_535  # how 1 is written
PHOTOS = 8  # read at once
IMAGE_S = 60.0  # that one image is


@dataclass(frozen=True)
class GalleryOptions:
    """What to show."""

    classes: tuple[str, ...] | None = None  # ids, wnids or names; None: those that came first most often
    per_class: int = 4  # of the most and of the least confident images, each
    max_classes: int = 50


@dataclass(frozen=True)
class Gallery:
    """A page, and what it shows."""

    page: bytes
    classes: int
    pictures: int
    missing: Mapping[str, int]  # images that could not be had: why -> how many
    complete: bool  # False: the backfill has not ended, and rows of its input are not there


def make(
    dataset: str, output: Path, wish: GalleryOptions, settings: Settings, report: Report = lambda *_: None
) -> Gallery:
    """Write the page of a dataset, a folder or s3://bucket/prefix, to the file `output`, in one step.

    Raises InvalidInput, StorageUnavailable.
    """
    s3 = S3(settings)
    limits = Limits(settings.max_image_pixels, settings.max_image_side)
    made = gallery(_opened(dataset, s3), UriFetcher(settings, s3), limits, wish, report)
    FolderStore(output.parent).put(output.name, made.page, "text/html")
    return made


def _opened(dataset: str, s3: S3) -> Store:
    scheme, colon, rest = dataset.partition("://")
    if not colon:
        return FolderStore(Path(dataset))
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        message = f"{without_secrets(dataset)[:200]!r} is no dataset: name a folder, or s3://bucket/prefix."
        raise InvalidInput(message)
    return S3Store(s3, bucket, prefix.strip("/"))


def gallery(
    store: Store, images: ImageFetcher, limits: Limits, wish: GalleryOptions, report: Report = lambda *_: None
) -> Gallery:
    """The page of the dataset in `store`: at most `LIMIT` bytes, always the same for the same images.

    Raises InvalidInput where there is no dataset, or nothing in it to show; StorageUnavailable.
    """
    found = read_statistics(store, wish.per_class, report)
    complete = store.find("dataset.json", Deadline(READ_S)) is not None
    chosen = found.chosen(wish.classes, wish.max_classes)
    pictures = [kept.record for one in chosen for group in one.pictures() for kept in group]
    if len(pictures) > MOST_PICTURES:
        message = f"That would be {len(pictures):,} pictures, and a page may have {MOST_PICTURES:,}: "
        raise InvalidInput(message + "show fewer classes, or fewer images of each.")
    data = _data(found, chosen, complete=complete)
    needed = {(one["uri"], one["sha256"]): one for one in pictures}  # an image may be of several classes
    most = ((LIMIT - len(fill_template("gallery.html", data))) // len(needed) - AROUND) * 3 // 4
    places: dict[tuple[str, str], int] = {}
    for record, photo in _photos(list(needed.values()), images, limits, min(most, PHOTO_BYTES)):
        places[record["uri"], record["sha256"]] = len(places)
        data["photos"].append(photo)
        report("images", len(places), len(needed))
    shown = (row for one in data["classes"] for group in one["groups"] for row in group["rows"])
    for row, record in zip(shown, pictures, strict=True):
        row["photo"] = places[record["uri"], record["sha256"]]
    missing = Counter(photo["code"] for photo in data["photos"] if "code" in photo)
    return Gallery(fill_template("gallery.html", data), len(chosen), len(pictures), missing, complete)


def _photos(
    records: Sequence[Mapping[str, Any]], images: ImageFetcher, limits: Limits, most: int
) -> Iterator[tuple[Mapping[str, Any], dict[str, Any]]]:
    """Each row's image as the page gets it, in order; why there is none, where there is none."""
    decoding = threading.Lock()  # one at a time: each may take a gigabyte

    def photo(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
        try:
            return record, _photo(record, images, limits, most, decoding)
        except GradcamError as error:
            return record, {"code": error.code, "detail": _short(str(error))}

    with ThreadPoolExecutor(PHOTOS, thread_name_prefix="image") as readers:
        yield from readers.map(photo, records)


def _photo(
    record: Mapping[str, Any], images: ImageFetcher, limits: Limits, most: int, decoding: threading.Lock
) -> dict[str, Any]:
    """An image that is certainly the one that was explained, made small."""
    try:
        asked = ImageRef(uri=record["uri"], sha256=record["sha256"])
    except ValueError as error:  # nobody but a worker should have written it
        message = "The dataset says no image that could be asked for."
        raise InvalidRow(message) from error
    data = images.fetch(asked, Deadline(IMAGE_S)).data
    with decoding:
        pixels = decode(data, limits).pixels
        for edge in EDGES:
            small = shrink_to_edge(pixels, edge)
            swapped = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
            jpeg = cv2.imencode(".jpg", swapped, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
            if len(jpeg) <= most:
                height, width, _ = small.shape
                return {"jpeg": to_base64(jpeg), "width": width, "height": height}
    return {"code": "too_many_pictures", "detail": "On this page there is no room for it."}


def _data(found: ClassStatistics, chosen: Sequence[ClassSummary], *, complete: bool) -> dict[str, Any]:
    """All that the page is told, but for the photos."""
    rows, columns = (min(side, SIDE) for side in chosen[0].total.shape)
    method = found.method.name
    counts = {
        "counterfactual": "counts against the class",
        "eigencam": "stands out to the layer, whichever the class",
    }.get(method, "counts for the class")
    facts = {
        "Images": f"{found.rows:,}",
        "Failed": ", ".join(f"{code} {count:,}" for code, count in found.codes.most_common()) or "none",
        "Classes": f"{len(chosen):,} of {len(found.classes):,}",
        "Network, layer": "; ".join(found.networks),
        "Method": method,
    }
    if not complete:
        facts["Incomplete"] = "the backfill has not ended"

    def heatmap(values: NDArray[Any]) -> str:
        finite = np.nan_to_num(values.astype(np.float32))
        cells = enlarge(np.clip(finite, 0, 1), (rows, columns))
        return to_base64(np.rint(cells * FULL).astype("<u2").tobytes())

    def row(kept: TopRow) -> dict[str, Any]:
        record, longer = kept.record, max(kept.record["width"], kept.record["height"])
        return {
            "row": record["row"],
            "id": _short(record["id"] or ""),
            "uri": _short(record["uri"], LONGEST_URI),
            "rank": record["rank"],
            "percent": percent(record["probability"]),
            "width": max(round(record["width"] * EDGES[0] / longer), 1),
            "height": max(round(record["height"] * EDGES[0] / longer), 1),
            "heatmap": heatmap(kept.heatmap),
        }

    return {
        "title": _short("Gallery · " + "; ".join(one.partition(",")[0] for one in found.networks)),
        "about": f"The colours show how much each region of an image {counts}, from 0 to the strongest "
        "region. They tell where the network looked, not whether it is right. Images in which the class came "
        "first go before all others.",
        "facts": [[label, _short(value)] for label, value in facts.items()],
        "rows": rows,
        "columns": columns,
        "photos": [],
        "colors": {name: to_base64(colors(name).tobytes()) for name in COLORMAPS},
        "classes": [
            {
                "id": one.id,
                "wnid": _short(one.wnid),
                "name": _short(one.name.replace("_", " ")),
                "first": one.first,
                "count": one.count,
                "percent": percent(one.probability / one.count),
                "mean": heatmap(one.total / max(float(one.total.max()), TINY)),
                "groups": [
                    {"title": title, "rows": [row(kept) for kept in group]}
                    for title, group in zip(GROUPS, one.pictures(), strict=True)
                    if group
                ],
            }
            for one in chosen
        ],
    }


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"
