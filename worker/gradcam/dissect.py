"""A Keras model -> its graph. The model is left as it is: nothing in it is edited, no layer is called anew.

Models nested in it are opened, at any depth, and so are subclassed models and custom layers, as far as they
are made of layers and `keras.ops`.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from worker.errors import NetworkIncompatible
from worker.gradcam.backend import keras
from worker.gradcam.graph import Graph, Step, Values

MAX_STEPS = 20_000  # of a graph; the largest of `keras.applications` has about 1,300


def take_apart(model: Any, input_shape: tuple[int, int, int], *, renumber: bool = False) -> Graph:
    """A Keras model and the shape (height, width, channels) of its input -> its graph.

    Models and custom layers nested in it are opened, at any depth, as far as they are made of layers. With
    `renumber`, operations that Keras named by a process-wide counter get the numbers they would have in
    a process of their own, so that `add_17` is the same layer wherever the model is built.

    Raises NetworkIncompatible where there is no static graph, more than one input, or another input shape.
    """
    model = _with_graph(model, input_shape)
    image = _image_input(model, input_shape)
    walk = _Walk()
    entry = walk.slot()
    outputs = walk.open(model, {id(image): entry}, "")
    names = _output_names(model)
    graph = Graph(entry, walk.steps, dict(zip(names, outputs, strict=True)), image.dtype)
    if renumber:
        fresh = _renumbered(graph.steps)
        graph = replace(graph, steps=[replace(step, path=fresh[step.path]) for step in graph.steps])
    return _with_shapes(graph, input_shape)


def _with_graph(model: Any, input_shape: tuple[int, int, int]) -> Any:
    """The model itself where it has a graph; a subclassed one is called symbolically, as far as that goes."""
    if isinstance(model, keras.Sequential) and not model.built:
        model.build((None, *input_shape))
    try:
        if model.inputs and all(hasattr(one, "_keras_history") for one in keras.tree.flatten(model.outputs)):
            return model
    except (AttributeError, TypeError, ValueError):
        pass  # a subclassed model has no `inputs`
    opened = _opened(model, [keras.KerasTensor((None, *input_shape))], {})
    if opened is None:
        message = (
            f"{type(model).__name__} {model.name!r} has no static graph: its `call` could not be followed "
            "with symbolic tensors. Build it as a functional or Sequential model, or of layers and keras.ops."
        )
        raise NetworkIncompatible(message)
    return opened


def _opened(operation: Any, tensors: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """What somebody's own model or layer does, as a functional model; None where that cannot be seen."""
    try:
        inputs = [keras.Input(batch_shape=one.shape, dtype=one.dtype) for one in tensors]
        own = dict(kwargs)
        if "training" in inspect.signature(operation.call).parameters:
            own["training"] = False
        if not operation.built:
            operation(*inputs, **own)
        outputs = operation.call(*inputs, **own)
        return keras.Model(inputs, outputs)
    except Exception:  # noqa: BLE001  # its own code, which was not written for symbolic tensors
        return None


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
        self._slots = 0
        self._calls: Counter[str] = Counter()

    def slot(self) -> int:
        self._slots += 1
        return self._slots

    def open(self, model: Any, slots: dict[int, int], prefix: str) -> list[int]:
        """Add the steps of `model`; `slots` hold its inputs by their symbolic tensors' ids."""
        for node in _in_order(keras.tree.flatten(model.outputs), slots):
            self._add(node, slots, prefix)
            if len(self.steps) > MAX_STEPS:
                message = f"{model.name} has more than {MAX_STEPS} steps."
                raise NetworkIncompatible(message)
        return [slots[id(one)] for one in keras.tree.flatten(model.outputs)]

    def _add(self, node: Any, slots: dict[int, int], prefix: str) -> None:
        operation = node.operation
        path = prefix + operation.name
        self._calls[path] += 1
        path += f"#{self._calls[path]}" if self._calls[path] > 1 else ""
        nested = self._nested(node)
        if nested is not None:
            inner = dict(
                zip(
                    (id(one) for one in keras.tree.flatten(nested.inputs)),
                    (slots[id(one)] for one in node.input_tensors),
                    strict=True,
                )
            )
            written = self.open(nested, inner, f"{path}/")
        else:
            written = [self.slot() for _ in node.outputs]
            reads = tuple((id(one), slots[id(one)]) for one in node.input_tensors)
            self.steps.append(Step(path, operation, node.arguments, reads, tuple(written)))
        slots.update(zip((id(one) for one in node.outputs), written, strict=True))

    def _nested(self, node: Any) -> Any:
        """The graph inside a model, or inside somebody's own layer, that was called as one operation."""
        operation = node.operation
        if isinstance(operation, keras.Model):
            if getattr(operation, "inputs", None):
                return operation
        elif not _is_composite(operation):
            return None
        own = {
            key: value
            for key, value in node.arguments.kwargs.items()
            if key not in {"training", "mask"}
            and not any(isinstance(one, keras.KerasTensor) for one in keras.tree.flatten(value))
        }
        direct = [one for one in node.arguments.args if isinstance(one, keras.KerasTensor)]
        if len(direct) != len(node.input_tensors) or len(node.arguments.args) != len(direct):
            return None  # called in a way that is not simply one tensor after the other
        opened = _opened(operation, direct, own)
        same = opened is not None and len(keras.tree.flatten(opened.outputs)) == len(node.outputs)
        return opened if same else None


def _is_composite(operation: Any) -> bool:
    """Somebody's own layer made of layers. Keras's own, as attention, are single steps."""
    if type(operation).__module__.startswith("keras.") or not isinstance(operation, keras.Layer):
        return False
    return any(operation._flatten_layers(include_self=False))  # noqa: SLF001  # there is no public way


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


def _renumbered(steps: list[Step]) -> dict[str, str]:
    """Path -> path with Keras's counters started anew."""
    numbered: dict[str, list[tuple[int, Step]]] = {}
    for step in steps:
        kind = _snake_case(type(step.operation).__name__)
        if match := re.fullmatch(rf"{kind}(?:_(\d+))?", step.path):
            numbered.setdefault(kind, []).append((int(match[1] or 0), step))
    fresh = {step.path: step.path for step in steps}
    for kind, found in numbered.items():
        for number, (_, step) in enumerate(sorted(found, key=lambda pair: pair[0])):
            fresh[step.path] = f"{kind}_{number}" if number else kind
    return fresh


def _snake_case(name: str) -> str:
    """As Keras makes a layer's name of its class's."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _with_shapes(graph: Graph, input_shape: tuple[int, int, int]) -> Graph:
    """Every step with the shape of what it makes of one such image."""
    values: Values = {graph.entry: keras.KerasTensor((None, *input_shape), dtype=graph.entry_dtype)}
    steps = []
    for step in graph.steps:
        step(values, call=step.operation.compute_output_spec)
        shape = tuple(size or 0 for size in values[step.writes[0]].shape)
        steps.append(replace(step, shape=shape))
    return replace(graph, steps=steps)
