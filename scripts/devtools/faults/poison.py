"""Jobs that kill their process, or wedge its threads, among healthy ones that must not suffer for it.

More jobs wedge than a process has threads: URIs of 66,000 bytes, written into the queue past the client, and
images at which a thread panics.
"""

import json

from devtools.faults.cluster import Cluster, running_cluster
from devtools.faults.observer import JobObserver, end_of
from devtools.faults.tiny_worker import NETWORK, PANICS, POISON
from devtools.faults.verdict import Verdict
from gradcam_worker.schemas.ids import new_id

ATTEMPTS = 3  # that the poison has
PANIC_ATTEMPTS = 2
WEDGES = 12  # of each kind: more than the threads of the process
LONG = 66_000  # bytes
HEALTHY_ATTEMPTS = 5  # one is lost each time that the poison takes a healthy one with it
DRAINS_S = 180.0


def attack(count: int, seed: int) -> Verdict:
    """Submit `count` healthy jobs, and one poison in the middle of them.

    Batches are allowed, so that the poison is computed together with its neighbours.
    """
    with running_cluster("poison", seed, max_batch=4, threads=8) as cluster, JobObserver(cluster) as observer:
        uri, panic = cluster.store("poison.jpg", POISON), cluster.store("panic.jpg", PANICS)
        poison = cluster.job(count, image=uri, max_attempts=ATTEMPTS, priority="normal")
        ends = {poison.id: "max_attempts_exceeded"}
        long = _send_long(cluster)
        for number in range(count + 1, count + 1 + WEDGES):
            job = cluster.job(number, image=panic, max_attempts=PANIC_ATTEMPTS, priority="normal")
            ends[job.id] = "internal"
            cluster.submit(job)
        for number in range(count):
            cluster.submit(cluster.job(number, max_attempts=HEALTHY_ATTEMPTS))
            if number == count // 2:
                cluster.submit(poison)
        cluster.work()
        drained_s = observer.drain(DRAINS_S)
        verdict = observer.verdict(
            faults=ATTEMPTS + 2 * WEDGES,
            expected=lambda job_id: {ends.get(job_id, "succeeded")},
        )
        verdict.untyped -= WEDGES  # `internal` is what they have to end with
        for job_id in long:
            error = cluster.client.wait(job_id, DRAINS_S).error
            refused = error and error.code == "invalid_job" and "66,012 bytes" in error.detail
            verdict.require(refused, f"An address that is too long ended as {error}.")
        _check_poison(cluster, poison.id, verdict)
        again = [
            document["attempt"]
            for document in observer.documents().values()
            if document and document["status"] == "succeeded" and document["attempt"] > 1
        ]
        verdict.figures["drained_s"] = round(drained_s, 1)
        verdict.figures |= {"healthy_run_again": len(again), "healthy_attempts_max": max(again, default=1)}
    return verdict


def _send_long(cluster: Cluster) -> list[str]:
    """Messages with addresses that are too long, past the client, which would refuse them."""
    ids, uri = [new_id() for _ in range(WEDGES)], f"s3://photos/{'x' * LONG}"
    for job_id in ids:
        cluster.send(job_id, {"id": job_id, "image": uri, "network": NETWORK, "target": {"top_n": 1}})
    return ids


def _check_poison(cluster: Cluster, poison: str, verdict: Verdict) -> None:
    prefix = cluster.settings.key_prefix
    with cluster.ledger as server:
        document = json.loads(server.hget(f"{prefix}job:{poison}", "document") or "null")
        dead = server.zrange(f"{prefix}dead", 0, -1)
    attempts = document["attempt"]
    deaths = sum("exit_code=-9" in line for line in cluster.workers[0].restarts)
    verdict.figures |= {"attempts_of_the_poison": attempts, "processes_killed": deaths}
    verdict.require(
        attempts == deaths == ATTEMPTS,
        f"The poison had {ATTEMPTS} attempts: it made {attempts}, killed {deaths} processes and ended as "
        f"{end_of(document)}.",
    )
    verdict.require(poison in dead, "The poison is not listed among the dead letters.")
    verdict.require(
        len(dead) == 1 + 2 * WEDGES,
        f"{len(dead)} dead letters, not {1 + 2 * WEDGES}: healthy jobs are among them.",
    )
