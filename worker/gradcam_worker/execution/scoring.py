"""Explains an image by a method that needs nothing but scores: pass after pass, each as a bulk request.

So the jobs of others run between two passes, and the deadline and a cancellation are checked there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import JobTimeout, with_sentence
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.gradcam.explain import Explanation, choose_method, explain_by_scores
from gradcam_worker.gradcam.network import Classifier, InputPixels, Method, NetworkFacts
from gradcam_worker.inference.client import InferenceClient
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.schemas.status import PassState


def method_of(spec: MethodSpec, facts: NetworkFacts) -> Method:
    """The method that a job asks for, with what it leaves open; the network's default where it names none.

    Args:
        spec: Of the job.
        facts: Of the network.

    Raises:
        InvalidJob: A parameter does not fit to the network.
        MethodNotSupported: The network only gives scores, and the method needs more.
    """
    given = dict(spec)
    if not spec.is_named and facts.scores_only:
        given["name"] = choose_method(None, facts).name
    return choose_method(Method(**given), facts)


def spec_of(method: Method) -> MethodSpec:
    """A method with nothing left open, as it stands in documents."""
    return MethodSpec(**{name: getattr(method, name) for name in MethodSpec.model_fields})


def explain_in_passes(
    inference: InferenceClient[Any],
    network: Classifier,
    pixels: InputPixels,
    classes: tuple[int, ...],
    method: Method,
    context: JobContext,
    report: Callable[[PassState], None] = lambda _: None,
    values: NDArray[np.float32] | None = None,
) -> Explanation:
    """Explain one image.

    Args:
        inference: Scores the images.
        network: The network.
        pixels: The image (height, width, channels), at the network's input size.
        classes: From `ClassIndex.select`.
        method: From `method_of`.
        context: The attempt. It is told that the job is alive.
        report: Called before the first pass, and after each.
        values: Of further inputs (width,), which all passes get; None: the network has none.

    Returns:
        The explanation.

    Raises:
        NetworkIncompatible: The network returns no valid scores.
        JobTimeout: The deadline passed.
        JobCanceled: The job was cancelled.
    """
    passes = PassState(done=0, total=0)

    def passed(done: int, total: int) -> None:
        nonlocal passes
        passes = PassState(done=done, total=total)
        context.progressed()
        report(passes)
        context.deadline.check(f"pass {done + 1} of {total}" if done < total else "explain")

    score = partial(inference.scores, network, deadline=context.deadline, bulk=True, values=values)
    try:
        return explain_by_scores(network, score, pixels, classes, method, passed)
    except JobTimeout as error:
        advice = "give more time (timeout_s), or take " + (
            "fewer masks" if method.name == "rise" else "a larger stride"
        )
        raise with_sentence(error, f"{passes.done} of {passes.total} passes were done: {advice}.") from error
