"""Which inputs of a model get which numbers, beside the image."""

import math
from dataclasses import dataclass
from typing import Any

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.graph.graph import Graph, Values

NUMERIC = ("float", "bfloat", "int", "uint", "bool")
ops = keras.ops


@dataclass(frozen=True)
class InputPart:
    """The numbers of one input of the model."""

    slot: int
    columns: tuple[tuple[int, int], ...]  # of `values`: from, to
    shape: tuple[int, ...]  # without the number of images
    dtype: str


@dataclass(frozen=True)
class FurtherInputs:
    """Distributes the values of images to the inputs of a model."""

    parts: tuple[InputPart, ...] = ()

    def by_slot(self, values: Any) -> Values:
        """Return each input of the model but the image.

        Args:
            values: (n, width) float32: see `gradcam_worker.gradcam.network.NetworkWithInputs`.
        """
        return {part.slot: self._input(part, values) for part in self.parts}

    @staticmethod
    def _input(part: InputPart, values: Any) -> Any:
        columns = [values[:, start:end] for start, end in part.columns]
        joined = columns[0] if len(columns) == 1 else ops.concatenate(columns, axis=1)
        shaped = ops.reshape(joined, (-1, *part.shape))
        return ops.cast(shaped if "float" in part.dtype else ops.round(shaped), part.dtype)


def assign(row: NetworkRow, graph: Graph) -> FurtherInputs:
    """Find out which columns of the values each input of a model gets.

    Args:
        row: Of the catalog or registry.
        graph: The network.

    Returns:
        What distributes them.

    Raises:
        NetworkIncompatible: An input has no values, or another number of them, or does not exist.
    """
    further = graph.further_inputs
    columns: dict[str, list[tuple[int, int]]] = {}
    start = 0
    for one in row.inputs:
        if one.model_input not in further:
            there = ", ".join(further) or "none"
            message = (
                f"{row.name} has no input {one.model_input!r} beside its image, which inputs.{one.name} is "
                f"for; there is {there}."
            )
            raise NetworkIncompatible(message)
        columns.setdefault(one.model_input, []).append((start, start + one.width))
        start += one.width
    if missing := [name for name in further if name not in columns]:
        message = (
            f"{row.name} takes {_shapes(graph, further)} beside the image: describe {' and '.join(missing)}, "
            f"as in [networks.{row.name}.inputs.{missing[0]}] with type, and default or constant where jobs "
            f'need not give it (in Python: inputs=[NetworkInput("{missing[0]}")]).'
        )
        raise NetworkIncompatible(message)
    return FurtherInputs(tuple(_part(row, graph, name, columns[name]) for name in columns))


def _part(row: NetworkRow, graph: Graph, name: str, columns: list[tuple[int, int]]) -> InputPart:
    one = graph.inputs[name]
    width, sizes = sum(end - start for start, end in columns), graph.shapes[one.slot][1:]
    known = math.prod(size for size in sizes if size)
    if sizes.count(0) == 1 and not width % known:
        sizes = tuple(size or width // known for size in sizes)
    if math.prod(sizes) != width:
        given = ", ".join(other.name for other in row.inputs if other.model_input == name)
        message = (
            f"The input {name} of {row.name} takes {_shape(graph, one.slot)}, {known} numbers for each "
            f"image; {given} {'gives' if len(columns) == 1 else 'give'} {width}. A category gives one for "
            "each value with encoding one_hot, and one with index; a number as many as its shape has."
        )
        raise NetworkIncompatible(message)
    if not one.dtype.startswith(NUMERIC):
        message = f"The input {name} of {row.name} takes {one.dtype}: only numbers can be given."
        raise NetworkIncompatible(message)
    return InputPart(one.slot, tuple(columns), sizes, one.dtype)


def _shapes(graph: Graph, names: Any) -> str:
    return ", ".join(f"{name} {_shape(graph, graph.inputs[name].slot)}" for name in names)


def _shape(graph: Graph, slot: int) -> str:
    return f"({', '.join(('None', *(str(size or None) for size in graph.shapes[slot][1:])))})"
