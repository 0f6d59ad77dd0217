"""The attack on the delivery of status: receivers that are dead, that never answer, and that are broken.

Jobs run in rounds, those of one round with a webhook at one of these, at a healthy receiver, or with none: so
what each of them costs the worker is compared within one run. While it goes on, events for the bad ones pile
up; those for the healthy one have to arrive, signed, once, in order.
"""

import contextlib
import random
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import standardwebhooks
from pydantic import SecretStr
from standardwebhooks.webhooks import WebhookVerificationError

from devtools.faults import webhook_receiver
from devtools.faults.cluster import Cluster, running_cluster, wait_for
from devtools.faults.observer import JobObserver
from devtools.faults.proxy import FaultyProxy
from devtools.faults.servers import HTTP_FAULTS
from devtools.faults.verdict import Verdict
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.schemas.job import Job

NO_RECEIVER, HEALTHY, DEAD, BLACK_HOLE, BROKEN = "none", "healthy", "dead", "black_hole", "broken"
BAD = (DEAD, BLACK_HOLE, BROKEN)
KINDS = (NO_RECEIVER, HEALTHY, *BAD)
EVENTS = ("job.queued", "job.started", "job.succeeded", "job.failed")
# The states that events of each job tell. A slow job has revisions between them that no event tells.
SENT = ("queued", "running", "succeeded")
SECRET = "whsec_" + "c3RhdHVz" * 4
ROUNDS = 10  # of each kind; in a short form fewer, so that a round is no smaller than the next line
SMALLEST_ROUND = 25  # jobs
MAX_LOSS = 0.05  # share of the worker's throughput
SURE_FROM = 500  # jobs of each kind: fewer say little about throughput
PATIENCE_S = 120.0  # for a round, and for the last event
TIMEOUT_S = 10.0  # of one delivery: the default


@contextlib.contextmanager
def bad_receivers() -> Iterator[dict[str, int]]:
    """Kind -> port of each of those that are bad."""
    silent = socket.create_server(("127.0.0.1", 0), backlog=1024)  # connections stand, nobody accepts them
    with silent, FaultyProxy(silent.getsockname()[1]) as broken:
        broken.fault = HTTP_FAULTS["answers_500"]
        yield {DEAD: servers.free_port(), BLACK_HOLE: silent.getsockname()[1], BROKEN: broken.port}


