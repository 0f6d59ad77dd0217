"""Where the scores are, and what the probabilities are made of."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.catalog import Head
from gradcam_worker.gradcam.explain import explain_pixels
from gradcam_worker.gradcam.network import Method

pytestmark = [pytest.mark.tensorflow, pytest.mark.usefixtures("eagerly")]

ROWS, COLUMNS, CHANNELS = 7, 9, 4
Wrap = Callable[..., Any]
PIXELS = np.random.default_rng(4).integers(0, 256, (2, ROWS, COLUMNS, 3), np.uint8)


class Trunk:
    """A convolution, 3 x 3, and what comes of it: here all that is behind it can be computed by hand."""

    def __init__(self) -> None:
        import keras

        keras.utils.set_random_seed(5)
        self.input = keras.Input((ROWS, COLUMNS, 3))
        self.conv = keras.layers.Conv2D(CHANNELS, 3, activation="tanh", name="conv")
        self.map = self.conv(self.input)
        self.pooled = keras.layers.GlobalAveragePooling2D()(self.map)

    def dense(self, classes: int, activation: str | None = None) -> tuple[Any, Any]:
        """The pooled map's scores, and their layer."""
        import keras

        layer = keras.layers.Dense(classes, activation, bias_initializer="random_normal", name="scores")
        return layer(self.pooled), layer

    @property
    def activations(self) -> NDArray[np.float64]:
        return np.asarray(self.conv(PIXELS / np.float32(127.5) - 1), np.float64)

    def scores(self, layer: Any) -> NDArray[np.float64]:
        kernel, bias = (one.reshape(-1, one.shape[-1]) for one in layer.get_weights())
        return np.asarray(self.activations.mean((1, 2)) @ kernel + bias)

    def maps(self, layer: Any) -> NDArray[np.float64]:
        """CAM, over its cells: what Grad-CAM is behind a pooling and a dense layer, whatever comes then."""
        kernel = layer.get_weights()[0].reshape(CHANNELS, -1)
        maps = np.einsum("nhwc,ck->nkhw", self.activations, kernel)
        return np.asarray(maps / maps[0, 0].size)


@pytest.fixture
def trunk() -> Trunk:
    return Trunk()


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def everything(classes: int) -> NDArray[np.int32]:
    return np.array([range(classes)] * len(PIXELS), np.int32)


def ends(keras: Any) -> dict[str, Callable[[Any], Any]]:
    """What may come behind a dense layer, and still its scores are what is to be explained."""
    layers = keras.layers
    return {
        "nothing": lambda x: x,
        "Activation softmax": layers.Activation("softmax"),
        "Activation linear": layers.Activation("linear"),
        "Softmax": layers.Softmax(),
        "ops.softmax": keras.ops.softmax,
        "activations.softmax": keras.activations.softmax,
        "Activation log_softmax": layers.Activation("log_softmax"),
        "ops.log_softmax": keras.ops.log_softmax,
        "softmax, then reshaped": lambda x: layers.Reshape((1, 5))(layers.Softmax()(x)),
        "reshaped, then softmax": lambda x: layers.Softmax()(layers.Reshape((1, 1, 5))(x)),
        "softmax as float32": lambda x: layers.Activation("linear", dtype="float32")(layers.Softmax()(x)),
        "softmax in a model": keras.Sequential([layers.Softmax()], name="last"),
    }


@pytest.mark.parametrize(
    "end",
    [
        "nothing",
        "Activation softmax",
        "Activation linear",
        "Softmax",
        "ops.softmax",
        "activations.softmax",
        "Activation log_softmax",
        "ops.log_softmax",
        "softmax, then reshaped",
        "reshaped, then softmax",
        "softmax as float32",
        "softmax in a model",
    ],
)
def test_scores_are_those_before_the_softmax_wherever_it_is(end: str, trunk: Trunk, wrap: Wrap) -> None:
    import keras

    x, layer = trunk.dense(5)
    network = wrap(keras.Model(trunk.input, ends(keras)[end](x)))
    computed = network.compute(PIXELS, everything(5))
    assert_allclose(computed.scores, trunk.scores(layer), atol=1e-5)
    assert_allclose(computed.raw, trunk.maps(layer), atol=1e-5 * np.abs(trunk.maps(layer)).max())
    seen = explain_pixels(network, PIXELS, [(0, 1, 2, 3, 4)] * 2)
    found = [[one.probability for one in image.explained] for image in seen]
    assert_allclose(found, softmax(trunk.scores(layer)), atol=1e-6)
    assert network.facts.head == "softmax"


