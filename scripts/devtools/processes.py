"""What processes use, read from /proc: this needs Linux."""

import contextlib
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

PROC = Path("/proc")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
WAITING = {3, 4}  # columns of /proc/stat: idle, and waiting for a disk
MACHINE = "machine"  # stands for all processes beside the names of ours
WARM_UP = 0.3  # share of the readings that do not count, until pools and caches are full


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that still run."""
    found: list[int] = []
    for path in (PROC / str(pid) / "task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            found += map(int, path.read_text(encoding="ascii").split())
    return found


def family(pid: int) -> list[int]:
    """Return a process and all its descendants, parents first."""
    found = [pid]
    for member in found:
        found += children(member)
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the processor time that processes have used until now, user and system."""
    stats = ((PROC / str(pid) / "stat").read_text("ascii", errors="replace") for pid in pids)
    return TICK_S * sum(sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats)


def machine_seconds() -> float:
    """Return the processor time that all processes of this machine have used until now, on all cores."""
    columns = (PROC / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
    return TICK_S * sum(int(ticks) for index, ticks in enumerate(columns) if index not in WAITING)


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the memory of processes that is in RAM."""
    sizes = ((PROC / str(pid) / "statm").read_text(encoding="ascii").split()[1] for pid in pids)
    return PAGE_BYTES * sum(map(int, sizes))


def peak_resident_mb() -> float:
    """Return the most resident memory of this process, MiB: `ru_maxrss` would be its parent's at first."""
    match = re.search(r"VmHWM:\s+(\d+) kB", (PROC / "self" / "status").read_text("ascii"))
    return int(match[1]) / 1024 if match else 0.0


@contextmanager
def repeating(action: Callable[[], object], interval_s: float) -> Iterator[None]:
    """Call `action` in a thread until the block is left, or until the process that it reads is gone."""
    ended = threading.Event()

    def repeat() -> None:
        with contextlib.suppress(OSError):
            while not ended.wait(interval_s):
                action()

    thread = threading.Thread(target=repeat, name="reader", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass
class Meter:
    """Processor time and memory of groups of processes, read repeatedly."""

    processes: dict[str, list[int]]
    times: list[float] = field(default_factory=list)  # of the readings, in seconds since the epoch
    cpu: dict[str, list[float]] = field(default_factory=dict)  # name, or MACHINE -> seconds
    resident: dict[str, list[int]] = field(default_factory=dict)  # name -> bytes

    def read(self) -> None:
        """Add a reading."""
        self.times.append(time.time())
        for name, pids in self.processes.items():
            self.cpu.setdefault(name, []).append(cpu_seconds(pids))
            self.resident.setdefault(name, []).append(resident_bytes(pids))
        self.cpu.setdefault(MACHINE, []).append(machine_seconds())

    def used(self, name: str, begun: float, ended: float) -> float:
        """Return the processor seconds between two times, interpolated between readings."""
        at_begin, at_end = np.interp([begun, ended], self.times, self.cpu[name])
        return float(at_end - at_begin)

    @contextmanager
    def running(self, interval_s: float) -> Iterator["Meter"]:
        """Read at the start of the block, within it, and at its end."""
        self.read()
        with repeating(self.read, interval_s):
            yield self
        self.read()


@dataclass
class Usage:
    """Memory, threads and open files of one process, read repeatedly: do they grow?"""

    pid: int
    times: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)  # bytes
    threads: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)  # sockets among them

    def read(self) -> None:
        """Add a reading."""
        process = PROC / str(self.pid)
        self.resident.append(resident_bytes([self.pid]))
        self.threads.append(len(list((process / "task").iterdir())))
        self.files.append(len(list((process / "fd").iterdir())))
        self.times.append(time.monotonic())

    def warm(self, readings: list[float]) -> list[float]:
        """Return the readings after the warm-up."""
        return readings[int(len(readings) * WARM_UP) :]

    def growth(self) -> float:
        """Return the growth of resident memory as a share of it: the median of all slopes (Theil-Sen)."""
        points = list(zip(self.warm(self.times), self.warm(self.resident), strict=True))
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2)]
        seconds = points[-1][0] - points[0][0]
        return statistics.median(slopes) * seconds / statistics.median(size for _, size in points)

    def rise(self, readings: list[float]) -> float:
        """Return by how much the last third of the warm readings is above the first."""
        warm = self.warm(readings)
        third = max(len(warm) // 3, 1)
        return statistics.median(warm[-third:]) - statistics.median(warm[:third])
