"""The shorter way back is taken where it may be, and gives what the whole way gives."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.network import Method
from tests.gradcam.small_networks import ALL_CLASSES, CLASSES, COLUMNS, ROWS, Wrap, backbone

pytestmark = [pytest.mark.tensorflow, pytest.mark.usefixtures("eagerly")]

Tail = Callable[[Any, Any], Any]  # keras, activations (5, 7, 6) -> scores
Noise = Callable[..., NDArray[np.uint8]]
PLAIN = [Method()]
METHODS = [
    *(Method(name) for name in ("gradcam", "counterfactual", "notebook", "eigencam")),
    Method(flip=True),
    Method(score="probability"),
]


def dense(keras: Any, x: Any, units: int = CLASSES, activation: str = "softmax") -> Any:
    return keras.layers.Dense(units, activation, bias_initializer="random_normal")(x)


def pooled(keras: Any, x: Any) -> Any:
    return dense(keras, keras.layers.GlobalAveragePooling2D()(x))


def in_one_line(keras: Any, x: Any) -> Any:
    return dense(keras, keras.layers.Flatten()(x))


def two_hidden_layers(keras: Any, x: Any) -> Any:
    x = keras.layers.Flatten()(keras.layers.MaxPooling2D(2)(x))
    x = dense(keras, keras.layers.Dropout(0.5)(x), 8, "tanh")
    return dense(keras, dense(keras, x, 7, "relu"))


def convolved(keras: Any, x: Any) -> Any:
    """The head of (1, 1, channels) by a convolution and a curve."""
    x = keras.layers.Conv2D(8, 1, activation="tanh")(x)
    return keras.layers.Softmax()(keras.layers.Flatten()(keras.layers.Conv2D(CLASSES, 1)(x)))


def idle(keras: Any, x: Any) -> Any:
    x = keras.layers.SpatialDropout2D(0.3)(keras.layers.GaussianNoise(1.0)(x))
    return pooled(keras, keras.layers.Activation("linear")(x))


def own_activation(keras: Any, x: Any) -> Any:
    """A hidden layer whose activation is a layer that has learned something."""
    x = keras.layers.Flatten()(x)
    prelu = keras.layers.PReLU(alpha_initializer="random_normal")
    return dense(keras, keras.layers.Dense(8, activation=prelu)(x))


SHORT: dict[str, Tail] = {
    "global average": pooled,
    "global maximum": lambda keras, x: dense(keras, keras.layers.GlobalMaxPooling2D()(x)),
    "one position": lambda keras, x: convolved(keras, keras.layers.GlobalAveragePooling2D(keepdims=True)(x)),
    "mean": lambda keras, x: dense(keras, keras.ops.mean(x, axis=(1, 2))),
    "mean by negative axes": lambda keras, x: convolved(keras, keras.ops.mean(x, [-2, -3], keepdims=True)),
    "largest": lambda keras, x: dense(keras, keras.ops.max(x, axis=(1, 2))),
    "pooled to one position": lambda keras, x: convolved(keras, keras.layers.AveragePooling2D((5, 7))(x)),
    "max pooling with a border": lambda keras, x: pooled(keras, keras.layers.MaxPooling2D(2, 2, "same")(x)),
    "overlapping maxima": lambda keras, x: pooled(keras, keras.layers.MaxPooling2D(3, 1, "same")(x)),
    "average that drops the last row": lambda keras, x: pooled(keras, keras.layers.AveragePooling2D(2)(x)),
    "operations": lambda keras, x: pooled(keras, keras.ops.average_pool(keras.ops.max_pool(x, 2), 2)),
    "idle layers": idle,
    "class maps": lambda keras, x: keras.layers.Softmax()(keras.layers.GlobalAveragePooling2D()(x)),
    "scores in a map": lambda keras, x: keras.layers.Conv2D(5, 1, activation="softmax")(
        keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
    ),
    "one unit": lambda keras, x: dense(keras, keras.layers.GlobalAveragePooling2D()(x), 1, "sigmoid"),
    "in one line": in_one_line,
    "reshaped": lambda keras, x: dense(keras, keras.layers.Reshape((210,))(x)),
    "reshaped by an operation": lambda keras, x: dense(keras, keras.ops.reshape(x, (-1, 210)), 1, "sigmoid"),
    "hidden layers": two_hidden_layers,
    "an activation with weights": own_activation,
    "no bias": lambda keras, x: keras.layers.Dense(CLASSES, "softmax", use_bias=False)(
        keras.layers.Flatten()(x)
    ),
}

ALL_METHODS = {
    "global average",
    "scores in a map",
    "one unit",
    "hidden layers",
}  # others differ in their tail


def own_pooling(keras: Any, x: Any) -> Any:
    """A layer that has the name of Keras's own, and does something else."""
    own: Any = type(
        "GlobalAveragePooling2D",
        (keras.layers.Layer,),
        {
            "call": lambda _, x: keras.ops.sum(x * x, axis=(1, 2)),
            "compute_output_shape": lambda _, shape: (shape[0], shape[-1]),
        },
    )
    return dense(keras, own()(x))


