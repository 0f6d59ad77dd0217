"""How a picture is to be turned: the only reader of EXIF.

The rule is that of browsers. The tag Orientation of the first directory counts, a single SHORT from 1 to 8;
anything else, EXIF that is none, and what XMP or a maker's note say, turns nothing.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

ORIENTATION, SHORT = 0x112, 3
ENTRY = 12  # bytes
UPRIGHT = 1
ORDERS = {b"II*\0": "little", b"MM\0*": "big"}
TURNS: dict[int, Callable[[Any], Any]] = {  # orientation -> what sets the picture upright
    2: lambda stored: cv2.flip(stored, 1),
    3: lambda stored: cv2.rotate(stored, cv2.ROTATE_180),
    4: lambda stored: cv2.flip(stored, 0),
    5: cv2.transpose,
    6: lambda stored: cv2.rotate(stored, cv2.ROTATE_90_CLOCKWISE),
    7: lambda stored: cv2.rotate(cv2.transpose(stored), cv2.ROTATE_180),
    8: lambda stored: cv2.rotate(stored, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


def orientation(exif: bytes) -> int:
    """The orientation, from 1 to 8, that EXIF names; 1 where it names none."""
    body = exif.removeprefix(b"Exif\0\0")
    order: Any = ORDERS.get(body[:4])
    if order is None:
        return UPRIGHT

    def number(at: int, size: int) -> int:
        return int.from_bytes(body[at : at + size], order)

    directory = number(4, 4)
    for index in range(number(directory, 2)):
        entry = directory + 2 + ENTRY * index
        if entry + ENTRY > len(body):
            return UPRIGHT
        if number(entry, 2) == ORIENTATION:
            single = (number(entry + 2, 2), number(entry + 4, 4)) == (SHORT, 1)
            value = number(entry + 8, 2)
            return value if single and value in TURNS else UPRIGHT
    return UPRIGHT


def upright(stored: Pixels, orientation: int) -> Pixels:
    """Pixels (height, width, channels), turned as EXIF says."""
    turn = TURNS.get(orientation)
    return np.asarray(turn(stored), np.uint8) if turn else stored
