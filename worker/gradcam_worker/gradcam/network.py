"""The interface of a network, which `models.keras_network` and test doubles implement."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.catalog import HeadKind
from gradcam_worker.gradcam.classes import ClassIndex
from gradcam_worker.gradcam.network_inputs import NetworkInput, samples
from gradcam_worker.gradcam.sizing import DEFAULT_SIZING, Sizing
from gradcam_worker.text.short_repr import short_repr

InputPixels = NDArray[Any]  # uint8 or float32: levels from 0 to 255, see `NetworkFacts.pixel_type`
WAY_OUT = (
    "RISE and occlusion, which only need its scores, can explain it as it is: write scores_only = true into "
    "its table of the registry, or wrap_callable(model, ...) in Python"
)


@dataclass(frozen=True)
class NetworkFacts:
    """Facts about a network, which every manifest contains."""

    name: str
    input_size: tuple[int, int]  # (height, width) in pixels
    preprocessing: str
    weights_sha256: str | None  # None: random weights, or a model without a file
    backend: str
    dtype: str
    default_layer: str
    map_size: tuple[int, int] = (0, 0)  # (rows, columns) of the default layer
    channels: int = 3  # of the images that it takes
    head: HeadKind = "softmax"  # how scores become probabilities; "probabilities": they are
    rounding: float = 1e-3  # tolerance between its outputs and the probabilities of its scores
    parameters: int = 0
    rescales: bool = False  # whether its first layers do the preprocessing
    weight_copies: int = 1  # in memory
    stored_bytes: int | None = None  # of its weights; None: by the number of parameters
    scores_only: bool = False  # it has no gradients: only the methods of `masking` work
    sizing: Sizing = DEFAULT_SIZING  # how images are brought to its input size
    inputs: tuple[NetworkInput, ...] = ()  # beside the image

    @property
    def pixel_type(self) -> str:
        """See `Sizing.pixel_type`."""
        return self.sizing.pixel_type

    @property
    def input_width(self) -> int:
        """The number of numbers that the network takes beside each image."""
        return sum(one.width for one in self.inputs)

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights in memory."""
        if self.stored_bytes is not None:
            return self.stored_bytes
        return self.weight_copies * self.parameters * (2 if self.dtype in {"bfloat16", "float16"} else 4)


@dataclass(frozen=True)
class Method:
    """How to compute heatmaps.

    Attributes:
        name: The formula, a name from `cam.METHODS` or `masking.METHODS`.
        layer: The target layer; None: that of the network; `auto`: found in its graph.
        score: What is explained, from `cam.SCORES`: the score before the softmax, or log p after it.
        normalize: How heatmaps are scaled, from `cam.NORMALIZE`.
        flip: Average the heatmap with that of the mirrored image.
        baseline: Of `integrated_gradients`, from `integrated.BASELINES`.
        steps: Of `integrated_gradients`.
        part: Which of the steps are computed: the first, and the one after the last; None: all.
        against: Ids of classes. What is explained is the score of a class less the mean of theirs: why it is
            that class and not one of these.
        masks: Of `rise`: the number of masks.
        cells: Of `rise`: cells of a mask along each side.
        seed: Of `rise`: of the random masks.
        window: Of `occlusion`: side of the square that covers the image, in pixels of the network's input.
        stride: Of `occlusion`: distance between two positions of the square, in the same pixels.
        features: Whether `Computed.features` are wanted, too.

    Parameters that are None have the defaults of `masking.with_defaults`.
    """

    name: str = "gradcam"
    layer: str | None = None
    score: str = "logit"
    normalize: str = "per_class"
    flip: bool = False
    against: tuple[int, ...] = ()
    baseline: str | None = None
    steps: int | None = None
    part: tuple[int, int] | None = None
    masks: int | None = None
    cells: int | None = None
    seed: int | None = None
    window: int | None = None
    stride: int | None = None
    features: bool = False


GRADCAM = Method()


@dataclass(frozen=True)
class Computed:
    """The results of a pass over n images with k wanted classes each, in memory of the CPU."""

    layer: str  # the target layer's name
    scores: NDArray[np.float32]  # (n, classes), before the softmax
    class_ids: NDArray[np.int32]  # (n, k)
    raw: NDArray[np.float32]  # (n, k, map height, map width), before the ReLU
    outputs: NDArray[np.float32] | None = None  # (n, units): those of the network; None: the scores
    completeness_error: NDArray[np.float32] | None = None  # (n, k): see `Explanation.completeness_error`
    features: NDArray[np.float32] | None = None  # (n, k, channels): see `cam.heat_features`

    __repr__ = short_repr

    def of(self, images: slice, classes: int) -> "Computed":
        """The results of some of the images, and of their first `classes`."""
        outputs = None if self.outputs is None else self.outputs[images]
        features = None if self.features is None else self.features[images, :classes]
        class_ids, raw = self.class_ids[images, :classes], self.raw[images, :classes]
        return Computed(self.layer, self.scores[images], class_ids, raw, outputs, features=features)


