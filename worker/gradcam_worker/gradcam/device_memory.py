"""Whether an error means that the memory of the device is full, and who has it: this process or another."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from gradcam_worker.errors import NO_DEVICE_MEMORY, DeviceOccupied, DeviceOutOfMemory
from gradcam_worker.gradcam import backend

GIB = 2**30
FULL = ("ResourceExhaustedError", "OutOfMemoryError", "MemoryError")  # names of classes of the backends
FULL_TEXTS = (
    "resource_exhausted",
    "out of memory",
    "out_of_memory",
    "dst tensor is not initialized",  # of TensorFlow, which had no room for an array that it copied
    "failed to allocate",
    "alloc_failed",  # of cuBLAS and cuDNN
)
# What CUDA's libraries say if they have no room for themselves, and for other reasons.
UNUSABLE_TEXTS = ("without blas support", "dnn library", "_status_not_initialized", "cudnn_status_internal")
LITTLE_BYTES = GIB  # a GPU with less free memory is full for those libraries


@dataclass(frozen=True)
class GpuMemory:
    """The memory of a GPU, or of a slice of one, in bytes."""

    total: int
    free: int
    own: int = 0  # kept by this process

    @property
    def others(self) -> int:
        """What neither is free nor kept by this process: other processes, and each one's libraries."""
        return max(self.total - self.free - self.own, 0)

    def __str__(self) -> str:
        return (
            f"{self.free / GIB:.1f} of {self.total / GIB:.1f} GiB of the GPU are free, "
            f"{self.own / GIB:.1f} are kept by this process, {self.others / GIB:.1f} are elsewhere"
        )


def read_gpu_memory(name: str | None = None, library: ModuleType | Any | None = None) -> GpuMemory | None:
    """Read the memory of a GPU; None without a GPU, or where its driver does not say.

    Args:
        name: Its UUID or number; None: the first one that this process sees.
        library: In place of pynvml (extra gpu).
    """
    try:
        pynvml = library or _pynvml()
        pynvml.nvmlInit()
        name = name or os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        if name.startswith(("GPU-", "MIG-")):
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        else:
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(name))
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return GpuMemory(int(memory.total), int(memory.free), backend.memory_kept())
    except Exception:  # noqa: BLE001  # this explains an error, and must not raise another one
        return None


def _pynvml() -> Any:
    import pynvml  # type: ignore[import-not-found,unused-ignore]  # only the extra gpu has it

    return pynvml


def is_out_of_memory(error: BaseException, memory: GpuMemory | None = None) -> bool:
    """Whether an error, or one of its causes, means that there was no memory.

    Args:
        error: Of a backend, or raised from one.
        memory: Of the GPU, if there is one: with little of it free, its libraries cannot start.
    """
    texts = UNUSABLE_TEXTS if memory and memory.free < LITTLE_BYTES else ()
    return any(
        any(name in FULL for name in (kind.__name__ for kind in type(cause).__mro__))
        or any(text in str(cause).casefold() for text in (*FULL_TEXTS, *texts))
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


@contextmanager
def explained(use: str) -> Iterator[None]:
    """Raise an error of ours for a backend's own that means that the memory of its device is full.

    Args:
        use: What the memory is needed for: `a pass over arrays of (32, 224, 224, 3)`.

    Raises:
        DeviceOutOfMemory: There was no memory. The message says how much of a GPU is free.
        DeviceOccupied: There was none, and other processes have more than half of it.
    """
    try:
        yield
    except NO_DEVICE_MEMORY:
        raise
    except Exception as error:
        memory = read_gpu_memory()
        if not is_out_of_memory(error, memory):
            raise
        message = f"No device memory for {use}"
        if memory and 2 * memory.others > memory.total:
            message += f": {memory}. Other processes use this GPU: `nvidia-smi` on its host names them."
            raise DeviceOccupied(message) from error
        message += f": {memory}." if memory else "."
        raise DeviceOutOfMemory(message) from error
