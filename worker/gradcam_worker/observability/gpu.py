"""Memory and utilization of a GPU, as its NVIDIA driver reports them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from gradcam_worker import extras
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")


@dataclass(frozen=True)
class DeviceUse:
    """Memory and utilization of a GPU; None where the driver does not report a value."""

    memory_bytes: int | None = None  # in use, by any process
    utilization: float | None = None  # 0 to 1: the share of the driver's last sample in which it was busy


def usage_reader(name: str, library: ModuleType | Any | None = None) -> Callable[[], DeviceUse] | None:
    """Return a function that reads the usage of a GPU, or None if it cannot be read.

    Args:
        name: The GPU's UUID or number.
        library: In place of pynvml (extra gpu).
    """
    try:
        pynvml = library or _pynvml()
        pynvml.nvmlInit()
        if name.isdecimal():
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(name))
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
    except ImportError:
        log.info("gpu_metrics_unavailable", gpu=name, reason=extras.describe("pynvml", "This", "gpu"))
        return None
    except Exception as error:  # noqa: BLE001  # any error of a driver: the worker runs without these metrics
        log.warning("gpu_metrics_failed", gpu=name, error=error)
        return None

    def query(function: Callable[[Any], Any]) -> Any:
        try:
            return function(handle)
        except pynvml.NVMLError:  # MIG devices do not report utilization
            return None

    def read() -> DeviceUse:
        memory, rates = query(pynvml.nvmlDeviceGetMemoryInfo), query(pynvml.nvmlDeviceGetUtilizationRates)
        return DeviceUse(memory and int(memory.used), rates and rates.gpu / 100)  # from percent

    return read


def _pynvml() -> Any:
    import pynvml  # type: ignore[import-not-found,unused-ignore]  # only the extra gpu has it

    return pynvml
