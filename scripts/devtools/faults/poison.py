"""Jobs that kill their process, or wedge its threads, among healthy ones that must not suffer for it.

More jobs wedge than a process has threads: URIs of 66,000 bytes, written into the queue past the client, and
images at which a thread panics.
"""

import json
import time

from devtools.faults.cluster import Cluster, running_cluster
from devtools.faults.messages import message
from devtools.faults.observer import JobObserver, end_of
from devtools.faults.tiny_worker import NETWORK, PANICS, POISON
from devtools.faults.verdict import Verdict
from gradcam_worker.broker import publisher
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
        long = _submit_raw(cluster)
        panics = [
            cluster.job(count + 1 + number, image=panic, max_attempts=PANIC_ATTEMPTS, priority="normal")
            for number in range(WEDGES)
        ]
        for job in panics:
            cluster.submit(job)
        for number in range(count):
            cluster.submit(cluster.job(number, max_attempts=HEALTHY_ATTEMPTS))
            if number == count // 2:
                cluster.submit(poison)
        begun = time.monotonic()
        cluster.work()
        observer.drain(DRAINS_S)
        ends = {poison.id: "max_attempts_exceeded", **{one.id: "internal" for one in panics}}
        drained_s = time.monotonic() - begun
        verdict = observer.verdict(
            faults=ATTEMPTS + 2 * WEDGES,
            expected=lambda job_id: {ends.get(job_id, "succeeded")},
        )
        verdict.untyped -= len(panics)  # `internal` is what they have to end with
        _check_long_uris(cluster, long, verdict)
        _check_poison(cluster, poison.id, verdict)
        verdict.figures |= {"drained_s": round(drained_s, 1), **_collateral(observer)}
    return verdict


def _submit_raw(cluster: Cluster) -> list[str]:
    """Messages with addresses that are too long, past the client, which would refuse them."""
    ids, uri = [new_id() for _ in range(WEDGES)], f"s3://photos/{'x' * LONG}"
    with cluster.ledger as server:
        for one in ids:
            job = {"id": one, "image": uri, "network": NETWORK, "target": {"top_n": 1}}
            item = message(json.dumps([[job], {}, {}]).encode(), message_id=one)
            server.lpush(f"{cluster.settings.key_prefix}{publisher.INTERACTIVE}", item)
    return ids


def _check_long_uris(cluster: Cluster, ids: list[str], verdict: Verdict) -> None:
    for one in ids:
        error = cluster.client.wait(one, DRAINS_S).error
        if not error or error.code != "invalid_job" or "66,012 bytes" not in error.detail:
            verdict.broken.append(f"An address that is too long ended as {error}.")


def _check_poison(cluster: Cluster, poison: str, verdict: Verdict) -> None:
    prefix = cluster.settings.key_prefix
    with cluster.ledger as server:
        document = json.loads(server.hget(f"{prefix}job:{poison}", "document") or "null")
        dead = server.zrange(f"{prefix}dead", 0, -1)
    deaths = sum("exit_code=-9" in line for line in cluster.workers[0].restarts)
    verdict.figures |= {"attempts_of_the_poison": document["attempt"], "processes_killed": deaths}
    if document["attempt"] != ATTEMPTS or deaths != ATTEMPTS:
        verdict.broken.append(
            f"The poison had {ATTEMPTS} attempts: it made {document['attempt']}, killed {deaths} processes "
            f"and ended as {end_of(document)}."
        )
    if poison not in dead:
        verdict.broken.append("The poison is not listed among the dead letters.")
    if len(dead) != 1 + 2 * WEDGES:
        verdict.broken.append(f"{len(dead)} dead letters, not {1 + 2 * WEDGES}: healthy jobs are among them.")


def _collateral(observer: JobObserver) -> dict[str, int]:
    """How often healthy jobs were killed with the poison."""
    found = observer.documents()
    again = [one for one in found.values() if one and one["status"] == "succeeded" and one["attempt"] > 1]
    return {
        "healthy_run_again": len(again),
        "healthy_attempts_max": max((one["attempt"] for one in again), default=1),
    }
