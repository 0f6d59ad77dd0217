"""Decides whether OpenVINO computes the forward pass of a network, and holds it to TensorFlow's outputs."""

import hashlib
import math
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidSettings, WeightsUnavailable
from gradcam_worker.gradcam import backend
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.files.file_cache import FileCache
from gradcam_worker.gradcam.methods import gradients
from gradcam_worker.gradcam.models import openvino_forward
from gradcam_worker.gradcam.models.keras_network import KerasNetwork
from gradcam_worker.gradcam.models.openvino_forward import OpenVinoForward
from gradcam_worker.gradcam.models.sample_images import varied_images
from gradcam_worker.gradcam.network import InputPixels
from gradcam_worker.text.log_events import EventLogger

FORWARDS = ("auto", "openvino", "tensorflow")
LARGEST_DIFFERENCE = 1e-5  # of an output of OpenVINO, as a share of the image's largest value of it
ops = keras.ops
log = EventLogger("gradcam")


def check(forward: str) -> None:
    """Check the choice of a forward pass. Raises InvalidSettings."""
    if forward not in FORWARDS:
        message = f"There is no forward pass {forward!r}; there are {', '.join(FORWARDS)}."
        raise InvalidSettings(message)
    if forward == "openvino":
        openvino_forward.require()


def compile_forward(network: KerasNetwork, row: NetworkRow, forward: str, cache: FileCache | None) -> None:
    """Let OpenVINO compute the forward pass of a network, where that is wanted, possible and correct.

    Args:
        network: The network.
        row: What the catalog or the registry says about it.
        forward: A name from `FORWARDS`.
        cache: Keeps the converted network, if its weights come from a file.
    """
    if forward == "tensorflow" or (forward == "auto" and not openvino_forward.is_installed()):
        return
    obstacle = _obstacle(network)
    parts = None if obstacle else network.trunk_and_tail()
    if parts is None:
        if forward == "openvino":
            reason = obstacle or "the backward pass of Grad-CAM is not a short one"
            log.warning("forward_not_compiled", network=row.name, reason=reason)
        return
    try:
        compiled, largest = compile_parts(parts, cache, _cache_name(network, row))
    except Exception as error:  # noqa: BLE001  # OpenVINO raises anything for a layer that it does not know
        log.warning("forward_not_compiled", network=row.name, reason=error)
        return
    if largest > LARGEST_DIFFERENCE:
        reason = f"its outputs differ from those of TensorFlow by {largest:.2g}"
        log.warning("forward_not_compiled", network=row.name, reason=reason)
        return
    network.use_forward(compiled, openvino_forward.version())
    log.info("forward_compiled", network=row.name, engine=openvino_forward.version(), difference=largest)


def _obstacle(network: KerasNetwork) -> str | None:
    """Why OpenVINO cannot run a network in this process, if so."""
    if network.facts.inputs:
        return "the network takes further inputs beside the image"
    if backend.name() != "tensorflow":
        return f"the backend is {backend.name()}"
    if backend.device_name() != "cpu":
        return "the device is not a CPU"
    return None if network.facts.dtype == "float32" else f"the network computes in {network.facts.dtype}"


def compile_parts(
    parts: gradients.Parts, cache: FileCache | None = None, name: str | None = None
) -> tuple[OpenVinoForward, float]:
    """Compile the trunk of a network, converted for it or from the cache.

    Args:
        parts: The network.
        cache: Where the converted network is kept.
        name: Of its file there, without a suffix.

    Returns:
        The compiled trunk, and the largest difference of its outputs from those of TensorFlow on a few
        images, as a share of each image's largest value.
    """
    samples = Samples(parts)
    if cache and name and (found := _from_cache(samples, cache, name)):
        return found
    converted = openvino_forward.convert(gradients.traced_trunk(parts))
    forward = OpenVinoForward(converted, threads=backend.intra_op_threads())
    largest = samples.largest_difference(forward)
    if cache and name and largest <= LARGEST_DIFFERENCE:
        try:
            openvino_forward.write(converted, cache, name)
        except (OSError, WeightsUnavailable) as error:
            log.warning("forward_not_cached", reason=error)
    return forward, largest


def _from_cache(samples: "Samples", cache: FileCache, name: str) -> tuple[OpenVinoForward, float] | None:
    """The cached network, if there is one and it agrees."""
    try:
        if (converted := openvino_forward.read(cache, name)) is None:
            return None
        forward = OpenVinoForward(converted, threads=backend.intra_op_threads())
        largest = samples.largest_difference(forward)
    except Exception as error:  # noqa: BLE001  # whatever is wrong with the file: it is replaced
        log.warning("forward_cache_unreadable", reason=error)
        return None
    return (forward, largest) if largest <= LARGEST_DIFFERENCE else None


class Samples:
    """Outputs of the backend for a few images, alone and together."""

    def __init__(self, parts: gradients.Parts) -> None:
        """Compute them; nothing is compiled for it."""
        noise, _, _, *others = varied_images(parts.pixels).astype(parts.pixel_type)
        self._tail = parts.tail
        self._batches = [np.stack([noise]), np.stack(others[:3])]
        self._expected = [self._with_scores(*self._trunk(parts, batch)) for batch in self._batches]

    def largest_difference(self, forward: gradients.Forward) -> float:
        """The largest difference of an output or score, see `_difference`."""
        return max(
            _difference(actual, wanted)
            for batch, expected in zip(self._batches, self._expected, strict=True)
            for actual, wanted in zip(self._with_scores(*forward(batch)), expected, strict=True)
        )

    def _with_scores(self, activations: Any, end: Any, *skipped: Any) -> list[NDArray[Any]]:
        scores = self._tail(ops.convert_to_tensor(end), [ops.convert_to_tensor(one) for one in skipped])
        return [ops.convert_to_numpy(values) for values in (activations, end, *skipped, scores)]

    @staticmethod
    def _trunk(parts: gradients.Parts, batch: InputPixels) -> list[Any]:
        activations, end, skipped = parts.trunk(ops.cast(batch, "float32"))
        return [activations, end, *skipped]


def _difference(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference between values (n, ...), as a share of each image's largest expected one."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return math.inf
    actual, expected = (values.reshape(len(values), -1) for values in (actual, expected))
    largest = np.abs(expected).max(axis=1)
    return float((np.abs(actual - expected).max(axis=1) / np.where(largest > 0, largest, 1)).max())


def _cache_name(network: KerasNetwork, row: NetworkRow) -> str | None:
    """A name for all that the converted network depends on; None where the weights have no checksum."""
    if network.facts.weights_sha256 is None:
        return None
    versions = map(_version, ("gradcam-worker", "openvino", "tensorflow", "keras"))
    parts = (network.facts.weights_sha256, repr(row), network.facts.default_layer, *versions)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # it runs from its source
        return ""
