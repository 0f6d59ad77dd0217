"""GIF files: the first frame, by itself (GIF89a, and what browsers make of files that depart from it)."""

from gradcam_worker.errors import ImageDecodeFailed
from gradcam_worker.gradcam.decoding.structure import GIF, Stored

SIGNATURES = (b"GIF87a", b"GIF89a")
HEAD = 13  # bytes: signature, size, flags, background, aspect
FRAME_HEAD = 10  # bytes of a frame before its colours
EXTENSION, CONTROL = b"!", 0xF9


def read(data: bytes) -> Stored:
    """Its first frame, in its place. Raises ImageDecodeFailed where the file ends before that frame does."""
    at = HEAD + _table_bytes(data[10:11])
    head, control = bytearray(data[:at]), b""
    while at < len(data):
        begun, kind = at, data[at : at + 1]
        # An extension is its label; a frame its place and size, its colours, and one byte more.
        at += 2 if kind == EXTENSION else FRAME_HEAD + 1 + _table_bytes(data[at + 9 : at + 10])
        while data[at : at + 1] not in {b"", b"\0"}:  # blocks of up to 255 bytes, the last one empty
            at += 1 + data[at]
        at += 1
        if kind == EXTENSION and data[begun + 1 : begun + 2] == bytes([CONTROL]):
            control = data[begun:at]
        if kind != EXTENSION and at <= len(data):
            left, top, width, height = (
                int.from_bytes(data[begun + side : begun + side + 2], "little") for side in (1, 3, 5, 7)
            )
            screen = (int.from_bytes(head[side : side + 2], "little") for side in (6, 8))
            size = (
                max(next(screen), left + width),
                max(next(screen), top + height),
            )  # it grows, as in browsers
            head[6:10] = data[begun + 5 : begun + 9]
            frame = data[begun : begun + 1] + bytes(4) + data[begun + 5 : at]
            alone = bytes(head) + control + frame + b";"
            return Stored(GIF, size, alone, place=(left, top), frame=(width, height))
    message = f"The GIF is cut off: it ends before its first frame does ({len(data):,} bytes received)."
    raise ImageDecodeFailed(message)


def _table_bytes(flags: bytes) -> int:
    """How many bytes of colours follow, as the flags before them say."""
    return 3 * 2 ** (flags[0] % 8 + 1) if flags and flags[0] >> 7 else 0
