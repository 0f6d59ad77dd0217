"""Changes of size: of an image to that of a network or an edge, of a heatmap to that of an image."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.sizing import Placement, Size, Span, spans

Pixels = NDArray[np.uint8]
Heatmap = NDArray[np.float32]

COLOR_RANK = 3  # (height, width, channels)
HALVING_MARGIN = 4  # an image is halved while half of it is at least 4 times the target size
MAX_OPENCV_CHANNELS = 4  # that OpenCV can shrink by area


def fit(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize an image to the input size of a network, without keeping its proportions.

    It is shrunk by area interpolation, without aliasing, or enlarged bilinearly. A much larger image is
    halved first, which is at least twice as fast; its levels then differ by a few of 255 from the exact means
    of the areas.

    Args:
        pixels: (height, width, channels), uint8.
        size: (height, width) in pixels.

    Returns:
        A new array (*size, channels), uint8.
    """
    height, width, channels = pixels.shape
    can_halve = channels <= MAX_OPENCV_CHANNELS
    while (
        can_halve
        and min(height // size[0], width // size[1]) >= 2 * HALVING_MARGIN
        and height % 2 == width % 2 == 0
    ):
        height, width = height // 2, width // 2
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        pixels = pixels.reshape(height, width, channels)
    return np.array(_resize(pixels, size), np.uint8)


def shrink_to_edge(pixels: Pixels, max_edge: int | None) -> Pixels:
    """Shrink an image in proportion, so that its longer side has at most `max_edge` pixels.

    Args:
        pixels: (height, width, 3), uint8.
        max_edge: In pixels; None: any.

    Returns:
        The image itself, if it is small enough, or a smaller one.
    """
    height, width, _ = pixels.shape
    scale = min((max_edge or max(height, width)) / max(height, width), 1)
    if scale == 1:
        return pixels
    return fit(pixels, (max(round(height * scale), 1), max(round(width * scale), 1)))


def enlarge(heatmap: Heatmap, size: tuple[int, int]) -> Heatmap:
    """Enlarge a heatmap bilinearly, with half-pixel centres; its peak keeps its value.

    Args:
        heatmap: (rows, columns), float32.
        size: (height, width).

    Returns:
        (height, width), float32.
    """
    large, factor = enlarge_unscaled(heatmap, size)
    return np.asarray(large * factor, np.float32)


def enlarge_unscaled(
    heatmap: Heatmap, size: tuple[int, int], out: Heatmap | None = None
) -> tuple[Heatmap, np.float32]:
    """Enlarge a heatmap. Returns it with the factor that restores the value of its peak."""
    large = np.asarray(_resize(heatmap, size, out), np.float32)
    peak = large.max()
    return large, heatmap.max() / peak if peak > 0 else np.float32(1)


def enlarge_placed(heatmap: Heatmap, size: Size, placement: Placement | None) -> Heatmap:
    """Enlarge a heatmap to a photo of which it covers only a part: 0 elsewhere.

    Args:
        heatmap: (rows, columns), float32.
        size: (height, width) of the photo.
        placement: Where the heatmap lies on the photo; None: on all of it.

    Returns:
        (height, width), float32.
    """
    if placement is None:
        return enlarge(heatmap, size)
    rows, columns = spans(placement, size)
    large = np.zeros(size, np.float32)
    large[rows.slice, columns.slice] = enlarge_inside(heatmap, size, placement)
    return large


def enlarge_inside(heatmap: Heatmap, size: Size, placement: Placement) -> Heatmap:
    """Enlarge a heatmap to the part of a photo on which it lies, `spans(placement, size)`.

    What lies on the padding of a letterbox is cut away. The peak of the rest keeps its value.

    Args:
        heatmap: (rows, columns), float32.
        size: (height, width) of the photo.
        placement: Where the heatmap lies on the photo.

    Returns:
        The part of the photo, float32.
    """
    down, across = spans(placement, size)
    cells = shrink_to_pixels(heatmap, down, across)
    large = _sample(cells, down, across)
    peak, visible = large.max(), heatmap[placement.visible((heatmap.shape[0], heatmap.shape[1]))].max()
    return np.asarray(large * max(visible / peak, 1) if peak > 0 else large, np.float32)


def _sample(heatmap: Heatmap, rows: Span, columns: Span) -> Heatmap:
    """The bilinear values of a heatmap at the pixels of two spans."""
    height, width = heatmap.shape
    to_cells = np.array(
        [
            [width / (columns.end - columns.start), 0, cell_positions(width, columns)[0]],
            [0, height / (rows.end - rows.start), cell_positions(height, rows)[0]],
        ]
    )
    size = columns.last - columns.first, rows.last - rows.first
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    sampled = cv2.warpAffine(heatmap, to_cells, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(sampled, np.float32)


def shrink_to_pixels(heatmap: Heatmap, rows: Span, columns: Span) -> Heatmap:
    """Shrink a heatmap that has more rows or columns than pixels to lie on."""
    size = min(heatmap.shape[0], rows.pixels), min(heatmap.shape[1], columns.pixels)
    return heatmap if heatmap.shape == size else enlarge(heatmap, size)


def cell_positions(cells: int, span: Span) -> NDArray[np.float64]:
    """Where the pixels of a span lie between the cells of a grid: 0 is the centre of the first cell."""
    positions = (np.arange(span.first, span.last) + 0.5 - span.start) * cells / (span.end - span.start) - 0.5
    return np.asarray(positions, np.float64)


def _resize(image: Any, size: tuple[int, int], out: Any = None) -> Any:
    """Shrink each side by area, or enlarge it bilinearly; into the array `out`, if it is given."""
    height, width = size
    if image.ndim == COLOR_RANK and image.shape[2] > MAX_OPENCV_CHANNELS:
        groups = [
            image[..., first : first + MAX_OPENCV_CHANNELS]
            for first in range(0, image.shape[2], MAX_OPENCV_CHANNELS)
        ]
        return np.concatenate([_resize(group, size) for group in groups], axis=2)
    shrunk_size = min(height, image.shape[0]), min(width, image.shape[1])
    resized = image
    for (rows, columns), interpolation, target in (
        (shrunk_size, cv2.INTER_AREA, None),
        (size, cv2.INTER_LINEAR, out),
    ):
        if resized.shape[:2] != (rows, columns):
            resized = cv2.resize(resized, (columns, rows), target, interpolation=interpolation)
    return resized.reshape(height, width, *image.shape[2:])  # OpenCV drops the axis of a single channel
