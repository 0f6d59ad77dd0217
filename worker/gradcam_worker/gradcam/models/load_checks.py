"""What is found out about a network when it is loaded, by running it on a few pictures."""

import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.graph.alignment import Alignment
from gradcam_worker.gradcam.graph.graph import Graph, Values
from gradcam_worker.gradcam.graph.head import Scores
from gradcam_worker.gradcam.graph.target_layer import LayerIndex, TargetLayer, crops
from gradcam_worker.gradcam.imaging.overlay import fit
from gradcam_worker.text.visible import abridged

SAME = {
    "float32": 1e-3,
    "float16": 0.05,
    "bfloat16": 0.2,
}  # how far a network taken apart may be off, of its peak
MIXED = 10  # times that: batch-dependent layers change results by more than rounding
GREY, CONTRAST = 128, 20  # of the pictures that a network is first run on: mean and standard deviation
PHOTOS = ("astronaut", "chelsea", "coffee")
ops = keras.ops


@dataclass(frozen=True)
class Pictures:
    """How to run the steps of a network on pixels (n, height, width, channels)."""

    prepared: Callable[[NDArray[np.uint8]], Any]
    size: tuple[int, int, int]
    batch_of_one: bool = (
        False  # whether the network takes one at a time, as with its number built into a reshape
    )

    def run(self, graph: Graph, slot: int, pixels: NDArray[np.uint8]) -> Any:
        """What comes out at a slot. Not compiled, as a model is not that is called: they round alike."""
        groups = (
            [pixels[index : index + 1] for index in range(len(pixels))] if self.batch_of_one else [pixels]
        )
        return ops.concatenate([_run(graph, [slot], self.prepared(group))[slot] for group in groups])

    def values(self, graph: Graph, slots: Collection[int]) -> Values:
        """What is at these slots, of one picture."""
        return _run(graph, slots, self.prepared(_grey(self.size)[:1]))


def _run(graph: Graph, slots: Collection[int], inputs: Any) -> Values:
    """As `graph.run`, but what is not asked for and not needed any more is let go: the images are several."""
    values, steps = {graph.entry: inputs}, graph.needed(slots)
    left = Counter(one for step in steps for one in {*step.inputs})
    for step in steps:
        step(values)
        left.subtract({*step.inputs})
        for one in {*step.inputs}.difference(slots):
            if not left[one]:
                del values[one]
    return values


@dataclass
class Observed:
    """What was seen."""

    pictures: Pictures
    outputs: NDArray[np.float64]  # (images, units), as they are before the last activation
    dtype: str  # of what the network says
    alignment: Alignment


def observe(row: NetworkRow, model: Any, scores: Scores, pictures: Pictures) -> Observed:
    """Run a network on a few pictures; on more where its head is to be told.

    Raises NetworkIncompatible unless the steps, one after the other, compute what the model does.
    """
    graph, pixels, name = scores.graph, _grey(pictures.size), row.name
    output = list(graph.outputs).index(row.head.output) if row.head.output else 0
    try:
        theirs = _flat(keras.tree.flatten(model(pictures.prepared(pixels[:1]), training=False))[output])
    except Exception as error:  # whatever a layer that was not written for it may raise
        raise cannot_run(name, error) from error
    chosen, found = _as_the_model(name, scores, pictures, pixels, theirs)
    more = [] if scores.kind else [_flat(chosen.run(graph, scores.slot, _varied(pictures.size)))]
    return Observed(
        pictures=chosen,
        outputs=np.concatenate([_flat(found), *more]).astype(np.float64),
        dtype=_digits(scores.told(found)),
        alignment=Alignment(graph, lambda slots: chosen.values(graph, slots)),
    )


