"""Bytes -> pixels, guarded: the only way to an image decoder.

Everything that can be refused by its header is refused by its header, before a decoder allocates
anything: a 48-byte GIF can claim 900 million pixels. OpenCV itself refuses more than 2^28 pixels, see
`worker.gradcam`, and for what memory is still too short there is an error of its own.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from worker.errors import (
    GradcamError,
    ImageDecodeFailed,
    ImagePixelsExceeded,
    InternalError,
    UnsupportedMediaType,
)
from worker.gradcam import alpha, structure
from worker.gradcam.structure import PNG_SIGNATURE

Pixels = NDArray[np.uint8]

# Pillow loads its readers when they are first needed; one that cannot be loaded then, because memory is
# short, is missing for as long as the process lives.
_READERS = (BmpImagePlugin, GifImagePlugin, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, WebPImagePlugin)
FORMATS = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",  # a JPEG with further pictures behind it, as many phones write
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
FULL = 1  # the divisor of a picture that is decoded as large as it is
REDUCED = {  # divisor of both sides -> OpenCV's flag, without the bit that asks for BGR
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
}
BYTES_PER_PIXEL = 16  # that decoding takes at most, measured: a lossless WebP with alpha. It leaves 3
WEBP_BYTES_PER_PIXEL = 8  # that Pillow asks for as soon as it opens one, and calls it damaged if it gets none
SPARE_BYTES = 32 * 1024**2  # that decoders may want besides, for threads and tables
_STARTS = (b"\xff\xd8\xff", PNG_SIGNATURE, b"GIF87a", b"GIF89a")  # and RIFF....WEBP
_LOOKS_LIKE = (
    (b"%PDF", "a PDF document"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
)


@dataclass(frozen=True)
class Limits:
    """How large a picture may be before it is decoded."""

    max_pixels: int = 64_000_000  # width x height: 192 MB as RGB
    max_side: int = 32_767  # pixels; OpenCV and most formats end at 2^15 or 2^16


@dataclass(frozen=True)
class Decoded:
    """A picture as the eye sees it."""

    pixels: NDArray[np.uint8]  # (height, width, 3) RGB, upright; smaller than the picture where asked for
    media_type: str
    size: tuple[int, int]  # (height, width) of the picture itself, upright


def decode(data: bytes, limits: Limits | None = None, *, at_least: int | None = None) -> Decoded:
    """Image bytes -> RGB pixels (height, width, 3): upright by EXIF, alpha laid on white, first frame.

    16-bit, grey, palette and CMYK images become 8-bit RGB. Where a shorter side of `at_least` pixels is
    enough, a JPEG comes out at a half, a quarter or an eighth of its size, in a third of the time; no other
    format can be decoded at less than its size.

    Raises UnsupportedMediaType, ImagePixelsExceeded, ImageDecodeFailed, and InternalError where the memory
    is too short just now.
    """
    limits = limits or Limits()
    with _memory_permitting(data, limits), _open(data, limits) as header:
        media_type = FORMATS[header.format or ""]
        structure.check(media_type, data)
        divisor = _divisor(header, at_least)
        translucent = header.mode in {"RGBA", "LA", "PA"} or "transparency" in header.info
        # OpenCV takes a GIF of large areas in one colour for damaged.
        by_hand = translucent or media_type == "image/gif"
        pixels = _on_white(header, data) if by_hand else _opaque(data, media_type, divisor)
        size = header.size
    rows, columns, _ = pixels.shape
    if divisor != FULL:
        shorter, longer = sorted(size)
        rows, columns = (shorter, longer) if rows < columns else (longer, shorter)
    return Decoded(pixels, media_type, (rows, columns))


def claimed(data: bytes, limits: Limits | None = None, *, at_least: int | None = None) -> int:
    """How many pixels `decode` would hold, for the same arguments, as the header claims.

    Each of them takes up to BYTES_PER_PIXEL while it is decoded and 3 bytes afterwards. A progressive JPEG
    counts whole however small it comes out, for all of it is kept until its last scan.

    Raises UnsupportedMediaType, ImagePixelsExceeded, ImageDecodeFailed, InternalError, as `decode` does.
    """
    limits = limits or Limits()
    with _memory_permitting(data, limits), _open(data, limits) as header:
        divisor = FULL if "progressive" in header.info else _divisor(header, at_least)
        width, height = header.size
        return -(-width // divisor) * -(-height // divisor)


@contextmanager
def _memory_permitting(data: bytes, limits: Limits) -> Iterator[None]:
    """Tell damage from a want of memory, which decoders report in the same way, or as None.

    Where there is no memory for the pixels that the header claims, nothing is known of the data.
    """
    try:
        yield
    except MemoryError as error:
        raise _short_of_memory() from error
    except ImageDecodeFailed as error:
        try:
            with _open(data, limits) as header:
                np.empty(
                    header.height * header.width * BYTES_PER_PIXEL + SPARE_BYTES, np.uint8
                )  # not touched
        except MemoryError:
            raise _short_of_memory() from error
        except GradcamError:
            pass  # the header says enough
        raise


def _short_of_memory() -> InternalError:
    return InternalError(
        "There is not enough memory to decode the image just now: give the worker more "
        "(GRADCAM_MEMORY_BYTES) or allow less at once (GRADCAM_MAX_PIXELS_IN_FLIGHT)."
    )


def _open(data: bytes, limits: Limits) -> Image.Image:
    """Read the header only, and refuse what it claims where that is too much."""
    if size := structure.webp_size(data):
        _check_size(*size, limits)
        np.empty(
            size[0] * size[1] * WEBP_BYTES_PER_PIXEL, np.uint8
        )  # asked for, never touched: as Pillow does
    try:
        header = Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name != "MPO"])
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = f"The image's header claims too many pixels; {_allowed(limits)} ({error})"
        raise ImagePixelsExceeded(message) from error
    except UnidentifiedImageError as error:
        if data.startswith(_STARTS) or structure.is_webp(data):
            message = f"The image's header is damaged or cut off ({len(data):,} bytes received)."
            raise ImageDecodeFailed(message) from error
        accepted = ", ".join(sorted({kind.removeprefix("image/") for kind in FORMATS.values()}))
        message = f"Received {_describe(data)}, not an image in a format read here: {accepted}."
        raise UnsupportedMediaType(message) from error
    except Exception as error:  # Pillow's header readers raise whatever the damage leads them to
        message = f"The image's header is damaged: {error}"
        raise ImageDecodeFailed(message) from error
    _check_size(header.width, header.height, limits)
    return header


def _describe(data: bytes) -> str:
    """What these bytes look like, for the error message."""
    if not data:
        return "an empty file"
    if data.lstrip()[:1] == b"<":
        return "a page of HTML or XML"
    if data[4:8] == b"ftyp":
        return f"an ISO media file ({data[8:12].decode('ascii', 'replace')})"
    for start, name in _LOOKS_LIKE:
        if data.startswith(start):
            return name
    return f"{len(data)} bytes that start with {data[:8].hex(' ')}"


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        message = f"The image claims {width} x {height} pixels; {_allowed(limits)}."
        raise ImagePixelsExceeded(message)


def _allowed(limits: Limits) -> str:
    return f"at most {limits.max_pixels:,} pixels and {limits.max_side:,} a side are allowed"


def _divisor(header: Image.Image, at_least: int | None) -> int:
    """By what a JPEG's sides may be divided as it is decoded; `FULL` where that is its size.

    One that is not square does not become square, so that it can be seen whether EXIF has turned it.
    """
    if at_least is None or FORMATS[header.format or ""] != "image/jpeg":
        return FULL
    shorter, longer = sorted(header.size)
    for divisor in REDUCED:
        short, long = -(-shorter // divisor), -(-longer // divisor)  # rounded up, as libjpeg does
        if short >= at_least and (short < long or shorter == longer):
            return divisor
    return FULL


def _opaque(data: bytes, media_type: str, divisor: int) -> Pixels:
    return _by_opencv(data, media_type, cv2.IMREAD_COLOR_RGB | REDUCED.get(divisor, 0))


def _by_opencv(data: bytes, media_type: str, flags: int) -> Pixels:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        message = f"The {media_type} data are damaged: {error.err or error}"
        raise ImageDecodeFailed(message) from error
    if pixels is None:
        message = f"The {media_type} data are damaged or cut off ({len(data):,} bytes received)."
        raise ImageDecodeFailed(message)
    return np.asarray(pixels, np.uint8)


def _on_white(header: Image.Image, data: bytes) -> Pixels:
    """OpenCV would drop alpha; here it decodes WebP alone, in half the memory that Pillow takes for it."""
    try:
        stored = _webp(data, header.size) if header.format == "WEBP" else header
        if stored is header:
            header.load()  # before it is asked for EXIF, which in a PNG may come after the pixels
        return alpha.on_white(stored, header.getexif().get(ExifTags.Base.Orientation, 1))
    except (ImageDecodeFailed, MemoryError):
        raise
    except Exception as error:  # as in `_open`: any other exception here means damaged data
        message = f"The image data are damaged: {error}"
        raise ImageDecodeFailed(message) from error


def _webp(data: bytes, size: tuple[int, int]) -> Pixels:
    """A translucent WebP as it is stored, not upright: (height, width, 4) BGRA."""
    pixels = _by_opencv(data, "image/webp", cv2.IMREAD_UNCHANGED)
    width, height = size
    if pixels.shape != (height, width, 4):
        message = f"The WebP holds {pixels.shape}; its header claims {width} x {height} and an alpha channel."
        raise ImageDecodeFailed(message)
    return pixels
