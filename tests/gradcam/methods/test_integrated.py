"""Integrated Gradients: against known answers, and against a plain tape with many steps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidJob, NetworkIncompatible
from gradcam_worker.gradcam.explain import explain_image, explain_pixels
from gradcam_worker.gradcam.methods import integrated
from gradcam_worker.gradcam.network import Method, Network
from gradcam_worker.testing import TinyNetwork

Noise = Callable[..., NDArray[np.uint8]]
Wrap = Callable[..., Network]

SIZE, CLASSES = (12, 16), 4
IG = Method(integrated.NAME)
WANTED = np.array([[0, 3], [2, 1]], np.int32)


@pytest.fixture
def pixels(noise: Noise) -> NDArray[np.uint8]:
    return noise(2, *SIZE)


@pytest.fixture
def model() -> Any:
    """A smooth network, so that a sum of many steps and the quadrature agree."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(8)
    inputs = keras.Input((*SIZE, 3))
    x = layers.Conv2D(6, 3, 2, activation="tanh", name="target")(inputs)
    x = layers.Conv2D(5, 3, activation="tanh")(x)
    x = layers.Dense(CLASSES, "softmax", bias_initializer="random_normal", name="scores")(layers.Flatten()(x))
    return keras.Model(inputs, x)


def by_a_tape(
    model: Any, image: NDArray[np.uint8], start: NDArray[np.uint8], weights: list[float], steps: int = 300
) -> NDArray[np.float64]:
    """Equation 3 of the paper, with midpoints: (height, width). `weights` are those of the logits."""
    import keras
    import tensorflow as tf

    logits = keras.models.clone_model(model)
    logits.set_weights(model.get_weights())
    logits.layers[-1].activation = keras.activations.linear
    apart = image.astype(np.float32) - start
    positions = ((np.arange(steps) + 0.5) / steps).astype(np.float32).reshape(-1, 1, 1, 1)
    line = tf.constant(start + positions * apart)
    with tf.GradientTape() as tape:
        tape.watch(line)
        explained = tf.reduce_sum(logits(line / 127.5 - 1) * tf.constant(weights, tf.float32))
    slopes = tape.gradient(explained, line).numpy().astype(np.float64).mean(axis=0)
    return np.asarray((slopes * apart).sum(axis=-1))


def assert_near(found: Any, expected: Any, within: float) -> None:
    assert_allclose(found, expected, atol=within * np.abs(expected).max(), rtol=0)


class TestOfALinearNetwork:
    """There the attribution of a pixel is its difference from the baseline times its weight."""

    PHOTO = np.random.default_rng(1).integers(0, 256, (1, 16, 16, 3), np.uint8)

    @pytest.mark.parametrize("name", [None, *integrated.BASELINES])
    def test_the_attributions_are_differences_times_weights_and_complete(self, name: str | None) -> None:
        network = TinyNetwork()
        computed = integrated.integrate(
            network.compute,
            network.scores,
            self.PHOTO,
            np.array([[0, 2]], np.int32),
            replace(IG, baseline=name),
            "softmax",
        )
        starts = {
            "grey": np.full_like(self.PHOTO, 127),
            "blurred": cv2.GaussianBlur(self.PHOTO[0], (0, 0), 0.05 * 16)[np.newaxis],
        }
        apart = self.PHOTO.astype(np.float64) - starts.get(name or "black", 0)
        expected = np.einsum("nhwc,ck->nkhw", apart, network.KERNEL[:, [0, 2]]) / (255 * 256)
        assert_near(computed.raw, expected, 1e-5)
        assert computed.layer == "input"
        assert computed.completeness_error is not None
        assert computed.completeness_error.max() < 1e-4

    def test_they_are_explained_as_any_other_method_and_may_be_averaged_with_the_mirror_image(self) -> None:
        plain, flipped, contrast = (
            explain_pixels(TinyNetwork(), self.PHOTO, [(-1, -2)], method)[0]
            for method in (IG, replace(IG, flip=True), replace(IG, against=(1,)))
        )
        assert plain.heatmaps.shape == (2, 16, 16)
        assert plain.heatmaps.max() == 1
        assert plain.raw_min.max() < 0 < plain.raw_max.min()
        assert_near(flipped.heatmaps, plain.heatmaps, 1e-5)
        assert plain.incomplete == flipped.incomplete == contrast.incomplete == ()
        assert {prediction.id for prediction in contrast.explained} == {0, 2}

    def test_too_few_steps_are_noticed(self) -> None:
        """Half of the passes are lost: their sum is half of what it should be."""

        class Halved(TinyNetwork):
            def compute(self, pixels: Any, wanted: Any, method: Method = IG) -> Any:
                computed = super().compute(pixels, wanted, method)
                return replace(computed, raw=computed.raw / np.float32(2))

        [seen] = explain_pixels(Halved(), self.PHOTO, [(0,)], IG)
        assert seen.completeness_error is not None
        assert seen.completeness_error[0] == pytest.approx(0.5, abs=1e-4)
        assert seen.incomplete == (0,)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (replace(IG, baseline="white"), "'white' is none of black, grey, blurred"),
        (replace(IG, steps=4), "steps is 4: it must be from 8 to 1024"),
        (replace(IG, layer="top"), "it has no layer"),
        (Method(steps=16), "steps is a parameter of integrated_gradients, not of gradcam"),
    ],
)
def test_what_does_not_belong_to_it_is_refused(method: Method, why: str) -> None:
    with pytest.raises(InvalidJob, match=why):
        explain_image(TinyNetwork(), np.zeros((16, 16, 3), np.uint8), top_n=1, method=method)


