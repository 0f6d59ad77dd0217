"""What a process uses while it works, and whether it grows: read from /proc, so this needs Linux."""

import contextlib
import os
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

LOOK_S = 0.5  # between two looks at the worker process
WARM_UP = 0.3  # share of the time, until pools and caches are full
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Usage:
    """What one worker process uses, read again and again."""

    pid: int
    times: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)  # bytes
    threads: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)  # sockets among them

    def look(self) -> None:
        """One reading."""
        base = Path(f"/proc/{self.pid}")
        self.resident.append(PAGE * float((base / "statm").read_text(encoding="ascii").split()[1]))
        self.threads.append(len(list((base / "task").iterdir())))
        self.files.append(len(list((base / "fd").iterdir())))
        self.times.append(time.monotonic())

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Within the block, until the process is gone."""
        ended = threading.Event()

        def keep() -> None:
            with contextlib.suppress(OSError):
                while not ended.wait(LOOK_S):
                    self.look()

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def warm(self, what: list[float]) -> list[float]:
        """Readings after the warm-up."""
        return what[int(len(what) * WARM_UP) :]

    def growth(self) -> float:
        """Of resident memory after the warm-up, as a share of it: the median of all slopes (Theil-Sen)."""
        points = list(zip(self.warm(self.times), self.warm(self.resident), strict=True))
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2)]
        seconds = points[-1][0] - points[0][0]
        return statistics.median(slopes) * seconds / statistics.median(size for _, size in points)

    def more(self, what: list[float]) -> float:
        """By how much the last third of the warm readings is above the first."""
        warm = self.warm(what)
        third = max(len(warm) // 3, 1)
        return statistics.median(warm[-third:]) - statistics.median(warm[:third])
