"""Runs TFLite files with LiteRT, which only gives scores: TensorFlow's own interpreter is deprecated."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker import extras
from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.score_networks.tensor_layout import (
    choose_output,
    find_layout,
    to_type,
)
from gradcam_worker.text.visible import abridged


class TfliteModel:
    """A TFLite model, as a function of images (n, height, width, channels). Not thread-safe.

    A quantised input gets the whole numbers that stand for the preprocessed image, and a quantised output is
    converted back.
    """

    def __init__(self, row: NetworkRow, data: bytes, *, threads: int = 0) -> None:
        """Prepare a model.

        Args:
            row: What the registry says about the network.
            data: The content of the file.
            threads: Number of threads; 0: one for each core.

        Raises:
            MissingExtra: ai-edge-litert is not installed.
            NetworkIncompatible: It is no TFLite model of an image classifier.
        """
        with extras.required("A TFLite network"):
            import ai_edge_litert
            from ai_edge_litert.interpreter import Interpreter

        self.version = f"litert {ai_edge_litert.__version__}"
        try:
            self._interpreter: Any = Interpreter(
                model_content=data, num_threads=threads or len(os.sched_getaffinity(0))
            )
            self._interpreter.allocate_tensors()
        except Exception as error:  # it raises anything for an invalid file
            message = f"{row.name} cannot be loaded as TFLite: {abridged(str(error))}"
            raise NetworkIncompatible(message) from error
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        if len(inputs) != 1:
            names = ", ".join(one["name"] for one in inputs)
            message = f"{row.name} has {len(inputs)} inputs ({names}); one, the image, is needed."
            raise NetworkIncompatible(message)
        self._input = inputs[0]
        name = choose_output(row, [one["name"] for one in outputs])
        self._output = next(one for one in outputs if one["name"] == name)
        self.dtype = np.dtype(self._input["dtype"]).name
        if not _scale(self._input):
            row.check_input_type(self.dtype)
        self._layout = find_layout(row, _shape(self._input))
        self._fixed_shape = [int(length) for length in self._input["shape"]]

    @property
    def is_coarse(self) -> bool:
        """Whether its outputs have eight bits."""
        return bool(_scale(self._output)) and np.dtype(self._output["dtype"]).itemsize == 1

    def __call__(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """Compute the outputs of n images, one by one if the file has that number built in."""
        if scale := _scale(self._input):
            images = images / np.float32(scale) + np.float32(self._input["quantization"][1])
        return self._layout.run(self._run, to_type(images, self.dtype))

    def _run(self, tensor: NDArray[Any]) -> NDArray[Any]:
        interpreter, index = self._interpreter, self._input["index"]
        if [*tensor.shape] != self._fixed_shape:
            interpreter.resize_tensor_input(index, tensor.shape)
            interpreter.allocate_tensors()
            self._fixed_shape = [*tensor.shape]
        interpreter.set_tensor(index, tensor)
        interpreter.invoke()
        outputs = np.array(interpreter.get_tensor(self._output["index"]))
        if scale := _scale(self._output):
            steps = outputs.astype(np.float32) - np.float32(self._output["quantization"][1])
            return np.asarray(steps * np.float32(scale))
        return outputs


def _scale(tensor: dict[str, Any]) -> float:
    """What one step of a quantised tensor stands for; 0: it is not quantised."""
    return float(tensor["quantization"][0]) if "float" not in np.dtype(tensor["dtype"]).name else 0.0


def _shape(tensor: dict[str, Any]) -> tuple[int | None, ...]:
    """The shape of a tensor, with None for open lengths."""
    lengths = tensor.get("shape_signature", tensor["shape"])
    return tuple(int(length) if length > 0 else None for length in lengths)