@pytest.mark.parametrize("activation", ["softmax", "log_softmax", "sigmoid", "log_sigmoid", None])
def test_an_activation_that_is_part_of_the_last_layer_is_left_out(
    activation: str | None, trunk: Trunk, wrap: Wrap
) -> None:
    import keras

    x, layer = trunk.dense(5, activation)
    network = wrap(keras.Model(trunk.input, x))
    computed = network.compute(PIXELS, everything(5))
    assert_allclose(computed.scores, trunk.scores(layer), atol=1e-5)
    assert_allclose(computed.raw, trunk.maps(layer), atol=1e-5 * np.abs(trunk.maps(layer)).max())
    assert network.facts.head == ("sigmoid" if activation and "sigmoid" in activation else "softmax")
    assert layer.activation is keras.activations.get(activation)


@pytest.mark.parametrize("fused", [True, False])
def test_a_convolution_may_give_the_scores(fused: bool, trunk: Trunk, wrap: Wrap) -> None:
    import keras

    layer = keras.layers.Conv2D(5, 1, activation="softmax" if fused else None)
    x = keras.layers.Flatten()(layer(keras.layers.GlobalAveragePooling2D(keepdims=True)(trunk.map)))
    x = x if fused else keras.layers.Softmax()(x)
    computed = wrap(keras.Model(trunk.input, x)).compute(PIXELS, everything(5))
    assert computed.layer == "conv"
    assert_allclose(computed.scores, trunk.scores(layer), atol=1e-5)
    assert_allclose(computed.raw, trunk.maps(layer), atol=1e-5 * np.abs(trunk.maps(layer)).max())


def test_a_convolution_that_gives_a_map_of_scores_is_what_is_explained(trunk: Trunk, wrap: Wrap) -> None:
    import keras

    scores = keras.layers.Conv2D(5, 1, name="scores")
    x = keras.layers.Softmax()(keras.layers.GlobalAveragePooling2D()(scores(trunk.map)))
    computed = wrap(keras.Model(trunk.input, x)).compute(PIXELS, everything(5))
    assert computed.layer == "scores"
    maps = scores(trunk.activations.astype(np.float32)).numpy().transpose(0, 3, 1, 2) / (5 * 7)
    assert_allclose(computed.raw, maps, atol=1e-5 * np.abs(maps).max())


class TestSigmoid:
    @pytest.mark.parametrize("end", ["fused", "Activation", "ops.sigmoid", "told"])
    def test_labels_that_do_not_exclude_each_other_have_probabilities_of_their_own(
        self, end: str, trunk: Trunk, wrap: Wrap
    ) -> None:
        import keras

        x, layer = trunk.dense(3, "sigmoid" if end == "fused" else None)
        ending = {"Activation": keras.layers.Activation("sigmoid"), "ops.sigmoid": keras.ops.sigmoid}
        x = ending[end](x) if end in ending else x
        head = Head(kind="sigmoid") if end == "told" else None
        network = wrap(keras.Model(trunk.input, x), head=head)
        seen = explain_pixels(network, PIXELS, [(0, 1, 2)] * 2)
        found = [[one.probability for one in image.explained] for image in seen]
        assert_allclose(found, 1 / (1 + np.exp(-trunk.scores(layer))), atol=1e-6)
        assert network.facts.head == "sigmoid"

    @pytest.mark.parametrize("activation", ["sigmoid", None])
    def test_one_unit_speaks_for_class_1_and_against_class_0(
        self, activation: str | None, trunk: Trunk, wrap: Wrap
    ) -> None:
        import keras

        x, layer = trunk.dense(1, activation)
        head = None if activation else Head(kind="sigmoid")
        network = wrap(keras.Model(trunk.input, x), head=head)
        computed = network.compute(PIXELS, everything(2))
        scores, maps = trunk.scores(layer), trunk.maps(layer)
        assert_allclose(computed.scores, np.concatenate([-scores, scores], 1), atol=1e-5)
        assert_allclose(computed.raw, np.concatenate([-maps, maps], 1), atol=1e-5 * np.abs(maps).max())
        seen = explain_pixels(network, PIXELS, [(0, 1)] * 2)
        found = np.array([[one.probability for one in image.explained] for image in seen])
        assert_allclose(found[:, 1], 1 / (1 + np.exp(-scores[:, 0])), atol=1e-6)
        assert_allclose(found.sum(1), 1, atol=1e-6)
        assert len(network.labels) == 2

    def test_one_unit_has_two_labels_of_which_the_first_is_for_low_values(
        self, trunk: Trunk, wrap: Wrap
    ) -> None:
        import keras

        model = keras.Model(trunk.input, trunk.dense(1, "sigmoid")[0])
        network = wrap(model, labels={"ill": 1, "well": 0})
        assert [label.name for label in network.labels.labels] == ["well", "ill"]
        with pytest.raises(NetworkIncompatible, match="1 labels are given for them"):
            wrap(model, labels=["ill"])
        with pytest.raises(NetworkIncompatible, match="labels cannot be used: ids run from 1 to 2"):
            wrap(model, labels={"ill": 1, "well": 2})

    def test_the_probability_of_one_unit_has_the_slope_of_the_other_side(
        self, trunk: Trunk, wrap: Wrap
    ) -> None:
        import keras

        x, layer = trunk.dense(1, "sigmoid")
        network = wrap(keras.Model(trunk.input, x))
        computed = network.compute(PIXELS, everything(2), Method(score="probability"))
        scores, maps = trunk.scores(layer)[..., None, None], trunk.maps(layer)
        expected = np.concatenate([-maps / (1 + np.exp(-scores)), maps / (1 + np.exp(scores))], 1)
        assert_allclose(computed.raw, expected, atol=1e-5 * np.abs(maps).max())


