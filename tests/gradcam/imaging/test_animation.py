import io

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from gradcam_worker.gradcam.imaging.animation import LEAST, LONGEST, PIXELS, animate, as_frame
from gradcam_worker.gradcam.imaging.overlay import overlay
from gradcam_worker.gradcam.imaging.sheet import framed

KINDS = ("gif", "webp")


def frames(count: int) -> list[NDArray[np.uint8]]:
    """Overlays over a soft photo, with titles, the hot spot moving."""
    y, x = np.mgrid[:120, :240]
    photo = np.stack([x, y * 2, 255 - x], -1).astype(np.uint8)
    spots = np.eye(max(count, 4), dtype=np.float32)[:count]
    return [framed(f"{n} pier {n}.0 %", overlay(photo, spot[np.newaxis])) for n, spot in enumerate(spots)]


def decoded(data: bytes) -> tuple[Image.Image, list[NDArray[np.uint8]], list[int]]:
    """The picture, its frames (height, width, 3), and for how many milliseconds each is shown."""
    picture = Image.open(io.BytesIO(data))
    shown, durations = [], []
    for frame in ImageSequence.Iterator(picture):
        shown.append(np.asarray(frame.convert("RGB")))
        durations.append(frame.info["duration"])
    return picture, shown, durations


@pytest.mark.parametrize("kind", KINDS)
class TestAnAnimation:
    def test_it_shows_every_frame_for_its_time_and_for_ever(self, kind: str) -> None:
        made = frames(4)
        picture, shown, durations = decoded(animate(made, kind=kind, frame_s=1.25))
        assert picture.format == kind.upper()
        assert durations == [1250] * 4
        assert picture.info["loop"] == 0
        assert [frame.shape for frame in shown] == [frame.shape for frame in made]

    def test_its_colors_are_those_of_the_frames(self, kind: str) -> None:
        made = frames(4)
        _, shown, _ = decoded(animate(made, kind=kind, frame_s=1))
        for given, found in zip(made, shown, strict=True):
            assert np.abs(given.astype(int) - found).mean() < 8
            near = [cv2.blur(frame.astype(np.float32), (9, 9)) for frame in (given, found)]
            assert np.abs(near[0] - near[1]).mean() < 1, "dithering keeps the mean of an area"
            assert np.abs(near[0] - near[1]).max() < 20

    def test_titles_stay_black_on_white(self, kind: str) -> None:
        made = frames(3)
        _, shown, _ = decoded(animate(made, kind=kind, frame_s=1))
        for given, found in zip(made, shown, strict=True):
            title = slice(0, given.shape[0] - 120)
            assert found[title].min() < 40
            assert np.median(found[title]) >= 250
            assert ((given[title] < 128) == (found[title] < 128)).mean() > 0.97

    def test_the_same_frames_give_the_same_bytes(self, kind: str) -> None:
        assert animate(frames(3), kind=kind, frame_s=1) == animate(frames(3), kind=kind, frame_s=1)

    def test_a_frame_of_one_color_keeps_it(self, kind: str) -> None:
        white, grey = (np.full((20, 30, 3), level, np.uint8) for level in (255, 90))
        _, shown, _ = decoded(animate([white, grey], kind=kind, frame_s=1))
        assert [
            np.abs(frame.astype(int) - level).max() <= 1
            for frame, level in zip(shown, (255, 90), strict=True)
        ]

    def test_one_frame_is_enough(self, kind: str) -> None:
        _, shown, _ = decoded(animate(frames(1), kind=kind, frame_s=1))
        assert len(shown) == 1


def test_all_frames_of_a_gif_share_one_palette() -> None:
    data = animate(frames(4), kind="gif", frame_s=1)
    assert data[10] & 0x80, "a global palette"
    assert _local_palettes(data) == [False] * 4


def _local_palettes(data: bytes) -> list[bool]:
    """Walk the blocks of a GIF with a palette of 256 colours: which frames have a palette of their own?"""
    found, at = [], 13 + 3 * 256
    while data[at] != 0x3B:  # the trailer
        if data[at] == 0x2C:  # an image: its descriptor ends with flags
            found.append(bool(data[at + 9] & 0x80))
            at += 10 + (3 * 2 ** (data[at + 9] % 8 + 1) if found[-1] else 0) + 1
        else:  # an extension
            at += 2
        while data[at]:
            at += data[at] + 1
        at += 1
    return found


class TestThePhotoInAFrame:
    @pytest.mark.parametrize(
        ("source", "edge", "shown"),
        [
            ((3000, 4000), 640, (480, 640)),
            ((300, 400), 640, (300, 400)),
            ((16, 16), 640, (LEAST, LEAST)),
            ((16, 16), 100, (100, 100)),
            ((4000, 300), 640, (640, 48)),
            ((1, 30_000), 32_767, (1, LONGEST)),
        ],
    )
    def test_it_is_within_its_edge_and_a_tiny_one_is_enlarged(
        self, source: tuple[int, int], edge: int, shown: tuple[int, int]
    ) -> None:
        assert as_frame(np.zeros((*source, 3), np.uint8), edge, 3).shape == (*shown, 3)

    def test_many_large_frames_are_made_smaller_so_that_they_fit_into_memory(self) -> None:
        height, width, _ = as_frame(np.zeros((3000, 4000, 3), np.uint8), 32_767, 50).shape
        assert 0.99 * PIXELS < 50 * height * width < 1.01 * PIXELS
        assert width / height == pytest.approx(4 / 3, abs=0.01)
