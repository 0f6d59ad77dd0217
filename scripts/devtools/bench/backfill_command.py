"""Backfills to measure: the real command in a process of its own, watched."""

import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import redis

from devtools import processes
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores

POLL_INTERVAL_S = 0.1  # of memory
PATIENCE_S = 60  # for one file of a dataset
MIB = 2**20

Process = subprocess.Popen[bytes]


@dataclass(frozen=True)
class Ran:
    """One backfill, from the start of its command to its end."""

    rows: int
    seconds: float
    submitter_mb: float  # resident memory at the worst moment, MiB
    redis_mb: float  # more than before it began, at the worst moment, MiB

    @property
    def rows_per_s(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


def write_input(path: Path, uris: Iterable[str]) -> Path:
    """A manifest in JSON Lines: an image and an id a line."""
    with path.open("w", encoding="utf-8") as file:
        for number, uri in enumerate(uris):
            file.write(json.dumps({"image": uri, "id": f"row-{number}"}) + "\n")
    return path


def command(source: Path, output: str, network: str, *options: str) -> list[str]:
    """What is typed."""
    asked = ["backfill", str(source), "--network", network, "--top-n", "3", "--output", output, "--json"]
    return [sys.executable, "-P", "-m", "gradcam_worker", *asked, *options]


@contextmanager
def started(settings: Settings, words: list[str], log: Path) -> Iterator[Process]:
    """The command, running; killed where it still does when the block is left."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            words, env=settings.environment_for_child(), stdout=file, stderr=file, stdin=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def run(
    settings: Settings, source: Path, output: str, network: str, rows: int, *options: str, worker: Process
) -> Ran:
    """Run a backfill to its end. Raises RuntimeError where it fails, or where its worker ends before."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with redis.Redis.from_url(settings.broker_url) as client:
            before = used_bytes(client)
            begun = time.monotonic()
            with started(settings, command(source, output, network, *options), log) as process:
                with watched(process.pid, client) as peaks:
                    while (code := process.poll()) is None and worker.poll() is None:
                        time.sleep(POLL_INTERVAL_S)
                seconds = time.monotonic() - begun
        if code != 0:
            said = log.read_text(errors="replace")[-2000:]
            message = f"The backfill ended with {code}, its worker with {worker.poll()}: {said}"
            raise RuntimeError(message)
    return Ran(rows, seconds, peaks["submitter"] / MIB, (peaks["redis"] - before) / MIB)


def until(condition: Callable[[], object], worker: Process) -> None:
    """Wait for what a worker has to do. Raises RuntimeError where that takes too long, or it has ended."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end or worker.poll() is not None:
            message = f"Nothing happened within {PATIENCE_S} s, or the worker has ended ({worker.poll()})."
            raise RuntimeError(message)
        time.sleep(POLL_INTERVAL_S / 2)


@contextmanager
def watched(pid: int, client: Any) -> Iterator[dict[str, int]]:
    """Bytes at the worst moment, of a process and of Redis."""
    peaks = {"submitter": 0, "redis": 0}

    def read() -> None:
        peaks["redis"] = max(peaks["redis"], used_bytes(client))
        peaks["submitter"] = max(peaks["submitter"], processes.resident_bytes([pid]))

    with processes.repeating(read, POLL_INTERVAL_S):
        yield peaks


def used_bytes(client: Any) -> int:
    """Memory that Redis has given out."""
    return int(client.info("memory")["used_memory"])


@dataclass(frozen=True)
class Counted:
    """What a dataset holds of the rows that it should hold."""

    lost: int
    doubled: int


def counted(settings: Settings, output: str, rows: int) -> Counted:
    """Read every file of a dataset, and count how often each row is there: once is right.

    A row that was explained for three classes is there once for each of them.
    """
    store = Stores(settings, S3(settings)).open(output)
    times = dict.fromkeys(range(rows), 0)
    doubled = 0
    for name in store.names("data"):
        data = store.find(name, Deadline(PATIENCE_S))
        columns = pq.read_table(io.BytesIO(data or b""), columns=["row", "index"])
        places = list(zip(columns["row"].to_pylist(), columns["index"].to_pylist(), strict=True))
        doubled += len(places) - len(set(places))
        for row in {row for row, _ in places}:
            times[row] = times.get(row, 0) + 1
    doubled += sum(count - 1 for count in times.values() if count > 1)
    return Counted(sum(count == 0 for count in times.values()), doubled)
