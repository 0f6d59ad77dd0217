"""Manifests of jobs that the ledger has forgotten, in the way of others that have the same ids.

Every job succeeds. Then the ledger is emptied, and every id is submitted again: with another image, or with
other bytes where its image was. A worker that is killed has begun each of them, so that the next attempt
looks for what an earlier one has left.
"""

import hashlib
import json
from pathlib import Path

from devtools.faults.cluster import Cluster, running_cluster, wait_for
from devtools.faults.verdict import Verdict
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef

DRAINS_S = 120.0
COLORS = ((255, 0, 0), (0, 0, 255))


def attack(count: int, seed: int) -> Verdict:
    """Run `count` jobs, each of them twice."""
    with running_cluster("stale", seed) as cluster:
        images = [
            [cluster.store(f"{number}-{one}.jpg", color) for one, color in enumerate(COLORS)]
            for number in range(count)
        ]
        first = [cluster.job(number, image=images[number][0]) for number in range(count)]
        cluster.work()
        before = _run(cluster, first)
        cluster.stop_workers()
        cluster.ledger.flushdb()
        second = []
        for number, job in enumerate(first):
            moved = number % 2 == 0
            if not moved:
                cluster.store(f"{number}-0.jpg", COLORS[1])
            second.append(cluster.job(number, image=images[number][int(moved)], id=job.id))
        ledger = RedisLedger(cluster.settings)
        for job in second:
            ledger.submit(job)
            ledger.claim(ledger.read(job.id), WorkerRef(id="killed", device="cpu"))
        cluster.work()
        after = _run(cluster, second)
        return _verdict(cluster, second, before, after)


def _run(cluster: Cluster, jobs: list[Job]) -> list[StatusDocument]:
    for job in jobs:
        cluster.submit(job)
    wait_for(lambda: all(cluster.client.status(job.id).final for job in jobs), DRAINS_S, "all jobs are final")
    return [cluster.client.status(job.id) for job in jobs]


def _verdict(
    cluster: Cluster, jobs: list[Job], before: list[StatusDocument], after: list[StatusDocument]
) -> Verdict:
    verdict = Verdict(jobs=2 * len(jobs), faults=len(jobs), broken=list(cluster.unexpected))
    verdict.figures["begun_twice"] = sum(one.attempt == 2 for one in after)  # noqa: PLR2004  # by the killed one
    for job, old, new in zip(jobs, before, after, strict=True):
        if old.status != "succeeded" or new.status != "succeeded":
            verdict.broken.append(f"Job {job.id} ended as {old.status}, and then as {new.status}.")
            continue
        manifest = json.loads(_manifest(cluster, job).read_bytes())
        photo = cluster.folder / "buckets" / job.image.uri.removeprefix("s3://")
        if manifest["input"]["sha256"] != hashlib.sha256(photo.read_bytes()).hexdigest():
            verdict.wrong_bytes += 1
        if new.result == old.result or new.predictions[0] == old.predictions[0]:
            verdict.doubled += 1
    if verdict.figures["begun_twice"] != len(jobs):
        verdict.broken.append(f"Only {verdict.figures['begun_twice']} jobs were begun a second time.")
    return verdict


def _manifest(cluster: Cluster, job: Job) -> Path:
    return cluster.bucket / "cams" / job.id / "manifest.json"