def _as_the_model(
    name: str, scores: Scores, pictures: Pictures, pixels: NDArray[np.uint8], theirs: Any
) -> tuple[Pictures, Any]:
    """How the steps have to be run, all images at once or each alone, and what comes out.

    Raises NetworkIncompatible where neither gives what the model gives of the first image.
    """
    limit = SAME[_fewest_digits(scores.graph)]
    failed: Exception | None = None
    together: tuple[float, Any] = (math.inf, None)
    for how in (pictures, replace(pictures, batch_of_one=True)):
        try:
            found = how.run(scores.graph, scores.slot, pixels)
            told = scores.told(found)
        except Exception as error:  # noqa: BLE001  # as above; or the number of images is built in
            failed = error
            continue
        difference = _difference(_flat(told[:1]), theirs) if len(found) == len(pixels) else math.inf
        if difference <= limit:
            # Of another batch the last digits are other ones, which a deep network magnifies.
            batched = how.batch_of_one and together[0] <= MIXED * limit
            return (pictures, together[1]) if batched else (how, found)
        failed, together = None, together if how.batch_of_one else (difference, found)
    if failed:
        raise cannot_run(name, failed) from failed
    message = (
        f"{name}, run one layer after the other, computes something else than as a whole (by "
        f"{difference:.2g} of its largest output): it has a layer that is random, or that looks at what is "
        "around it."
    )
    raise NetworkIncompatible(message)


def cannot_run(name: str, error: Exception) -> NetworkIncompatible:
    """The error of a network of which a step fails."""
    reason = abridged(str(error))
    return NetworkIncompatible(f"{name} cannot be run, one layer after the other: {reason}")


def _digits(told: Any) -> str:
    dtype = str(keras.backend.standardize_dtype(told.dtype))
    return dtype if dtype in SAME else "float32"


def _fewest_digits(graph: Graph) -> str:
    """What the steps compute in that round most."""
    used = {getattr(step.operation, "compute_dtype", None) for step in graph.steps}
    return next((dtype for dtype in ("bfloat16", "float16") if dtype in used), "float32")


def _difference(found: Any, theirs: Any) -> float:
    if found.shape != theirs.shape:
        return math.inf
    return float(np.abs(found - theirs).max() / max(float(np.abs(theirs).max()), 1e-6))


def _flat(values: Any) -> NDArray[np.float32]:
    values = ops.cast(values, "float32")
    return np.asarray(ops.convert_to_numpy(ops.reshape(values, (values.shape[0], -1))))


def _grey(size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Two pictures of faint noise."""
    noise = np.random.default_rng(0).normal(GREY, CONTRAST, (2, *size))
    return np.clip(noise, 0, 255).astype(np.uint8)


def _varied(size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Noise, black, white, a slope from black to white, and photos."""
    slope = np.broadcast_to(np.linspace(0, 255, size[1])[:, None], size)
    noise = np.random.default_rng(0).integers(0, 256, size)
    found = [noise, np.zeros(size), np.full(size, 255), slope]
    for photo in PHOTOS:
        pixels = fit(decode((DATA / "photos" / f"{photo}.jpg").read_bytes()).pixels, size[:2])
        found.append(pixels[..., np.arange(size[2]) % pixels.shape[2]])
    return np.stack(found).astype(np.uint8)


def check_input(row: NetworkRow, graph: Graph) -> None:
    """Raise NetworkIncompatible where the network would not see all of what preprocessing makes."""
    how, dtype = row.preprocessing, graph.entry_dtype
    if "float" not in dtype and ({*how.mean} != {0} or {*how.std} != {1}):
        message = (
            f"{row.name} takes whole numbers ({dtype}), the pixels as they are: its preprocessing must be "
            f"none, not {how.name}."
        )
        raise NetworkIncompatible(message)
    if path := crops(graph):
        message = (
            f"{row.name} crops its input, or pads it ({path}): its maps would not lie where they belong. Set "
            "input_size to what is left, or to its proportions; crop the pictures before."
        )
        raise NetworkIncompatible(message)


def check_place(name: str, places: LayerIndex, place: TargetLayer, observed: Observed) -> None:
    """Raise NetworkIncompatible unless the grid of a place lies on the image as it is drawn."""
    for one in places.looked_at(place):
        if told := observed.alignment.misplaced(one):
            message = (
                f"{name} crops, pads, shifts or turns its input: as seen by the layer {one.path}, {told}. "
                "Its maps would not lie where they belong. Do that to the pictures before, and let the "
                "network begin behind it; set input_size to what is left."
            )
            raise NetworkIncompatible(message)
