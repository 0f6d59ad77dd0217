import io

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from gradcam_worker.gradcam.imaging.animation import MAX_PIXELS, MAX_SIDE, MIN_EDGE, animate, as_frame
from gradcam_worker.gradcam.imaging.overlay import overlay
from gradcam_worker.gradcam.imaging.sheet import with_title

KINDS = ("gif", "webp")


def frames(count: int) -> list[NDArray[np.uint8]]:
    """Titled overlays on a smooth photo, with a moving hot spot."""
    y, x = np.mgrid[:120, :240]
    photo = np.stack([x, y * 2, 255 - x], -1).astype(np.uint8)
    spots = np.eye(max(count, 4), dtype=np.float32)[:count]
    return [with_title(f"{n} pier {n}.0 %", overlay(photo, spot[np.newaxis])) for n, spot in enumerate(spots)]


def decode_animation(data: bytes) -> tuple[Image.Image, list[NDArray[np.uint8]], list[int]]:
    """The animation, its frames (height, width, 3), and the duration of each in milliseconds."""
    image = Image.open(io.BytesIO(data))
    decoded_frames, durations = [], []
    for frame in ImageSequence.Iterator(image):
        decoded_frames.append(np.asarray(frame.convert("RGB")))
        durations.append(frame.info["duration"])
    return image, decoded_frames, durations


@pytest.mark.parametrize("kind", KINDS)
class TestAnimation:
    def test_it_repeats_all_frames_each_for_its_duration(self, kind: str) -> None:
        originals = frames(4)
        image, decoded_frames, durations = decode_animation(animate(originals, kind=kind, frame_s=1.25))
        assert image.format == kind.upper()
        assert durations == [1250] * 4
        assert image.info["loop"] == 0
        assert [frame.shape for frame in decoded_frames] == [frame.shape for frame in originals]

    def test_its_colors_are_those_of_the_frames(self, kind: str) -> None:
        originals = frames(4)
        _, decoded_frames, _ = decode_animation(animate(originals, kind=kind, frame_s=1))
        for original, decoded in zip(originals, decoded_frames, strict=True):
            assert np.abs(original.astype(int) - decoded).mean() < 8
            blurred = [cv2.blur(frame.astype(np.float32), (9, 9)) for frame in (original, decoded)]
            assert np.abs(blurred[0] - blurred[1]).mean() < 1, "dithering keeps the mean of an area"
            assert np.abs(blurred[0] - blurred[1]).max() < 20

    def test_titles_stay_black_on_white(self, kind: str) -> None:
        originals = frames(3)
        _, decoded_frames, _ = decode_animation(animate(originals, kind=kind, frame_s=1))
        for original, decoded in zip(originals, decoded_frames, strict=True):
            title = slice(0, original.shape[0] - 120)
            assert decoded[title].min() < 40
            assert np.median(decoded[title]) >= 250
            assert ((original[title] < 128) == (decoded[title] < 128)).mean() > 0.97

    def test_the_same_frames_give_the_same_bytes(self, kind: str) -> None:
        assert animate(frames(3), kind=kind, frame_s=1) == animate(frames(3), kind=kind, frame_s=1)

    def test_a_frame_of_one_color_keeps_it(self, kind: str) -> None:
        white, grey = (np.full((20, 30, 3), level, np.uint8) for level in (255, 90))
        _, decoded_frames, _ = decode_animation(animate([white, grey], kind=kind, frame_s=1))
        assert [
            np.abs(frame.astype(int) - level).max() <= 1
            for frame, level in zip(decoded_frames, (255, 90), strict=True)
        ]

    def test_a_single_frame_is_enough(self, kind: str) -> None:
        _, decoded_frames, _ = decode_animation(animate(frames(1), kind=kind, frame_s=1))
        assert len(decoded_frames) == 1


def test_all_frames_of_a_gif_share_one_palette() -> None:
    data = animate(frames(4), kind="gif", frame_s=1)
    assert data[10] & 0x80, "a global palette"
    assert _local_palettes(data) == [False] * 4


def _local_palettes(data: bytes) -> list[bool]:
    """Whether each frame of a GIF has its own palette, beside the global one of 256 colours."""
    has_palette, position = [], 13 + 3 * 256
    while data[position] != 0x3B:  # the trailer
        if data[position] == 0x2C:  # an image: its descriptor ends with flags
            has_palette.append(bool(data[position + 9] & 0x80))
            position += 10 + (3 * 2 ** (data[position + 9] % 8 + 1) if has_palette[-1] else 0) + 1
        else:  # an extension
            position += 2
        while data[position]:
            position += data[position] + 1
        position += 1
    return has_palette


class TestFrameSize:
    @pytest.mark.parametrize(
        ("source", "edge", "expected"),
        [
            ((3000, 4000), 640, (480, 640)),
            ((300, 400), 640, (300, 400)),
            ((16, 16), 640, (MIN_EDGE, MIN_EDGE)),
            ((16, 16), 100, (100, 100)),
            ((4000, 300), 640, (640, 48)),
            ((1, 30_000), 32_767, (1, MAX_SIDE)),
        ],
    )
    def test_a_frame_stays_within_its_edge_and_a_tiny_image_is_enlarged(
        self, source: tuple[int, int], edge: int, expected: tuple[int, int]
    ) -> None:
        assert as_frame(np.zeros((*source, 3), np.uint8), edge, 3).shape == (*expected, 3)

    def test_many_large_frames_are_shrunk_to_fit_into_memory(self) -> None:
        height, width, _ = as_frame(np.zeros((3000, 4000, 3), np.uint8), 32_767, 50).shape
        assert 0.99 * MAX_PIXELS < 50 * height * width < 1.01 * MAX_PIXELS
        assert width / height == pytest.approx(4 / 3, abs=0.01)
