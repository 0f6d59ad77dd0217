"""kill -9 of worker processes at random moments, and of their supervisors now and then, while jobs stream.

Some are stopped instead, for longer than a lease lasts, and then go on: zombies, whose jobs are
another worker's by then.
"""

import contextlib
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from devtools.faults import undisturbed_run
from devtools.faults.cluster import START_S, Cluster, Worker, running_cluster, wait_for
from devtools.faults.job_stream import Stream
from devtools.faults.observer import JobObserver
from devtools.faults.verdict import Verdict

JOBS_A_KILL = 15  # at least: thousands in the full form
AHEAD = 60  # jobs that wait or run at a time
EVERY_S = 0.06  # between two submissions
WORKERS = 2
OF_SUPERVISORS = 0.05  # share of kills
ZOMBIES = 0.1  # stops for each kill
ZOMBIE_BY = 4  # kills: by then at least one process was stopped
STOPPED_S = 6.0  # longer than a lease, and than it takes another worker to notice
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
    kills: int = 0
    supervisors: int = 0
    hit: int = 0  # jobs that ran on a process when it was killed or stopped
    zombies: int = 0
    unready: dict[int, int] = field(default_factory=dict)  # index of a worker -> kills before it took jobs

    def kill(self) -> None:
        """One more."""
        index = self.random.randrange(len(self.cluster.workers))
        worker, of_supervisor = self.cluster.workers[index], self.random.random() < OF_SUPERVISORS
        if of_supervisor:
            self._kill_supervisor(index, worker)
            return
        wait_for(lambda: worker.process, START_S, "a supervisor starts its worker again")
        early = self.random.random() < WHILE_IT_STARTS and self.unready.get(index, 0) < UNREADY
        if not early:
            wait_for(lambda: self._busy(worker), START_S, f"the worker takes jobs, see {worker.log}")
        self.unready[index] = self.unready.get(index, 0) + 1 if early else 0
        time.sleep(self.random.uniform(0, LATER_S))
        pid = worker.process
        if pid is None:  # it has just ended by itself, as it may when its supervisor was killed
            return
        if not early and ((self.kills >= ZOMBIE_BY and not self.zombies) or self.random.random() < ZOMBIES):
            self._stop(pid)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.kills += 1
            self.hit += self.observer.hit(pid)

    def _stop(self, pid: int) -> None:
        """Nothing of it runs for a while; then it goes on with what it had in hand."""
        os.kill(pid, signal.SIGSTOP)
        self.zombies += 1
        self.hit += self.observer.hit(pid)
        time.sleep(STOPPED_S)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def _kill_supervisor(self, index: int, worker: Worker) -> None:
        """Start another one, as an init system would; the worker process ends by itself."""
        pid = worker.supervisor
        if pid is None:
            return
        os.kill(pid, signal.SIGKILL)
        self.kills += 1
        self.supervisors += 1
        worker.stop()  # its keeper
        self.cluster.workers.remove(worker)
        self.cluster.work()
        self.cluster.workers.insert(index, self.cluster.workers.pop())

    def _busy(self, worker: Worker) -> bool:
        pid = worker.process
        return any(on.endswith(f":{pid}") for _, on in self.observer.running.values())


def attack(count: int, seed: int) -> Verdict:
    """Make `count` kills."""
    enough = threading.Event()
    with running_cluster("kill", seed) as cluster, JobObserver(cluster) as observer:
        for _ in range(WORKERS):
            cluster.work()
        flow: dict[str, Any] = {"jobs": JOBS_A_KILL * count, "ahead": AHEAD, "every_s": EVERY_S}
        with Stream(cluster, observer.unfinished, until=enough, **flow) as stream:
            killer = Killer(cluster, observer, random.Random(seed))  # noqa: S311  # repeatable, not secret
            begun = time.monotonic()
            while killer.kills < count:
                killer.kill()
                if stream.error:
                    break
            enough.set()
            killed_s = time.monotonic() - begun
            stream.join()
        drained_s = observer.drain(DRAINS_S)
        verdict = observer.verdict(faults=killer.kills + killer.zombies)
        undisturbed_run.compare(cluster, verdict, len(stream.made))
    if verdict.recovery_s_max > RECOVERS_S:
        verdict.broken.append(f"A killed job ran again after {verdict.recovery_s_max:.0f} s only.")
    verdict.figures |= {
        "kills": killer.kills,
        "supervisors_killed": killer.supervisors,
        "zombies": killer.zombies,
        "jobs_hit": killer.hit,
        "killing_s": round(killed_s, 1),
        "drained_s": round(drained_s, 1),
    }
    return verdict
