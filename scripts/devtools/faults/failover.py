"""Failovers of the broker behind one address, under load: the master before lives on as a replica.

So it is with managed Redis, HAProxy or a Kubernetes Service: the address leads to the promoted replica, and
connections that stand go on to a server that takes no writes. All places of the worker are taken when it
happens: nothing is read from the queue that could notice.
"""

import contextlib
from pathlib import Path

import redis

from devtools.faults import undisturbed_run
from devtools.faults.cluster import START_S, Cluster, Worker, running_cluster, wait_for
from devtools.faults.observer import JobObserver
from devtools.faults.proxy import Fault
from devtools.faults.verdict import Verdict
from gradcam_worker.operations import servers

JOBS = 150  # before each of them
SLOTS = 16
BUSY_WITH = 8  # jobs that run, at least, when it happens
SLOW = Fault(latency_s=0.05)  # of the S3 server: a job takes a second
RECOVERS_S = 60.0
MORE_CONNECTIONS = 40  # than before the first failover: what pools may have opened meanwhile
MAX_WARNINGS = 40  # lines of the log, for one failover


def server(port: int) -> redis.Redis:
    """A way to one of the two that no proxy stands in."""
    return redis.Redis(port=port, decode_responses=True, socket_timeout=5)


def follow(port: int, leader: int) -> None:
    """Make a server the replica of another, and wait until it has all."""
    with contextlib.closing(server(port)) as one:
        one.replicaof("127.0.0.1", leader)
        wait_for(
            lambda: one.info("replication")["master_link_status"] == "up", START_S, "the replica follows"
        )


def fail_over(port: int, to: int) -> None:
    """As a managed Redis does it: writes wait until the replica has all, then they change places."""
    with contextlib.closing(server(port)) as old, contextlib.closing(server(to)) as new:
        old.execute_command("FAILOVER", "TO", "127.0.0.1", to)  # type: ignore[no-untyped-call]
        wait_for(lambda: new.info("replication")["role"] == "master", START_S, "the replica is promoted")
        wait_for(lambda: old.info("replication")["master_link_status"] == "up", START_S, "the other follows")


def connections(*ports: int) -> int:
    """Count the clients of all of them, except replicas and this one."""
    found = 0
    for port in ports:
        with contextlib.closing(server(port)) as one:
            found += len(one.client_list(_type="normal")) + len(one.client_list(_type="pubsub")) - 1
    return found


def attack(count: int, seed: int) -> Verdict:
    """Make `count` failovers."""
    recoveries: list[float] = []
    with running_cluster("failover", seed, threads=SLOTS) as cluster, contextlib.ExitStack() as stack:
        folder = Path(cluster.folder / "other")
        folder.mkdir()
        other = stack.enter_context(servers.valkey(folder, "--appendonly", "yes"))
        follow(other.port, cluster.broker.now.port)
        observer = stack.enter_context(JobObserver(cluster))
        worker = cluster.work()
        jobs, counted = 0, [0]
        with cluster.s3.proxy.suffering(SLOW):
            for _ in range(count):
                for number in range(jobs, jobs + JOBS):
                    cluster.submit(cluster.job(number, priority="normal"))
                jobs += JOBS
                wait_for(lambda: len(observer.running) >= BUSY_WITH, START_S, "a worker has jobs in hand")
                counted[0] = counted[0] or connections(other.port, cluster.broker.now.port)
                observer.hit()
                fail_over(cluster.broker.now.port, other.port)
                other = cluster.broker.switch(other)
                observer.over()
                recoveries.append(observer.drain(RECOVERS_S + 10))
                counted.append(connections(other.port, cluster.broker.now.port))
        verdict = observer.verdict(faults=count)
        _check(cluster, worker, recoveries, counted, verdict)
        undisturbed_run.compare(cluster, verdict, jobs)
    return verdict


def _check(
    cluster: Cluster, worker: Worker, recoveries: list[float], counted: list[int], verdict: Verdict
) -> None:
    levels = (" WARNING ", " ERROR ", " CRITICAL ")
    warnings = sum(any(level in line for level in levels) for line in worker.log_lines)
    for number, seconds in enumerate(recoveries, 1):
        if seconds > RECOVERS_S:
            verdict.broken.append(f"Failover {number}: not all jobs were done after {seconds:.0f} s.")
    if max(counted) > counted[0] + MORE_CONNECTIONS:
        verdict.broken.append(f"Connections grew from {counted[0]} to {max(counted)}.")
    if worker.restarts:
        verdict.broken.append(f"The worker was started again {len(worker.restarts)} times.")
    if warnings > MAX_WARNINGS * len(recoveries):
        verdict.broken.append(f"{warnings} warnings for {len(recoveries)} failovers.")
    verdict.figures |= {
        "recoveries_s": [round(one, 1) for one in recoveries],
        "connections": counted,
        "submissions_refused": cluster.refused,
        "warnings": warnings,
    }
