"""Heat on the image's grid, against a plain computation of one point after the other."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import Batch
from gradcam_worker.audit.dataset.image_grid import heat_on_images
from gradcam_worker.schemas.options import MethodSpec

Box = tuple[float, float, float, float]
POINTS = 240  # of an image's side, which a plain computation looks at


def batch_of(
    heatmaps: NDArray[Any], shown: list[Box | None] | None = None, size: tuple[int, int] = (400, 300)
) -> Batch:
    count = len(heatmaps)
    columns: dict[str, Any] = {
        "width": pa.array([size[0]] * count, pa.int32()),
        "height": pa.array([size[1]] * count, pa.int32()),
    }
    if shown is not None:
        columns["shown_xyxy"] = pa.array(shown, pa.list_(pa.float32(), 4))
    numbers = np.arange(count, dtype=np.int32)
    return Batch(
        MethodSpec(),
        numbers,
        numbers,
        numbers.astype(np.float32),
        heatmaps.astype(np.float16),
        pa.RecordBatch.from_pydict(columns),
    )


def plain(
    heatmap: NDArray[Any], box: Box, size: tuple[int, int], grid: tuple[int, int]
) -> NDArray[np.float64]:
    """Look up the heat at each of many points of the image, and add it to the cell that the point is in."""
    width, height = size
    left, top, right, bottom = box
    total: NDArray[np.float64] = np.zeros(grid)
    for i in range(POINTS):
        for j in range(POINTS):
            y, x = (i + 0.5) / POINTS, (j + 0.5) / POINTS
            row = (y * height - top) / (bottom - top) * heatmap.shape[0]
            column = (x * width - left) / (right - left) * heatmap.shape[1]
            if 0 <= row < heatmap.shape[0] and 0 <= column < heatmap.shape[1]:
                value = max(float(heatmap[int(row), int(column)]), 0)
                total[int(y * grid[0]), int(x * grid[1])] += value
    total /= total.sum()
    return total


@pytest.mark.parametrize("grid", [(4, 6), (3, 3), (8, 5)])
@pytest.mark.parametrize(
    "box",
    [None, (50.0, 0.0, 350.0, 300.0), (0.0, -50.0, 400.0, 350.0), (-20.0, 30.0, 410.0, 200.0)],
    ids=["all of it", "centre crop", "padded", "both"],
)
def test_heat_lies_where_a_plain_computation_puts_it(grid: tuple[int, int], box: Box | None) -> None:
    heatmaps = np.random.default_rng(1).random((2, 4, 6)).astype(np.float16)
    found = heat_on_images(batch_of(heatmaps, [box, None]), grid)
    assert found.dtype == np.float32
    for index, placed in enumerate((box or (0.0, 0.0, 400.0, 300.0), (0.0, 0.0, 400.0, 300.0))):
        assert_allclose(found[index], plain(heatmaps[index], placed, (400, 300), grid), atol=2e-3)


def test_files_without_placements_cover_all_of_their_images() -> None:
    heatmaps = np.random.default_rng(2).random((3, 4, 4))
    expected = heatmaps.astype(np.float16).astype(np.float64)
    expected /= expected.sum(axis=(1, 2), keepdims=True)
    assert_allclose(heat_on_images(batch_of(heatmaps), (4, 4)), expected, atol=1e-6)


def test_heatmaps_that_say_nothing_stay_zero() -> None:
    beyond = np.zeros((4, 4))
    beyond[0, 0] = 1
    heatmaps = np.stack([np.zeros((4, 4)), np.full((4, 4), np.nan), -np.ones((4, 4)), beyond])
    boxes: list[Box | None] = [None, None, None, (-400.0, -300.0, 400.0, 300.0)]
    assert not heat_on_images(batch_of(heatmaps, boxes), (2, 2)).any()


def test_infinite_and_large_heat_is_counted() -> None:
    heatmap = np.array([[np.inf, 0], [0, 65_504]])
    assert_allclose(heat_on_images(batch_of(heatmap[None]), (2, 2))[0], [[0.5, 0], [0, 0.5]])
