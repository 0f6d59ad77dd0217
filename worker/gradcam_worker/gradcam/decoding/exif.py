"""The EXIF orientation of an image: the only reader of EXIF.

It follows the rule of browsers: only the tag Orientation of the first directory counts, and only if it is a
single SHORT from 1 to 8. Invalid EXIF, XMP and maker notes are ignored.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from gradcam_worker.gradcam.decoding.structure import Pixels

ORIENTATION, SHORT = 0x112, 3
ENTRY_BYTES = 12
UPRIGHT = 1
BYTE_ORDERS = {b"II*\0": "little", b"MM\0*": "big"}
TRANSFORMS: dict[int, Callable[[Any], Any]] = {  # orientation -> what makes the image upright
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


def orientation(exif: bytes) -> int:
    """Read the orientation from EXIF.

    Args:
        exif: The EXIF data, with or without the prefix `Exif` of JPEG.

    Returns:
        The orientation, from 1 to 8; 1 (upright) if there is no valid one.
    """
    body = exif.removeprefix(b"Exif\0\0")
    order: Any = BYTE_ORDERS.get(body[:4])
    if order is None:
        return UPRIGHT

    def number(offset: int, size: int) -> int:
        return int.from_bytes(body[offset : offset + size], order)

    directory = number(4, 4)
    for index in range(number(directory, 2)):
        entry = directory + 2 + ENTRY_BYTES * index
        if entry + ENTRY_BYTES > len(body):
            return UPRIGHT
        if number(entry, 2) == ORIENTATION:
            single = (number(entry + 2, 2), number(entry + 4, 4)) == (SHORT, 1)
            value = number(entry + 8, 2)
            return value if single and value in TRANSFORMS else UPRIGHT
    return UPRIGHT


def make_upright(pixels: Pixels, orientation: int) -> Pixels:
    """Rotate and flip an image as its EXIF orientation demands.

    Args:
        pixels: (height, width, channels), uint8, as stored.
        orientation: From 1 to 8.

    Returns:
        The upright image (height, width, channels), or (width, height, channels) if rotated by 90 degrees.
    """
    transform = TRANSFORMS.get(orientation)
    return np.asarray(transform(pixels), np.uint8) if transform else pixels
