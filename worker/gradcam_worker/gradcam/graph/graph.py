"""A network as a flat list of steps, whatever was nested in it; `dissect` makes it of a Keras model.

Each step is one call of one operation and has a path: the layer's name, behind the names of the models it is
nested in, as in `xception/block14_sepconv2_act`. An operation that is called again, as in a siamese
network, is `backbone#2/conv` the second time. The steps can be run up to a tensor and on from there: that
is the cut which Grad-CAM needs, through any graph, with skip connections and all.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gradcam_worker.gradcam.backend import keras

Values = dict[int, Any]  # slot -> tensor


@dataclass(frozen=True)
class Step:
    """One call of one operation: reads slots, writes slots."""

    path: str
    operation: Any  # keras.Operation: most are layers
    arguments: Any  # Keras's record of how it was called, with symbolic tensors as placeholders
    reads: tuple[tuple[int, int], ...]  # (id of the placeholder, slot)
    writes: tuple[int, ...]

    def __call__(self, values: Values, call: Callable[..., Any] | None = None) -> None:
        """Run it, as in inference, on what `values` hold; add what comes out."""
        args, kwargs = self.arguments.fill_in({mark: values[slot] for mark, slot in self.reads})
        if self._knows_training:
            kwargs["training"] = False  # whatever it was called with: so does a functional model
        results = keras.tree.flatten((call or self.operation)(*args, **kwargs))
        values.update(zip(self.writes, results, strict=True))

    @cached_property
    def _knows_training(self) -> bool:
        call = getattr(self.operation, "call", None)
        return call is not None and "training" in inspect.signature(call).parameters

    @property
    def inputs(self) -> tuple[int, ...]:
        """The slots it reads."""
        return tuple(slot for _, slot in self.reads)

    @property
    def kind(self) -> str:
        """The class of its operation, as in `Conv2D`."""
        return type(self.operation).__name__

    @property
    def is_foreign(self) -> bool:
        """Whether it is somebody's own layer, which does what cannot be seen."""
        return is_foreign(self.operation)

    @cached_property
    def weights(self) -> list[Any]:
        """What it has learned: its layer's weights, and those it was called with."""
        return [*(getattr(self.operation, "weights", None) or ()), *self._given]

    @cached_property
    def variables(self) -> list[Any]:
        """Its weights and whatever else it reads that may change, as the state of random numbers."""
        return [*getattr(self.operation, "variables", ()), *self._given]

    @property
    def _given(self) -> list[Any]:
        arguments = keras.tree.flatten((self.arguments.args, self.arguments.kwargs))
        return [one for one in arguments if isinstance(one, keras.Variable)]


def is_foreign(operation: Any) -> bool:
    """Whether an operation is a layer that is not Keras's own, or a function wrapped as one."""
    if isinstance(operation, keras.layers.Lambda):
        return True
    return isinstance(operation, keras.Layer) and not type(operation).__module__.startswith("keras.")


@dataclass(frozen=True)
class _Alone:
    """How an operation is called that takes one tensor and nothing else: see `Step.arguments`."""

    args: tuple[()] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def fill_in(self, given: Mapping[int, Any]) -> tuple[list[Any], dict[str, Any]]:
        return list(given.values()), {}


@dataclass
class Graph:
    """The steps of a model, in an order in which they can be run."""

    entry: int  # the slot of the image
    steps: list[Step]
    outputs: dict[str, int]  # by name: the slots of the scores, or of several outputs
    shapes: dict[int, tuple[int, ...]]  # of every slot, for one image; 0: any, as the number of images is
    models: dict[str, int] = field(default_factory=dict)  # path of a model that was opened -> what it makes
    entry_dtype: str = "float32"

    @cached_property
    def _makers(self) -> dict[int, Step]:
        return {slot: step for step in self.steps for slot in step.writes}

    def maker(self, slot: int) -> Step | None:
        """The step that writes a slot; None for the image."""
        return self._makers.get(slot)

    def named(self, path: str) -> Step | None:
        """The step of this path."""
        return next((step for step in self.steps if step.path == path), None)

    def without(self, step: Step, instead: Callable[..., Any]) -> "Graph":
        """The same graph with another operation at one step."""
        steps = [replace(one, operation=instead) if one is step else one for one in self.steps]
        return replace(self, steps=steps)

    def split(
        self, step: Step, first: Callable[..., Any], second: Callable[[Any], Any]
    ) -> tuple["Graph", int]:
        """The same graph with one step done by two operations, and the slot between them."""
        between, done = max(self.shapes) + 1, step.writes[0]
        halves = [
            replace(step, operation=first, writes=(between,)),
            Step(step.path, second, _Alone(), ((between, between),), (done,)),
        ]
        steps = [half for one in self.steps for half in (halves if one is step else [one])]
        return replace(self, steps=steps, shapes={**self.shapes, between: self.shapes[done]}), between

    def needed(self, slots: Iterable[int], given: Iterable[int] = ()) -> list[Step]:
        """The steps that lead to `slots`, in order; what leads to `given` slots is not needed."""
        wanted, known = set(slots), set(given)
        steps = []
        for step in reversed(self.steps):
            if (set(step.writes) & wanted) - known:
                steps.append(step)
                wanted.update(step.inputs)
        return steps[::-1]

    def tail(self, slot: int, end: int) -> tuple[list[Step], set[int]]:
        """The steps between a slot and the `end`, and the slots that they read beside it."""
        behind = self.behind(slot) - {slot}
        steps = [one for one in self.needed([end], [slot]) if behind.intersection(one.writes)]
        return steps, {one for step in steps for one in step.inputs} - behind - {slot}

    def behind(self, slot: int) -> set[int]:
        """The slots that depend on a slot, and the slot itself."""
        reached = {slot}
        for step in self.steps:
            if reached.intersection(step.inputs):
                reached.update(step.writes)
        return reached

    def depths(self) -> dict[int, int]:
        """Slot -> steps on the longest way there from the image."""
        depth = {self.entry: 0}
        for step in self.steps:
            below = 1 + max((depth[slot] for slot in step.inputs), default=0)
            depth.update(dict.fromkeys(step.writes, below))
        return depth


def run(steps: Iterable[Step], values: Values) -> Values:
    """Run steps one after the other; `values` hold what they need, and then also what they made."""
    for step in steps:
        step(values)
    return values
