"""Manifests of jobs that the ledger has forgotten, in the way of others that have the same ids.

Every job succeeds. Then the ledger is emptied, and every id is submitted again: with another image, or with
other bytes where its image was. A worker that is killed has begun each of them, so that the next attempt
looks for what an earlier one has left.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from devtools.faults.cluster import SIZE, Stage, raised, wait_for
from devtools.faults.verdict import Verdict
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef

SHORT, FULL = 8, 200  # jobs
DRAINS_S = 120.0
COLORS = ((255, 0, 0), (0, 0, 255))


def attack(count: int, seed: int) -> dict[str, Any]:
    """So many jobs, each of them twice."""
    with raised("stale", seed) as stage:
        pictures = [
            [_painted(stage, f"{number}-{one}.jpg", one) for one in (0, 1)] for number in range(count)
        ]
        first = [stage.job(number, image=pictures[number][0]) for number in range(count)]
        stage.work()
        before = _brought_to_their_ends(stage, first)
        stage.stop_workers()
        stage.services.flushdb()
        second = []
        for number, job in enumerate(first):
            moved = number % 2 == 0
            if not moved:
                _painted(stage, f"{number}-0.jpg", 1)
            second.append(stage.job(number, image=pictures[number][int(moved)], id=job.id))
        ledger = RedisLedger(stage.settings)
        for job in second:
            ledger.submit(job)
            ledger.claim(ledger.read(job.id), WorkerRef(id="killed", device="cpu"))
        stage.work()
        after = _brought_to_their_ends(stage, second)
        return _verdict(stage, second, before, after).to_dict()


def _painted(stage: Stage, name: str, color: int) -> str:
    return stage.picture(name, np.tile(np.array(COLORS[color], np.uint8), (*SIZE, 1)))


def _brought_to_their_ends(stage: Stage, jobs: list[Job]) -> list[StatusDocument]:
    client = GradcamClient(settings=stage.settings)
    for job in jobs:
        stage.submit(client, job)
    wait_for(lambda: all(client.status(job.id).final for job in jobs), DRAINS_S, "all jobs are final")
    return [client.status(job.id) for job in jobs]


def _verdict(
    stage: Stage, jobs: list[Job], before: list[StatusDocument], after: list[StatusDocument]
) -> Verdict:
    verdict = Verdict(jobs=2 * len(jobs), faults=len(jobs), broken=list(stage.surprises))
    verdict.figures["begun_twice"] = sum(one.attempt == 2 for one in after)  # noqa: PLR2004  # by the killed one
    for job, old, new in zip(jobs, before, after, strict=True):
        if old.status != "succeeded" or new.status != "succeeded":
            verdict.broken.append(f"Job {job.id} ended as {old.status}, and then as {new.status}.")
            continue
        manifest = json.loads(_manifest(stage, job).read_bytes())
        photo = stage.folder / "buckets" / job.image.uri.removeprefix("s3://")
        if manifest["input"]["sha256"] != hashlib.sha256(photo.read_bytes()).hexdigest():
            verdict.wrong_bytes += 1
        if new.result == old.result or new.predictions[0] == old.predictions[0]:
            verdict.doubled += 1
    if verdict.figures["begun_twice"] != len(jobs):
        verdict.broken.append(f"Only {verdict.figures['begun_twice']} jobs were begun a second time.")
    return verdict


def _manifest(stage: Stage, job: Job) -> Path:
    return stage.bucket / "cams" / job.id / "manifest.json"
