"""One image, one network, one wish -> predictions, heatmaps, overlays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidJob, NetworkIncompatible, UnsupportedMediaType
from gradcam_worker.gradcam.classes import ClassIndex, caption
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.decoding.structure import Damage
from gradcam_worker.gradcam.imaging.overlay import encode, fit, overlay
from gradcam_worker.gradcam.methods import cam
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method, Network, NetworkFacts

RGB = 3  # channels
MAX_NAME_BYTES = 60  # of a class in a file name
SHOWN = 5  # predictions reported beside a list of classes


@dataclass(frozen=True)
class Prediction:
    """A class and how sure the network is of it, among all its classes."""

    rank: int  # 1 is the most probable class
    id: int
    wnid: str
    name: str
    probability: float


@dataclass(frozen=True)
class Explanation:
    """What a network saw in one image: k explained classes, in the order they were asked for."""

    network: NetworkFacts
    layer: str
    predictions: tuple[Prediction, ...]  # the most probable classes, first to last
    explained: tuple[Prediction, ...]  # (k,)
    heatmaps: NDArray[np.float32]  # (k, rows, columns) in [0, 1], or from 0 up with normalize "none"
    raw_min: NDArray[np.float32]  # (k,) before the ReLU and the division by the peak
    raw_max: NDArray[np.float32]  # (k,)
    metrics: tuple[Mapping[str, float], ...] = field(default=(), kw_only=True)  # (k,), where asked for

    def __repr__(self) -> str:
        """The classes and how large the heatmaps are: the numbers themselves would fill the screen."""
        shown = [caption(one.id, one.name, one.probability) for one in self.explained[:SHOWN]]
        shown += [f"{len(self.explained) - SHOWN} more"] if len(self.explained) > SHOWN else []
        what = f"network={self.network.name!r}, layer={self.layer!r}, explained={shown}"
        return f"{type(self).__name__}({what}, heatmaps={self.heatmaps.shape})"

    @property
    def shown(self) -> NDArray[np.float32]:
        """The heatmaps as they are coloured, (k, rows, columns) in [0, 1]."""
        return cam.heatmaps(self.heatmaps, "joint")  # which changes nothing where the peak is 1

    @property
    def zero_heatmaps(self) -> tuple[int, ...]:
        """The ids of explained classes for which nothing in the image speaks."""
        dark = self.heatmaps.max(axis=(1, 2)) == 0
        return tuple(seen.id for seen, empty in zip(self.explained, dark, strict=True) if empty)


@dataclass(frozen=True)
class Explained(Explanation):
    """An explanation together with its picture."""

    picture: NDArray[np.uint8]  # (height, width, 3) RGB
    damage: Damage | None = field(default=None, kw_only=True)  # what the image lacks

    __repr__ = Explanation.__repr__  # a dataclass would make its own

    def overlay(self, index: int, alpha: float = 0.4, colormap: str = "jet") -> NDArray[np.uint8]:
        """The heatmap of the explained class at `index`, laid over the picture (height, width, 3)."""
        return overlay(self.picture, self.shown[index], alpha=alpha, colormap=colormap)

    def save(self, folder: Path | str) -> list[Path]:
        """Write one overlay JPEG for each explained class; return where they are."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        paths = []
        for index, seen in enumerate(self.explained):
            paths.append(target / file_name("overlay", seen))
            paths[-1].write_bytes(encode(self.overlay(index)))
        return paths


def file_name(kind: str, seen: Prediction, extension: str = "jpg") -> str:
    """The file name of one class's picture: `overlay-1-967-espresso.jpg`. At most 255 bytes."""
    name = "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in seen.name)
    short = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    return f"{kind}-{seen.rank}-{seen.id}-{short}.{extension}"


def explain_image(
    network: Network,
    image: Path | str | bytes | NDArray[np.uint8],
    *,
    top_n: int | None = None,
    classes: Sequence[int | str] | None = None,
    method: Method | str = GRADCAM,
    limits: Limits | None = None,
) -> Explained:
    """Explain one image: what of it speaks for each class.

    An image of which a little is missing (see `limits`) is explained, and `damage` of the result says what.

    Args:
        network: what `load_network` or `wrap_model` made.
        image: a path, encoded bytes, or RGB pixels (height, width, 3) uint8; for a network of other than
            three channels its own pixels (height, width, channels) uint8.
        top_n: explain the n most probable classes.
        classes: explain these classes instead, each by id, wnid or name.
        method: the name of a formula of `cam.METHODS`, or a `Method`, which also names the layer, the score
            and the normalization.
        limits: how large an image may be, and how much of it may be missing.

    Returns:
        Predictions, heatmaps and the picture.

    Raises:
        InvalidJob: neither or both of top_n and classes, or a method that there is not.
        UnknownClass, AmbiguousClass: a class that the network does not know, or more than one of a name.
        UnknownLayer: the method names a layer that the network does not have.
        NetworkIncompatible: its scores are no numbers, or it takes other pictures.
        UnsupportedMediaType, ImageDecodeFailed, ImagePixelsExceeded: the image cannot be decoded.

    Example:
        ```python
        seen = explain_image(network, "coffee.jpg", top_n=3)
        [(one.name, one.probability) for one in seen.explained]
        seen.save("out/")
        ```
    """
    wanted = network.labels.wanted(top_n=top_n, classes=classes)
    how = Method(method) if isinstance(method, str) else method
    check(how)
    channels = network.facts.channels
    damage = None
    if isinstance(image, np.ndarray):
        picture = image
        if picture.dtype != np.uint8 or picture.shape[2:] != (channels,) or not picture.size:
            given = f"{picture.shape} {picture.dtype}"
            right = f"(height, width, {channels}) uint8" + (" RGB" if channels == RGB else "")
            message = f"An array must be {right}; this one is {given}."
            raise UnsupportedMediaType(message)
    else:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        decoded = decode(data, limits)
        picture, damage = decoded.pixels, decoded.damage
    check_channels(network.facts, picture)
    seen = explain_pixels(network, fit(picture, network.facts.input_size)[np.newaxis], [wanted], how)[0]
    return Explained(**vars(seen), picture=_visible(picture), damage=damage)