def attack(count: int, seed: int) -> Verdict:
    """Run `count` jobs of each kind; the figures are their rates."""
    draw = random.Random(seed)  # noqa: S311  # repeatable, not secret
    rounds = max(min(ROUNDS, count // SMALLEST_ROUND), 1)
    submitted: dict[str, list[str]] = {kind: [] for kind in KINDS}
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    secret = SecretStr(f"attacked={SECRET}")
    with bad_receivers() as ports:
        hosts = [f"127.0.0.1:{port}" for port in ports.values()]
        settings = {"webhook_hosts": hosts, "webhook_secrets": secret, "webhook_timeout_s": TIMEOUT_S}
        with running_cluster("status", seed, **settings) as cluster:
            ports[HEALTHY] = cluster.receiver.proxy.port
            cluster.work()
            client = cluster.client
            warm_up = [cluster.job(10**6 + number) for number in range(SMALLEST_ROUND)]
            _run(client, warm_up)
            for number in range(rounds):
                share = range(count * number // rounds, count * (number + 1) // rounds)
                for kind in draw.sample(KINDS, len(KINDS)):
                    jobs = [_job(cluster, ports.get(kind), kind, at) for at in share]
                    rates[kind].append(_run(client, jobs))
                    submitted[kind] += [job.id for job in jobs]
            with contextlib.suppress(TimeoutError):  # what is missing is found below
                wait_for(
                    lambda: len(_received(cluster)) >= len(SENT) * count, PATIENCE_S, "all events arrive"
                )
            cluster.stop_workers()
            verdict = _verdict(cluster, submitted)
    ratios = {kind: _ratio(rates[kind], rates[HEALTHY]) for kind in BAD}
    verdict.figures |= {
        "throughput_ratio": min(ratios.values()),
        "throughput_ratios": ratios,
        "throughput_ratio_to_none": {kind: _ratio(rates[kind], rates[NO_RECEIVER]) for kind in KINDS[1:]},
        "jobs_per_s": {kind: round(statistics.median(some), 1) for kind, some in rates.items()},
    }
    cheap = count < SURE_FROM or min(ratios.values()) >= 1 - MAX_LOSS
    verdict.require(cheap, f"A bad receiver costs the worker more than {MAX_LOSS:.0%} of its throughput.")
    return verdict


def _ratio(some: Sequence[float], others: Sequence[float]) -> float:
    """Of the rates in rounds beside each other, the one in the middle."""
    ratios = (rate / max(other, 1e-3) for rate, other in zip(some, others, strict=True))
    return round(statistics.median(ratios), 3)


def _job(cluster: Cluster, port: int | None, kind: str, number: int) -> Job:
    """The same work for each kind."""
    hook = {"url": f"http://127.0.0.1:{port}/{kind}", "events": EVENTS, "secret_ref": "attacked"}
    another = cluster.job(KINDS.index(kind) * 10**5 + number).id
    same = cluster.job(number).model_dump(mode="json")
    return Job.parse({**same, "id": another, "priority": "normal", "webhooks": [hook] if port else []})


def _run(client: GradcamClient, jobs: Sequence[Job]) -> float:
    """Jobs per second, from the first that ends to the last."""
    ids = client.submit_many(jobs)
    end = time.monotonic() + PATIENCE_S
    documents = client.statuses(ids).values()
    while not all(document.final for document in documents) and time.monotonic() < end:
        time.sleep(0.05)
        documents = client.statuses(ids).values()
    times = sorted(document.completed_at.timestamp() for document in documents if document.completed_at)
    return (len(times) - 1) / max(times[-1] - times[0], 1e-3) if len(times) > 1 else 0.0


def _received(cluster: Cluster) -> list[dict[str, Any]]:
    return webhook_receiver.events(cluster.folder / "events.jsonl")


def _verdict(cluster: Cluster, submitted: dict[str, list[str]]) -> Verdict:
    for ids in submitted.values():
        cluster.accepted |= dict.fromkeys(ids, 0.0)
    seen, wrong = count_received(_received(cluster))
    wanted = {(job_id, state) for job_id in submitted[HEALTHY] for state in SENT}
    bad = [job_id for kind in BAD for job_id in submitted[kind]]
    verdict = JobObserver(cluster).verdict(faults=len(bad))
    verdict.doubled += wrong["twice"]
    verdict.forbid(wanted - seen.keys(), "events did not reach the healthy receiver")
    verdict.forbid(seen.keys() - wanted, "events reached another receiver")
    for fault, number in wrong.items():
        verdict.require(not number, f"{number} events reached the healthy receiver {fault}.")
    with cluster.ledger as server, server.pipeline(transaction=False) as pipeline:
        for job_id in bad:
            pipeline.llen(f"{cluster.settings.key_prefix}events:{job_id}:hook1")
        incomplete = sum(length != len(SENT) for length in pipeline.execute())
    verdict.require(not incomplete, f"{incomplete} jobs have not all of their events in the outbox.")
    outbox = RedisOutbox(RedisLedger(cluster.settings).server, retention_s=cluster.settings.retention_s)
    verdict.figures["events"] = seen.total()
    verdict.figures |= {"waiting": outbox.count_recipients(), "parked": len(outbox.find_parked())}
    return verdict


def count_received(events: Iterable[dict[str, Any]]) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """(Job, state) -> how often the receiver got it; how many came twice, unsigned or late."""
    seen, wrong = Counter[tuple[str, str]](), Counter[str]()
    last, message_ids = Counter[str](), set[str]()
    secret = standardwebhooks.Webhook(SECRET)
    for event in events:
        job_id, revision = event["data"]["id"], event["data"]["revision"]
        seen[job_id, event["data"]["status"]] += 1
        message_id = event["headers"].get("webhook-id", "")
        wrong["twice"] += message_id in message_ids
        message_ids.add(message_id)
        wrong["after a later one of the same job"] += revision < last[job_id]
        last[job_id] = revision
        try:
            secret.verify(event["body"], event["headers"])
        except WebhookVerificationError:
            wrong["without a valid signature"] += 1
    return seen, wrong