class Classifier(Protocol):
    """What is known about a network, wherever it computes."""

    @property
    def facts(self) -> NetworkFacts:
        """Its name, input size, preprocessing and weights."""
        ...

    @property
    def labels(self) -> ClassIndex:
        """Its classes, in the order of the scores."""
        ...


class Network(Classifier, Protocol):
    """A classifier that can be explained. Not thread-safe: `model_cache` makes one call at a time."""

    def compute(self, pixels: InputPixels, wanted: NDArray[np.int32], method: Method = GRADCAM) -> Computed:
        """Compute scores and heatmaps, in one pass for all images and classes.

        Args:
            pixels: (n, input height, input width, channels), uint8; RGB if there are three channels.
            wanted: (n, k): the id of a class, or -r for the class of rank r, see `ClassIndex.select`. The
                classes of `method.against` have no rank.
            method: How to compute the heatmaps.

        Returns:
            The results.

        Raises:
            UnknownLayer: The method names a layer that the network does not have.
            DeviceOutOfMemory: The pass does not fit into the memory of the device.
        """
        ...

    def begin(
        self, pixels: InputPixels, wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Callable[[], Computed]:
        """Start what `compute` does. A GPU runs it asynchronously, so that the next pass can be started.

        Args:
            pixels: As for `compute`.
            wanted: As for `compute`.
            method: As for `compute`.

        Returns:
            A function that waits for the results.
        """
        ...

    def scores(self, pixels: InputPixels) -> NDArray[np.float32]:
        """Compute the scores of n images alone.

        Args:
            pixels: As for `compute`.

        Returns:
            (n, classes), before the softmax.
        """
        ...


class NetworkWithInputs(Network, Protocol):
    """A network that takes more than images: its facts have `inputs`.

    `values` is (n, width), float32: for each image what `network_inputs.encode` returns. A network with
    `inputs` always gets them; one without never does.
    """

    def compute(
        self,
        pixels: InputPixels,
        wanted: NDArray[np.int32],
        method: Method = GRADCAM,
        values: NDArray[np.float32] | None = None,
    ) -> Computed:
        """See `Network.compute`."""
        ...

    def begin(
        self,
        pixels: InputPixels,
        wanted: NDArray[np.int32],
        method: Method = GRADCAM,
        values: NDArray[np.float32] | None = None,
    ) -> Callable[[], Computed]:
        """See `Network.begin`."""
        ...

    def scores(self, pixels: InputPixels, values: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """See `Network.scores`."""
        ...


def compute(
    network: Network,
    pixels: InputPixels,
    wanted: NDArray[np.int32],
    method: Method,
    values: NDArray[np.float32] | None,
) -> Computed:
    """Call `Network.compute`, with the values of further inputs if there are any."""
    if values is None:
        return network.compute(pixels, wanted, method)
    return cast("NetworkWithInputs", network).compute(pixels, wanted, method, values)


def begin(
    network: Network,
    pixels: InputPixels,
    wanted: NDArray[np.int32],
    method: Method,
    values: NDArray[np.float32] | None,
) -> Callable[[], Computed]:
    """Call `Network.begin`, with the values of further inputs if there are any."""
    if values is None:
        return network.begin(pixels, wanted, method)
    return cast("NetworkWithInputs", network).begin(pixels, wanted, method, values)


def scores(network: Network, pixels: InputPixels, values: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Call `Network.scores`, with the values of further inputs if there are any."""
    if values is None:
        return network.scores(pixels)
    return cast("NetworkWithInputs", network).scores(pixels, values)


def sample_values(facts: NetworkFacts) -> NDArray[np.float32] | None:
    """Allowed values of further inputs (width,), for an image without any; None: the network has none."""
    return np.array(samples(facts.inputs), np.float32) if facts.inputs else None


def repeat_values(values: NDArray[np.float32] | None, images: int) -> NDArray[np.float32] | None:
    """The same values (width,) for each of n images, (n, width)."""
    return None if values is None else np.repeat(values[np.newaxis], images, axis=0)
