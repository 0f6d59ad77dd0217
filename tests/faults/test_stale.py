"""Manifests of jobs that the ledger has forgotten, in the way of others that have the same ids.

Every job succeeds. Then the ledger is emptied, and every id is submitted again: with another image, or with
other bytes where its image was. A worker that is killed has begun each of them, so that the next attempt
looks for what an earlier one has left.
"""

import json

import pytest

from devtools.faults.cluster import Cluster, running_cluster, wait_for
from devtools.faults.observer import sha256
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]
JOBS = 8
DRAINS_S = 120.0
RED, BLUE = (255, 0, 0), (0, 0, 255)


def run(cluster: Cluster, jobs: list[Job]) -> list[StatusDocument]:
    for job in jobs:
        cluster.submit(job)
    wait_for(lambda: all(cluster.client.status(job.id).final for job in jobs), DRAINS_S, "all jobs are final")
    documents = [cluster.client.status(job.id) for job in jobs]
    assert {document.status for document in documents} == {"succeeded"}, documents
    return documents


def test_no_manifest_of_before_is_posted_as_the_result_of_another_job_of_its_id() -> None:
    with running_cluster("stale", seed=1) as cluster:
        red = [cluster.store(f"{number}-red.jpg", RED) for number in range(JOBS)]
        blue = [cluster.store(f"{number}-blue.jpg", BLUE) for number in range(JOBS)]
        first = [cluster.job(number, image=image) for number, image in enumerate(red)]
        cluster.work()
        before = run(cluster, first)
        cluster.stop_workers()
        with cluster.ledger as server:
            server.flushdb()
        for number in range(0, JOBS, 2):  # other bytes where the image was; the others have another image
            blue[number] = cluster.store(f"{number}-red.jpg", BLUE)
        second = [cluster.job(number, image=blue[number], id=job.id) for number, job in enumerate(first)]
        ledger = RedisLedger(cluster.settings)
        for job in second:
            ledger.submit(job)
            ledger.claim(ledger.read(job.id), WorkerRef(id="killed", device="cpu"))
        cluster.work()
        after = run(cluster, second)
        assert {document.attempt for document in after} == {2}, "all of them were begun a second time"
        for job, old, new in zip(second, before, after, strict=True):
            manifest = json.loads(cluster.manifest(job.id).read_bytes())
            photo = cluster.folder / "buckets" / job.image.uri.removeprefix("s3://")
            assert manifest["input"]["sha256"] == sha256(photo.read_bytes())
            assert new.result != old.result
            assert new.predictions[0] != old.predictions[0]
        assert not cluster.unexpected
