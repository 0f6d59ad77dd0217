"""EfficientNet-Lite0, the network whose weights are shipped. Keras does not have it."""

from typing import Any

from gradcam_worker.gradcam.backend import keras

layers = keras.layers


def efficientnet_lite0(weights: str | None) -> Any:
    """Build EfficientNet-Lite0: B0 (Tan and Le, arXiv 1905.11946) without squeeze-excite and with relu6.

    The layers are built in the order in which the weights file numbers them.

    Args:
        weights: Path of a weights file; None: random weights.

    Returns:
        A Keras model: input (224, 224, 3), target layer `top_act` (7, 7, 1280), 1000 scores without softmax.
    """
    stages = (  # repeats, kernel, stride, expansion, channels
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )

    def convolve(x: Any, name: str, channels: int | None, kernel: int, stride: int = 1) -> Any:
        """A convolution (depthwise where `channels` is None) and its batch normalisation."""
        options = {"strides": stride, "padding": "same", "use_bias": False, "name": f"{name}_conv"}
        if channels is None:
            x = layers.DepthwiseConv2D(kernel, **options)(x)
        else:
            x = layers.Conv2D(channels, kernel, **options)(x)
        return layers.BatchNormalization(epsilon=1e-3, name=f"{name}_bn")(x)

    inputs = keras.Input((224, 224, 3))
    x = layers.ReLU(6.0, name="stem_act")(convolve(inputs, "stem", 32, 3, 2))
    for stage, (repeats, kernel, stride, expansion, channels) in enumerate(stages, start=1):
        for repeat in range(repeats):
            name, shortcut = f"block{stage}{'abcd'[repeat]}", x
            if expansion > 1:
                x = convolve(x, f"{name}_expand", expansion * shortcut.shape[-1], 1)
                x = layers.ReLU(6.0, name=f"{name}_expand_act")(x)
            x = convolve(x, f"{name}_depthwise", None, kernel, 1 if repeat else stride)
            x = layers.ReLU(6.0, name=f"{name}_depthwise_act")(x)
            x = convolve(x, f"{name}_project", channels, 1)
            if repeat:
                x = layers.Add(name=f"{name}_add")([x, shortcut])
    x = layers.ReLU(6.0, name="top_act")(convolve(x, "top", 1280, 1))
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    x = layers.Dropout(0.2, name="dropout")(x)
    model = keras.Model(inputs, layers.Dense(1000, name="scores")(x), name="efficientnet_lite0")
    if weights:
        model.load_weights(weights)
    return model
