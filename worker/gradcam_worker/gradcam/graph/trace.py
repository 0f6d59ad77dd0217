"""A Keras model to its graph; the model is not changed.

Nested models are opened, at any depth, and so are subclassed models, custom layers and Lambdas that consist
of layers and `keras.ops`.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.graph.graph import Graph, ModelInput, Step, Values, is_custom_layer
from gradcam_worker.gradcam.network import WAY_OUT

MAX_STEPS = 20_000  # the largest network of `keras.applications` has about 1,300
ROOT = ""  # the path of the model itself
IMAGE_RANK = 4  # images, rows, columns, channels


def trace_model(
    model: Any,
    input_shape: tuple[int, int, int],
    *,
    renumber: bool = False,
    image_input: str | None = None,
) -> Graph:
    """Trace a Keras model.

    Args:
        model: The model.
        input_shape: (height, width, channels) of its image.
        renumber: Give operations that Keras named by a process-wide counter the numbers that they would have
            in a new process, so that `add_17` is the same layer wherever the model is built.
        image_input: The name of the input for the image; None: the only one with rows, columns and channels.

    Returns:
        The graph of the model and of all models nested in it.

    Raises:
        NetworkIncompatible: The model has no static graph, no input that is certainly the image, an image of
            another shape, or channels first.
    """
    _build(model, input_shape)
    with _restoring_nodes(model):
        opened = _with_graph(model, input_shape)
        tensors = dict(zip(input_names(opened), keras.tree.flatten(opened.inputs), strict=True))
        image = find_image_input(opened, image_input)
        _check_shape(opened, image, input_shape)
        tracer = _Tracer()
        slots = {id(image): tracer.new_slot(keras.KerasTensor((None, *input_shape), image.dtype))}
        for tensor in tensors.values():
            if tensor is not image:
                slots[id(tensor)] = tracer.new_slot(keras.KerasTensor(tensor.shape, tensor.dtype))
        inputs = {name: ModelInput(slots[id(one)], str(one.dtype)) for name, one in tensors.items()}
        input_slot = slots[id(image)]
        counts: Counter[str] | None = Counter() if opened is not model else None
        outputs = tracer.open(opened, slots, ROOT, counts)
        names = output_names(opened)
    shapes = {slot: tuple(size or 0 for size in spec.shape) for slot, spec in tracer.specs.items()}
    named_outputs = dict(zip(names, outputs, strict=True))
    graph = Graph(input_slot, tracer.steps, named_outputs, shapes, tracer.models, str(image.dtype), inputs)
    return _renumbered(graph) if renumber else graph


def _build(model: Any, input_shape: tuple[int, int, int]) -> None:
    """Create the weights of a model that has not been called yet."""
    if model.built:
        return
    try:
        if isinstance(model, keras.Sequential):
            model.build((None, *input_shape))
        else:
            model(np.zeros((1, *input_shape), np.float32), training=False)
    except Exception as error:  # a subclassed model's own code
        message = (
            f"{model.name} cannot be called with an image of {_sizes(input_shape)}: {_first_line(error)}"
        )
        raise NetworkIncompatible(message) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _restoring_nodes(model: Any) -> Iterator[None]:
    """Opening a layer calls the layers in it, which record a node for each call: remove these afterwards."""
    node_lists = [
        nodes
        for layer in model._flatten_layers()  # noqa: SLF001  # there is no public way
        for nodes in (layer._inbound_nodes, layer._outbound_nodes)  # noqa: SLF001
    ]
    counts = [len(nodes) for nodes in node_lists]
    try:
        yield
    finally:
        for nodes, count in zip(node_lists, counts, strict=True):
            del nodes[count:]


def _with_graph(model: Any, input_shape: tuple[int, int, int]) -> Any:
    """The model itself where it has a graph; else, as for a subclassed model, its symbolic call."""
    if _has_graph(model):
        return model
    image = keras.KerasTensor((None, *input_shape))
    opened = _as_functional(model, [image], (image,), {})
    if opened is None:
        message = (
            f"{type(model).__name__} {model.name!r} has no static graph: its `call` could not be followed "
            "with symbolic tensors. Build it as a functional or Sequential model, or of layers and "
            f"keras.ops. {WAY_OUT}."
        )
        raise NetworkIncompatible(message)
    return opened


def _has_graph(model: Any) -> bool:
    try:
        return bool(model.inputs) and all(
            hasattr(output, "_keras_history") for output in keras.tree.flatten(model.outputs)
        )
    except (AttributeError, TypeError, ValueError):  # a subclassed model has no `inputs`
        return False


def _as_functional(operation: Any, tensors: list[Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """A custom model or layer as a functional model, by a symbolic call; None where that fails.

    It is called with `args` and `kwargs`, which contain `tensors`; these become the inputs, in order.
    """
    inputs = {id(tensor): keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype) for tensor in tensors}
    args, kwargs = keras.tree.map_structure(
        lambda argument: inputs.get(id(argument), argument), (args, dict(kwargs))
    )
    kwargs = {key: value for key, value in kwargs.items() if key not in {"training", "mask"}}
    try:
        if "training" in inspect.signature(operation.call).parameters:
            kwargs["training"] = False
        functional = keras.Model([inputs[id(tensor)] for tensor in tensors], operation.call(*args, **kwargs))
        if all(None not in tensor.shape[1:] for tensor in tensors):
            # A batch of two: a batch size of one must not be built in.
            functional([keras.ops.zeros((2, *tensor.shape[1:]), tensor.dtype) for tensor in tensors])
    except Exception:  # noqa: BLE001  # custom code, which was not written for symbolic tensors
        return None
    return functional


def input_names(model: Any) -> list[str]:
    """A name for each input of a model: its key in a dictionary of inputs, else its layer's name."""
    struct = getattr(model, "_inputs_struct", None)
    if isinstance(struct, dict):
        return [".".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(struct)]
    return [str(tensor.name) for tensor in keras.tree.flatten(model.inputs)]


