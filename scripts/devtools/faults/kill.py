"""kill -9 of worker processes at random moments, and of their supervisors now and then, while jobs stream.

Some are suspended instead, for longer than a lease lasts, and then go on: zombies, whose jobs are
another worker's by then.
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

from devtools.faults import undisturbed_run
from devtools.faults.cluster import START_S, Cluster, Worker, running_cluster, suspended, wait_for
from devtools.faults.job_stream import JobStream
from devtools.faults.observer import JobObserver
from devtools.faults.proxy import Fault
from devtools.faults.verdict import Verdict

JOBS_A_KILL = 15  # at least: thousands in the full form
AHEAD = 60  # jobs that wait or run at a time
EVERY_S = 0.2  # between two submissions
SLOW = Fault(latency_s=0.02)  # of the S3 server: a job is longer in hand, and costs no more
WORKERS = 2
OF_SUPERVISORS = 0.05  # share of kills
ZOMBIES = 0.1  # suspensions for each kill
ZOMBIE_BY = 2  # kills: no further one before at least one process was suspended
SUSPENDED_S = 4.5  # longer than a lease, and than it takes another worker to notice
WHILE_IT_STARTS = 0.1  # share of kills: before the process takes jobs
UNREADY = 2  # kills of one worker in a row before it takes jobs; its supervisor gives up after five
LATER_S = 0.8  # at most, after a worker has begun a job
RECOVERS_S = 30.0  # a killed worker's jobs run again within this time
DRAINS_S = 120.0  # all is final so long after the last kill, or never


@dataclass
class Killer:
    """Chooses whom to kill, and when."""

    cluster: Cluster
    observer: JobObserver
    random: random.Random
    done: Counter[str] = field(default_factory=Counter)  # kills, supervisors_killed, zombies, jobs_hit
    unready: Counter[int] = field(default_factory=Counter)  # index of a worker -> kills before it took jobs

    def strike(self) -> None:
        """Kill or suspend one more."""
        index = self.random.randrange(len(self.cluster.workers))
        worker = self.cluster.workers[index]
        zombie_due = self.done["kills"] >= ZOMBIE_BY and not self.done["zombies"]
        if self.random.random() < OF_SUPERVISORS and not zombie_due:
            self._kill_supervisor(index, worker)
            return
        wait_for(lambda: worker.process, START_S, "a supervisor starts its worker again")
        early = self.random.random() < WHILE_IT_STARTS and self.unready[index] < UNREADY and not zombie_due
        if not early:
            wait_for(lambda: self._busy(worker), START_S, f"the worker takes jobs, see {worker.log}")
        self.unready[index] = self.unready[index] + 1 if early else 0
        time.sleep(self.random.uniform(0, LATER_S))
        pid = worker.process
        if pid is None:  # it has just ended by itself, as it may when its supervisor was killed
            return
        if not early and (zombie_due or self.random.random() < ZOMBIES):
            with suspended(pid):
                self.done["zombies"] += 1
                self.done["jobs_hit"] += self.observer.hit(pid)
                time.sleep(SUSPENDED_S)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.done["kills"] += 1
            self.done["jobs_hit"] += self.observer.hit(pid)

    def _kill_supervisor(self, index: int, worker: Worker) -> None:
        """Start another one, as an init system would; the worker process ends by itself."""
        if worker.supervisor is None:
            return
        os.kill(worker.supervisor, signal.SIGKILL)
        self.done.update(["kills", "supervisors_killed"])
        worker.stop()  # its keeper
        self.cluster.work()
        self.cluster.workers[index] = self.cluster.workers.pop()

    def _busy(self, worker: Worker) -> bool:
        pid = worker.process
        return any(on.endswith(f":{pid}") for _, on in self.observer.running.values())


def attack(count: int, seed: int) -> Verdict:
    """Make `count` kills."""
    with running_cluster("kill", seed) as cluster, JobObserver(cluster) as observer:
        for _ in range(WORKERS):
            cluster.work()
        jobs = JOBS_A_KILL * count
        with (
            cluster.s3.proxy.suffering(SLOW),
            JobStream(cluster, observer.unfinished, jobs, AHEAD, endless=True, every_s=EVERY_S) as stream,
        ):
            killer = Killer(cluster, observer, random.Random(seed))  # noqa: S311  # repeatable, not secret
            begun = time.monotonic()
            while killer.done["kills"] < count and not stream.error:
                killer.strike()
            killed_s = time.monotonic() - begun
            stream.join()
        drained_s = observer.drain(DRAINS_S)
        verdict = observer.verdict(faults=killer.done["kills"] + killer.done["zombies"])
        undisturbed_run.compare(cluster, verdict, len(stream.made))
    again_s = verdict.recovery_s_max
    verdict.require(again_s <= RECOVERS_S, f"A killed job ran again after {again_s:.0f} s only.")
    for key in ("kills", "supervisors_killed", "zombies", "jobs_hit"):
        verdict.figures[key] = killer.done[key]
    verdict.figures |= {"killing_s": round(killed_s, 1), "drained_s": round(drained_s, 1)}
    return verdict
