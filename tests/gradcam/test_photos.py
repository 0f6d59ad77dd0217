"""EfficientNet-Lite0 with its shipped weights on the five shipped photos: known predictions and heatmaps."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from gradcam_worker.gradcam.decoding.color import ColorSource
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.imaging.overlay import encode
from gradcam_worker.gradcam.network import Method, Network

pytestmark = pytest.mark.tensorflow
eagerly = pytest.mark.usefixtures("eagerly")  # every method and flip would be compiled

# Boxes of things in the photos: left, top, right, bottom, as shares of the width and height.
SHUTTLE, HELMET = (0.66, 0.0, 0.95, 0.56), (0.55, 0.66, 1.0, 1.0)
LEGS, CAMERA = (0.42, 0.6, 0.82, 1.0), (0.42, 0.24, 0.62, 0.45)
Box = tuple[float, float, float, float]
AS_STORED = Limits(convert_colors=False)  # as the known probabilities were computed: rocket is in Adobe RGB


def peak(heatmap: NDArray[np.float32]) -> tuple[float, float]:
    """The centre x, y of the hottest cell, as shares of the width and height."""
    rows, columns = heatmap.shape
    row, column = divmod(int(heatmap.argmax()), columns)
    return (column + 0.5) / columns, (row + 0.5) / rows


def lies_in(point: tuple[float, float], box: Box) -> bool:
    (x, y), (left, top, right, bottom) = point, box
    return left <= x <= right and top <= y <= bottom


@pytest.mark.parametrize(
    ("photo", "class_id", "name", "probability"),
    [
        ("camera", 872, "tripod", 0.95),
        ("coffee", 967, "espresso", 0.91),
        ("chelsea", 285, "Egyptian_cat", 0.81),
        ("rocket", 540, "drilling_platform", 0.54),
    ],
)
def test_the_first_prediction_is_the_known_one(
    photo: str, class_id: int, name: str, probability: float, lite0: Network, photos: Path
) -> None:
    first = explain_image(lite0, photos / f"{photo}.jpg", top_n=1, limits=AS_STORED).predictions[0]
    assert (first.rank, first.id, first.name) == (1, class_id, name)
    assert first.probability == pytest.approx(probability, abs=0.01)


@pytest.mark.parametrize(
    ("photo", "class_id", "probability", "within"),
    [
        ("rocket", 657, 0.08, 0.01),
        ("astronaut", 560, 0.17, 0.01),
        ("astronaut", 652, 0.003, 0.0005),
        ("astronaut", 812, 0.002, 0.0005),
    ],
)
def test_other_classes_have_their_known_probabilities(
    photo: str, class_id: int, probability: float, within: float, lite0: Network, photos: Path
) -> None:
    explanation = explain_image(lite0, photos / f"{photo}.jpg", classes=[class_id], limits=AS_STORED)
    assert explanation.explained[0].probability == pytest.approx(probability, abs=within)


def test_a_photo_with_a_profile_is_explained_in_srgb(lite0: Network, photos: Path) -> None:
    path = photos / "rocket.jpg"
    with Image.open(path) as photo:
        source = ImageCms.ImageCmsProfile(io.BytesIO(photo.info["icc_profile"]))
        converted = ImageCms.profileToProfile(photo, source, ImageCms.createProfile("sRGB"))
    explanation = explain_image(lite0, path, top_n=1)
    expected = explain_image(lite0, np.array(converted), top_n=1).explained[0]
    assert explanation.converted_from == ColorSource("icc", "Adobe RGB (1998)")
    assert explanation.explained[0].id == expected.id
    assert explanation.explained[0].probability == pytest.approx(expected.probability, abs=0.005)


@eagerly
@pytest.mark.parametrize(
    ("photo", "classes", "boxes"),
    [
        ("astronaut", ["space_shuttle", "football_helmet"], [SHUTTLE, HELMET]),
        ("camera", ["tripod", "reflex_camera"], [LEGS, CAMERA]),
    ],
)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("method", ["gradcam", "hirescam", "xgradcam"])
def test_the_peak_of_each_class_is_on_its_object(
    photo: str, classes: list[str], boxes: list[Box], method: str, *, flip: bool, lite0: Network, photos: Path
) -> None:
    options = Method(method, flip=flip)
    explanation = explain_image(lite0, photos / f"{photo}.jpg", classes=classes, method=options)
    assert [prediction.name for prediction in explanation.explained] == classes
    peaks = [peak(heatmap) for heatmap in explanation.heatmaps]
    assert [[lies_in(point, box) for box in boxes] for point in peaks] == [[True, False], [False, True]]


@eagerly
@pytest.mark.parametrize(
    ("photo", "class_id", "box"),
    [("astronaut", 812, SHUTTLE), ("astronaut", 560, HELMET), ("camera", 872, LEGS)],
)
@pytest.mark.parametrize("method", ["gradcam", "gradcam++", "hirescam", "xgradcam", "layercam"])
def test_with_the_probability_the_peak_is_on_the_object_for_all_methods_that_depend_on_the_class(
    photo: str, class_id: int, box: Box, method: str, lite0: Network, photos: Path
) -> None:
    """With the score alone, methods of positive gradients prefer evidence for many classes at once."""
    options = Method(method, score="probability")
    explanation = explain_image(lite0, photos / f"{photo}.jpg", classes=[class_id], method=options)
    assert lies_in(peak(explanation.heatmaps[0]), box)


def test_the_heatmap_of_one_object_is_low_on_the_other(lite0: Network, photos: Path) -> None:
    explanation = explain_image(lite0, photos / "astronaut.jpg", classes=[812, 560])
    shuttle, helmet = explanation.heatmaps
    assert helmet[:3, 5:].max() < 0.2
    assert shuttle[5:, 4:].max() < 0.2


def test_heatmaps_are_seven_by_seven_and_overlays_have_the_size_of_the_photo(
    lite0: Network, photos: Path
) -> None:
    paths = sorted(photos.iterdir())
    assert [path.stem for path in paths] == ["astronaut", "camera", "chelsea", "coffee", "rocket"]
    for path in paths:
        explanation = explain_image(lite0, path, top_n=3)
        assert explanation.heatmaps.shape == (3, 7, 7)
        assert explanation.heatmaps.max((1, 2)).tolist() == [1, 1, 1]
        assert explanation.overlay(0).shape == explanation.picture.shape


def test_the_same_photo_gives_the_same_bytes(lite0: Network, photos: Path) -> None:
    overlays = [encode(explain_image(lite0, photos / "coffee.jpg", top_n=2).overlay(1)) for _ in range(2)]
    assert overlays[0] == overlays[1]
