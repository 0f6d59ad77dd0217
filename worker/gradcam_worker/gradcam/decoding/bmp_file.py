"""BMP files: which of them are read here, and those whose channels are where masks say."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import ImageDecodeFailed, UnsupportedMediaType
from gradcam_worker.gradcam.decoding.structure import BMP, Damage, Stored

Pixels = NDArray[np.uint8]

SIGNATURE = b"BM"
FILE_HEAD, CORE_HEAD, INFO_HEAD, ALPHA_HEAD = 14, 12, 40, 56  # bytes
PLAIN, MASKED = 0, {3, 6}  # compressions
PACKED = {1: 8, 2: 4}  # compressions by run length, and the bits of a pixel in each
BITS = {1, 4, 8, 16, 24, 32}  # of a pixel
ROWS = 256  # that are looked at at once
MASKS, ALPHA = 54, 3  # byte at which the masks stand; which of them is that of alpha


def read(data: bytes) -> Stored:
    """Its picture. What is missing at its end becomes zeros.

    Raises ImageDecodeFailed, and UnsupportedMediaType for forms that nothing here reads.
    """
    core = _number(data, 14) == CORE_HEAD
    if len(data) < FILE_HEAD + (CORE_HEAD if core else INFO_HEAD) or _number(data, 14) not in range(12, 125):
        message = f"The BMP's header is damaged or cut off ({len(data):,} bytes received)."
        raise ImageDecodeFailed(message)
    width, height = _side(data, 18), _side(data, 22)
    if core:
        width, height = _number(data, 18, 2), _number(data, 20, 2)
    bits = _number(data, 24 if core else 28, 2)
    packing = PLAIN if core else _number(data, 30)
    if bits not in BITS or (packing and packing not in MASKED and PACKED.get(packing) != bits):
        kind = f"{bits} bits per pixel" + (f" and compression {packing}" if packing else "")
        right = ", ".join(str(each) for each in sorted(BITS))
        message = f"Received a BMP of {kind}, which is not read here: those of {right} bits per pixel are."
        raise UnsupportedMediaType(message)
    clear = packing in MASKED and bool(_mask(data, ALPHA))
    stored = Stored(BMP, (abs(width), abs(height)), data, translucent=clear)
    if packing in PACKED:
        return stored
    needed = _stride(bits, abs(width)) * abs(height)
    there = max(len(data) - _number(data, 10), 0)
    if there >= needed:
        return stored
    return replace(stored, damage=Damage(1 - there / needed, "it ends too early"))


def mended(stored: Stored) -> Stored:
    """A picture with zeros where it ends too early."""
    width, height = stored.size
    core = _number(stored.data, 14) == CORE_HEAD
    bits = _number(stored.data, 24 if core else 28, 2)
    needed = _number(stored.data, 10) + _stride(bits, width) * height
    return replace(stored, data=stored.data + bytes(max(needed - len(stored.data), 0)))


def has_masks(stored: Stored) -> bool:
    """Whether its channels are where masks say."""
    return _number(stored.data, 14) > CORE_HEAD and _number(stored.data, 30) in MASKED


def by_masks(stored: Stored) -> Pixels:
    """The pixels of a BMP with masks: (height, width, 3) RGB; with alpha (height, width, 4) BGRA."""
    data, (width, height), bits = stored.data, stored.size, _number(stored.data, 28, 2)
    stride = _stride(bits, width)
    if bits not in {16, 32} or len(data) < _number(data, 10) + stride * height:
        message = f"The BMP is damaged: it has masks for {bits} bits per pixel."
        raise ImageDecodeFailed(message)
    rows = np.frombuffer(data, np.uint8, stride * height, _number(data, 10)).reshape(height, stride)
    values = rows.view(np.dtype(f"<u{bits // 8}"))[:, :width]
    order = (2, 1, 0, ALPHA) if stored.translucent else (0, 1, 2)
    pixels = np.empty((height, width, len(order)), np.uint8)
    for channel, which in enumerate(order):
        mask = _mask(data, which)
        lowest = max(mask & -mask, 1)
        scale = np.float32(255 / max(mask // lowest, 1))
        for top in range(0, height, ROWS):
            part = slice(top, top + ROWS)
            pixels[part, :, channel] = (values[part] & mask) // lowest * scale + np.float32(0.5)
    if stored.translucent and not pixels[..., ALPHA].any():
        pixels[..., ALPHA] = 255  # nobody means a picture that cannot be seen
    return pixels if _side(data, 22) < 0 else pixels[::-1]


def _mask(data: bytes, channel: int) -> int:
    """The mask of red, green, blue or alpha; the shortest header has none for the last."""
    has = channel != ALPHA or _number(data, 14) >= ALPHA_HEAD
    return _number(data, MASKS + 4 * channel) if has else 0


def _number(data: bytes, at: int, size: int = 4) -> int:
    return int.from_bytes(data[at : at + size], "little")


def _side(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little", signed=True)


def _stride(bits: int, width: int) -> int:
    """Bytes of a row."""
    return (bits * width + 31) // 32 * 4
