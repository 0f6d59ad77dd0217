"""Image bytes to pixels, with limits: the only caller of image decoders.

Images that are too large are refused by their header, before a decoder allocates memory: a GIF of 48 bytes
can claim 900 million pixels. OpenCV itself refuses more than 2^28 pixels, see `gradcam_worker.gradcam`. Too
little memory for an image within the limits is an `InternalError`, not a damaged image.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

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
from gradcam_worker.gradcam.decoding.color import ColorSource, Conversion, find_conversion
from gradcam_worker.gradcam.decoding.exif import make_upright
from gradcam_worker.gradcam.decoding.structure import BMP, GIF, JPEG, PNG, WEBP, Damage, Pixels, StoredImage
from gradcam_worker.text.short_repr import short_repr

# Imported now: Pillow loads its readers on first use, and one that fails to load then, for lack of memory,
# is missing for the rest of the process.
_PRELOADED = (GifImagePlugin, PngImagePlugin, WebPImagePlugin)
_READERS: tuple[tuple[tuple[bytes, ...], Callable[[bytes], StoredImage]], ...] = (  # first bytes, reader
    ((jpeg_file.SIGNATURE,), jpeg_file.read),
    ((png_file.SIGNATURE,), png_file.read),
    (gif_file.SIGNATURES, gif_file.read),
    ((bmp_file.SIGNATURE,), bmp_file.read),
)
_PILLOW_FORMATS = {GIF: "GIF", PNG: "PNG"}
CMYK_COMPONENTS = 4  # of a JPEG
BYTES_PER_PIXEL = 16  # peak while decoding, measured with a lossless WebP with alpha; 3 remain
SPARE_BYTES = 32 * 1024**2  # that decoders may need in addition, for threads and tables
CMYK_STRIP_ROWS = 256  # converted to RGB at a time
Watch = Callable[[str], AbstractContextManager[object]]  # of the media type
_OTHER_FORMATS = (
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
    """The limits on images, and what is made of those within.

    Attributes:
        max_pixels: Largest width x height; the default takes 192 MB as RGB.
        max_side: Longest side in pixels; OpenCV and most formats are limited to 2^15 or 2^16.
        max_damage: The missing share of an image from which on it is refused.
        convert_colors: Convert colours to sRGB where a file says that they are others: by an ICC profile, or
            by cICP, gAMA and cHRM of a PNG. False: take every image as sRGB.
        fast_jpeg: Decode JPEG by the fast transform of libjpeg, as TensorFlow does unless it is told not to.
    """

    max_pixels: int = 64_000_000
    max_side: int = 32_767
    max_damage: float = 0.05
    convert_colors: bool = True
    fast_jpeg: bool = False


@dataclass(frozen=True)
class Decoded:
    """A decoded, upright image."""

    pixels: NDArray[np.uint8]  # (height, width, 3) RGB
    media_type: str
    damage: Damage | None = None  # less than the limits forbid
    converted_from: ColorSource | None = None  # None: the pixels are as stored, in sRGB for all that is known

    __repr__ = short_repr

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        height, width, _ = self.pixels.shape
        return height, width


def decode(data: bytes | StoredImage, limits: Limits | None = None, watch: Watch = nullcontext) -> Decoded:
    """Decode an image: upright by EXIF, in sRGB, alpha flattened on white, the first frame of an animation.

    16-bit, grey, palette and CMYK images become 8-bit RGB. The same bytes always give the same pixels: a JPEG
    is never decoded at a reduced size.

    Args:
        data: A JPEG, PNG, WebP, GIF or BMP file; or what `read_structure` returned for it.
        limits: Largest size and damage, and whether colours are converted; None: the defaults.
        watch: Makes what surrounds each call of OpenCV: its libpng and libjpeg write to standard error what
            they think of an image. Pillow and simplejpeg write nothing.

    Returns:
        The pixels (height, width, 3), uint8, RGB, what is missing of them, and which colours they had.

    Raises:
        UnsupportedMediaType: The format is not supported.
        ImagePixelsExceeded: The image is larger than the limits.
        ImageDecodeFailed: It is damaged.
        InternalError: There is too little memory at present.
    """
    limits = limits or Limits()
    with _memory_errors(data, limits):
        stored = data if isinstance(data, StoredImage) else _read_structure(data, limits)
        conversion = find_conversion(stored.color, stored.components) if limits.convert_colors else None
        pixels, damage, conversion = _decode_stored(stored, limits, conversion, watch)
        _check_damage(stored, damage, limits)
        return Decoded(
            make_upright(_place_on_canvas(pixels, stored), stored.orientation),
            stored.media_type,
            damage,
            conversion.source if conversion else None,
        )


def read_structure(data: bytes, limits: Limits | None = None) -> StoredImage:
    """Read the structure of a file without decoding it: `decode` then does not read it once more.

    Args:
        data: A JPEG, PNG, WebP, GIF or BMP file.
        limits: Largest size; None: the defaults.

    Returns:
        The structure, with a copy of what decoders need. Each of its `declared_pixels` takes up to
        `BYTES_PER_PIXEL` bytes while it is decoded and 3 bytes afterwards.

    Raises:
        UnsupportedMediaType, ImagePixelsExceeded, ImageDecodeFailed, InternalError: As for `decode`.
    """
    limits = limits or Limits()
    with _memory_errors(data, limits):
        return _read_structure(data, limits)


@contextmanager
def _memory_errors(data: bytes | StoredImage, limits: Limits) -> Iterator[None]:
    """Raise InternalError for lack of memory, which decoders report as damage, or by returning None.

    If there is no memory for the pixels that the header claims, a decoder's verdict means nothing.
    """
    try:
        yield
    except MemoryError as error:
        raise _out_of_memory() from error
    except ImageDecodeFailed as error:
        try:
            stored = data if isinstance(data, StoredImage) else _read_structure(data, limits)
            width, height = stored.size
            np.empty(width * height * BYTES_PER_PIXEL + SPARE_BYTES, np.uint8)  # reserved, never written
        except MemoryError:
            raise _out_of_memory() from error
        except GradcamError:
            pass  # the header alone is invalid: the error stands
        raise


def _out_of_memory() -> InternalError:
    return InternalError(
        "There is not enough memory to decode the image just now: give the worker more "
        "(GRADCAM_MEMORY_BYTES) or allow less at once (GRADCAM_MAX_PIXELS_IN_FLIGHT)."
    )


def _read_structure(data: bytes, limits: Limits) -> StoredImage:
    """Read the structure of a file, and refuse an image that is larger than the limits."""
    readers = [reader for starts, reader in _READERS if data.startswith(starts)]
    if webp_file.is_webp(data):
        readers.append(webp_file.read)
    if not readers:
        formats = ", ".join(sorted(kind.removeprefix("image/") for kind in (JPEG, PNG, WEBP, GIF, BMP)))
        message = f"Received {_describe(data)}, not an image in a supported format: {formats}."
        raise UnsupportedMediaType(message)
    stored = readers[0](data)
    for width, height in (stored.size, stored.frame_size or stored.size):
        if not width * height:
            message = f"The {stored.media_type} data are damaged: they claim {width} x {height} pixels."
            raise ImageDecodeFailed(message)
        _check_size(width, height, limits)
    return stored


def _describe(data: bytes) -> str:
    """What the data look like, for the error message."""
    if not data:
        return "an empty file"
    if data.lstrip()[:1] == b"<":
        return "a page of HTML or XML"
    if data[4:8] == b"ftyp":
        return f"an ISO media file ({data[8:12].decode('ascii', 'replace')})"
    for start, name in _OTHER_FORMATS:
        if data.startswith(start):
            return name
    return f"{len(data)} bytes that start with {data[:8].hex(' ')}"


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        message = f"The image claims {width} x {height} pixels; {_describe_limits(limits)}."
        raise ImagePixelsExceeded(message)


def _describe_limits(limits: Limits) -> str:
    return f"at most {limits.max_pixels:,} pixels and {limits.max_side:,} a side are allowed"


def _check_damage(stored: StoredImage, damage: Damage | None, limits: Limits) -> None:
    if damage and damage.share > 0 and damage.share >= limits.max_damage:
        allowed = f"less than {limits.max_damage:.1%} may" if limits.max_damage else "nothing may"
        message = (
            f"The {stored.media_type} data are damaged: {damage.what}. About {damage.share:.1%} of the "
            f"image is missing; {allowed} be (GRADCAM_MAX_IMAGE_DAMAGE)."
        )
        raise ImageDecodeFailed(message)


def _decode_stored(
    stored: StoredImage, limits: Limits, conversion: Conversion | None, watch: Watch
) -> tuple[Pixels, Damage | None, Conversion | None]:
    """The first frame (height, width, 3), not yet upright; its damage; which conversion was applied to it."""
    kind, damage = stored.media_type, stored.damage
    if kind == JPEG:
        return _decode_jpeg(stored, limits, conversion, watch)
    if kind == WEBP:
        flags = cv2.IMREAD_UNCHANGED if stored.translucent else cv2.IMREAD_COLOR_RGB
        pixels = _decode_by_opencv(stored, watch, flags)
        pixels = alpha.flatten_on_white(pixels, conversion) if stored.translucent else pixels
    elif kind == PNG:
        pixels, damage = _decode_png(stored, conversion, watch)
    elif kind == BMP:
        pixels = _decode_bmp(stored, limits, conversion, watch)
    else:
        pixels = _decode_by_pillow(stored)
    if conversion and not stored.translucent:
        conversion.convert_rgb(pixels)
    return pixels, damage, conversion


def _decode_jpeg(
    stored: StoredImage, limits: Limits, conversion: Conversion | None, watch: Watch
) -> tuple[Pixels, Damage | None, Conversion | None]:
    """Decode and convert a JPEG, and measure its damage if libjpeg complains about it."""
    damage, by_libjpeg = stored.damage, partial(_decode_by_libjpeg, fast=limits.fast_jpeg)
    try:
        try:
            pixels = by_libjpeg(stored, stored.data)
        except ValueError as error:
            stored, pixels, complaint = _decode_without_padding(stored, str(error), by_libjpeg)
            if complaint and not complaint.startswith(jpeg_file.HARMLESS):
                insert_junk = jpeg_file.insert_junk
                damage = jpeg_file.measure_damage(
                    stored.data,
                    complaint,
                    pixels,
                    lambda: by_libjpeg(stored, insert_junk(stored.data), lenient=True),
                )
                _check_damage(stored, damage, limits)  # before the colours of many pixels are converted
    except ValueError as error:
        if "subsampling" not in str(error):
            message = f"The image/jpeg data are damaged: {error}"
            raise ImageDecodeFailed(message) from error
        pixels = _decode_by_opencv(stored, watch)  # simplejpeg supports only the usual ones
        if stored.components == CMYK_COMPONENTS:
            conversion = None  # OpenCV converted it in its own way
    if pixels.shape[2] == CMYK_COMPONENTS:
        pixels = conversion.convert_cmyk(pixels) if conversion else _from_cmyk(pixels)
    elif conversion:
        conversion.convert_rgb(pixels)
    return pixels, damage, conversion


def _decode_without_padding(
    stored: StoredImage, complaint: str, by_libjpeg: Callable[..., Pixels]
) -> tuple[StoredImage, Pixels, str]:
    """The file without padding, its pixels, and the remaining complaint of libjpeg, or an empty string."""
    for data in jpeg_file.strip_padding(stored.data, complaint):
        stored = replace(stored, data=data)
        try:
            return stored, by_libjpeg(stored, data), ""
        except ValueError as error:
            complaint = str(error)
    return stored, by_libjpeg(stored, stored.data, lenient=True), complaint


def _decode_by_libjpeg(
    stored: StoredImage, data: bytes, *, fast: bool = False, lenient: bool = False
) -> Pixels:
    """Decode a JPEG to RGB or CMYK. Raises ValueError with any complaint of libjpeg.

    With `lenient`, complaints are ignored. libjpeg does not report where it gives up, and leaves the rest of
    the buffer as it was; so the buffer is filled with grey before.
    """
    (width, height), colors = stored.size, "CMYK" if stored.components == CMYK_COMPONENTS else "RGB"
    buffer = np.full((height, width, len(colors)), jpeg_file.GREY, np.uint8) if lenient else None
    pixels = simplejpeg.decode_jpeg(
        data, colors, fastdct=fast, fastupsample=False, buffer=buffer, strict=not lenient
    )
    if pixels.shape != (height, width, len(colors)):
        message = f"its header claims {width} x {height} pixels, and it holds {pixels.shape}"
        raise ValueError(message)
    return np.asarray(pixels, np.uint8)


def _from_cmyk(cmyk: Pixels) -> Pixels:
    """Convert inverted CMYK (height, width, 4), as all programs store it, to RGB (height, width, 3)."""
    pixels = np.empty((*cmyk.shape[:2], 3), np.uint8)
    for top in range(0, len(cmyk), CMYK_STRIP_ROWS):
        rows = cmyk[top : top + CMYK_STRIP_ROWS]
        black = np.ascontiguousarray(rows[..., 3])
        for channel in range(3):  # numpy is three times as slow with all at once
            ink = np.multiply(255 - rows[..., channel], black, dtype=np.uint16) >> 8
            pixels[top : top + CMYK_STRIP_ROWS, :, channel] = black - ink
    return pixels


def _decode_png(
    stored: StoredImage, conversion: Conversion | None, watch: Watch
) -> tuple[Pixels, Damage | None]:
    def decoder(stored: StoredImage) -> Pixels:
        if png_file.has_deep_transparent_color(stored):
            return _decode_deep_transparent_color(stored, conversion, watch)
        if stored.translucent:
            return _decode_by_pillow(stored, conversion)
        return _decode_by_opencv(stored, watch)

    if stored.damage is None and png_file.has_valid_checksums(stored):
        try:
            return decoder(stored), stored.damage
        except ImageDecodeFailed:  # the checksums are right, but the contents are not
            pass
    stored = png_file.repair(stored)
    return decoder(stored), stored.damage


def _decode_deep_transparent_color(
    stored: StoredImage, conversion: Conversion | None, watch: Watch
) -> Pixels:
    """Decode by OpenCV, which compares 16 bits of each channel with the transparent colour; Pillow 8."""
    return alpha.flatten_on_white(_decode_by_opencv(stored, watch, cv2.IMREAD_UNCHANGED), conversion)


def _decode_bmp(stored: StoredImage, limits: Limits, conversion: Conversion | None, watch: Watch) -> Pixels:
    if stored.damage:
        _check_damage(stored, stored.damage, limits)  # before memory is allocated for missing pixels
        stored = bmp_file.fill_with_zeros(stored)
    if not bmp_file.has_masks(stored):
        return _decode_by_opencv(stored, watch)
    pixels = bmp_file.decode_masked(stored)
    return alpha.flatten_on_white(pixels, conversion) if stored.translucent else pixels


def _decode_by_opencv(stored: StoredImage, watch: Watch, flags: int = cv2.IMREAD_COLOR_RGB) -> Pixels:
    kind = stored.media_type
    try:
        with watch(kind):
            pixels = cv2.imdecode(np.frombuffer(stored.data, np.uint8), flags)
    except cv2.error as error:
        message = f"The {kind} data are damaged: {error.err or error}"
        raise ImageDecodeFailed(message) from error
    width, height = stored.frame_size or stored.size
    channels = 4 if flags == cv2.IMREAD_UNCHANGED else 3
    if pixels is None or pixels.shape != (height, width, channels):
        message = f"The {kind} data are damaged ({len(stored.data):,} bytes received)."
        raise ImageDecodeFailed(message)
    if pixels.dtype == np.uint16:
        pixels >>= 8  # in place, to save memory
    return np.asarray(pixels, np.uint8)


def _decode_by_pillow(stored: StoredImage, conversion: Conversion | None = None) -> Pixels:
    """Decode by Pillow, flattened on white: OpenCV would drop alpha.

    OpenCV also rejects a GIF with large areas of one colour as damaged.
    """
    kind = stored.media_type
    try:
        image = Image.open(io.BytesIO(stored.data), formats=[_PILLOW_FORMATS[kind]])
        image.load()
        return alpha.flatten_on_white(image, conversion)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = f"The image's header claims too many pixels ({error})"
        raise ImagePixelsExceeded(message) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise anything for damaged data
        message = f"The {kind} data are damaged: {error}"
        raise ImageDecodeFailed(message) from error


def _place_on_canvas(frame: Pixels, stored: StoredImage) -> Pixels:
    """The first frame (height, width, 3) on a white canvas: what it leaves out is transparent."""
    if stored.frame_size in {None, stored.size}:
        return frame
    (left, top), (width, height) = stored.offset, stored.size
    canvas = np.full((height, width, 3), 255, np.uint8)
    covered = canvas[top : top + len(frame), left : left + frame.shape[1]]
    covered[:] = frame[: len(covered), : covered.shape[1]]
    return canvas
