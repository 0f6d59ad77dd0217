"""A network as a flat list of steps, whatever was nested in it; `dissect` makes it of a Keras model.

Each step is one call of one operation and has a path: the layer's name, behind the names of the models it is
nested in, as in `xception/block14_sepconv2_act`. An operation that is called again, as in a siamese
network, is `backbone#2/conv` the second time. The steps can be run up to a tensor and on from there: that
is the cut which Grad-CAM needs, through any graph, with skip connections and all.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from worker.gradcam.backend import keras

Values = dict[int, Any]  # slot -> tensor


@dataclass(frozen=True)
class Step:
    """One call of one operation: reads slots, writes slots."""

    path: str
    operation: Any  # keras.Operation: most are layers
    arguments: Any  # Keras's record of how it was called, with symbolic tensors as placeholders
    reads: tuple[tuple[int, int], ...]  # (id of the placeholder, slot)
    writes: tuple[int, ...]
    shape: tuple[int, ...] = ()  # of its first output; 0: any, as the number of images is

    def __call__(self, values: Values, call: Callable[..., Any] | None = None) -> None:
        """Run it, as in inference, on what `values` hold; add what comes out."""
        args, kwargs = self.arguments.fill_in({mark: values[slot] for mark, slot in self.reads})
        if self._knows_training:
            kwargs.setdefault("training", False)
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


@dataclass
class Graph:
    """The steps of a model, in an order in which they can be run."""

    entry: int  # the slot of the image
    steps: list[Step]
    outputs: dict[str, int]  # by name: the slots of the scores, or of several outputs
    entry_dtype: str = "float32"
    _makers: dict[int, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index the steps by what they write."""
        self._makers = {slot: step for step in self.steps for slot in step.writes}

    def maker(self, slot: int) -> Step | None:
        """The step that writes a slot; None for the image."""
        return self._makers.get(slot)

    def named(self, path: str) -> Step | None:
        """The step of this path."""
        return next((step for step in self.steps if step.path == path), None)

    def without(self, step: Step, instead: Callable[..., Any]) -> "Graph":
        """The same graph with another operation at one step."""
        steps = [replace(one, operation=instead) if one is step else one for one in self.steps]
        return Graph(self.entry, steps, self.outputs, self.entry_dtype)

    def needed(self, slots: Iterable[int], given: Iterable[int] = ()) -> list[Step]:
        """The steps that lead to `slots`, in order; what leads to `given` slots is not needed."""
        wanted, known = set(slots), set(given)
        steps = []
        for step in reversed(self.steps):
            if (set(step.writes) & wanted) - known:
                steps.append(step)
                wanted.update(step.inputs)
        return steps[::-1]

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
