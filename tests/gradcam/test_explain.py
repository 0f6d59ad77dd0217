from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image

from gradcam_worker.errors import (
    ImageDecodeFailed,
    ImagePixelsExceeded,
    InvalidJob,
    NetworkIncompatible,
    UnknownClass,
    UnknownLayer,
    UnsupportedMediaType,
)
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.decoding.structure import Damage
from gradcam_worker.gradcam.explain import Explanation, Prediction, explain_image, explain_pixels, file_name
from gradcam_worker.gradcam.imaging.overlay import encode, overlay
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method
from gradcam_worker.testing import TinyNetwork


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    """16 x 16: the upper left quarter bright red, the lower half dark green, no blue."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, :8, 0] = 255
    pixels[8:, :, 1] = 51
    return pixels


def is_same(one: Explanation, other: Explanation) -> bool:
    pairs = zip(vars(one).items(), vars(other).items(), strict=True)
    return all(
        first == second if isinstance(first, str) else np.array_equal(first, second)
        for (_, first), (_, second) in pairs
    )


def test_an_explanation_is_shown_in_one_short_line(tiny: TinyNetwork, pixels: NDArray[np.uint8]) -> None:
    shown = repr(explain_image(tiny, pixels, classes=["red", "green"]))
    assert shown.startswith(
        "Explained(network='efficientnet_lite0', layer='blocks', explained=['0 red 47.4 %', "
    )
    assert shown.endswith("heatmaps=(2, 4, 4))")
    assert len(shown) < 200
    explanation = explain_pixels(tiny, fit(pixels, (16, 16))[np.newaxis], [(-1,)])[0]
    assert repr(explanation).startswith("Explanation(")
    decoded = decode(encode(pixels))
    assert (
        repr(decoded)
        == "Decoded(pixels=uint8(16, 16, 3), media_type='image/jpeg', damage=None, converted_from=None)"
    )


@pytest.mark.parametrize("classes", ["red", b"red"])
def test_a_single_class_instead_of_a_list_is_refused(
    tiny: TinyNetwork, pixels: NDArray[np.uint8], classes: Any
) -> None:
    with pytest.raises(InvalidJob, match=r"classes is a list, as in \[b?'red'\]"):
        explain_image(tiny, pixels, classes=classes)


class TestKnownAnswer:
    def test_the_heatmap_is_where_the_color_of_the_class_is(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8]
    ) -> None:
        explanation = explain_image(tiny, pixels, classes=["red", "green"])
        quarter, half = np.zeros((2, 4, 4), np.float32)
        quarter[:2, :2] = half[2:] = 1
        assert_array_equal(explanation.heatmaps, [quarter, half])

    def test_raw_extremes_are_those_before_the_relu(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8]
    ) -> None:
        explanation = explain_image(tiny, pixels, classes=["red", "green", "blue"])
        assert_allclose(explanation.raw_max, [2 / 16, 0.4 / 16, 0], rtol=1e-6)
        assert_allclose(explanation.raw_min, [-0.2 / 16, -1 / 16, -1 / 16], rtol=1e-6)

    def test_probabilities_are_the_softmax_over_all_classes(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8]
    ) -> None:
        explanation = explain_image(tiny, pixels, top_n=3)
        red, green = 1 / 4, 0.2 / 2  # means over the image
        powers = np.exp([2 * red - green, 2 * green - red, -red - green])
        assert [prediction.name for prediction in explanation.predictions] == ["red", "green", "blue"]
        assert_allclose(
            [prediction.probability for prediction in explanation.predictions],
            powers / powers.sum(),
            rtol=1e-5,
        )

    def test_huge_scores_have_probabilities_too(self, pixels: NDArray[np.uint8]) -> None:
        class LargeScores(TinyNetwork):
            KERNEL = TinyNetwork.KERNEL * 1e4

        explanation = explain_image(LargeScores(), pixels, top_n=3)
        assert [prediction.probability for prediction in explanation.predictions] == [1, 0, 0]


class TestSelection:
    def test_classes_are_explained_in_the_requested_order(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8]
    ) -> None:
        explanation = explain_image(tiny, pixels, classes=["blue", 0])
        assert [
            (prediction.rank, prediction.id, prediction.wnid, prediction.name)
            for prediction in explanation.explained
        ] == [
            (3, 2, "n3", "blue"),
            (1, 0, "n1", "red"),
        ]

    def test_the_top_n_are_both_predicted_and_explained(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8]
    ) -> None:
        explanation = explain_image(tiny, pixels, top_n=2)
        assert explanation.explained == explanation.predictions
        assert [prediction.rank for prediction in explanation.explained] == [1, 2]
        assert explanation.heatmaps.shape == (2, 4, 4)

    def test_predictions_are_reported_in_addition_to_listed_classes(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8]
    ) -> None:
        explanation = explain_image(tiny, pixels, classes=["blue"])
        assert [prediction.name for prediction in explanation.predictions] == ["red", "green", "blue"]

    def test_unknown_classes_ranks_and_layers_are_refused(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8]
    ) -> None:
        with pytest.raises(UnknownClass, match="yellow"):
            explain_image(tiny, pixels, classes=["yellow"])
        with pytest.raises(InvalidJob, match="from 1 to 3"):
            explain_image(tiny, pixels, top_n=4)
        with pytest.raises(UnknownLayer, match="there is 'blocks'"):
            explain_image(tiny, pixels, top_n=1, method=Method(layer="missing"))

    def test_many_images_with_different_selections_are_explained_as_each_alone(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8]
    ) -> None:
        images = np.stack([pixels, pixels[::-1], 255 - pixels])
        selections = [(-1,), (2, 0, 1), (-1, -2)]
        together = explain_pixels(tiny, images, selections)
        alone = [
            explain_pixels(tiny, images[index : index + 1], [selection])[0]
            for index, selection in enumerate(selections)
        ]
        assert (
            [len(explanation.explained) for explanation in together]
            == [len(explanation.heatmaps) for explanation in together]
            == [1, 3, 2]
        )
        assert all(map(is_same, together, alone))


class TestZeroHeatmaps:
    def test_a_class_without_evidence_is_listed_and_its_heatmap_is_zero(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8]
    ) -> None:
        explanation = explain_image(tiny, pixels, classes=["red", "blue"])
        assert explanation.zero_heatmaps == (2,)
        assert_array_equal(explanation.heatmaps[1], np.zeros((4, 4)))

    def test_a_black_image_has_only_heatmaps_of_zeros(self, tiny: TinyNetwork) -> None:
        explanation = explain_image(tiny, np.zeros((9, 9, 3), np.uint8), top_n=3)
        assert explanation.zero_heatmaps == (0, 1, 2)
        assert not explanation.heatmaps.any()
        assert [round(prediction.probability, 5) for prediction in explanation.explained] == [0.33333] * 3


class TestImages:
    def test_a_path_bytes_and_pixels_are_explained_alike(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        data = cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()
        path = tmp_path / "image.png"
        path.write_bytes(data)
        explanations = [explain_image(tiny, image, top_n=3) for image in (pixels, data, path, str(path))]
        assert all(is_same(explanations[0], other) for other in explanations[1:])
        assert all((explanation.picture == pixels).all() for explanation in explanations)

    def test_a_large_jpeg_is_explained_as_its_pixels_are(self, tiny: TinyNetwork) -> None:
        noise = np.random.default_rng(4).choice([0, 255], (640, 480, 3)).astype(np.uint8)
        data = cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
        explanation = explain_image(tiny, data, top_n=3)
        assert is_same(explanation, explain_image(tiny, decode(data).pixels, top_n=3))
        assert explanation.picture.shape == (640, 480, 3)

    def test_the_damage_of_an_image_is_reported(self, tiny: TinyNetwork) -> None:
        data = cv2.imencode(".jpg", np.full((64, 64, 3), 200, np.uint8))[1].tobytes()
        assert explain_image(tiny, data, top_n=1).damage is None
        damage = explain_image(tiny, data[:-2], top_n=1).damage
        assert damage == Damage(0, "its end marker is missing")
        with pytest.raises(ImageDecodeFailed):
            explain_image(tiny, data[:-20], top_n=1, limits=Limits(max_damage=0))

    def test_the_limits_hold_for_encoded_images(self, tiny: TinyNetwork, pixels: NDArray[np.uint8]) -> None:
        data = cv2.imencode(".png", pixels)[1].tobytes()
        with pytest.raises(ImagePixelsExceeded, match="at most 255 pixels"):
            explain_image(tiny, data, top_n=1, limits=Limits(max_pixels=255))

    def test_the_overlay_has_the_size_of_the_image_and_not_of_the_network(self, tiny: TinyNetwork) -> None:
        pixels = np.full((30, 50, 3), (255, 0, 0), np.uint8)
        explanation = explain_image(tiny, pixels, top_n=1)
        assert_array_equal(
            explanation.overlay(0, alpha=0.7, colormap="magma"),
            overlay(pixels, explanation.heatmaps[0], alpha=0.7, colormap="magma"),
        )

    def test_saving_writes_one_jpeg_for_each_explained_class(
        self, tiny: TinyNetwork, pixels: NDArray[np.uint8], tmp_path: Path
    ) -> None:
        paths = explain_image(tiny, pixels, classes=["blue", "red"]).save(tmp_path / "new" / "folder")
        assert [path.name for path in paths] == ["overlay-3-2-blue.jpg", "overlay-1-0-red.jpg"]
        assert all(decode(path.read_bytes()).pixels.shape == (16, 16, 3) for path in paths)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("go-kart", "overlay-2-573-go-kart.jpg"),
        ("jack-o'-lantern", "overlay-2-573-jack-o_-lantern.jpg"),
        ("../../etc/passwd", "overlay-2-573-______etc_passwd.jpg"),
        ("x" * 300, f"overlay-2-573-{'x' * 60}.jpg"),
    ],
)
def test_the_name_of_an_overlay_is_safe_for_any_file_system(name: str, expected: str) -> None:
    assert file_name("overlay", Prediction(2, 573, "n1", name, 0.5)) == expected


@pytest.mark.parametrize("broken", ["scores", "raw"])
def test_a_network_that_computes_nan_is_refused(broken: str) -> None:
    class Broken(TinyNetwork):
        def compute(
            self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
        ) -> Computed:
            computed = super().compute(pixels, wanted, method)
            return replace(computed, **{broken: np.full_like(getattr(computed, broken), np.nan)})

    with pytest.raises(NetworkIncompatible, match="are no numbers"):
        explain_pixels(Broken(), np.zeros((1, 16, 16, 3), np.uint8), [(0,)])


@pytest.mark.parametrize("name", [np.int64(2), "2", " 2 ", "blue", "n3"])
def test_a_class_may_be_named_by_id_number_name_or_wnid(name: Any) -> None:
    assert TinyNetwork.labels.select(classes=[name]) == (2,)


@pytest.mark.parametrize("name", [-1, 3, True, "-1", "1.0"])
def test_what_names_no_class_is_refused(name: Any) -> None:
    with pytest.raises(UnknownClass):
        TinyNetwork.labels.select(classes=[name])


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_an_array_that_is_no_image_is_refused_with_its_shape(pixels: Any) -> None:
    with pytest.raises(UnsupportedMediaType, match=r"must be \(height, width, 3\) uint8 RGB; this one is \("):
        explain_image(TinyNetwork(), pixels, top_n=1)


@pytest.mark.parametrize("image", [Image.new("RGB", (8, 8)), [[[0, 0, 0]]], None])
def test_what_is_no_path_bytes_or_array_is_refused_with_what_would_be_right(image: Any) -> None:
    with pytest.raises(UnsupportedMediaType, match=rf"this is a {type(image).__name__}\. .* np\.asarray"):
        explain_image(TinyNetwork(), image, top_n=1)


@pytest.mark.parametrize("name", ["x" * 300, "\U00020000" * 300, "ü" * 61, "a/b\\c"])
def test_a_file_name_fits_every_file_system(name: str, tmp_path: Path) -> None:
    written = file_name("overlay", Prediction(1000, 999, "", name, 0.5), "webp")
    assert len(written.encode()) <= 255
    (tmp_path / written).touch()
    assert [path.name for path in tmp_path.iterdir()] == [written]


def test_an_image_of_many_channels_is_resized_to_the_input_of_its_network() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 9), np.uint8)
    fitted = fit(pixels, (16, 16))
    assert fitted.shape == (16, 16, 9)
    for channel in range(9):
        assert_array_equal(
            fitted[..., channel : channel + 1], fit(pixels[..., channel : channel + 1], (16, 16))
        )
