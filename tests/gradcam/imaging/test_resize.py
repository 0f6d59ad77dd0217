from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.resize import Pixels, enlarge, fit, shrink_to_edge

RED = (255, 0, 0)


def plain(color: tuple[int, int, int], height: int, width: int) -> Pixels:
    return np.full((height, width, 3), color, np.uint8)


def ramp(*values: float) -> NDArray[np.float32]:
    """A heatmap of one row."""
    return np.array([values], np.float32)


class TestFit:
    @pytest.mark.parametrize("source", [(1, 1), (3, 200), (200, 3), (16, 24), (40, 60), (7, 5)])
    def test_any_image_is_resized_to_the_requested_size(self, source: tuple[int, int]) -> None:
        fitted = fit(plain((10, 20, 30), *source), (16, 24))
        assert_array_equal(fitted, plain((10, 20, 30), 16, 24))
        assert fitted.dtype == np.uint8

    def test_shrinking_takes_the_mean_of_the_area(self) -> None:
        pixels = np.zeros((8, 8, 3), np.uint8)
        pixels[::4, ::4] = 160  # one pixel of sixteen: nearest or bilinear sampling would give 0, 40 or 160
        assert_array_equal(fit(pixels, (2, 2)), plain((10, 10, 10), 2, 2))

    def test_enlarging_is_bilinear(self) -> None:
        pixels = np.array([[[0] * 3, [200] * 3]], np.uint8)
        assert fit(pixels, (1, 4))[0, :, 0].tolist() == [0, 50, 150, 200]

    def test_one_side_may_shrink_while_the_other_grows(self) -> None:
        pixels = np.zeros((4, 2, 3), np.uint8)
        pixels[:2, 1] = 200
        assert fit(pixels, (2, 4))[..., 0].tolist() == [[0, 50, 150, 200], [0, 0, 0, 0]]

    def test_the_image_is_not_changed(self) -> None:
        pixels = plain(RED, 5, 5)
        fit(pixels, (2, 2))[:] = 0
        fit(pixels, (5, 5))[:] = 0
        assert_array_equal(pixels, plain(RED, 5, 5))

    @pytest.mark.parametrize("size", [(96, 128), (144, 192), (160, 221), (47, 64), (211, 290)])
    def test_a_photo_shrinks_to_nearly_the_exact_means_of_the_areas(
        self, size: tuple[int, int], photos: Path
    ) -> None:
        pixels = decode((photos / "coffee.jpg").read_bytes()).pixels
        exact = cv2.resize(pixels.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
        differences = np.abs(fit(pixels, size) - exact)
        assert differences.mean() < 0.4
        assert differences.max() < 6

    def test_an_even_multiple_shrinks_to_the_means_exactly(self, noise: Callable[..., Pixels]) -> None:
        pixels = noise(48, 64)
        means = pixels.reshape(16, 3, 16, 4, 3).mean((1, 3))
        assert_allclose(fit(pixels, (16, 16)), means, atol=0.5)


class TestEnlarge:
    def test_it_is_half_pixel_bilinear(self) -> None:
        assert_allclose(enlarge(ramp(0, 1), (1, 4)), ramp(0, 0.25, 0.75, 1), atol=1e-6)

    @pytest.mark.parametrize("peak", [1.0, 0.3])
    @pytest.mark.parametrize("size", [(14, 14), (50, 31), (7, 7), (8, 9), (1, 1)])
    def test_the_peak_stays_as_it_was(self, peak: float, size: tuple[int, int]) -> None:
        heatmap = np.zeros((7, 7), np.float32)
        heatmap[2, 4] = peak
        large = enlarge(heatmap, size)
        assert large.shape == size
        assert large.max() == pytest.approx(peak, abs=1e-6)
        assert large.min() >= 0

    def test_the_peak_stays_where_it_was(self) -> None:
        heatmap = np.zeros((7, 7), np.float32)
        heatmap[2, 4] = 1
        y, x = divmod(int(enlarge(heatmap, (70, 140)).argmax()), 140)
        assert (y // 10, x // 20) == (2, 4)

    def test_a_dark_map_stays_dark(self) -> None:
        assert_array_equal(enlarge(np.zeros((7, 7), np.float32), (30, 20)), np.zeros((30, 20)))


@pytest.mark.parametrize(
    ("size", "edge", "expected"),
    [
        ((40, 80), 20, (10, 20)),
        ((80, 40), 20, (20, 10)),
        ((40, 80), 80, (40, 80)),
        ((40, 80), None, (40, 80)),
        ((1, 999), 16, (1, 16)),
    ],
)
def test_an_image_is_shrunk_to_its_edge_and_never_enlarged(
    size: tuple[int, int], edge: int | None, expected: tuple[int, int]
) -> None:
    assert shrink_to_edge(plain(RED, *size), edge).shape == (*expected, 3)
