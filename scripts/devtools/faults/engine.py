"""Faults of an engine process and of job processes, one after the other, while jobs stream.

The engine is killed, and is suspended until its supervisor replaces it; a job process is killed, and is
suspended for longer than a lease lasts, at any moment and when half of an image is in the memory that it
shares with the engine. That memory has room for few images: the engine is also suspended until it is full in
every job process, and then goes on. Only the supervisor, and what was not hit, go on.
"""

import contextlib
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

from devtools.faults import tiny_network, undisturbed_run
from devtools.faults.cluster import START_S, Cluster, Worker, running_cluster, suspended, wait_for
from devtools.faults.job_stream import JobStream
from devtools.faults.observer import JobObserver
from devtools.faults.verdict import Verdict
from devtools.processes import children
from gradcam_worker.observability import health
from gradcam_worker.operations.servers import free_port

JOB_PROCESSES = 2
THREADS = tiny_network.IMAGES_IN_POOL + 2  # of a job process: more than its pool has room for
JOBS_A_FAULT = 15  # at least
AHEAD = 24  # jobs that wait or run at a time; once as many have ended, an engine has computed again
EVERY_S = 0.06  # between two submissions
STALLED_AFTER_S = 5.0  # until the supervisor replaces an engine that shows no sign of life
SUSPENDED_S = 4.5  # longer than a lease
LATER_S = 0.5  # at most, after jobs are running
BACK_S = 15.0  # within which jobs end again, besides the time that a start takes
DRAINS_S = 120.0  # all is final so long after the last fault, or never
ANSWER_S = 1.0  # of a process that is asked for its metrics
IN_WRITE = {"killed": tiny_network.KILLED, "suspended": tiny_network.SUSPENDED}
UNLIKE_OTHERS = 1_000_000  # numbers of jobs from which on the stream has none
THREE_CLASSES: dict[str, Any] = {"target": {"top_n": 3}, "artifacts": [{"kind": "overlay"}]}


def processes_of(worker: Worker, role: str) -> list[int]:
    """The processes of a worker that have this role: `engine` or `jobs`."""
    return of_role(role, children(worker.supervisor) if worker.supervisor else [], worker.log)


def of_role(role: str, pids: Iterable[int], log: Path) -> list[int]:
    """Return the processes among these that run, and that a supervisor has started for this role.

    Args:
        role: `engine` or `jobs`.
        pids: The processes.
        log: What the supervisor has logged.
    """
    line = rf'worker_process_started device="[^"]*, {role}\b.*" pid=(\d+)'
    started = {*map(int, re.findall(line, log.read_text(encoding="utf-8", errors="replace")))}
    found = []
    for pid in started.intersection(pids):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes():  # else it has ended
                found.append(pid)
    return found


def attack(count: int, seed: int) -> Verdict:
    """Make `count` faults of each kind."""
    draw = random.Random(seed)  # noqa: S311  # repeatable, not secret
    settings = {"job_processes": JOB_PROCESSES, "threads": THREADS, "stalled_after_s": STALLED_AFTER_S}
    with running_cluster("engine", seed, **settings) as cluster, JobObserver(cluster) as observer:
        # The S3 server does not see at once what is stored later.
        images = {colour: cluster.store(f"{name}.jpg", colour) for name, colour in IN_WRITE.items()}
        begun_s = time.monotonic()
        worker = cluster.work(cluster.settings.model_copy(update={"metrics_port": free_port()}))
        hits = Faults(cluster, worker, observer, images)
        kinds = (
            hits.kill,
            hits.hang,
            hits.kill_jobs,
            hits.suspend_jobs,
            hits.fill_pools,
            hits.kill_in_write,
            hits.suspend_in_write,
        )
        faults = [fault for _ in range(count) for fault in kinds]
        jobs = JOBS_A_FAULT * len(faults)
        back_s: list[float] = []
        done: Counter[str] = Counter()
        with JobStream(cluster, observer.unfinished, jobs, AHEAD, endless=True, every_s=EVERY_S) as stream:
            wait_for(lambda: observer.running, START_S, f"the worker takes jobs, see {worker.log}")
            start_s = time.monotonic() - begun_s
            for fault in faults:
                wait_for(lambda: observer.running, START_S, "the worker has jobs in hand")
                time.sleep(draw.uniform(0, LATER_S))
                fault_s = time.monotonic()
                fault()
                done[fault.__name__] += 1
                finished = len(cluster.accepted) - observer.unfinished()
                wait_for(
                    lambda goal=finished + AHEAD: len(cluster.accepted) - observer.unfinished() >= goal,  # type: ignore[misc]
                    START_S + BACK_S,
                    "jobs end again",
                )
                back_s.append(time.monotonic() - fault_s)
            stream.join()
        hits.submit_again()
        observer.drain(DRAINS_S)
        verdict = observer.verdict(faults=len(faults))
        verdict.forbid(hits.changed(), "jobs that were hit while they wrote pixels differ from others")
        undisturbed_run.compare(cluster, verdict, len(stream.made))
    worst_s = max(back_s)
    verdict.require(
        worst_s <= BACK_S + start_s,
        f"Jobs ended again only {worst_s:.0f} s after a fault; a start takes {start_s:.0f} s.",
    )
    verdict.figures |= {**done, "back_s_max": round(worst_s, 1), "start_s": round(start_s, 1)}
    return verdict


