"""Mutated images against the decoder.

Every image is decoded in a child process that may have no more than MEMORY_BYTES. It has to end in pixels or
in an error of `gradcam_worker.errors` that an image may have; any other outcome, and any end of the child, is
a broken promise.
"""

import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np

from devtools.faults.image_mutations import mutations
from devtools.faults.verdict import Verdict
from devtools.processes import peak_resident_mb

MEMORY_BYTES = 1_536 * 1024**2  # what decoding the largest image that is allowed takes, twice
# What an image may end in. `internal` is not among them: memory is enough for one at a time.
TYPED = {"decoded", "image_decode_failed", "image_pixels_exceeded", "unsupported_media_type"}
CRASH = "crash"  # the child has ended, or hung and had to be ended
STALLED_S = 120  # for one image: far beyond what any may take, on any machine
CHANNELS = 3  # of decoded pixels


def attack(count: int, seed: int) -> Verdict:
    """Decode `count` mutated images; `faults` counts those that were not decoded."""
    outcomes: Counter[str] = Counter()
    verdict = Verdict(jobs=count)
    peak_mb, slowest = 0.0, (0.0, "none")  # seconds, and which it was
    child = _start_child()
    for mutant in mutations(count, seed):
        try:
            ending, seconds, child_mb = child.submit(_decode, mutant.data).result()
        except BrokenProcessPool:
            ending, seconds, child_mb = CRASH, 0.0, 0.0
            child.shutdown()
            child = _start_child()
        outcomes[ending] += 1
        slowest, peak_mb = max(slowest, (seconds, mutant.name)), max(peak_mb, child_mb)
        verdict.require(ending in TYPED, f"{mutant.name}: {ending}")
    child.shutdown()
    crashes = outcomes.pop(CRASH, 0)
    verdict.faults = count - outcomes["decoded"]
    verdict.untyped = sum(number for ending, number in outcomes.items() if ending not in TYPED)
    verdict.figures = {
        "crashes": crashes,
        "slowest_s": round(slowest[0], 3),
        "slowest": slowest[1],
        "peak_mb": round(peak_mb),
        "outcomes": dict(sorted(outcomes.items())),
    }
    return verdict


def _start_child() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_limit_child)


def _limit_child() -> None:
    from gradcam_worker.resilience.budget import limit_memory

    limit_memory(MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")  # Pillow warns of some damage
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123  # libpng and libjpeg comment on every image
        os.dup2(nothing.fileno(), sys.stderr.fileno())


def _decode(data: bytes) -> tuple[str, float, float]:
    """In the child: how an image ended, the seconds that took, and the child's most memory, MiB."""
    from gradcam_worker.errors import GradcamError
    from gradcam_worker.gradcam.decoding.decode import decode, read_structure

    signal.alarm(STALLED_S)
    begun = time.monotonic()
    try:
        declared = read_structure(data).declared_pixels
        pixels = decode(data).pixels
        rows, columns, channels = pixels.shape
        good = rows * columns == declared and channels == CHANNELS and pixels.dtype == np.uint8
        ending = "decoded" if good else f"wrong: {pixels.shape} {pixels.dtype}, {declared} declared"
    except GradcamError as error:
        ending = error.code
    except BaseException as error:  # noqa: BLE001  # anything at all is what is looked for
        ending = f"untyped: {type(error).__name__}: {str(error)[:100]}"
    signal.alarm(0)
    return ending, time.monotonic() - begun, peak_resident_mb()
