"""GIF files: the first frame alone (GIF89a; files that violate it are read as browsers read them)."""

from gradcam_worker.errors import ImageDecodeFailed
from gradcam_worker.gradcam.decoding.structure import GIF, StoredImage

SIGNATURES = (b"GIF87a", b"GIF89a")
HEADER_BYTES = 13  # signature, size, flags, background, aspect
FRAME_HEADER_BYTES = 10  # of a frame, before its colour table
EXTENSION, GRAPHIC_CONTROL = b"!", 0xF9


def read(data: bytes) -> StoredImage:
    """Read the first frame of a GIF.

    Args:
        data: The file.

    Returns:
        The frame and its offset. As in browsers, the canvas grows where the frame exceeds it.

    Raises:
        ImageDecodeFailed: The file ends before its first frame does.
    """
    position = HEADER_BYTES + _color_table_bytes(data[10:11])
    header, control = bytearray(data[:position]), b""
    while position < len(data):
        start, kind = position, data[position : position + 1]
        # An extension begins with its label; a frame with its offset, size, colour table and one more byte.
        position += (
            2
            if kind == EXTENSION
            else FRAME_HEADER_BYTES + 1 + _color_table_bytes(data[position + 9 : position + 10])
        )
        while data[position : position + 1] not in {
            b"",
            b"\0",
        }:  # blocks of up to 255 bytes, the last one empty
            position += 1 + data[position]
        position += 1
        if kind == EXTENSION and data[start + 1 : start + 2] == bytes([GRAPHIC_CONTROL]):
            control = data[start:position]
        if kind != EXTENSION and position <= len(data):
            left, top, width, height = (_number(data, start + field) for field in (1, 3, 5, 7))
            size = max(_number(header, 6), left + width), max(_number(header, 8), top + height)
            header[6:10] = data[start + 5 : start + 9]
            frame = data[start : start + 1] + bytes(4) + data[start + 5 : position]
            single_frame = bytes(header) + control + frame + b";"
            return StoredImage(GIF, size, single_frame, offset=(left, top), frame_size=(width, height))
    message = f"The GIF is cut off: it ends before its first frame does ({len(data):,} bytes received)."
    raise ImageDecodeFailed(message)


def _number(data: bytes | bytearray, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")


def _color_table_bytes(flags: bytes) -> int:
    """The size of the colour table that these flags announce."""
    return 3 * 2 ** (flags[0] % 8 + 1) if flags and flags[0] >> 7 else 0
