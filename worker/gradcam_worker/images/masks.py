"""Reads the mask of an object, from a picture or from run lengths."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import ImageDecodeFailed, ImagePixelsExceeded
from gradcam_worker.gradcam.localization import Region, region_of_mask, shrink_mask
from gradcam_worker.gradcam.sizing import Size
from gradcam_worker.images.prepare import ImageServices, fetch_image
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.annotations import AnnotatedMask, RunLengths
from gradcam_worker.schemas.job import ImageRef

LOSSY = {"image/jpeg", "image/webp"}  # of these, dark pixels may be remains of 0
LIGHT = 128
# Of compressed run lengths, see `rleFrString` of pycocotools: characters with five bits of a number each.
FIRST_CHARACTER, MORE, SIGN, BITS, MAX_CHARACTERS = 48, 0x20, 0x10, 5, 7
DIFFERENCE_FROM = 3  # from this run on, what is written is the difference from the run before the last


@dataclass(frozen=True, eq=False)
class Mask:
    """The mask of an object, small enough to be kept."""

    shares: NDArray[np.uint8]  # see `localization.shrink_mask`
    size: Size  # (height, width) before it was shrunk

    def region(self, size: Size) -> Region:
        """The object in an image.

        Args:
            size: (height, width) of the upright image.

        Raises:
            ImageDecodeFailed: The proportions of mask and image differ.
        """
        (rows, columns), (height, width) = self.size, size
        if min(abs(rows - columns * height / width), abs(columns - rows * width / height)) > 1:
            message = (
                f"The mask is of {columns} x {rows} pixels and the upright image of {width} x {height}: the "
                "proportions must be the same."
            )
            raise ImageDecodeFailed(message)
        return region_of_mask(self.shares, self.size, size)


def read_mask(
    mask: AnnotatedMask, services: ImageServices, deadline: Deadline, *, redirects: bool = True
) -> Mask:
    """Read a mask. A picture is turned upright by its EXIF data, as an image is.

    Args:
        mask: The mask.
        services: The fetcher, the budgets and the limits.
        deadline: By when it has to be read.
        redirects: Whether a web server may redirect to another address.

    Returns:
        The mask.

    Raises:
        GradcamError: Whatever `fetch_image` and decoding raise.
        ImageDecodeFailed: The run lengths are not those of a mask.
        ImagePixelsExceeded: It has more pixels than are allowed.
    """
    if mask.rle is not None:
        return _read_runs(mask.rle, services, deadline)
    reference = ImageRef(uri=mask.uri or "", redirects=redirects)
    with fetch_image(reference, services, deadline) as fetched, fetched.decode() as image:
        decoded = image.decoded
        least = LIGHT if decoded.media_type in LOSSY else 1
        pixels = np.asarray((decoded.pixels >= least).any(axis=2), np.bool_)
        return Mask(shrink_mask(pixels), decoded.size)


def _read_runs(runs: RunLengths, services: ImageServices, deadline: Deadline) -> Mask:
    (height, width), limits = runs.size, services.limits
    if height * width > limits.max_pixels:
        message = f"The mask has {height} x {width} pixels; at most {limits.max_pixels:,} are allowed."
        raise ImagePixelsExceeded(message)
    counts = _decompress(runs.counts) if isinstance(runs.counts, str) else list(runs.counts)
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        message = f"The run lengths of the mask sum to {sum(counts):,}; {height} x {width} would be right."
        raise ImageDecodeFailed(message)
    with services.budgets.pixels.reserve(height * width, deadline):
        values = np.arange(len(counts)) % 2 == 1
        pixels = np.repeat(values, counts).reshape(width, height).T
        return Mask(shrink_mask(np.ascontiguousarray(pixels)), (height, width))


def _decompress(text: str) -> list[int]:
    """The run lengths that pycocotools compressed to a text. Raises ImageDecodeFailed."""
    counts: list[int] = []
    number = shift = 0
    for letter in text:
        part = ord(letter) - FIRST_CHARACTER
        if not 0 <= part < 2 * MORE or shift >= MAX_CHARACTERS * BITS:
            message = f"The mask's run lengths contain {letter!r}: they must be as pycocotools writes them."
            raise ImageDecodeFailed(message)
        number |= (part & (MORE - 1)) << shift
        shift += BITS
        if part & MORE:
            continue
        if part & SIGN:
            number -= 1 << shift
        counts.append(number + counts[-2] if len(counts) >= DIFFERENCE_FROM else number)
        number = shift = 0
    return counts
