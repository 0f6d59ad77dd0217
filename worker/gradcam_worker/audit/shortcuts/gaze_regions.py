"""Regions of images on a grid: what boxes cover, what is hot, and what a place is called."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import Grid

HOT_SHARE = 0.5  # of the peak
THIRDS = (1 / 3, 2 / 3)

Heat = NDArray[np.float32]
Region = NDArray[np.bool_]  # (rows, columns) of cells


def share_near_boxes(boxes: Sequence[NDArray[np.float32]], grid: Grid) -> Heat:
    """Compute which share of each cell lies within the boxes of an image, or nearer to them than a cell.

    The heat of an object reaches that far beyond it.

    Args:
        boxes: Of each of n images (b, 4): left, top, right, bottom as shares of its width and height.
        grid: Rows and columns.

    Returns:
        (n, rows, columns). Where boxes overlap, their shares are added up, to 1 at most.
    """
    inside = np.zeros((len(boxes), *grid), np.float32)
    owners = np.repeat(np.arange(len(boxes)), [len(of_image) for of_image in boxes])
    if not len(owners):
        return inside
    left, top, right, bottom = np.concatenate(boxes).T
    across = _covered(left - 1 / grid[1], right + 1 / grid[1], grid[1])
    down = _covered(top - 1 / grid[0], bottom + 1 / grid[0], grid[0])
    np.add.at(inside, owners, down[:, :, None] * across[:, None, :])
    return np.minimum(inside, 1)


def _covered(begin: NDArray[np.float32], end: NDArray[np.float32], cells: int) -> Heat:
    """Which share of each of the cells of [0, 1] lies between begin and end: (n, cells)."""
    edges = np.arange(cells + 1) / cells
    low, high = np.maximum(begin[:, None], edges[:-1]), np.minimum(end[:, None], edges[1:])
    return np.asarray(np.clip((high - low) * cells, 0, 1), np.float32)


def window_sums(maps: Heat, side: Grid) -> Heat:
    """Sum maps over every window of a size.

    Args:
        maps: (n, rows, columns).
        side: Rows and columns of a window.

    Returns:
        (n, rows - window rows + 1, columns - window columns + 1).
    """
    summed = np.zeros((len(maps), maps.shape[1] + 1, maps.shape[2] + 1), np.float32)
    summed[:, 1:, 1:] = maps.cumsum(1).cumsum(2)
    rows, columns = side
    return np.asarray(
        summed[:, rows:, columns:]
        - summed[:, :-rows, columns:]
        - summed[:, rows:, :-columns]
        + summed[:, :-rows, :-columns],
        np.float32,
    )


def hot_region(map_: Heat) -> Region:
    """The connected cells around the peak of a map (rows, columns) that have at least half of its value."""
    _, labels = cv2.connectedComponents((map_ >= HOT_SHARE * map_.max()).astype(np.uint8), connectivity=8)
    peak = np.unravel_index(map_.argmax(), map_.shape)
    return np.asarray(labels == labels[peak], np.bool_)


def widened(region: Region) -> Region:
    """The region, and the cells around it: heat tells a place to about a cell.

    Args:
        region: (rows, columns).

    Returns:
        A new array of the same shape.
    """
    wider = cv2.dilate(region.astype(np.uint8), np.ones((3, 3), np.uint8))
    return np.asarray(wider > 0, np.bool_)


def describe_place(region: Region) -> str:
    """Name the place of a region: `top left corner`, `left edge`, `centre`, or `all over`."""
    if region.mean() > HOT_SHARE:
        return "all over"
    rows, columns = np.nonzero(region)
    down = _third((rows.mean() + 0.5) / region.shape[0], ("top", "", "bottom"))
    across = _third((columns.mean() + 0.5) / region.shape[1], ("left", "", "right"))
    if down and across:
        return f"{down} {across} corner"
    return f"{down or across} edge" if down or across else "centre"


def _third(position: float, names: tuple[str, str, str]) -> str:
    return names[int(np.searchsorted(THIRDS, position))]
