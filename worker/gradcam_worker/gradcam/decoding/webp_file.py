"""WebP files: their chunks, and the first frame of an animation (RFC 9649)."""

from collections.abc import Iterator
from dataclasses import replace

from gradcam_worker.errors import ImageDecodeFailed
from gradcam_worker.gradcam.decoding import exif, icc_profile
from gradcam_worker.gradcam.decoding.structure import (
    ICC,
    MAX_PARTS,
    WEBP,
    ColorTag,
    Damage,
    StoredImage,
    sent_as_text,
)

HEADER_BYTES = 12  # RIFF, a size, WEBP
FRAME_HEADER_BYTES = 16  # of ANMF, before its chunks
LOSSY, LOSSLESS = b"VP8 ", b"VP8L"
PIXEL_CHUNKS = {LOSSY, LOSSLESS}


def is_webp(data: bytes) -> bool:
    """Whether data begin as a WebP does."""
    return data[:4] == b"RIFF" and data[8:HEADER_BYTES] == b"WEBP"


def read(data: bytes) -> StoredImage:
    """Read the image of a WebP; of an animation, the first frame.

    Args:
        data: The file.

    Returns:
        The image, or the frame and its offset.

    Raises:
        ImageDecodeFailed: It is damaged or cut off.
    """
    canvas, orientation = (0, 0), 0
    frame: StoredImage | None = None
    offset: tuple[int, int] | None = None
    color: ColorTag | None = None
    for name, body, _ in _chunks(data, HEADER_BYTES):
        color = color or _profile(name, body)
        if name == b"VP8X" and len(body) >= 10:  # noqa: PLR2004  # flags, and two sides of 3 bytes
            canvas = _number(body, 4, 3) + 1, _number(body, 7, 3) + 1
        elif name == b"EXIF" and not orientation:
            orientation = exif.orientation(body)
        elif frame:
            continue
        elif name == b"ANMF":
            offset = 2 * _number(body, 0, 3), 2 * _number(body, 3, 3)
            frame = _read_frame(_chunks(body, FRAME_HEADER_BYTES))
        elif name in PIXEL_CHUNKS:
            frame = _read_frame(_chunks(data, HEADER_BYTES))
    if frame is None:
        message = f"The WebP's header is damaged or cut off ({len(data):,} bytes received)."
        raise ImageDecodeFailed(message)
    frame = replace(frame, orientation=orientation or exif.UPRIGHT, color=color)
    if offset is not None:
        return replace(frame, size=canvas, offset=offset, frame_size=frame.size)
    if canvas not in {(0, 0), frame.size}:
        message = (
            f"The WebP claims {canvas[0]} x {canvas[1]} pixels and holds {frame.size[0]} x {frame.size[1]}."
        )
        raise ImageDecodeFailed(message)
    return frame


def _profile(name: bytes, body: bytes) -> ColorTag | None:
    return ColorTag(ICC, body) if name == b"ICCP" and len(body) <= icc_profile.MAX_BYTES else None


def _number(data: bytes, position: int, size: int) -> int:
    return int.from_bytes(data[position : position + size], "little")


def _chunks(data: bytes, position: int) -> Iterator[tuple[bytes, bytes, int]]:
    """Each chunk's name and body, and the number of bytes that its body lacks."""
    for _ in range(MAX_PARTS):
        name, length = data[position : position + 4], _number(data, position + 4, 4)
        body = data[position + 8 : position + 8 + length]
        if len(name) < 4 or position + 8 > len(data):  # noqa: PLR2004  # bytes
            return
        yield name, body, length - len(body)
        position += 8 + length + length % 2
    message = f"The WebP has more than {MAX_PARTS:,} chunks."
    raise ImageDecodeFailed(message)


def _read_frame(chunks: Iterator[tuple[bytes, bytes, int]]) -> StoredImage:
    """Make a file of one frame from its chunks; bytes that are missing at its end become zeros."""
    alpha = b""
    for name, body, missing in chunks:
        if name == b"ALPH" and not alpha:
            alpha = body
        elif name in PIXEL_CHUNKS and missing <= len(
            body
        ):  # else most of it is missing, or its length is wrong
            if sent_as_text(body):  # which its decoder does not notice
                message = "The WebP was transferred as text: each line feed in it has become two bytes."
                raise ImageDecodeFailed(message)
            size = _size(name, body)
            head, translucent = b"", bool(_number(body, 4, 1) & 0x10)
            if name == LOSSY:
                translucent = bool(alpha)
                sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
                head = (
                    _make_chunk(b"VP8X", b"\x10\0\0\0" + sides) + _make_chunk(b"ALPH", alpha)
                    if translucent
                    else b""
                )
            rest = b"WEBP" + head + _make_chunk(name, body + bytes(missing))
            share = missing / (len(body) + missing)
            damage = Damage(share, "it ends too early") if missing else None
            whole = b"RIFF" + len(rest).to_bytes(4, "little") + rest
            return StoredImage(WEBP, size, whole, translucent=translucent, damage=damage)
    message = "The WebP is damaged or cut off: most of its pixels are missing."
    raise ImageDecodeFailed(message)


def _make_chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "little") + body + bytes(len(body) % 2)


def _size(name: bytes, body: bytes) -> tuple[int, int]:
    if name == LOSSLESS:
        sides = _number(body, 1, 4)
        return sides % 2**14 + 1, (sides >> 14) % 2**14 + 1
    return _number(body, 6, 2) % 2**14, _number(body, 8, 2) % 2**14
