"""Integrated Gradients: Sundararajan, Taly and Yan, arXiv 1703.01365.

The attribution of a pixel is how far it differs from a baseline, times the mean slope of the score on the
straight line from the baseline to the image (equation 1). The attributions sum to the difference between the
score of the image and that of the baseline: completeness, which is checked here.

The mean is a Gauss-Legendre quadrature, which needs fewer passes for the same sum than the Riemann sum of
equation 3. Channels are summed. The line is that of the pixels, before the preprocessing: for a preprocessing
that shifts and scales, the same as that of the preprocessed image.

The passes are computed in parts, each by `Network.compute`: so others may use the device between two of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidJob
from gradcam_worker.gradcam.imaging.baseline import GREY, blurred
from gradcam_worker.gradcam.network import Computed, InputPixels, Method
from gradcam_worker.gradcam.probabilities import explained_score

NAME = "integrated_gradients"
LAYER = "input"  # where the heatmaps are computed
BASELINES = ("black", "grey", "blurred")
BASELINE, STEPS = "black", 64  # the defaults; black is the paper's
MIN_STEPS, MAX_STEPS = 8, 1024
STEPS_AT_ONCE = 8  # of an image, in one request: it occupies the device about as long as a batch of Grad-CAM
MAX_COMPLETENESS_ERROR = 0.1  # above it a result has a warning
SMOOTHING, PERCENTILE = 0.005, 99.0  # of drawn heatmaps: standard deviation, as a share of the longer side
MAX_VALUES = 2**24  # attributions of all images and classes of a shard's pass: 128 MB as float64
MIN_SHARE = 0.01  # of the sum of all absolute attributions: the least difference of scores that counts

Compute = Callable[[InputPixels, NDArray[np.int32], Method], Computed]


def with_defaults(method: Method) -> Method:
    """Fill in baseline and steps where they are left open, and check them.

    Args:
        method: Of any name.

    Returns:
        The method with both parameters; any other method as it is.

    Raises:
        InvalidJob: A parameter is of another method, or out of range.
    """
    message = ""
    if method.name != NAME:
        for name in ("baseline", "steps"):
            if getattr(method, name) is not None:
                message = f"{name} is a parameter of {NAME}, not of {method.name}."
    elif method.layer is not None:
        message = f"{NAME} explains the pixels: it has no layer."
    elif method.baseline not in {*BASELINES, None}:
        message = f"{method.baseline!r} is none of {', '.join(BASELINES)}."
    elif method.steps is not None and not MIN_STEPS <= method.steps <= MAX_STEPS:
        message = f"steps is {method.steps}: it must be from {MIN_STEPS} to {MAX_STEPS}."
    if message:
        raise InvalidJob(message)
    if method.name != NAME:
        return method
    return replace(method, baseline=method.baseline or BASELINE, steps=method.steps or STEPS)


def baseline(pixels: InputPixels, name: str | None) -> InputPixels:
    """Make the baselines of images.

    Args:
        pixels: (n, height, width, channels).
        name: A name from `BASELINES`; None: the default.

    Returns:
        As `pixels`.
    """
    if name == "blurred":
        return np.stack([blurred(image) for image in pixels])
    return np.full_like(pixels, GREY if name == "grey" else 0)


def to_draw(heatmaps: NDArray[np.float32]) -> NDArray[np.float32]:
    """Prepare heatmaps for people: a few single pixels are far above all others, and hide them.

    Args:
        heatmaps: (k, height, width), in [0, 1].

    Returns:
        Smoothed by about a pixel, and 1 where they are above their 99th percentile.
    """
    drawn = np.empty_like(heatmaps)
    for index, heatmap in enumerate(heatmaps):
        smooth = cv2.GaussianBlur(heatmap, (0, 0), SMOOTHING * max(heatmap.shape))
        top = np.percentile(smooth, PERCENTILE) or smooth.max()
        drawn[index] = np.clip(smooth / top, 0, 1) if top else 0
    return drawn


def positions_and_shares(method: Method) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where on the line from 0, the baseline, to 1, the image, the slopes are taken, and their shares.

    Args:
        method: Its steps, and which of them are to be computed.

    Returns:
        Both (m,); the shares of all steps sum to 1.
    """
    nodes, weights = np.polynomial.legendre.leggauss(method.steps or STEPS)
    part = slice(*(method.part or (None,)))
    return ((nodes[part] + 1) / 2).astype(np.float32), (weights[part] / 2).astype(np.float32)


def parts(method: Method) -> Iterator[Method]:
    """The method for each part of its steps."""
    steps = method.steps or STEPS
    for first in range(0, steps, STEPS_AT_ONCE):
        yield replace(method, flip=False, part=(first, min(first + STEPS_AT_ONCE, steps)))


def images_at_once(classes: int, input_size: tuple[int, int]) -> int:
    """The number of images whose attributions may be in memory at once, as those of a shard are.

    Args:
        classes: Explained in each image.
        input_size: Height and width of the network's input in pixels.
    """
    return max(MAX_VALUES // (classes * input_size[0] * input_size[1]), 1)


def integrate(
    compute: Compute,
    score: Callable[[InputPixels], NDArray[np.float32]],
    pixels: InputPixels,
    wanted: NDArray[np.int32],
    method: Method,
    head: str,
) -> Computed:
    """Compute the attributions of n images, part by part, and check their sums.

    Args:
        compute: `Network.compute`, wherever it runs.
        score: `Network.scores`, likewise.
        pixels: (n, height, width, channels), uint8.
        wanted: (n, k): see `Network.compute`.
        method: How to compute them; with `flip` they are averaged with those of the mirror images.
        head: How scores become probabilities: see `NetworkFacts.head`.

    Returns:
        What `Network.compute` returns, with `completeness_error`.
    """
    plain, raw, difference = _of_one_side(compute, score, pixels, wanted, method, head)
    if method.flip:
        mirrored = np.ascontiguousarray(pixels[:, :, ::-1])
        _, other_raw, other = _of_one_side(compute, score, mirrored, plain.class_ids, method, head)
        raw, difference = (raw + other_raw[..., ::-1]) / 2, (difference + other) / 2
    floor = MIN_SHARE * np.abs(raw).sum(axis=(2, 3))
    scale = np.maximum(np.maximum(np.abs(difference), floor), np.finfo(np.float32).tiny)
    error = np.abs(raw.sum(axis=(2, 3)) - difference) / scale
    return replace(plain, raw=np.asarray(raw, np.float32), completeness_error=np.asarray(error, np.float32))


def _of_one_side(
    compute: Compute,
    score: Callable[[InputPixels], NDArray[np.float32]],
    pixels: InputPixels,
    wanted: NDArray[np.int32],
    method: Method,
    head: str,
) -> tuple[Computed, NDArray[np.float64], NDArray[np.float64]]:
    """The results without the mirror images: those of the first part, the attributions (n, k, height, width),
    and the difference that they should sum to, (n, k).
    """
    first, *others = parts(method)
    plain = compute(pixels, wanted, first)
    raw = plain.raw.astype(np.float64)
    for part in others:  # ranks are those of the first part: they may change with the last digits of scores
        raw += compute(pixels, plain.class_ids, part).raw
    at_image, at_baseline = (
        explained_score(scores.astype(np.float64), plain.class_ids, method, head)
        for scores in (plain.scores, score(baseline(pixels, method.baseline)))
    )
    return plain, raw, at_image - at_baseline
