"""The networks of the catalog, one row each: architecture, preprocessing, target layer, weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

from gradcam_worker.errors import NetworkIncompatible, UnknownNetwork
from gradcam_worker.gradcam.network_inputs import NetworkInput
from gradcam_worker.gradcam.sizing import DEFAULT_SIZING, Sizing
from gradcam_worker.text.similar_names import nearest

MODEL_FILE_ENDINGS = (
    ".keras",
    ".h5",
    ".hdf5",
    ".onnx",
    ".pb",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
)  # not names of networks
Channels = Literal["rgb", "bgr", "grey", "grey_mean"] | int
GREYS = ("grey", "grey_mean")
Layout = Literal["nchw", "nhwc"]


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become the input of a network: `(channels - mean) / std`.

    Attributes:
        name: As in `PREPROCESSING`.
        mean: For each channel in the order of the network, or one for all; from 0 to 255.
        std: As `mean`.
        channels: The order of the colours, or `grey` for their luminance, `grey_mean` for their mean, or, for
            images that are no photos, the number of channels.
    """

    name: str
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: Channels = "rgb"

    @property
    def pixel_channels(self) -> int:
        """The number of channels of the images."""
        return self.channels if isinstance(self.channels, int) else 3

    @property
    def input_channels(self) -> int:
        """The number of channels of the network's input."""
        return 1 if self.channels in GREYS else self.pixel_channels