def check_channels(facts: NetworkFacts, pixels: NDArray[np.uint8]) -> None:
    """Raise NetworkIncompatible where a network does not take such pictures (height, width, channels)."""
    if pixels.shape[2] != facts.channels:
        message = (
            f"{facts.name} takes pictures of {facts.channels} channels; this one has {pixels.shape[2]}. "
            "Give it an array (height, width, channels) of its own."
        )
        raise NetworkIncompatible(message)


def _visible(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """What can be shown of a picture (height, width, channels): three channels, or its first in grey."""
    return picture[..., :RGB] if picture.shape[2] >= RGB else np.repeat(picture[..., :1], RGB, axis=2)


def check(method: Method) -> None:
    """Raise InvalidJob where a formula, a score or a normalization is asked for that there is not."""
    for given, known in (
        (method.name, cam.METHODS),
        (method.score, cam.SCORES),
        (method.normalize, cam.NORMALIZE),
    ):
        if given not in known:
            message = f"{given!r} is none of {', '.join(known)}."
            raise InvalidJob(message)


def explain_pixels(
    network: Network,
    pixels: NDArray[np.uint8],
    wishes: Sequence[tuple[int, ...]],
    method: Method = GRADCAM,
) -> list[Explanation]:
    """Explain n fitted images (n, height, width, 3) at once, each with its own wish.

    A wish is what `ClassIndex.wanted` returns. Shorter wishes are padded for the pass and cut again.
    Raises UnknownLayer.
    """
    computed = network.compute(pixels, padded(wishes), method)
    return [
        explanation_of(network, computed, index, wish, method.normalize) for index, wish in enumerate(wishes)
    ]


def padded(wishes: Sequence[tuple[int, ...]]) -> NDArray[np.int32]:
    """The wishes of n images as one array (n, k): shorter ones repeat their last class."""
    width = max(map(len, wishes))
    return np.array([wish + wish[-1:] * (width - len(wish)) for wish in wishes], np.int32)


def explanation_of(
    network: Network, computed: Computed, index: int, wish: tuple[int, ...], normalize: str
) -> Explanation:
    """Cut the answer for one image and its wish out of a pass over many. Raises NetworkIncompatible."""
    asked, named = len(wish), wish[0] >= 0
    scores, raw = computed.scores[index].astype(np.float64), computed.raw[index, :asked]
    if not (np.isfinite(scores).all() and np.isfinite(raw).all()):
        message = f"{network.facts.name} computes scores or gradients for this image that are no numbers."
        raise NetworkIncompatible(message)
    order = np.argsort(-scores, kind="stable")
    ranks = np.empty_like(order)
    ranks[order] = np.arange(1, len(order) + 1)
    probabilities = to_probabilities(scores, network.facts.head)
    _check_told(network.facts, scores, probabilities, computed, index)

    def prediction(class_id: int) -> Prediction:
        return _prediction(network.labels, class_id, int(ranks[class_id]), probabilities[class_id])

    return Explanation(
        network=network.facts,
        layer=computed.layer,
        predictions=tuple(prediction(int(one)) for one in order[: SHOWN if named else asked]),
        explained=tuple(prediction(int(one)) for one in computed.class_ids[index, :asked]),
        heatmaps=cam.heatmaps(raw, normalize),
        raw_min=raw.min(axis=(1, 2)),
        raw_max=raw.max(axis=(1, 2)),
    )


def _check_told(
    facts: NetworkFacts,
    scores: NDArray[np.float64],
    probabilities: NDArray[np.float64],
    computed: Computed,
    index: int,
) -> None:
    """Raise NetworkIncompatible where the probabilities are not what the network itself says of the image."""
    if facts.head == "probabilities" and np.abs(scores - probabilities).max() > facts.rounding:
        worst = scores[np.abs(scores - probabilities).argmax()]
        message = (
            f"{facts.name} says {worst:.4g} of this image, which is no probability: its head is none of "
            "probabilities."
        )
        raise NetworkIncompatible(message)
    if computed.outputs is None:
        return
    told = computed.outputs[index]
    apart = float(np.abs(probabilities[-len(told) :] - told).max())
    if not apart <= facts.rounding:
        message = (
            f"The probabilities that the scores of {facts.name} give for this image are not what it says "
            f"itself (by {apart:.2g})."
        )
        raise NetworkIncompatible(message)


def to_probabilities(scores: NDArray[np.float64], head: str) -> NDArray[np.float64]:
    """Scores (..., classes) -> probabilities: a softmax's sum to 1, a sigmoid's are each class's own.

    Where the head is `probabilities`, they are what the network says.
    """
    if head == "probabilities":
        return np.clip(scores, 0, 1)  # but for the last digit
    if head == "sigmoid":
        return np.asarray(np.exp(-np.logaddexp(0, -scores)))
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def _prediction(labels: ClassIndex, class_id: int, rank: int, probability: float) -> Prediction:
    label = labels[class_id]
    # Six significant digits are what float32 scores carry; more would be noise in the documents.
    return Prediction(rank, class_id, label.wnid, label.name, float(f"{probability:.6g}"))
