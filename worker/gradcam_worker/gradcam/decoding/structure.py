"""The contents of an image file, read without decoding it.

The readers of the formats (`jpeg_file`, `png_file`, `webp_file`, `gif_file`, `bmp_file`) return a
`StoredImage`. Its `data` are a file of the same format that holds only what decides the pixels: no profile,
no text, no EXIF. So decoders never receive untrusted metadata: they cannot refuse the image because of it,
rotate the image in their own way, unpack the metadata, or print it on standard error.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

JPEG, PNG, WEBP, GIF, BMP = "image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"
MAX_PARTS = 250_000  # segments or chunks of a file: no image has more, and they would take seconds to read
MIN_LINE_ENDS = 16  # line feeds, all after a carriage return: by chance that happens once in 2^128


@dataclass(frozen=True)
class Damage:
    """Missing image data."""

    share: float  # estimate of the missing share of the image, from 0 to 1
    what: str  # the reason, in words


ICC, CICP, GAMMA = "icc", "cicp", "gamma"  # kinds of a `ColorTag`


@dataclass(frozen=True)
class ColorTag:
    """What a file says about its colours.

    Attributes:
        kind: `icc`: an ICC profile; `cicp`: the code points of a PNG; `gamma`: its gAMA, then its cHRM.
        data: The profile, or the contents of the chunks.
    """

    kind: str
    data: bytes = field(repr=False)

    @cached_property
    def digest(self) -> bytes:
        """A digest of both."""
        return hashlib.blake2b(self.data, person=self.kind.encode()).digest()


@dataclass(frozen=True)
class StoredImage:
    """An image as its file stores it, not yet upright."""

    media_type: str
    size: tuple[int, int]  # (width, height) of the whole image, in pixels
    data: bytes  # the file for a decoder: without metadata
    orientation: int = 1  # EXIF orientation, 1 to 8: see `gradcam_worker.gradcam.decoding.exif`
    translucent: bool = False
    components: int = 3  # 1: grey, 3: RGB, 4: CMYK
    damage: Damage | None = None  # what the structure of the file shows
    offset: tuple[int, int] = (0, 0)  # (left, top) of the first frame in the whole image
    frame_size: tuple[int, int] | None = None  # (width, height) of the first frame; None: `size`
    color: ColorTag | None = None  # None: nothing, so sRGB

    @property
    def declared_pixels(self) -> int:
        """Width x height of the whole image."""
        width, height = self.size
        return width * height


def sent_as_text(packed: bytes) -> bool:
    """Whether compressed data were transferred as text, which turns each line feed into two bytes.

    Args:
        packed: The compressed data.

    Returns:
        Whether every line feed follows a carriage return, and there are at least `MIN_LINE_ENDS` of them.
    """
    ends = packed.count(b"\n")
    return ends >= MIN_LINE_ENDS and packed.count(b"\r\n") == ends
