"""How long recovery takes with the default settings: after kill -9, and after messages were lost.

The other attacks shorten the times that all of this depends on. Here a lease lasts 15 s and a message is
missed after 20 s, as in production.
"""

import contextlib
import os
import random
import signal
import time
from functools import partial

from devtools.faults.cluster import START_S, Cluster, running_cluster, wait_for
from devtools.faults.job_stream import JobStream
from devtools.faults.observer import JobObserver
from devtools.faults.verdict import Verdict
from gradcam_worker.broker import publisher
from gradcam_worker.settings import Settings

LOST = 5  # messages that vanish from the queue at each of them
AHEAD = 60  # jobs that wait when it happens
LATER_S = 0.3  # at most, after a worker has begun a job
RUNS_AGAIN_S, PUBLISHED_AGAIN_S = 30.0, 60.0  # what is promised
DRAINS_S = 180.0
DEFAULTS = ("lease_s", "lost_after_s", "visibility_timeout_s", "retry_backoff_s", "retry_backoff_max_s")


def attack(count: int, seed: int) -> Verdict:
    """Make `count` kills of the only worker there is."""
    draw = random.Random(seed)  # noqa: S311  # repeatable, not secret
    defaults = {name: getattr(Settings(), name) for name in DEFAULTS}
    lost_s, hit = 0.0, 0
    with running_cluster("recovery", seed, **defaults) as cluster, JobObserver(cluster) as observer:
        worker = cluster.work()
        for first in range(0, count * (AHEAD + LOST), AHEAD + LOST):
            with JobStream(cluster, observer.unfinished, AHEAD, AHEAD + LOST, first=first) as stream:
                stream.join()
            vanished = _lose(cluster, first + AHEAD)
            wait_for(lambda: observer.running, START_S, "a worker has jobs in hand")
            time.sleep(draw.uniform(0, LATER_S))
            pid, begun = worker.process or 0, time.monotonic()
            os.kill(pid, signal.SIGKILL)
            hit += observer.hit(pid)
            with contextlib.suppress(TimeoutError):
                done = observer.finals.keys()
                wait_for(partial(vanished.issubset, done), DRAINS_S, "jobs without a message are found")
            lost_s = max(lost_s, time.monotonic() - begun)
            observer.drain(DRAINS_S)
        verdict = observer.verdict(faults=count)
    again_s = verdict.recovery_s_max
    verdict.require(again_s <= RUNS_AGAIN_S, f"A killed worker's job ran again after {again_s:.0f} s only.")
    verdict.require(
        lost_s <= PUBLISHED_AGAIN_S, f"Jobs with lost messages were done after {lost_s:.0f} s only."
    )
    verdict.figures |= {"lost_messages_done_s": round(lost_s, 1), "jobs_hit": hit}
    return verdict


def _lose(cluster: Cluster, first: int) -> set[str]:
    """Submit jobs whose messages vanish; their ids. It is the queue of bulk jobs, which are taken last."""
    jobs = [cluster.job(first + number, priority="bulk") for number in range(LOST)]
    for job in jobs:
        cluster.submit(job)
    with cluster.ledger as server:
        for key in server.keys(f"{cluster.settings.key_prefix}{publisher.BULK}*"):
            server.delete(key)
    return {job.id for job in jobs}
