"""Broker, S3 server and status receiver: killed, hung, slow, cut off, half-open, sliced, answering garbage.

One fault after the other, while jobs stream and the worker is left alone: it has to come back by itself.
The broker keeps an append-only file: what it has answered survives the end of its process, whenever it is
written to the disk (`appendfsync everysec`); only the machine's own end may cost a second of it, unless
`appendfsync always` is set.
"""

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from devtools.faults import undisturbed_run
from devtools.faults.cluster import START_S, Cluster, Server, running_cluster, wait_for
from devtools.faults.job_stream import Stream
from devtools.faults.observer import JobObserver, delivered
from devtools.faults.proxy import Fault
from devtools.faults.verdict import Verdict
from gradcam_worker.schemas.job import Job

LONG = (
    5  # from here on, a fault of the line hits broker and S3 server one after the other; below, both at once
)
AHEAD = 16  # jobs that wait or run at a time
EVERY_S = 0.1  # between two submissions
BUSY_WITH = 2  # jobs that run, at least, when a fault begins
RECOVERS_S = 60.0  # after a fault has ended
DRAINS_S = 180.0
DELIVERED_S = 120.0  # after the last fault; deliveries to a receiver that was down wait
BUSY, BROKEN = (
    f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode()
    for status in ("503 Slow Down", "500 Internal Server Error")
)
ON_THE_LINE = {
    "garbage": Fault(garbage=True),
    "half_open": Fault(half_open=True),
    "slow": Fault(latency_s=0.05, bytes_per_s=300_000),
    "sliced": Fault(slice_bytes=5),
    "reset": Fault(reset=0.05),
}
FEW = {"garbage": ON_THE_LINE["garbage"]}
OF_HTTP = {"answers_500": Fault(answer=BROKEN), "answers_503": Fault(answer=BUSY)}


@contextlib.contextmanager
def _dead(server: Server) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextlib.contextmanager
def _suffering(servers: Iterable[Server], fault: Fault) -> Iterator[None]:
    with ExitStack() as stack:
        for one in servers:
            stack.enter_context(one.proxy.suffering(fault))
        yield


def _faults(cluster: Cluster, *, at_once: bool) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """All of them, each ready to be entered.

    The receiver's come first: deliveries to it wait longer and longer while it fails, and it gets the last
    job's end while the others have their turn.
    """
    receiver, broker, s3 = cluster.receiver, cluster.broker, cluster.s3
    yield from _of(receiver, FEW if at_once else ON_THE_LINE | OF_HTTP)
    yield from _of(broker, {} if at_once else ON_THE_LINE)
    yield from _of(s3, OF_HTTP if at_once else ON_THE_LINE | OF_HTTP)
    for name, fault in ON_THE_LINE.items() if at_once else ():
        yield f"broker and s3 {name}", _suffering((broker, s3), fault)


def _of(server: Server, faults: dict[str, Fault]) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    yield f"{server.name} killed", _dead(server)
    yield f"{server.name} hung", server.hung()
    for name, fault in faults.items():
        yield f"{server.name} {name}", server.proxy.suffering(fault)


def attack(count: int, seed: int) -> Verdict:
    """Inject each fault once, for `count` seconds."""
    enough = threading.Event()
    telling, to_tell = threading.Event(), set[str]()
    telling.set()
    recoveries: dict[str, float] = {}
    hit = 0
    with running_cluster("servers", seed) as cluster, JobObserver(cluster) as observer:

        def make(number: int) -> Job:
            job = cluster.job(number, webhooks=cluster.hook() if telling.is_set() else [])
            if telling.is_set():
                to_tell.add(job.id)
            return job

        cluster.work()
        flow: dict[str, Any] = {"jobs": AHEAD, "ahead": AHEAD, "every_s": EVERY_S}
        with Stream(cluster, observer.unfinished, until=enough, make=make, **flow) as stream:
            for name, fault in _faults(cluster, at_once=count < LONG):
                if count < LONG and not name.startswith(cluster.receiver.name):
                    telling.clear()  # what a courier held when the ledger went away comes a minute later
                stream.every_s = 0.0  # so that the worker's hands are full when it happens
                wait_for(lambda: len(observer.running) >= BUSY_WITH, START_S, "a worker has jobs in hand")
                hit += observer.hit()
                stream.every_s = EVERY_S
                with fault:
                    time.sleep(count)
                observer.over()
                recoveries[name] = _settled(cluster, observer)
            enough.set()
            stream.join()
        observer.drain(DRAINS_S)
        verdict = observer.verdict(faults=len(recoveries))
        _check_webhooks(cluster, to_tell, verdict)
        deaths = len(cluster.workers[0].restarts)
        undisturbed_run.compare(cluster, verdict, len(stream.made))
    verdict.recovery_s_max = max(verdict.recovery_s_max, *recoveries.values())
    for name, seconds in recoveries.items():
        if seconds > RECOVERS_S:
            verdict.broken.append(f"{name}: it took {seconds:.0f} s to get over it.")
    verdict.figures |= {
        "recoveries_s": {name: round(seconds, 1) for name, seconds in recoveries.items()},
        "jobs_hit": hit,
        "submissions_refused": cluster.refused,
        "worker_restarts": deaths,
    }
    return verdict


def _settled(cluster: Cluster, observer: JobObserver) -> float:
    """Wait until all jobs that are there now are final, and one that comes after them; how long it took."""
    before, begun = set(cluster.accepted), time.monotonic()
    while time.monotonic() - begun < RECOVERS_S + 1:
        ended = observer.finals.keys()
        if before <= ended and ended - before:
            break
        time.sleep(0.02)
    return time.monotonic() - begun


def _check_webhooks(cluster: Cluster, to_tell: set[str], verdict: Verdict) -> None:
    """Every job's end, at least once, and always the same."""
    end = time.monotonic() + DELIVERED_S
    while to_tell - (events := delivered(cluster)).keys() and time.monotonic() < end:
        time.sleep(0.2)
    undelivered = to_tell - events.keys()
    if undelivered:
        verdict.broken.append(f"Of {len(undelivered)} jobs the end was not delivered: {min(undelivered)}")
    verdict.doubled += sum(any(one != heard[0] for one in heard) for heard in events.values())
    verdict.figures["delivered"] = len(events)
    verdict.figures["delivered_twice"] = sum(len(heard) > 1 for heard in events.values())
    verdict.figures["delivered_after_s"] = round(DELIVERED_S - (end - time.monotonic()), 1)
