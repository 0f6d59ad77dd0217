"""A Keras model -> its graph. The model is left as it is: nothing in it is edited.

Models nested in it are opened, at any depth, and so are subclassed models, custom layers and Lambdas, as far
as they are made of layers and `keras.ops`.
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
from gradcam_worker.gradcam.graph.graph import Graph, Step, Values, is_foreign

MAX_STEPS = 20_000  # of a graph; the largest of `keras.applications` has about 1,300
ROOT = ""  # the path of the model itself


def trace_model(model: Any, input_shape: tuple[int, int, int], *, renumber: bool = False) -> Graph:
    """A Keras model and the shape (height, width, channels) of its input -> its graph.

    Models and custom layers nested in it are opened, at any depth, as far as they are made of layers. With
    `renumber`, operations that Keras named by a process-wide counter get the numbers they would have in
    a process of their own, so that `add_17` is the same layer wherever the model is built.

    Raises NetworkIncompatible where there is no static graph, more than one input, another input shape, or
    channels come first.
    """
    _build(model, input_shape)
    with _untouched(model):
        opened = _with_graph(model, input_shape)
        image = _image_input(opened, input_shape)
        walk = _Walk()
        entry = walk.slot(keras.KerasTensor((None, *input_shape), image.dtype))
        outputs = walk.open(opened, {id(image): entry}, ROOT, Counter() if opened is not model else None)
        names = _output_names(opened)
    shapes = {slot: tuple(size or 0 for size in spec.shape) for slot, spec in walk.specs.items()}
    graph = Graph(
        entry, walk.steps, dict(zip(names, outputs, strict=True)), shapes, walk.models, str(image.dtype)
    )
    return _renumbered(graph) if renumber else graph


def _build(model: Any, input_shape: tuple[int, int, int]) -> None:
    """Give a model that has not been called yet its weights."""
    if model.built:
        return
    try:
        if isinstance(model, keras.Sequential):
            model.build((None, *input_shape))
        else:
            model(np.zeros((1, *input_shape), np.float32), training=False)
    except Exception as error:  # its own code may raise anything
        message = (
            f"{model.name} cannot be called with an image of {_sizes(input_shape)}: {_first_line(error)}"
        )
        raise NetworkIncompatible(message) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """To open a layer is to call the layers in it; take away the notes that they keep of it."""
    notes = [
        noted
        for layer in model._flatten_layers()  # noqa: SLF001  # there is no public way
        for noted in (layer._inbound_nodes, layer._outbound_nodes)  # noqa: SLF001
    ]
    before = [len(noted) for noted in notes]
    try:
        yield
    finally:
        for noted, count in zip(notes, before, strict=True):
            del noted[count:]


def _with_graph(model: Any, input_shape: tuple[int, int, int]) -> Any:
    """The model itself where it has a graph; a subclassed one is called symbolically, as far as that goes."""
    if _has_graph(model):
        return model
    image = keras.KerasTensor((None, *input_shape))
    opened = _opened(model, [image], (image,), {})
    if opened is None:
        message = (
            f"{type(model).__name__} {model.name!r} has no static graph: its `call` could not be followed "
            "with symbolic tensors. Build it as a functional or Sequential model, or of layers and keras.ops."
        )
        raise NetworkIncompatible(message)
    return opened


def _has_graph(model: Any) -> bool:
    try:
        return bool(model.inputs) and all(
            hasattr(one, "_keras_history") for one in keras.tree.flatten(model.outputs)
        )
    except (AttributeError, TypeError, ValueError):  # a subclassed model has no `inputs`
        return False


def _opened(operation: Any, tensors: list[Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What somebody's own model or layer does, as a functional model; None where that cannot be seen.

    It is called with `args` and `kwargs`, which hold `tensors`; these become the inputs, in their order.
    """
    fresh = {id(one): keras.Input(batch_shape=one.shape, dtype=one.dtype) for one in tensors}
    args, kwargs = keras.tree.map_structure(lambda one: fresh.get(id(one), one), (args, dict(kwargs)))
    kwargs = {key: value for key, value in kwargs.items() if key not in {"training", "mask"}}
    try:
        if "training" in inspect.signature(operation.call).parameters:
            kwargs["training"] = False
        opened = keras.Model([fresh[id(one)] for one in tensors], operation.call(*args, **kwargs))
        if all(None not in one.shape[1:] for one in tensors):  # a batch of two: its size must not be built in
            opened([keras.ops.zeros((2, *one.shape[1:]), one.dtype) for one in tensors])
    except Exception:  # noqa: BLE001  # its own code, which was not written for symbolic tensors
        return None
    return opened


def _image_input(model: Any, input_shape: tuple[int, int, int]) -> Any:
    inputs = keras.tree.flatten(model.inputs)
    if len(inputs) > 1:
        names = ", ".join(f"{one.name} {one.shape[1:]}" for one in inputs)
        message = f"{model.name} takes {len(inputs)} inputs ({names}); a job has one image."
        raise NetworkIncompatible(message)
    own = inputs[0].shape[1:]
    fits = len(own) == len(input_shape) and all(
        mine in {None, given} for mine, given in zip(own, input_shape, strict=True)
    )
    if not fits:
        message = (
            f"{model.name} takes an input of {_sizes(own)}, not of {_sizes(input_shape)} (height x width x "
            "channels): set input_size, and the channels of its preprocessing, to what it was built for."
        )
        raise NetworkIncompatible(message)
    return inputs[0]


