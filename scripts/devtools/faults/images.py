"""Mutated images against the decoder.

Every image is decoded in a child process that may have no more than MEMORY_BYTES: this module, run as a
program. It has to end in pixels or in an error of `gradcam_worker.errors` that an image may have; any other
outcome, and any end of the child, is a broken promise.
"""

import json
import os
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from devtools import command, import_path
from devtools.faults.image_mutations import Mutant, mutations
from devtools.faults.verdict import Verdict
from devtools.processes import peak_resident_mb

MEMORY_BYTES = 1_536 * 1024**2  # what decoding the largest image that is allowed takes, twice
TYPED = {  # what an image may end in. `internal` is not among them: memory is enough for one at a time
    "decoded",
    "image_decode_failed",
    "image_pixels_exceeded",
    "unsupported_media_type",
}
STALLED_S = 120  # for one image: far beyond what any may take, on any machine
CHANNELS = 3  # of decoded pixels


def attack(count: int, seed: int, keep: Path | None = None) -> Verdict:
    """Decode `count` mutated images. Those that broke a promise are put into the folder `keep`.

    `faults` counts those that were not decoded.
    """
    outcomes: Counter[str] = Counter()
    broken: list[str] = []
    crashes, peak_mb = 0, 0.0
    slowest = (0.0, "none")  # seconds, and which it was
    waiting = list(mutations(count, seed))[::-1]
    while waiting:
        with _child() as (ask, answer):
            while waiting:
                mutant = waiting.pop()
                said = _decoded(mutant, ask, answer)
                if said is None:  # it has ended, or hangs and has to be ended
                    crashes += 1
                    _note(mutant, "crash", broken, keep)
                    break
                outcomes[said["ending"]] += 1
                slowest = max(slowest, (said["seconds"], mutant.name))
                peak_mb = max(peak_mb, said["peak_mb"])
                if said["ending"] not in TYPED:
                    _note(mutant, said["ending"], broken, keep)
    return Verdict(
        jobs=count,
        faults=count - outcomes["decoded"],
        untyped=sum(number for ending, number in outcomes.items() if ending not in TYPED),
        figures={
            "crashes": crashes,
            "slowest_s": round(slowest[0], 3),
            "slowest": slowest[1],
            "peak_mb": round(peak_mb),
            "outcomes": dict(sorted(outcomes.items())),
        },
        broken=broken,
    )


def _note(mutant: Mutant, ending: str, broken: list[str], keep: Path | None) -> None:
    broken.append(f"{mutant.name}: {ending}")
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{len(broken)} {mutant.name} {ending}").write_bytes(mutant.data)


@contextmanager
def _child() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A process that decodes what it is sent."""
    child = command("faults.images")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    # On its standard error libpng and libjpeg say what they think of every image.
    with subprocess.Popen(
        child, **pipes, env={**os.environ, **import_path()}, stderr=subprocess.DEVNULL
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError
        try:
            yield process.stdin, process.stdout
        finally:
            process.kill()


def _decoded(mutant: Mutant, ask: IO[bytes], answer: IO[bytes]) -> dict[str, Any] | None:
    try:
        ask.write(struct.pack(">I", len(mutant.data)) + mutant.data)
        ask.flush()
        line = answer.readline()
    except BrokenPipeError:
        return None
    return json.loads(line) if line else None


def decode_all() -> None:
    """The child: images from standard input, one line of figures for each on standard output."""
    import resource
    import signal

    from gradcam_worker.errors import GradcamError
    from gradcam_worker.gradcam.decoding.decode import declared_pixels, decode
    from gradcam_worker.resilience.budget import limit_memory

    limit_memory(MEMORY_BYTES)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")  # Pillow warns of some damage
    while head := sys.stdin.buffer.read(4):
        data = sys.stdin.buffer.read(struct.unpack(">I", head)[0])
        signal.alarm(STALLED_S)
        begun = time.monotonic()
        try:
            declared = declared_pixels(data)
            pixels = decode(data).pixels
            rows, columns, channels = pixels.shape
            good = rows * columns == declared and channels == CHANNELS and pixels.dtype == np.uint8
            ending = "decoded" if good else f"wrong: {pixels.shape} {pixels.dtype}, {declared} declared"
        except GradcamError as error:
            ending = error.code
        except BaseException as error:  # noqa: BLE001  # anything at all is what is looked for
            ending = f"untyped: {type(error).__name__}: {str(error)[:100]}"
        signal.alarm(0)
        said = {"ending": ending, "seconds": time.monotonic() - begun, "peak_mb": peak_resident_mb()}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    decode_all()
