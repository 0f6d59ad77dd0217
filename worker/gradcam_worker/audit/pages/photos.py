"""The photos and the records of an audit's pages: small, embedded, verified by their checksums."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gradcam_worker.artifacts.dataset import SHOWN_COLUMN
from gradcam_worker.errors import GradcamError, InvalidRow
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.imaging.html import to_base64
from gradcam_worker.gradcam.imaging.overlay import encode_jpeg
from gradcam_worker.gradcam.imaging.resize import shrink_to_edge
from gradcam_worker.gradcam.sizing import Placement
from gradcam_worker.images.prepare import ImageFetcher
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef

MAX_PHOTO_BYTES = 32_000  # of one photo
PHOTO_OVERHEAD_BYTES = 100  # of each photo, in JSON
PHOTO_EDGES = (256, 192, 128, 96, 64)  # of a photo in pixels: the first that is small enough is used
JPEG_QUALITY = 80
PARALLEL_READS = 8
IMAGE_TIMEOUT_S = 60.0  # to fetch one image
MAX_UNREACHABLE = 16
MAX_TEXT_LENGTH = 200  # characters


def image_key(record: Mapping[str, Any]) -> tuple[str, str]:
    """What tells images apart: an image may be in several records."""
    return record["uri"], record["sha256"]


def read_photos(
    records: Sequence[Mapping[str, Any]], images: ImageFetcher, limits: Limits, max_bytes: int
) -> Iterator[dict[str, Any]]:
    """The image of each row, in order, or the reason why it is missing.

    Once `MAX_UNREACHABLE` in a row could not be reached, the rest are not tried: each may take a minute.
    """
    decoding = threading.Lock()  # one at a time: each may take a gigabyte
    unreachable: list[dict[str, Any]] = []

    def photo(record: Mapping[str, Any]) -> dict[str, Any]:
        if len(unreachable) >= MAX_UNREACHABLE:
            return unreachable[-1]
        try:
            found = _photo(record, images, limits, max_bytes, decoding)
        except GradcamError as error:
            missing = {"code": error.code, "detail": truncate(str(error))}
            if error.retryable:
                unreachable.append(missing)
            return missing
        unreachable.clear()
        return found

    with ThreadPoolExecutor(PARALLEL_READS, thread_name_prefix="image") as readers:
        yield from readers.map(photo, records)


def _photo(
    record: Mapping[str, Any], images: ImageFetcher, limits: Limits, max_bytes: int, decoding: threading.Lock
) -> dict[str, Any]:
    """The explained image, verified by its checksum, as a small JPEG."""
    try:
        reference = ImageRef(uri=record["uri"], sha256=record["sha256"])
    except ValueError as error:  # only a dataset that no worker has written
        message = "The dataset says no image that could be asked for."
        raise InvalidRow(message) from error
    data = images.fetch(reference, Deadline(IMAGE_TIMEOUT_S)).data
    with decoding:
        pixels = decode(data, limits).pixels
        for edge in PHOTO_EDGES:
            small = shrink_to_edge(pixels, edge)
            jpeg = encode_jpeg(small, JPEG_QUALITY)
            if len(jpeg) <= max_bytes:
                height, width, _ = small.shape
                return {"jpeg": to_base64(jpeg), "width": width, "height": height}
    return {"code": "too_many_pictures", "detail": "On this page there is no room for it."}


def photo_bytes(room: int) -> int:
    """Return how large a photo may be, if there are `room` bytes of the page for each."""
    return min((room - PHOTO_OVERHEAD_BYTES) * 3 // 4, MAX_PHOTO_BYTES)  # base64 adds a third


def placement_of(record: Mapping[str, Any]) -> Placement | None:
    """Where the heatmap of a row lies on its image; None: on all of it."""
    shown = record.get(SHOWN_COLUMN)  # only datasets of networks that crop or pad have it
    if not shown:
        return None
    left, top, right, bottom = shown
    width, height = record["width"], record["height"]
    return Placement(left / width, top / height, right / width, bottom / height)


def truncate(text: str, max_length: int = MAX_TEXT_LENGTH) -> str:
    """Cut a text that is too long for a page."""
    return text if len(text) <= max_length else text[: max_length - 1] + "…"
