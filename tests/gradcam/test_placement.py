"""Heatmaps are drawn where the network saw them, whichever part of the photo its input shows."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.artifacts.artifacts import peak_xy
from gradcam_worker.gradcam.explain import Explained, explain_image
from gradcam_worker.gradcam.imaging.overlay import overlay, to_grey
from gradcam_worker.gradcam.imaging.region import draw_contour, hot_box
from gradcam_worker.gradcam.imaging.resize import Heatmap, Pixels, enlarge, enlarge_placed
from gradcam_worker.gradcam.sizing import SIZINGS, Placement, Size, Sizing, spans
from tests.gradcam.sized_network import SizedNetwork

GREY, RED = 90, (230, 20, 20)
FITS = {
    **SIZINGS,
    "short side 20": Sizing("bilinear", "crop", short_side=20),
    "crop of a squashed photo": Sizing("bilinear", "crop", size=(20, 20)),
    "letterbox": Sizing("bilinear_antialias", "letterbox", color=(114,)),
}


def photo_with_object(size: Size, top: int, left: int, side: int) -> Pixels:
    """A grey photo with a red square."""
    pixels = np.full((*size, 3), GREY, np.uint8)
    pixels[top : top + side, left : left + side] = RED
    return pixels


def explain_red(pixels: Pixels, sizing: Sizing) -> Explained:
    return explain_image(SizedNetwork(sizing), pixels, classes=["red"])


def test_a_heatmap_that_is_hot_on_the_padding_alone_is_zero_on_the_photo() -> None:
    explanation = explain_red(photo_with_object((60, 180), 10, 30, 20), Sizing(fit="letterbox"))
    padding = np.zeros_like(explanation.heatmaps)
    padding[:, 0] = 1
    assert explanation.zero_heatmaps == ()
    assert replace(explanation, heatmaps=padding).zero_heatmaps == tuple(
        prediction.id for prediction in explanation.explained
    )


def shown_part(photo: Size, sizing: Sizing) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels of the photo that the network sees."""
    rows, columns = spans(sizing.placement(photo, (16, 16)), photo)
    return columns.first, rows.first, columns.last, rows.last


class TestKnownObject:
    @pytest.mark.parametrize("name", FITS)
    @settings(deadline=None)
    @given(data=st.data())
    def test_box_and_peak_lie_on_an_object_anywhere_in_what_the_network_sees(
        self, name: str, data: st.DataObject
    ) -> None:
        sizing = FITS[name]
        size = data.draw(st.sampled_from([(96, 192), (192, 96), (120, 120), (100, 330)]))
        left, top, right, bottom = shown_part(size, sizing)
        shown = sizing.placement(size, (16, 16)) or Placement(0, 0, 1, 1)
        x0, y0, x1, y1 = shown.box(size)
        cell = max(x1 - x0, y1 - y0) / 4  # in pixels of the photo, the longer side
        side = min(int(1.5 * cell) + 1, right - left, bottom - top)
        x = data.draw(st.integers(left, right - side))
        y = data.draw(st.integers(top, bottom - side))
        explained = explain_red(photo_with_object(size, y, x, side), sizing)
        box = hot_box(explained.shown[0], size, 0.5, explained.placement)
        peak = peak_xy(explained.heatmaps[0], (size[1], size[0]), explained.placement)
        assert box
        assert peak
        assert x - cell / 2 <= peak[0] <= x + side + cell / 2
        assert y - cell / 2 <= peak[1] <= y + side + cell / 2
        assert x - cell <= box[0] < x + side / 2 < box[2] <= x + side + cell
        assert y - cell <= box[1] < y + side / 2 < box[3] <= y + side + cell
        assert box[0] >= left
        assert box[1] >= top
        assert box[2] <= right
        assert box[3] <= bottom

    @pytest.mark.parametrize("name", ["torchvision", "timm", "short side 20"])
    def test_an_object_outside_a_crop_is_not_seen(self, name: str) -> None:
        explained = explain_red(photo_with_object((100, 300), 20, 10, 60), FITS[name])
        assert explained.zero_heatmaps == (0,)
        assert hot_box(explained.shown[0], (100, 300), 0.5, explained.placement) is None
        assert peak_xy(explained.heatmaps[0], (300, 100), explained.placement) is None

    @pytest.mark.parametrize("name", FITS)
    def test_the_same_object_has_the_same_place_whatever_the_fit(self, name: str) -> None:
        explained = explain_red(photo_with_object((200, 300), 60, 100, 50), FITS[name])
        box = hot_box(explained.shown[0], (200, 300), 0.5, explained.placement)
        assert box
        assert abs((box[0] + box[2]) / 2 - 125) < 40
        assert abs((box[1] + box[3]) / 2 - 85) < 30