def test_they_are_drawn_so_that_single_pixels_do_not_hide_the_others_and_measured_as_they_are() -> None:
    [seen] = explain_pixels(TinyNetwork(), TestOfALinearNetwork.PHOTO, [(0,)], IG)
    lonely = np.full((1, 100, 100), 0.1, np.float32)
    lonely[0, 50, 50] = 1
    spread = replace(seen, heatmaps=lonely)
    assert_array_equal(spread.scaled, lonely)
    assert spread.shown.min() == pytest.approx(1, abs=0.05)
    assert replace(spread, heatmaps=np.zeros_like(lonely)).shown.max() == 0
    few = np.zeros_like(lonely)
    few[0, 10, 10] = 1
    assert replace(spread, heatmaps=few).shown.max() == 1


@pytest.mark.parametrize("steps", [None, 8, 20, 33])
def test_the_parts_hold_every_step_once(steps: int | None) -> None:
    method = replace(IG, steps=steps)
    whole = integrated.positions_and_shares(method)
    pieces = [integrated.positions_and_shares(part) for part in integrated.parts(method)]
    assert_array_equal(np.concatenate([positions for positions, _ in pieces]), whole[0])
    assert len(whole[0]) == (steps or integrated.STEPS)
    assert whole[1].sum() == pytest.approx(1, abs=1e-6)
    assert 0 < whole[0].min() < whole[0].max() < 1


