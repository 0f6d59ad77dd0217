"""The networks that can be named in a job, one row of data each."""

import difflib
from dataclasses import dataclass

from worker.errors import UnknownNetwork


@dataclass(frozen=True)
class Preprocessing:
    """uint8 RGB -> what the network was trained on: `(channels in order - mean) / std`."""

    name: str
    order: tuple[int, int, int]  # which RGB channel comes first, second, third
    mean: tuple[float, float, float]  # in the network's own order, in units of 0..255
    std: float  # in units of 0..255


CAFFE = Preprocessing("caffe", (2, 1, 0), (103.939, 116.779, 123.68), 1.0)
SYMMETRIC = Preprocessing("tf", (0, 1, 2), (127.5, 127.5, 127.5), 127.5)
LITE = Preprocessing("lite", (0, 1, 2), (127.0, 127.0, 127.0), 128.0)


@dataclass(frozen=True)
class NetworkRow:
    """One network: how to build it, what to feed it, where to look."""

    name: str
    builder: str  # "module:function", called with `weights`
    input_size: tuple[int, int]  # (height, width) in pixels
    target_layer: str
    map_size: tuple[int, int]  # (rows, columns) of the target layer
    preprocessing: Preprocessing
    parameters: int
    keras_files: tuple[str, ...] = ()  # what Keras calls its own ImageNet download
    shipped: str | None = None  # the weights file in `data/`, where the project ships one
    sha256: str | None = None  # of the shipped file


CATALOG = {
    row.name: row
    for row in (
        NetworkRow(
            name="vgg16",
            builder="keras.applications:VGG16",
            input_size=(224, 224),
            target_layer="block5_conv3",
            map_size=(14, 14),
            preprocessing=CAFFE,
            parameters=138_357_544,
            keras_files=("vgg16_weights_tf_dim_ordering_tf_kernels.h5",),
        ),
        NetworkRow(
            name="xception",
            builder="keras.applications:Xception",
            input_size=(299, 299),
            target_layer="block14_sepconv2_act",
            map_size=(10, 10),
            preprocessing=SYMMETRIC,
            parameters=22_910_480,
            keras_files=("xception_weights_tf_dim_ordering_tf_kernels.h5",),
        ),
        NetworkRow(
            name="efficientnet_lite0",
            builder="worker.gradcam.keras_network:efficientnet_lite0",
            input_size=(224, 224),
            target_layer="top_act",
            map_size=(7, 7),
            preprocessing=LITE,
            parameters=4_694_024,
            shipped="efficientnet_lite0.weights.h5",
            sha256="ae323d591005dc2798c373c62c2beee9c9b40a1390ff2d73d1c74517f2483d4e",
        ),
    )
}


def find(name: str) -> NetworkRow:
    """The row of a network. Raises UnknownNetwork with the names there are."""
    if name in CATALOG:
        return CATALOG[name]
    near = difflib.get_close_matches(name.casefold(), CATALOG, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    message = f"There is no network {name!r}; there are {', '.join(sorted(CATALOG))}.{hint}"
    raise UnknownNetwork(message)
