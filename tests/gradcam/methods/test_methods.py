"""Each formula against an independent one in plain loops, in float64; and on real networks."""

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidJob
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.explain import explain_image
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method
from gradcam_worker.testing import TinyNetwork

Floats = NDArray[np.float64]
METHODS = sorted(cam.METHODS)
CLASSLESS = {"eigencam"}  # asks neither class nor gradient
SHAPE = (3, 4, 5)  # rows, columns, channels


def plainly(name: str, a: Floats, g: Floats) -> Floats:
    """One map (rows, columns) of one image and class, a position and a channel at a time."""
    rows, columns, channels = a.shape
    if name == "eigencam":
        left, strengths, _ = np.linalg.svd(a.reshape(-1, channels))
        projected = left[:, 0] * strengths[0]
        return np.reshape(projected if projected.sum() >= 0 else -projected, (rows, columns))
    places = list(product(range(rows), range(columns)))
    result = np.zeros((rows, columns))
    for c in range(channels):
        if name in {"gradcam", "counterfactual", "notebook"}:
            weight = sum(g[i, j, c] for i, j in places) / len(places)
            weight *= {"gradcam": 1, "counterfactual": -1, "notebook": 1 / channels}[name]
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
        expected = plainly(name, activations[image], gradients[one, image])
        assert_allclose(raw[image, one], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_where_there_is_nothing_there_is_zero_and_never_nan(name: str) -> None:
    activations, gradients = example()
    assert_array_equal(np.abs(cam.METHODS[name](np, activations * 0, gradients)), 0)
    if name not in CLASSLESS:
        assert_array_equal(np.abs(cam.METHODS[name](np, activations, gradients * 0)), 0)


def test_eigencam_takes_the_smaller_gram_matrix_and_either_gives_the_same() -> None:
    """12 positions: with 5 channels the channels' matrix is the smaller, with 40 the positions'."""
    rng = np.random.default_rng(12)
    for channels in (5, 11, 12, 13, 40):
        activations = rng.normal(size=(2, 3, 4, channels))
        raw = cam.eigencam(np, activations, np.zeros((1, *activations.shape)))
        for image in range(2):
            assert_allclose(raw[image, 0], plainly("eigencam", activations[image], activations[0]))
            assert raw[image].sum() >= 0


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"gradcam++"}))  # its weights are not homogeneous
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


class Bent:
    """A convolution and a hidden layer, bent by tanh, and the scores: in Keras, and in numpy."""

    SIZE, CLASSES = (11, 12), 4

    def __init__(self) -> None:
        import keras
        from keras import layers

        keras.utils.set_random_seed(5)
        inputs = keras.Input((*self.SIZE, 3))
        x = layers.Conv2D(5, 3, 2, activation="relu", name="target")(inputs)
        x = layers.Conv2D(6, 3, activation="tanh", name="after")(x)
        x = layers.Flatten()(x)
        x = layers.Dense(7, "tanh", name="hidden")(x)
        self.model = keras.Model(inputs, layers.Dense(self.CLASSES, name="scores")(x))
        self.weights = {
            one.name: [np.asarray(weight, np.float64) for weight in one.get_weights()]
            for one in self.model.layers
        }

    def activations(self, pixels: NDArray[np.uint8]) -> Floats:
        kernel, bias = self.weights["target"]
        windows = np.lib.stride_tricks.sliding_window_view(pixels / 127.5 - 1, (3, 3), axis=(1, 2))
        return np.asarray(np.maximum(np.einsum("nhwcij,ijck->nhwk", windows[:, ::2, ::2], kernel) + bias, 0))

    def scores(self, activations: Floats) -> Floats:
        (kernel, bias), hidden, last = (self.weights[name] for name in ("after", "hidden", "scores"))
        windows = np.lib.stride_tricks.sliding_window_view(activations, (3, 3), axis=(1, 2))
        x = np.tanh(np.einsum("nhwcij,ijck->nhwk", windows, kernel) + bias).reshape(len(activations), -1)
        return np.asarray(np.tanh(x @ hidden[0] + hidden[1]) @ last[0] + last[1])

    def slopes(self, activations: Floats, explained: Callable[[Floats], Floats]) -> Floats:
        """Finite differences (n, classes, rows, columns, channels) of what is explained."""
        found, step = np.zeros((len(activations), self.CLASSES, *activations.shape[1:])), 1e-5
        for place in np.ndindex(activations.shape[1:]):
            bump = np.zeros_like(activations)
            bump[(slice(None), *place)] = step
            up, down = (explained(self.scores(activations + sign * bump)) for sign in (1, -1))
            found[(..., *place)] = (up - down) / (2 * step)
        return found


def log_softmax(scores: Floats) -> Floats:
    return np.asarray(scores - np.log(np.exp(scores).sum(axis=1, keepdims=True)))


@pytest.mark.tensorflow
@pytest.mark.parametrize("score", cam.SCORES)
def test_behind_a_bent_tail_every_method_agrees_with_finite_differences_and_plain_loops(
    score: str, wrap: Callable[..., Any], noise: Callable[..., NDArray[np.uint8]]
) -> None:
    bent, pixels = Bent(), noise(2, *Bent.SIZE)
    network = wrap(bent.model, "target")
    activations = bent.activations(pixels)
    slopes = bent.slopes(activations, log_softmax if score == "probability" else lambda scores: scores)
    wanted = np.tile(np.arange(Bent.CLASSES, dtype=np.int32), (2, 1))
    for name in set(METHODS) - {"notebook"}:  # which takes another image: see test_notebook.py
        computed = network.compute(pixels, wanted, Method(name, score=score))
        assert_allclose(computed.scores, bent.scores(activations), atol=1e-5)
        for image, one in product(range(2), range(Bent.CLASSES)):
            expected = plainly(name, activations[image], slopes[image, one])
            difference = np.abs(computed.raw[image, one] - expected).max()
            assert difference <= 2e-5 * np.abs(expected).max(), name


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
    @pytest.mark.usefixtures("eagerly")
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
