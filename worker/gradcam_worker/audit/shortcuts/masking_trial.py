"""The causal step: does the network need what a suspect names?

The suspect region is filled in a sample of the images that look at it, and the network scores them again. How
far the class's probability falls is compared with masking elsewhere:

    effect of a place = fall(region) - mean fall(the same region, moved elsewhere in the same image)
    effect of a background = mean fall(all but the boxes) - mean fall(the same, in images of other classes)
    effect of a spread gaze = mean fall(all) - mean of the greatest fall(a window of half the sides), less the
        same of images of other classes: what no single place explains

A region is filled with a cell more on each side: heat tells a place to about a cell, and of a mark that is
hidden by half the network may need no more than the other half.

Every region is filled in two ways, and the falls are averaged: by the image itself, blurred, which keeps
colours and hides shapes; and by the mean colour of all sampled images, which hides both. Boxes of objects are
never filled, so that an effect is of something else.

The interval of an effect is a percentile bootstrap over images, at a confidence that is corrected for the
number of suspects (Bonferroni): 95 % for all of them together. A suspect is named where the interval lies
above 0 and the effect is large enough; else it is dropped. What a named place explains is not asked again of
the background of its class; and where the background still has an effect, at least twice that of a place, the
place is a part of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.audit.dataset.samples import ClassSample
from gradcam_worker.audit.shortcuts.gaze_regions import Region, widened
from gradcam_worker.audit.shortcuts.suspects import Suspect
from gradcam_worker.errors import GradcamError
from gradcam_worker.gradcam.imaging.baseline import blurred
from gradcam_worker.gradcam.network import InputPixels, Network
from gradcam_worker.gradcam.probabilities import to_probabilities
from gradcam_worker.gradcam.sizing import Placement

MAX_SUSPECTS = 32
IMAGES = 40  # of each suspect
OTHER_IMAGES = 64  # of all classes together
MIN_IMAGES = 8  # that can still be read
CONTROLS = 4  # places elsewhere, for each image
CONTROL_TRIES = 64
MAX_OVERLAP = 0.25  # of a place elsewhere with the suspect region
HALF = 2  # a window has the half of each side of the image
CONFIDENCE = 0.95  # of all intervals together
RESAMPLES = 4000
MIN_EFFECT = 0.02  # of probability
MIN_SPREAD_EFFECT = 0.3  # without boxes, large objects and textures have one too
PART = 0.5  # of the effect of the background: a place with less is a part of it
BATCH = 32  # images scored at once

Mask = NDArray[np.bool_]  # (height, width) of the network's input
LoadPixels = Callable[[str, str], tuple[InputPixels, Placement | None]]
ReportProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Effect:
    """What masking a suspect does to the probability of its class.

    Attributes:
        images: How many were masked.
        probability: Mean of the class's probability before.
        fall_blur: Mean fall where the region is blurred.
        fall_mean: Mean fall where the region is filled with the mean colour.
        control: Mean fall by masking elsewhere, of both fills.
        effect: The mean fall of both fills, less that elsewhere.
        low: The interval's lower end.
        high: Its upper end.
        confidence: Of the interval.
    """

    images: int
    probability: float
    fall_blur: float
    fall_mean: float
    control: float
    effect: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class TrialOutcome:
    """The suspects after the trial.

    Attributes:
        named: With an effect, the surest first.
        dropped: How many had none.
        untested: Those whose images could not be read, or that were left out since there were too many.
        unread: Error code -> number of images that could not be read.
    """

    named: tuple[tuple[Suspect, Effect], ...]
    dropped: int
    untested: tuple[Suspect, ...]
    unread: dict[str, int]


@dataclass(frozen=True)
class _Image:
    """An image of a sample, at the input size of the network."""

    class_id: int
    pixels: InputPixels
    blurred: InputPixels
    xs: NDArray[np.float64]  # (width,) where each column of pixels lies on the image, as share of its width
    ys: NDArray[np.float64]
    objects: Mask  # within the boxes

    def region(self, cells: Region) -> Mask:
        """The pixels of a region of cells of the image."""
        rows, columns = (
            np.floor(places * count).astype(np.intp)
            for places, count in zip((self.ys, self.xs), cells.shape, strict=True)
        )
        inside = ((self.ys >= 0) & (self.ys < 1))[:, None] & ((self.xs >= 0) & (self.xs < 1))
        rows, columns = np.clip(rows, 0, cells.shape[0] - 1), np.clip(columns, 0, cells.shape[1] - 1)
        return np.asarray(cells[rows[:, None], columns] & inside, np.bool_)


def try_suspects(
    suspects: Sequence[Suspect],
    samples: Sequence[ClassSample],
    network: Network,
    load: LoadPixels,
    *,
    max_suspects: int = MAX_SUSPECTS,
    images: int = IMAGES,
    min_effect: float = MIN_EFFECT,
    seed: int = 0,
    report_progress: ReportProgress = lambda *_: None,
) -> TrialOutcome:
    """Test suspects by masking, on the network itself.

    Args:
        suspects: The suspects, the most conspicuous first.
        samples: In which they were found.
        network: The network of the dataset, with the same weights.
        load: Reads an image by URI and sha256: its pixels at the input size, and their placement.
        max_suspects: How many are tested.
        images: How many images of each.
        min_effect: Of what is named.
        seed: Of the choice of images, of the places elsewhere and of the bootstrap.
        report_progress: Is called after each suspect.

    Returns:
        What is named, with its effect.
    """
    # Places first: what they explain is not asked again of the background.
    tested = sorted(suspects[:max_suspects], key=lambda suspect: suspect.kind != "place")
    confidence = 1 - (1 - CONFIDENCE) / max(len(tested), 1)
    trial = _Trial(network, load, {sample.class_id: sample for sample in samples}, images, confidence, seed)
    named: list[tuple[Suspect, Effect]] = []
    untested: list[Suspect] = []
    for done, suspect in enumerate(tested):
        places = [pair for pair in named if pair[0].class_id == suspect.class_id]
        explained = [widened(place.region) for place, _ in places if place.region is not None]
        effect = trial.run(suspect, explained)
        least = max(min_effect, MIN_SPREAD_EFFECT) if suspect.kind == "spread" else min_effect
        if effect is None:
            untested.append(suspect)
        elif effect.low > 0 and effect.effect >= least:
            if suspect.kind != "place" and places:
                effect = trial.run(suspect, []) or effect
                parts = [pair for pair in places if pair[1].effect < effect.effect * PART]
                named = [pair for pair in named if pair not in parts]
            named.append((suspect, effect))
        report_progress("suspects", done + 1, len(tested))
    return TrialOutcome(
        named=tuple(sorted(named, key=lambda pair: -pair[1].low)),
        dropped=len(tested) - len(named) - len(untested),
        untested=(*untested, *suspects[max_suspects:]),
        unread=dict(sorted(trial.unread.items())),
    )


class _Trial:
    def __init__(
        self,
        network: Network,
        load: LoadPixels,
        samples: dict[int, ClassSample],
        images: int,
        confidence: float,
        seed: int,
    ) -> None:
        self._network, self._load, self._samples = network, load, samples
        self._images, self._confidence, self._seed = images, confidence, seed
        self.unread: dict[str, int] = {}
        self._others = self._load_others()
        pixels = [image.pixels for image in self._others]
        self._color = np.mean(pixels, axis=(0, 1, 2)).astype(np.uint8) if pixels else np.uint8(0)

    def _load_others(self) -> list[_Image]:
        """Some images of every class."""
        each = max(OTHER_IMAGES // max(len(self._samples), 1), 1)
        chosen = [*self._samples.values()]
        if len(chosen) > OTHER_IMAGES:
            picked = np.linspace(0, len(chosen) - 1, OTHER_IMAGES).astype(np.intp)
            chosen = [chosen[number] for number in picked]
        return [image for sample in chosen for image in self._load_all(sample, np.arange(len(sample)), each)]

    def _load_all(self, sample: ClassSample, members: NDArray[np.intp], count: int) -> Iterator[_Image]:
        """Up to `count` of a sample's members that can be read, chosen by chance."""
        order = np.random.default_rng([self._seed, sample.class_id]).permutation(members)
        read = 0
        for number in order[: 2 * count].tolist():
            if read == count:
                return
            try:
                pixels, placement = self._load(sample.uris[number], sample.hashes[number])
            except GradcamError as error:
                self.unread[error.code] = self.unread.get(error.code, 0) + 1
                continue
            read += 1
            yield _image(sample, number, pixels, placement)

    def run(self, suspect: Suspect, explained: Sequence[Region]) -> Effect | None:
        """Test one suspect. None: too few images can be read."""
        sample = self._samples[suspect.class_id]
        images = [*self._load_all(sample, suspect.members, self._images)]
        others = [image for image in self._others if image.class_id != suspect.class_id]
        if suspect.kind != "place" and suspect.basis == "boxes":
            others = [image for image in others if image.objects.any()]
        if len(images) < MIN_IMAGES or (suspect.kind != "place" and len(others) < MIN_IMAGES):
            return None
        rng = np.random.default_rng([self._seed, suspect.class_id, len(suspect.members)])
        if suspect.region is not None:
            return self._place(images, widened(suspect.region), rng)
        if suspect.kind == "background":
            return self._background(images, others, explained, rng)
        return self._spread(images, others, rng)

    def _place(self, images: list[_Image], cells: Region, rng: np.random.Generator) -> Effect | None:
        masks = [[image.region(cells) & ~image.objects] for image in images]
        kept = [number for number, (mask,) in enumerate(masks) if mask.any()]
        if len(kept) < MIN_IMAGES:
            return None
        images, masks = [images[number] for number in kept], [masks[number] for number in kept]
        before, falls = self._falls(images, masks)
        elsewhere = [
            [moved & ~image.objects for moved in _elsewhere(image.region(cells), image.objects, rng)]
            for image in images
        ]
        _, control_falls = self._falls(images, elsewhere)
        control = control_falls.mean((1, 2))
        each = falls.mean((1, 2)) - control
        return self._effect(before, falls[:, 0].mean(0), float(control.mean()), each, None, rng)

    def _background(
        self,
        images: list[_Image],
        others: list[_Image],
        explained: Sequence[Region],
        rng: np.random.Generator,
    ) -> Effect:
        def all_but_objects(image: _Image) -> list[Mask]:
            mask = ~image.objects
            for cells in explained:
                mask &= ~image.region(cells)
            return [mask]

        before, falls = self._falls(images, [all_but_objects(image) for image in images])
        _, control = self._falls(others, [all_but_objects(image) for image in others])
        each, of_others = falls.mean((1, 2)), control.mean((1, 2))
        return self._effect(
            before, falls[:, 0].mean(0), float(of_others.mean()), each - of_others.mean(), of_others, rng
        )

    def _spread(self, images: list[_Image], others: list[_Image], rng: np.random.Generator) -> Effect:
        windows = [*_windows(images[0].pixels.shape[:2])]
        before, falls = self._falls(images, [windows] * len(images))
        _, control = self._falls(others, [windows] * len(others))
        each, of_others = (part[:, 0].mean(1) - part[:, 1:].mean(2).max(1) for part in (falls, control))
        return self._effect(
            before, falls[:, 0].mean(0), float(of_others.mean()), each - of_others.mean(), of_others, rng
        )

    def _falls(
        self, images: Sequence[_Image], masks: Sequence[Sequence[Mask]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mask each image by each of its masks, as many for all, with each fill.

        Returns:
            The probability of its own class before (n,), and how far each fall is (n, masks, fills).
        """
        per_image = 1 + 2 * len(masks[0])
        ids = np.repeat([image.class_id for image in images], per_image)
        probabilities = np.empty(len(ids))
        batch: list[InputPixels] = []
        done = 0
        for filled in self._filled(images, masks):
            batch.append(filled)
            if len(batch) == BATCH or done + len(batch) == len(ids):
                values = to_probabilities(
                    self._network.scores(np.stack(batch)).astype(np.float64), self._network.facts.head
                )
                part = slice(done, done + len(batch))
                probabilities[part] = values[np.arange(len(batch)), ids[part]]
                done, batch = done + len(batch), []
        values = probabilities.reshape(len(images), per_image)
        falls = values[:, :1] - values[:, 1:]
        return values[:, 0], falls.reshape(len(images), len(masks[0]), 2)

    def _filled(self, images: Sequence[_Image], masks: Sequence[Sequence[Mask]]) -> Iterator[InputPixels]:
        for image, of_image in zip(images, masks, strict=True):
            yield image.pixels
            for mask in of_image:
                yield np.where(mask[..., None], image.blurred, image.pixels)
                yield np.where(mask[..., None], self._color, image.pixels).astype(image.pixels.dtype)

    def _effect(
        self,
        before: NDArray[np.float64],
        falls: NDArray[np.float64],
        control: float,
        each: NDArray[np.float64],
        of_others: NDArray[np.float64] | None,
        rng: np.random.Generator,
    ) -> Effect:
        """The effect of a suspect: the mean of `each`, less what `of_others` vary by chance."""
        means = each[rng.integers(0, len(each), (RESAMPLES, len(each)))].mean(1)
        if of_others is not None:
            chosen = rng.integers(0, len(of_others), (RESAMPLES, len(of_others)))
            means -= of_others[chosen].mean(1) - of_others.mean()
        tail = (1 - self._confidence) / 2
        low, high = np.quantile(means, [tail, 1 - tail])
        return Effect(
            images=len(each),
            probability=float(before.mean()),
            fall_blur=float(falls[0]),
            fall_mean=float(falls[1]),
            control=control,
            effect=float(each.mean()),
            low=float(low),
            high=float(high),
            confidence=self._confidence,
        )


def _image(sample: ClassSample, number: int, pixels: InputPixels, placement: Placement | None) -> _Image:
    height, width = pixels.shape[:2]
    shown = placement or Placement(0, 0, 1, 1)
    xs = shown.left + (np.arange(width) + 0.5) / width * (shown.right - shown.left)
    ys = shown.top + (np.arange(height) + 0.5) / height * (shown.bottom - shown.top)
    objects = np.zeros((height, width), np.bool_)
    boxes = sample.boxes[number]
    for left, top, right, bottom in () if boxes is None else boxes:
        objects |= ((ys >= top) & (ys < bottom))[:, None] & ((xs >= left) & (xs < right))
    return _Image(sample.class_id, pixels, blurred(pixels), xs, ys, objects)


def _elsewhere(region: Mask, objects: Mask, rng: np.random.Generator) -> list[Mask]:
    """The region, moved elsewhere, around the edges too: where it covers as little of the objects."""
    height, width = region.shape
    wanted = (region & ~objects).sum()
    moved = [
        np.roll(region, shift, (0, 1))
        for shift in zip(
            rng.integers(0, height, CONTROL_TRIES), rng.integers(0, width, CONTROL_TRIES), strict=True
        )
    ]
    overlaps = np.array([(mask & region).sum() for mask in moved]) / max(region.sum(), 1)
    areas = np.array([abs(int((mask & ~objects).sum()) - int(wanted)) for mask in moved])
    # Those that overlap too much come last, the others in the order of how far their area differs.
    order = np.lexsort([np.arange(len(moved)), areas, overlaps > MAX_OVERLAP])
    return [moved[number] for number in order[:CONTROLS]]


def _windows(size: tuple[int, ...]) -> Iterator[Mask]:
    """The whole image, and nine windows with half of its sides."""
    height, width = size[:2]
    yield np.ones((height, width), np.bool_)
    for top in np.linspace(0, height - height // HALF, 3).astype(int).tolist():
        for left in np.linspace(0, width - width // HALF, 3).astype(int).tolist():
            mask = np.zeros((height, width), np.bool_)
            mask[top : top + height // HALF, left : left + width // HALF] = True
            yield mask
