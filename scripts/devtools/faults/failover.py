"""Failovers of the broker behind one address, under load: the master before lives on as a replica.

So it is with managed Redis, HAProxy or a Kubernetes Service: the address leads to the promoted replica, and
connections that stand go on to a server that takes no writes. All places of the worker are taken when it
happens: nothing is read from the queue that could notice.
"""

import contextlib

import redis

from devtools.faults import undisturbed_run
from devtools.faults.cluster import APPEND_ONLY, START_S, Worker, running_cluster, wait_for
from devtools.faults.observer import JobObserver
from devtools.faults.proxy import Fault
from devtools.faults.verdict import Verdict
from gradcam_worker.operations import servers

JOBS = 40  # before each of them
SLOTS = 16
BUSY_WITH = 8  # jobs that run, at least, when it happens
SLOW = Fault(latency_s=0.05)  # of the S3 server: a job takes a second
RECOVERS_S = 60.0
MORE_CONNECTIONS = 40  # than before the first failover: what pools may have opened meanwhile
MAX_WARNINGS = 40  # lines of the log, for one failover


def direct(port: int) -> redis.Redis:
    """A connection to one of the two that no proxy stands in."""
    return redis.Redis(port=port, decode_responses=True, socket_timeout=5)


def await_replica(port: int) -> None:
    """Wait until a server has all that its leader has."""
    with contextlib.closing(direct(port)) as replica:
        link = "master_link_status"
        wait_for(lambda: replica.info("replication").get(link) == "up", START_S, "the replica follows")


def fail_over(port: int, to: int) -> None:
    """As a managed Redis does it: writes wait until the replica has all, then they change places."""
    with contextlib.closing(direct(port)) as old, contextlib.closing(direct(to)) as new:
        old.execute_command("FAILOVER", "TO", "127.0.0.1", to)  # type: ignore[no-untyped-call]
        wait_for(lambda: new.info("replication")["role"] == "master", START_S, "the replica is promoted")
    await_replica(port)


def connections(*ports: int) -> int:
    """Count the clients of all of them, except replicas and this one."""
    count = 0
    for port in ports:
        with contextlib.closing(direct(port)) as server:
            count += len(server.client_list(_type="normal")) + len(server.client_list(_type="pubsub")) - 1
    return count


def attack(count: int, seed: int) -> Verdict:
    """Make `count` failovers."""
    recoveries: list[float] = []
    counted: list[int] = []  # connections, before the first failover and after each
    with running_cluster("failover", seed, threads=SLOTS) as cluster, contextlib.ExitStack() as stack:
        folder = cluster.folder / "other"
        folder.mkdir()
        other = stack.enter_context(servers.valkey(folder, *APPEND_ONLY))
        with contextlib.closing(direct(other.port)) as replica:
            replica.replicaof("127.0.0.1", cluster.broker.now.port)
        await_replica(other.port)
        observer = stack.enter_context(JobObserver(cluster))
        worker = cluster.work()
        with cluster.s3.proxy.suffering(SLOW):
            for number in range(count):
                for job in range(number * JOBS, (number + 1) * JOBS):
                    cluster.submit(cluster.job(job, priority="normal"))
                wait_for(lambda: len(observer.running) >= BUSY_WITH, START_S, "a worker has jobs in hand")
                counted = counted or [connections(other.port, cluster.broker.now.port)]
                observer.hit()
                fail_over(cluster.broker.now.port, other.port)
                other = cluster.broker.switch(other)
                observer.over()
                recoveries.append(observer.drain(RECOVERS_S + 10))
                counted.append(connections(other.port, cluster.broker.now.port))
        verdict = observer.verdict(faults=count)
        _check(worker, recoveries, counted, verdict)
        verdict.figures["submissions_refused"] = cluster.refused
        undisturbed_run.compare(cluster, verdict, count * JOBS)
    return verdict


def _check(worker: Worker, recoveries: list[float], counted: list[int], verdict: Verdict) -> None:
    levels = (" WARNING ", " ERROR ", " CRITICAL ")
    warnings = sum(any(level in line for level in levels) for line in worker.log_lines)
    restarts, slowest, most = len(worker.restarts), max(recoveries), max(counted)
    few = warnings <= MAX_WARNINGS * len(recoveries)
    verdict.require(slowest <= RECOVERS_S, f"Not all jobs were done {slowest:.0f} s after a failover.")
    verdict.require(most <= counted[0] + MORE_CONNECTIONS, f"Connections grew from {counted[0]} to {most}.")
    verdict.require(not restarts, f"The worker was started again {restarts} times.")
    verdict.require(few, f"{warnings} warnings for {len(recoveries)} failovers.")
    seconds = [round(seconds, 1) for seconds in recoveries]
    verdict.figures |= {"recoveries_s": seconds, "connections": counted, "warnings": warnings}
