"""What a network must be able to do, said once for Keras, for tests and for whoever comes next."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.catalog import HeadKind
from gradcam_worker.gradcam.classes import ClassIndex
from gradcam_worker.text.short_repr import short_repr


@dataclass(frozen=True)
class NetworkFacts:
    """What is written into every manifest about the network that made it."""

    name: str
    input_size: tuple[int, int]  # (height, width) in pixels
    preprocessing: str
    weights_sha256: str | None  # None: of seeded random weights, or of a model that came from no file
    backend: str
    dtype: str
    default_layer: str
    map_size: tuple[int, int] = (0, 0)  # (rows, columns) of the default layer
    channels: int = 3  # of the pixels
    head: HeadKind = "softmax"  # how scores become probabilities; or they are such already
    rounding: float = 1e-3  # how far what it says may be from the probabilities that its scores give
    parameters: int = 0
    rescales: bool = False  # whether it begins with layers that do what preprocessing does

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights in memory."""
        return self.parameters * (2 if self.dtype in {"bfloat16", "float16"} else 4)


@dataclass(frozen=True)
class Method:
    """How to compute heatmaps: `cam.METHODS`, `cam.SCORES` and `cam.NORMALIZE` hold the choices."""

    name: str = "gradcam"
    layer: str | None = None  # None: the network's own target layer; "auto": found in its graph
    score: str = "logit"  # what is explained: the score before the softmax, or log p after it
    normalize: str = "per_class"
    flip: bool = False  # the mean of the image's map and of its mirror image's


GRADCAM = Method()


@dataclass(frozen=True)
class Computed:
    """One pass over n images and k wanted classes of each, on the host."""

    layer: str  # the target layer's name
    scores: NDArray[np.float32]  # (n, classes), before the softmax
    class_ids: NDArray[np.int32]  # (n, k)
    raw: NDArray[np.float32]  # (n, k, map height, map width), before the ReLU
    outputs: NDArray[np.float32] | None = None  # (n, units): what the network itself says; None: its scores

    __repr__ = short_repr


class Network(Protocol):
    """A classifier that can be explained. Not thread-safe: `residents` gives it one call at a time."""

    @property
    def facts(self) -> NetworkFacts:
        """Name, input size, preprocessing, weights."""
        ...

    @property
    def labels(self) -> ClassIndex:
        """The classes, in the order of the scores."""
        ...

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        """Run the network and its gradients, once for all images and classes.

        `pixels` are (n, input height, input width, channels): RGB, unless the facts say otherwise.
        `wanted` is (n, k): an id of 0 or more names a class, -r stands
        for the class ranked r-th (see `ClassIndex.wanted`).

        Raises UnknownLayer, DeviceOutOfMemory.
        """
        ...

    def begin(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Callable[[], Computed]:
        """Hand the device what `compute` does; what is returned waits for its answer.

        A device that is not the CPU computes on its own: the next pass can be handed over meanwhile.
        """
        ...

    def scores(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The scores (n, classes) of n images, as `compute` takes them, and nothing else."""
        ...
