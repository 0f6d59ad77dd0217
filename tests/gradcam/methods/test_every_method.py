"""What every method promises, on small networks: the same maps where nothing that matters has changed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.explain import explain_image, explain_pixels
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import Method, Network

pytestmark = pytest.mark.tensorflow

Noise = Callable[..., NDArray[np.uint8]]
Wrap = Callable[..., Network]

SIZE, CLASSES = (20, 24), 6
PAIR = np.array([[1, 4]] * 3, np.int32)
CLASSLESS = {"eigencam"}  # asks neither class nor gradient
NOT_HOMOGENEOUS = {"gradcam++"}  # its weights are no multiple of the gradients: see cam.py
METHODS = sorted(cam.METHODS)
SPECIFIC = sorted(set(METHODS) - CLASSLESS)
LINEAR = sorted(set(METHODS) - CLASSLESS - NOT_HOMOGENEOUS - {"notebook"})
every_method = pytest.mark.parametrize("name", METHODS)
eager = pytest.mark.usefixtures("eagerly")


@pytest.fixture
def build() -> Callable[..., Any]:
    """A network with a bent tail behind its target layer, and a head of one's choice."""
    import keras
    from keras import layers

    def build(activation: str | None = None, units: int = CLASSES) -> Any:
        keras.utils.set_random_seed(3)
        inputs = keras.Input((*SIZE, 3))
        x = layers.Conv2D(8, 3, 2, activation="relu")(inputs)
        x = layers.Conv2D(10, 3, activation="relu", name="target")(x)
        x = layers.Conv2D(12, 3, activation="tanh")(x)
        x = layers.GlobalAveragePooling2D()(x)
        x = layers.Dense(16, "tanh")(x)
        x = layers.Dense(units, activation, bias_initializer="random_normal", name="scores")(x)
        return keras.Model(inputs, x)

    return build


@pytest.fixture
def pixels(noise: Noise) -> NDArray[np.uint8]:
    return noise(3, *SIZE)


def between_batches(name: str) -> float:
    """How far maps of one image may differ between batches, as a share of their peak.

    The notebook's are sums over channels that nearly cancel: its image is not preprocessed, so activations
    are two orders above what comes out. float32 leaves 3.2e-6 of the peak, over 12 draws of weights.
    """
    return 5e-6 if name == "notebook" else 1e-6


def change_head(model: Any, change: Callable[[Any], Any]) -> None:
    """Change kernel and bias of the last layer, both (..., classes)."""
    head = model.get_layer("scores")
    head.set_weights([change(weight) for weight in head.get_weights()])


def close(found: Any, expected: Any, within: float) -> None:
    assert_allclose(found, expected, atol=within * np.abs(expected).max(), rtol=0)


@eager
@every_method
def test_a_class_has_its_own_map_and_takes_it_along_to_another_place_in_the_head(
    name: str, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
) -> None:
    model = build("softmax")
    before = wrap(model, "target").compute(pixels, PAIR, Method(name)).raw
    swapped = [0, 4, 2, 3, 1, 5]
    change_head(model, lambda weight: weight[..., swapped])
    after = wrap(model, "target").compute(pixels, PAIR, Method(name)).raw
    close(after, before[:, ::-1], 1e-6)
    apart = np.abs(before[:, 0] - before[:, 1]).max() / np.abs(before).max()
    assert apart == 0 if name in CLASSLESS else apart > 0.1


@every_method
@pytest.mark.parametrize("flip", [False, True])
def test_a_traced_batch_gives_what_single_images_give_without_tracing(
    name: str,
    *,
    flip: bool,
    build: Callable[..., Any],
    wrap: Wrap,
    pixels: NDArray[np.uint8],
    request: pytest.FixtureRequest,
) -> None:
    network, method = wrap(build(), "target"), Method(name, flip=flip)
    together = network.compute(pixels, PAIR, method)
    request.getfixturevalue("eagerly")
    for index in range(len(pixels)):
        alone = network.compute(pixels[[index]], PAIR[:1], method)
        close(together.raw[[index]], alone.raw, between_batches(name))
        close(together.scores[[index]], alone.scores, 1e-6)


