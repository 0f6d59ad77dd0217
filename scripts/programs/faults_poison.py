"""A job that kills its process each time, among healthy ones that must not suffer for it."""

import contextlib
import json
import time
from typing import Any

import numpy as np
from faults_stage import SIZE, Stage, raised
from faults_verdict import Verdict
from faults_witness import Witness, end_of
from faulty_worker import POISON

from worker.client import GradcamClient

SHORT, FULL = 30, 100  # healthy jobs
ATTEMPTS = 3  # that the poison has
HEALTHY_ATTEMPTS = 5  # one is lost each time that the poison takes a healthy one with it
DRAINS_S = 180.0


def attack(count: int, seed: int) -> dict[str, Any]:
    """So many healthy jobs, and one poison in the middle of them.

    Batches are as large as they come, so that the poison sits in one with its neighbours.
    """
    with raised("poison", seed, max_batch=4, threads=8) as stage, Witness(stage) as witness:
        color = np.tile(np.array(POISON, np.uint8), (*SIZE, 1))
        uri = stage.picture("poison.jpg", color)
        client = GradcamClient(settings=stage.settings)
        poison = stage.job(count, image=uri, max_attempts=ATTEMPTS, priority="normal")
        for number in range(count):
            stage.submit(client, stage.job(number, max_attempts=HEALTHY_ATTEMPTS))
            if number == count // 2:
                stage.submit(client, poison)
        begun = time.monotonic()
        stage.work()
        witness.drain(DRAINS_S)
        drained_s = time.monotonic() - begun
        verdict = witness.verdict(
            faults=ATTEMPTS,
            expected=lambda job_id: {"max_attempts_exceeded" if job_id == poison.id else "succeeded"},
        )
        _look_at_the_poison(stage, poison.id, verdict)
        verdict.figures |= {"drained_s": round(drained_s, 1), **_collateral(witness, poison.id)}
    return verdict.to_dict()


def _look_at_the_poison(stage: Stage, poison: str, verdict: Verdict) -> None:
    prefix = stage.settings.key_prefix
    with contextlib.closing(stage.outside) as server:
        document = json.loads(server.hget(f"{prefix}job:{poison}", "document") or "null")
        dead = server.zrange(f"{prefix}dead", 0, -1)
    deaths = stage.workers[0].log.read_text(errors="replace").count("exit code -9")
    verdict.figures |= {"attempts_of_the_poison": document["attempt"], "processes_killed": deaths}
    if document["attempt"] != ATTEMPTS or deaths != ATTEMPTS:
        verdict.broken.append(
            f"The poison had {ATTEMPTS} attempts: it made {document['attempt']}, killed {deaths} processes "
            f"and ended as {end_of(document)}."
        )
    if poison not in dead:
        verdict.broken.append("The poison is not listed among the dead letters.")
    if len(dead) > 1:
        verdict.broken.append(f"Healthy jobs are listed among the dead letters: {len(dead) - 1} of them.")


def _collateral(witness: Witness, poison: str) -> dict[str, int]:
    """How often healthy jobs were killed with the poison."""
    found = witness.documents()
    again = [one for job_id, one in found.items() if one and job_id != poison and one["attempt"] > 1]
    return {
        "healthy_run_again": len(again),
        "healthy_attempts_max": max((one["attempt"] for one in again), default=1),
    }
