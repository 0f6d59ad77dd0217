"""The network of the attacks' workers, and what befalls a process that has to do with certain images.

The network kills its process when it computes a poison image, as a bug in native code would. A panic
image makes the thread that decodes it raise what is no Exception, as a library in Rust does. Where there are
job processes, each has shared memory for few images, and one that has half of an image of `KILLED` or
`SUSPENDED` there kills or suspends itself, if somebody has asked for it: see `hit_in_write`.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.gradcam.decoding.decode import Decoded
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method
from gradcam_worker.inference.pixel_pool import ALIGNMENT, HEADER_BYTES, Block
from gradcam_worker.testing import TinyNetwork

NETWORK = TinyNetwork.facts.name
POISON = (255, 0, 255)  # an image of this colour alone
PANICS = (0, 255, 255)
KILLED, SUSPENDED = (255, 255, 0), (0, 0, 255)
IN_WRITE = {KILLED: signal.SIGKILL, SUSPENDED: signal.SIGSTOP}
ARMED = "in-write"  # a file in the temporary folder: the first process that is to be hit renames it
IMAGES_IN_POOL = 6  # of a job process
POOL_BYTES = HEADER_BYTES + IMAGES_IN_POOL * (ALIGNMENT + TinyNetwork.SIDE**2 * 3)
NEAR = 12  # how far a compressed image may be from its colour
# What stands where `gradcam_worker.gradcam.backend` imports Keras: it says that there is a CPU.
NO_KERAS: Any = SimpleNamespace(
    name=lambda: "numpy",
    version=lambda: f"numpy {np.__version__}",
    device_name=lambda: "cpu",
    peak_memory=lambda: None,
    reset_peak_memory=lambda: None,
    set_intra_op_threads=lambda _: None,
)


def _shows(image: NDArray[np.uint8], color: tuple[int, int, int]) -> bool:
    """Whether an image has this colour alone."""
    return bool(np.abs(image.astype(np.int16) - np.array(color, np.int16)).max() < NEAR)


class Poisonable(TinyNetwork):
    """Explains any image but one."""

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        """See `TinyNetwork.compute`; a poison image kills the process."""
        if any(_shows(image, POISON) for image in pixels):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute(pixels, wanted, method)


def hit_in_write(write: Callable[..., None]) -> Callable[..., None]:
    """Hit this process when half of an image is written, once for each file `ARMED`.

    The file is renamed to `in-write-` and the id of the process before.
    """
    folder = Path(tempfile.gettempdir())

    def write_and_hit(block: Block, pixels: NDArray[np.uint8], *values: Any) -> None:
        number = next((number for colour, number in IN_WRITE.items() if _shows(pixels, colour)), None)
        if number and (armed := folder / ARMED).exists():
            write(block, pixels[: len(pixels) // 2])
            armed.rename(folder / f"{ARMED}-{os.getpid()}")
            os.kill(os.getpid(), number)
        write(block, pixels, *values)

    return write_and_hit


class Panic(BaseException):
    """What a library in Rust raises for what it takes for impossible."""


def panicking(decode: Callable[..., Decoded]) -> Callable[..., Decoded]:
    """Decode any image but one."""

    def decode_or_panic(*args: Any, **options: Any) -> Decoded:
        decoded = decode(*args, **options)
        if _shows(decoded.pixels, PANICS):
            raise Panic
        return decoded

    return decode_or_panic


def do_without_keras() -> None:
    """Let whoever imports the backend find `NO_KERAS`."""
    import gradcam_worker.gradcam

    sys.modules["gradcam_worker.gradcam.backend"] = gradcam_worker.gradcam.backend = NO_KERAS
