"""Each formula against an independent one in plain loops, in float64; and on real networks."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from worker.errors import InvalidJob
from worker.gradcam import cam
from worker.gradcam.decode import decode
from worker.gradcam.explain import explain_image
from worker.gradcam.network import Method
from worker.gradcam.picture import fit
from worker.testing import TinyNetwork

Floats = NDArray[np.float64]
METHODS = sorted(cam.METHODS)
SHAPE = (3, 4, 5)  # rows, columns, channels


def by_hand(name: str, a: Floats, g: Floats) -> Floats:
    """One map (rows, columns) of one image and class, a position and a channel at a time."""
    rows, columns, channels = a.shape
    places = list(product(range(rows), range(columns)))
    result = np.zeros((rows, columns))
    for c in range(channels):
        if name in {"gradcam", "counterfactual"}:
            weight = sum(g[i, j, c] for i, j in places) / len(places)
            weight = -weight if name == "counterfactual" else weight
        elif name == "gradcam++":
            total, weight = sum(a[i, j, c] for i, j in places), 0.0
            for i, j in places:
                below = 2 * g[i, j, c] ** 2 + total * g[i, j, c] ** 3
                weight += (g[i, j, c] ** 2 / below if below else 0) * max(g[i, j, c], 0)
        elif name == "xgradcam":
            total = sum(a[i, j, c] for i, j in places)
            weight = sum(a[i, j, c] / total * g[i, j, c] for i, j in places) if total else 0.0
        for i, j in places:
            if name == "hirescam":
                weight = g[i, j, c]
            elif name == "layercam":
                weight = max(g[i, j, c], 0)
            result[i, j] += weight * a[i, j, c]
    return result


def example() -> tuple[Floats, Floats]:
    """Activations of 2 images, one channel of them dark, and gradients of 3 classes, some of them zero."""
    rng = np.random.default_rng(11)
    activations = np.maximum(rng.normal(size=(2, *SHAPE)), 0)
    activations[0, :, :, 2] = 0
    gradients = rng.normal(size=(3, 2, *SHAPE))
    gradients[1, 0] = 0
    gradients[:, :, 0, 0] = 0
    return activations, gradients


@pytest.mark.parametrize("name", METHODS)
def test_a_formula_is_what_its_paper_says(name: str) -> None:
    activations, gradients = example()
    raw = cam.METHODS[name](np, activations, gradients)
    assert raw.shape == (2, 3, 3, 4)
    for image, one in product(range(2), range(3)):
        expected = by_hand(name, activations[image], gradients[one, image])
        assert_allclose(raw[image, one], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_where_there_is_nothing_there_is_zero_and_never_nan(name: str) -> None:
    activations, gradients = example()
    for a, g in ((activations * 0, gradients), (activations, gradients * 0)):
        assert_array_equal(np.abs(cam.METHODS[name](np, a, g)), 0)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"gradcam++"}))
def test_scaling_the_score_changes_no_heatmap(name: str) -> None:
    activations, gradients = example()
    once, seven = (cam.METHODS[name](np, activations, gradients * factor) for factor in (1, 7))
    assert_allclose(cam.heatmaps(once[0]), cam.heatmaps(seven[0]), atol=1e-6)


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", METHODS)
def test_the_device_computes_the_same_as_numpy(name: str) -> None:
    import keras

    activations, gradients = example()
    on_device = cam.METHODS[name](keras.ops, activations.astype("float32"), gradients.astype("float32"))
    expected = cam.METHODS[name](np, activations, gradients)
    assert_allclose(np.asarray(on_device), expected, atol=1e-4 * np.abs(expected).max())


def test_normalizing_jointly_keeps_the_classes_comparable() -> None:
    raw = np.array([[[4.0, -1.0]], [[1.0, 2.0]]], np.float32)
    assert_array_equal(cam.heatmaps(raw, "per_class"), [[[1, 0]], [[0.5, 1]]])
    assert_array_equal(cam.heatmaps(raw, "joint"), [[[1, 0]], [[0.25, 0.5]]])
    assert_array_equal(cam.heatmaps(raw, "none"), [[[4, 0]], [[1, 2]]])
    assert_array_equal(cam.heatmaps(raw * 0, "joint"), raw * 0)


def test_maps_that_are_not_normalized_are_colored_by_their_joint_peak() -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8, :, 0], picture[8:, :, 2] = 255, 128
    joint, none = (
        explain_image(TinyNetwork(), picture, classes=["red", "blue"], method=Method(normalize=normalize))
        for normalize in ("joint", "none")
    )
    assert none.heatmaps.max() == none.raw_max.max()
    assert_allclose(none.shown, joint.heatmaps, atol=1e-6)
    assert_array_equal(none.overlay(1), joint.overlay(1))


@pytest.mark.parametrize("wrong", ["lime", Method("lime"), Method(score="loss"), Method(normalize="max")])
def test_what_is_no_method_is_refused_with_those_there_are(wrong: Method | str) -> None:
    with pytest.raises(InvalidJob, match=r"is none of .*, "):
        explain_image(TinyNetwork(), np.zeros((4, 4, 3), np.uint8), top_n=1, method=wrong)


@pytest.mark.tensorflow
class TestOnPhotos:
    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_sees_the_helmet_and_the_counterfactual_everything_else(
        self, name: str, lite0: Any, photos: Any
    ) -> None:
        seen = explain_image(lite0, photos / "astronaut.jpg", classes=[560], method=name)
        heatmap = seen.heatmaps[0]
        assert np.isfinite(heatmap).all()
        assert heatmap.max() == 1
        row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
        on_helmet = bool(row >= 4 and column >= 3)
        assert on_helmet == (name != "counterfactual")

    def test_the_probability_gives_the_map_of_its_logarithm(self, lite0: Any, photos: Any) -> None:
        """d log p / d A is d y / d A less the mean of all d y' / d A, weighted by their probabilities."""
        photo = (photos / "chelsea.jpg").read_bytes()
        pixels = fit(decode(photo).pixels, (224, 224))[np.newaxis]
        wanted = np.arange(1000, dtype=np.int32)[np.newaxis]
        scores = lite0.compute(pixels, wanted)
        explained = lite0.compute(pixels, np.array([[285, 282]], np.int32), Method(score="probability"))
        probabilities = np.exp(scores.scores[0] - scores.scores[0].max())
        probabilities /= probabilities.sum()
        mean = np.tensordot(probabilities, scores.raw[0], 1)
        for index, one in enumerate((285, 282)):
            expected = scores.raw[0, one] - mean
            assert_allclose(explained.raw[0, index], expected, atol=1e-4 * np.abs(expected).max())
