from collections.abc import Callable
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
    overlay,
    to_grey,
)
from gradcam_worker.gradcam.imaging.resize import Pixels

RED, WHITE = (255, 0, 0), (255, 255, 255)


def plain(color: tuple[int, int, int], height: int, width: int) -> Pixels:
    return np.full((height, width, 3), color, np.uint8)


def ramp(*values: float) -> NDArray[np.float32]:
    """A heatmap of one row."""
    return np.array([values], np.float32)


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
