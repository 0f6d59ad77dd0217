"""Runs ONNX files with onnxruntime, which only gives scores."""

import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker import extras
from gradcam_worker.errors import DeviceOutOfMemory, NetworkIncompatible
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.score_networks.tensor_layout import (
    choose_output,
    find_layout,
    to_type,
)
from gradcam_worker.text.visible import abridged

FATAL_ONLY = 4  # level of messages, which would go to file descriptor 2
TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


class OnnxModel:
    """An ONNX model, as a function of images (n, height, width, channels). Not thread-safe."""

    is_coarse = False  # an output of eight bits would be dequantised in the graph

    def __init__(self, row: NetworkRow, data: bytes, *, threads: int = 0) -> None:
        """Compile a model.

        Args:
            row: What the registry says about the network.
            data: The content of the file. A model with weights in other files is refused: the checksum does
                not cover them.
            threads: Number of threads; 0: one for each core.

        Raises:
            MissingExtra: onnxruntime is not installed.
            NetworkIncompatible: It is no ONNX model of an image classifier.
        """
        with extras.required("An ONNX network"):
            import onnxruntime

        self.version = f"onnxruntime {onnxruntime.__version__}"
        self._name = row.name
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = FATAL_ONLY
        options.use_deterministic_compute = True
        # Threads that wait would occupy the cores of job processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory() as empty:  # where other files with weights would be looked for
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", empty)
            try:
                self._session: Any = onnxruntime.InferenceSession(
                    data, options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime has a class of its own for each reason
                message = f"{row.name} cannot be loaded as ONNX: {abridged(str(error))}"
                if "external" in str(error).lower():
                    message = (
                        f"{row.name} keeps weights in other files, which its checksum does not cover: make "
                        "one file of them, onnx.save(onnx.load('NAME.onnx'), 'ONE.onnx')."
                    )
                raise NetworkIncompatible(message) from error
        entry = self._only_input()
        self._input = entry.name
        self.dtype = TYPES.get(entry.type, "")
        if not self.dtype:
            message = f"{row.name} takes {entry.type}; an image is one of {', '.join(TYPES)}."
            raise NetworkIncompatible(message)
        row.check_input_type(self.dtype)
        self._layout = find_layout(row, tuple(_length(length) for length in entry.shape))
        self._output = choose_output(row, [one.name for one in self._session.get_outputs()])

    def _only_input(self) -> Any:
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(one.name for one in inputs)
            message = f"{self._name} has {len(inputs)} inputs ({names}); one, the image, is needed."
            raise NetworkIncompatible(message)
        return inputs[0]

    def __call__(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """Compute the outputs of n images. Raises DeviceOutOfMemory."""
        return self._layout.run(self._run, to_type(images, self.dtype))

    def _run(self, tensor: NDArray[Any]) -> NDArray[Any]:
        try:
            (outputs,) = self._session.run([self._output], {self._input: tensor})
        except Exception as error:
            if "alloc" not in str(error).lower():
                raise
            message = f"No memory for a pass over an array {tensor.shape}."
            raise DeviceOutOfMemory(message) from error
        return np.asarray(outputs)


def _length(length: object) -> int | None:
    """The length of a dimension; None if it is open."""
    return length if isinstance(length, int) and length > 0 else None
