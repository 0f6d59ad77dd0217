"""`gradcam doctor --sample`: how often a network is right about photos, with each way to resize them.

A network predicts as in production only if photos are resized as its owner resizes them. Which way that is
shows in the owner's own probabilities, or else in how often the network is right.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from gradcam_worker.errors import GradcamError, InvalidInput, InvalidSettings, NetworkIncompatible
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.classes import percent
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.decoding.structure import JPEG
from gradcam_worker.gradcam.explain import check_channels, values_of
from gradcam_worker.gradcam.imaging.network_input import to_input
from gradcam_worker.gradcam.network import InputPixels, Network
from gradcam_worker.gradcam.network import scores as compute_scores
from gradcam_worker.gradcam.probabilities import to_probabilities
from gradcam_worker.gradcam.registry.registry import Registry
from gradcam_worker.gradcam.sizing import SIZINGS, Resize, Sizing
from gradcam_worker.inference.model_cache import choose_shard_batch_size
from gradcam_worker.operations import sample
from gradcam_worker.operations.sample import Photo, Sample
from gradcam_worker.operations.terminal import console
from gradcam_worker.runtime import service_factory
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.text.visible import counted

SAME = 2e-3  # medians and means that differ by less are equal
MET = 0.01  # the largest median of differences that rounding and other decoders make
UNLIKE = 0.02  # of one photo: a larger difference is reported with its reason, if that is known
COMPARE = (
    "compare the preprocessing, the order of the channels and the order of the labels with your program's"
)
SHOWN = 0.0001  # of a difference
CHANCE = 0.05  # of a difference in the number of right photos


@dataclass
class Outcome:
    """What a network does with the photos under one sizing."""

    sizing: Sizing
    names: tuple[str, ...]  # of presets
    is_configured: bool = False
    right: list[bool] = field(default_factory=list)  # for each photo
    differences: dict[Path, float] = field(
        default_factory=dict
    )  # the largest of each photo with probabilities

    @property
    def name(self) -> str:
        """The name of a preset, or what the sizing does."""
        return self.names[0] if self.names else self.sizing.describe()

    @property
    def count(self) -> int:
        """The number of photos about which the network is right."""
        return sum(self.right)

    @property
    def median(self) -> float:
        """The median of the differences to the owner's probabilities; 0: there are none.

        It decides, as single photos may be decoded differently: by TensorFlow, or without their ICC profile.
        """
        return statistics.median(self.differences.values()) if self.differences else 0.0

    @property
    def mean(self) -> float:
        """The mean of the differences; 0: there are none."""
        return statistics.fmean(self.differences.values()) if self.differences else 0.0

    @property
    def largest(self) -> float:
        """The largest difference; 0: there are none."""
        return max(self.differences.values(), default=0.0)


@dataclass(frozen=True)
class Advice:
    """A plain sentence, and the sizing that would be better than the configured one."""

    text: str
    better: Sizing | None = None


@dataclass(frozen=True)
class SampleReport:
    """The outcomes, the best one first, and photos that could not be read with the reasons."""

    network: str
    photos: int
    outcomes: tuple[Outcome, ...]
    unreadable: dict[Path, GradcamError]
    advice: Advice


def run(source: Path, name: str | None, settings: Settings, *, limit: int, as_json: bool) -> int:
    """Check a sample, and print the result.

    Args:
        source: A folder of folders that are named by class, or a CSV: see `gradcam_worker.operations.sample`.
        name: Of the network; None: the only one of the operator's own.
        settings: Where networks and weights are.
        limit: The most photos to look at.
        as_json: Print JSON.

    Returns:
        The exit code: 1 if another sizing is better than the configured one.

    Raises:
        InvalidInput: The sample cannot be read.
        InvalidSettings: It is not clear which network is meant.
        GradcamError: The network cannot be loaded.
    """
    row = _choose_network(Registry(settings.networks), name)
    service_factory.prepare(settings)
    with console.err.status(f"loading {row.name}"):
        network = service_factory.load(settings, S3(settings), row)
    everything = sample.read(source, network)
    photos = everything.choose(limit)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console.err, transient=True) as progress:
        task = progress.add_task("reading photos", total=len(photos.photos))
        result = check(
            network,
            photos,
            service_factory.image_limits(settings),
            max_batch=choose_shard_batch_size(
                network.facts, settings.max_batch, on_gpu=service_factory.on_gpu()
            ),
            report=lambda: progress.advance(task),
        )
    if as_json:
        console.print_json(_facts(result, everything))
    else:
        _print(result, everything)
    return 1 if result.advice.better else 0


def _choose_network(registry: Registry, name: str | None) -> NetworkRow:
    if name:
        return registry.find(name)
    own = registry.operator_networks()
    if len(own) != 1:
        named = ", ".join(row.name for row in own) or "none"
        message = f"Say with --network which one is meant: GRADCAM_NETWORKS names {named} of your own."
        raise InvalidSettings(message)
    return own[0]


def candidates(configured: Sizing) -> list[Outcome]:
    """The sizings to try, each once: the configured one, then presets and every other way to resize."""
    names: dict[Sizing, list[str]] = {configured: []}
    presets = [*SIZINGS.items(), *(("", Sizing(resize)) for resize in get_args(Resize))]
    for fast_jpeg in dict.fromkeys((configured.fast_jpeg, False)):
        for name, sizing in presets:
            known = replace(sizing, grey=configured.grey)
            tried = replace(known, recompress=configured.recompress, fast_jpeg=sizing.fast_jpeg or fast_jpeg)
            found = names.setdefault(tried, [])
            if name and tried == known and name not in found:
                found.append(name)
    return [
        Outcome(sizing, tuple(found), is_configured=sizing == configured) for sizing, found in names.items()
    ]


def check(
    network: Network,
    sample: Sample,
    limits: Limits,
    *,
    max_batch: int,
    report: Callable[[], None] = lambda: None,
) -> SampleReport:
    """Run a network on photos under each sizing. Each photo is decoded once; a JPEG twice.

    Args:
        network: The network.
        sample: The photos.
        limits: Of their size and damage.
        max_batch: Images in a pass.
        report: Called after each photo.

    Returns:
        What the network does with the photos.

    Raises:
        InvalidInput: No photo can be read.
        NetworkIncompatible: The network returns scores that are no numbers.
    """
    facts = network.facts
    outcomes, unreadable = candidates(facts.sizing), dict[Path, GradcamError]()
    converted: dict[Path, str] = {}
    batch, classes = _Batch(network, max_batch), Counter[int]()
    for photo in sample.photos:
        try:
            data = _bytes_of(photo.path)
            decoded = fast = decode(data, limits)
            if decoded.media_type == JPEG:
                fast = decode(data, replace(limits, fast_jpeg=True))
            if decoded.converted_from:
                source = decoded.converted_from
                converted[photo.path] = f"{source.name} ({source.kind})"
            check_channels(facts, decoded.pixels)
            images = [
                to_input((fast if sizing.fast_jpeg else decoded).pixels, facts.input_size, sizing)
                for sizing in (outcome.sizing for outcome in outcomes)
            ]
            values = values_of(facts, photo.inputs)
        except GradcamError as error:
            unreadable[photo.path] = error
        else:
            batch.add(photo, images, values, outcomes)
            classes[photo.class_id] += 1
        report()
    batch.run()
    if not classes:
        path, reason = next(iter(unreadable.items()))
        message = f"None of {counted(len(sample.photos), 'photo')} can be read; {path}: {reason}"
        raise InvalidInput(message)
    outcomes.sort(key=lambda outcome: (outcome.median, outcome.mean, -outcome.count))
    most_frequent = max(classes.values()) if len(classes) > 1 else 0
    advice = advise(outcomes, most_frequent=most_frequent, converted=converted)
    return SampleReport(facts.name, classes.total(), tuple(outcomes), unreadable, advice)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{path}: {error.strerror}."
        raise InvalidInput(message) from error


class _Batch:
    """Collects images until there are enough for a pass. Equal images of a photo are computed once."""

    def __init__(self, network: Network, size: int) -> None:
        self._network, self._size = network, size
        self._pixels: list[InputPixels] = []
        self._values: list[NDArray[np.float32] | None] = []
        self._readers: list[tuple[Photo, list[Outcome]]] = []

    def add(
        self,
        photo: Photo,
        images: Sequence[InputPixels],
        values: NDArray[np.float32] | None,
        outcomes: Sequence[Outcome],
    ) -> None:
        """Add what a network gets of a photo: an image for each outcome, and the values of further inputs."""
        by_content: dict[bytes, list[Outcome]] = {}
        for levels, outcome in zip(images, outcomes, strict=True):
            pixels = levels.astype(np.float32)  # some have fractions
            content = pixels.tobytes()
            if content not in by_content:
                by_content[content] = []
                self._pixels.append(pixels)
                self._values.append(values)
                self._readers.append((photo, by_content[content]))
            by_content[content].append(outcome)
        while len(self._pixels) >= self._size:
            self._run(self._size)

    def run(self) -> None:
        """Run the network on what is left."""
        if self._pixels:
            self._run(len(self._pixels))

    def _run(self, count: int) -> None:
        given = [values for values in self._values[:count] if values is not None]
        values = np.stack(given) if given else None
        scores = compute_scores(self._network, np.stack(self._pixels[:count]), values).astype(np.float64)
        if not np.isfinite(scores).all():
            message = f"{self._network.facts.name} computes scores for these photos that are no numbers."
            raise NetworkIncompatible(message)
        probabilities = to_probabilities(scores, self._network.facts.head)
        for (photo, outcomes), own_scores, row in zip(self._readers, scores, probabilities, strict=False):
            for outcome in outcomes:
                outcome.right.append(int(own_scores.argmax()) == photo.class_id)
                if photo.probabilities:
                    outcome.differences[photo.path] = max(
                        abs(float(row[of]) - value) for of, value in photo.probabilities.items()
                    )
        del self._pixels[:count], self._values[:count], self._readers[:count]


def advise(
    outcomes: Sequence[Outcome], *, most_frequent: int = 0, converted: Mapping[Path, str] | None = None
) -> Advice:
    """Say which sizing to use: by the owner's probabilities, else by the number of right photos.

    Of equals the configured one is preferred.

    Args:
        outcomes: Of all sizings; one of them is the configured one.
        most_frequent: The number of photos of the most frequent class, if there are several classes.
        converted: Photos of which the colours were converted, and from what.

    Returns:
        The sentence.
    """
    configured = next(outcome for outcome in outcomes if outcome.is_configured)
    if configured.differences:
        return _by_probabilities(outcomes, configured, converted or {})
    advice = _by_count(outcomes, configured)
    if max(outcome.count for outcome in outcomes) > most_frequent:
        return advice
    text = f" That is no better than guessing: {COMPARE}."
    return replace(advice, text=advice.text + text)


def _by_probabilities(
    outcomes: Sequence[Outcome], configured: Outcome, converted: Mapping[Path, str]
) -> Advice:
    least = min(outcome.median for outcome in outcomes)
    nearest = [outcome for outcome in outcomes if outcome.median <= least + SAME]
    best = min(nearest, key=lambda outcome: outcome.mean)
    if configured in nearest and configured.mean <= best.mean + SAME:
        best = configured
    is_met = best.median <= MET
    text = f"Your model {'gives' if is_met else 'is nearest to'} your own probabilities with {best.name}"
    if best is configured:
        text += f", as it is configured ({_differences(best)})."
    else:
        equal = [
            one.name for one in nearest if one.names and one.mean <= best.mean + SAME and one is not best
        ]
        text += "".join(f" or {name}" for name in equal)
        text += (
            f" ({_differences(best)}), not with {configured.name}, as it is configured "
            f"({_differences(configured)}): set {setting(best.sizing)}."
        )
    if not is_met:
        text += f" A median of {_number(best.median)} is more than a resize explains: {COMPARE}."
    worst = max(best.differences, key=best.differences.__getitem__)
    if worst in converted and best.largest > UNLIKE:
        text += (
            f" The largest difference is that of {worst}, whose colours were converted from "
            f"{converted[worst]}: where your program ignores that, set GRADCAM_CONVERT_COLORS=false."
        )
    return Advice(text, None if best is configured else best.sizing)


def _differences(outcome: Outcome) -> str:
    return f"median difference {_number(outcome.median)}, largest {_number(outcome.largest)}"


def _number(difference: float) -> str:
    return f"{difference:.2g}" if difference >= SHOWN else f"less than {SHOWN}"


def _by_count(outcomes: Sequence[Outcome], configured: Outcome) -> Advice:
    best = max(outcomes, key=lambda outcome: outcome.count)
    total = len(configured.right)
    if all(outcome.count == best.count for outcome in outcomes):
        text = f"your model is right on {best.count} of {total} each way."
        return Advice(f"It makes no difference how photos are resized: {text}")
    text = f"Your model is right on {best.count} of {total} with "
    if best.count == configured.count:
        return Advice(f"{text}{configured.name}, as it is configured; no other way is better.")
    text += (
        f"{best.name} and on {configured.count} of {total} with {configured.name}, as it is configured: set "
        f"{setting(best.sizing)}."
    )
    if _chance(best, configured) * (len(outcomes) - 1) > CHANCE:  # the best of several (Bonferroni)
        text += (
            " So small a difference may be chance; your own program's probabilities would settle it: a CSV "
            "with a column for each class."
        )
    return Advice(text, best.sizing)


def _chance(one: Outcome, other: Outcome) -> float:
    """How likely such a difference is if both are equally good: McNemar's exact test, two-sided."""
    pairs = list(zip(one.right, other.right, strict=True))
    gained = sum(mine and not theirs for mine, theirs in pairs)
    lost = sum(theirs and not mine for mine, theirs in pairs)
    decided = gained + lost
    tail = sum(math.comb(decided, count) for count in range(min(gained, lost) + 1))
    return float(min(2 * tail / 2**decided, 1.0))


