"""Which devices a worker computes on: one process for each, which sees its own and no other.

They are counted without importing a backend: the supervisor stays small, and takes no memory on any GPU.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.settings import Settings

VISIBLE = "CUDA_VISIBLE_DEVICES"  # which GPUs a process sees, in order: numbers or UUIDs
OPENCV_THREADS = "OPENCV_FOR_THREADS_NUM"  # of one operation; read when OpenCV is imported
LISTED = re.compile(r"^( *)(?:GPU|MIG) .*\(UUID: ([^)]+)\)", re.MULTILINE)  # a line of `nvidia-smi -L`
LISTING_S = 30  # the driver may have to wake several GPUs first
BATCH = 32  # images in hand for a GPU at a time, where the settings name no largest batch


@dataclass(frozen=True)
class Device:
    """What one process computes on."""

    name: str  # as logs say it
    environment: Mapping[str, str]  # of that process, whole


def choose(settings: Settings) -> list[Device]:
    """The devices that the settings ask for, a process for each.

    Where GPUs are visible by `CUDA_VISIBLE_DEVICES` already, these are all there are, and numbers count
    them. Where there are none, `auto` is one process, on whatever its backend finds.

    Raises InvalidSettings where a GPU is asked for that is not there.
    """
    # Jobs run beside each other: none of them needs several threads for one picture.
    environment = {OPENCV_THREADS: "1", **settings.environment_for_child()}
    if settings.devices == "cpu":
        return [Device("cpu", {**environment, VISIBLE: ""})]
    gpus = visible_gpus(environment)
    asked = range(len(gpus)) if settings.devices == "auto" else map(int, settings.devices.split(","))
    numbers = list(asked)
    for at, number in enumerate(numbers):
        if number >= len(gpus):
            there = ", ".join(f"{at} ({gpu})" for at, gpu in enumerate(gpus)) or "none"
            message = f"GRADCAM_DEVICES or --devices asks for GPU {number}; there are: {there}."
            raise InvalidSettings(message)
        if number in numbers[:at]:
            message = f"GRADCAM_DEVICES or --devices names GPU {number} twice; one process has it to itself."
            raise InvalidSettings(message)
    if not numbers:
        return [Device("default device", environment)]
    if "threads" not in settings.model_fields_set:
        # While one batch is computed, the next is fetched and decoded, the last encoded and stored.
        threads = 2 * (settings.max_batch or BATCH)
        environment |= settings.model_copy(update={"threads": threads}).to_environment()
    return [Device(f"GPU {number}", {**environment, VISIBLE: gpus[number]}) for number in numbers]


def enter(settings: Settings) -> Settings:
    """Make this process the one that has the device, before a backend is imported; its settings.

    Raises InvalidSettings where there are several.
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
    """What a process of this environment may call its GPUs in `CUDA_VISIBLE_DEVICES`, in order."""
    here = _gpus_here(environment, dev)
    if VISIBLE not in environment or not here:
        return here
    found: list[str] = []
    for name in (part.strip() for part in environment[VISIBLE].split(",")):
        known = int(name) < len(here) if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
        if not known:
            break  # as CUDA itself reads it: up to the first that is none
        found.append(name)
    return found


def _gpus_here(environment: Mapping[str, str], dev: Path) -> list[str]:
    """The GPUs of this machine or container: UUIDs where the driver's own tool tells them, else numbers."""
    tool = shutil.which("nvidia-smi", path=environment.get("PATH"))
    listing = _listing(tool, environment) if tool else ""
    found: list[str] = []
    whole = 0  # index of the last GPU: its parts, where it has any, take its place
    for indent, uuid in LISTED.findall(listing):
        if not indent:
            whole = len(found)
        elif len(found) == whole + 1 and found[whole].startswith("GPU-"):
            found.pop()
        found.append(uuid)
    # Files carry the number that a GPU has on the host; in a container CUDA counts those it sees from 0.
    return found or [str(at) for at, _ in enumerate(dev.glob("nvidia[0-9]*"))]


def _listing(tool: str, environment: Mapping[str, str]) -> str:
    try:
        return subprocess.run(
            [tool, "-L"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LISTING_S,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):  # no driver, or one that does not answer
        return ""