def find_image_input(model: Any, image_input: str | None) -> Any:
    """Find the input of a model for the image.

    Args:
        model: A functional model.
        image_input: Its name; None: the only one with rows, columns and channels.

    Returns:
        The tensor.

    Raises:
        NetworkIncompatible: There is no such input, or more than one.
    """
    tensors = dict(zip(input_names(model), keras.tree.flatten(model.inputs), strict=True))
    names = ", ".join(f"{name} {tensor.shape[1:]}" for name, tensor in tensors.items())
    if image_input is not None and image_input not in tensors:
        message = f"{model.name} has no input {image_input!r} for the image; it takes {names}."
        raise NetworkIncompatible(message)
    images = [name for name, tensor in tensors.items() if len(tensor.shape) == IMAGE_RANK]
    if image_input is None and len(tensors) > 1 and len(images) != 1:
        message = (
            f"{model.name} takes {len(tensors)} inputs ({names}); a job has one image. "
            "If only one of them is an image, name it: image_input."
        )
        raise NetworkIncompatible(message)
    return tensors[image_input or (images[0] if len(tensors) > 1 else next(iter(tensors)))]


def _check_shape(model: Any, image: Any, input_shape: tuple[int, int, int]) -> None:
    """Check that the input for the image takes such images. Raises NetworkIncompatible."""
    expected = image.shape[1:]
    fits = len(expected) == len(input_shape) and all(
        size in {None, actual} for size, actual in zip(expected, input_shape, strict=True)
    )
    if not fits:
        needs_grey = expected[-1] == 1 != input_shape[-1]
        message = (
            f"{model.name} takes an input of {_sizes(expected)}, not of {_sizes(input_shape)} (height x "
            "width x channels): set input_size, and the channels of its preprocessing, accordingly"
            + (', as in preprocessing = {scale = 0.00392, channels = "grey"}.' if needs_grey else ".")
        )
        raise NetworkIncompatible(message)


def _sizes(shape: Iterable[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape)


def output_names(model: Any) -> list[str]:
    """Name each output of a Keras model.

    Args:
        model: The model.

    Returns:
        Its key in a dictionary of outputs, else its layer's name.
    """
    struct = getattr(model, "output", None)
    if isinstance(struct, dict):
        return [".".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(struct)]
    outputs = keras.tree.flatten(model.outputs)
    names = [str(tensor._keras_history.operation.name) for tensor in outputs]  # noqa: SLF001
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}:{index}" for index, name in enumerate(names)]