class TestDrawing:
    def test_outside_a_crop_the_photo_keeps_its_colours(self) -> None:
        explained = explain_red(photo_with_object((100, 300), 20, 120, 60), FITS["torchvision"])
        drawn = explained.overlay(0)
        rows, columns = spans(explained.placement, (100, 300))
        changed = (drawn != explained.picture).any(axis=-1)
        assert changed[rows.slice, columns.slice].all()
        outside = np.ones((100, 300), bool)
        outside[rows.slice, columns.slice] = False
        assert outside.any()
        assert not changed[outside].any()
        assert not to_grey(explained.shown[0], (100, 300), explained.placement)[outside].any()

    def test_the_padding_of_a_letterbox_is_cut_away(self) -> None:
        pixels = photo_with_object((100, 200), 20, 120, 60)
        explained = explain_red(pixels, FITS["letterbox"])
        assert explained.placement == Placement(0, -0.5, 1, 1.5)
        cut = explained.heatmaps[0][1:3]  # the photo is the middle half of the input
        assert_allclose(
            enlarge_placed(explained.heatmaps[0], (100, 200), explained.placement)[25:75],
            enlarge(cut, (100, 200))[25:75],
            atol=0.03,
        )

    def test_it_is_as_if_the_crop_were_a_photo_of_its_own(self) -> None:
        """The crop of 256 x 256 of a photo of 256 x 512 is its middle, pixel by pixel."""
        pixels = np.random.default_rng(1).integers(0, 256, (256, 512, 3), np.uint8)
        whole = explain_red(pixels, Sizing(fit="crop"))
        alone = explain_red(np.ascontiguousarray(pixels[:, 128:384]), Sizing())
        assert_allclose(whole.heatmaps, alone.heatmaps, atol=0.02)
        placement, heatmap = whole.placement, alone.shown[0]
        middle = np.s_[:, 128:384]
        assert_allclose(whole.overlay(0)[middle].astype(int), alone.overlay(0), atol=4)
        assert_allclose(
            overlay(pixels, heatmap, placement=placement)[middle].astype(int), alone.overlay(0), atol=1
        )
        assert_allclose(
            to_grey(heatmap, (256, 512), placement)[middle].astype(int), to_grey(heatmap, (256, 256)), atol=1
        )
        contour = draw_contour(pixels, heatmap, 0.5, placement)
        assert (contour[middle] != draw_contour(alone.picture, heatmap, 0.5)).any(axis=-1).mean() < 0.02
        assert_array_equal(contour[:, :128], pixels[:, :128])
        box, own = hot_box(heatmap, (256, 512), 0.5, placement), hot_box(heatmap, (256, 256), 0.5)
        assert box
        assert own
        assert box == (own[0] + 128, own[1], own[2] + 128, own[3])

    def test_a_photo_that_is_shown_whole_is_drawn_as_it_always_was(self) -> None:
        pixels = np.random.default_rng(1).integers(0, 256, (80, 120, 3), np.uint8)
        heatmap = np.random.default_rng(2).random((7, 7), np.float32)
        everything = Placement(0, 0, 1, 1)
        assert_allclose(
            enlarge_placed(heatmap, (80, 120), everything), enlarge(heatmap, (80, 120)), atol=1e-6
        )
        assert hot_box(heatmap, (80, 120), 0.6, everything) == hot_box(heatmap, (80, 120), 0.6)
        drawn = overlay(pixels, heatmap, placement=everything)
        assert_allclose(drawn.astype(int), overlay(pixels, heatmap), atol=1)

    def test_drawing_twice_into_one_buffer_leaves_nothing_of_the_first(self) -> None:
        from gradcam_worker.gradcam.imaging.overlay import OverlayBase

        explained = explain_red(photo_with_object((100, 300), 20, 120, 60), FITS["torchvision"])
        base = OverlayBase(explained.picture, placement=explained.placement)
        buffer = np.empty_like(explained.picture)
        base.draw(np.eye(4, dtype=np.float32), out=buffer)
        assert_array_equal(base.draw(explained.shown[0], out=buffer), explained.overlay(0))