@pytest.mark.tensorflow
class TestOfAKerasNetwork:
    def test_it_agrees_with_a_plain_tape_and_is_complete(
        self, model: Any, wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        network = wrap(model, "target")
        for name in ("black", "blurred"):
            method = replace(IG, baseline=name)
            computed = integrated.integrate(
                network.compute, network.scores, pixels, WANTED, method, "softmax"
            )
            starts = integrated.baseline(pixels, name)
            expected = [
                [by_a_tape(model, pixels[n], starts[n], list(np.eye(CLASSES)[k])) for k in WANTED[n]]
                for n in range(2)
            ]
            assert_near(computed.raw, expected, 1e-3)
            assert computed.completeness_error is not None
            assert computed.completeness_error.max() < 1e-3

    def test_against_another_class_it_is_that_of_the_difference(
        self, model: Any, wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        network = wrap(model, "target")
        for score in ("logit", "probability"):
            method = replace(IG, against=(1, 3), score=score)
            wanted = np.array([[0]], np.int32)
            computed = integrated.integrate(
                network.compute, network.scores, pixels[:1], wanted, method, "softmax"
            )
            black = np.zeros_like(pixels[0])
            assert_near(computed.raw[0, 0], by_a_tape(model, pixels[0], black, [1, -0.5, 0, -0.5]), 1e-3)

    def test_of_the_probability_it_sums_to_the_difference_of_its_logarithm(
        self, model: Any, wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        network, method = wrap(model, "target"), replace(IG, score="probability")
        computed = integrated.integrate(network.compute, network.scores, pixels, WANTED, method, "softmax")
        logs = [
            np.log(np.take_along_axis(np.asarray(model(each / np.float32(127.5) - 1)), WANTED, axis=1))
            for each in (pixels, np.zeros_like(pixels))
        ]
        assert_allclose(computed.raw.sum((2, 3)), logs[0] - logs[1], rtol=1e-3, atol=1e-3)

    def test_parts_and_passes_of_any_size_give_the_same(
        self, model: Any, wrap: Wrap, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from gradcam_worker.gradcam.models import keras_network

        network = wrap(model, "target")
        whole = network.compute(pixels, WANTED, IG)
        in_parts = [network.compute(pixels, WANTED, part).raw for part in integrated.parts(IG)]
        assert_near(np.sum(in_parts, axis=0), whole.raw, 1e-5)
        for at_once in (1, 3000):
            monkeypatch.setattr(keras_network, "MAX_GRADIENTS", at_once)
            small = network.compute(pixels, WANTED, IG)
            assert_near(small.raw, whole.raw, 1e-5)
            assert_allclose(small.scores, whole.scores, rtol=1e-5, atol=1e-6)
            assert_array_equal(small.class_ids, WANTED)

    @pytest.mark.parametrize("at_once", [1, 5])
    def test_a_pass_keeps_no_more_of_the_forward_pass_than_is_allowed(
        self, at_once: int, model: Any, wrap: Wrap, pixels: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from gradcam_worker.gradcam.models import keras_network

        def counted(images: Any, wanted: Any, starts: Any, positions: Any, *others: Any) -> Any:
            counts.append(len(images) * len(positions))
            return run_pass(images, wanted, starts, positions, *others)

        network: Any = wrap(model, "target")
        counts: list[int] = []
        whole = network.compute(pixels, WANTED, IG)
        run_pass, size = network._path_pass(IG)
        monkeypatch.setattr(network, "_path_pass", lambda _: (counted, size))
        monkeypatch.setattr(keras_network, "MAX_ACTIVATIONS", at_once * network._activations)
        assert_near(network.compute(pixels, WANTED, IG).raw, whole.raw, 1e-5)
        assert max(counts) <= at_once
        assert sum(counts) == len(pixels) * integrated.STEPS

    def test_a_network_that_takes_one_image_at_a_time_is_integrated_too(
        self, wrap: Wrap, noise: Noise
    ) -> None:
        import keras
        from keras import layers

        inputs = keras.Input(batch_shape=(1, *SIZE, 3))
        x = layers.Conv2D(6, 3, 2, activation="tanh", name="target")(inputs)
        x = layers.Dense(3, "softmax")(layers.GlobalAveragePooling2D()(x))
        network = wrap(keras.Model(inputs, x), "target")
        for seen in explain_pixels(network, noise(2, *SIZE), [(0,), (1,)], IG):
            assert seen.completeness_error is not None
            assert seen.completeness_error.max() < 1e-3

    def test_a_network_of_integers_has_no_gradient(self, wrap: Wrap, noise: Noise) -> None:
        import keras
        from keras import layers

        inputs = keras.Input((*SIZE, 3), dtype="uint8")
        x = layers.Rescaling(1 / 255)(inputs)
        x = layers.Conv2D(6, 3, 2, activation="tanh", name="target")(x)
        x = layers.Dense(3, "softmax")(layers.GlobalAveragePooling2D()(x))
        network = wrap(keras.Model(inputs, x), "target", preprocessing="none")
        with pytest.raises(NetworkIncompatible, match="takes its image as uint8, which has no gradient"):
            explain_pixels(network, noise(1, *SIZE), [(0,)], IG)


@pytest.mark.tensorflow
def test_on_a_photo_the_attributions_are_complete_and_lie_on_the_cup(lite0: Any, photos: Path) -> None:
    seen = explain_image(lite0, photos / "coffee.jpg", classes=["espresso"], method=IG)
    assert seen.heatmaps.shape == (1, 224, 224)
    assert seen.incomplete == ()
    coarse = explain_image(lite0, photos / "coffee.jpg", classes=["espresso"])
    cells = seen.heatmaps[0].reshape(7, 32, 7, 32).mean((1, 3))
    assert np.corrcoef(cells.ravel(), coarse.heatmaps[0].ravel())[0, 1] > 0.3
