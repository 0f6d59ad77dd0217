"""The forward pass of a network on a CPU, compiled by OpenVINO. Nothing else imports `openvino`.

A converted network is cached as one file: its weights, its graph as XML, the size of the XML in eight bytes,
and the sha256 of all that. The weights come first, so that they are read where the file is mapped.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker import extras
from gradcam_worker.errors import DeviceOutOfMemory, InvalidSettings
from gradcam_worker.gradcam.files.file_cache import FileCache
from gradcam_worker.gradcam.network import InputPixels

SUFFIX = ".openvino"
SIZE_BYTES, DIGEST_BYTES = 8, hashlib.sha256().digest_size
CHUNK_BYTES = 2**24
# Pinned threads of several processes would share some cores and leave others idle.
CONFIGURATION = {
    "INFERENCE_PRECISION_HINT": "f32",
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
    "ENABLE_CPU_PINNING": False,
}


def is_installed() -> bool:
    """Whether OpenVINO is installed; it is not imported."""
    return util.find_spec("openvino") is not None


def require() -> None:
    """Check that OpenVINO is installed. Raises InvalidSettings."""
    if not is_installed():
        message = extras.describe("openvino", "GRADCAM_FORWARD=openvino", "openvino", extras.WORKER)
        raise InvalidSettings(message)


def version() -> str:
    """Name and version, as in `openvino 2026.4.1`."""
    return f"openvino {metadata.version('openvino')}"


@dataclass(frozen=True)
class Converted:
    """A converted network.

    Attributes:
        model: An `openvino.Model`, from pixels (n, height, width, channels).
        memory: What holds its weights: neither the model nor what is compiled from it keeps them alive.
    """

    model: Any
    memory: Any


class OpenVinoForward:
    """A compiled forward pass: see `gradcam_worker.gradcam.methods.gradients.Forward`. Not thread-safe."""

    def __init__(self, network: Converted, *, threads: int = 0) -> None:
        """Compile a network for every batch size.

        Args:
            network: The converted network.
            threads: Number of threads; 0: one for each core.
        """
        configuration = {**CONFIGURATION, **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
        compiled = _core().compile_model(network.model, "CPU", configuration)
        self._memory = network.memory
        self._request = compiled.create_infer_request()
        self._ports = compiled.outputs
        self.outputs = [
            (
                tuple(size.get_length() if size.is_static else None for size in port.partial_shape),
                np.dtype(port.element_type.to_dtype()).name,
            )
            for port in self._ports
        ]

    def __call__(self, pixels: InputPixels) -> Sequence[NDArray[Any]]:
        """Compute the outputs of n images. Raises DeviceOutOfMemory."""
        try:
            results = self._request.infer({0: pixels}, share_inputs=True)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "alloc" not in str(error):
                raise
            message = f"No memory for a forward pass over pixels of {pixels.shape}."
            raise DeviceOutOfMemory(message) from error
        return [results[port] for port in self._ports]


@cache
def _core() -> Any:
    """OpenVINO, with its CPU plugin once it is loaded: one for as long as the process lives.

    The thread that loads the plugin gets an alternate signal stack from it. Without a core the plugin is
    unloaded with the last network, and frees that stack, in whichever thread this happens: the next signal,
    as Ctrl-C or SIGTERM, then kills the process.
    """
    import openvino

    return openvino.Core()


def convert(traced: Any) -> Converted:
    """Convert a function of TensorFlow, without a copy of its weights.

    `openvino.convert_model` does the same and reports it to its authors' statistics: that is why it is not
    called.

    Args:
        traced: A concrete function.

    Returns:
        The converted network.
    """
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.tensorflow.graph_iterator import GraphIteratorTFGraph

    front_end = FrontEndManager().load_by_framework("tf")
    graph = GraphIteratorTFGraph(traced.graph, share_weights=True)  # kept alive while it is converted
    model = front_end.convert(front_end.load(graph))
    # It has more outputs than were asked for: each second result of a function with a gradient of its own.
    outputs = [model.output(output.name).get_node().input_value(0) for output in traced.outputs]
    model = openvino.Model(outputs, model.get_parameters(), "trunk")
    # These tensors keep the memory, even if another value is assigned to a variable.
    return Converted(model, [variable.read_value_no_copy() for variable in traced.graph.variables])


def read(cache: FileCache, name: str) -> Converted | None:
    """Read a converted network from the cache.

    Args:
        cache: The cache.
        name: Of the file, without a suffix.

    Returns:
        The network, whose weights stay in the file; None if there is no such file or it is damaged.
    """
    import openvino

    path = cache.path(name + SUFFIX)
    try:
        content = np.memmap(path, np.uint8, mode="c")  # OpenVINO takes no array that is read-only
    except (OSError, ValueError):  # missing, or empty
        return None
    body, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest.tobytes():  # type: ignore[arg-type]  # an array is a buffer
        return None
    cache.touch(path)
    end = len(body) - SIZE_BYTES
    begin = end - int.from_bytes(body[end:].tobytes(), "little")
    weights = openvino.Tensor(body[:begin], shared_memory=True)
    return Converted(_core().read_model(body[begin:end].tobytes(), weights), content)


def write(network: Converted, cache: FileCache, name: str) -> None:
    """Write a converted network into the cache.

    Args:
        network: The network.
        cache: The cache.
        name: Of the file, without a suffix.

    Raises:
        OSError: The folder cannot be written to.
        WeightsUnavailable: There is no room.
    """
    import openvino

    with (
        tempfile.TemporaryDirectory() as folder,
        cache.create(name + SUFFIX, "a compiled network") as partial,
    ):
        xml, weights = Path(folder) / "model.xml", Path(folder) / "model.bin"
        openvino.save_model(network.model, xml, compress_to_fp16=False)
        partial.expect(weights.stat().st_size + xml.stat().st_size + SIZE_BYTES + DIGEST_BYTES)
        with weights.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                partial.write(chunk)
        partial.write(xml.read_bytes())
        partial.write(xml.stat().st_size.to_bytes(SIZE_BYTES, "little"))
        partial.write(bytes.fromhex(partial.sha256))
        partial.commit()