PREPROCESSING = {  # named as in Keras, if Keras has it
    preprocessing.name: preprocessing
    for preprocessing in (
        Preprocessing("caffe", (103.939, 116.779, 123.68), channels="bgr"),
        Preprocessing("tf", (127.5,), (127.5,)),
        Preprocessing("torch", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        Preprocessing("lite", (127.0,), (128.0,)),
        Preprocessing("unit", (0.0,), (255.0,)),  # to [0, 1]
        Preprocessing("none"),  # 0..255: the network does it
    )
}


def find_preprocessing(preprocessing: Any) -> Preprocessing:
    """The preprocessing of this name. Raises NetworkIncompatible."""
    if isinstance(preprocessing, Preprocessing):
        return preprocessing
    if not isinstance(preprocessing, str):
        message = (
            f"preprocessing is one of {', '.join(PREPROCESSING)}, or as in "
            f'Preprocessing("mine", mean=(127.5,), std=(127.5,)), not {preprocessing!r}.'
        )
        raise NetworkIncompatible(message)
    if preprocessing not in PREPROCESSING:
        message = f"There is no preprocessing {preprocessing!r}; there are {', '.join(PREPROCESSING)}."
        raise NetworkIncompatible(message)
    return PREPROCESSING[preprocessing]


HeadKind = Literal["softmax", "sigmoid", "probabilities"]  # the last: its outputs are used as they are


@dataclass(frozen=True)
class Head:
    """How to read the outputs of a network, if its graph does not show it.

    Attributes:
        kind: How scores become probabilities; None: by the last activation, else by observation.
        output: The name of one of several outputs.
    """

    kind: HeadKind | None = None
    output: str | None = None


@dataclass(frozen=True)
class ModelFile:
    """A file of an operator's network. Nothing in it is used before its checksum is verified."""

    uri: str  # a path, file:// or s3://
    sha256: str


@dataclass(frozen=True)
class NetworkRow:
    """A network. Its model is made by `builder`, or it is a `.keras`, `.onnx` or `.tflite` file."""

    name: str
    input_size: tuple[int, int]  # (height, width) in pixels
    preprocessing: Preprocessing
    builder: str | None = None  # "module:function", called with `weights` as those of Keras
    target_layer: str | None = None  # None: found in the graph
    map_size: tuple[int, int] | None = None  # (rows, columns) of the target layer; None: not known before
    parameters: int | None = None
    keras_files: tuple[str, ...] = ()  # name of the ImageNet weights that Keras downloads
    # Factors of the normalised channels, in a layer that Keras adds only with weights="imagenet"
    imagenet_scale: tuple[float, ...] = ()
    shipped: str | None = None  # the weights file in `data/`, if it is shipped
    sha256: str | None = None  # of the shipped file
    # Of an operator's networks only, see `registry.registry`:
    file: ModelFile | None = None  # `.keras`, or with a builder `.weights.h5`
    labels: tuple[str, ...] | None = None  # None: ImageNet's; empty: numbered classes
    classes: int | None = None  # with a builder: of its head; None: the default of Keras
    pretrained: bool | None = None  # built with weights="imagenet"; None: read from the file
    head: Head = Head()
    scores_only: bool = False  # it is not taken apart: RISE and occlusion alone explain it
    layout: Layout | None = None  # of the input of an ONNX or TFLite file; None: read from the file
    sizing: Sizing = DEFAULT_SIZING
    imports: tuple[str, ...] = ()  # modules that define layers of the model, imported before it is loaded
    inputs: tuple[NetworkInput, ...] = ()  # beside the image
    image_input: str | None = None  # the name of the model's input for the image; None: found by its shape

    def __post_init__(self) -> None:
        """Check what Python does not: notebooks have no type checker. Raises NetworkIncompatible."""
        given: Any = (self.input_size, self.head, self.inputs)
        size, head, inputs = given
        is_size = isinstance(size, tuple | list) and all(isinstance(side, Integral) for side in size)
        if not is_size or len(size) != 2 or min(size) < 1:  # noqa: PLR2004  # height and width
            message = f"input_size is (height, width) in pixels, as in (224, 224), not {size!r}."
        elif not isinstance(head, Head):
            message = f'head is as in Head(kind="softmax"), not {head!r}.'
        elif wrong := [one for one in inputs if not isinstance(one, NetworkInput)]:
            message = f'inputs is a list, as in [NetworkInput("age", minimum=0)]; in it is {wrong[0]!r}.'
        else:
            return
        raise NetworkIncompatible(message)

    def check_input_type(self, dtype: str) -> None:
        """Check that an input of whole numbers gets the pixels as they are. Raises NetworkIncompatible."""
        preprocessing = self.preprocessing
        if "float" not in dtype and ({*preprocessing.mean} != {0} or {*preprocessing.std} != {1}):
            message = (
                f"{self.name} takes whole numbers ({dtype}), the pixels as they are: its preprocessing must "
                f"be none, not {preprocessing.name}."
            )
            raise NetworkIncompatible(message)


def _keras(
    function: str,
    side: int,
    preprocessing: str,
    target_layer: str,
    cells: int,
    parameters: int,
    file: str | None = None,
    imagenet_scale: tuple[float, ...] = (),
) -> NetworkRow:
    """A row for a network of `keras.applications`: square images, the classes of ImageNet."""
    name = function.casefold()
    return NetworkRow(
        name=name,
        input_size=(side, side),
        preprocessing=PREPROCESSING[preprocessing],
        builder=f"keras.applications:{function}",
        target_layer=target_layer,
        map_size=(cells, cells),
        parameters=parameters,
        keras_files=((file or f"{name}_weights_tf_dim_ordering_tf_kernels") + ".h5",),
        imagenet_scale=imagenet_scale,
    )


def _efficientnet(function: str, side: int, cells: int, parameters: int) -> NetworkRow:
    """A row for B0 to B7, whose ImageNet weights need channels divided by the root of their deviation."""
    scale = tuple(1 / math.sqrt(deviation) for deviation in (0.229, 0.224, 0.225))
    return _keras(
        function, side, "none", "top_activation", cells, parameters, function.casefold(), imagenet_scale=scale
    )


CATALOG: dict[str, NetworkRow] = {
    row.name: row
    for row in (
        NetworkRow(
            name="efficientnet_lite0",
            input_size=(224, 224),
            preprocessing=PREPROCESSING["lite"],
            builder="gradcam_worker.gradcam.models.efficientnet_lite:efficientnet_lite0",
            target_layer="top_act",
            map_size=(7, 7),
            parameters=4_694_024,
            shipped="efficientnet_lite0.weights.h5",
            sha256="ae323d591005dc2798c373c62c2beee9c9b40a1390ff2d73d1c74517f2483d4e",
        ),
        _keras("ConvNeXtBase", 224, "none", "add_35", 7, 88_591_464, "convnext_base"),
        _keras("ConvNeXtLarge", 224, "none", "add_35", 7, 197_767_336, "convnext_large"),
        _keras("ConvNeXtSmall", 224, "none", "add_35", 7, 50_223_688, "convnext_small"),
        _keras("ConvNeXtTiny", 224, "none", "add_17", 7, 28_589_128, "convnext_tiny"),
        _keras("ConvNeXtXLarge", 224, "none", "add_35", 7, 350_196_968, "convnext_xlarge"),
        _keras("DenseNet121", 224, "torch", "relu", 7, 8_062_504),
        _keras("DenseNet169", 224, "torch", "relu", 7, 14_307_880),
        _keras("DenseNet201", 224, "torch", "relu", 7, 20_242_984),
        _efficientnet("EfficientNetB0", 224, 7, 5_330_571),
        _efficientnet("EfficientNetB1", 240, 8, 7_856_239),
        _efficientnet("EfficientNetB2", 260, 9, 9_177_569),
        _efficientnet("EfficientNetB3", 300, 10, 12_320_535),
        _efficientnet("EfficientNetB4", 380, 12, 19_466_823),
        _efficientnet("EfficientNetB5", 456, 15, 30_562_527),
        _efficientnet("EfficientNetB6", 528, 17, 43_265_143),
        _efficientnet("EfficientNetB7", 600, 19, 66_658_687),
        _keras("EfficientNetV2B0", 224, "none", "top_activation", 7, 7_200_312, "efficientnetv2-b0"),
        _keras("EfficientNetV2B1", 240, "none", "top_activation", 8, 8_212_124, "efficientnetv2-b1"),
        _keras("EfficientNetV2B2", 260, "none", "top_activation", 9, 10_178_374, "efficientnetv2-b2"),
        _keras("EfficientNetV2B3", 300, "none", "top_activation", 10, 14_467_622, "efficientnetv2-b3"),
        _keras("EfficientNetV2S", 384, "none", "top_activation", 12, 21_612_360, "efficientnetv2-s"),
        _keras("EfficientNetV2M", 480, "none", "top_activation", 15, 54_431_388, "efficientnetv2-m"),
        _keras("EfficientNetV2L", 480, "none", "top_activation", 15, 119_027_848, "efficientnetv2-l"),
        _keras(
            "InceptionResNetV2",
            299,
            "tf",
            "conv_7b_ac",
            8,
            55_873_736,
            "inception_resnet_v2_weights_tf_dim_ordering_tf_kernels",
        ),
        _keras(
            "InceptionV3",
            299,
            "tf",
            "mixed10",
            8,
            23_851_784,
            "inception_v3_weights_tf_dim_ordering_tf_kernels",
        ),
        _keras("MobileNet", 224, "tf", "conv_pw_13_relu", 7, 4_253_864, "mobilenet_1_0_224_tf"),
        _keras(
            "MobileNetV2",
            224,
            "tf",
            "out_relu",
            7,
            3_538_984,
            "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224",
        ),
        _keras(
            "MobileNetV3Large",
            224,
            "none",
            "activation_19",
            7,
            5_507_432,
            "weights_mobilenet_v3_large_224_1.0_float",
        ),
        _keras(
            "MobileNetV3Small",
            224,
            "none",
            "activation_17",
            7,
            2_554_968,
            "weights_mobilenet_v3_small_224_1.0_float",
        ),
        _keras("NASNetLarge", 331, "tf", "activation_259", 11, 88_949_818, "nasnet_large"),
        _keras("NASNetMobile", 224, "tf", "activation_187", 7, 5_326_716, "nasnet_mobile"),
        _keras("ResNet50", 224, "caffe", "conv5_block3_out", 7, 25_636_712),
        _keras("ResNet50V2", 224, "tf", "post_relu", 7, 25_613_800),
        _keras("ResNet101", 224, "caffe", "conv5_block3_out", 7, 44_707_176),
        _keras("ResNet101V2", 224, "tf", "post_relu", 7, 44_675_560),
        _keras("ResNet152", 224, "caffe", "conv5_block3_out", 7, 60_419_944),
        _keras("ResNet152V2", 224, "tf", "post_relu", 7, 60_380_648),
        _keras("VGG16", 224, "caffe", "block5_conv3", 14, 138_357_544),
        _keras("VGG19", 224, "caffe", "block5_conv4", 14, 143_667_240),
        _keras("Xception", 299, "tf", "block14_sepconv2_act", 10, 22_910_480),
    )
}


def find(name: str, rows: Mapping[str, NetworkRow] = CATALOG) -> NetworkRow:
    """Find the row of a network.

    Args:
        name: Its name.
        rows: All networks by name.

    Returns:
        The row.

    Raises:
        UnknownNetwork: There is none; the message suggests similar names, those without a download first.
    """
    if name in rows:
        return rows[name]
    similar = nearest(name, rows, preferred=lambda key: bool(rows[key].shipped or rows[key].file))
    if "/" in name or name.endswith(MODEL_FILE_ENDINGS):
        hint = "A file is named in the registry, GRADCAM_NETWORKS, and a job says the name that it has there."
    elif similar:
        hint = f"Did you mean {' or '.join(map(repr, similar))}?"
    else:
        hint = f"There are {len(rows)}: `gradcam networks` lists them."
    message = f"There is no network {name!r}. {hint}"
    raise UnknownNetwork(message)
