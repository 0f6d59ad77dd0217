"""Jobs that kill their process, or wedge its threads, among healthy ones that must not suffer for it.

Of those that wedge there are more than a process has threads: addresses of 66,000 bytes, written into the
queue as a stranger would, and pictures over which a thread panics.
"""

import base64
import contextlib
import json
import time
from typing import Any

import numpy as np

from devtools.faults.cluster import SIZE, Cluster, running_cluster
from devtools.faults.observer import JobObserver, end_of
from devtools.faults.tiny_worker import NETWORK, PANICS, POISON
from devtools.faults.verdict import Verdict
from gradcam_worker.broker import publisher
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.schemas.ids import new_id

SHORT, FULL = 30, 100  # healthy jobs
ATTEMPTS = 3  # that the poison has
PANIC_ATTEMPTS = 2
WEDGES = 12  # of each kind: more than the threads of the process
LONG = 66_000  # bytes
HEALTHY_ATTEMPTS = 5  # one is lost each time that the poison takes a healthy one with it
DRAINS_S = 180.0


def attack(count: int, seed: int) -> dict[str, Any]:
    """So many healthy jobs, and one poison in the middle of them.

    Batches are as large as they come, so that the poison sits in one with its neighbours.
    """
    with running_cluster("poison", seed, max_batch=4, threads=8) as cluster, JobObserver(cluster) as observer:
        color = np.tile(np.array(POISON, np.uint8), (*SIZE, 1))
        uri = cluster.picture("poison.jpg", color)
        panic = cluster.picture("panic.jpg", np.tile(np.array(PANICS, np.uint8), (*SIZE, 1)))
        client = GradcamClient(settings=cluster.settings)
        poison = cluster.job(count, image=uri, max_attempts=ATTEMPTS, priority="normal")
        long = _submit_raw(cluster)
        panics = [
            cluster.job(count + 1 + number, image=panic, max_attempts=PANIC_ATTEMPTS, priority="normal")
            for number in range(WEDGES)
        ]
        for job in panics:
            cluster.submit(client, job)
        for number in range(count):
            cluster.submit(client, cluster.job(number, max_attempts=HEALTHY_ATTEMPTS))
            if number == count // 2:
                cluster.submit(client, poison)
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
        _look_at_the_long(cluster, long, verdict)
        _look_at_the_poison(cluster, poison.id, verdict)
        verdict.figures |= {"drained_s": round(drained_s, 1), **_collateral(observer)}
    return verdict.to_dict()


def _submit_raw(cluster: Cluster) -> list[str]:
    """Messages with addresses that are too long, past the client, which would refuse them."""
    ids = [new_id() for _ in range(WEDGES)]
    with contextlib.closing(cluster.services) as server:
        for one in ids:
            job = {
                "id": one,
                "image": f"s3://photos/{'x' * LONG}",
                "network": NETWORK,
                "target": {"top_n": 1},
            }
            body = base64.b64encode(json.dumps([[job], {}, {}]).encode()).decode()
            message = {
                "body": body,
                "content-encoding": "utf-8",
                "content-type": "application/json",
                "headers": {"id": one, "task": publisher.EXPLAIN},
                "properties": {"body_encoding": "base64"},
            }
            server.lpush(f"{cluster.settings.key_prefix}{publisher.INTERACTIVE}", json.dumps(message))
    return ids


def _look_at_the_long(cluster: Cluster, ids: list[str], verdict: Verdict) -> None:
    client = GradcamClient(settings=cluster.settings)
    for one in ids:
        error = client.wait(one, DRAINS_S).error
        if not error or error.code != "invalid_job" or "66,012 bytes" not in error.detail:
            verdict.broken.append(f"An address that is too long ended as {error}.")


def _look_at_the_poison(cluster: Cluster, poison: str, verdict: Verdict) -> None:
    prefix = cluster.settings.key_prefix
    with contextlib.closing(cluster.services) as server:
        document = json.loads(server.hget(f"{prefix}job:{poison}", "document") or "null")
        dead = server.zrange(f"{prefix}dead", 0, -1)
    deaths = cluster.workers[0].log.read_text(errors="replace").count("exit code -9")
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
