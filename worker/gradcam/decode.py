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

    pixels: NDArray[np.uint8]  # (height, width, 3) RGB, upright
    media_type: str


def decode(data: bytes, limits: Limits | None = None) -> Decoded:
    """Image bytes -> RGB pixels (height, width, 3): upright by EXIF, alpha laid on white, first frame.

    16-bit, grey, palette and CMYK images become 8-bit RGB.

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
        pixels = _on_white(header) if translucent else _opaque(data, media_type)
    return Decoded(pixels, media_type)


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
    scans = data.count(b"\xff\xda")  # these two bytes cannot stand within compressed data
    if scans > MAX_JPEG_SCANS:
        message = f"The JPEG has {scans} scans; at most {MAX_JPEG_SCANS} are read."
        raise ImageDecodeFailed(message)


def _opaque(data: bytes, media_type: str) -> NDArray[np.uint8]:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
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