def mixtures(trunk: Trunk) -> dict[str, Callable[[], Any]]:
    """Networks whose outputs are probabilities, though their last step is no softmax or sigmoid."""
    import keras

    layers, ops = keras.layers, keras.ops

    def one(activation: str = "sigmoid") -> Any:
        return layers.Dense(1, activation, bias_initializer="random_normal")(trunk.pooled)

    def three(activation: str) -> Any:
        return layers.Dense(3, activation, bias_initializer="random_normal")(trunk.pooled)

    def written_out() -> Any:
        powers = ops.exp(trunk.dense(3)[0])
        return powers / ops.sum(powers, axis=1, keepdims=True)

    return {
        "mean of two sigmoids": lambda: layers.Average()([one(), one()]),
        "largest of two sigmoids": lambda: layers.Maximum()([one(), one()]),
        "mean of two softmaxes": lambda: layers.Average()([three("softmax"), three("softmax")]),
        "mean of a stack": lambda: ops.mean(ops.stack([three("sigmoid"), three("sigmoid")]), axis=0),
        "weighted sum": lambda: 0.25 * three("softmax") + 0.75 * three("softmax"),
        "complement": lambda: 1 - one(),
        "either of two": lambda: 1 - (1 - one()) * (1 - one()),
        "both sides": lambda: layers.Concatenate()([1 - (p := one()), p]),
        "clipped": lambda: ops.clip(three("softmax"), 1e-7, 1 - 1e-7),
        "times one": lambda: one() * 1.0,
        "hard sigmoid": lambda: one("hard_sigmoid"),
        "written out": written_out,
        "of shares": lambda: (p := three("sigmoid")) / ops.sum(p, axis=-1, keepdims=True),
        "averaged over positions": lambda: layers.GlobalAveragePooling2D()(
            layers.Conv2D(3, 1, activation="softmax")(trunk.map)
        ),
    }


