import tracemalloc

import cv2
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.imaging.region import contours, draw_box, draw_contour, hot_box, scale_box
from gradcam_worker.gradcam.imaging.resize import enlarge

GREY, WHITE, BLACK = 120, 255, 0


def heatmap(*rows: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(rows, np.float32)


def plain(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), GREY, np.uint8)


def hill(side: int) -> NDArray[np.float32]:
    """A cone: 1 in the middle, 0 at a distance of half a side."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    return np.asarray(np.maximum(1 - np.hypot(x, y) / (side / 2), 0), np.float32)


class TestHotBox:
    def test_at_the_size_of_the_heatmap_it_surrounds_the_cells_above_the_threshold(self) -> None:
        hot = heatmap((0, 0, 0, 0, 0), (0, 0.6, 1, 0.4, 0), (0, 0, 0.5, 0, 0), (0, 0, 0, 0, 0))
        assert hot_box(hot, (4, 5), 0.5) == (1, 1, 3, 3)
        assert hot_box(hot, (4, 5), 0.4) == (1, 1, 4, 3)
        assert hot_box(hot, (4, 5), 0.9) == (2, 1, 3, 2)

    def test_it_surrounds_the_region_of_the_peak_and_not_the_largest(self) -> None:
        hot = heatmap((1, 0, 0.9, 0.9), (0, 0, 0.9, 0.9))
        assert hot_box(hot, (2, 4), 0.5) == (0, 0, 1, 1)

    def test_cells_are_connected_across_corners(self) -> None:
        assert hot_box(heatmap((1, 0, 0), (0, 0.9, 0), (0, 0, 0.8)), (3, 3), 0.5) == (0, 0, 3, 3)

    def test_of_two_peaks_the_first_counts(self) -> None:
        assert hot_box(heatmap((0, 0, 1), (0, 0, 0), (1, 0, 0)), (3, 3), 0.5) == (2, 0, 3, 1)

    def test_in_a_larger_image_it_ends_where_the_bilinear_slope_crosses_the_threshold(self) -> None:
        # Cells of 10 pixels: between the middles of two, at 4.5 and 14.5, it rises to 0.95 at pixel 14, which
        # counts as the peak. So half of it is reached at 9.25, and three tenths at 7.35.
        hot = heatmap((0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0))
        assert hot_box(hot, (30, 40), 0.5) == (10, 10, 20, 20)
        assert hot_box(hot, (30, 40), 0.3) == (8, 8, 22, 22)

    def test_the_threshold_is_a_share_of_the_peak(self) -> None:
        hot = heatmap((0.1, 0.6, 1, 0.4))
        assert hot_box(hot * np.float32(0.01), (9, 40), 0.5) == hot_box(hot, (9, 40), 0.5)

    @pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 2), (16, 16)])
    def test_it_is_never_empty_and_within_the_image(self, size: tuple[int, int]) -> None:
        box = hot_box(hill(7), size, 0.99)
        assert box is not None
        left, top, right, bottom = box
        assert 0 <= left < right <= size[1]
        assert 0 <= top < bottom <= size[0]

    def test_the_box_of_a_uniform_heatmap_is_the_whole_image(self) -> None:
        assert hot_box(np.ones((7, 7), np.float32), (30, 20), 0.5) == (0, 0, 20, 30)

    @pytest.mark.parametrize("seed", range(40))
    def test_it_equals_the_result_of_a_flood_fill_over_all_pixels(self, seed: int) -> None:
        """Also where the region crosses a saddle, or ends at one: every other seed is plain noise."""
        random = np.random.default_rng(seed)
        for _ in range(20):
            rows, columns, height, width = (
                int(side) for side in random.integers((2, 2, 1, 1), (15, 15, 120, 120))
            )
            hot = random.random((rows, columns), np.float32)
            hot = hot if seed % 2 else cv2.GaussianBlur(hot, (0, 0), 1)
            threshold = float(random.choice([0.3, 0.5, 0.62, 0.8, 0.95]))
            large = enlarge(hot, (height, width))
            mask = (large >= threshold * large.max()).astype(np.uint8)
            row, column = divmod(int(large.argmax()), width)
            _, _, _, (left, top, wide, high) = cv2.floodFill(mask, None, (column, row), 2, flags=8)
            box = hot_box(hot, (height, width), threshold)
            assert box == (left, top, left + wide, top + high), (rows, columns, height, width, threshold)

    def test_a_saddle_joins_two_peaks_only_where_it_is_high_enough(self) -> None:
        hot = heatmap((1, 0.4), (0.4, 0.9))  # 0.675 in the middle
        assert hot_box(hot, (200, 200), 0.6) == (0, 0, 200, 200)
        box = hot_box(hot, (200, 200), 0.7)
        assert box
        assert max(box) <= 100

    def test_a_heatmap_of_zeros_has_none(self) -> None:
        assert hot_box(np.zeros((7, 7), np.float32), (30, 20), 0.5) is None

    def test_in_a_smaller_image_it_covers_every_pixel_that_it_touches(self) -> None:
        assert scale_box((3, 10, 97, 51), (100, 100), (10, 10)) == (0, 1, 10, 6)
        assert scale_box((10, 20, 30, 40), (100, 200), (50, 100)) == (5, 10, 15, 20)
        assert scale_box((98, 98, 99, 99), (100, 100), (3, 3)) == (2, 2, 3, 3)


class TestDrawBox:
    def test_it_is_a_light_line_between_dark_ones_just_inside_the_box(self) -> None:
        drawn = draw_box(plain(100, 100), (20, 30, 60, 80))[..., 0]
        assert drawn[50, 18:25].tolist() == [GREY, GREY, BLACK, WHITE, BLACK, GREY, GREY]
        assert drawn[50, 55:62].tolist() == [GREY, GREY, BLACK, WHITE, BLACK, GREY, GREY]
        assert drawn[28:35, 40].tolist() == [GREY, GREY, BLACK, WHITE, BLACK, GREY, GREY]
        assert drawn[75:82, 40].tolist() == [GREY, GREY, BLACK, WHITE, BLACK, GREY, GREY]

    def test_around_a_whole_image_all_four_sides_are_visible(self) -> None:
        drawn = draw_box(plain(60, 80), (0, 0, 80, 60))[..., 0]
        for side in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]):
            assert (side == BLACK).all()
        assert (drawn[3:-3, 3:-3] == GREY).all()

    @pytest.mark.parametrize("box", [(0, 0, 1, 1), (7, 7, 9, 8), (0, 0, 4, 4), (10, 15, 16, 16)])
    def test_a_box_too_small_for_its_frame_changes_nothing_outside(
        self, box: tuple[int, int, int, int]
    ) -> None:
        left, top, right, bottom = box
        drawn = draw_box(plain(16, 16), box)
        assert (drawn[top:bottom, left:right] != GREY).any()
        drawn[top:bottom, left:right] = GREY
        assert_array_equal(drawn, plain(16, 16))

    @pytest.mark.parametrize(("side", "width"), [(250, 3), (2500, 20)])
    def test_lines_are_wider_in_larger_images(self, side: int, width: int) -> None:
        row = draw_box(plain(side, side), (0, 0, side, side))[side // 2, : side // 2, 0]
        assert np.count_nonzero(row != GREY) == width

    def test_the_image_is_not_changed(self) -> None:
        pixels = plain(40, 40)
        draw_contour(draw_box(pixels, (3, 3, 30, 30)), hill(7), 0.5)
        draw_contour(pixels, hill(7), 0.5)
        assert_array_equal(pixels, plain(40, 40))


class TestContour:
    def test_it_lies_on_the_level(self) -> None:
        (line,) = contours(hill(200), (200, 200), 0.5)
        # the pixels around the middle have 1 - sqrt(0.5) / 100, half of which is reached here:
        radius = 100 - 50 * (1 - np.sqrt(0.5) / 100)
        np.testing.assert_allclose(np.hypot(*(line - 99.5).T), radius, atol=0.01)

    @pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
    def test_the_drawn_line_lies_on_the_level_of_the_enlarged_heatmap(self, threshold: float) -> None:
        hot = hill(7)
        light = (draw_contour(plain(630, 840), hot, threshold) == WHITE).all(-1)
        values = enlarge(hot, (630, 840))
        steepest = np.abs(np.diff(values, axis=0)).max() + np.abs(np.diff(values, axis=1)).max()
        assert light.sum() > 50
        np.testing.assert_allclose(values[light], threshold * values.max(), atol=2 * float(steepest))

    def test_it_is_light_with_a_dark_edge_on_both_sides(self) -> None:
        drawn = draw_contour(plain(200, 200), hill(200), 0.5)[100, :, 0].astype(int)
        (dark,), (light,) = np.nonzero(drawn < GREY // 2), np.nonzero(drawn > 2 * GREY - 30)
        assert {int(distance) for distance in abs(light - 99.5)} <= {49, 50}
        assert min(abs(dark - 99.5)) < 49.5
        assert max(abs(dark - 99.5)) > 50.5

    def test_its_steps_are_smoothed(self) -> None:
        assert len(np.unique(draw_contour(plain(200, 200), hill(200), 0.5))) > 20

    def test_all_regions_and_holes_are_outlined(self) -> None:
        hot = np.zeros((60, 60), np.float32)
        hot[5:25, 5:25] = 1
        hot[12:18, 12:18] = 0
        hot[40:50, 40:50] = 0.7
        assert len(contours(hot, (60, 60), 0.5)) == 3

    def test_at_the_edge_of_the_image_it_is_open(self) -> None:
        drawn = draw_contour(plain(100, 100), heatmap((1, 1, 0, 0)), 0.5)[..., 0]
        assert (drawn[:, 48:52] != GREY).any(axis=1).all(), "from top to bottom"
        assert (drawn[:, :40] == GREY).all()
        assert (drawn[:, 60:] == GREY).all()

    def test_a_uniform_heatmap_has_none(self) -> None:
        for value in (0, 1):
            hot = np.full((7, 7), value, np.float32)
            assert_array_equal(draw_contour(plain(50, 50), hot, 0.5), plain(50, 50))

    @pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (16, 16)])
    def test_an_image_of_any_size_is_large_enough(self, size: tuple[int, int]) -> None:
        assert draw_contour(plain(*size), hill(7), 0.5).shape == (*size, 3)


def test_nothing_large_is_kept_of_a_heatmap_as_fine_as_the_input_of_a_network() -> None:
    heatmap = np.random.default_rng(0).random((224, 224), np.float32)
    hot_box(heatmap, (30, 40), 0.5)
    tracemalloc.start()
    try:
        hot_box(heatmap, (3000, 4000), 0.5)
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 1_000_000
