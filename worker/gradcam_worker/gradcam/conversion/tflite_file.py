"""Reads a file of TensorFlow Lite: its tensors, dequantised, and its operators in order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.files.model_file import Refused

QUANTISED = frozenset({"UINT8", "INT8", "INT16"})
INTEGERS: Mapping[str, Any] = MappingProxyType(
    {"INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8, "INT8": np.int8, "INT16": np.int16}
)
NUMPY: Mapping[str, Any] = MappingProxyType(
    {**INTEGERS, "FLOAT32": np.float32, "FLOAT16": np.float16, "FLOAT64": np.float64, "BOOL": np.bool_}
)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph."""

    name: str
    shape: tuple[int, ...]  # that of one image
    kind: str  # as in TensorFlow Lite: FLOAT32, INT8
    value: NDArray[Any] | None  # of a constant, dequantised
    scale: float = 0.0  # of an activation that is quantised, else 0
    zero_point: int = 0

    @property
    def is_quantised(self) -> bool:
        """Whether it holds real numbers as `scale * (integer - zero_point)`."""
        return self.kind in QUANTISED and self.scale > 0

    @property
    def limits(self) -> tuple[float, float]:
        """The real numbers that a quantised tensor can hold."""
        integers = np.iinfo(INTEGERS[self.kind])
        return self.scale * (integers.min - self.zero_point), self.scale * (integers.max - self.zero_point)


@dataclass(frozen=True)
class Operator:
    """A step of the graph."""

    name: str  # as in TensorFlow Lite: CONV_2D
    inputs: tuple[int, ...]  # -1: left out
    outputs: tuple[int, ...]
    options: Any


@dataclass(frozen=True)
class TfliteGraph:
    """A whole file."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def rounds(self) -> bool:
        """Whether its arithmetic rounds to 8 or 16 bits, which a model of Keras does not do."""
        return any(operator.name in ROUNDING and self._is_rounded(operator) for operator in self.operators)

    @property
    def input_limits(self) -> tuple[float, float] | None:
        """The smallest and the largest number that is left of its input after it was quantised."""
        firsts = [
            one.outputs[0]
            for one in self.operators
            if one.name == "QUANTIZE" and one.inputs[0] in self.inputs
        ]
        return self.tensors[firsts[0]].limits if firsts and self.tensors[firsts[0]].is_quantised else None

    def _is_rounded(self, operator: Operator) -> bool:
        tensors = [self.tensors[index] for index in (*operator.inputs, *operator.outputs) if index >= 0]
        return any(tensor.is_quantised or tensor.kind in QUANTISED for tensor in tensors)


# Types of activations and weights in files of TensorFlow 1: such weights are signed in spite of their type.
HYBRID = ["FLOAT32", "UINT8"]
ROUNDING = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL"})


def read(data: bytes) -> TfliteGraph:
    """Read a file.

    Args:
        data: Its bytes.

    Returns:
        The graph.

    Raises:
        Refused: It is damaged, or more than one plain graph.
    """
    from tensorflow.lite.python import schema_py_generated as schema

    try:
        model = schema.ModelT.InitFromPackedBuf(bytearray(data), 0)
        codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
        customs = [code.customCode for code in model.operatorCodes]
        subgraph = model.subgraphs[0]
    except Exception as error:  # a damaged flatbuffer raises anything
        message = f"is a damaged .tflite file ({error!r}): copy it again"
        raise Refused(message) from error
    operator_names = _names(schema.BuiltinOperator)
    type_names = _names(schema.TensorType)
    buffers = model.buffers

    def name(index: int) -> str:
        return _text(customs[index]) or operator_names.get(codes[index], f"operator {codes[index]}")

    signed = {
        int(operator.inputs[1])
        for operator in subgraph.operators
        if name(operator.opcodeIndex) in ROUNDING and _types(subgraph, operator, type_names) == HYBRID
    }
    return TfliteGraph(
        tensors=tuple(
            _tensor(tensor, buffers, type_names, is_signed=index in signed)
            for index, tensor in enumerate(subgraph.tensors)
        ),
        operators=tuple(
            Operator(
                name(operator.opcodeIndex),
                tuple(int(index) for index in _list(operator.inputs)),
                tuple(int(index) for index in _list(operator.outputs)),
                operator.builtinOptions,
            )
            for operator in subgraph.operators
        ),
        inputs=tuple(int(index) for index in subgraph.inputs),
        outputs=tuple(int(index) for index in subgraph.outputs),
    )


def _names(enumeration: Any) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}


def _text(value: bytes | str | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def _list(values: Any) -> list[Any]:
    return [] if values is None else list(values)


def _types(subgraph: Any, operator: Any, type_names: dict[int, str]) -> list[str | None]:
    """The types of an operator's first two inputs."""
    return [type_names.get(subgraph.tensors[index].type) for index in operator.inputs[:2]]


def _tensor(tensor: Any, buffers: list[Any], type_names: dict[int, str], *, is_signed: bool) -> Tensor:
    kind, name = type_names.get(tensor.type, f"type {tensor.type}"), _text(tensor.name)
    kind = "INT8" if is_signed else kind
    shape = tuple(int(side) for side in _list(tensor.shape))
    scales = np.asarray(_list(tensor.quantization.scale if tensor.quantization else None), np.float32)
    zero_points = np.asarray(_list(tensor.quantization.zeroPoint if tensor.quantization else None), np.int64)
    data = buffers[tensor.buffer].data
    if data is None or len(data) == 0 or kind not in NUMPY:
        scale = float(scales[0]) if len(scales) else 0.0
        return Tensor(name, shape, kind, None, scale, int(zero_points[0]) if len(zero_points) else 0)
    if tensor.sparsity is not None:
        message = f"holds a sparse tensor ({name}), which is not read"
        raise Refused(message)
    stored: NDArray[Any] = np.frombuffer(np.asarray(data, np.uint8).tobytes(), NUMPY[kind])
    if stored.size != math.prod(shape):
        message = f"is a damaged .tflite file: {name} has {stored.size} numbers for the shape {shape}"
        raise Refused(message)
    value = stored.reshape(shape)
    if len(scales) and kind in INTEGERS:
        axis = int(tensor.quantization.quantizedDimension)
        along = [1] * len(shape)
        if len(scales) > 1:
            along[axis] = len(scales)
        zeros = zero_points if len(zero_points) else np.zeros(len(scales), np.int64)
        value = (value.astype(np.int64) - zeros.reshape(along)).astype(np.float32) * scales.reshape(along)
    elif value.dtype.kind == "f":
        value = value.astype(np.float32)
    return Tensor(name, shape, kind, value)