def bilinear(heatmap: Heatmap, row: float, column: float) -> float:
    """A heatmap's value between the centres of its cells, which are at whole numbers."""
    (rows, columns), total = heatmap.shape, 0.0
    row, column = min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)
    for r in range(rows):
        for c in range(columns):
            total += float(heatmap[r, c]) * max(1 - abs(row - r), 0) * max(1 - abs(column - c), 0)
    return total


PLACEMENTS = st.builds(
    lambda left, top, width, height: Placement(left, top, left + width, top + height),
    st.floats(-2, 0.7),
    st.floats(-2, 0.7),
    st.floats(0.3, 5),
    st.floats(0.3, 5),
).filter(lambda placement: placement.right > 0.1 and placement.bottom > 0.1)


class TestBack:
    @settings(deadline=None)
    @given(
        PLACEMENTS,
        st.integers(1, 40),
        st.integers(1, 40),
        st.integers(1, 6),
        st.integers(1, 6),
        st.integers(0, 99),
    )
    def test_each_pixel_has_the_value_of_its_place_in_the_grid(
        self, placement: Placement, height: int, width: int, rows: int, columns: int, seed: int
    ) -> None:
        heatmap = np.random.default_rng(seed).random((rows, columns), np.float32)
        down, across = spans(placement, (height, width))
        if rows > down.pixels or columns > across.pixels:
            return  # it is shrunk first
        large = enlarge_placed(heatmap, (height, width), placement)
        expected = np.zeros((height, width))
        for y in range(down.first, down.last):
            for x in range(across.first, across.last):
                row = (y + 0.5 - down.start) / (down.end - down.start) * rows - 0.5
                column = (x + 0.5 - across.start) / (across.end - across.start) * columns - 0.5
                expected[y, x] = bilinear(heatmap, row, column)
        factor = large.max() / expected.max()
        assert factor >= 1 - 1e-5, "the peak keeps its value"
        assert_allclose(large, expected * factor, atol=1e-5)

    @pytest.mark.parametrize("seed", range(20))
    def test_the_box_is_that_of_a_flood_fill_over_all_pixels(self, seed: int) -> None:
        import cv2

        random = np.random.default_rng(seed)
        for _ in range(20):
            rows, columns, height, width = (
                int(side) for side in random.integers((2, 2, 8, 8), (15, 15, 120, 120))
            )
            left, top = random.uniform(-1, 0.5, 2)
            right, bottom = random.uniform(0.3, 2, 2) + np.maximum([left, top], 0)
            placement = Placement(left, top, right, bottom)
            hot = cv2.GaussianBlur(random.random((rows, columns), np.float32), (0, 0), 1 - 0.5 * (seed % 2))
            threshold = float(random.choice([0.3, 0.5, 0.62, 0.8, 0.95]))
            large = enlarge_placed(hot, (height, width), placement)
            mask = (large >= threshold * large.max()).astype(np.uint8)
            row, column = divmod(int(large.argmax()), width)
            _, _, _, (x, y, wide, high) = cv2.floodFill(mask, None, (column, row), 2, flags=8)
            box: Any = hot_box(hot, (height, width), threshold, placement)
            assert_allclose(box, (x, y, x + wide, y + high), atol=1, err_msg=f"{placement} {hot.shape}")


def test_the_explanation_of_a_row_of_pixels_is_placed_too(noise: Any) -> None:
    pixels: NDArray[np.uint8] = noise(1, 400)
    for sizing in FITS.values():
        explained = explain_red(pixels, sizing)
        assert explained.overlay(0).shape == pixels.shape