class _Tracer:
    """Collects the steps of a model and of the models nested in it."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.specs: Values = {}  # slot -> symbolic tensor
        self.models: dict[str, int] = {}
        self._calls: Counter[str] = Counter()

    def new_slot(self, spec: Any = None) -> int:
        self.specs[number := len(self.specs) + 1] = spec
        return number

    def open(self, model: Any, slots: dict[int, int], prefix: str, counts: Counter[str] | None) -> list[int]:
        """Add the steps of a model; return the slots of its outputs.

        `slots` maps the ids of symbolic tensors, at first of its inputs, to slots. `counts` numbers the
        operations of a model that `_as_functional` made.
        """
        for node in _sorted_nodes(keras.tree.flatten(model.outputs), slots):
            self._add(node, slots, prefix, counts)
            if len(self.steps) > MAX_STEPS:
                message = f"{model.name} has more than {MAX_STEPS} steps. {WAY_OUT}."
                raise NetworkIncompatible(message)
        return [slots[id(output)] for output in keras.tree.flatten(model.outputs)]

    def _add(self, node: Any, slots: dict[int, int], prefix: str, counts: Counter[str] | None) -> None:
        operation = node.operation
        path = prefix + (operation.name if counts is None else _numbered(operation, counts))
        self._calls[path] += 1
        path += f"#{self._calls[path]}" if self._calls[path] > 1 else ""
        tensors = list({id(tensor): tensor for tensor in node.input_tensors}.values())
        nested = self._nested(node, tensors, slots)
        if nested is None:
            reads = tuple((id(tensor), slots[id(tensor)]) for tensor in tensors)
            step = Step(path, operation, node.arguments, reads, tuple(self.new_slot() for _ in node.outputs))
            self._infer_outputs(step)
            self.steps.append(step)
            written = list(step.writes)
        else:
            has_graph = isinstance(operation, keras.Model) and _has_graph(operation)
            outer = node.input_tensors if has_graph else tensors
            inner = {
                id(inside): slots[id(outside)]
                for inside, outside in zip(keras.tree.flatten(nested.inputs), outer, strict=True)
            }
            written = self.open(nested, inner, f"{path}/", None if has_graph else Counter())
            self.models[path] = written[0]
        slots.update(zip((id(output) for output in node.outputs), written, strict=True))

    def _nested(self, node: Any, tensors: list[Any], slots: dict[int, int]) -> Any:
        """The functional model inside a nested model or a custom layer; None for a single step."""
        operation = node.operation
        is_model = isinstance(operation, keras.Model)
        if is_model and _has_graph(operation):
            return operation
        if not is_model and not is_custom_layer(operation):
            return None  # Keras's own layers, such as attention, are single steps
        specs = {id(tensor): self.specs[slots[id(tensor)]] for tensor in tensors}  # of known sizes
        args, kwargs = node.arguments.fill_in(specs)
        functional = _as_functional(operation, list(specs.values()), args, kwargs)
        if functional is None or len(keras.tree.flatten(functional.outputs)) != len(node.outputs):
            return None
        return functional

    def _infer_outputs(self, step: Step) -> None:
        """Infer the shapes and types of a step's outputs. Raises NetworkIncompatible."""
        if getattr(step.operation, "data_format", None) == "channels_first":
            message = (
                f"{step.path} puts the channels first; build the network with the data format channels_last "
                "(rows, columns, channels)."
            )
            raise NetworkIncompatible(message)
        try:
            step(self.specs, call=step.operation.compute_output_spec)
        except Exception as error:
            shapes = " and ".join(str(self.specs[slot].shape) for slot in step.inputs)
            message = f"{step.path} cannot take {shapes}: {_first_line(error)}"
            raise NetworkIncompatible(message) from error


def _numbered(operation: Any, counts: Counter[str]) -> str:
    """A layer's name; for another operation the name of its class, numbered from the second on."""
    if isinstance(operation, keras.Layer):
        return str(operation.name)
    kind = _snake_case(type(operation).__name__)
    counts[kind] += 1
    return f"{kind}_{counts[kind] - 1}" if counts[kind] > 1 else kind


def _sorted_nodes(outputs: list[Any], known: Mapping[int, int]) -> Iterator[Any]:
    """The nodes that lead from known tensors to `outputs`, in topological order."""
    done: set[int] = set()
    stack = [(_node(output), False) for output in reversed(outputs) if id(output) not in known]
    while stack:
        node, ready = stack.pop()
        if id(node) in done:
            continue
        if ready:
            done.add(id(node))
            yield node
            continue
        stack.append((node, True))
        missing = [tensor for tensor in node.input_tensors if id(tensor) not in known]
        stack += [(earlier, False) for one in reversed(missing) if id(earlier := _node(one)) not in done]


def _node(tensor: Any) -> Any:
    """The node, one call of an operation, whose output is a symbolic tensor."""
    operation, index, _ = tensor._keras_history  # noqa: SLF001  # how a Keras graph is walked
    if isinstance(operation, keras.layers.InputLayer) or operation is None:
        message = f"The graph needs {tensor.name!r}, which is not connected to the image."
        raise NetworkIncompatible(message)
    return operation._inbound_nodes[index]  # noqa: SLF001


def _renumbered(graph: Graph) -> Graph:
    """A copy of the graph in which Keras's counters start at 0."""
    numbered: dict[str, list[tuple[int, Step]]] = {}
    for step in graph.steps:
        kind = _snake_case(step.kind)
        if match := re.fullmatch(rf"{kind}(?:_(\d+))?", step.path):
            numbered.setdefault(kind, []).append((int(match[1] or 0), step))
    paths = {step.path: step.path for step in graph.steps}
    for kind, steps in numbered.items():
        for number, (_, step) in enumerate(sorted(steps, key=lambda pair: pair[0])):
            paths[step.path] = f"{kind}_{number}" if number else kind
    return replace(graph, steps=[replace(step, path=paths[step.path]) for step in graph.steps])


def _snake_case(name: str) -> str:
    """The name that Keras gives a layer of this class."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
