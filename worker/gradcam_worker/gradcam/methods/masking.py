"""The methods that need nothing but scores: RISE and occlusion. Each scores the image with parts covered.

RISE (Petsiuk et al., arXiv 1806.07421): random masks M keep about half of the image. The value at a place is
how much higher the score is, on average, when the place is kept than over all masks, equation 6 minus the
mean score:

    raw(place) = sum over masks of (score(image x M) - mean score) x M(place) / (masks x 0.5)

Occlusion (Zeiler and Fergus, arXiv 1311.2901, section 4.2): a grey square moves over the image. The value at
a place is how much the score falls when a square covers it, the mean over all squares that do.

So in both a positive value speaks for the class and a negative one against it, as in Grad-CAM. What is
covered becomes grey, level 127: most preprocessings make about the mean of all photos of it.

Departures. RISE: the mean score is subtracted, so that scores before the softmax can be explained too: their
zero has no meaning, and its product with the sum of the masks would be noise. Masked pixels are rounded to
whole levels. The map has four values for each cell of the masks, which change no faster. Occlusion: the drop
belongs to the places that were covered, not to the position of the square; the map has one value for each
stride.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidJob
from gradcam_worker.gradcam.imaging.baseline import GREY, to_levels
from gradcam_worker.gradcam.network import Computed, InputPixels, Method

METHODS = ("rise", "occlusion")
PARAMETERS = {"rise": ("masks", "cells", "seed"), "occlusion": ("window", "stride")}
DEFAULT_MASKS = 1024
DEFAULT_CELLS = 7  # of a mask, along each side: as in the paper
KEPT = 0.5  # probability that a cell is kept: as in the paper
VALUES_PER_CELL = 4  # of a heatmap of RISE, along each side
DEFAULT_WINDOWS = 7  # of occlusion along the shorter side: 32 of 224 pixels
BASELINE = "grey"  # for manifests, as `integrated.BASELINES` name it
LAYER = "input"  # what stands where other methods name their target layer
PASS_VALUES = 16 * 224 * 224  # height x width of all images of a pass
MAX_PASS_SIZE = 64
ROUNDING = 1e-12  # of sums in float64: less than this share of the mean is nothing

Floats = NDArray[np.float32]
Score = Callable[[InputPixels], Floats]  # pixels (n, height, width, channels) -> scores (n, classes)
# An image, and the weight of its score in each cell of the heatmap.
Covered = Iterator[tuple[InputPixels, Floats]]
ToValues = Callable[[NDArray[np.float64]], NDArray[np.float64]]
Report = Callable[[int, int], None]  # passes that are done, and all of them


def is_masking(method: Method) -> bool:
    """Whether a method needs nothing but scores."""
    return method.name in METHODS


def with_defaults(method: Method, input_size: tuple[int, int]) -> Method:
    """Fill in the parameters that a method leaves open, for a network, and check them all.

    Args:
        method: The method.
        input_size: Height and width of the network's input in pixels.

    Returns:
        The method with each of its parameters.

    Raises:
        InvalidJob: A parameter belongs to another method, or does not fit to the input.
    """
    for owner, names in PARAMETERS.items():
        for name in names:
            if owner != method.name and getattr(method, name) is not None:
                message = f"{name} is a parameter of {owner}, not of {method.name}."
                raise InvalidJob(message)
    if not is_masking(method):
        return method
    if method.layer is not None or method.flip:
        given = "layer" if method.layer is not None else "flip"
        message = f"{method.name} covers parts of the image: it has no {given}."
        raise InvalidJob(message)
    side = min(input_size)
    if method.name == "rise":
        return _checked(
            replace(
                method,
                masks=DEFAULT_MASKS if method.masks is None else method.masks,
                cells=min(DEFAULT_CELLS, side) if method.cells is None else method.cells,
                seed=0 if method.seed is None else method.seed,
            ),
            {"masks": (2, 100_000), "cells": (2, side), "seed": (0, 2**32 - 1)},
        )
    window = max(round(side / DEFAULT_WINDOWS), 1) if method.window is None else method.window
    stride = max(window // 2, 1) if method.stride is None else method.stride
    return _checked(
        replace(method, window=window, stride=stride), {"window": (1, side), "stride": (1, window)}
    )


def _checked(method: Method, limits: dict[str, tuple[int, int]]) -> Method:
    for name, (least, most) in limits.items():
        value = getattr(method, name)
        if not least <= value <= most:
            message = f"{name} of {method.name} is {value}; for this network it must be {least} to {most}."
            raise InvalidJob(message)
    return method


def image_count(method: Method, input_size: tuple[int, int]) -> int:
    """The number of images that a method scores: the image itself, and one for each mask.

    Args:
        method: From `with_defaults`.
        input_size: Height and width of the network's input in pixels.
    """
    return 1 + _masks(method, input_size).count


def grid_size(method: Method, input_size: tuple[int, int]) -> tuple[int, int]:
    """The rows and columns of a method's heatmaps.

    Args:
        method: From `with_defaults`.
        input_size: Height and width of the network's input in pixels.
    """
    return _masks(method, input_size).grid


def pass_size(input_size: tuple[int, int]) -> int:
    """The number of images that are scored at once.

    It depends on nothing but the network's input. So the results do not depend on anything else either, down
    to their last digits: float32 scores depend on the number of images in a pass.

    Args:
        input_size: Height and width in pixels.
    """
    fitting = PASS_VALUES / (input_size[0] * input_size[1])
    return int(min(max(2 ** math.floor(math.log2(fitting)), 1), MAX_PASS_SIZE))


def compute(
    score: Score,
    pixels: InputPixels,
    wanted: tuple[int, ...],
    method: Method,
    to_values: ToValues,
    report: Report = lambda done, total: None,  # noqa: ARG005  # the names of its arguments
) -> Computed:
    """Explain k classes of one image from scores. All classes share the passes.

    The masks of one pass are in memory at a time.

    Args:
        score: Scores n images; always called with `pass_size` of them.
        pixels: The network's input for the image, (height, width, channels).
        wanted: The classes, from `ClassIndex.select`: ids, or -r for the class of rank r.
        method: From `with_defaults`.
        to_values: From scores (n, classes) to what is explained of each class.
        report: Called before the first pass, and after each; what it raises ends the computation.

    Returns:
        The results, for one image.
    """
    masks = _masks(method, (pixels.shape[0], pixels.shape[1]))
    size = pass_size((pixels.shape[0], pixels.shape[1]))
    total = -(-(1 + masks.count) // size)
    covered = _covered(masks.draw(), pixels)
    report(0, total)
    images, weights = _next_pass(covered, pixels, size - 1)
    scores = score(np.concatenate([pixels[None], images]))
    whole = scores[:1]
    class_ids = _class_ids(whole[0], wanted, method.against)
    sums = _Sums(to_values(whole.astype(np.float64))[0, class_ids], masks.grid)
    scores = scores[1:]
    for done in range(1, total + 1):
        sums.add(to_values(scores[: len(weights)].astype(np.float64))[:, class_ids], weights)
        report(done, total)
        if done < total:
            images, weights = _next_pass(covered, pixels, size)
            scores = score(images)
    raw = sums.drop_from_whole() if method.name == "occlusion" else sums.rise_above_mean(masks.count)
    return Computed(LAYER, whole, class_ids[None], raw.astype(np.float32)[None])


class _Sums:
    """Sums over masks, for k classes, of how far a value is from that of the whole image.

    So a value that no mask changes gives exact zeros. They are summed one by one, in one order: the last
    digits of a matrix product depend on the threads that compute it.
    """

    def __init__(self, whole: NDArray[np.float64], grid: tuple[int, int]) -> None:
        self._whole = whole
        self._differences = np.zeros(len(whole))
        self._weights = np.zeros(grid)
        self._products = np.zeros((len(whole), *grid))

    def add(self, values: NDArray[np.float64], weights: list[Floats]) -> None:
        """Add the values (n, k) of n masks."""
        for difference, weight in zip(values - self._whole, weights, strict=True):
            self._differences += difference
            self._weights += weight
            self._products += difference[:, None, None] * weight

    def drop_from_whole(self) -> NDArray[np.float64]:
        """How far the value falls where a place is covered, (k, rows, columns)."""
        return -self._products

    def rise_above_mean(self, count: int) -> NDArray[np.float64]:
        """How far the value is above the mean of all masks where a place is kept, (k, rows, columns)."""
        mean = self._differences / count
        raw: NDArray[np.float64] = self._products - mean[:, None, None] * self._weights
        negligible = np.abs(raw) < ROUNDING * np.abs(mean)[:, None, None]
        return np.where(negligible, 0, raw)


def _class_ids(scores: Floats, wanted: tuple[int, ...], against: tuple[int, ...]) -> NDArray[np.int32]:
    """The ids of the wanted classes, those of ranks by the scores of the whole image."""
    ranked = scores.astype(np.float64)
    ranked[[*against]] = -np.inf
    order = np.argsort(-ranked, kind="stable")
    return np.array([one if one >= 0 else order[-one - 1] for one in wanted], np.int32)


def _covered(drawn: Iterator[tuple[Floats, Floats]], pixels: InputPixels) -> Covered:
    """The image under each mask."""
    difference = pixels.astype(np.float32) - GREY
    for kept, weights in drawn:
        yield to_levels(difference * kept[..., np.newaxis] + GREY, pixels), weights


def _next_pass(covered: Covered, pixels: InputPixels, size: int) -> tuple[InputPixels, list[Floats]]:
    """The next images, filled up with the whole image, and the weights of those with a mask."""
    drawn = [*itertools.islice(covered, size)]
    images = np.repeat(pixels[None], size, axis=0)
    for index, (image, _) in enumerate(drawn):
        images[index] = image
    return images, [weights for _, weights in drawn]


class _Masks(Protocol):
    """The masks of a method, for one size of image."""

    @property
    def count(self) -> int:
        """The number of masks."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of the heatmap."""
        ...

    def draw(self) -> Iterator[tuple[Floats, Floats]]:
        """Each mask (height, width), 1 where the image is kept, and its weights (rows, columns)."""
        ...


