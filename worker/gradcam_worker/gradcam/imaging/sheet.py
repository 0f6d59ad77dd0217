"""Images with titles: in rows on one white sheet, or one by one.

The font is part of OpenCV 5, so it is the same on every machine. It has Latin, Greek, Cyrillic, Hebrew,
Arabic, Chinese, Japanese and Korean characters. OpenCV draws `?` for any other; the number in the title still
identifies the class.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from unicodedata import normalize

import cv2
import numpy as np

from gradcam_worker.gradcam.imaging.resize import Pixels, fit

Tile = tuple[str, Pixels]  # title and image

COLUMNS = 3
TILE_AREA = 480 * 360  # in pixels
MAX_TILE_SIDE = 720  # in pixels
MAX_TILE_SHORT_SIDE = 416  # in pixels: the root of the area
MIN_WIDTH = 240  # in pixels: less leaves no room for a title
SEPARATOR = "  ·  "  # between parts on a line
FONT_WEIGHT = 400  # regular
KEPT_CHARACTERS = len("100.0 %")  # at the end of a title, which are never cut


def arrange_in_rows(tiles: Sequence[Tile]) -> list[list[Tile]]:
    """Arrange tiles in rows of `COLUMNS`."""
    return [list(tiles[first : first + COLUMNS]) for first in range(0, len(tiles), COLUMNS)]


def as_tile(pixels: Pixels, area: int = TILE_AREA) -> Pixels:
    """Resize an image in proportion to its size on a sheet.

    Args:
        pixels: (height, width, 3), uint8.
        area: In pixels; a long and narrow image gets less.

    Returns:
        The resized image, uint8.
    """
    height, width, _ = pixels.shape
    scale = min((area / (height * width)) ** 0.5, MAX_TILE_SIDE / max(height, width))
    return fit(pixels, (max(round(height * scale), 1), max(round(width * scale), 1)))


def sheet(rows: Sequence[Sequence[Tile]]) -> Pixels:
    """Draw rows of tiles on a white sheet.

    All columns are as wide as the widest image; a row is as high as its highest one.

    Args:
        rows: Titles and images (height, width, 3), uint8, of any size.

    Returns:
        The sheet (height, width, 3), uint8.
    """
    width = max(MIN_WIDTH, *(image.shape[1] for row in rows for _, image in row))
    letter_size = letter_height(width)
    gap = letter_size
    heights = [max(image.shape[0] for _, image in row) + title_height(letter_size) + gap for row in rows]
    canvas = _white(sum(heights) + gap, max(map(len, rows)) * (width + gap) + gap)
    top = gap // 2
    for row, height in zip(rows, heights, strict=True):
        for column, (title, image) in enumerate(row):
            left = gap + column * (width + gap)
            _paste(canvas, image, top + title_height(letter_size), left)
            _write(canvas, title, top, left, width, letter_size)
        top += height
    return canvas


@dataclass(frozen=True)
class Legend:
    """What the colours of a sheet mean.

    Attributes:
        table: The RGB colours of the colour map, (256, 1, 3), uint8.
        alpha: The share of the colours on the photos, from 0 to 1.
        ends: What the first and the last colour stand for.
        note: What to mind, in the size of the titles; may be empty.
        facts: Further texts, smaller, as many on a line as there is room for.
    """

    table: Pixels
    alpha: float
    ends: tuple[str, str]
    note: str
    facts: Sequence[str]


def with_legend(drawn: Pixels, legend: Legend, letter_size: int) -> Pixels:
    """Draw a legend below a sheet.

    The colours are shown as they look on the photos: over white at the top to black at the bottom.

    Args:
        drawn: The sheet (height, width, 3), uint8.
        legend: What its colours mean.
        letter_size: Height of the letters of the titles, in pixels.

    Returns:
        The sheet with the legend, (height, width, 3), uint8.
    """
    height, width, _ = drawn.shape
    gap, small = letter_size, letter_size * 4 // 5
    room = width - 2 * gap
    lines = [(text, letter_size) for text in _fill_lines(legend.note.split(), " ", room, letter_size)]
    lines += [(text, small) for text in _fill_lines(legend.facts, SEPARATOR, room, small)]
    heights = [title_height(size) * 3 // 4 for size in (small, *(size for _, size in lines))]
    canvas = _white(height + gap + sum(heights) + gap // 2, width)
    _paste(canvas, drawn, 0, 0)
    row = legend.table[np.linspace(0, len(legend.table) - 1, room).round().astype(int), 0].astype(np.float32)
    ground = np.linspace(255, 0, gap, dtype=np.float32)[:, np.newaxis, np.newaxis]
    colors = legend.alpha * row + (1 - legend.alpha) * ground
    _paste(canvas, np.rint(colors).astype(np.uint8), height, gap)
    top, (first, last) = height + gap, legend.ends
    last = shorten(last, room * 2 // 3, small)
    _write(canvas, first, top, gap, room // 3, small, heights[0])
    _write(canvas, last, top, width - gap - _width(last, small), room, small, heights[0])
    for (text, size), above, line in zip(lines, accumulate(heights), heights[1:], strict=False):
        _write(canvas, text, top + above, gap, room, size, line)
    return canvas


def _fill_lines(parts: Sequence[str], separator: str, width: int, letter_size: int) -> list[str]:
    """Join parts to lines that are not wider than `width`, unless a single part is."""
    lines = list(parts[:1])
    for part in parts[1:]:
        joined = f"{lines[-1]}{separator}{part}"
        if _width(joined, letter_size) <= width:
            lines[-1] = joined
        else:
            lines.append(part)
    return lines


def with_title(title: str, image: Pixels) -> Pixels:
    """Draw an image below its title.

    Args:
        title: Its title, which is shortened to one line.
        image: (height, width, 3), uint8.

    Returns:
        (height, width, 3), uint8, at least `MIN_WIDTH` wide.
    """
    width = max(image.shape[1], MIN_WIDTH)
    letter_size = letter_height(width)
    margin = letter_size // 2
    canvas = _white(title_height(letter_size) + image.shape[0], width)
    _paste(canvas, image, title_height(letter_size), (width - image.shape[1]) // 2)
    _write(canvas, title, 0, margin, width - 2 * margin, letter_size)
    return canvas


def letter_height(width: int) -> int:
    """The height in pixels of the letters of a title above an image of this width."""
    return max(width // 22, 14)


def title_height(letter_size: int) -> int:
    """The height in pixels of the line of a title with letters of this height."""
    return 2 * letter_size


def _white(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), 255, np.uint8)


def _paste(canvas: Pixels, image: Pixels, top: int, left: int) -> None:
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image


def _write(
    canvas: Pixels, title: str, top: int, left: int, width: int, letter_size: int, line_height: int = 0
) -> None:
    """Write a title in black, centred vertically in its line of `title_height`, or of a height of its own."""
    text = shorten(title, width, letter_size)
    line = line_height or title_height(letter_size)
    baseline = top + (line + letter_size * 7 // 10) // 2  # capitals are 0.7 as high
    cv2.putText(canvas, text, (left, baseline), (0, 0, 0), _font(), letter_size, FONT_WEIGHT)


def shorten(title: str, width: int, letter_size: int) -> str:
    """Shorten a title to one line.

    It is cut in the middle, so that it keeps the number and the probability of a class. Line breaks and other
    characters that cannot be printed become spaces; half a surrogate pair would crash OpenCV.

    Args:
        title: Any text.
        width: Of the line, in pixels.
        letter_size: Height of the letters, in pixels.

    Returns:
        The title, or its beginning, an ellipsis and its end.
    """
    printable = (character if character.isprintable() else " " for character in normalize("NFC", title))
    text = " ".join("".join(printable).split())
    if _width(text, letter_size) <= width:
        return text
    head, tail = text[:-KEPT_CHARACTERS], text[-KEPT_CHARACTERS:]
    tail = f"… {tail.lstrip()}"
    kept = bisect(range(1, len(head)), width, key=lambda count: _width(head[:count] + tail, letter_size))
    return head[:kept].rstrip() + tail


def _width(text: str, letter_size: int) -> int:
    left, _, width, _ = cv2.getTextSize((0, 0), text, (0, 0), _font(), letter_size, FONT_WEIGHT)
    return int(left + width)


def _font() -> cv2.FontFace:
    return cv2.FontFace("sans")
