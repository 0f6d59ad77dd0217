"""Bytes -> pixels, guarded: the only way to an image decoder.

Everything that can be refused by its header is refused by its header, before a decoder allocates
anything: a 48-byte GIF can claim 900 million pixels. OpenCV itself refuses more than 2^28 pixels, see
`gradcam_worker.gradcam`, and for what memory is still too short there is an error of its own.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image, PngImagePlugin, WebPImagePlugin

from gradcam_worker.errors import (
    GradcamError,
    ImageDecodeFailed,
    ImagePixelsExceeded,
    InternalError,
    UnsupportedMediaType,
)
from gradcam_worker.gradcam.decoding import alpha, bmp_file, gif_file, jpeg_file, png_file, webp_file
from gradcam_worker.gradcam.decoding.exif import upright
from gradcam_worker.gradcam.decoding.structure import BMP, GIF, JPEG, PNG, WEBP, Damage, Stored
from gradcam_worker.text.short_repr import short_repr

Pixels = NDArray[np.uint8]

# Pillow loads its readers when they are first needed; one that cannot be loaded then, because memory is
# short, is missing for as long as the process lives.
_READERS = (GifImagePlugin, PngImagePlugin, WebPImagePlugin)
_FORMATS: tuple[tuple[tuple[bytes, ...], Callable[[bytes], Stored]], ...] = (  # first bytes, reader
    ((jpeg_file.SIGNATURE,), jpeg_file.read),
    ((png_file.SIGNATURE,), png_file.read),
    (gif_file.SIGNATURES, gif_file.read),
    ((bmp_file.SIGNATURE,), bmp_file.read),
)
_PILLOWS = {GIF: "GIF", PNG: "PNG"}
CMYK = 4  # components of a JPEG
BYTES_PER_PIXEL = 16  # that decoding takes at most, measured: a lossless WebP with alpha. It leaves 3
SPARE_BYTES = 32 * 1024**2  # that decoders may want besides, for threads and tables
CMYK_ROWS = 256  # that become RGB at once
_LOOKS_LIKE = (
    (b"\x89PNG", "a PNG that was transferred as text, which changed its bytes"),
    (b"%PDF", "a PDF document"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
)


@dataclass(frozen=True)
class Limits:
    """How large a picture may be before it is decoded, and how much of it may be missing."""

    max_pixels: int = 64_000_000  # width x height: 192 MB as RGB
    max_side: int = 32_767  # pixels; OpenCV and most formats end at 2^15 or 2^16
    max_damage: float = 0.05  # the share of a picture that is missing, at which it is refused


@dataclass(frozen=True)
class Decoded:
    """A picture as the eye sees it."""

    pixels: NDArray[np.uint8]  # (height, width, 3) RGB, upright
    media_type: str
    damage: Damage | None = None  # less of it is missing than the limits allow

    __repr__ = short_repr

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), upright."""
        height, width, _ = self.pixels.shape
        return height, width


def decode(data: bytes, limits: Limits | None = None) -> Decoded:
    """Image bytes -> RGB pixels (height, width, 3): upright by EXIF, alpha laid on white, first frame.

    16-bit, grey, palette and CMYK images become 8-bit RGB. The same bytes give the same pixels, whatever
    they are wanted for: a JPEG is never decoded at a part of its size.

    Raises UnsupportedMediaType, ImagePixelsExceeded, ImageDecodeFailed, and InternalError where the memory
    is too short just now.
    """
    limits = limits or Limits()
    with _memory_permitting(data, limits):
        stored = _read(data, limits)
        pixels, damage = _decoded(stored, limits)
        _check_damage(stored, damage, limits)
        return Decoded(upright(_on_canvas(pixels, stored), stored.orientation), stored.media_type, damage)


def claimed(data: bytes, limits: Limits | None = None) -> int:
    """How many pixels `decode` would hold, as the header claims.

    Each of them takes up to BYTES_PER_PIXEL while it is decoded and 3 bytes afterwards.

    Raises UnsupportedMediaType, ImagePixelsExceeded, ImageDecodeFailed, InternalError, as `decode` does.
    """
    limits = limits or Limits()
    with _memory_permitting(data, limits):
        width, height = _read(data, limits).size
        return width * height


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
            width, height = _read(data, limits).size
            np.empty(width * height * BYTES_PER_PIXEL + SPARE_BYTES, np.uint8)  # not touched
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


