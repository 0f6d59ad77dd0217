"""Graphs of TensorFlow Lite become Keras models that compute the same."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.gradcam.files.model_file import Refused

pytestmark = [
    pytest.mark.tensorflow,
    pytest.mark.filterwarnings("ignore:Statistics for quantized inputs"),  # of TensorFlow's converter
]

SIZE = (24, 32, 3)
PIXELS = np.random.default_rng(5).uniform(-1, 1, (3, *SIZE)).astype(np.float32)
Layers = Callable[[Any, Any, Any], Any]


def convolutional(layers: Any, ops: Any, x: Any) -> Any:
    """The operators of MobileNet, ResNet, EfficientNet and Inception."""
    x = layers.ZeroPadding2D(((0, 1), (1, 0)))(x)
    x = layers.BatchNormalization(scale=False)(layers.Conv2D(8, 3, 2, use_bias=False)(x))
    y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(layers.ReLU(6.0)(x))
    y = layers.Conv2D(8, 1, activation="swish")(y)
    x = layers.Add()([x, y])
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = layers.Multiply()([x, layers.Conv2D(8, 1, activation="sigmoid")(gate)])
    sides = [layers.MaxPooling2D(3, 1, "same")(x), layers.AveragePooling2D(2, 1, "same")(x)]
    x = layers.Concatenate()([*sides, layers.Conv2D(8, 3, padding="same", dilation_rate=2)(x)])
    x = layers.Conv2D(6, 3, groups=2, activation="elu")(x)
    x = layers.PReLU("random_normal", shared_axes=[1, 2])(x)
    x = layers.LeakyReLU(0.1)(layers.Activation("hard_silu")(x) * 0.5 + 0.25)
    x = layers.Flatten()(layers.AveragePooling2D(2)(layers.Activation("tanh")(x)))
    return layers.Dense(5, "softmax")(layers.Dense(7, "gelu")(x))


def attentive(layers: Any, ops: Any, x: Any) -> Any:
    """The operators of a vision transformer."""
    x = layers.Conv2D(8, 8, 8)(x)
    x = layers.Reshape((-1, 8))(x)
    y = layers.LayerNormalization()(x)
    x = layers.Add()([x, layers.MultiHeadAttention(2, 4)(y, y)])
    x = ops.max(layers.LayerNormalization()(x), axis=1) - x[:, 0]
    return layers.Dense(1, "sigmoid")(x)


def model_of(layered: Layers) -> Any:
    import keras

    keras.utils.set_random_seed(3)
    image = keras.Input(SIZE)
    model = keras.Model(image, layered(keras.layers, keras.ops, image))
    rng = np.random.default_rng(4)
    for weight in model.weights:
        values = rng.normal(0, 0.4, weight.shape)
        weight.assign(np.abs(values) + 0.5 if "variance" in weight.path else values)
    return model


def flatbuffer(model: Any, *, batch: int | None = 1, **options: Any) -> bytes:
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    function = tf.function(lambda image: model(image, training=False))
    frozen = convert_variables_to_constants_v2(
        function.get_concrete_function(tf.TensorSpec((batch, *SIZE), "float32"))
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen])
    for name, value in options.items():
        setattr(converter, name, value)
    return bytes(converter.convert())


def rebuilt(data: bytes) -> Any:
    from gradcam_worker.gradcam.conversion import tflite_file, tflite_layers

    return tflite_layers.build(tflite_file.read(data))


def outputs(model: Any, pixels: NDArray[Any] = PIXELS) -> NDArray[np.float32]:
    return np.asarray(model(pixels, training=False))


@pytest.mark.parametrize("layered", [convolutional, attentive])
@pytest.mark.parametrize("batch", [1, None])
def test_a_graph_is_rebuilt_by_layers_that_compute_the_same(layered: Layers, batch: int | None) -> None:
    model = model_of(layered)
    actual = rebuilt(flatbuffer(model, batch=batch))
    assert_allclose(outputs(actual), outputs(model), atol=2e-6)
    assert actual.input_shape == (None, *SIZE), "for any number of images"


def test_weights_that_are_stored_as_float16_are_read() -> None:
    import tensorflow as tf

    model = model_of(convolutional)
    data = flatbuffer(
        model,
        optimizations=[tf.lite.Optimize.DEFAULT],
        target_spec=tf.lite.TargetSpec(supported_types=[tf.float16]),
    )
    assert_allclose(outputs(rebuilt(data)), outputs(model), atol=5e-3)


def test_a_quantised_graph_is_rebuilt_without_its_rounding() -> None:
    import tensorflow as tf

    from gradcam_worker.gradcam.conversion import tflite_file

    model = model_of(convolutional)
    data = flatbuffer(
        model,
        optimizations=[tf.lite.Optimize.DEFAULT],
        representative_dataset=lambda: ([image[np.newaxis]] for image in PIXELS),
        target_spec=tf.lite.TargetSpec(supported_ops=[tf.lite.OpsSet.TFLITE_BUILTINS_INT8]),
        inference_input_type=tf.uint8,
        inference_output_type=tf.uint8,
    )
    graph = tflite_file.read(data)
    assert graph.rounds
    assert not tflite_file.read(flatbuffer(model)).rounds
    image = graph.tensors[graph.inputs[0]]
    stored = np.clip(np.round(PIXELS / image.scale + image.zero_point), 0, 255).astype(np.float32)
    assert_allclose(outputs(rebuilt(data), stored), outputs(model), atol=0.05)


def test_signed_weights_that_tensorflow_1_stored_as_unsigned_are_read_as_signed() -> None:
    import tensorflow as tf
    from tensorflow.lite.python import schema_py_generated as schema
    from tensorflow.lite.tools import flatbuffer_utils

    def wide(layers: Any, ops: Any, x: Any) -> Any:
        x = layers.GlobalAveragePooling2D()(layers.Conv2D(128, 3, activation="relu")(x))
        return layers.Dense(16)(x)

    model = model_of(wide)
    file = schema.ModelT.InitFromPackedBuf(
        bytearray(flatbuffer(model, optimizations=[tf.lite.Optimize.DEFAULT])), 0
    )
    weights = [tensor for tensor in file.subgraphs[0].tensors if tensor.type == schema.TensorType.INT8]
    assert weights
    for tensor in weights:
        tensor.type = schema.TensorType.UINT8
    unsigned = bytes(flatbuffer_utils.convert_object_to_bytearray(file))
    assert_allclose(outputs(rebuilt(unsigned)), outputs(model), rtol=0.05, atol=0.2)


def test_an_operator_without_a_counterpart_is_named() -> None:
    def sorted_values(layers: Any, ops: Any, x: Any) -> Any:
        return ops.top_k(layers.Flatten()(x), 5)[0]

    with pytest.raises(Refused, match="has the operator TOPK_V2, which no layer of Keras stands for here"):
        rebuilt(flatbuffer(model_of(sorted_values)))


@pytest.mark.parametrize("data", [b"", b"\x1c\0\0\0TFL3\0", b"\x1c\0\0\0TFL3" + bytes(100)])
def test_a_damaged_file_is_refused(data: bytes) -> None:
    with pytest.raises(Refused, match=r"is a damaged \.tflite file"):
        rebuilt(data)