def setting(sizing: Sizing) -> str:
    """The line of the registry that sets a sizing."""
    presets = [name for name, preset in SIZINGS.items() if preset == sizing]
    if presets:
        return f'sizing = "{presets[0]}"'
    fitted = f', fit = "crop", crop_fraction = {sizing.crop_fraction}' if sizing.crop_fraction else ""
    given = {key: getattr(sizing, key) for key in ("grey", "fast_jpeg", "recompress")}
    flags = "".join(f", {key} = {json.dumps(value)}" for key, value in given.items() if value)
    return f'sizing = {{ resize = "{sizing.resize}"{fitted}{flags} }}'


def _facts(result: SampleReport, everything: Sample) -> dict[str, Any]:
    """The JSON of a report."""
    return {
        "network": result.network,
        "photos": result.photos,
        "photos_in_sample": len(everything.photos),
        "unreadable": [
            {"path": str(path), "code": error.code, "detail": str(error)}
            for path, error in result.unreadable.items()
        ],
        "unused_columns": everything.unused_columns,
        "sizings": [
            {
                "sizing": outcome.sizing.describe(),
                "presets": outcome.names,
                "configured": outcome.is_configured,
                "right": outcome.count,
                "median_difference": outcome.median if outcome.differences else None,
                "largest_difference": outcome.largest if outcome.differences else None,
            }
            for outcome in result.outcomes
        ],
        "advice": result.advice.text,
        "set": setting(result.advice.better) if result.advice.better else None,
    }