def read_twice(keras: Any, x: Any) -> Any:
    both = [keras.layers.GlobalAveragePooling2D()(x), keras.layers.GlobalMaxPooling2D()(x)]
    return dense(keras, keras.layers.Concatenate()(both))


LONG: dict[str, Tail] = {
    "zero padding": lambda keras, x: in_one_line(keras, keras.layers.ZeroPadding2D(1)(x)),
    "cropping": lambda keras, x: pooled(keras, keras.layers.Cropping2D(1)(x)),
    "batch normalization": lambda keras, x: pooled(keras, keras.layers.BatchNormalization()(x)),
    "average pooling with a border": lambda keras, x: pooled(
        keras, keras.layers.AveragePooling2D(2, 2, "same")(x)
    ),
    "a curve": lambda keras, x: pooled(keras, keras.layers.Activation("relu")(x)),
    "two readers": read_twice,
    "one reader twice": lambda keras, x: pooled(keras, keras.layers.Multiply()([x, x])),
    "a sum": lambda keras, x: dense(keras, keras.ops.sum(x, axis=(1, 2))),
    "a mean of rows alone": lambda keras, x: in_one_line(keras, keras.ops.mean(x, axis=1)),
    "channels as positions": lambda keras, x: dense(keras, keras.ops.mean(x, axis=(2, 3))),
    "reordered": lambda keras, x: in_one_line(keras, keras.layers.Permute((3, 1, 2))(x)),
    "cut in line": lambda keras, x: in_one_line(keras, keras.layers.Reshape((35, 6))(x)),
    "something learned in line": lambda keras, x: dense(
        keras, keras.layers.LayerNormalization()(keras.layers.Flatten()(x))
    ),
    "somebody's own pooling": own_pooling,
}


@pytest.fixture
def wrap_tail(wrap: Wrap) -> Callable[..., Any]:
    """The backbone and a tail as a network whose target layer is `act`."""

    def wrap_tail(tail: Tail, **more: Any) -> Any:
        import keras

        keras.utils.set_random_seed(4)
        inputs = keras.Input((ROWS, COLUMNS, 3))
        return wrap(keras.Model(inputs, tail(keras, backbone(keras)(inputs))), "act", **more)

    return wrap_tail


def shortcut_of(network: Any) -> Any:
    from gradcam_worker.gradcam.graph import shortcut

    scores = network._scores
    return shortcut.find_shortcut(scores.graph, scores.slot, network._target(network.facts.default_layer))


def assert_same(network: Any, exact: Any, pixels: NDArray[np.uint8], methods: list[Method]) -> None:
    """These methods give by either way the same, to 1e-5 of the peak."""
    for method in methods:
        wanted = ALL_CLASSES % network._scores.classes
        seen, expected = (one.compute(pixels, wanted, method) for one in (network, exact))
        peak = np.abs(expected.raw).max()
        assert peak > 0
        assert seen.raw.shape == expected.raw.shape
        assert_allclose(seen.raw, expected.raw, atol=1e-5 * peak, rtol=0, err_msg=str(method))
        assert_allclose(seen.scores, expected.scores, atol=1e-6)
        assert_array_equal(seen.class_ids, expected.class_ids)


@pytest.mark.parametrize("case", SHORT)
def test_the_way_back_is_shorter_and_gives_the_same(
    case: str, wrap_tail: Callable[..., Any], noise: Noise
) -> None:
    network, exact = (wrap_tail(SHORT[case], exact_backward=exact) for exact in (False, True))
    found = shortcut_of(network)
    assert found is not None
    assert found.size < network._target("act").size
    assert_same(network, exact, noise(2, ROWS, COLUMNS), METHODS if case in ALL_METHODS else PLAIN)


@pytest.mark.parametrize("case", LONG)
def test_the_whole_way_is_gone_where_a_shorter_one_would_not_give_the_same_or_might_not(
    case: str, wrap_tail: Callable[..., Any], noise: Noise
) -> None:
    network = wrap_tail(LONG[case])
    assert shortcut_of(network) is None
    assert_same(network, wrap_tail(LONG[case], exact_backward=True), noise(2, ROWS, COLUMNS), PLAIN)