class TestProbabilitiesAlready:
    @pytest.mark.parametrize(
        "how",
        [
            "mean of two sigmoids",
            "largest of two sigmoids",
            "mean of two softmaxes",
            "mean of a stack",
            "weighted sum",
            "complement",
            "either of two",
            "both sides",
            "clipped",
            "times one",
            "hard sigmoid",
            "written out",
            "of shares",
            "averaged over positions",
        ],
    )
    def test_they_are_told_as_the_network_says_them_and_explained_from_it(
        self, how: str, trunk: Trunk, wrap: Wrap, tape_gradients: Callable[..., Any]
    ) -> None:
        import keras

        model = keras.Model(trunk.input, mixtures(trunk)[how]())
        target = "conv2d" if how == "averaged over positions" else "conv"
        network = wrap(model, None if target == "conv2d" else target)
        assert network.facts.head == "probabilities"
        layer = model.get_layer(network.facts.default_layer)
        inputs = PIXELS / np.float32(127.5) - 1
        expected = tape_gradients(model, inputs, layer)
        own, raw = expected.scores, expected.raw
        if own.shape[1] == 1:
            own, raw = np.concatenate([1 - own, own], 1), np.concatenate([-raw, raw], 1)
        classes = own.shape[1]
        seen = explain_pixels(network, PIXELS, [tuple(range(classes))] * 2)
        found = [[one.probability for one in image.explained] for image in seen]
        assert_allclose(found, own, atol=2e-6)
        peak = np.abs(raw).max()
        assert_allclose(network.compute(PIXELS, everything(classes)).raw, raw, atol=1e-4 * peak)
        log = network.compute(PIXELS, everything(classes), Method(score="probability"))
        shares = raw / own[..., None, None]
        assert_allclose(log.raw, shares, atol=1e-4 * np.abs(shares).max())

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_a_class_that_all_are_sure_of_is_not_left_dark(
        self, activation: str, trunk: Trunk, wrap: Wrap
    ) -> None:
        import keras

        members, dense = [], []
        for bias in (60.0, 40.0):
            layer = keras.layers.Dense(2, activation)
            members.append(layer(trunk.pooled))
            layer.set_weights([layer.get_weights()[0], np.array([bias, 0], np.float32)])
            dense.append(layer)
        network = wrap(keras.Model(trunk.input, keras.layers.Average()(members)), "conv")
        found = network.compute(PIXELS, np.zeros((2, 1), np.int32))
        assert_array_equal(found.scores[:, 0], 1)
        expected = np.zeros((2, 1, *found.raw.shape[2:]))
        for layer in dense:
            scores, maps = trunk.scores(layer), trunk.maps(layer)
            margin = scores[:, 0] - (0 if activation == "sigmoid" else scores[:, 1])
            other = 0 if activation == "sigmoid" else maps[:, 1]
            expected[:, 0] += (maps[:, 0] - other) * (np.exp(-margin) / 2)[:, None, None]
        assert_allclose(found.raw, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)

    @pytest.mark.parametrize("units", [1, 3])
    def test_what_may_be_probabilities_or_small_scores_is_refused_until_it_is_declared(
        self, units: int, trunk: Trunk, wrap: Wrap
    ) -> None:
        import keras
        import tensorflow as tf

        class Own(keras.layers.Layer):  # type: ignore[misc]
            def call(self, x: Any) -> Any:
                return tf.sigmoid(x)

        model = keras.Model(trunk.input, Own()(trunk.dense(units)[0]))
        with pytest.raises(NetworkIncompatible, match=r"between 0 and 1 .* \{kind = \"probabilities\"\}"):
            wrap(model)
        network = wrap(model, head=Head(kind="probabilities"))
        own = np.asarray(model(PIXELS / np.float32(127.5) - 1))
        own = np.concatenate([1 - own, own], 1) if units == 1 else own
        assert_allclose(network.scores(PIXELS), own, atol=1e-6)

    def test_a_quantity_is_no_score_of_a_class(self, trunk: Trunk, wrap: Wrap) -> None:
        import keras

        x, layer = trunk.dense(1)
        layer.set_weights([0 * layer.get_weights()[0], np.array([37.0])])
        model = keras.Model(trunk.input, x)
        with pytest.raises(
            NetworkIncompatible, match=r"returns 37.*: that may be the score.* head = \{kind = \"sigmoid\"\}"
        ):
            wrap(model)
        with pytest.raises(
            NetworkIncompatible, match=r"declared as probabilities, but the network returns 37"
        ):
            wrap(model, head=Head(kind="probabilities"))

    @pytest.mark.parametrize("bias", [-3.0, 0.5, 37.0])
    @pytest.mark.parametrize("activation", [None, "relu", "tanh"])
    def test_one_unit_without_a_sigmoid_is_never_taken_for_two_classes_undeclared(
        self, bias: float, activation: str | None, trunk: Trunk, wrap: Wrap
    ) -> None:
        import keras

        x, layer = trunk.dense(1, activation)
        layer.set_weights([0.1 * layer.get_weights()[0], np.array([bias])])
        model = keras.Model(trunk.input, x)
        with pytest.raises(NetworkIncompatible, match=r"a quantity \(a regression\), which is no class"):
            wrap(model)
        assert wrap(model, head=Head(kind="sigmoid")).facts.head == "sigmoid"

    def test_they_cannot_be_declared_to_be_scores(self, trunk: Trunk, wrap: Wrap) -> None:
        import keras

        model = keras.Model(trunk.input, mixtures(trunk)["mean of two softmaxes"]())
        with pytest.raises(NetworkIncompatible, match="probabilities already; its head cannot be softmax"):
            wrap(model, head=Head(kind="softmax"))

    def test_a_softmax_that_is_declared_as_probabilities_is_explained_by_its_scores(
        self, trunk: Trunk, wrap: Wrap
    ) -> None:
        import keras

        x, layer = trunk.dense(3, "softmax")
        network = wrap(keras.Model(trunk.input, x), head=Head(kind="probabilities"))
        assert network.facts.head == "softmax"
        assert_allclose(network.scores(PIXELS), trunk.scores(layer), atol=1e-5)

    def test_a_softmax_over_the_images_is_refused(self, trunk: Trunk, wrap: Wrap) -> None:
        import keras

        model = keras.Model(trunk.input, keras.layers.Softmax(axis=0)(trunk.dense(3)[0]))
        with (
            pytest.warns(UserWarning, match="softmax over axis 0"),
            pytest.raises(NetworkIncompatible, match="computes something else than as a whole"),
        ):
            wrap(model)


