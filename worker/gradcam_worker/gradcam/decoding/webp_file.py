"""WebP files: their chunks, and the first frame of an animation (RFC 9649)."""

from collections.abc import Iterator
from dataclasses import replace

from gradcam_worker.errors import ImageDecodeFailed
from gradcam_worker.gradcam.decoding import exif
from gradcam_worker.gradcam.decoding.structure import MAX_PARTS, WEBP, Damage, Stored, sent_as_text

HEAD = 12  # bytes: RIFF, a size, WEBP
FRAME_HEAD = 16  # bytes of ANMF before its chunks
LOSSY, LOSSLESS = b"VP8 ", b"VP8L"
PIXELS = {LOSSY, LOSSLESS}


def is_webp(data: bytes) -> bool:
    """By its first bytes."""
    return data[:4] == b"RIFF" and data[8:HEAD] == b"WEBP"


def read(data: bytes) -> Stored:
    """Its picture; of an animation, the first frame in its place. Raises ImageDecodeFailed."""
    canvas, turn = (0, 0), 0
    still: Stored | None = None
    place: tuple[int, int] | None = None
    for name, body, _ in _chunks(data, HEAD):
        if name == b"VP8X" and len(body) >= 10:  # noqa: PLR2004  # flags, and two sides of 3 bytes
            canvas = _number(body, 4, 3) + 1, _number(body, 7, 3) + 1
        elif name == b"EXIF" and not turn:
            turn = exif.orientation(body)
        elif still:
            continue
        elif name == b"ANMF":
            place = 2 * _number(body, 0, 3), 2 * _number(body, 3, 3)
            still = _still(_chunks(body, FRAME_HEAD))
        elif name in PIXELS:
            still = _still(_chunks(data, HEAD))
    if still is None:
        message = f"The WebP's header is damaged or cut off ({len(data):,} bytes received)."
        raise ImageDecodeFailed(message)
    still = replace(still, orientation=turn or exif.UPRIGHT)
    if place is not None:
        return replace(still, size=canvas, place=place, frame=still.size)
    if canvas not in {(0, 0), still.size}:
        message = (
            f"The WebP claims {canvas[0]} x {canvas[1]} pixels and holds {still.size[0]} x {still.size[1]}."
        )
        raise ImageDecodeFailed(message)
    return still


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _chunks(data: bytes, at: int) -> Iterator[tuple[bytes, bytes, int]]:
    """Each chunk's name and body, and how many bytes of its body are not there."""
    for _ in range(MAX_PARTS):
        name, length = data[at : at + 4], _number(data, at + 4, 4)
        body = data[at + 8 : at + 8 + length]
        if len(name) < 4 or at + 8 > len(data):  # noqa: PLR2004  # bytes
            return
        yield name, body, length - len(body)
        at += 8 + length + length % 2
    message = f"The WebP has more than {MAX_PARTS:,} chunks."
    raise ImageDecodeFailed(message)


def _still(chunks: Iterator[tuple[bytes, bytes, int]]) -> Stored:
    """A file of one frame's chunks alone; bytes that are missing at its end become zeros."""
    alpha = b""
    for name, body, missing in chunks:
        if name == b"ALPH" and not alpha:
            alpha = body
        elif name in PIXELS and missing <= len(body):  # else most of it is missing, or it lies
            if sent_as_text(body):  # of which its decoder can tell nothing, and shows something
                message = "The WebP was transferred as text: each line feed in it has become two bytes."
                raise ImageDecodeFailed(message)
            size = _size(name, body)
            head, clear = b"", bool(_number(body, 4, 1) & 0x10)
            if name == LOSSY:
                clear = bool(alpha)
                sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
                head = _chunk(b"VP8X", b"\x10\0\0\0" + sides) + _chunk(b"ALPH", alpha) if clear else b""
            rest = b"WEBP" + head + _chunk(name, body + bytes(missing))
            share = missing / (len(body) + missing)
            damage = Damage(share, "it ends too early") if missing else None
            whole = b"RIFF" + len(rest).to_bytes(4, "little") + rest
            return Stored(WEBP, size, whole, translucent=clear, damage=damage)
    message = "The WebP is damaged or cut off: most of its pixels are not there."
    raise ImageDecodeFailed(message)


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "little") + body + bytes(len(body) % 2)


def _size(name: bytes, body: bytes) -> tuple[int, int]:
    if name == LOSSLESS:
        sides = _number(body, 1, 4)
        return sides % 2**14 + 1, (sides >> 14) % 2**14 + 1
    return _number(body, 6, 2) % 2**14, _number(body, 8, 2) % 2**14