def _sizes(shape: Iterable[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape)


def _output_names(model: Any) -> list[str]:
    """A name for each output: its key where the outputs are a dictionary, else its layer's."""
    struct = getattr(model, "output", None)
    if isinstance(struct, dict):
        return [".".join(map(str, path)) for path, _ in keras.tree.flatten_with_path(struct)]
    names = [str(one._keras_history.operation.name) for one in keras.tree.flatten(model.outputs)]  # noqa: SLF001
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}:{index}" for index, name in enumerate(names)]


class _Walk:
    """Collects the steps of a model and of the models nested in it."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.specs: Values = {}  # slot -> what one such image is there, as a symbolic tensor
        self.models: dict[str, int] = {}
        self._calls: Counter[str] = Counter()

    def slot(self, spec: Any = None) -> int:
        self.specs[number := len(self.specs) + 1] = spec
        return number

    def open(self, model: Any, slots: dict[int, int], prefix: str, counts: Counter[str] | None) -> list[int]:
        """Add the steps of `model`; `slots` hold its inputs by their symbolic tensors' ids.

        Operations get numbers of their own from `counts` where the model was only made to see them.
        """
        for node in _in_order(keras.tree.flatten(model.outputs), slots):
            self._add(node, slots, prefix, counts)
            if len(self.steps) > MAX_STEPS:
                message = f"{model.name} has more than {MAX_STEPS} steps."
                raise NetworkIncompatible(message)
        return [slots[id(one)] for one in keras.tree.flatten(model.outputs)]

    def _add(self, node: Any, slots: dict[int, int], prefix: str, counts: Counter[str] | None) -> None:
        operation = node.operation
        path = prefix + (operation.name if counts is None else _numbered(operation, counts))
        self._calls[path] += 1
        path += f"#{self._calls[path]}" if self._calls[path] > 1 else ""
        tensors = list({id(one): one for one in node.input_tensors}.values())
        nested = self._nested(node, tensors, slots)
        if nested is None:
            reads = tuple((id(one), slots[id(one)]) for one in tensors)
            step = Step(path, operation, node.arguments, reads, tuple(self.slot() for _ in node.outputs))
            self._follow(step)
            self.steps.append(step)
            written = list(step.writes)
        else:
            own = isinstance(operation, keras.Model) and _has_graph(operation)
            given = node.input_tensors if own else tensors
            inner = {
                id(one): slots[id(outer)]
                for one, outer in zip(keras.tree.flatten(nested.inputs), given, strict=True)
            }
            written = self.open(nested, inner, f"{path}/", None if own else Counter())
            self.models[path] = written[0]
        slots.update(zip((id(one) for one in node.outputs), written, strict=True))

    def _nested(self, node: Any, tensors: list[Any], slots: dict[int, int]) -> Any:
        """The graph inside a model, or inside somebody's own layer, that was called as one operation."""
        operation = node.operation
        is_model = isinstance(operation, keras.Model)
        if is_model and _has_graph(operation):
            return operation
        if not is_model and not is_foreign(operation):
            return None  # Keras's own layers, as attention, are single steps
        specs = {id(one): self.specs[slots[id(one)]] for one in tensors}  # of these sizes, not of any
        args, kwargs = node.arguments.fill_in(specs)
        opened = _opened(operation, list(specs.values()), args, kwargs)
        same = opened is not None and len(keras.tree.flatten(opened.outputs)) == len(node.outputs)
        return opened if same else None

    def _follow(self, step: Step) -> None:
        """Find out what a step makes of one such image."""
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
    """The name of a layer; of another operation its class's, with a number from the second on."""
    if isinstance(operation, keras.Layer):
        return str(operation.name)
    kind = _snake_case(type(operation).__name__)
    counts[kind] += 1
    return f"{kind}_{counts[kind] - 1}" if counts[kind] > 1 else kind


def _in_order(outputs: list[Any], known: Mapping[int, int]) -> Iterator[Any]:
    """The calls that lead from known tensors to `outputs`, each after those that it needs."""
    done: set[int] = set()
    stack = [(_node(one), False) for one in reversed(outputs) if id(one) not in known]
    while stack:
        node, ready = stack.pop()
        if id(node) in done:
            continue
        if ready:
            done.add(id(node))
            yield node
            continue
        stack.append((node, True))
        missing = [one for one in node.input_tensors if id(one) not in known]
        stack += [(before, False) for one in reversed(missing) if id(before := _node(one)) not in done]


def _node(tensor: Any) -> Any:
    """The call that made a symbolic tensor."""
    operation, index, _ = tensor._keras_history  # noqa: SLF001  # how a Keras graph is walked
    if isinstance(operation, keras.layers.InputLayer) or operation is None:
        message = f"The graph needs {tensor.name!r}, which is not connected to the image."
        raise NetworkIncompatible(message)
    return operation._inbound_nodes[index]  # noqa: SLF001


def _renumbered(graph: Graph) -> Graph:
    """The same graph with Keras's counters started anew."""
    numbered: dict[str, list[tuple[int, Step]]] = {}
    for step in graph.steps:
        kind = _snake_case(step.kind)
        if match := re.fullmatch(rf"{kind}(?:_(\d+))?", step.path):
            numbered.setdefault(kind, []).append((int(match[1] or 0), step))
    fresh = {step.path: step.path for step in graph.steps}
    for kind, found in numbered.items():
        for number, (_, step) in enumerate(sorted(found, key=lambda pair: pair[0])):
            fresh[step.path] = f"{kind}_{number}" if number else kind
    return replace(graph, steps=[replace(step, path=fresh[step.path]) for step in graph.steps])


def _snake_case(name: str) -> str:
    """As Keras makes a layer's name of its class's."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
