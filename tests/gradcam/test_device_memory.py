"""A full device, as the backends report it. The GPU is a double of pynvml: no test machine has one."""

from types import SimpleNamespace
from typing import Any

import pytest

from gradcam_worker.errors import DeviceOccupied, DeviceOutOfMemory, NetworkIncompatible

pytestmark = pytest.mark.tensorflow

GIB = 2**30


def driver(free: int, total: int = 24 * GIB) -> Any:
    """A driver with one GPU, or one slice of a GPU, that has so much free memory."""
    memory = SimpleNamespace(free=free, total=total, used=total - free)
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex={0: "first"}.__getitem__,
        nvmlDeviceGetHandleByUUID={"MIG-1": "slice"}.__getitem__,
        nvmlDeviceGetMemoryInfo={"first": memory, "slice": SimpleNamespace(free=1, total=5)}.__getitem__,
    )


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 GiB"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 8 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (ValueError("Failed copying input tensor to GPU:0: Dst tensor is not initialized."), True),
        (ValueError("failed call to cuInit: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (MemoryError(), True),
        (RuntimeError("INTERNAL: no kernel image is available"), False),
        (RuntimeError("DNN library initialization failed."), False),
    ],
)
def test_running_out_of_memory_is_distinguished_from_other_errors(error: Exception, full: bool) -> None:
    from gradcam_worker.gradcam.device_memory import is_out_of_memory

    assert is_out_of_memory(error) is full
    wrapped = NetworkIncompatible("It cannot be run.")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) is full


def test_libraries_that_do_not_start_on_a_full_gpu_have_no_memory() -> None:
    from gradcam_worker.gradcam.device_memory import is_out_of_memory, read_gpu_memory

    error = RuntimeError("DNN library initialization failed.")
    assert is_out_of_memory(error, read_gpu_memory(library=driver(free=GIB // 2)))
    assert not is_out_of_memory(error, read_gpu_memory(library=driver(free=20 * GIB)))


def test_the_memory_is_that_of_the_gpu_or_slice_that_this_process_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gradcam_worker.gradcam import device_memory

    whole = device_memory.read_gpu_memory(library=driver(free=GIB // 2))
    assert str(whole) == (
        "0.5 of 24.0 GiB of the GPU are free, 0.0 are kept by this process, 23.5 are elsewhere"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert device_memory.read_gpu_memory(library=driver(free=0)) == device_memory.GpuMemory(total=5, free=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_memory.read_gpu_memory(library=driver(free=0)) is None


def test_a_network_that_finds_no_memory_is_not_incompatible_and_the_error_says_who_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tensorflow as tf

    from gradcam_worker.gradcam import device_memory
    from gradcam_worker.gradcam.backend import keras
    from gradcam_worker.gradcam.models.loading import load_network

    def full(*_: object, **__: object) -> None:
        raise tf.errors.InternalError(None, None, "Dst tensor is not initialized.")

    monkeypatch.setattr(device_memory, "_pynvml", lambda: driver(free=GIB // 4))
    monkeypatch.setattr(keras.Model, "load_weights", full)
    with pytest.raises(DeviceOccupied) as raised:
        load_network("efficientnet_lite0", forward="tensorflow")
    assert str(raised.value) == (
        "No device memory for the network efficientnet_lite0: 0.2 of 24.0 GiB of the GPU are free, 0.0 are "
        "kept by this process, 23.8 are elsewhere. Other processes use this GPU: `nvidia-smi` on its "
        "host names them."
    )
    monkeypatch.undo()
    assert load_network("efficientnet_lite0", forward="tensorflow").facts.map_size == (7, 7)


@pytest.mark.parametrize(
    ("free", "kept", "kind"),
    [
        (23 * GIB, GIB // 50, DeviceOutOfMemory),  # libraries of this process, and an image that is too large
        (GIB // 4, 20 * GIB, DeviceOutOfMemory),
        (GIB // 4, 12 * GIB, DeviceOutOfMemory),
        (GIB // 4, 2 * GIB, DeviceOccupied),
    ],
    ids=["almost empty", "a large pool of this process", "half of it", "others have it"],
)
def test_a_gpu_is_occupied_only_where_others_have_most_of_it(
    free: int, kept: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradcam_worker.gradcam import backend, device_memory

    monkeypatch.setattr(device_memory, "_pynvml", lambda: driver(free=free))
    monkeypatch.setattr(backend, "memory_kept", lambda: kept)
    with pytest.raises(kind), device_memory.explained("a pass"):
        raise MemoryError


def test_what_tensorflow_keeps_is_the_largest_peak_also_after_a_reset(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tensorflow as tf

    from gradcam_worker.gradcam import backend

    info = {"current": 2, "peak": 70}
    monkeypatch.setattr(backend, "device_name", lambda: "NVIDIA L4")
    monkeypatch.setattr(backend, "_earlier_peak", {"bytes": 0})
    monkeypatch.setattr(tf.config.experimental, "get_memory_info", lambda _: info)
    monkeypatch.setattr(tf.config.experimental, "reset_memory_stats", lambda _: info.update(peak=2))
    assert backend.memory_kept() == 70
    backend.reset_peak_memory()
    assert (backend.peak_memory(), backend.memory_kept()) == (2, 70)
    backend.reset_peak_memory()
    assert backend.memory_kept() == 70