class TestRefused:
    @pytest.mark.parametrize(
        ("activation", "kind"), [("softmax", "sigmoid"), ("sigmoid", "softmax"), ("log_softmax", "sigmoid")]
    )
    def test_a_head_cannot_be_what_the_network_says_it_is_not(
        self, activation: str, kind: Any, trunk: Trunk, wrap: Wrap
    ) -> None:
        import keras

        model = keras.Model(trunk.input, trunk.dense(3, activation)[0])
        own = "sigmoid" if activation == "sigmoid" else "softmax"
        with pytest.raises(NetworkIncompatible, match=f"ends in a {own}; its head cannot be {kind}"):
            wrap(model, head=Head(kind=kind))

    @pytest.mark.parametrize("told", [True, False])
    def test_a_softmax_of_one_unit_is_nothing_to_explain(self, told: bool, trunk: Trunk, wrap: Wrap) -> None:
        import keras

        model = keras.Model(trunk.input, trunk.dense(1, None if told else "softmax")[0])
        with pytest.raises(NetworkIncompatible, match="softmax of one unit, which is always 1"):
            wrap(model, head=Head(kind="softmax") if told else None)

    def test_a_map_of_classes_is_no_list_of_scores(self, trunk: Trunk, wrap: Wrap) -> None:
        import keras

        x = keras.layers.Conv2D(3, 1, activation="softmax")(trunk.map)
        with pytest.raises(
            NetworkIncompatible, match=r"shape \(None, 5, 7, 3\); a classifier's is \(None, c"
        ):
            wrap(keras.Model(trunk.input, x))


class TestSeveralOutputs:
    @pytest.mark.parametrize("shape", ["list", "dictionary"])
    @pytest.mark.parametrize("name", ["animal", "colour"])
    def test_one_is_chosen_by_its_name(self, name: str, shape: str, trunk: Trunk, wrap: Wrap) -> None:
        import keras

        dense = {
            "colour": keras.layers.Dense(4, "softmax", name="colour"),
            "animal": keras.layers.Dense(3, "sigmoid", name="animal"),
        }
        outputs: Any = {key: layer(trunk.pooled) for key, layer in dense.items()}
        model = keras.Model(trunk.input, outputs if shape == "dictionary" else [*outputs.values()])
        network = wrap(model, head=Head(output=name))
        computed = network.compute(PIXELS, everything(3))
        assert_allclose(computed.scores, trunk.scores(dense[name]), atol=1e-5)
        maps = trunk.maps(dense[name])[:, :3]
        assert_allclose(computed.raw, maps, atol=1e-5 * np.abs(maps).max())
        assert network.facts.head == ("sigmoid" if name == "animal" else "softmax")

    @pytest.mark.parametrize("output", [None, "shape"])
    def test_the_names_are_told_where_none_or_another_is_chosen(
        self, output: str | None, trunk: Trunk, wrap: Wrap
    ) -> None:
        import keras

        outputs = [keras.layers.Dense(3, name=name)(trunk.pooled) for name in ("colour", "animal")]
        said = (
            "no output 'shape'; it has colour, animal"
            if output
            else r'2 outputs: choose one of colour, animal, as in head = \{output = "colour"\}'
        )
        with pytest.raises(NetworkIncompatible, match=said):
            wrap(keras.Model(trunk.input, outputs), head=Head(output=output))

    def test_outputs_of_one_nested_model_are_told_apart_by_numbers(self, trunk: Trunk, wrap: Wrap) -> None:
        import keras

        features = keras.Input((CHANNELS,))
        dense = [keras.layers.Dense(classes, "softmax") for classes in (3, 4)]
        heads = keras.Model(features, [layer(features) for layer in dense], name="heads")
        network = wrap(keras.Model(trunk.input, heads(trunk.pooled)), head=Head(output="heads:1"))
        assert_allclose(network.scores(PIXELS), trunk.scores(dense[1]), atol=1e-5)
