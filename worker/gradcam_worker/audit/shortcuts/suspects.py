"""Suspects: what a class's predictions look at and those of other classes do not, apart from the object.

A suspect is only a correlation. `masking_trial`, beside this module, tests whether it has an effect.

*A place.* A window of about a quarter of the image's sides moves over the image. An image looks at a window
if its heat there is at least half of that in its hottest window, or three tenths where the boxes of objects
are known. A window is suspect if the class's images look at it at least three times as often as those of
other classes, more often than chance explains (binomial test). Where boxes are known, only heat outside of
them counts, at a distance of a cell. Where they are not, an object that is always at the same place in one
class alone is a suspect too: no heatmap can tell it from a shortcut. Then at least a third of the class's
images must look at the window.

*The background.* With boxes: at least half of the heat, or clearly more of it than in other classes, lies
outside of them. Without: the heat is spread over clearly more of the image than that of other classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.audit.dataset.samples import ClassSample
from gradcam_worker.audit.shortcuts.gaze_regions import (
    Heat,
    Region,
    hot_region,
    share_near_boxes,
    window_sums,
)
from gradcam_worker.audit.significance import binomial_log_tail

Kind = Literal["place", "background", "spread"]
Basis = Literal["boxes", "other_classes"]

MIN_IMAGES = 8  # of a class that is looked at, and of a suspect
MAX_IMAGES = 1024  # of a class that are looked at
MAX_REFERENCE = 4096  # images of all classes together, the same number of each
WINDOW = 0.25  # of each side
LOOKS_AT: dict[Basis, float] = {"boxes": 0.3, "other_classes": 0.5}  # of the heat in the hottest window
TIMES_AS_OFTEN = 3.0
MAX_CHANCE = 1e-4  # p of the binomial test
PLACES_PER_CLASS = 3
MAX_PLACE = 0.35  # of the image: a larger region is no place
MIN_BOXED = 0.5  # of the images of a class have boxes: else it is judged as if none had
BACKGROUND_HEAT = 0.5  # outside of the boxes
MORE_HEAT = 0.15  # outside of the boxes than in other classes
MIN_SHARE_WITHOUT_BOXES = 1 / 3  # of a class's images look at a place; objects that vary may crowd anywhere
WIDER = 1.25  # times the cells over which the heat of other classes is spread


@dataclass(frozen=True, eq=False)
class Suspect:
    """What may be a shortcut of a class.

    Attributes:
        class_id: The class.
        kind: `place`: a region of the image. `background`: all outside of the boxes. `spread`: heat all over
            the image, where no boxes are known.
        basis: What it was told from the object by: boxes, or where other classes look.
        region: Of a place, on the grid of the samples.
        members: Which images of the class's sample look at it.
        heat: Mean share of their heat that lies there. Of `spread`: of the cells that it is spread over.
        expected: The same of the images of other classes.
    """

    class_id: int
    kind: Kind
    basis: Basis
    region: Region | None
    members: NDArray[np.intp]
    heat: float
    expected: float

    @property
    def suspicion(self) -> float:
        """What is tested first has the greatest."""
        return self.heat - self.expected


@dataclass(frozen=True)
class _Gaze:
    """Heat of some images of a class, outside of the boxes where `basis` is boxes."""

    numbers: NDArray[np.intp]  # in the sample
    heat: Heat  # (n, rows, columns)
    looks: NDArray[np.bool_]  # (n, windows down, windows across)
    spread: NDArray[np.float64]  # (n,) share of the cells


def find_suspects(samples: Sequence[ClassSample]) -> list[Suspect]:
    """Find what may be shortcuts.

    Args:
        samples: Images that are predicted as each class.

    Returns:
        The suspects, the most conspicuous first.
    """
    samples = [sample for sample in samples if len(sample) >= MIN_IMAGES]
    suspects: list[Suspect] = []
    for basis in ("boxes", "other_classes"):
        judged = [sample for sample in samples if (_boxed(sample).mean() >= MIN_BOXED) == (basis == "boxes")]
        gazes = [_gaze(sample, basis) for sample in judged]
        reference = _Reference(gazes)
        for number, (sample, gaze) in enumerate(zip(judged, gazes, strict=True)):
            if len(gaze.numbers) >= MIN_IMAGES and len(gazes) > 1:
                suspects += _places(sample.class_id, basis, gaze, reference.without(number))
                suspects += _background(sample.class_id, basis, gaze, reference.without(number))
    return sorted(suspects, key=lambda suspect: (-suspect.suspicion, suspect.class_id, suspect.kind))


def _boxed(sample: ClassSample) -> NDArray[np.bool_]:
    return np.array([boxes is not None and len(boxes) > 0 for boxes in sample.boxes], np.bool_)


def _gaze(sample: ClassSample, basis: Basis) -> _Gaze:
    usable = sample.heat.any((1, 2)) & (_boxed(sample) if basis == "boxes" else True)
    numbers = np.flatnonzero(usable)
    numbers = numbers[np.linspace(0, len(numbers) - 1, min(len(numbers), MAX_IMAGES)).astype(np.intp)]
    whole = sample.heat[numbers]
    grid = whole.shape[1], whole.shape[2]
    side = max(round(WINDOW * grid[0]), 1), max(round(WINDOW * grid[1]), 1)
    heat, hottest = whole, window_sums(whole, side).max((1, 2), keepdims=True, initial=0)
    if basis == "boxes":
        boxes = [of_image for number in numbers.tolist() if (of_image := sample.boxes[number]) is not None]
        heat = whole * (1 - share_near_boxes(boxes, grid))
    looks = window_sums(heat, side) >= LOOKS_AT[basis] * hottest
    return _Gaze(numbers, heat, looks, _spread(whole))


def _spread(heat: Heat) -> NDArray[np.float64]:
    """Over which share of the cells each map is spread: the exponential of its entropy."""
    flat = heat.reshape(len(heat), heat.shape[1] * heat.shape[2]).astype(np.float64)
    entropy = -(flat * np.log(np.maximum(flat, 1e-12))).sum(1)
    return np.asarray(np.exp(entropy) / flat.shape[1], np.float64)


@dataclass(frozen=True)
class _Others:
    """What the images of all other classes look at; each class counts the same."""

    heat: Heat  # (rows, columns), the mean
    looks: NDArray[np.float64]  # share of the images that look at each window
    images: int
    outside: float  # mean share of the heat
    spread: float


class _Reference:
    """The same number of images of each class, to compare a class with the others."""

    def __init__(self, gazes: Sequence[_Gaze]) -> None:
        each = max(MAX_REFERENCE // max(len(gazes), 1), 1)
        self._parts = [_means(gaze, each) for gaze in gazes]

    def without(self, number: int) -> _Others:
        """The means of all classes but one."""
        others = [part for index, part in enumerate(self._parts) if index != number and part.images]
        weights = np.array([1 / max(len(others), 1)] * len(others))
        return _Others(
            np.tensordot(weights, np.stack([one.heat for one in others]), 1).astype(np.float32),
            np.tensordot(weights, np.stack([one.looks for one in others]), 1),
            sum(one.images for one in others),
            float(weights @ [one.outside for one in others]),
            float(weights @ [one.spread for one in others]),
        )


def _means(gaze: _Gaze, images: int) -> _Others:
    count = min(len(gaze.numbers), images)
    chosen = np.linspace(0, len(gaze.numbers) - 1, count).astype(np.intp)
    heat, looks = gaze.heat[chosen], gaze.looks[chosen]
    return _Others(
        heat.mean(0) if count else np.zeros(gaze.heat.shape[1:], np.float32),
        looks.mean(0) if count else np.zeros(gaze.looks.shape[1:]),
        count,
        float(heat.sum((1, 2)).mean()) if count else 0.0,
        float(gaze.spread[chosen].mean()) if count else 0.0,
    )


def _places(class_id: int, basis: Basis, gaze: _Gaze, others: _Others) -> list[Suspect]:
    """The windows that the class looks at more often than others, each with the images that look at it."""
    count = len(gaze.numbers)
    chance = (others.looks * others.images + 1) / (others.images + 1)
    least = max(MIN_IMAGES, 0 if basis == "boxes" else MIN_SHARE_WITHOUT_BOXES * count)
    left = np.ones(count, np.bool_)
    suspects: list[Suspect] = []
    while len(suspects) < PLACES_PER_CLASS:
        looking = gaze.looks[left].sum(0)
        unlikely = binomial_log_tail(looking, count, chance)
        suspicious = (looking >= least) & (looking >= TIMES_AS_OFTEN * chance * count)
        unlikely[~suspicious] = 0
        window = np.unravel_index(unlikely.argmin(), unlikely.shape)
        if unlikely[window] > np.log(MAX_CHANCE):
            break
        members = left & gaze.looks[:, window[0], window[1]]
        left &= ~members
        region = hot_region(np.clip(gaze.heat[members].mean(0) - others.heat, 0, None))
        if region.mean() <= MAX_PLACE and not any(_overlap(region, one.region) for one in suspects):
            heat = float(gaze.heat[members][:, region].sum(1).mean())
            expected = float(others.heat[region].sum())
            numbers = gaze.numbers[members]
            suspects.append(Suspect(class_id, "place", basis, region, numbers, heat, expected))
    return suspects


def _overlap(region: Region, other: Region | None) -> bool:
    return other is not None and bool((region & other).sum() > min(region.sum(), other.sum()) / 2)


def _background(class_id: int, basis: Basis, gaze: _Gaze, others: _Others) -> list[Suspect]:
    if basis == "boxes":
        outside = gaze.heat.sum((1, 2))
        heat, expected = float(outside.mean()), others.outside
        if heat < BACKGROUND_HEAT and heat < expected + MORE_HEAT:
            return []
        return [Suspect(class_id, "background", basis, None, gaze.numbers, heat, expected)]
    spread, expected = float(gaze.spread.mean()), others.spread
    if spread < WIDER * expected:
        return []
    return [Suspect(class_id, "spread", basis, None, gaze.numbers, spread, expected)]
