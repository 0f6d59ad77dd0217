"""What the structure of a file gives away, before a decoder reads it and takes memory or time for it."""

import numpy as np

from worker.errors import ImageDecodeFailed

MARKER, START_OF_SCAN = 0xFF, 0xDA  # two bytes of a JPEG
MAX_JPEG_SCANS = 64  # progressive pictures have about ten; one with 302 scans takes 15 s to decode
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def check(media_type: str, data: bytes) -> None:
    """Raise ImageDecodeFailed for a file that is cut off, or lies, or would take very long."""
    if media_type == "image/png":
        _png_chunks(data)
    elif media_type == "image/jpeg":
        _jpeg_scans(data)
    elif media_type == "image/gif":
        _gif_blocks(data)


def is_webp(data: bytes) -> bool:
    """By its first bytes."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP claims; None for anything else, and where they cannot be told."""

    def number(start: int, size: int) -> int:
        return int.from_bytes(data[start : start + size], "little")

    kind = data[12:16] if is_webp(data) else b""
    if kind == b"VP8X":
        return number(24, 3) + 1, number(27, 3) + 1
    if kind == b"VP8L":
        return number(21, 4) % 2**14 + 1, (number(21, 4) >> 14) % 2**14 + 1
    if kind == b"VP8 ":
        return number(26, 2) % 2**14, number(28, 2) % 2**14
    return None


def _png_chunks(data: bytes) -> None:
    """Refuse a chunk that claims to run past the end: libpng would first allocate what it claims."""
    at = len(PNG_SIGNATURE)
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


def _gif_blocks(data: bytes) -> None:
    """Refuse a GIF that ends before its first frame does, of which Pillow says nothing."""
    at = 13 + _color_table(data[10:11])
    while at < len(data):
        kind = data[at : at + 1]
        # An extension is its label; a frame its place and size, its colours, and one byte more.
        at += 2 if kind == b"!" else 11 + _color_table(data[at + 9 : at + 10])
        while data[at : at + 1] not in {b"", b"\0"}:  # blocks of up to 255 bytes, the last one empty
            at += 1 + data[at]
        at += 1
        if kind != b"!" and at <= len(data):
            return
    message = f"The GIF is cut off: it ends before its first frame does ({len(data):,} bytes received)."
    raise ImageDecodeFailed(message)


def _color_table(flags: bytes) -> int:
    """How many bytes of colours follow, as the flags before them say."""
    return 3 * 2 ** (flags[0] % 8 + 1) if flags and flags[0] >> 7 else 0


def _jpeg_scans(data: bytes) -> None:
    """Refuse a JPEG of very many scans: each costs a pass over the whole picture, however few its bytes."""
    codes = np.frombuffer(data, np.uint8)
    starts = (codes[:-1] == MARKER) & (codes[1:] == START_OF_SCAN)  # cannot stand within compressed data
    scans = np.count_nonzero(starts)
    if scans > MAX_JPEG_SCANS:
        message = f"The JPEG has {scans} scans; at most {MAX_JPEG_SCANS} are read."
        raise ImageDecodeFailed(message)