def _read(data: bytes, limits: Limits) -> Stored:
    """Read the file's structure only, and refuse what it claims where that is too much."""
    readers = [reader for starts, reader in _FORMATS if data.startswith(starts)]
    if webp_file.is_webp(data):
        readers.append(webp_file.read)
    if not readers:
        kinds = ", ".join(sorted(kind.removeprefix("image/") for kind in (JPEG, PNG, WEBP, GIF, BMP)))
        message = f"Received {_describe(data)}, not an image in a format read here: {kinds}."
        raise UnsupportedMediaType(message)
    stored = readers[0](data)
    for width, height in (stored.size, stored.frame or stored.size):
        if not width * height:
            message = f"The {stored.media_type} data are damaged: they claim {width} x {height} pixels."
            raise ImageDecodeFailed(message)
        _check_size(width, height, limits)
    return stored


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


def _check_damage(stored: Stored, damage: Damage | None, limits: Limits) -> None:
    if damage and damage.share > 0 and damage.share >= limits.max_damage:
        allowed = f"less than {limits.max_damage:.1%} may" if limits.max_damage else "nothing may"
        message = (
            f"The {stored.media_type} data are damaged: {damage.what}. About {damage.share:.1%} of the "
            f"picture is missing; {allowed} be (GRADCAM_MAX_IMAGE_DAMAGE)."
        )
        raise ImageDecodeFailed(message)


def _decoded(stored: Stored, limits: Limits) -> tuple[Pixels, Damage | None]:
    """The first frame (height, width, 3), on white, as it is stored, and what it lacks."""
    kind = stored.media_type
    if kind == JPEG:
        return _jpeg(stored)
    if kind == WEBP:
        flags = cv2.IMREAD_UNCHANGED if stored.translucent else cv2.IMREAD_COLOR_RGB
        pixels = _by_opencv(stored, flags)
        return alpha.on_white(pixels) if stored.translucent else pixels, stored.damage
    if kind == PNG:
        return _png(stored)
    if kind == BMP:
        return _bmp(stored, limits), stored.damage
    return _by_pillow(stored), stored.damage


def _jpeg(stored: Stored) -> tuple[Pixels, Damage | None]:
    """What libjpeg says of the data is an error where that is wanted: so it is known of which picture."""
    damage = stored.damage
    try:
        try:
            pixels = _by_libjpeg(stored, stored.data)
        except ValueError as error:
            stored, pixels, said = _without_padding(stored, str(error))
            if said and not said.startswith(jpeg_file.HARMLESS):
                junk = jpeg_file.with_junk
                damage = jpeg_file.damage(
                    stored.data, said, pixels, lambda: _by_libjpeg(stored, junk(stored.data), blank=True)
                )
    except ValueError as error:
        if "subsampling" in str(error):  # of which libjpeg's simple interface knows the usual ones
            return _by_opencv(stored), damage
        message = f"The image/jpeg data are damaged: {error}"
        raise ImageDecodeFailed(message) from error
    return _from_cmyk(pixels) if stored.components == CMYK else pixels, damage


def _without_padding(stored: Stored, said: str) -> tuple[Stored, Pixels, str]:
    """The file without what may be padding, its pixels, and what libjpeg still says of it, if anything."""
    for data in jpeg_file.without_padding(stored.data, said):
        stored = replace(stored, data=data)
        try:
            return stored, _by_libjpeg(stored, data), ""
        except ValueError as error:
            said = str(error)
    return stored, _by_libjpeg(stored, stored.data, blank=True), said