def _masks(method: Method, size: tuple[int, int]) -> _Masks:
    if method.name == "rise":
        return _RiseMasks(size, method.masks or 0, method.cells or 0, method.seed or 0)
    return _Squares(size, method.window or 0, method.stride or 0)


@dataclass(frozen=True)
class _RiseMasks:
    """Random grids of cells, enlarged, and shifted by up to one cell: section 3.2 of the paper."""

    size: tuple[int, int]
    count: int
    cells: int
    seed: int

    @property
    def grid(self) -> tuple[int, int]:
        """See `_Masks.grid`."""
        height, width = (min(VALUES_PER_CELL * self.cells, side) for side in self.size)
        return height, width

    def draw(self) -> Iterator[tuple[Floats, Floats]]:
        """See `_Masks.draw`."""
        random = np.random.default_rng(self.seed)
        (height, width), (rows, columns) = self.size, self.grid
        cell_height, cell_width = -(-height // self.cells), -(-width // self.cells)
        enlarged = (self.cells + 1) * cell_width, (self.cells + 1) * cell_height
        for _ in range(self.count):
            *drawn, down, right = random.random(self.cells**2 + 2)
            kept = (np.array(drawn).reshape(self.cells, self.cells) < KEPT).astype(np.float32)
            mask = cv2.resize(kept, enlarged, interpolation=cv2.INTER_LINEAR)
            top, left = int(down * cell_height), int(right * cell_width)
            mask = mask[top : top + height, left : left + width]
            weights = cv2.resize(mask, (columns, rows), interpolation=cv2.INTER_AREA)
            yield mask, weights / np.float32(KEPT * self.count)


@dataclass(frozen=True)
class _Squares:
    """A square at each position, from left to right and from top to bottom; the last ones may be cut off."""

    size: tuple[int, int]
    window: int
    stride: int

    @property
    def _positions(self) -> tuple[int, int]:
        height, width = (1 + -(-(side - self.window) // self.stride) for side in self.size)
        return height, width

    @property
    def count(self) -> int:
        """See `_Masks.count`."""
        return math.prod(self._positions)

    @property
    def grid(self) -> tuple[int, int]:
        """See `_Masks.grid`."""
        height, width = (max(round(side / self.stride), 1) for side in self.size)
        return height, width

    def draw(self) -> Iterator[tuple[Floats, Floats]]:
        """See `_Masks.draw`. The weights at a pixel sum to 1: its value is a mean."""
        rows, columns = (
            self._along(side, count, cells)
            for side, count, cells in zip(self.size, self._positions, self.grid, strict=True)
        )
        for is_row, row_weights in rows:
            for is_column, column_weights in columns:
                covered = np.outer(is_row, is_column)
                yield (~covered).astype(np.float32), np.outer(row_weights, column_weights)

    def _along(self, side: int, positions: int, cells: int) -> list[tuple[NDArray[np.bool_], Floats]]:
        """For each position along a side, what it covers, and the weight of this in each cell."""
        pixels = np.arange(side)
        covers = [
            (pixels >= number * self.stride) & (pixels < number * self.stride + self.window)
            for number in range(positions)
        ]
        times = np.sum(covers, axis=0)
        weights = [
            cv2.resize((one / times).astype(np.float32)[None], (cells, 1), interpolation=cv2.INTER_AREA)[0]
            for one in covers
        ]
        return list(zip(covers, weights, strict=True))