def _print(result: SampleReport, everything: Sample) -> None:
    has_probabilities = everything.has_probabilities
    names = [
        "sizing",
        f"right of {result.photos}",
        "",
        *(["difference", "largest"] if has_probabilities else []),
        " ",
    ]
    table = console.table(*names, numbers=names[1:-1])
    for outcome in result.outcomes:
        cells = [", ".join(outcome.names) or outcome.sizing.describe()]
        cells += [str(outcome.count), percent(outcome.count / result.photos)]
        if has_probabilities:
            cells += [f"{outcome.median:.4f}", f"{outcome.largest:.4f}"]
        is_configured = outcome.is_configured
        table.add_row(*cells, "configured" if is_configured else "", style="bold" if is_configured else "")
    console.out.print(table)
    console.out.print()
    console.out.print(console.plain(result.advice.text))
    if result.photos + len(result.unreadable) < len(everything.photos):
        looked = f"{result.photos + len(result.unreadable):,} of {len(everything.photos):,}"
        console.out.print(f"{looked} photos, of all classes: --limit takes more.", style="dim")
    if everything.unused_columns:
        unused = ", ".join(everything.unused_columns)
        console.out.print(console.plain(f"Columns that name no class, and were not used: {unused}", "dim"))
    for path, error in result.unreadable.items():
        console.err.print(
            console.plain(str(path), "red"), console.plain(f"{error.code}: {error}"), soft_wrap=True
        )
