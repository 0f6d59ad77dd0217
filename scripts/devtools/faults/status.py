"""The attack on the delivery of status: receivers that are dead, that never answer, and that are broken.

Jobs run in rounds, those of one round with a webhook at one of these, at a healthy receiver, or with none: so
what each of them costs the worker is compared within one run. While it goes on, events for the bad ones pile
up; those for the healthy one have to arrive, signed, once, in order.
"""

import contextlib
import json
import random
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import standardwebhooks
from pydantic import SecretStr
from standardwebhooks.webhooks import WebhookVerificationError

from devtools.faults.cluster import Cluster, running_cluster, wait_for
from devtools.faults.verdict import Verdict
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument

NO_RECEIVER, HEALTHY, DEAD, BLACK_HOLE, BROKEN = "none", "healthy", "dead", "black_hole", "broken"
BAD = (DEAD, BLACK_HOLE, BROKEN)
KINDS = (NO_RECEIVER, HEALTHY, *BAD)
EVENTS = ("job.queued", "job.started", "job.succeeded", "job.failed")
SECRET = "whsec_" + "c3RhdHVz" * 4
ROUNDS = 10  # of each kind; in a short form fewer, so that a round is no smaller than the next line
SMALLEST_ROUND = 25  # jobs
MAX_LOSS = 0.05  # share of the worker's throughput
SURE_FROM = 500  # jobs of each kind: fewer say little about throughput
PATIENCE_S = 120.0  # for a round, and for the last event
TIMEOUT_S = 10.0  # of one delivery: the default


@dataclass
class Receivers:
    """A healthy receiver, which records what it gets, and bad ones."""

    urls: dict[str, str] = field(default_factory=dict)  # kind -> URL
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)  # headers and body

    @property
    def ports(self) -> list[int]:
        """Where they are."""
        return [int(url.split(":")[2].partition("/")[0]) for url in self.urls.values()]


@contextlib.contextmanager
def receiving() -> Iterator[Receivers]:
    """Receivers that run within the block."""
    receivers = Receivers()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            well = self.path == f"/{HEALTHY}"
            if well:
                receivers.received.append(({name.lower(): said for name, said in self.headers.items()}, body))
            self.send_response(204 if well else 500)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with contextlib.ExitStack() as stack:
        for kind in (HEALTHY, BROKEN):
            server = stack.enter_context(Server(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
            stack.callback(server.shutdown)
            receivers.urls[kind] = f"http://127.0.0.1:{server.server_port}/{kind}"
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))  # and no accept
        receivers.urls[BLACK_HOLE] = f"http://127.0.0.1:{silent.getsockname()[1]}/{BLACK_HOLE}"
        with socket.create_server(("127.0.0.1", 0)) as closed:
            receivers.urls[DEAD] = f"http://127.0.0.1:{closed.getsockname()[1]}/{DEAD}"
        yield receivers


