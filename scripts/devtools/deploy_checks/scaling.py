"""How many workers there should be: the formula of the chart's ScaledObject, and what KEDA makes of it.

    load    = max((jobs waiting, retrying or running x job_s + shards waiting x shard_s) / drain_s,
                  running / slots)
    desired = load rounded up, within the limits; 0 only where nothing waits, retries or runs

The first part is time: all that is left is done within `drain_s` by so many workers. The second is room: a
worker holds `slots` jobs at once, so what runs now is never more than what the workers left over can hold.
It is the larger of both and not their sum: busy workers would else ask for one more each, for as long as
anything waits. docs/how-to/deploy-kubernetes.md explains each number; `Scaler.formula` is what
deploy/helm/gradcam renders.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gradcam_worker.schemas.work import ROUTE as SHARD
from gradcam_worker.schemas.work import ROUTES


@dataclass(frozen=True)
class Work:
    """What the ledger holds that is not yet over, at one moment."""

    queued: Mapping[str, int]  # priority, or `shard` -> jobs that wait
    retrying: int = 0  # that wait for their next attempt
    running: int = 0  # jobs and shards


@dataclass(frozen=True)
class Scaler:
    """The numbers of values.yaml, section `keda`, and of KEDA and the HPA that it makes."""

    job_s: float  # of one worker's time, for a job
    shard_s: float  # ... and for a shard of a backfill
    drain_s: float  # within which all that is left shall be done
    slots: int  # jobs and shards that one worker has in hand: GRADCAM_THREADS + GRADCAM_SHARDS
    most: int  # workers
    least: int = 0  # workers
    cooldown_s: float = 300  # without anything to do, before there are none
    stabilization_s: float = 300  # before there are fewer: the most that was asked for within
    step: int = 1  # workers fewer, at most ...
    period_s: float = 60  # ... in this time

    def load(self, work: Work) -> float:
        """Workers' worth of work; 0 only where there is none."""
        shards = work.queued.get(SHARD, 0)
        jobs = sum(work.queued.values()) - shards + work.retrying + work.running
        seconds = jobs * self.job_s + shards * self.shard_s
        return max(seconds / self.drain_s, work.running / self.slots)

    def desired(self, work: Work) -> int:
        """How many workers there should be."""
        load = self.load(work)
        return min(max(math.ceil(load), self.least, 1 if load else 0), self.most)

    @property
    def formula(self) -> str:
        """The load rounded up, as KEDA computes it: its variables are the names of the triggers.

        KEDA cuts what it computes to thousandths: one job would else be 0, and no worker would start for it.
        """
        jobs = " + ".join([route for route in ROUTES if route != SHARD] + ["retrying", "running"])
        seconds = f"(({jobs}) * {self.job_s:g} + {SHARD} * {self.shard_s:g})"
        return f"ceil(max({seconds} / {self.drain_s:g}, running / {self.slots}))"

    def replay(self, trace: Iterable[tuple[float, Work]]) -> list[int]:
        """Workers after each look at a trace of (seconds, work), if none had been there before.

        As KEDA and the HPA do it. From none to one, and to none after the cooldown, is KEDA's decision.
        Between, the HPA goes up at once, and down by a step at a time, to the most of the last while.
        """
        workers, active_s, stepped_s = 0, -math.inf, -math.inf
        recent: deque[tuple[float, int]] = deque()  # when, and how many were asked for
        replayed = []
        for now_s, work in trace:
            wanted = max(self.desired(work), 1)
            recent.append((now_s, wanted))
            while recent[0][0] < now_s - self.stabilization_s:
                recent.popleft()
            if self.load(work) > 0:
                active_s = now_s
                workers = max(workers, wanted)
            most = max(number for _, number in recent)
            if workers > most and now_s - stepped_s >= self.period_s:
                workers, stepped_s = max(most, workers - self.step), now_s
            if not self.least and now_s - active_s >= self.cooldown_s:
                workers = 0
            replayed.append(max(workers, self.least))
        return replayed


def read(redis: Any, prefix: str) -> Work:
    """What a ledger holds now, as one: a job that changes its place meanwhile is not missed."""
    names = [*(f"queued:{route}" for route in ROUTES), "retrying", "running"]
    with redis.pipeline(transaction=True) as pipeline:
        for name in names:
            pipeline.zcard(f"{prefix}{name}")
        *queued, retrying, running = pipeline.execute()
    return Work(dict(zip(ROUTES, queued, strict=True)), retrying, running)
