"""Integrated Gradients of one image, part by part, wherever the parts are computed."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.explain import extract_explanation, pad_selections
from gradcam_worker.gradcam.methods import integrated
from gradcam_worker.gradcam.network import Classifier, Computed, InputPixels, Method
from gradcam_worker.inference.request import InferenceResponse, InferenceResult


def infer_in_parts(
    network: Classifier,
    pixels: InputPixels,
    classes: tuple[int, ...],
    method: Method,
    infer_part: Callable[[InputPixels, tuple[int, ...], Method], InferenceResponse],
    score: Callable[[InputPixels], NDArray[np.float32]],
) -> InferenceResult:
    """Explain one image.

    Args:
        network: The network.
        pixels: (height, width, channels), at its input size.
        classes: From `ClassIndex.select`.
        method: Integrated Gradients.
        infer_part: Computes a part of the method's steps for the image and classes, in a batch with others.
        score: `Network.scores`, wherever it runs.

    Returns:
        The explanation, the sums of the times of all parts, and the size of the last part's batch.

    Raises:
        GradcamError: Whatever `infer_part` and `score` raise.
        NetworkIncompatible: The network's scores are not finite.
    """
    responses: list[InferenceResponse] = []

    def compute(images: InputPixels, wanted: NDArray[np.int32], part: Method) -> Computed:
        ids = tuple(wanted[0].tolist())
        response = infer_part(images[0], ids, part)
        responses.append(response)
        return response.computed.of(slice(response.index, response.index + 1), len(ids))

    selected = pad_selections([classes])
    computed = integrated.integrate(compute, score, pixels[None], selected, method, network.facts.head)
    return InferenceResult(
        extract_explanation(network, computed, 0, classes, method),
        sum(response.waited_s for response in responses),
        sum(response.computed_s for response in responses),
        responses[-1].batch_size,
    )