@eager
@pytest.mark.parametrize("name", sorted(set(METHODS) - NOT_HOMOGENEOUS - {"notebook"}))
def test_scaling_the_scores_changes_no_heatmap(
    name: str, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
) -> None:
    """But for Grad-CAM++, and for the notebook, which explains the probability."""
    model = build()
    before = wrap(model, "target").compute(pixels, PAIR, Method(name)).raw
    change_head(model, lambda weight: 7 * weight)
    after = wrap(model, "target").compute(pixels, PAIR, Method(name)).raw
    for new, old in zip(after, before, strict=True):
        assert_allclose(cam.heatmaps(new), cam.heatmaps(old), atol=1e-6)


@eager
@every_method
@pytest.mark.parametrize(
    ("dead", "score"), [("target", "logit"), ("scores", "logit"), ("scores", "probability")]
)
def test_a_constant_network_has_heatmaps_of_exact_zeros_and_says_so(
    name: str, score: str, dead: str, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
) -> None:
    """EigenCAM shows what the target layer sees, whatever the head makes of it: only a dead layer is dark."""
    model = build("softmax")
    layer = model.get_layer(dead)
    layer.set_weights([np.zeros_like(weight) for weight in layer.get_weights()])
    method = Method(name, score=score, flip=score == "logit")
    for seen in explain_pixels(wrap(model, "target"), pixels, [(1, 4)] * 3, method):
        if name in CLASSLESS and dead == "scores":
            assert seen.zero_heatmaps == ()
            continue
        assert_array_equal(seen.heatmaps, np.zeros_like(seen.heatmaps))
        assert_array_equal([*seen.raw_min, *seen.raw_max], np.zeros(4))
        assert seen.zero_heatmaps == (1, 4)


