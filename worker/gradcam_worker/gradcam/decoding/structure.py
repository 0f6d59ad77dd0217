"""What a picture's file holds, read without decoding it.

The readers of each format (`jpeg_file`, `png_file`, `webp_file`, `gif_file`, `bmp_file`) give a `Stored`. Its
`data` are a file of the same format with nothing in it but what decides the pixels: no profile, no text, no
EXIF. So no decoder ever meets what a stranger wrote there: it cannot refuse the picture for it, turn it in a
way of its own, unpack it, or repeat it on standard error.
"""

from dataclasses import dataclass

JPEG, PNG, WEBP, GIF, BMP = "image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"
MAX_PARTS = 250_000  # segments or chunks of a file: more are no picture, and would take seconds to walk over


LINE_ENDS = 16  # line feeds, each with a carriage return before it: by chance once in 2^128


@dataclass(frozen=True)
class Damage:
    """What a picture lacks."""

    share: float  # of the picture, from 0 to 1, as far as that can be told
    what: str  # in words


@dataclass(frozen=True)
class Stored:
    """A picture as its file holds it, not yet upright."""

    media_type: str
    size: tuple[int, int]  # (width, height) of the whole, in pixels
    data: bytes  # for a decoder: what is not pixels is left out
    orientation: int = 1  # as EXIF counts: see `gradcam_worker.gradcam.decoding.exif`
    translucent: bool = False
    components: int = 3  # of a JPEG
    damage: Damage | None = None  # as far as the file's structure shows it
    place: tuple[int, int] = (0, 0)  # (left, top) of the first frame, in the whole
    frame: tuple[int, int] | None = None  # (width, height) of the first frame; None: it is the whole


def sent_as_text(packed: bytes) -> bool:
    """Whether compressed data were transferred as text, which turned each line feed into two bytes."""
    ends = packed.count(b"\n")
    return ends >= LINE_ENDS and packed.count(b"\r\n") == ends
