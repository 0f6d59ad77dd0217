"""The devices that a worker computes on: one process for each, which sees no other device.

GPUs are counted without importing a backend, so that the supervisor stays small and takes no memory on a GPU.
"""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.settings import Settings

VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"  # the GPUs that a process sees, in order: numbers or UUIDs
# Jobs run in parallel: neither an operation on one image nor a request of one object needs several threads.
FEW_THREADS = {
    "OPENCV_FOR_THREADS_NUM": "1",  # read when OpenCV is imported
    "TOKIO_WORKER_THREADS": "1",  # of obstore; by default one for each core, and they wake one another
}
GPU_LINE = re.compile(r"^( *)(?:GPU|MIG) .*\(UUID: ([^)]+)\)", re.MULTILINE)  # a line of `nvidia-smi -L`
LISTING_TIMEOUT_S = 30  # the driver may have to wake several GPUs first
BATCH_SIZE = 32  # of a GPU, to choose the number of threads where GRADCAM_MAX_BATCH is 0


@dataclass(frozen=True)
class Device:
    """The device of one process."""

    name: str  # in log lines
    environment: Mapping[str, str]  # the whole environment of that process
    number: int = 0  # as in GRADCAM_DEVICES
    is_gpu: bool = False


def choose(settings: Settings) -> list[Device]:
    """Choose the devices that the settings name, with one process for each.

    Where `CUDA_VISIBLE_DEVICES` is set, only its GPUs exist, and numbers count them. Without a GPU, `auto` is
    one process, on whatever its backend finds.

    Args:
        settings: `devices`, `threads` and `max_batch`.

    Returns:
        The devices in order, at least one.

    Raises:
        InvalidSettings: A GPU is named that does not exist, or twice.
    """
    environment = {**FEW_THREADS, **settings.environment_for_child()}
    if settings.devices == "cpu":
        return [Device("cpu", {**environment, VISIBLE_GPUS: ""})]
    gpus = visible_gpus(environment)
    is_auto = settings.devices == "auto"
    numbers = [*range(len(gpus))] if is_auto else [int(number) for number in settings.devices.split(",")]
    for position, number in enumerate(numbers):
        if number >= len(gpus):
            existing = ", ".join(f"{index} ({gpu})" for index, gpu in enumerate(gpus)) or "none"
            message = f"GRADCAM_DEVICES or --devices asks for GPU {number}; there are: {existing}."
            raise InvalidSettings(message)
        if number in numbers[:position]:
            message = (
                f"GRADCAM_DEVICES or --devices names GPU {number} twice. GRADCAM_JOB_PROCESSES says how many "
                "processes feed each."
            )
            raise InvalidSettings(message)
    if not numbers:
        return [Device("default device", environment)]
    if "threads" not in settings.model_fields_set:
        # While one batch is computed, the next is fetched and decoded, and the last encoded and stored.
        threads = 2 * (settings.max_batch or BATCH_SIZE)
        environment |= settings.model_copy(update={"threads": threads}).to_environment()
    return [
        Device(f"GPU {number}", {**environment, VISIBLE_GPUS: gpus[number]}, number, is_gpu=True)
        for number in numbers
    ]


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that this process may use: its affinity, and the quota of its cgroup.

    Args:
        root: The folder of `proc` and `sys`.

    Returns:
        At least 1. A quota of 2.5 cores is 2.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for quota in _cpu_quotas(root) if quota]
    return max(int(min([cores, *quotas])), 1)


def _cpu_quotas(root: Path) -> Iterator[float | None]:
    """The cores that each control group of this process may use; None: no limit."""
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        own = groups / controllers / name.lstrip("/")
        # In a container the name may be the host's, whose folder does not exist here: the top is its own.
        for folder in (own, *own.parents):
            if folder.is_relative_to(groups):
                yield _cpu_quota(folder)


def _cpu_quota(folder: Path) -> float | None:
    """The cores that a control group may use: version 2 has one file, version 1 has two."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (
            (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
        )
        return None if int(quota) < 0 else int(quota) / int(period)
    return None


def use_single_device(settings: Settings) -> Settings:
    """Restrict this process to the one device that the settings name. Call it before a backend is imported.

    Args:
        settings: The settings of this process.

    Returns:
        The settings with what the device changes.

    Raises:
        InvalidSettings: The settings name several devices.
    """
    first, *others = choose(settings)
    if others:
        message = (
            f"One process computes on one device, not on {1 + len(others)}: name it, as in --devices 0, or "
            "let the supervisor start a process for each, without --unsupervised."
        )
        raise InvalidSettings(message)
    os.environ.update(first.environment)
    return Settings.from_environment(first.environment)


def visible_gpus(environment: Mapping[str, str], dev: Path = Path("/dev")) -> list[str]:
    """Return the names by which `CUDA_VISIBLE_DEVICES` can select the GPUs that a process sees.

    Args:
        environment: The environment of that process.
        dev: The folder of device files.

    Returns:
        UUIDs or numbers, in order.
    """
    gpus = _local_gpus(environment, dev)
    if VISIBLE_GPUS not in environment or not gpus:
        return gpus
    names: list[str] = []
    for name in (part.strip() for part in environment[VISIBLE_GPUS].split(",")):
        exists = int(name) < len(gpus) if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
        if not exists:
            break  # CUDA, too, ignores the rest after the first that does not exist
        names.append(name)
    return names


def _local_gpus(environment: Mapping[str, str], dev: Path) -> list[str]:
    """The GPUs of this machine or container: UUIDs where nvidia-smi lists them, else numbers."""
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    listing = _listing(tool, environment) if tool else ""
    uuids: list[str] = []
    gpu_index = 0  # of the last whole GPU: its MIG devices, if any, replace it
    for indent, uuid in GPU_LINE.findall(listing):
        if not indent:
            gpu_index = len(uuids)
        elif len(uuids) == gpu_index + 1 and uuids[gpu_index].startswith("GPU-"):
            uuids.pop()
        uuids.append(uuid)
    # A file name has the GPU's number on the host; in a container CUDA counts the GPUs that it sees from 0.
    return uuids or [str(number) for number, _ in enumerate(dev.glob("nvidia[0-9]*"))]


def _listing(tool: str, environment: Mapping[str, str]) -> str:
    try:
        return subprocess.run(
            [tool, "-L"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LISTING_TIMEOUT_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):  # no driver, or it does not answer
        return ""