def attack(count: int, seed: int) -> Verdict:
    """Run `count` jobs of each kind; the figures are their rates."""
    draw = random.Random(seed)  # noqa: S311  # repeatable, not secret
    rounds = max(min(ROUNDS, count // SMALLEST_ROUND), 1)
    submitted: dict[str, list[str]] = {kind: [] for kind in KINDS}
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with receiving() as receivers, _attacked_cluster(seed, receivers) as cluster:
        cluster.work()
        client = cluster.client
        _run(client, [cluster.job(10**6 + number) for number in range(SMALLEST_ROUND)])  # until all is warm
        for number in range(rounds):
            for kind in draw.sample(KINDS, len(KINDS)):
                some = [_job(cluster, receivers, kind, at) for at in _share(count, rounds, number)]
                rates[kind].append(_run(client, some))
                submitted[kind] += [one.id for one in some]
        events = 3 * len(submitted[HEALTHY])
        with contextlib.suppress(TimeoutError):  # what is missing is found below
            wait_for(lambda: len(receivers.received) >= events, PATIENCE_S, "all events arrive")
        cluster.stop_workers()
        verdict = _verdict(cluster, receivers, submitted)
    ratios = {kind: _ratio(rates[kind], rates[HEALTHY]) for kind in BAD}
    verdict.figures |= {
        "throughput_ratio": min(ratios.values()),
        "throughput_ratios": ratios,
        "throughput_ratio_to_none": {kind: _ratio(rates[kind], rates[NO_RECEIVER]) for kind in KINDS[1:]},
        "jobs_per_s": {kind: round(statistics.median(some), 1) for kind, some in rates.items()},
    }
    if count >= SURE_FROM and min(ratios.values()) < 1 - MAX_LOSS:
        verdict.broken.append(f"A bad receiver costs the worker more than {MAX_LOSS:.0%} of its throughput.")
    return verdict


def _ratio(some: Sequence[float], others: Sequence[float]) -> float:
    """Of the rates in rounds beside each other, the one in the middle."""
    return round(
        statistics.median(one / max(other, 1e-3) for one, other in zip(some, others, strict=True)), 3
    )


def _attacked_cluster(seed: int, receivers: Receivers) -> contextlib.AbstractContextManager[Cluster]:
    return running_cluster(
        "status",
        seed,
        webhook_hosts=tuple(f"127.0.0.1:{port}" for port in receivers.ports),
        webhook_secrets=SecretStr(f"attacked={SECRET}"),
        webhook_timeout_s=TIMEOUT_S,
    )


def _share(jobs: int, rounds: int, number: int) -> range:
    """The numbers of the jobs of one kind in one round."""
    return range(jobs * number // rounds, jobs * (number + 1) // rounds)


def _job(cluster: Cluster, receivers: Receivers, kind: str, number: int) -> Job:
    """The same work for each kind."""
    hooks = [
        {"url": url, "events": EVENTS, "secret_ref": "attacked"} for url in (receivers.urls.get(kind),) if url
    ]
    another = cluster.job(KINDS.index(kind) * 10**5 + number).id
    same = cluster.job(number).model_dump(mode="json")
    return Job.parse({**same, "id": another, "priority": "normal", "webhooks": hooks})


def _run(client: GradcamClient, jobs: Sequence[Job]) -> float:
    """Jobs per second, from the first that ends to the last."""
    ids = client.submit_many(jobs)
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        documents = client.statuses(ids).values()
        if all(one.final for one in documents):
            break
        time.sleep(0.05)
    times = sorted(one.completed_at.timestamp() for one in documents if one.completed_at)
    return (len(times) - 1) / max(times[-1] - times[0], 1e-3) if len(times) > 1 else 0.0


def _verdict(cluster: Cluster, receivers: Receivers, submitted: dict[str, list[str]]) -> Verdict:
    every = [job_id for ids in submitted.values() for job_id in ids]
    ledger = RedisLedger(cluster.settings)
    documents = ledger.read_many(every)
    seen, twice, unsigned, disordered = _count_received(receivers)
    wanted = {(job_id, revision) for job_id in submitted[HEALTHY] for revision in (1, 2, 3)}
    missing = len(wanted - seen.keys())
    kept = _kept(ledger, [job_id for kind in BAD for job_id in submitted[kind]])
    outbox = RedisOutbox(ledger.server, retention_s=cluster.settings.retention_s)
    found = {
        f"{missing} events did not reach the healthy receiver.": missing,
        f"{twice} events reached the healthy receiver twice.": twice,
        f"{disordered} events came after a later one of the same job.": disordered,
        f"{unsigned} events had no valid signature.": unsigned,
        f"{kept} jobs have not all of their events in the outbox.": kept,
        f"{len(seen.keys() - wanted)} events reached another receiver.": len(seen.keys() - wanted),
    }
    return Verdict(
        jobs=len(every),
        faults=sum(len(submitted[kind]) for kind in BAD),
        lost=len(set(every) - documents.keys()),
        without_final_state=sum(not one.final for one in documents.values()),
        untyped=sum(_untyped(one) for one in documents.values()),
        doubled=twice,
        figures={
            "events": len(receivers.received),
            "waiting": outbox.count_recipients(),
            "parked": len(outbox.find_parked()),
        },
        broken=[sentence for sentence, count in found.items() if count],
    )


def _untyped(document: StatusDocument) -> bool:
    return document.status != "succeeded" and (document.error is None or document.error.code == "internal")


def _count_received(receivers: Receivers) -> tuple[Counter[tuple[str, int]], int, int, int]:
    """(Job, revision) -> how often the healthy receiver heard of it; how many of them twice, without a
    signature, and after a later one.
    """
    seen, last = Counter[tuple[str, int]](), Counter[str]()
    ids, unsigned, disordered = Counter[str](), 0, 0
    secret = standardwebhooks.Webhook(SECRET)
    for headers, body in receivers.received:
        data = json.loads(body)["data"]
        seen[data["id"], data["revision"]] += 1
        ids[headers.get("webhook-id", "")] += 1
        disordered += data["revision"] < last[data["id"]]
        last[data["id"]] = data["revision"]
        try:
            secret.verify(body, headers)
        except WebhookVerificationError:
            unsigned += 1
    return seen, sum(count - 1 for count in ids.values()), unsigned, disordered


def _kept(ledger: RedisLedger, ids: Sequence[str]) -> int:
    """Count the jobs that have not three events in the outbox though none was delivered."""
    server: Any = ledger.server
    with server.redis.pipeline(transaction=False) as pipeline:
        for job_id in ids:
            pipeline.llen(f"{server.prefix}events:{job_id}:hook1")
        return sum(length != 3 for length in pipeline.execute())  # noqa: PLR2004  # queued, started, succeeded
