"""Bytes -> pixels, guarded: the only way to an image decoder.

Everything that can be refused by its header is refused by its header, before a decoder allocates
anything: a 48-byte GIF can claim 900 million pixels.
"""

import io
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from worker.errors import ImageDecodeFailed, ImagePixelsExceeded, UnsupportedMediaType

FORMATS = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",  # a JPEG with further pictures behind it, as many phones write
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
FULL = 0  # no flag: as large as it is
REDUCED = {  # divisor of both sides -> OpenCV's flag, without the bit that asks for BGR
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
}
MARKER, START_OF_SCAN = 0xFF, 0xDA  # two bytes of a JPEG
MAX_JPEG_SCANS = 64  # progressive pictures have about ten; one with 302 scans takes 15 s to decode
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_STARTS = (b"\xff\xd8\xff", _PNG_SIGNATURE, b"GIF87a", b"GIF89a")  # and RIFF....WEBP
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

    Raises UnsupportedMediaType, ImagePixelsExceeded, ImageDecodeFailed.
    """
    limits = limits or Limits()
    header = _open(data, limits)
    with header:
        media_type = FORMATS[header.format or ""]
        _check_size(header.width, header.height, limits)
        if media_type == "image/png":
            _check_png_chunks(data)
        if media_type == "image/jpeg":
            _check_jpeg_scans(data)
        translucent = header.mode in {"RGBA", "LA", "PA"} or "transparency" in header.info
        reduced = _reduced(header.size, at_least) if media_type == "image/jpeg" else FULL
        pixels = _on_white(header) if translucent else _opaque(data, media_type, reduced)
    rows, columns, _ = pixels.shape
    if reduced:
        shorter, longer = sorted(header.size)
        rows, columns = (shorter, longer) if rows < columns else (longer, shorter)
    return Decoded(pixels, media_type, (rows, columns))


def _open(data: bytes, limits: Limits) -> Image.Image:
    """Read the header only."""
    try:
        return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name != "MPO"])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = f"The image's header claims too many pixels; {_allowed(limits)} ({error})"
        raise ImagePixelsExceeded(message) from error
    except UnidentifiedImageError as error:
        if data.startswith(_STARTS) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
            message = f"The image's header is damaged or cut off ({len(data):,} bytes received)."
            raise ImageDecodeFailed(message) from error
        accepted = ", ".join(sorted({kind.removeprefix("image/") for kind in FORMATS.values()}))
        message = f"Received {_describe(data)}, not an image in a format read here: {accepted}."
        raise UnsupportedMediaType(message) from error
    except Exception as error:  # Pillow's header readers raise whatever the damage leads them to
        message = f"The image's header is damaged: {error}"
        raise ImageDecodeFailed(message) from error


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


def _check_png_chunks(data: bytes) -> None:
    """Refuse a chunk that claims to run past the end: libpng would first allocate what it claims."""
    at = len(_PNG_SIGNATURE)
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        if length > len(data) - at - 12:
            name = kind.decode("ascii", "replace")
            left = max(len(data) - at - 12, 0)
            message = f"The PNG is cut off or lies: chunk {name!r} claims {length:,} of {left:,} bytes."
            raise ImageDecodeFailed(message)
        if kind == b"IEND":
            return
        at += 12 + length
    message = f"The PNG is cut off: it ends without an IEND chunk ({len(data):,} bytes received)."
    raise ImageDecodeFailed(message)


def _check_jpeg_scans(data: bytes) -> None:
    """Refuse a JPEG of very many scans: each costs a pass over the whole picture, however few its bytes."""
    codes = np.frombuffer(data, np.uint8)
    starts = (codes[:-1] == MARKER) & (codes[1:] == START_OF_SCAN)  # cannot stand within compressed data
    scans = np.count_nonzero(starts)
    if scans > MAX_JPEG_SCANS:
        message = f"The JPEG has {scans} scans; at most {MAX_JPEG_SCANS} are read."
        raise ImageDecodeFailed(message)


def _reduced(size: tuple[int, int], at_least: int | None) -> int:
    """How OpenCV is told to decode a JPEG as small as it may be; `FULL` where that is its size.

    One that is not square does not become square, so that it can be seen whether EXIF has turned it.
    """
    shorter, longer = sorted(size)
    for divisor, flag in REDUCED.items():
        short, long = -(-shorter // divisor), -(-longer // divisor)  # rounded up, as libjpeg does
        if at_least is not None and short >= at_least and (short < long or shorter == longer):
            return flag
    return FULL


def _opaque(data: bytes, media_type: str, reduced: int) -> NDArray[np.uint8]:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | reduced)
    except cv2.error as error:
        message = f"The {media_type} data are damaged: {error.err or error}"
        raise ImageDecodeFailed(message) from error
    if pixels is None:
        message = f"The {media_type} data are damaged or cut off ({len(data):,} bytes received)."
        raise ImageDecodeFailed(message)
    return np.asarray(pixels, np.uint8)


def _on_white(header: Image.Image) -> NDArray[np.uint8]:
    """OpenCV drops alpha instead of compositing it, so translucent pictures go through Pillow."""
    try:
        upright = ImageOps.exif_transpose(_eight_bits(header))
        upright = upright if upright.mode == "RGBA" else upright.convert("RGBA")
        white = Image.new("RGB", upright.size, "white")
        white.paste(upright, mask=upright)
        return np.asarray(white, np.uint8)
    except Exception as error:  # as in `_open`: any exception here means damaged data
        message = f"The image data are damaged: {error}"
        raise ImageDecodeFailed(message) from error


def _eight_bits(header: Image.Image) -> Image.Image:
    """A picture with one transparent colour of 16 bits a channel: Pillow would compare only the low 8."""
    transparent = header.info.get("transparency")
    if header.mode.startswith("I"):
        values = np.asarray(header, np.uint32)
        alpha = np.where(values == transparent, 0, 255)
        pair = np.stack([values >> 8, alpha], axis=-1).astype(np.uint8)
        eight = Image.fromarray(pair)
        eight.info = {key: value for key, value in header.info.items() if key != "transparency"}
        return eight
    if isinstance(transparent, tuple) and max(transparent) >> 8:
        header.info["transparency"] = tuple(value >> 8 for value in transparent)
    return header
