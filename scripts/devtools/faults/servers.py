"""Broker, S3 server and status receiver: killed, hung, slow, cut off, half-open, sliced, answering garbage.

One fault after the other, while jobs stream and the worker is left alone: it has to come back by itself.
The broker keeps an append-only file: what it has answered survives the end of its process, whenever it is
written to the disk (`appendfsync everysec`); only the machine's own end may cost a second of it, unless
`appendfsync always` is set.
"""

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager

from devtools.faults import undisturbed_run
from devtools.faults.cluster import START_S, Cluster, Server, running_cluster, suspended, wait_for
from devtools.faults.job_stream import JobStream
from devtools.faults.observer import JobObserver, delivered
from devtools.faults.proxy import Fault
from devtools.faults.verdict import Verdict
from gradcam_worker.schemas.job import Job

LONG = 5  # from here on, a connection fault hits broker and S3 server in turn; below, both at once
AHEAD = 8  # jobs that wait or run at a time
EVERY_S = 0.5  # between two submissions
BUSY_WITH = 2  # jobs that run, at least, when a fault begins
RECOVERS_S = 60.0  # after a fault has ended
DRAINS_S = 180.0
DELIVERED_S = 120.0  # after the last fault; deliveries to a receiver that was down wait
CONNECTION_FAULTS = {
    "garbage": Fault(garbage=True),
    "half_open": Fault(half_open=True),
    "slow": Fault(latency_s=0.05, bytes_per_s=300_000),
    "sliced": Fault(slice_bytes=5),
    "reset": Fault(reset=0.05),
}
GARBAGE_ALONE = {"garbage": CONNECTION_FAULTS["garbage"]}
HTTP_FAULTS = {
    "answers_500": Fault(answer=b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n"),
    "answers_503": Fault(answer=b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\n\r\n"),
}
Faults = Iterator[tuple[str, AbstractContextManager[None]]]


def _faults(cluster: Cluster, *, at_once: bool) -> Faults:
    """All of them, each ready to be entered.

    The receiver's come first: deliveries to it wait longer and longer while it fails, and it gets the last
    job's end while the others have their turn.
    """
    receiver, broker, s3 = cluster.receiver, cluster.broker, cluster.s3
    yield from _faults_of(receiver, GARBAGE_ALONE if at_once else CONNECTION_FAULTS | HTTP_FAULTS)
    yield from _faults_of(broker, {} if at_once else CONNECTION_FAULTS)
    yield from _faults_of(s3, HTTP_FAULTS if at_once else CONNECTION_FAULTS | HTTP_FAULTS)
    for name, fault in CONNECTION_FAULTS.items() if at_once else ():
        yield f"broker and s3 {name}", _both(broker, s3, fault)


@contextlib.contextmanager
def _both(first: Server, second: Server, fault: Fault) -> Iterator[None]:
    with first.proxy.suffering(fault), second.proxy.suffering(fault):
        yield


def _faults_of(server: Server, faults: dict[str, Fault]) -> Faults:
    yield f"{server.name} killed", server.dead()
    yield f"{server.name} hung", suspended(server.pid)
    for name, fault in faults.items():
        yield f"{server.name} {name}", server.proxy.suffering(fault)


def attack(count: int, seed: int) -> Verdict:
    """Inject each fault once, for `count` seconds."""
    recoveries: dict[str, float] = {}
    hit = 0
    with running_cluster("servers", seed) as cluster, JobObserver(cluster) as observer:

        def notifying(number: int) -> Job:
            return cluster.job(number, webhooks=cluster.hook())

        cluster.work()
        with JobStream(cluster, observer.unfinished, AHEAD, AHEAD, endless=True, make=notifying) as stream:
            for name, fault in _faults(cluster, at_once=count < LONG):
                if count < LONG and not name.startswith(cluster.receiver.name):
                    stream.make = None  # what a courier held when the ledger went away comes a minute later
                stream.every_s = 0.0  # so that the worker's hands are full when it happens
                wait_for(lambda: len(observer.running) >= BUSY_WITH, START_S, "a worker has jobs in hand")
                hit += observer.hit()
                stream.every_s = EVERY_S
                with fault:
                    time.sleep(count)
                observer.over()
                recoveries[name] = _settled(cluster, observer)
            stream.join()
        observer.drain(DRAINS_S)
        verdict = observer.verdict(faults=len(recoveries))
        _check_webhooks(cluster, {job.id for job in stream.made if job.webhooks}, verdict)
        restarts = len(cluster.workers[0].restarts)
        undisturbed_run.compare(cluster, verdict, len(stream.made))
    verdict.recovery_s_max = max(verdict.recovery_s_max, *recoveries.values())
    for name, seconds in recoveries.items():
        verdict.require(seconds <= RECOVERS_S, f"{name}: it took {seconds:.0f} s to get over it.")
    verdict.figures |= {
        "recoveries_s": {name: round(seconds, 1) for name, seconds in recoveries.items()},
        "jobs_hit": hit,
        "submissions_refused": cluster.refused,
        "worker_restarts": restarts,
    }
    return verdict


def _settled(cluster: Cluster, observer: JobObserver) -> float:
    """Wait until all jobs that are there now are final, and one that comes after them; how long it took."""
    before, begun, ended = set(cluster.accepted), time.monotonic(), observer.finals.keys()
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: before <= ended and ended - before, RECOVERS_S + 1, "all jobs are final")
    return time.monotonic() - begun


def _check_webhooks(cluster: Cluster, notified: set[str], verdict: Verdict) -> None:
    """Every job's end, at least once, and always the same."""
    begun = time.monotonic()
    with contextlib.suppress(TimeoutError):
        wait_for(lambda: notified <= delivered(cluster).keys(), DELIVERED_S, "every end is delivered")
    events = delivered(cluster)
    verdict.forbid(notified - events.keys(), "jobs whose end was not delivered")
    verdict.doubled += sum(any(end != ends[0] for end in ends) for ends in events.values())
    verdict.figures |= {
        "delivered": len(events),
        "delivered_twice": sum(len(ends) > 1 for ends in events.values()),
        "delivered_after_s": round(time.monotonic() - begun, 1),
    }
