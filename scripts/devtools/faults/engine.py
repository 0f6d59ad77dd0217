"""Faults of an engine process and of job processes, one after the other, while jobs stream.

The engine is killed, and is suspended until its supervisor replaces it; a job process is killed, and is
suspended for longer than a lease lasts, which may be in the middle of a message. Only the supervisor, and
what was not hit, go on.
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from devtools.faults import undisturbed_run
from devtools.faults.cluster import START_S, Worker, running_cluster, suspended, wait_for
from devtools.faults.job_stream import JobStream
from devtools.faults.observer import JobObserver
from devtools.faults.verdict import Verdict
from devtools.processes import children

JOB_PROCESSES = 2
JOBS_A_FAULT = 25  # at least
AHEAD = 40  # jobs that wait or run at a time; once as many have ended, an engine has computed again
EVERY_S = 0.06  # between two submissions
STALLED_AFTER_S = 5.0  # until the supervisor replaces an engine that shows no sign of life
SUSPENDED_S = 4.5  # longer than a lease
LATER_S = 0.5  # at most, after jobs are running
BACK_S = 15.0  # within which jobs end again, besides the time that a start takes
DRAINS_S = 120.0  # all is final so long after the last fault, or never


def processes_of(worker: Worker, role: str) -> list[int]:
    """The processes of a worker that have this role: `engine` or `jobs`."""
    found = []
    for pid in children(worker.supervisor) if worker.supervisor else ():
        with contextlib.suppress(OSError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"GRADCAM_ROLE={role}".encode() in variables:
                found.append(pid)
    return found


def attack(count: int, seed: int) -> Verdict:
    """Make `count` faults of each kind."""
    draw = random.Random(seed)  # noqa: S311  # repeatable, not secret
    settings = {"job_processes": JOB_PROCESSES, "stalled_after_s": STALLED_AFTER_S}
    with running_cluster("engine", seed, **settings) as cluster, JobObserver(cluster) as observer:
        begun_s = time.monotonic()
        worker = cluster.work()
        faults = [fault for _ in range(count) for fault in (kill, hang, kill_jobs, suspend_jobs)]
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
                fault(worker, observer)
                done[fault.__name__] += 1
                finished = len(cluster.accepted) - observer.unfinished()
                wait_for(
                    lambda goal=finished + AHEAD: len(cluster.accepted) - observer.unfinished() >= goal,  # type: ignore[misc]
                    START_S + BACK_S,
                    "jobs end again",
                )
                back_s.append(time.monotonic() - fault_s)
            stream.join()
        observer.drain(DRAINS_S)
        verdict = observer.verdict(faults=len(faults))
        undisturbed_run.compare(cluster, verdict, len(stream.made))
    worst_s = max(back_s)
    verdict.require(
        worst_s <= BACK_S + start_s,
        f"Jobs ended again only {worst_s:.0f} s after a fault; a start takes {start_s:.0f} s.",
    )
    verdict.figures |= {**done, "back_s_max": round(worst_s, 1), "start_s": round(start_s, 1)}
    return verdict


def kill(worker: Worker, _: JobObserver) -> None:
    """Kill the engine process. No job loses an attempt."""
    os.kill(wait_for_one(worker, "engine"), signal.SIGKILL)


def hang(worker: Worker, _: JobObserver) -> None:
    """Suspend the engine process until its supervisor has killed it."""
    pid = wait_for_one(worker, "engine")
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: pid not in processes_of(worker, "engine"), START_S, "a hung engine is replaced")


def kill_jobs(worker: Worker, observer: JobObserver) -> None:
    """Kill a job process. Its jobs run again in another."""
    pid = wait_for_one(worker, "jobs")
    os.kill(pid, signal.SIGKILL)
    observer.hit(pid)


def suspend_jobs(worker: Worker, observer: JobObserver) -> None:
    """Suspend a job process for longer than a lease, then let it go on."""
    pid = wait_for_one(worker, "jobs")
    with suspended(pid):
        observer.hit(pid)
        time.sleep(SUSPENDED_S)


def wait_for_one(worker: Worker, role: str) -> int:
    """Wait until the worker has a process of this role; return the first."""
    wait_for(lambda: processes_of(worker, role), START_S, f"the supervisor starts a process for {role}")
    return processes_of(worker, role)[0]
