"""Jobs that kill their process, or wedge its threads, among healthy ones that must not suffer for it.

More jobs wedge than a process has threads: URIs of 66,000 bytes, written into the queue past the client, and
images at which a thread panics.
"""

import pytest

from devtools.faults.cluster import Cluster, running_cluster
from devtools.faults.observer import JobObserver, end_of
from devtools.faults.tiny_network import NETWORK, PANICS, POISON
from gradcam_worker.schemas.ids import new_id

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
HEALTHY = 30  # jobs
HEALTHY_ATTEMPTS = 5  # one is lost each time that the poison takes a healthy one with it
ATTEMPTS = 3  # that the poison has
PANIC_ATTEMPTS = 2
WEDGES = 12  # of each kind: more than the threads of the process
LONG = 66_000  # bytes
DRAINS_S = 180.0


def send_long(cluster: Cluster) -> list[str]:
    """Addresses that are too long, past the client, which would refuse them."""
    ids, uri = [new_id() for _ in range(WEDGES)], f"s3://photos/{'x' * LONG}"
    for job_id in ids:
        cluster.send(job_id, {"id": job_id, "image": uri, "network": NETWORK, "target": {"top_n": 1}})
    return ids


def test_a_job_that_kills_its_process_each_time_takes_no_others_with_it() -> None:
    """Batches are allowed, so that the poison is computed together with its neighbours."""
    with running_cluster("poison", 1, max_batch=4, threads=8) as cluster, JobObserver(cluster) as observer:
        uri, panic = cluster.store("poison.jpg", POISON), cluster.store("panic.jpg", PANICS)
        poison = cluster.job(HEALTHY, image=uri, max_attempts=ATTEMPTS, priority="normal")
        ends = {poison.id: "max_attempts_exceeded"}
        long = send_long(cluster)
        for number in range(HEALTHY + 1, HEALTHY + 1 + WEDGES):
            job = cluster.job(number, image=panic, max_attempts=PANIC_ATTEMPTS, priority="normal")
            ends[job.id] = "internal"
            cluster.submit(job)
        for number in range(HEALTHY):
            cluster.submit(cluster.job(number, max_attempts=HEALTHY_ATTEMPTS))
            if number == HEALTHY // 2:
                cluster.submit(poison)
        cluster.work()
        observer.drain(DRAINS_S)
        verdict = observer.verdict(
            faults=ATTEMPTS + 2 * WEDGES,
            expected=lambda job_id: {ends.get(job_id, "succeeded")},
        )
        verdict.untyped -= WEDGES  # `internal` is what they have to end with
        assert verdict.kept, verdict
        assert verdict.jobs == HEALTHY + 1 + WEDGES
        for job_id in long:
            error = cluster.client.wait(job_id, DRAINS_S).error
            assert error is not None
            assert error.code == "invalid_job"
            assert "66,012 bytes" in error.detail
        documents = {job_id: document or {} for job_id, document in observer.documents().items()}
        assert end_of(documents[poison.id]) == "max_attempts_exceeded"
        assert documents[poison.id]["attempt"] == ATTEMPTS
        assert sum("exit_code=-9" in line for line in cluster.workers[0].restarts) == ATTEMPTS
        with cluster.ledger as server:
            dead = server.zrange(f"{cluster.settings.key_prefix}dead", 0, -1)
        assert poison.id in dead
        assert len(dead) == 1 + 2 * WEDGES, "no healthy job is among the dead letters"
        healthy = [document for job_id, document in documents.items() if job_id not in ends]
        assert max(job["attempt"] for job in healthy) <= 2, "it was alone from its second attempt on"
