"""A master behind Sentinels that is demoted, killed, stopped and cut off while jobs stream.

Each fault is made `count` times, without and with what keeps accepted jobs: `min-replicas-to-write 1` at the
servers, and GRADCAM_SUBMIT_REPLICAS=1 (WAIT) at the client. Replication is asynchronous: without either, jobs
that were accepted shortly before the promotion, or by a former master that was only cut off, are lost. How
many is printed. With WAIT it must be none, unless a master is demoted that was well.
"""

import contextlib
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Self

import redis

from devtools.faults.cluster import Cluster, running_cluster, wait_for
from devtools.faults.replicas import ReplicatedServer, settings_of
from devtools.faults.verdict import Verdict
from gradcam_worker.errors import LedgerUnavailable

FAULTS = ("hand_over", "demote", "kill", "stop", "partition")
# What keeps jobs: options of the servers, settings of everybody.
MODES: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "asynchronous": ((), {}),
    "min_replicas": (("--min-replicas-to-write", "1", "--min-replicas-max-lag", "2"), {}),
    "wait": ((), {"submit_replicas": 1}),
}
BACK_S = 10.0  # after a promotion, worker and clients are at work again
DRAINS_S = 120.0
EVERY_S = 0.1  # between two jobs
BEFORE_S = 1.5  # in which jobs stream before a fault
PATIENCE_S = 60.0


Figures = dict[str, float]


class Submitter:
    """Submits jobs in a thread, one after the other, whatever happens."""

    def __init__(self, cluster: Cluster) -> None:
        """Submit jobs of this cluster."""
        self._cluster, self._ended = cluster, threading.Event()
        self.accepted: list[tuple[str, float]] = []  # job id, and when it was accepted (monotonic)
        self.refused = 0
        self._thread = threading.Thread(target=self._run, name="submitter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        for number in itertools.count():
            job = self._cluster.job(number, priority="normal")
            while not self._ended.wait(EVERY_S):
                try:
                    self._cluster.client.submit(job)
                except LedgerUnavailable:
                    self.refused += 1
                else:
                    self.accepted.append((job.id, time.monotonic()))
                    break
            if self._ended.is_set():
                return


def attack(
    count: int,
    seed: int,
    *,
    modes: Sequence[str] = (*MODES,),
    faults: Sequence[str] = FAULTS,
    back_s: float = BACK_S,
) -> Verdict:
    """Make each fault `count` times in each mode.

    `modes` and `faults` may be some. Client and worker must be back `back_s` after a promotion.
    """
    verdict = Verdict()
    for mode in modes:
        options, changes = MODES[mode]
        with (
            running_cluster("sentinel", seed) as cluster,
            ReplicatedServer(cluster.folder, *options) as server,
        ):
            cluster.settings = settings_of(server, **{**dict(cluster.settings), **changes})
            worker = cluster.work()
            with Submitter(cluster) as submitter:
                for fault in [*faults] * count:
                    figures = _make(fault, cluster, server, submitter)
                    verdict.figures.setdefault(mode, {}).setdefault(fault, []).append(figures)
                    _check(mode, fault, figures, verdict, back_s)
            verdict.jobs += len(submitter.accepted)
            verdict.faults += len(faults) * count
            verdict.figures[mode]["submissions_refused"] = submitter.refused
            with contextlib.closing(server.master.connect()) as master:
                _drain(cluster, master, submitter, verdict)
            verdict.require(
                not worker.restarts, f"The worker was started again {len(worker.restarts)} times."
            )
    return verdict


def _make(fault: str, cluster: Cluster, server: ReplicatedServer, submitter: Submitter) -> Figures:
    """Make one fault. Returns what it cost, and how soon after the promotion client and worker were back."""
    with contextlib.closing(server.master.connect()) as master:
        _await(lambda: _succeeded(cluster, master, submitter, set()), "a worker is at work")
    begun_s = time.monotonic()
    time.sleep(BEFORE_S)
    fault_s = time.monotonic()
    with getattr(server, fault)() as promoted_after_s:
        promoted_s = fault_s + promoted_after_s
        client_s = worker_s = math.inf
        promoted = server.master
        with contextlib.closing(promoted.connect()) as master:
            done_before = _succeeded(cluster, master, submitter, set())

        def back() -> bool:
            nonlocal client_s, worker_s
            after = [job_id for job_id, at_s in submitter.accepted if at_s > promoted_s]
            with contextlib.closing(server.master.connect()) as master:
                if any(_statuses(cluster, master, after)):
                    client_s = min(client_s, time.monotonic())
                if _succeeded(cluster, master, submitter, done_before):
                    worker_s = min(worker_s, time.monotonic())
            return max(client_s, worker_s) < math.inf

        _await(back, "after the promotion, a job is accepted and one succeeds")
        back_s = time.monotonic()
        again = server.master is not promoted
    with contextlib.closing(server.master.connect()) as master:
        ids = [job_id for job_id, at_s in submitter.accepted if begun_s < at_s < back_s]
        lost = _statuses(cluster, master, ids).count("")
    return {
        "accepted": len(ids),
        "lost": lost,
        "promoted_s": round(promoted_after_s, 1),
        "promoted_again": int(again),
        "client_back_s": round(client_s - promoted_s, 1),
        "worker_back_s": round(worker_s - promoted_s, 1),
    }


def _check(mode: str, fault: str, figures: Figures, verdict: Verdict, back_s: float) -> None:
    for who in ("client", "worker"):
        seconds = figures[f"{who}_back_s"]
        late = f"{mode}, {fault}: the {who} was back {seconds} s after the promotion."
        # Sentinels that promote another one at once leave a master without replicas for ten seconds.
        verdict.require(seconds <= back_s or figures["promoted_again"], late)
        verdict.recovery_s_max = max(verdict.recovery_s_max, seconds)
    # A replica that is promoted although its master is well need not be the one that has the job.
    if fault == "hand_over" or (mode == "wait" and fault != "demote"):
        verdict.lost += int(figures["lost"])


def _drain(cluster: Cluster, master: redis.Redis, submitter: Submitter, verdict: Verdict) -> None:
    """Wait until all jobs that the master knows are final."""
    ids = [job_id for job_id, _ in submitter.accepted]

    def unfinished() -> list[str]:
        statuses = zip(ids, _statuses(cluster, master, ids), strict=True)
        return [job_id for job_id, status in statuses if status not in {"", "succeeded"}]

    with contextlib.suppress(TimeoutError):
        wait_for(lambda: not unfinished(), DRAINS_S, "all jobs have succeeded")
    verdict.without_final_state += len(unfinished())


def _statuses(cluster: Cluster, master: redis.Redis, ids: list[str]) -> list[str]:
    """The status of each job by the ledger as it lies there; empty: it does not know the job."""
    with master.pipeline(transaction=False) as pipeline:
        for job_id in ids:
            pipeline.hget(f"{cluster.settings.key_prefix}job:{job_id}", "document")
        return [json.loads(text)["status"] if text else "" for text in pipeline.execute()]


def _succeeded(
    cluster: Cluster, master: redis.Redis, submitter: Submitter, before: Collection[str]
) -> set[str]:
    """The jobs that have succeeded by what the master knows, besides those `before`."""
    ids = [job_id for job_id, _ in submitter.accepted if job_id not in before]
    statuses = zip(ids, _statuses(cluster, master, ids), strict=True)
    return {job_id for job_id, status in statuses if status == "succeeded"}


def _await(condition: Callable[[], object], what: str) -> None:
    wait_for(condition, PATIENCE_S, what)
