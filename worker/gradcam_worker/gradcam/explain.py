"""The explanation of an image: predictions, heatmaps and overlays of classes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import (
    InvalidJob,
    InvalidNetworkInput,
    MethodNotSupported,
    NetworkIncompatible,
    UnsupportedMediaType,
)
from gradcam_worker.gradcam import network_inputs
from gradcam_worker.gradcam.classes import ClassIndex, Label, caption, versus
from gradcam_worker.gradcam.decoding.color import ColorSource
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.decoding.structure import Damage
from gradcam_worker.gradcam.imaging.network_input import to_input
from gradcam_worker.gradcam.imaging.overlay import encode, overlay
from gradcam_worker.gradcam.methods import cam, integrated, masking
from gradcam_worker.gradcam.network import (
    Classifier,
    Computed,
    InputPixels,
    Method,
    Network,
    NetworkFacts,
    compute,
    repeat_values,
    scores,
)
from gradcam_worker.gradcam.probabilities import to_probabilities
from gradcam_worker.gradcam.sizing import Placement

RGB_CHANNELS = 3
MAX_NAME_BYTES = 60  # of the name of a class in a file name
MAX_LISTED_PREDICTIONS = 5  # reported in addition to a list of classes


@dataclass(frozen=True)
class Prediction:
    """A class and its probability.

    Attributes:
        rank: Among all classes of the network; 1 is the most probable.
        id: Index of the class in the scores.
        wnid: Its WordNet id; may be empty.
        name: Its name.
        probability: From 0 to 1.
    """

    rank: int
    id: int
    wnid: str
    name: str
    probability: float


@dataclass(frozen=True)
class Explanation:
    """The explanation of k classes in an image, in the order in which they were requested.

    Attributes:
        network: The network.
        layer: The target layer.
        predictions: The most probable classes, the first one first.
        explained: The k explained classes.
        heatmaps: (k, rows, columns), float32, in [0, 1]; from 0 up with normalize `none`.
        raw_min: (k,), the least value of each heatmap before the ReLU and the division by the peak.
        raw_max: (k,), as `raw_min`, the greatest value.
        metrics: Faithfulness of each of the k heatmaps, if requested.
        method: Of a method with parameters of its own: it, with each of them.
        against: The classes that each is explained against: why it is that class and not one of these.
        placement: The part of the image that the heatmaps lie on; None: exactly all of it.
        ranks: (classes,), the rank of each class of the network by score, from 1; None: not kept.
        features: (k, channels), float16: what the network looks at as a vector, see `cam.heat_features`; nan
            where a heatmap is zero; None: not asked for.
        completeness_error: (k,), of Integrated Gradients: how far the sum of the attributions is from the
            difference between the scores of image and baseline, as a share of it; None: of other methods.
    """

    network: NetworkFacts
    layer: str
    predictions: tuple[Prediction, ...]
    explained: tuple[Prediction, ...]
    heatmaps: NDArray[np.float32]
    raw_min: NDArray[np.float32]
    raw_max: NDArray[np.float32]
    metrics: tuple[Mapping[str, float], ...] = field(default=(), kw_only=True)
    method: Method | None = field(default=None, kw_only=True)
    against: tuple[Label, ...] = field(default=(), kw_only=True)
    placement: Placement | None = field(default=None, kw_only=True)
    ranks: NDArray[np.int32] | None = field(default=None, kw_only=True)
    features: NDArray[np.float16] | None = field(default=None, kw_only=True)
    completeness_error: NDArray[np.float32] | None = field(default=None, kw_only=True)

    def __repr__(self) -> str:
        """Show the classes and the shape of the heatmaps, whose values would fill the screen."""
        shown = [
            caption(prediction.id, prediction.name, prediction.probability)
            for prediction in self.explained[:MAX_LISTED_PREDICTIONS]
        ]
        if len(self.explained) > MAX_LISTED_PREDICTIONS:
            shown.append(f"{len(self.explained) - MAX_LISTED_PREDICTIONS} more")
        facts = f"network={self.network.name!r}, layer={self.layer!r}, explained={shown}"
        facts += f", {versus(self.against)}" if self.against else ""
        return f"{type(self).__name__}({facts}, heatmaps={self.heatmaps.shape})"

    def title(self, index: int) -> str:
        """The title of an explained class, as in `718 pier 77.1 %` or `718 pier 77.1 %, not 536 dock`."""
        prediction = self.explained[index]
        text = caption(prediction.id, prediction.name, prediction.probability)
        return ", ".join(filter(None, (text, versus(self.against))))

    @property
    def scaled(self) -> NDArray[np.float32]:
        """The heatmaps, (k, rows, columns), in [0, 1] also if the method does not normalize."""
        return cam.heatmaps(self.heatmaps, "joint")  # changes nothing if the greatest peak is 1

    @property
    def shown(self) -> NDArray[np.float32]:
        """The heatmaps as they are drawn, (k, rows, columns), in [0, 1].

        Those of Integrated Gradients are smoothed, and brighter: see `integrated.to_draw`.
        """
        return integrated.to_draw(self.scaled) if self._is_integrated else self.scaled

    @property
    def _is_integrated(self) -> bool:
        return self.method is not None and self.method.name == integrated.NAME

    @property
    def incomplete(self) -> tuple[int, ...]:
        """The ids of explained classes whose attributions have a wrong sum: see `completeness_error`."""
        if self.completeness_error is None:
            return ()
        pairs = zip(self.explained, self.completeness_error, strict=True)
        return tuple(
            prediction.id for prediction, error in pairs if error > integrated.MAX_COMPLETENESS_ERROR
        )

    @property
    def zero_heatmaps(self) -> tuple[int, ...]:
        """The ids of explained classes whose heatmap is zero on the image: no region counts for them."""
        grid = self.heatmaps.shape[1], self.heatmaps.shape[2]
        rows, columns = self.placement.visible(grid) if self.placement else (slice(None), slice(None))
        is_zero = self.heatmaps[:, rows, columns].max(axis=(1, 2)) == 0
        return tuple(prediction.id for prediction, zero in zip(self.explained, is_zero, strict=True) if zero)


@dataclass(frozen=True)
class Explained(Explanation):
    """An explanation with its image.

    Attributes:
        picture: The image (height, width, 3), uint8, RGB.
        damage: What is missing of the image.
        converted_from: The colours from which it was converted to sRGB; None: it was taken as it is.
    """

    picture: NDArray[np.uint8]
    damage: Damage | None = field(default=None, kw_only=True)
    converted_from: ColorSource | None = field(default=None, kw_only=True)

    __repr__ = Explanation.__repr__  # a dataclass would make its own

    def overlay(self, index: int, alpha: float = 0.4, colormap: str = "jet") -> NDArray[np.uint8]:
        """Draw a heatmap over the image.

        Args:
            index: Of the explained class in `explained`.
            alpha: The share of the colours, from 0 to 1.
            colormap: `jet`, `turbo`, `viridis`, `inferno`, `magma`, `plasma`, `cividis` or `grey`.

        Returns:
            (height, width, 3), uint8, RGB.
        """
        return overlay(
            self.picture, self.shown[index], alpha=alpha, colormap=colormap, placement=self.placement
        )

    def save(self, folder: Path | str) -> list[Path]:
        """Write one overlay as JPEG for each explained class.

        Args:
            folder: Where; it is made if necessary.

        Returns:
            The paths of the files.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        paths = []
        for index, prediction in enumerate(self.explained):
            paths.append(target / file_name("overlay", prediction))
            paths[-1].write_bytes(encode(self.overlay(index)))
        return paths


