"""The input of a network is what its owner's tool makes of the photo."""

import io
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageOps

from gradcam_worker.errors import ImagePixelsExceeded
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.imaging import network_input
from gradcam_worker.gradcam.imaging.network_input import (
    OPENCV_FILTERS,
    PILLOW_FILTERS,
    to_input,
)
from gradcam_worker.gradcam.imaging.resize import Pixels, fit
from gradcam_worker.gradcam.sizing import FRACTIONAL_RESIZES, SIZINGS, Sizing

FILTERS = {**PILLOW_FILTERS, "nearest": Image.Resampling.NEAREST}
SIZES = [(224, 224), (96, 128), (299, 331), (700, 500), (31, 900)]


@pytest.fixture(scope="module")
def photo(photos: Path) -> Pixels:
    return decode((photos / "coffee.jpg").read_bytes()).pixels


def traced_bytes(call: Callable[[], object]) -> int:
    """The most memory that a call takes at once."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class TestSquash:
    @pytest.mark.parametrize("size", SIZES)
    def test_the_default_is_what_it_always_was(self, size: tuple[int, int], photo: Pixels) -> None:
        assert_array_equal(to_input(photo, size, Sizing()), fit(photo, size))

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("resize", sorted(FILTERS))
    def test_pillows_filters_give_what_pillow_gives(
        self, resize: Any, size: tuple[int, int], photo: Pixels
    ) -> None:
        expected = Image.fromarray(photo).resize(size[::-1], FILTERS[resize])
        assert_array_equal(to_input(photo, size, Sizing(resize)), np.asarray(expected))

    @pytest.mark.parametrize("size", SIZES)
    def test_opencv_is_opencvs_default(self, size: tuple[int, int], photo: Pixels) -> None:
        assert_array_equal(to_input(photo, size, SIZINGS["opencv"]), cv2.resize(photo, size[::-1]))

    @pytest.mark.tensorflow
    @pytest.mark.parametrize("size", SIZES)
    def test_load_img_of_keras_is_reproduced(
        self, size: tuple[int, int], photos: Path, tmp_path: Path, photo: Pixels
    ) -> None:
        import keras

        path = tmp_path / "photo.png"
        Image.fromarray(photo).save(path)
        expected = np.asarray(keras.utils.load_img(path, target_size=size))
        assert_array_equal(to_input(photo, size, SIZINGS["keras.load_img"]), expected)

    @pytest.mark.tensorflow
    @pytest.mark.parametrize("size", SIZES)
    def test_image_resize_of_tensorflow_is_reproduced_with_its_fractions(
        self, size: tuple[int, int], photo: Pixels
    ) -> None:
        import tensorflow as tf

        expected = tf.image.resize(photo, size).numpy()
        made = to_input(photo, size, SIZINGS["tf.image.resize"])
        assert made.dtype == np.float32
        assert_allclose(made, expected, atol=1e-3)

    @pytest.mark.tensorflow
    @pytest.mark.parametrize("decoder", ["decode_jpeg", "decode_image"])
    def test_a_photo_is_what_image_dataset_from_directory_makes_of_its_file(
        self, decoder: str, photos: Path
    ) -> None:
        import tensorflow as tf

        sizing, file = SIZINGS["image_dataset_from_directory"], (photos / "coffee.jpg").read_bytes()
        expected = tf.image.resize(getattr(tf.io, decoder)(file, channels=3), (96, 128)).numpy()
        pixels = decode(file, Limits(fast_jpeg=sizing.fast_jpeg)).pixels
        assert_allclose(to_input(pixels, (96, 128), sizing), expected, atol=1e-3)
        assert np.abs(to_input(decode(file).pixels, (96, 128), sizing) - expected).max() > 1

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("resize", sorted(OPENCV_FILTERS))
    def test_opencvs_filters_give_what_opencv_gives(
        self, resize: Any, size: tuple[int, int], photo: Pixels
    ) -> None:
        expected = cv2.resize(photo, size[::-1], interpolation=OPENCV_FILTERS[resize])
        assert_array_equal(to_input(photo, size, Sizing(resize)), expected)

    @pytest.mark.tensorflow
    @pytest.mark.parametrize("size", SIZES)
    def test_resize_bilinear_of_tensorflow_1_is_reproduced_with_its_fractions(
        self, size: tuple[int, int], photo: Pixels
    ) -> None:
        import tensorflow as tf

        expected = tf.compat.v1.image.resize_bilinear(photo[np.newaxis], size).numpy()[0]
        assert_allclose(to_input(photo, size, Sizing("bilinear_tf1")), expected, atol=1e-3)

    @pytest.mark.parametrize(
        ("column", "size", "expected"),
        [  # skimage.transform.resize(column * 255, (size, 1)) of scikit-image 0.26, rounded
            ([0, 255, 40, 200, 10, 90, 250, 30], 3, [139.933, 98.61, 151.66]),
            ([0, 255, 40, 200], 7, [54.643, 91.071, 236.786, 147.5, 51.429, 142.857, 165.714]),
            ([5, 100, 7, 201, 250], 5, [5, 100, 7, 201, 250]),
            ([10, 200], 1, [105]),
            ([9], 3, [9, 9, 9]),
            ([*range(0, 250, 11)], 4, [30.544, 89.378, 152.622, 211.456]),
        ],
    )
    def test_resize_of_scikit_image_is_reproduced(
        self, column: list[int], size: int, expected: list[float]
    ) -> None:
        pixels = np.array(column, np.uint8).reshape(-1, 1, 1)
        made = to_input(pixels, (size, 1), Sizing("skimage"))
        assert made.dtype == np.float32
        assert_allclose(made.ravel(), expected, atol=1e-3)

    @pytest.mark.parametrize("side", [1, 2, 40, 301])
    @pytest.mark.parametrize("sizing", [Sizing("skimage"), Sizing("skimage", "crop", crop_fraction=0.5)])
    def test_strips_of_rows_change_nothing(
        self, sizing: Sizing, side: int, noise: Callable[..., Pixels], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pixels = noise(side, 57)
        monkeypatch.setattr(network_input, "STRIP_PIXELS", 2**40)
        whole = to_input(pixels, (50, 50), sizing)
        monkeypatch.setattr(network_input, "STRIP_PIXELS", 1)
        assert_array_equal(to_input(pixels, (50, 50), sizing), whole)

    @pytest.mark.parametrize("resize", FRACTIONAL_RESIZES)
    def test_a_large_photo_takes_less_memory_than_its_own_pixels(
        self, resize: Any, noise: Callable[..., Pixels]
    ) -> None:
        pixels = noise(1600, 1200)
        assert traced_bytes(lambda: to_input(pixels, (64, 64), Sizing(resize))) < pixels.nbytes

    def test_a_photo_that_is_recompressed_is_what_pillow_writes_and_reads(self, photo: Pixels) -> None:
        file = io.BytesIO()
        resized = Image.fromarray(photo).resize((80, 80), Image.Resampling.BILINEAR)
        resized.save(file, "JPEG", quality=75)
        expected = np.asarray(Image.open(file))[8:72, 8:72]
        sizing = Sizing("bilinear_antialias", "crop", size=(80, 80), recompress=75)
        assert_array_equal(to_input(photo, (64, 64), sizing), expected)
        assert_array_equal(
            to_input(photo, (64, 64), replace(sizing, grey=True))[..., 0],
            to_input(photo, (64, 64), replace(sizing, grey=True))[..., 2],
        )
        assert to_input(photo, (64, 64), Sizing("bilinear_tf", recompress=50)).dtype == np.uint8

    def test_a_photo_of_the_networks_size_has_the_type_that_the_network_takes(
        self, noise: Callable[..., Pixels]
    ) -> None:
        pixels = noise(24, 32)
        made = to_input(pixels, (24, 32), Sizing("bilinear_tf"))
        assert made.dtype == np.float32
        assert_array_equal(made, pixels)

    @pytest.mark.tensorflow
    @pytest.mark.parametrize(("grey", "order"), [("tf", 1), ("tf_bgr", -1)])
    def test_a_photo_is_made_grey_as_tensorflow_does_it(self, grey: Any, order: int, photo: Pixels) -> None:
        import tensorflow as tf

        expected = tf.image.rgb_to_grayscale(photo[..., ::order]).numpy()
        made = to_input(photo, (photo.shape[0], photo.shape[1]), Sizing("nearest", grey=grey))
        differences = np.abs(made - expected.astype(int))
        assert differences.max() <= 1
        assert (differences > 0).mean() < 1e-3  # OpenCV's levels: .36

    @pytest.mark.parametrize("sizing", [*SIZINGS.values(), Sizing(fit="letterbox")], ids=str)
    def test_a_photo_that_is_made_grey_first_is_one_grey_channel_three_times(
        self, sizing: Sizing, photo: Pixels
    ) -> None:
        grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)[..., np.newaxis]
        expected = to_input(grey, (64, 48), sizing).repeat(3, axis=2)
        assert_array_equal(to_input(photo, (64, 48), replace(sizing, grey=True)), expected)

    @pytest.mark.parametrize(
        "resize", ["area", "bilinear_tf", "bilinear_tf1", "skimage", *OPENCV_FILTERS, *FILTERS]
    )
    @pytest.mark.parametrize("channels", [1, 4, 7])
    def test_each_channel_of_any_number_is_resized_by_itself(
        self, resize: Any, channels: int, noise: Callable[..., Pixels]
    ) -> None:
        pixels = np.concatenate([noise(60, 50)] * 3, axis=2)[..., :channels]
        resized = to_input(pixels, (24, 32), Sizing(resize))
        for channel in range(channels):
            alone = to_input(pixels[..., channel : channel + 1], (24, 32), Sizing(resize))
            assert_allclose(resized[..., channel : channel + 1], alone, atol=1)

    @pytest.mark.parametrize("sizing", [*SIZINGS.values(), Sizing("lanczos", "letterbox")], ids=str)
    @pytest.mark.parametrize("size", [(32, 32), (1, 1), (1, 90), (50, 70)])
    def test_the_image_is_not_changed_nor_returned(
        self, sizing: Sizing, size: tuple[int, int], noise: Callable[..., Pixels]
    ) -> None:
        pixels = noise(*size)
        before = pixels.copy()
        made = to_input(pixels, (32, 32), sizing)
        assert made.shape == (32, 32, 3)
        assert made.dtype == (np.float32 if sizing.is_fractional else np.uint8)
        made[:] = 0
        assert_array_equal(pixels, before)


class TestCrop:
    @pytest.mark.parametrize("resize", [*FRACTIONAL_RESIZES, *OPENCV_FILTERS, *FILTERS])
    def test_a_long_and_narrow_photo_takes_little_more_memory_than_its_resized_pixels(
        self, resize: Any, noise: Callable[..., Pixels]
    ) -> None:
        pixels = noise(10, 2500)
        peak_bytes = traced_bytes(lambda: to_input(pixels, (64, 64), Sizing(resize, "crop")))
        assert peak_bytes < 5 * (64 * 16_000 * 3)

    @pytest.mark.parametrize("turned", [False, True])
    def test_torchvisions_transforms_are_reproduced(self, turned: bool, photo: Pixels) -> None:
        pixels = np.ascontiguousarray(photo.swapaxes(0, 1)) if turned else photo
        image = Image.fromarray(pixels)
        short = min(image.size)
        size = [256 if side == short else int(256 * max(image.size) / short) for side in image.size]
        resized = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        left, top = (round((side - 224) / 2.0) for side in size)
        expected = resized.crop((left, top, left + 224, top + 224))
        assert_array_equal(to_input(pixels, (224, 224), SIZINGS["torchvision"]), np.asarray(expected))

    def test_the_centre_of_a_squashed_photo_is_cut_out(self, photo: Pixels) -> None:
        expected = Image.fromarray(photo).resize((300, 256), Image.Resampling.LANCZOS)
        made = to_input(photo, (224, 224), Sizing("lanczos", "crop", size=(256, 300)))
        assert_array_equal(made, np.asarray(expected.crop((38, 16, 38 + 224, 16 + 224))))

    def test_what_opencv_resizes_has_rounded_sides(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (300, 451, 3), np.uint8)
        expected = cv2.resize(pixels, (385, 256), interpolation=cv2.INTER_LANCZOS4)[16:240, 80:304]
        made = to_input(pixels, (224, 224), Sizing("lanczos4", "crop", short_side=256))
        assert_array_equal(made, expected)

    def test_what_is_too_small_is_padded_with_black_as_by_torchvision(self) -> None:
        made = to_input(np.full((10, 20, 3), 200, np.uint8), (8, 8), Sizing(fit="crop", short_side=4))
        assert made[:, :, 0].tolist() == [[0] * 8] * 2 + [[200] * 8] * 4 + [[0] * 8] * 2

    def test_a_photo_that_is_too_long_is_refused(self) -> None:
        with pytest.raises(ImagePixelsExceeded, match="60000 x 2 pixels is too long for a centre crop"):
            to_input(np.zeros((2, 60_000, 3), np.uint8), (224, 224), SIZINGS["timm"])

    def test_a_photo_that_is_too_long_for_a_jpeg_is_refused_by_its_own_size(self) -> None:
        sizing = Sizing("nearest", "crop", recompress=75)
        with pytest.raises(ImagePixelsExceeded, match="of 2500 x 1 pixels is too long to be recompressed"):
            to_input(np.zeros((1, 2500, 3), np.uint8), (32, 32), sizing)
        assert not to_input(np.zeros((1, 2000, 3), np.uint8), (32, 32), sizing).any()
        assert to_input(np.zeros((1, 2500, 3), np.uint8), (32, 32), replace(sizing, recompress=None)).size


class TestLetterbox:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("color", [(114,), (10, 20, 30)])
    def test_it_is_pillows_pad(self, color: tuple[int, ...], size: tuple[int, int], photo: Pixels) -> None:
        expected = ImageOps.pad(
            Image.fromarray(photo), size[::-1], Image.Resampling.BICUBIC, color=color * (3 // len(color))
        )
        made = to_input(photo, size, Sizing("bicubic_antialias", "letterbox", color=color))
        assert_array_equal(made, np.asarray(expected))

    def test_a_line_of_pixels_does_not_vanish(self) -> None:
        made = to_input(np.full((1, 500, 3), 255, np.uint8), (16, 16), Sizing(fit="letterbox"))
        assert made.any()
