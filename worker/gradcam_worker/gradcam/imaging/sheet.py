"""Pictures with titles: in rows on one white sheet, or each in a frame of its own.

The titles' letters are those that OpenCV 5 brings along, the same on every machine: Latin, Greek, Cyrillic,
Hebrew, Arabic, Chinese, Japanese and Korean. It writes `?` for a letter that it lacks, so a title in another
script still says which class it is by its number.
"""

from bisect import bisect
from collections.abc import Sequence
from unicodedata import normalize

import cv2
import numpy as np

from gradcam_worker.gradcam.imaging.overlay import Pixels, fit

Tile = tuple[str, Pixels]  # a title and its picture

COLUMNS = 3
AREA = 480 * 360  # pixels of a picture on a sheet
LONGEST = 720  # pixels of its longer side
SHORTEST = 416  # pixels of its shorter side, at most: the root of its area
NARROWEST = 240  # pixels: less leaves no room for a title
REGULAR = 400  # weight of the letters
KEPT = len("100.0 %")  # letters at the end of a title that are never cut


def in_rows(tiles: Sequence[Tile]) -> list[list[Tile]]:
    """Titled pictures, `COLUMNS` a row."""
    return [list(tiles[first : first + COLUMNS]) for first in range(0, len(tiles), COLUMNS)]


def as_tile(pixels: Pixels, area: int = AREA) -> Pixels:
    """A picture (height, width, 3) as large as it is shown on a sheet, in its own proportions.

    Large and tiny ones get the same area, long and narrow ones less.
    """
    height, width, _ = pixels.shape
    scale = min((area / (height * width)) ** 0.5, LONGEST / max(height, width))
    return fit(pixels, (max(round(height * scale), 1), max(round(width * scale), 1)))


def sheet(rows: Sequence[Sequence[Tile]]) -> Pixels:
    """Rows of titled pictures, of any sizes -> one white sheet (height, width, 3).

    All columns are as wide as the widest picture, a row as high as its highest.
    """
    width = max(NARROWEST, *(picture.shape[1] for row in rows for _, picture in row))
    size = letters(width)
    gap = size
    heights = [max(picture.shape[0] for _, picture in row) + bar(size) + gap for row in rows]
    drawn = _white(sum(heights) + gap, max(map(len, rows)) * (width + gap) + gap)
    top = gap // 2
    for row, height in zip(rows, heights, strict=True):
        for column, (title, picture) in enumerate(row):
            left = gap + column * (width + gap)
            _put(drawn, picture, top + bar(size), left)
            _write(drawn, title, top, left, width, size)
        top += height
    return drawn


def framed(title: str, picture: Pixels) -> Pixels:
    """A picture (height, width, 3) below its title; at least `NARROWEST` wide."""
    width = max(picture.shape[1], NARROWEST)
    size = letters(width)
    margin = size // 2
    drawn = _white(bar(size) + picture.shape[0], width)
    _put(drawn, picture, bar(size), (width - picture.shape[1]) // 2)
    _write(drawn, title, 0, margin, width - 2 * margin, size)
    return drawn


def letters(width: int) -> int:
    """How high letters are above a picture that is so wide, in pixels."""
    return max(width // 22, 14)


def bar(size: int) -> int:
    """How high the line of a title is, in pixels."""
    return 2 * size


def _white(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), 255, np.uint8)


def _put(drawn: Pixels, picture: Pixels, top: int, left: int) -> None:
    drawn[top : top + picture.shape[0], left : left + picture.shape[1]] = picture


def _write(drawn: Pixels, title: str, top: int, left: int, width: int, size: int) -> None:
    """Write a title in black, in the middle of its line."""
    text = shortened(title, width, size)
    baseline = (left, top + (bar(size) + size * 7 // 10) // 2)  # capitals are 0.7 of `size` high
    cv2.putText(drawn, text, baseline, (0, 0, 0), _font(), size, REGULAR)


def shortened(title: str, width: int, size: int) -> str:
    """A title in one line of at most `width` pixels, in letters of `size`.

    What is too much is taken out of the middle, so that a class keeps its number and its probability.
    Line breaks and what else cannot be printed become spaces; half a surrogate pair would end the process.
    """
    printable = (letter if letter.isprintable() else " " for letter in normalize("NFC", title))
    text = " ".join("".join(printable).split())
    if _width(text, size) <= width:
        return text
    head, tail = text[:-KEPT], text[-KEPT:]
    tail = f"… {tail.lstrip()}"
    fitting = bisect(range(1, len(head)), width, key=lambda count: _width(head[:count] + tail, size))
    return head[:fitting].rstrip() + tail


def _width(text: str, size: int) -> int:
    left, _, width, _ = cv2.getTextSize((0, 0), text, (0, 0), _font(), size, REGULAR)
    return int(left + width)


def _font() -> cv2.FontFace:
    return cv2.FontFace("sans")
