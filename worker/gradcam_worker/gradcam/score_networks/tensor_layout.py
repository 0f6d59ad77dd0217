"""The layout of images in the input of an ONNX or TFLite model: order of dimensions, number, type."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.catalog import NetworkRow

Shape = tuple[int | None, ...]  # None: any length
DIMENSIONS = 4
ORDERS = {"nhwc": (0, 1, 2, 3), "nchw": (0, 3, 1, 2)}  # from (n, height, width, channels)


@dataclass(frozen=True)
class TensorLayout:
    """The order of the dimensions, and the number of images at once; None: any."""

    order: tuple[int, ...]
    batch: int | None

    def run(self, function: Callable[[NDArray[Any]], NDArray[Any]], images: NDArray[Any]) -> NDArray[Any]:
        """Call a function with images in this layout, as often as necessary.

        Args:
            function: From a tensor to outputs, one for each image.
            images: (n, height, width, channels).

        Returns:
            The outputs for all images.
        """
        size = self.batch or max(len(images), 1)
        results = []
        for first in range(0, len(images), size):
            group = images[first : first + size]
            missing = size - len(group)
            filled = np.concatenate([group, np.repeat(group[-1:], missing, axis=0)]) if missing else group
            outputs = function(np.ascontiguousarray(filled.transpose(self.order)))
            results.append(outputs[: len(group)] if len(outputs) == size else outputs)
        return np.concatenate(results)


def find_layout(row: NetworkRow, shape: Shape) -> TensorLayout:
    """Find the layout of an input: as the row says, or the only one that its shape allows.

    Args:
        row: What the registry says about the network.
        shape: Of the input.

    Returns:
        The layout.

    Raises:
        NetworkIncompatible: The shape is not that of the row's images, or allows both layouts.
    """
    image = (*row.input_size, row.preprocessing.input_channels)
    shown = f"({', '.join('any' if length is None else str(length) for length in shape)})"
    expected = {name: tuple((0, *image)[at] for at in order)[1:] for name, order in ORDERS.items()}
    fitting = [
        name
        for name, lengths in expected.items()
        if len(shape) == DIMENSIONS
        and all(given in {None, length} for given, length in zip(shape[1:], lengths, strict=True))
    ]
    if row.layout:
        fitting = [name for name in fitting if name == row.layout]
    if not fitting:
        stated = f"with layout {row.layout}" if row.layout else "in either layout"
        height, width, channels = image
        message = (
            f"The input of {row.name} is {shown}, which no image of {height} x {width} pixels and {channels} "
            f"channels fits {stated}: correct input_size, the channels of preprocessing, or layout."
        )
        raise NetworkIncompatible(message)
    if len(fitting) > 1:
        message = (
            f"The input of {row.name} is {shown}, which does not show where the channels are: write layout = "
            '"nchw" (as PyTorch has them) or layout = "nhwc" (as TensorFlow has them) into its table.'
        )
        raise NetworkIncompatible(message)
    return TensorLayout(ORDERS[fitting[0]], shape[0])


def to_type(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Convert preprocessed images to the type of an input; whole numbers are rounded, not cut off."""
    if "float" in dtype:
        return values.astype(dtype, copy=False)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(values), limits.min, limits.max).astype(dtype)


def choose_output(row: NetworkRow, names: Sequence[str]) -> str:
    """The output with the scores: the only one, or the one that the row names. Raises NetworkIncompatible."""
    if row.head.output is None and len(names) == 1:
        return names[0]
    if row.head.output in names:
        return str(row.head.output)
    wanted = "" if row.head.output is None else f", none of them {row.head.output!r}"
    message = (
        f"{row.name} has the outputs {', '.join(names)}{wanted}: name the one with the scores, as in head = "
        f'{{output = "{names[0]}"}}.'
    )
    raise NetworkIncompatible(message)
