"""The numeric check of a converted model against the old one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.conversion.sources import Arrays, InputSpec, Source
from gradcam_worker.gradcam.files.model_file import Refused
from gradcam_worker.gradcam.models.sample_images import varied_images

# What is done to pixels, since it is not known what the model was trained on: nothing, to [0, 1], to [-1, 1].
SCALINGS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "0 to 255": lambda pixels: pixels,
    "0 to 1": lambda pixels: pixels / np.float32(255),
    "-1 to 1": lambda pixels: pixels / np.float32(127.5) - np.float32(1),
}
IMAGE_RANK = 3  # (rows, columns, channels)
OTHER_INPUTS = 7  # as many as there are images
ROUNDING = 1e-7  # of float32
SLACK = 0.02  # of the range of a quantised input, which was measured on a few images
UNIFORM = 1e-6  # of the largest output: what differs by less is rounding


@dataclass(frozen=True)
class Checked:
    """What the check has shown.

    Attributes:
        difference: The largest difference of an output, as a share of the range of all outputs.
        images: How many inputs were compared.
        left_out: Ranges of pixels in which rounding alone changes what the old model computes.
        same_class: The share of inputs with the same largest output.
        spread: How much an output differs between inputs, as a share of the range of all outputs.
    """

    difference: float
    images: int
    left_out: tuple[str, ...]
    same_class: float
    spread: float


def compare(source: Source, model: Any, tolerance: float) -> Checked:
    """Compare what two models compute for random and other images, in each range of pixels.

    Args:
        source: The old model.
        model: The new one, which gets all images of a range at once.
        tolerance: The largest difference that is accepted, as a share of the range of the outputs.

    Returns:
        What the check has shown; the difference is not above the tolerance.

    Raises:
        Refused: It is above, or the outputs show nothing.
    """
    differences, spreads, left_out, same, images = [], [], [], [], 0
    for name, batches in _inputs(source):
        old, new = _predict_singly(source, batches), _predict(model, batches)
        shapes = [array.shape for array in old], [array.shape for array in new]
        if shapes[0] != shapes[1]:
            message = f"has outputs of the shapes {shapes[0]}, the new model {shapes[1]}"
            raise Refused(message)
        if not all(np.isfinite(array).all() for array in old):
            left_out.append(name)
            continue
        difference = _difference(old, new)
        if difference > tolerance and not source.rounds and _is_rounding(source, batches, old, tolerance):
            left_out.append(name)
            continue
        differences.append(difference)
        spreads.append(max(float(np.ptp(array, axis=0).max() / _range(array)) for array in old))
        same += [_top(first) == _top(second) for first, second in zip(old, new, strict=True)]
        images += len(batches[0])
        if (
            difference > tolerance and not source.rounds
        ):  # the difference by rounding is reported for all images
            break
    if not differences:
        message = "computes no finite and stable outputs for any image that was tried"
        raise Refused(message)
    checked = Checked(max(differences), images, tuple(left_out), float(np.mean(same)), max(spreads))
    if checked.difference > tolerance:
        raise Refused(_describe(checked, source, tolerance))
    return checked


def _describe(checked: Checked, source: Source, tolerance: float) -> str:
    message = (
        f"computes something else than the new model: by {checked.difference:.2g} of the range of its "
        f"outputs, where {tolerance:g} is the limit"
    )
    if source.rounds:
        message += (
            f" (the largest output is the same for {checked.same_class:.0%} of {checked.images} images). "
            "The file is quantised, it rounds to 8 or 16 bits what the new model does not round: if that "
            "difference does not matter to you, set a higher limit with --tolerance"
        )
    return message


def _inputs(source: Source) -> Iterator[tuple[str, list[NDArray[Any]]]]:
    """Batches for all inputs of a model, in each range of pixels that they can hold."""
    rng = np.random.default_rng(0)
    integers = all(np.dtype(spec.dtype).kind in "iu" for spec in source.inputs)
    names = ["0 to 255"] if integers else [name for name in SCALINGS if _fits(name, source.limits)]
    for name in names or SCALINGS:
        yield name, [_batch(spec, SCALINGS[name], rng) for spec in source.inputs]


def _fits(name: str, limits: tuple[float, float] | None) -> bool:
    """Whether a quantised input can hold a range of pixels."""
    if limits is None:
        return True
    low, high = SCALINGS[name](np.array([0, 255], np.float32))
    slack = SLACK * (limits[1] - limits[0])
    return bool(limits[0] - slack <= low and high <= limits[1] + slack)


def _batch(
    spec: InputSpec, scaling: Callable[[NDArray[np.float32]], NDArray[np.float32]], rng: np.random.Generator
) -> NDArray[Any]:
    dtype = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
    if len(spec.shape) != IMAGE_RANK:
        return np.asarray(rng.normal(size=(OTHER_INPUTS, *spec.shape)).astype(dtype))
    rows, columns, channels = spec.shape
    pixels = varied_images((rows, columns, channels))
    if dtype == np.int8:
        return np.asarray(pixels.astype(np.int16) - 128, np.int8)
    return np.asarray(pixels if dtype.kind in "iu" else scaling(pixels.astype(np.float32)), dtype)


def _predict_singly(source: Source, batches: Arrays) -> list[NDArray[np.float64]]:
    """The outputs of the old model, which may take one image at a time."""
    images = [
        source.predict([batch[index : index + 1] for batch in batches]) for index in range(len(batches[0]))
    ]
    return [
        np.concatenate([np.asarray(one, np.float64) for one in output])
        for output in zip(*images, strict=True)
    ]


def _predict(model: Any, batches: Arrays) -> list[NDArray[np.float64]]:
    dtypes = [str(tensor.dtype) for tensor in keras.tree.flatten(model.inputs)]
    values = [batch.astype(dtype) for batch, dtype in zip(batches, dtypes, strict=True)]
    outputs = model(values if len(values) > 1 else values[0], training=False)
    return [
        np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(output, "float32")), np.float64)
        for output in keras.tree.flatten(outputs)
    ]


def _difference(old: list[NDArray[np.float64]], new: list[NDArray[np.float64]]) -> float:
    """The largest difference, as a share of the range of an output."""
    return max(
        float(np.abs(first - second).max() / _range(first)) if np.isfinite(second).all() else np.inf
        for first, second in zip(old, new, strict=True)
    )


def _range(outputs: NDArray[np.float64]) -> float:
    """The range of an output over all inputs; not less than its rounding."""
    return float(max(np.ptp(outputs), np.abs(outputs).max() * UNIFORM, 1e-30))


def _is_rounding(source: Source, batches: Arrays, old: list[NDArray[np.float64]], tolerance: float) -> bool:
    """Whether the old model, too, changes by as much if its inputs change in the last digit."""
    rng = np.random.default_rng(1)
    changed = [
        batch * (1 + ROUNDING * rng.choice([-1, 1], batch.shape)).astype(batch.dtype)
        if batch.dtype.kind == "f"
        else batch
        for batch in batches
    ]
    return _difference(old, _predict_singly(source, changed)) > tolerance / 2


def _top(outputs: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.asarray(outputs.reshape(len(outputs), -1).argmax(1), np.int64)
