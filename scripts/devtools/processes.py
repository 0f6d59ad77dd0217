"""What processes use, read from /proc: this needs Linux."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from devtools.warm_python import process_of

PROC = Path("/proc")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
WAITING = {3, 4}  # columns of /proc/stat: idle, and waiting for a disk
MACHINE = "machine"  # stands for all processes beside the names of ours


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that still run.

    Of one that only stands for another one, see `warm_python`, it is the other one.
    """
    pids: list[int] = []
    for path in (PROC / str(pid) / "task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread, or a child, has ended meanwhile
            pids += map(process_of, map(int, path.read_text(encoding="ascii").split()))
    return pids


def family(pid: int) -> list[int]:
    """Return a process and all its descendants, parents first."""
    pids = [pid]
    for member in pids:
        pids += children(member)
    return pids


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


def proportional_bytes(pids: Iterable[int]) -> int:
    """Return the memory of processes that is in RAM. What several share is divided among them."""
    texts = ((PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii") for pid in pids)
    return 1024 * sum(int(re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[0]) for text in texts)


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