@pytest.mark.parametrize("joins_behind", [True, False])
def test_what_comes_beside_the_layer_is_joined_behind_the_pooling_or_the_whole_way_is_gone(
    joins_behind: bool, wrap: Wrap, noise: Noise
) -> None:
    import keras

    keras.utils.set_random_seed(4)
    inputs = keras.Input((ROWS, COLUMNS, 3))
    x = skipped = keras.layers.Conv2D(6, 3, activation="tanh")(inputs)
    x = keras.layers.Conv2D(6, 3, padding="same", activation="tanh", name="act")(x)
    pool = keras.layers.MaxPooling2D(2)
    if joins_behind:
        both = [keras.layers.GlobalAveragePooling2D()(one) for one in (pool(x), skipped)]
        x = dense(keras, keras.layers.Multiply()(both))
    else:
        x = in_one_line(keras, pool(keras.layers.Add()([x, skipped])))
    network, exact = (wrap(keras.Model(inputs, x), "act", exact_backward=exact) for exact in (False, True))
    assert (shortcut_of(network) is not None) == joins_behind
    assert_same(network, exact, noise(2, ROWS, COLUMNS), PLAIN)


@pytest.mark.parametrize("name", ["gradcam++", "hirescam", "xgradcam", "layercam"])
def test_methods_that_need_every_gradient_go_the_whole_way(
    name: str, wrap_tail: Callable[..., Any], noise: Noise
) -> None:
    network, pixels = wrap_tail(pooled), noise(2, ROWS, COLUMNS)
    seen = network.compute(pixels, ALL_CLASSES, Method(name))
    assert network._shortcuts == {}
    expected = wrap_tail(pooled, exact_backward=True).compute(pixels, ALL_CLASSES, Method(name))
    assert_array_equal(seen.raw, expected.raw)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # keras, quantizing
def test_weights_in_eight_bits_are_not_summed(wrap_tail: Callable[..., Any]) -> None:
    network = wrap_tail(two_hidden_layers)
    first = next(one for one in network._model.layers if type(one).__name__ == "Dense")
    first.quantize("int8")
    assert shortcut_of(network) is None


def test_tokens_go_the_whole_way(wrap: Wrap) -> None:
    import keras

    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Reshape((16, 6))(keras.layers.Conv2D(6, 2, 2)(inputs))
    x = keras.layers.Add(name="mixed")([x, keras.layers.MultiHeadAttention(1, 6)(x, x)])
    x = dense(keras, keras.layers.GlobalAveragePooling1D()(x))
    network = wrap(keras.Model(inputs, x))
    assert network.facts.default_layer == "mixed"
    assert shortcut_of(network) is None


@pytest.mark.parametrize("tail", [pooled, two_hidden_layers])
@pytest.mark.parametrize("precision", ["bfloat16", "mixed_bfloat16"])
def test_in_fewer_digits_both_ways_are_near(tail: Tail, precision: str, wrap: Wrap, noise: Noise) -> None:
    import keras

    from gradcam_worker.gradcam.models.precision import with_precision

    keras.utils.set_random_seed(4)
    inputs = keras.Input((ROWS, COLUMNS, 3))
    model = with_precision(keras.Model(inputs, tail(keras, backbone(keras)(inputs))), precision)
    network, exact = (wrap(model, "act", exact_backward=exact) for exact in (False, True))
    assert shortcut_of(network) is not None
    seen, expected = (one.compute(noise(2, ROWS, COLUMNS), ALL_CLASSES) for one in (network, exact))
    assert seen.raw.dtype == np.float32
    assert_allclose(seen.raw, expected.raw, atol=0.03 * np.abs(expected.raw).max(), rtol=0)
    assert_allclose(seen.scores, expected.scores, atol=0.02 * np.abs(expected.scores).max())


def test_the_model_is_not_changed_by_a_dense_layer_in_two(
    wrap_tail: Callable[..., Any], noise: Noise
) -> None:
    network = wrap_tail(two_hidden_layers)
    model, pixels = network._model, noise(2, ROWS, COLUMNS)
    before, weights = model(pixels / 255).numpy(), model.get_weights()
    network.compute(pixels, ALL_CLASSES)
    assert_array_equal(model(pixels / 255).numpy(), before)
    for mine, theirs in zip(weights, model.get_weights(), strict=True):
        assert_array_equal(mine, theirs)
