"""Where the heat of a heatmap lies: inside an object, at the border of the image.

Every cell of a heatmap spreads its heat evenly over its rectangle on the image. Rectangles are cut exactly at
boxes, at the pixels of masks, and at the edges of the image, so that no image is enlarged for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.sizing import Size

Heatmap = NDArray[np.float32]
Floats = NDArray[np.float64]

BORDER_SHARE = 0.1  # of the shorter side: how wide the outer band of an image is
HOT_SHARE = 0.5  # of the peak: what counts as hot
HOT_CELLS = 112  # per side at least, into which a heatmap is divided to find what is hot


@dataclass(frozen=True)
class Localization:
    """Where the heat of one class lies.

    Attributes:
        heat_at_border: Share of the heat in the outer band of the image, of a tenth of its shorter side.
        heat_inside: Share of the heat inside the object: the energy-based pointing game of Wang et al. 2020
            (arXiv:1910.01279, section 4.3), with cells cut exactly at the object's edge.
        inside_area: Share of the object in the part of the image on which the heatmap lies: what
            `heat_inside` would be if the heat were everywhere the same.
        pointing_hit: Whether the peak lies inside the object: the pointing game of Zhang et al. 2016
            (arXiv:1608.00507), without a margin.
        iou: Of the region where the enlarged heatmap has at least half of its peak, and the object:
            intersection over union.

    All are None where the heatmap is zero on the image, and all but the first where no object is known.
    """

    heat_at_border: float | None = None
    heat_inside: float | None = None
    inside_area: float | None = None
    pointing_hit: bool | None = None
    iou: float | None = None


NOWHERE = Localization()


@dataclass(frozen=True)
class Region:
    """A part of an image, made of rectangles between lines.

    Attributes:
        ys: The horizontal lines, in pixels from the top, ascending.
        xs: The vertical lines.
        inside: (len(ys) - 1, len(xs) - 1), which of the rectangles belong to it.
    """

    ys: Floats
    xs: Floats
    inside: NDArray[np.bool_]


def region_of_boxes(boxes: Sequence[Sequence[float]], size: Size) -> Region:
    """The union of boxes.

    Args:
        boxes: Left, top, right and bottom of each, in pixels.
        size: (height, width) of the image, at whose edges they are cut.

    Returns:
        The region.
    """
    height, width = size
    limits = np.array([width, height, width, height], np.float64)
    edges = np.clip(np.array(boxes, np.float64).reshape(-1, 4), 0, limits)
    xs, ys = np.unique([0, width, *edges[:, ::2].flat]), np.unique([0, height, *edges[:, 1::2].flat])
    inside = np.zeros((len(ys) - 1, len(xs) - 1), np.bool_)
    lefts, rights = (np.searchsorted(xs, edges[:, column]) for column in (0, 2))
    tops, bottoms = (np.searchsorted(ys, edges[:, column]) for column in (1, 3))
    for left, top, right, bottom in zip(lefts, tops, rights, bottoms, strict=True):
        inside[top:bottom, left:right] = True
    return Region(ys, xs, inside)


def region_of_mask(mask: NDArray[np.bool_], size: Size) -> Region:
    """The pixels of a mask.

    Args:
        mask: (rows, columns), which pixels belong to the object. They cover the image, whatever its size.
        size: (height, width) of the image.

    Returns:
        The region.
    """
    rows, columns = mask.shape
    return Region(np.linspace(0, size[0], rows + 1), np.linspace(0, size[1], columns + 1), mask)
