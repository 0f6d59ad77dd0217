"""What a GPU is doing, by its driver: memory in use and how busy it was. Of no GPU nothing can be said."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

log = logging.getLogger("gradcam")

PERCENT = 100


@dataclass(frozen=True)
class DeviceUse:
    """What a GPU is doing; None where it does not say."""

    memory_bytes: int | None = None  # in use, whoever uses it
    utilization: float | None = None  # 0 to 1: the share of the last moment in which it was busy


def watch(name: str, library: ModuleType | Any | None = None) -> Callable[[], DeviceUse] | None:
    """What tells how a GPU is used, `name` being its UUID or number; None where nobody can.

    `library` is pynvml (extra gpu), unless it is given.
    """
    try:
        pynvml = library or _pynvml()
        pynvml.nvmlInit()
        by = pynvml.nvmlDeviceGetHandleByIndex if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID
        handle = by(int(name) if name.isdecimal() else name)
    except ImportError:
        log.info("the GPU's own metrics need the extra gpu: pip install 'gradcam-worker[gpu]'")
        return None
    except Exception as error:  # noqa: BLE001  # whatever a driver may raise: there are no such metrics, then
        log.warning("GPU %s has no metrics: %s", name, error)
        return None

    def said(look: Callable[[Any], Any]) -> Any:
        try:
            return look(handle)
        except pynvml.NVMLError:  # a part of a GPU does not say how busy it is
            return None

    def use() -> DeviceUse:
        memory, busy = said(pynvml.nvmlDeviceGetMemoryInfo), said(pynvml.nvmlDeviceGetUtilizationRates)
        return DeviceUse(memory and int(memory.used), busy and busy.gpu / PERCENT)

    return use


def _pynvml() -> Any:
    import pynvml  # type: ignore[import-not-found,unused-ignore]  # only the extra gpu has it

    return pynvml
