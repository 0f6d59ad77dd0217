"""BMP files: checks of the header, and a decoder for those whose channels are given by bit masks."""

from dataclasses import replace

import numpy as np

from gradcam_worker.errors import ImageDecodeFailed, UnsupportedMediaType
from gradcam_worker.gradcam.decoding import icc_profile
from gradcam_worker.gradcam.decoding.structure import BMP, ICC, ColorTag, Damage, Pixels, StoredImage

SIGNATURE = b"BM"
FILE_HEADER_BYTES, CORE_HEADER_BYTES, INFO_HEADER_BYTES, ALPHA_HEADER_BYTES = 14, 12, 40, 56
UNCOMPRESSED, MASK_COMPRESSIONS = 0, {3, 6}  # compression codes
RUN_LENGTH_BITS = {1: 8, 2: 4}  # run-length compression -> bits of a pixel
PIXEL_BITS = {1, 4, 8, 16, 24, 32}  # that are supported
STRIP_ROWS = 256  # decoded at a time
PROFILE_HEADER_BYTES, COLORS_OFFSET, EMBEDDED = 124, 70, b"DEBM"  # the kind of the colours: MBED, reversed
PROFILE_OFFSET, PROFILE_SIZE = 126, 130  # where the position of the profile, and its size, stand
MASKS_OFFSET, ALPHA_CHANNEL = 54, 3  # offset of the masks in the file; index of the mask of alpha


def read(data: bytes) -> StoredImage:
    """Read the header of a BMP.

    Args:
        data: The file.

    Returns:
        The image; its damage tells the share of the pixels that is missing at the end.

    Raises:
        ImageDecodeFailed: The header is damaged or cut off.
        UnsupportedMediaType: Its depth or compression is not supported.
    """
    has_core_header = _number(data, 14) == CORE_HEADER_BYTES
    if len(data) < FILE_HEADER_BYTES + (
        CORE_HEADER_BYTES if has_core_header else INFO_HEADER_BYTES
    ) or _number(data, 14) not in range(12, 125):
        message = f"The BMP's header is damaged or cut off ({len(data):,} bytes received)."
        raise ImageDecodeFailed(message)
    width, height = _signed_number(data, 18), _signed_number(data, 22)
    if has_core_header:
        width, height = _number(data, 18, 2), _number(data, 20, 2)
    bits = _number(data, 24 if has_core_header else 28, 2)
    compression = UNCOMPRESSED if has_core_header else _number(data, 30)
    if bits not in PIXEL_BITS or (
        compression and compression not in MASK_COMPRESSIONS and RUN_LENGTH_BITS.get(compression) != bits
    ):
        kind = f"{bits} bits per pixel" + (f" and compression {compression}" if compression else "")
        supported = ", ".join(str(depth) for depth in sorted(PIXEL_BITS))
        message = (
            f"Received a BMP of {kind}, which is not read here: those of {supported} bits per pixel are."
        )
        raise UnsupportedMediaType(message)
    translucent = compression in MASK_COMPRESSIONS and bool(_mask(data, ALPHA_CHANNEL))
    stored = StoredImage(
        BMP, (abs(width), abs(height)), data, translucent=translucent, color=_read_profile(data)
    )
    if compression in RUN_LENGTH_BITS:
        return stored
    needed = _row_bytes(bits, abs(width)) * abs(height)
    available = max(len(data) - _number(data, 10), 0)
    if available >= needed:
        return stored
    return replace(stored, damage=Damage(1 - available / needed, "it ends too early"))


def _read_profile(data: bytes) -> ColorTag | None:
    """The profile that the longest header can point to."""
    if _number(data, 14) < PROFILE_HEADER_BYTES or data[COLORS_OFFSET : COLORS_OFFSET + 4] != EMBEDDED:
        return None
    start, size = FILE_HEADER_BYTES + _number(data, PROFILE_OFFSET), _number(data, PROFILE_SIZE)
    return ColorTag(ICC, data[start : start + size]) if size <= icc_profile.MAX_BYTES else None


def fill_with_zeros(stored: StoredImage) -> StoredImage:
    """Append zeros to a file that ends too early."""
    width, height = stored.size
    has_core_header = _number(stored.data, 14) == CORE_HEADER_BYTES
    bits = _number(stored.data, 24 if has_core_header else 28, 2)
    needed = _number(stored.data, 10) + _row_bytes(bits, width) * height
    return replace(stored, data=stored.data + bytes(max(needed - len(stored.data), 0)))


def has_masks(stored: StoredImage) -> bool:
    """Whether bit masks give the position of each channel."""
    return _number(stored.data, 14) > CORE_HEADER_BYTES and _number(stored.data, 30) in MASK_COMPRESSIONS


def decode_masked(stored: StoredImage) -> Pixels:
    """Decode a BMP whose channels are given by bit masks.

    Args:
        stored: The image; `has_masks` is true of it.

    Returns:
        Pixels (height, width, 3), uint8, RGB; with alpha (height, width, 4), BGRA.

    Raises:
        ImageDecodeFailed: It is damaged.
    """
    data, (width, height), bits = stored.data, stored.size, _number(stored.data, 28, 2)
    row_bytes = _row_bytes(bits, width)
    if bits not in {16, 32} or len(data) < _number(data, 10) + row_bytes * height:
        message = f"The BMP is damaged: it has masks for {bits} bits per pixel."
        raise ImageDecodeFailed(message)
    rows = np.frombuffer(data, np.uint8, row_bytes * height, _number(data, 10)).reshape(height, row_bytes)
    values = rows.view(np.dtype(f"<u{bits // 8}"))[:, :width]
    order = (2, 1, 0, ALPHA_CHANNEL) if stored.translucent else (0, 1, 2)
    pixels = np.empty((height, width, len(order)), np.uint8)
    for channel, mask_index in enumerate(order):
        mask = _mask(data, mask_index)
        lowest = max(mask & -mask, 1)
        scale = np.float32(255 / max(mask // lowest, 1))
        for top in range(0, height, STRIP_ROWS):
            strip = slice(top, top + STRIP_ROWS)
            pixels[strip, :, channel] = (values[strip] & mask) // lowest * scale + np.float32(0.5)
    if stored.translucent and not pixels[..., ALPHA_CHANNEL].any():
        pixels[..., ALPHA_CHANNEL] = 255  # an invisible image is never intended
    return pixels if _signed_number(data, 22) < 0 else pixels[::-1]


def _mask(data: bytes, channel: int) -> int:
    """The mask of red, green, blue or alpha; the shortest header has none for alpha."""
    exists = channel != ALPHA_CHANNEL or _number(data, 14) >= ALPHA_HEADER_BYTES
    return _number(data, MASKS_OFFSET + 4 * channel) if exists else 0


def _number(data: bytes, offset: int, size: int = 4) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def _signed_number(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little", signed=True)


def _row_bytes(bits: int, width: int) -> int:
    """The size of a row, padded to 4 bytes."""
    return (bits * width + 31) // 32 * 4
