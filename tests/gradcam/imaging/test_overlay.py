from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.overlay import (
    COLORMAPS,
    MAX_SIDES,
    MEDIA_TYPES,
    OverlayBase,
    colors,
    encode,
    enlarge,
    fit,
    overlay,
    shrink_to_edge,
    to_grey,
)

Pixels = NDArray[np.uint8]

RED, WHITE = (255, 0, 0), (255, 255, 255)


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


class TestOverlay:
    def test_the_hottest_is_red_and_the_coldest_blue(self) -> None:
        cold, hot = overlay(plain(WHITE, 1, 2), ramp(0, 1), alpha=1)[0]
        assert (cold.tolist(), hot.tolist()) == ([0, 0, 128], [128, 0, 0])

    @pytest.mark.parametrize("colormap", sorted(set(COLORMAPS) - {"grey"}))
    def test_every_level_has_the_color_of_its_map(self, colormap: str) -> None:
        levels = np.arange(256, dtype=np.uint8).reshape(1, 256)
        heatmap = np.asarray(levels / 255, np.float32)
        colored = overlay(plain(WHITE, 1, 256), heatmap, alpha=1, colormap=colormap)
        bgr = cv2.applyColorMap(levels, COLORMAPS[colormap] or 0)
        assert_array_equal(colored, cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB))

    def test_the_values_are_enlarged_and_not_the_colors(self) -> None:
        between = overlay(plain(WHITE, 1, 5), ramp(0, 1), alpha=1)[0, 2]
        assert between[1] > 200  # halfway, jet is green; halfway between its end colours it is dark purple

    def test_colors_and_image_are_blended_by_alpha(self) -> None:
        image, heatmap = plain((200, 100, 50), 2, 2), np.ones((2, 2), np.float32)
        blended = 0.4 * np.array([128, 0, 0]) + 0.6 * np.array([200, 100, 50])
        assert_allclose(overlay(image, heatmap), np.broadcast_to(blended, (2, 2, 3)), atol=0.51)
        assert_array_equal(overlay(image, heatmap, alpha=0), image)
        assert_array_equal(image, plain((200, 100, 50), 2, 2))

    @pytest.mark.parametrize("size", [(1, 1), (3, 50), (375, 500)])
    def test_it_has_the_size_of_the_image(self, size: tuple[int, int]) -> None:
        drawn = overlay(plain(WHITE, *size), np.eye(7, dtype=np.float32))
        assert drawn.shape == (*size, 3)
        assert drawn.dtype == np.uint8


def reference_overlay(pixels: Pixels, heatmap: NDArray[np.float32], alpha: float, colormap: str) -> Any:
    """An overlay in float64, which is rounded only to choose the colour. Returns its levels, too."""
    large = heatmap.astype(np.float64)
    for axis, length in enumerate(pixels.shape[:2]):
        cells = large.shape[axis]
        positions = (np.arange(length) + 0.5) * cells / length - 0.5
        low = np.clip(np.floor(positions), 0, cells - 1).astype(int)
        share = np.clip(positions - low, 0, 1).reshape((-1, 1) if axis == 0 else (1, -1))
        after = np.minimum(low + 1, cells - 1)
        large = large.take(low, axis) * (1 - share) + large.take(after, axis) * share
    levels = np.rint(255 * large * heatmap.max() / large.max()).astype(int)
    return levels, alpha * colors(colormap)[levels, 0].astype(float) + (1 - alpha) * pixels


@pytest.mark.parametrize("alpha", [0, 0.25, 0.4, 0.77, 1])
@pytest.mark.parametrize(("size", "colormap"), [((40, 50), "jet"), ((611, 517), "viridis"), ((7, 7), "grey")])
def test_one_base_draws_many_heatmaps_each_within_a_level_of_the_reference(
    alpha: float, size: tuple[int, int], colormap: str, noise: Callable[..., Pixels]
) -> None:
    pixels = noise(*size)
    base, bgr_base = (OverlayBase(pixels, alpha=alpha, colormap=colormap, bgr=bgr) for bgr in (False, True))
    buffer, original = np.empty_like(pixels), pixels.copy()
    for seed in range(3):
        heatmap = np.random.default_rng(seed).random((7, 7), np.float32)
        levels, expected = reference_overlay(pixels, heatmap, alpha, colormap)
        grey = to_grey(heatmap, size)
        assert np.abs(grey - levels).max() <= 1
        equal = grey == levels  # where rounding chooses the next of the 256 colours, the overlay differs
        assert equal.mean() > 0.99
        drawn = base.draw(heatmap, out=buffer)
        assert drawn is buffer
        assert np.abs(drawn - expected)[equal].max() <= 1
        assert_array_equal(bgr_base.draw(heatmap)[..., ::-1], drawn)
    assert_array_equal(pixels, original)


def test_a_dark_heatmap_has_the_coldest_color_everywhere() -> None:
    drawn = overlay(plain(WHITE, 9, 9), np.zeros((7, 7), np.float32), alpha=1)
    assert_array_equal(drawn, plain((0, 0, 128), 9, 9))


def test_bgr_pixels_are_encoded_as_they_are(noise: Callable[..., Pixels]) -> None:
    pixels = noise(16, 24)
    for kind in MEDIA_TYPES:
        assert encode(pixels[..., ::-1].copy(), kind, bgr=True) == encode(pixels, kind)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
class TestEncoding:
    def test_colors_stay_in_their_order(self, kind: str) -> None:
        decoded = decode(encode(plain((200, 100, 0), 16, 16), kind))
        assert decoded.media_type == MEDIA_TYPES[kind]
        assert_allclose(decoded.pixels, plain((200, 100, 0), 16, 16), atol=0 if kind == "png" else 4)

    def test_the_same_pixels_give_the_same_bytes(self, kind: str, noise: Callable[..., Pixels]) -> None:
        assert encode(noise(8, 8), kind) == encode(noise(8, 8), kind)


def test_a_grey_heatmap_has_one_channel_and_its_peak_is_white() -> None:
    drawn = to_grey(ramp(0, 0.5, 1), (6, 9))
    assert drawn.shape == (6, 9)
    assert (drawn.min(), drawn.max()) == (0, 255)
    assert_array_equal(decode(encode(drawn, "png")).pixels[..., 0], drawn)


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


def test_every_colormap_runs_from_its_first_color_to_its_last() -> None:
    for name in COLORMAPS:
        cold, hot = overlay(plain(WHITE, 1, 2), ramp(0, 1), alpha=1, colormap=name)[0]
        assert not np.array_equal(cold, hot)
    cold, hot = overlay(plain(WHITE, 1, 2), ramp(0, 1), alpha=1, colormap="grey")[0]
    assert (cold.tolist(), hot.tolist()) == ([0, 0, 0], [255, 255, 255])


def test_every_format_takes_as_long_a_picture_as_it_is_said_to() -> None:
    for kind, longest in MAX_SIDES.items():
        data = np.frombuffer(encode(plain(RED, 1, longest), kind), np.uint8)
        assert np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)).shape == (1, longest, 3)
