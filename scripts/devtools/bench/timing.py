"""What every bench shares: ways that take turns, their medians, and what they ran on."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Way:
    """One way to compute, as often as it is measured."""

    name: str
    batch: int  # images a call
    repeats: int
    run: Callable[[], object]  # returns when the result is on the host
    warm: bool = False  # has run before, and need not once more before it is measured


@dataclass(frozen=True)
class Cost:
    """The medians of one way's calls."""

    way: str
    batch: int
    repeats: int
    wall: float  # seconds a call
    cpu: float  # seconds a call, of all threads of this process

    @property
    def images_per_second(self) -> float:
        """Images per second of wall time."""
        return self.batch / self.wall


def take_turns(ways: list[Way]) -> tuple[Cost, ...]:
    """Measure all ways in rounds, the rarer ones spread evenly, every other round backwards."""
    for way in ways:
        if not way.warm:
            way.run()  # traces, and fills the caches
    rounds = max(way.repeats for way in ways)
    measured: dict[int, list[tuple[float, float]]] = {index: [] for index in range(len(ways))}
    for turn in range(rounds):
        order = list(enumerate(ways))
        for index, way in order if turn % 2 == 0 else reversed(order):
            if len(measured[index]) * rounds <= turn * way.repeats:
                measured[index].append(clock(way.run))
    return tuple(_cost(way, measured[index]) for index, way in enumerate(ways))


def clock(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def _cost(way: Way, measured: list[tuple[float, float]]) -> Cost:
    wall, cpu = (median(column) for column in zip(*measured, strict=True))
    return Cost(way.name, way.batch, len(measured), wall, cpu)


def machine(device: str = "cpu") -> dict[str, Any]:
    """What it ran on, and how busy that was beforehand."""
    return {
        "cpu_count": os.cpu_count(),
        "cpu_model": _cpu_model(),
        "device": device,
        "load_before": round(os.getloadavg()[0], 2),  # processes that want to run, last minute
    }


def _cpu_model() -> str:
    """The processor as the kernel names it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """The versions that the figures hang on."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def told(
    found: Mapping[str, Any],
    lines: Iterable[str],
    missed: Sequence[str],
    about: Mapping[str, Any],
    packages: Sequence[str],
    took_s: float,
    *,
    as_json: bool,
) -> int:
    """Print what was found, as text or as one JSON document; return 1 where something is missed, else 0."""
    if as_json:
        own = {"missed": missed, "passed": not missed, "took_s": took_s}
        whole = {**found, **own, "machine": dict(about), "versions": versions(*packages)}
        json.dump(whole, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        print("\n" + "\n".join(lines))
        print("\n" + ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()))
        said = "\n".join(missed) or "All that is required is reached."
        print(f"\n{said}\nTook {took_s:.0f} s.")
    return 1 if missed else 0