def file_name(kind: str, prediction: Prediction, extension: str = "jpg") -> str:
    """Name the file of an image for a class, as in `overlay-1-967-espresso.jpg`.

    Args:
        kind: The kind of artifact.
        prediction: The class.
        extension: Without a dot.

    Returns:
        A name that is valid in any file system, of at most 255 bytes.
    """
    name = "".join(letter if letter.isalnum() or letter in "_-" else "_" for letter in prediction.name)
    short = name.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    return f"{kind}-{prediction.rank}-{prediction.id}-{short}.{extension}"


def explain_image(
    network: Network,
    image: Path | str | bytes | NDArray[np.uint8],
    *,
    top_n: int | None = None,
    classes: Sequence[int | str] | None = None,
    against: Sequence[int | str] | None = None,
    method: Method | str | None = None,
    limits: Limits | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Explained:
    """Explain an image: which regions of it count for each class.

    A slightly damaged image (see `limits`) is explained, and `damage` of the result describes the damage.

    Args:
        network: From `load_network`, `wrap_model` or `wrap_callable`.
        image: A path, encoded bytes, or RGB pixels (height, width, 3), uint8; for a network with another
            number of channels its pixels (height, width, channels), uint8.
        top_n: Explain the n most probable classes.
        classes: Explain these classes instead: ids, wnids or names.
        against: Explain each against these classes: why it is that class and not one of these. With `top_n`
            the most probable of the other classes are explained.
        method: The name of a formula of `cam.METHODS` or `masking.METHODS`, or a `Method` with layer, score
            and normalization. None: `gradcam`, or `rise` where a network only gives scores.
        limits: The largest size and damage of an image, and whether its colours are converted to sRGB;
            None: the defaults.
        inputs: The values of the network's further inputs, by name.

    Returns:
        Predictions, heatmaps and the image.

    Raises:
        InvalidJob: Neither or both of top_n and classes are given, a class is explained against itself, or
            the method does not exist or takes no classes against.
        MethodNotSupported: The network only gives scores, and the method needs more.
        UnknownClass, AmbiguousClass: The network has no such class, or several of that name.
        UnknownLayer: The network has no layer of the name that the method gives.
        InvalidNetworkInput: A further input is missing, unknown, or not allowed.
        NetworkIncompatible: The network returns no valid scores, or needs other channels.
        UnsupportedMediaType, ImageDecodeFailed, ImagePixelsExceeded: It is no image, or cannot be decoded.

    Examples:
        ```python
        explanation = explain_image(network, "coffee.jpg", top_n=3)
        [(prediction.name, prediction.probability) for prediction in explanation.explained]
        explanation.save("out/")
        ```
    """
    selected = network.labels.select(top_n=top_n, classes=classes)
    method = choose_method(Method(method) if isinstance(method, str) else method, network.facts)
    if against is not None:
        method = replace(method, against=network.labels.select_against(against, selected))
        check_method(method)
    values = values_of(network.facts, inputs or {})
    channels = network.facts.channels
    damage = converted_from = None
    given: Any = image  # whatever a notebook has
    if isinstance(given, np.ndarray):
        pixels = given
        if pixels.dtype != np.uint8 or pixels.shape[2:] != (channels,) or not pixels.size:
            expected = f"(height, width, {channels}) uint8" + (" RGB" if channels == RGB_CHANNELS else "")
            message = f"An array must be {expected}; this one is {pixels.shape} {pixels.dtype}."
            raise UnsupportedMediaType(message)
    elif not isinstance(given, str | os.PathLike | bytes):
        message = (
            "An image is a path, the bytes of a file, or an array of pixels, uint8, RGB; this is a "
            f"{type(given).__name__}. One of Pillow becomes an array by np.asarray(image.convert('RGB'))."
        )
        raise UnsupportedMediaType(message)
    else:
        data = given if isinstance(given, bytes) else Path(given).read_bytes()
        decoded = decode(data, replace(limits or Limits(), fast_jpeg=network.facts.sizing.fast_jpeg))
        pixels, damage, converted_from = decoded.pixels, decoded.damage, decoded.converted_from
    check_channels(network.facts, pixels)
    facts = network.facts
    fitted = to_input(pixels, facts.input_size, facts.sizing)[np.newaxis]
    placement = facts.sizing.placement((pixels.shape[0], pixels.shape[1]), facts.input_size)
    batch = repeat_values(values, 1)
    explanation = replace(explain_pixels(network, fitted, [selected], method, batch)[0], placement=placement)
    return Explained(
        **vars(explanation), picture=_to_rgb(pixels), damage=damage, converted_from=converted_from
    )


def values_of(facts: NetworkFacts, given: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Check the values of a network's further inputs for one image, and return what the network gets.

    Args:
        facts: Of the network.
        given: Values by name.

    Returns:
        (width,), see `gradcam_worker.gradcam.network.NetworkWithInputs`; None for a network without any.

    Raises:
        InvalidNetworkInput: An input is missing, unknown, or not allowed.
    """
    if not facts.inputs and not given:
        return None
    table: Any = given
    if not isinstance(table, Mapping):
        message = f'inputs is a table, as in {{"age": 61}}, not {table!r}.'
        raise InvalidNetworkInput(message)
    resolved = network_inputs.resolve(facts.inputs, given, facts.name)
    return np.array(network_inputs.encode(facts.inputs, resolved), np.float32)


def check_channels(facts: NetworkFacts, pixels: NDArray[np.uint8]) -> None:
    """Check that a network takes images with this number of channels.

    Args:
        facts: Of the network.
        pixels: The image (height, width, channels).

    Raises:
        NetworkIncompatible: It needs another number of channels.
    """
    if pixels.shape[2] != facts.channels:
        message = (
            f"{facts.name} takes images with {facts.channels} channels; this one has {pixels.shape[2]}. "
            "Give it an array (height, width, channels) instead."
        )
        raise NetworkIncompatible(message)


def _to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first three channels of an image (height, width, channels), or its first one in grey."""
    if pixels.shape[2] >= RGB_CHANNELS:
        return pixels[..., :RGB_CHANNELS]
    return np.repeat(pixels[..., :1], RGB_CHANNELS, axis=2)


def default_method(facts: NetworkFacts) -> str:
    """The name of the method that explains a network where none is asked for."""
    return "rise" if facts.scores_only else "gradcam"


def choose_method(method: Method | None, facts: NetworkFacts) -> Method:
    """Check a method, and fill in what it leaves open.

    Args:
        method: The method; None: the default one of the network.
        facts: Of the network.

    Returns:
        The method, with each of its parameters.

    Raises:
        InvalidJob: Formula, score or normalization do not exist, or a parameter is wrong.
        MethodNotSupported: The network only gives scores, and the method needs more.
    """
    method = Method(default_method(facts)) if method is None else method
    check_method(method)
    if method.features and (masking.is_masking(method) or method.name == integrated.NAME):
        message = (
            f"features are activations of a network's target layer, and {method.name} uses none: take one of "
            f"{', '.join(cam.METHODS)}, or no features."
        )
        raise MethodNotSupported(message)
    if facts.scores_only and not masking.is_masking(method):
        message = (
            f"{facts.name} only gives scores, and {method.name} needs the gradients or the feature maps of a "
            f"network. For this one there are {' and '.join(masking.METHODS)}."
        )
        raise MethodNotSupported(message)
    return masking.with_defaults(integrated.with_defaults(method), facts.input_size)


def check_method(method: Method) -> None:
    """Check that formula, score and normalization of a method exist and fit. Raises InvalidJob."""
    for name, choices in (
        (method.name, (*cam.METHODS, integrated.NAME, *masking.METHODS)),
        (method.score, cam.SCORES),
        (method.normalize, cam.NORMALIZE),
    ):
        if name not in choices:
            message = f"{name!r} is none of {', '.join(choices)}."
            raise InvalidJob(message)
    if method.against and method.name in cam.CLASSLESS:
        message = f"{method.name} explains no class, and so none against others."
        raise InvalidJob(message)


def explain_pixels(
    network: Network,
    pixels: InputPixels,
    selections: Sequence[tuple[int, ...]],
    method: Method | None = None,
    values: NDArray[np.float32] | None = None,
) -> list[Explanation]:
    """Explain n images, in one pass if the method has gradients.

    Args:
        network: The network.
        pixels: (n, height, width, channels), uint8, of the network's input size.
        selections: The classes of each image, from `ClassIndex.select`.
        method: How to compute the heatmaps; None: as the network is explained by default.
        values: (n, width), of the network's further inputs; None: it has none.

    Returns:
        The n explanations.

    Raises:
        InvalidJob: A parameter of the method is wrong.
        MethodNotSupported: The network only gives scores, and the method needs more.
        UnknownLayer: The network has no layer of the name that the method gives.
        NetworkIncompatible: The network returns no valid scores.
    """
    method = choose_method(method, network.facts)
    if masking.is_masking(method):
        further = [None] * len(pixels) if values is None else values

        def score(images: InputPixels, of_image: NDArray[np.float32] | None) -> NDArray[np.float32]:
            return scores(network, images, repeat_values(of_image, len(images)))

        return [
            explain_by_scores(network, partial(score, of_image=of_image), image, selection, method)
            for image, selection, of_image in zip(pixels, selections, further, strict=True)
        ]
    wanted = pad_selections(selections)
    if method.name == integrated.NAME:
        computed = integrated.integrate(
            lambda images, ids, part: compute(network, images, ids, part, values),
            lambda images: scores(network, images, values),
            pixels,
            wanted,
            method,
            network.facts.head,
        )
    else:
        computed = compute(network, pixels, wanted, method, values)
    return [
        extract_explanation(network, computed, index, selection, method)
        for index, selection in enumerate(selections)
    ]


def explain_by_scores(
    network: Classifier,
    score: masking.Score,
    pixels: InputPixels,
    selection: tuple[int, ...],
    method: Method,
    report: masking.Report = lambda done, total: None,  # noqa: ARG005  # the names of its arguments
) -> Explanation:
    """Explain one image by a method that needs nothing but scores.

    Args:
        network: The network.
        score: `Network.scores`, wherever it computes. All calls have the same number of images.
        pixels: (height, width, channels), uint8, of the network's input size.
        selection: The classes, from `ClassIndex.select`.
        method: From `choose_method`.
        report: Called before the first pass and after each, with the number of passes that are done and of
            all; what it raises ends the computation.

    Returns:
        The explanation.

    Raises:
        NetworkIncompatible: The network returns no valid scores.
    """
    head, explained = network.facts.head, method.score

    def to_values(scores: NDArray[np.float64]) -> NDArray[np.float64]:
        values = to_probabilities(scores, head) if explained == "probability" else scores
        if method.against:
            values = values - values[:, [*method.against]].mean(axis=1, keepdims=True)
        return values

    computed = masking.compute(score, pixels, selection, method, to_values, report)
    explanation = extract_explanation(network, computed, 0, selection, method)
    return replace(explanation, method=method)


def selections_of(classes: Sequence[int] | Sequence[tuple[int, ...]], images: int) -> list[tuple[int, ...]]:
    """The classes of each image, where they are the same for all, or a tuple for each.

    Args:
        classes: From `ClassIndex.select`, or a list of these.
        images: Their number.
    """
    each: list[Any] = [*classes]
    return each if isinstance(each[0], tuple) else [tuple(each)] * images


def pad_selections(selections: Sequence[tuple[int, ...]]) -> NDArray[np.int32]:
    """Pad the selected classes of n images to one length.

    Args:
        selections: The classes of each image, from `ClassIndex.select`.

    Returns:
        (n, k), as `Network.compute` takes them: shorter selections repeat their last class.
    """
    width = max(map(len, selections))
    return np.array(
        [selection + selection[-1:] * (width - len(selection)) for selection in selections], np.int32
    )


def extract_explanation(
    network: Classifier, computed: Computed, index: int, selection: tuple[int, ...], method: Method
) -> Explanation:
    """Extract the explanation of one image from the results of a pass.

    A class that is selected twice, as by its rank and its id, is explained once.

    Args:
        network: The network.
        computed: The results.
        index: Of the image in the pass.
        selection: The classes of the image, from `ClassIndex.select`.
        method: How it was computed.

    Returns:
        The explanation.

    Raises:
        NetworkIncompatible: Scores or heatmaps are not finite, or contradict the outputs of the network.
    """
    ids = computed.class_ids[index, : len(selection)]
    kept = np.sort(np.unique(ids, return_index=True)[1])
    scores, raw = computed.scores[index].astype(np.float64), computed.raw[index, kept]
    if not (np.isfinite(scores).all() and np.isfinite(raw).all()):
        message = f"{network.facts.name} computes scores or gradients for this image that are no numbers."
        raise NetworkIncompatible(message)
    order = np.argsort(-scores, kind="stable")
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(1, len(order) + 1)
    probabilities = to_probabilities(scores, network.facts.head)
    _check_probabilities(network.facts, scores, probabilities, computed, index)

    def prediction(class_id: int) -> Prediction:
        return _prediction(network.labels, class_id, int(ranks[class_id]), probabilities[class_id])

    most_probable = order[: len({wanted for wanted in selection if wanted < 0}) or MAX_LISTED_PREDICTIONS]
    return Explanation(
        network=network.facts,
        layer=computed.layer,
        predictions=tuple(prediction(int(class_id)) for class_id in most_probable),
        explained=tuple(prediction(int(class_id)) for class_id in ids[kept]),
        heatmaps=cam.heatmaps(raw, method.normalize),
        raw_min=raw.min(axis=(1, 2)),
        raw_max=raw.max(axis=(1, 2)),
        against=tuple(network.labels[class_id] for class_id in method.against),
        method=method if method.name == integrated.NAME else None,
        ranks=ranks,
        features=None if computed.features is None else _to_float16(computed.features[index, kept]),
        completeness_error=(
            None if computed.completeness_error is None else computed.completeness_error[index, kept]
        ),
    )


def _to_float16(features: NDArray[np.float32]) -> NDArray[np.float16]:
    largest = np.finfo(np.float16).max
    return np.clip(features, -largest, largest).astype(np.float16)


def _check_probabilities(
    facts: NetworkFacts,
    scores: NDArray[np.float64],
    probabilities: NDArray[np.float64],
    computed: Computed,
    index: int,
) -> None:
    """Raise NetworkIncompatible if the probabilities are not the outputs of the network for the image."""
    if facts.head == "probabilities" and np.abs(scores - probabilities).max() > facts.rounding:
        worst = scores[np.abs(scores - probabilities).argmax()]
        message = (
            f"{facts.name} returns {worst:.4g} for this image, which is no probability: its head is none of "
            "probabilities."
        )
        raise NetworkIncompatible(message)
    if computed.outputs is None:
        return
    outputs = computed.outputs[index]
    difference = float(np.abs(probabilities[-len(outputs) :] - outputs).max())
    if not difference <= facts.rounding:
        message = (
            f"The probabilities that the scores of {facts.name} give for this image are not its outputs "
            f"(the difference is {difference:.2g})."
        )
        raise NetworkIncompatible(message)


def _prediction(labels: ClassIndex, class_id: int, rank: int, probability: float) -> Prediction:
    label = labels[class_id]
    # float32 scores carry six significant digits.
    return Prediction(rank, class_id, label.wnid, label.name, float(f"{probability:.6g}"))
