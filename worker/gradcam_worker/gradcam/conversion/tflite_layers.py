"""Builds a Keras model that computes what the graph of a TensorFlow Lite file computes, without its rounding.

Only operators that image classifiers are made of are known. Every tensor begins with the axis of images.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.conversion.tflite_file import Operator, Tensor, TfliteGraph
from gradcam_worker.gradcam.files.model_file import Refused

layers, ops = keras.layers, keras.ops
MAX_NUMBERS = 2**20  # of a constant that is written into the configuration: 20 MB of JSON
ACTIVATIONS = ("none", "relu", "relu_n1_to_1", "relu6", "tanh")  # by their number in a file
RELU6 = 6.0
IMAGE_RANK = 4  # (images, rows, columns, channels)
DILATED = {"BATCH_TO_SPACE_ND", "CONV_2D", "DEPTHWISE_CONV_2D"}
SAME_VALUES = {"CAST", "DEQUANTIZE", "QUANTIZE"}  # real numbers stay what they are
RESHAPES = {"EXPAND_DIMS", "RESHAPE", "SQUEEZE"}
# Their results may be limited by nothing but what the integers of a quantised file can hold.
LIMITED = {"ADD", "CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MUL", "SUB"}
ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    "ABS": ops.abs,
    "COS": ops.cos,
    "EXP": ops.exp,
    "LOG": ops.log,
    "NEG": ops.negative,
    "RSQRT": ops.rsqrt,
    "SIN": ops.sin,
    "SQRT": ops.sqrt,
    "SQUARE": ops.square,
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "ADD": ops.add,
    "DIV": ops.divide,
    "MAXIMUM": ops.maximum,
    "MINIMUM": ops.minimum,
    "MUL": ops.multiply,
    "POW": ops.power,
    "SQUARED_DIFFERENCE": lambda first, second: ops.square(ops.subtract(first, second)),
    "SUB": ops.subtract,
}
FOLDED: dict[str, Callable[..., Any]] = {  # of constants, as in shapes that are computed
    "ADD": np.add,
    "CAST": lambda value: value,
    "DEQUANTIZE": lambda value: value,
    "DIV": np.divide,
    "EXPAND_DIMS": lambda value, axis: np.expand_dims(value, int(axis)),
    "MUL": np.multiply,
    "REDUCE_PROD": lambda value, axis: np.prod(value, tuple(np.ravel(axis))),
    "RESHAPE": lambda value, shape: np.reshape(value, np.ravel(shape)),
    "SQRT": np.sqrt,
    "RSQRT": lambda value: 1 / np.sqrt(value),
    "SUB": np.subtract,
    "TRANSPOSE": lambda value, order: np.transpose(value, tuple(np.ravel(order))),
}


def build(graph: TfliteGraph) -> Any:
    """Build the model.

    Args:
        graph: What was read from a file.

    Returns:
        A functional model. Its input holds the numbers that the file's input holds, integers as float32.

    Raises:
        Refused: An operator has no counterpart, or the graph has another number of inputs than one.
    """
    if len(graph.inputs) != 1:
        message = f"has {len(graph.inputs)} inputs: only a graph of one image can be rebuilt"
        raise Refused(message)
    return _Builder(graph).build()


class _Builder:
    """Builds one model, operator by operator."""

    def __init__(self, graph: TfliteGraph) -> None:
        self._graph = graph
        self._values: dict[int, Any] = {}  # by tensor: what is computed
        self._constants = {
            index: tensor.value for index, tensor in enumerate(graph.tensors) if tensor.value is not None
        }
        self._dilations: dict[int, tuple[int, int]] = {}  # of tensors between space to batch and back
        self._names: set[str] = set()
        self._name = ""  # of the next layer

    def build(self) -> Any:
        index = self._graph.inputs[0]
        tensor = self._graph.tensors[index]
        image = keras.Input(tensor.shape[1:], name="image", dtype="float32")
        self._values[index] = image
        if tensor.is_quantised:
            self._name = "dequantize"
            offset = -tensor.scale * tensor.zero_point
            self._values[index] = self._layer(layers.Rescaling, image, tensor.scale, offset=offset)
        for operator in self._graph.operators:
            self._add(operator)
        return keras.Model(image, [self._values[index] for index in self._graph.outputs], name="converted")

    def _add(self, operator: Operator) -> None:
        """Add the layers of an operator."""
        output = self._graph.tensors[operator.outputs[0]]
        activation, name = getattr(operator.options, "fusedActivationFunction", 0), _plain(output.name)
        self._name = f"{name}_linear" if activation else name
        inputs = [index for index in operator.inputs if index >= 0]
        if operator.name == "SHAPE" and inputs[0] in self._values:
            shape = self._graph.tensors[inputs[0]].shape
            self._constants[operator.outputs[0]] = np.asarray(shape, np.int32)
        elif inputs and all(index in self._constants for index in inputs):
            self._constants[operator.outputs[0]] = self._fold(operator, inputs)
        elif operator.name in {"SPLIT", "UNPACK"}:
            self._values.update(zip(operator.outputs, self._split(operator), strict=True))
        else:
            result = self._apply(operator, output)
            self._name = name
            result = self._activate(activation, result, operator)
            self._values[operator.outputs[0]] = self._limit(operator, output, activation, result)

    def _fold(self, operator: Operator, inputs: list[int]) -> NDArray[Any]:
        values = [self._constants[index] for index in inputs]
        if operator.name == "PACK":
            return np.stack(values, operator.options.axis)
        if operator.name == "CONCATENATION":
            return np.concatenate(values, operator.options.axis)
        if operator.name == "GATHER":
            return np.take(values[0], values[1], operator.options.axis)
        if operator.name in {"SLICE", "STRIDED_SLICE"}:
            return np.asarray(values[0][self._slices(operator)])
        if operator.name not in FOLDED:
            raise _unknown(operator, "of constants")
        return np.asarray(FOLDED[operator.name](*values))

    def _apply(self, operator: Operator, output: Tensor) -> Any:
        name = operator.name
        if name in SAME_VALUES:
            return self._value(operator, 0)
        if name in RESHAPES:
            return self._reshape(operator, output)
        if name in ELEMENTWISE:
            return ELEMENTWISE[name](self._value(operator, 0))
        if name in BINARY:
            return self._binary(operator)
        method = getattr(self, f"_{name.lower()}", None)
        if method is None:
            raise _unknown(operator)
        return method(operator)

    # What operators read

    def _value(self, operator: Operator, position: int) -> Any:
        index = operator.inputs[position]
        if index not in self._values:
            raise _unknown(operator, f"with a constant as its input {position}")
        if index in self._dilations and operator.name not in DILATED:
            raise _unknown(operator, "between SPACE_TO_BATCH_ND and BATCH_TO_SPACE_ND")
        return self._values[index]

    def _constant(self, operator: Operator, position: int) -> NDArray[Any]:
        index = operator.inputs[position]
        if index not in self._constants:
            raise _unknown(operator, f"whose input {position} is computed")
        return self._constants[index]

    def _optional(self, operator: Operator, position: int) -> NDArray[Any] | None:
        has = len(operator.inputs) > position and operator.inputs[position] >= 0
        return self._constant(operator, position) if has else None

    def _axes(self, operator: Operator, rank: int) -> tuple[int, ...]:
        axes = tuple(sorted(int(axis) % rank for axis in np.ravel(self._constant(operator, 1))))
        if 0 in axes:
            raise _unknown(operator, "over the axis of images")
        return axes

    # What they become

    def _unique(self) -> str:
        """A name for the next layer that no other one has."""
        numbered = (f"{self._name}_{number}" for number in range(2, len(self._names) + 3))
        name = next(name for name in (self._name, *numbered) if name not in self._names)
        self._names.add(name)
        return name

    def _layer(self, kind: Any, value: Any, *args: Any, weights: Any = (), **options: Any) -> Any:
        """Call a new layer."""
        layer = kind(*args, name=self._unique(), **options)
        result = layer(value)
        if weights:
            layer.set_weights([np.asarray(array, np.float32) for array in weights])
        return result

    def _activate(self, number: int, value: Any, operator: Operator) -> Any:
        kind = ACTIVATIONS[number] if number < len(ACTIVATIONS) else str(number)
        if kind == "none":
            return value
        if kind in {"relu", "relu6"}:
            return self._layer(layers.ReLU, value, max_value=RELU6 if kind == "relu6" else None)
        if kind == "tanh":
            return self._layer(layers.Activation, value, "tanh")
        if kind == "relu_n1_to_1":
            return ops.clip(value, -1.0, 1.0)
        raise _unknown(operator, f"with the activation {kind}")

    def _limit(self, operator: Operator, output: Tensor, activation: int, value: Any) -> Any:
        """A quantised tensor that cannot be negative: the activation that was left out for this reason."""
        if activation or operator.name not in LIMITED or not output.is_quantised:
            return value
        low, high = output.limits
        return self._layer(layers.ReLU, value, max_value=high) if low >= -output.scale / 2 else value

    def _reshape(self, operator: Operator, output: Tensor) -> Any:
        value = self._value(operator, 0)
        shape = output.shape
        if operator.name == "RESHAPE" and len(operator.inputs) > 1 and operator.inputs[1] in self._constants:
            shape = tuple(int(side) for side in np.ravel(self._constants[operator.inputs[1]]))
        size, *rest = shape or (0,)
        if -1 in rest:
            known = math.prod(side for side in rest if side != -1)
            rest[rest.index(-1)] = math.prod(value.shape[1:]) // known
        if size not in {1, -1} or math.prod(rest) != math.prod(value.shape[1:]):
            raise _unknown(operator, f"from {value.shape[1:]} to {shape}, over the axis of images")
        if tuple(rest) == tuple(value.shape[1:]):
            return value
        if len(rest) == 1:
            return self._layer(layers.Flatten, value)
        return self._layer(layers.Reshape, value, tuple(rest))

    def _binary(self, operator: Operator) -> Any:
        first, second = operator.inputs
        if first in self._values and second in self._values:
            kind = {"ADD": layers.Add, "MUL": layers.Multiply, "SUB": layers.Subtract}.get(operator.name)
            both = [self._values[first], self._values[second]]
            return self._layer(kind, both) if kind else BINARY[operator.name](*both)
        is_first = first in self._constants
        value = self._values[second if is_first else first]
        constant = self._per_image(operator, self._constants[first if is_first else second], value)
        rescaled = {
            ("ADD", False): (1.0, constant),
            ("ADD", True): (1.0, constant),
            ("DIV", False): (1 / constant, 0.0),
            ("MUL", False): (constant, 0.0),
            ("MUL", True): (constant, 0.0),
            ("SUB", False): (1.0, -constant),
            ("SUB", True): (-1.0, constant),
        }.get((operator.name, is_first))
        if rescaled:
            scale, offset = (np.asarray(number).tolist() for number in rescaled)
            return self._layer(layers.Rescaling, value, scale, offset=offset)
        if constant.ndim:
            raise _unknown(operator, "with a constant that is no single number")
        both = [float(constant), value] if is_first else [value, float(constant)]
        return BINARY[operator.name](*both)

    def _per_image(self, operator: Operator, constant: NDArray[Any], value: Any) -> NDArray[Any]:
        """A constant without the axis of images, and without others that it does not need."""
        if constant.size > MAX_NUMBERS:
            raise _unknown(operator, f"with a constant of {constant.size:,} numbers")
        if constant.ndim == len(value.shape) and constant.shape[0] != 1:
            raise _unknown(operator, "with a constant for several images")
        while constant.ndim and constant.shape[0] == 1:
            constant = constant[0]
        return constant

    def _split(self, operator: Operator) -> list[Any]:
        if operator.name == "UNPACK":
            axis, value = operator.options.axis, self._value(operator, 0)
            parts = ops.split(value, len(operator.outputs), axis)
            return [ops.squeeze(part, axis) for part in parts]
        axis = int(self._constant(operator, 0))
        return list(ops.split(self._value(operator, 1), len(operator.outputs), axis))

    def _slices(self, operator: Operator) -> tuple[slice | int, ...]:
        """What SLICE and STRIDED_SLICE take, for each axis."""
        first, second = (np.ravel(self._constant(operator, position)) for position in (1, 2))
        if operator.name == "SLICE":
            ends = [None if size == -1 else begin + size for begin, size in zip(first, second, strict=True)]
            return tuple(
                slice(int(begin), None if end is None else int(end))
                for begin, end in zip(first, ends, strict=True)
            )
        options, steps = operator.options, np.ravel(self._constant(operator, 3))
        if options.ellipsisMask or options.newAxisMask or options.offset:
            raise _unknown(operator, "with new axes")
        slices: list[slice | int] = []
        for axis, (begin, end, step) in enumerate(zip(first, second, steps, strict=True)):
            if options.shrinkAxisMask >> axis & 1:
                slices.append(int(begin))
                continue
            start = None if options.beginMask >> axis & 1 else int(begin)
            stop = None if options.endMask >> axis & 1 else int(end)
            slices.append(slice(start, stop, int(step)))
        return tuple(slices)

    def _slice(self, operator: Operator) -> Any:
        value = self._value(operator, 0)
        first, *rest = self._slices(operator)
        whole = (
            isinstance(first, slice)
            and not first.start
            and first.stop in {None, 1}
            and first.step in {None, 1}
        )
        if not whole:
            raise _unknown(operator, "over the axis of images")
        return value[(slice(None), *rest)]

    _strided_slice = _slice

    def _space_to_batch_nd(self, operator: Operator) -> Any:
        """The first of three operators that are a dilated convolution: it only pads here."""
        value, block, pads = (
            self._value(operator, 0),
            self._constant(operator, 1),
            self._constant(operator, 2),
        )
        if block.size != 2:  # noqa: PLR2004  # rows and columns
            raise _unknown(operator, f"of {block.size} axes")
        self._dilations[operator.outputs[0]] = (int(block[0]), int(block[1]))
        rows, columns = ((int(first), int(second)) for first, second in pads)
        return self._layer(layers.ZeroPadding2D, value, (rows, columns))

    def _batch_to_space_nd(self, operator: Operator) -> Any:
        rows, columns = ((int(first), int(second)) for first, second in self._constant(operator, 2))
        if operator.inputs[0] not in self._dilations:
            raise _unknown(operator)
        return self._layer(layers.Cropping2D, self._value(operator, 0), (rows, columns))

    def _dilation(self, operator: Operator) -> tuple[int, int]:
        block = self._dilations.get(operator.inputs[0])
        if block:
            self._dilations[operator.outputs[0]] = block
            return block
        return operator.options.dilationHFactor, operator.options.dilationWFactor

    def _conv_2d(self, operator: Operator) -> Any:
        value, weights = self._value(operator, 0), self._constant(operator, 1)
        bias, options = self._optional(operator, 2), operator.options
        kernel = weights.transpose(1, 2, 3, 0)
        return self._layer(
            layers.Conv2D,
            value,
            kernel.shape[3],
            kernel.shape[:2],
            strides=(options.strideH, options.strideW),
            padding=_padding(options),
            dilation_rate=self._dilation(operator),
            groups=value.shape[-1] // kernel.shape[2],
            use_bias=bias is not None,
            weights=[kernel, *([] if bias is None else [bias])],
        )

    def _depthwise_conv_2d(self, operator: Operator) -> Any:
        value, weights = self._value(operator, 0), self._constant(operator, 1)
        bias, options = self._optional(operator, 2), operator.options
        rows, columns, channels = weights.shape[1], weights.shape[2], value.shape[-1]
        kernel = weights.reshape(rows, columns, channels, -1)
        return self._layer(
            layers.DepthwiseConv2D,
            value,
            (rows, columns),
            strides=(options.strideH, options.strideW),
            padding=_padding(options),
            depth_multiplier=kernel.shape[3],
            dilation_rate=self._dilation(operator),
            use_bias=bias is not None,
            weights=[kernel, *([] if bias is None else [bias])],
        )

    def _fully_connected(self, operator: Operator) -> Any:
        value, bias = self._value(operator, 0), self._optional(operator, 2)
        weights = self._constant(operator, 1)
        if not operator.options.keepNumDims and len(value.shape) > 2:  # noqa: PLR2004  # images, features
            value = self._layer(layers.Flatten, value)
        return self._layer(
            layers.Dense,
            value,
            weights.shape[0],
            use_bias=bias is not None,
            weights=[weights.T, *([] if bias is None else [bias])],
        )

    def _batch_matmul(self, operator: Operator) -> Any:
        value, options = self._value(operator, 0), operator.options
        value = ops.swapaxes(value, -1, -2) if options.adjX else value
        if operator.inputs[1] in self._constants:
            kernel = self._constant(operator, 1)
            while kernel.ndim > 2 and kernel.shape[0] == 1:  # noqa: PLR2004  # a matrix
                kernel = kernel[0]
            if kernel.ndim != 2:  # noqa: PLR2004  # a matrix
                raise _unknown(operator, f"with a constant of the shape {kernel.shape}")
            kernel = kernel.T if options.adjY else kernel
            return self._layer(layers.Dense, value, kernel.shape[1], use_bias=False, weights=[kernel])
        other = self._value(operator, 1)
        return ops.matmul(value, ops.swapaxes(other, -1, -2) if options.adjY else other)

    def _pool(self, operator: Operator, kind: Any) -> Any:
        options = operator.options
        return self._layer(
            kind,
            self._value(operator, 0),
            (options.filterHeight, options.filterWidth),
            strides=(options.strideH, options.strideW),
            padding=_padding(options),
        )

    def _average_pool_2d(self, operator: Operator) -> Any:
        return self._pool(operator, layers.AveragePooling2D)

    def _max_pool_2d(self, operator: Operator) -> Any:
        return self._pool(operator, layers.MaxPooling2D)

    def _reduce(self, operator: Operator, function: Any, by_rank: dict[int, Any]) -> Any:
        value, keep = self._value(operator, 0), bool(operator.options.keepDims)
        rank = len(value.shape)
        axes = self._axes(operator, rank)
        if rank in by_rank and axes == tuple(range(1, rank - 1)):
            return self._layer(by_rank[rank], value, keepdims=keep)
        return function(value, axes, keepdims=keep)

    def _mean(self, operator: Operator) -> Any:
        pooling = {3: layers.GlobalAveragePooling1D, IMAGE_RANK: layers.GlobalAveragePooling2D}
        return self._reduce(operator, ops.mean, pooling)

    def _reduce_max(self, operator: Operator) -> Any:
        pooling = {3: layers.GlobalMaxPooling1D, IMAGE_RANK: layers.GlobalMaxPooling2D}
        return self._reduce(operator, ops.max, pooling)

    def _sum(self, operator: Operator) -> Any:
        return self._reduce(operator, ops.sum, {})

    def _concatenation(self, operator: Operator) -> Any:
        values = [self._value(operator, position) for position in range(len(operator.inputs))]
        axis = int(operator.options.axis) % len(values[0].shape)
        if axis == 0:
            raise _unknown(operator, "over the axis of images")
        return self._layer(layers.Concatenate, values, axis=axis)

    def _pad(self, operator: Operator) -> Any:
        value, pads = self._value(operator, 0), self._constant(operator, 1).astype(int).tolist()
        constant = self._optional(operator, 2)
        number = 0.0 if constant is None else float(np.ravel(constant)[0])
        if pads[0] != [0, 0]:
            raise _unknown(operator, "over the axis of images")
        if len(pads) == IMAGE_RANK and pads[3] == [0, 0] and not number:
            return self._layer(layers.ZeroPadding2D, value, (tuple(pads[1]), tuple(pads[2])))
        return ops.pad(value, pads, constant_values=number)

    _padv2 = _pad

    def _mirror_pad(self, operator: Operator) -> Any:
        pads = self._constant(operator, 1).astype(int).tolist()
        return ops.pad(self._value(operator, 0), pads, "symmetric" if operator.options.mode else "reflect")

    def _transpose(self, operator: Operator) -> Any:
        first, *order = (int(axis) for axis in np.ravel(self._constant(operator, 1)))
        if first:
            raise _unknown(operator, "over the axis of images")
        return self._layer(layers.Permute, self._value(operator, 0), tuple(order))

    def _gather(self, operator: Operator) -> Any:
        value, indices = self._value(operator, 0), self._constant(operator, 1)
        axis = int(operator.options.axis) % len(value.shape)
        if axis == 0 or operator.options.batchDims:
            raise _unknown(operator, "over the axis of images")
        return ops.take(value, indices.tolist(), axis)

    def _softmax(self, operator: Operator) -> Any:
        value, beta = self._value(operator, 0), operator.options.beta
        if beta not in {0.0, 1.0}:
            value = self._layer(layers.Rescaling, value, float(beta))
        return self._layer(layers.Softmax, value)

    def _log_softmax(self, operator: Operator) -> Any:
        return self._layer(layers.Activation, self._value(operator, 0), "log_softmax")

    def _logistic(self, operator: Operator) -> Any:
        return self._layer(layers.Activation, self._value(operator, 0), "sigmoid")

    def _tanh(self, operator: Operator) -> Any:
        return self._layer(layers.Activation, self._value(operator, 0), "tanh")

    def _relu(self, operator: Operator) -> Any:
        return self._layer(layers.ReLU, self._value(operator, 0))

    def _relu6(self, operator: Operator) -> Any:
        return self._layer(layers.ReLU, self._value(operator, 0), max_value=RELU6)

    def _relu_n1_to_1(self, operator: Operator) -> Any:
        return ops.clip(self._value(operator, 0), -1.0, 1.0)

    def _relu_0_to_1(self, operator: Operator) -> Any:
        return self._layer(layers.ReLU, self._value(operator, 0), max_value=1.0)

    def _elu(self, operator: Operator) -> Any:
        return self._layer(layers.Activation, self._value(operator, 0), "elu")

    def _hard_swish(self, operator: Operator) -> Any:
        return self._layer(layers.Activation, self._value(operator, 0), "hard_silu")

    def _gelu(self, operator: Operator) -> Any:
        return ops.gelu(self._value(operator, 0), approximate=bool(operator.options.approximate))

    def _leaky_relu(self, operator: Operator) -> Any:
        return self._layer(
            layers.LeakyReLU, self._value(operator, 0), negative_slope=float(operator.options.alpha)
        )

    def _prelu(self, operator: Operator) -> Any:
        value = self._value(operator, 0)
        slopes = self._per_image(operator, self._constant(operator, 1), value)
        slopes = slopes.reshape((1,) * (len(value.shape) - 1 - slopes.ndim) + slopes.shape)
        shared = [axis + 1 for axis, size in enumerate(slopes.shape) if size == 1] or None
        return self._layer(layers.PReLU, value, shared_axes=shared, weights=[slopes])

    def _l2_normalization(self, operator: Operator) -> Any:
        return self._layer(layers.UnitNormalization, self._value(operator, 0))

    def _resize(self, operator: Operator, interpolation: str) -> Any:
        value, options = self._value(operator, 0), operator.options
        rows, columns = (int(side) for side in np.ravel(self._constant(operator, 1)))
        if options.alignCorners or not options.halfPixelCenters:
            raise _unknown(operator, "that aligns corners")
        return self._layer(layers.Resizing, value, rows, columns, interpolation=interpolation)

    def _resize_bilinear(self, operator: Operator) -> Any:
        return self._resize(operator, "bilinear")

    def _resize_nearest_neighbor(self, operator: Operator) -> Any:
        return self._resize(operator, "nearest")


def _plain(name: str) -> str:
    """The name of the layer that made a tensor: `model/block1/Relu` gives `block1`."""
    *scopes, last = name.partition(";")[0].strip("/").split("/")
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", scopes[-1] if scopes else last).strip("_.-") or "step"


def _padding(options: Any) -> str:
    return "valid" if options.padding else "same"


def _unknown(operator: Operator, detail: str = "") -> Refused:
    what = f"{operator.name} {detail}".strip()
    return Refused(f"has the operator {what}, which no layer of Keras stands for here")