@eager
class TestProbability:
    """Explained through its logarithm: the same heatmap as the probability's own, without its underflow."""

    @staticmethod
    def of_the_probability(model: Any, pixels: NDArray[np.uint8], name: str) -> Any:
        """Raw maps (n, k, rows, columns) of the gradient of the probability itself, by a plain tape."""
        import keras
        import tensorflow as tf

        both = keras.Model(model.input, [model.get_layer("target").output, model.output])
        with tf.GradientTape(persistent=True) as tape:
            activations, probabilities = both(pixels / np.float32(127.5) - 1)
            chosen = [probabilities[:, class_id] for class_id in PAIR[0]]
        gradients = np.stack([tape.gradient(one, activations).numpy() for one in chosen])
        return cam.METHODS[name](np, activations.numpy(), gradients)

    @pytest.mark.parametrize("name", LINEAR)
    def test_its_heatmap_is_the_probabilitys_own(
        self, name: str, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        model = build("softmax")
        expected = self.of_the_probability(model, pixels, name)
        found = wrap(model, "target").compute(pixels, PAIR, Method(name, score="probability")).raw
        for image in range(len(pixels)):
            assert_allclose(cam.heatmaps(found[image]), cam.heatmaps(expected[image]), atol=1e-5)

    @pytest.mark.parametrize("name", LINEAR)
    def test_where_the_probability_underflows_it_still_speaks(
        self, name: str, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        model = build("softmax")
        change_head(model, lambda weight: 1e4 * weight)
        assert_array_equal(self.of_the_probability(model, pixels, name)[:, 0], 0)
        method = Method(name, score="probability")
        raw = wrap(model, "target").compute(pixels, PAIR, method).raw
        assert np.isfinite(raw).all()
        assert (np.ptp(raw[:, 0], axis=(1, 2)) > 0).all()


@eager
class TestSigmoid:
    @pytest.mark.parametrize("name", LINEAR)
    def test_of_many_labels_the_probability_has_the_heatmap_of_its_own_score(
        self, name: str, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        """d log s(z) = (1 - s(z)) dz: what other labels say does not come into it."""
        network = wrap(build("sigmoid"), "target")
        logit, probability = (
            network.compute(pixels, PAIR, Method(name, score=score)) for score in cam.SCORES
        )
        chosen = np.take_along_axis(logit.scores, PAIR, axis=1)[..., np.newaxis, np.newaxis]
        close(probability.raw, logit.raw / (1 + np.exp(chosen)), 1e-5)

    def test_the_scores_of_a_sigmoid_are_those_before_it(
        self, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        with_it, without = (
            wrap(build(activation), "target").compute(pixels, PAIR) for activation in ("sigmoid", None)
        )
        assert_allclose(with_it.scores, without.scores, rtol=1e-6)
        assert_allclose(with_it.raw, without.raw, rtol=1e-6)

    @pytest.mark.parametrize("name", LINEAR)
    @pytest.mark.parametrize("score", cam.SCORES)
    def test_what_speaks_for_one_side_of_a_single_unit_speaks_against_the_other(
        self, name: str, score: str, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        network = wrap(build("sigmoid", 1), "target")
        computed = network.compute(pixels, np.array([[0, 1]] * 3, np.int32), Method(name, score=score))
        assert_array_equal(computed.scores[:, 0], -computed.scores[:, 1])
        against, speaks = computed.raw[:, 0], computed.raw[:, 1]
        if score == "probability":  # d log s(-z) = -s(z) dz, d log s(z) = s(-z) dz
            z = computed.scores[:, 1, np.newaxis, np.newaxis]
            against, speaks = against * (1 + np.exp(-z)), speaks * (1 + np.exp(z))
        if name != "layercam":  # which takes positive slopes alone
            close(against, -speaks, 1e-5)
        assert np.abs(speaks).max() > 0

    def test_the_two_sides_of_a_single_unit_share_the_probability(
        self, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        model = build("sigmoid", 1)
        seen = explain_image(wrap(model, "target", labels=["healthy", "ill"]), pixels[0], top_n=2)
        theirs = float(model(pixels[:1] / np.float32(127.5) - 1).numpy()[0, 0])
        by_name = {one.name: one.probability for one in seen.predictions}
        assert by_name == pytest.approx({"healthy": 1 - theirs, "ill": theirs}, abs=1e-6)


@eager
class TestFlip:
    @every_method
    def test_it_is_the_mean_of_the_map_and_of_the_mirror_images_map_mirrored(
        self, name: str, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        network = wrap(build(), "target")
        best = np.array([[-1, -6, 2]] * 3, np.int32)
        both = network.compute(pixels, best, Method(name, flip=True))
        plain = network.compute(pixels, best, Method(name))
        mirror = np.ascontiguousarray(pixels[:, :, ::-1])
        mirrored = network.compute(mirror, plain.class_ids, Method(name))
        assert_array_equal(both.class_ids, plain.class_ids)
        close(both.scores, plain.scores, 1e-6)
        close(both.raw, (plain.raw + mirrored.raw[..., ::-1]) / 2, 1e-6)
        assert np.abs(both.raw - plain.raw).max() > 0.01 * np.abs(plain.raw).max()

    @every_method
    def test_a_symmetric_image_has_symmetric_maps_but_for_the_last_digit(
        self, name: str, build: Callable[..., Any], wrap: Wrap, pixels: NDArray[np.uint8]
    ) -> None:
        half = pixels[:1, :, :12]
        symmetric = np.concatenate([half, half[:, :, ::-1]], axis=2)
        network = wrap(build(), "target")
        raw = network.compute(symmetric, PAIR[:1], Method(name, flip=True)).raw
        close(raw, raw[..., ::-1], 1e-6)
        plain = network.compute(symmetric, PAIR[:1], Method(name)).raw
        assert np.abs(plain - plain[..., ::-1]).max() > 0.01 * np.abs(plain).max()


@pytest.mark.parametrize("name", ["gradcam", "hirescam", "eigencam"])
@pytest.mark.parametrize("flip", [False, True])
def test_features_are_those_of_the_layers_own_activations(
    name: str,
    flip: bool,
    build: Callable[..., Any],
    wrap: Wrap,
    pixels: NDArray[np.uint8],
    request: pytest.FixtureRequest,
) -> None:
    """With the shortcut of Grad-CAM, the whole backward pass, and none; one by one in a loop."""
    import keras

    if not (name == "hirescam" and flip):  # one is traced, too
        request.getfixturevalue("eagerly")
    model = build()
    computed = wrap(model).compute(pixels, PAIR, Method(name, "target", flip=flip, features=True))
    trunk = keras.Model(model.input, model.get_layer("target").output)
    activations = trunk(pixels.astype(np.float32) / 127.5 - 1).numpy()
    assert computed.features is not None
    assert computed.features.shape == (3, 2, 10)
    for image in range(3):
        for wanted in range(2):
            heat = np.maximum(computed.raw[image, wanted], 0)[..., None]
            if heat.any():
                expected = (activations[image] * heat).sum((0, 1)) / heat.sum()
                assert_allclose(computed.features[image, wanted], expected, rtol=1e-3, atol=1e-5)
            else:
                assert np.isnan(computed.features[image, wanted]).all()
    plain = wrap(model).compute(pixels, PAIR, Method(name, "target", flip=flip))
    assert plain.features is None
    assert_allclose(plain.raw, computed.raw, atol=between_batches(name) * np.abs(plain.raw).max())
