"""A network as a flat list of steps: `trace.trace_model` makes it from a Keras model and opens nested models.

A step is one call of one operation. Its path is the layer's name after the names of the models that it is
nested in, such as `xception/block14_sepconv2_act`; an operation that is called twice, as in a siamese
network, is `backbone#2/conv` the second time. A tensor between steps is a slot, a number. The steps up to a
slot and those from there on can be run separately: that is the cut that Grad-CAM needs, and it works for any
graph, including skip connections.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gradcam_worker.gradcam.backend import keras

Values = dict[int, Any]  # slot -> tensor


@dataclass(frozen=True)
class Step:
    """One call of one operation, which reads slots and writes slots."""

    path: str
    operation: Any  # keras.Operation: most are layers
    arguments: Any  # Keras's record of how it was called, with symbolic tensors as placeholders
    reads: tuple[tuple[int, int], ...]  # (id of the placeholder, slot)
    writes: tuple[int, ...]

    def __call__(self, values: Values, call: Callable[..., Any] | None = None) -> None:
        """Run the step in inference mode.

        Args:
            values: Tensors by slot; the outputs are added.
            call: Called instead of the operation, with the same arguments.
        """
        args, kwargs = self.arguments.fill_in({mark: values[slot] for mark, slot in self.reads})
        if self._takes_training:
            kwargs["training"] = False  # a functional model overrides its layers' argument in the same way
        results = keras.tree.flatten((call or self.operation)(*args, **kwargs))
        values.update(zip(self.writes, results, strict=True))

    @cached_property
    def _takes_training(self) -> bool:
        call = getattr(self.operation, "call", None)
        return call is not None and "training" in inspect.signature(call).parameters

    @property
    def inputs(self) -> tuple[int, ...]:
        """The slots that the step reads."""
        return tuple(slot for _, slot in self.reads)

    @property
    def kind(self) -> str:
        """The class name of the operation, such as `Conv2D`."""
        return type(self.operation).__name__

    @property
    def is_custom(self) -> bool:
        """Whether the operation is a custom layer, whose computation is unknown."""
        return is_custom_layer(self.operation)

    @cached_property
    def weights(self) -> list[Any]:
        """The weights of the layer, and variables among the arguments."""
        return [*(getattr(self.operation, "weights", None) or ()), *self._argument_variables]

    @cached_property
    def variables(self) -> list[Any]:
        """The weights and all other variables that the step reads, such as a random generator's state."""
        return [*getattr(self.operation, "variables", ()), *self._argument_variables]

    @property
    def _argument_variables(self) -> list[Any]:
        arguments = keras.tree.flatten((self.arguments.args, self.arguments.kwargs))
        return [argument for argument in arguments if isinstance(argument, keras.Variable)]


def is_custom_layer(operation: Any) -> bool:
    """Whether an operation is a layer that is not part of Keras, or a Lambda."""
    if isinstance(operation, keras.layers.Lambda):
        return True
    return isinstance(operation, keras.Layer) and not type(operation).__module__.startswith("keras.")


@dataclass(frozen=True)
class _SingleTensorCall:
    """The call of an operation that takes one tensor and nothing else: see `Step.arguments`."""

    args: tuple[()] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def fill_in(self, tensors: Mapping[int, Any]) -> tuple[list[Any], dict[str, Any]]:
        return list(tensors.values()), {}


@dataclass(frozen=True)
class ModelInput:
    """One input of a model."""

    slot: int
    dtype: str


@dataclass
class Graph:
    """The steps of a model, sorted topologically."""

    input_slot: int  # of the image
    steps: list[Step]
    outputs: dict[str, int]  # name -> slot
    shapes: dict[int, tuple[int, ...]]  # slot -> shape; 0: any size, such as the number of images
    models: dict[str, int] = field(default_factory=dict)  # path of a nested model -> slot of its output
    input_dtype: str = "float32"
    inputs: dict[str, ModelInput] = field(default_factory=dict)  # in the model's order, with the image

    @property
    def further_inputs(self) -> dict[str, ModelInput]:
        """The inputs beside the image, by name."""
        return {name: one for name, one in self.inputs.items() if one.slot != self.input_slot}

    @cached_property
    def _producers(self) -> dict[int, Step]:
        return {slot: step for step in self.steps for slot in step.writes}

    def producer(self, slot: int) -> Step | None:
        """The step that writes a slot; None for an input."""
        return self._producers.get(slot)

    def step_at(self, path: str) -> Step | None:
        """The step with this path, if any."""
        return next((step for step in self.steps if step.path == path), None)

    def with_operation(self, step: Step, operation: Callable[..., Any]) -> "Graph":
        """A copy of the graph in which one step calls another operation."""
        steps = [replace(other, operation=operation) if other is step else other for other in self.steps]
        return replace(self, steps=steps)

    def split(
        self, step: Step, first: Callable[..., Any], second: Callable[[Any], Any]
    ) -> tuple["Graph", int]:
        """A copy of the graph in which one step is two, and the slot between them."""
        between, output = max(self.shapes) + 1, step.writes[0]
        halves = [
            replace(step, operation=first, writes=(between,)),
            Step(step.path, second, _SingleTensorCall(), ((between, between),), (output,)),
        ]
        steps = [half for other in self.steps for half in (halves if other is step else [other])]
        return replace(self, steps=steps, shapes={**self.shapes, between: self.shapes[output]}), between

    def steps_to(self, slots: Iterable[int], known: Iterable[int] = ()) -> list[Step]:
        """The steps needed to compute `slots`, in order, where the values of `known` slots are there."""
        wanted, known = set(slots), {*known}
        steps = []
        for step in reversed(self.steps):
            if (set(step.writes) & wanted) - known:
                steps.append(step)
                wanted.update(step.inputs)
        return steps[::-1]

    def tail(self, slot: int, end: int) -> tuple[list[Step], set[int]]:
        """The steps from a slot to the `end`, and the other slots that they read (skip connections)."""
        computed = self.downstream(slot) - {slot}
        steps = [step for step in self.steps_to([end], [slot]) if computed.intersection(step.writes)]
        return steps, {read for step in steps for read in step.inputs} - computed - {slot}

    def downstream(self, slot: int) -> set[int]:
        """A slot and all slots that depend on it."""
        reached = {slot}
        for step in self.steps:
            if reached.intersection(step.inputs):
                reached.update(step.writes)
        return reached

    def depths(self) -> dict[int, int]:
        """Slot -> number of steps on the longest path from an input."""
        depth = {self.input_slot: 0} | {one.slot: 0 for one in self.inputs.values()}
        for step in self.steps:
            below = 1 + max((depth[slot] for slot in step.inputs), default=0)
            depth.update(dict.fromkeys(step.writes, below))
        return depth


def run(steps: Sequence[Step], values: Values, keep: Collection[int] | None = None) -> Values:
    """Run steps in order.

    Args:
        steps: The steps.
        values: Their inputs by slot; the outputs are added.
        keep: The slots that are wanted: every other value is freed after its last use, since several images
            take much memory; None: all.

    Returns:
        The values.
    """
    readers = Counter(slot for step in steps for slot in {*step.inputs})
    for step in steps:
        step(values)
        if keep is not None:
            readers.subtract({*step.inputs})
            for slot in {*step.inputs}.difference(keep):
                if not readers[slot]:
                    del values[slot]
    return values