@dataclass
class Faults:
    """The faults, each a method that returns when it is over."""

    cluster: Cluster
    worker: Worker
    observer: JobObserver
    images: dict[tuple[int, int, int], str]  # colour -> URI
    in_write: list[tuple[str, str]] = field(default_factory=list)  # ids of jobs, URIs of their images
    again: list[str] = field(default_factory=list)  # ids of the same jobs, which nothing has hit

    def kill(self) -> None:
        """Kill the engine process. No job loses an attempt."""
        os.kill(wait_for_one(self.worker, "engine"), signal.SIGKILL)

    def hang(self) -> None:
        """Suspend the engine process until its supervisor has killed it."""
        pid = wait_for_one(self.worker, "engine")
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: pid not in processes_of(self.worker, "engine"), START_S, "a hung engine is replaced")

    def kill_jobs(self) -> None:
        """Kill a job process. Its jobs run again in another."""
        pid = wait_for_one(self.worker, "jobs")
        os.kill(pid, signal.SIGKILL)
        self.observer.hit(pid)

    def suspend_jobs(self) -> None:
        """Suspend a job process for longer than a lease, then let it go on."""
        pid = wait_for_one(self.worker, "jobs")
        with suspended(pid):
            self.observer.hit(pid)
            time.sleep(SUSPENDED_S)

    def fill_pools(self) -> None:
        """Suspend the engine process until no job process has room for another image, then let it go on.

        If the supervisor is faster and replaces it, once more.
        """

        def is_full_or_replaced() -> bool:
            return self._free_pools() == [0] * JOB_PROCESSES or pid not in processes_of(self.worker, "engine")

        while True:
            ended = len(self.observer.finals)
            wait_for(lambda: len(self.observer.finals) > ended, START_S, "the engine computes")  # noqa: B023
            pid = wait_for_one(self.worker, "engine")
            with suspended(pid):
                wait_for(is_full_or_replaced, START_S, "the memory of all job processes is full")
            if pid in processes_of(self.worker, "engine"):
                return

    def _free_pools(self) -> list[int]:
        """Free bytes of shared memory, as each job process says."""
        found = []
        for socket in (self.cluster.folder / "tmp").glob("gradcam-*/jobs-*.http"):
            with contextlib.suppress(OSError, HTTPException):
                status, body = health.ask(socket, "/metrics", ANSWER_S)
                free = re.search(
                    rb"^gradcam_pixel_pool_free_bytes(?:{[^}]*})? ([0-9.e+]+)$", body, re.MULTILINE
                )
                if status == HTTPStatus.OK and free:
                    found.append(int(float(free[1])))
        return found

    def kill_in_write(self) -> None:
        """Kill a job process when half of an image is in its shared memory."""
        self.observer.hit(self._hit_in_write(tiny_network.KILLED))

    def suspend_in_write(self) -> None:
        """Suspend a job process when half of an image is in its shared memory, for longer than a lease."""
        pid = self._hit_in_write(tiny_network.SUSPENDED)
        stat = Path(f"/proc/{pid}/stat")
        wait_for(lambda: stat.read_text("ascii").rpartition(")")[2].split()[0] == "T", START_S, "it stops")
        with suspended(pid):
            self.observer.hit(pid)
            time.sleep(SUSPENDED_S)

    def _hit_in_write(self, colour: tuple[int, int, int]) -> int:
        """Submit a job with such an image; return the process that was hit."""
        folder, name = self.cluster.folder / "tmp", tiny_network.ARMED
        for mark in folder.glob(f"{name}*"):
            mark.unlink()
        (folder / name).touch()
        image = self.images[colour]
        self.in_write.append((self._submit(image), image))
        wait_for(lambda: [*folder.glob(f"{name}-*")], START_S, "a job process writes the pixels of the image")
        (mark,) = folder.glob(f"{name}-*")
        return int(mark.name.removeprefix(f"{name}-"))

    def _submit(self, image: str) -> str:
        number = UNLIKE_OTHERS + len(self.in_write) + len(self.again)
        job = self.cluster.job(number, image=image, priority="high", **THREE_CLASSES)
        self.cluster.submit(job)
        return job.id

    def submit_again(self) -> None:
        """Submit the jobs that were hit while they wrote pixels once more, and nothing hits them."""
        for _, image in self.in_write:
            self.again.append(self._submit(image))

    def changed(self) -> list[str]:
        """Ids of jobs that were hit while they wrote pixels, and whose scores differ from another run's."""
        hit = [job_id for job_id, _ in self.in_write]
        pairs = zip(hit, self.again, strict=True)
        return [job_id for job_id, again in pairs if self._scores(job_id) != self._scores(again)]

    def _scores(self, job_id: str) -> Any:
        path = self.cluster.manifest(job_id)
        return json.loads(path.read_text(encoding="utf-8"))["predictions"] if path.exists() else None


def wait_for_one(worker: Worker, role: str) -> int:
    """Wait until the worker has a process of this role; return the first."""
    wait_for(lambda: processes_of(worker, role), START_S, f"the supervisor starts a process for {role}")
    return processes_of(worker, role)[0]