def _by_libjpeg(stored: Stored, data: bytes, *, blank: bool = False) -> Pixels:
    """Raises ValueError for all that libjpeg says of the data.

    With `blank` it goes on, and leaves grey what it has no data for. It does not say where it has to give
    up, and would then leave in the picture what was in memory before.
    """
    (width, height), colors = stored.size, "CMYK" if stored.components == CMYK else "RGB"
    into = np.full((height, width, len(colors)), jpeg_file.GREY, np.uint8) if blank else None
    pixels = simplejpeg.decode_jpeg(
        data, colors, fastdct=False, fastupsample=False, buffer=into, strict=not blank
    )
    if pixels.shape != (height, width, len(colors)):
        message = f"its header claims {width} x {height} pixels, and it holds {pixels.shape}"
        raise ValueError(message)
    return np.asarray(pixels, np.uint8)


def _from_cmyk(stored: Pixels) -> Pixels:
    """(height, width, 4), each inverted, as Adobe stores it and everybody else -> RGB."""
    pixels = np.empty((*stored.shape[:2], 3), np.uint8)
    for top in range(0, len(stored), CMYK_ROWS):
        rows = stored[top : top + CMYK_ROWS].astype(np.int32)
        black = rows[..., 3:]
        pixels[top : top + CMYK_ROWS] = black - ((255 - rows[..., :3]) * black >> 8)
    return pixels


def _png(stored: Stored) -> tuple[Pixels, Damage | None]:
    by = _by_pillow if stored.translucent else _by_opencv
    if png_file.has_deep_transparent_color(stored):
        by = _with_transparent_color
    if stored.damage is None and png_file.whole(stored):
        try:
            return by(stored), stored.damage
        except ImageDecodeFailed:  # the chunks are as they were written, and what they hold is not
            pass
    stored = png_file.mended(stored)
    return by(stored), stored.damage


def _with_transparent_color(stored: Stored) -> Pixels:
    """By OpenCV, which compares all 16 bits of a channel: Pillow compares 8."""
    return alpha.on_white(_by_opencv(stored, cv2.IMREAD_UNCHANGED))


def _bmp(stored: Stored, limits: Limits) -> Pixels:
    if stored.damage:
        _check_damage(stored, stored.damage, limits)  # before memory is taken for what is not there
        stored = bmp_file.mended(stored)
    if not bmp_file.has_masks(stored):
        return _by_opencv(stored)
    pixels = bmp_file.by_masks(stored)
    return alpha.on_white(pixels) if stored.translucent else pixels


def _by_opencv(stored: Stored, flags: int = cv2.IMREAD_COLOR_RGB) -> Pixels:
    kind = stored.media_type
    try:
        pixels = cv2.imdecode(np.frombuffer(stored.data, np.uint8), flags)
    except cv2.error as error:
        message = f"The {kind} data are damaged: {error.err or error}"
        raise ImageDecodeFailed(message) from error
    width, height = stored.frame or stored.size
    channels = 4 if flags == cv2.IMREAD_UNCHANGED else 3
    if pixels is None or pixels.shape != (height, width, channels):
        message = f"The {kind} data are damaged ({len(stored.data):,} bytes received)."
        raise ImageDecodeFailed(message)
    if pixels.dtype == np.uint16:
        pixels >>= 8  # in place, as there may be many
    return np.asarray(pixels, np.uint8)


def _by_pillow(stored: Stored) -> Pixels:
    """On white where it is translucent: OpenCV would drop alpha.

    OpenCV also takes a GIF of large areas in one colour for damaged.
    """
    kind = stored.media_type
    try:
        picture = Image.open(io.BytesIO(stored.data), formats=[_PILLOWS[kind]])
        picture.load()
        return alpha.on_white(picture)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = f"The image's header claims too many pixels ({error})"
        raise ImagePixelsExceeded(message) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever the damage leads them to
        message = f"The {kind} data are damaged: {error}"
        raise ImageDecodeFailed(message) from error


def _on_canvas(frame: Pixels, stored: Stored) -> Pixels:
    """What the first frame leaves out is transparent, so white."""
    if stored.frame in {None, stored.size}:
        return frame
    (left, top), (width, height) = stored.place, stored.size
    whole = np.full((height, width, 3), 255, np.uint8)
    part = whole[top : top + len(frame), left : left + frame.shape[1]]
    part[:] = frame[: len(part), : part.shape[1]]
    return whole
