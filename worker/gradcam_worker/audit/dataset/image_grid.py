"""Heatmaps of different images and grids, brought to one grid on the image, so that they can be compared.

A stored heatmap lies on what the network's input showed of its image. With a sizing that crops or pads, that
is another part of each image: see `gradcam_worker.gradcam.sizing`.
"""

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import SHOWN_COLUMN, Batch, Grid

MAX_FLOAT16 = 65_504.0  # the type of stored heatmaps
WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)


def heat_on_images(batch: Batch, grid: Grid) -> NDArray[np.float32]:
    """Distribute the positive heat of each record over a grid on its image.

    A cell of the heatmap gives each cell of the grid the share of its heat that its area there has. Heat
    beyond the image, where it was padded, is left out.

    Args:
        batch: n records.
        grid: Rows and columns of the grid.

    Returns:
        (n, rows, columns). Each map sums to 1, or is 0 where the record has no heat on the image.
    """
    shown = _shown_shares(batch)
    heat = np.clip(np.nan_to_num(batch.heatmaps.astype(np.float32), posinf=MAX_FLOAT16), 0, None)
    rows, columns = grid
    down = _shares_of_cells(shown[:, 1], shown[:, 3], heat.shape[1], rows)
    across = _shares_of_cells(shown[:, 0], shown[:, 2], heat.shape[2], columns)
    maps = down @ heat @ across.transpose(0, 2, 1)
    totals = maps.sum(axis=(1, 2), keepdims=True)
    shares: NDArray[np.float32] = np.divide(maps, totals, out=np.zeros_like(maps), where=totals > 0)
    return shares


def _shown_shares(batch: Batch) -> NDArray[np.float64]:
    """Left, top, right, bottom of what was seen, as shares of the image: (n, 4); (1, 4) if equal for all."""
    table = batch.other_columns
    whole = np.array([WHOLE_IMAGE])
    if SHOWN_COLUMN not in table.schema.names or table[SHOWN_COLUMN].null_count == len(table):
        return whole
    column = table[SHOWN_COLUMN]
    sizes = np.stack(
        [table[name].to_numpy(zero_copy_only=False) for name in ("width", "height", "width", "height")],
        axis=1,
    )
    pixels = column.fill_null(list(WHOLE_IMAGE)).flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    is_whole = column.is_null().to_numpy(zero_copy_only=False)
    return np.where(is_whole[:, None], whole, pixels / sizes)


def _shares_of_cells(
    begin: NDArray[np.float64], end: NDArray[np.float64], cells: int, targets: int
) -> NDArray[np.float32]:
    """Which share of each of the `cells` between begin and end lies in each of `targets` cells of [0, 1].

    Returns:
        (n, targets, cells) for n begins and ends.
    """
    edges = begin[:, None] + np.arange(cells + 1) / cells * (end - begin)[:, None]
    target_edges = np.arange(targets + 1) / targets
    low = np.maximum(edges[:, None, :-1], target_edges[None, :-1, None])
    high = np.minimum(edges[:, None, 1:], target_edges[None, 1:, None])
    widths = (edges[:, 1:] - edges[:, :-1])[:, None]
    shares: NDArray[np.float32] = (np.clip(high - low, 0, None) / widths).astype(np.float32)
    return shares
