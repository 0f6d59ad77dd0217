"""Couriers between a real Valkey and real receivers, good and bad ones."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import standardwebhooks
from pydantic import SecretStr

from gradcam_worker.delivery.dispatcher import OutboxDispatcher
from gradcam_worker.delivery.webhooks import Webhooks, message_id
from gradcam_worker.ledger.outbox import Delivery
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.resilience.background_loop import stop_all
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusEvent, WorkerRef
from gradcam_worker.settings import Settings

SECRET = "whsec_" + "bmV3" * 8
WORKER = WorkerRef(id="gpu-1:7", device="cpu")
TIMEOUT_S = 60  # of one delivery: whoever waits for a black hole waits as long
SOON_S = 30  # what has not to wait for one is there by then, on the slowest machine
EVENTS = ("job.queued", "job.started", "job.succeeded")


@dataclass
class Post:
    """A ledger, its outbox and a dispatcher of its own, as a worker has them."""

    settings: Settings
    job: Job

    def __post_init__(self) -> None:
        self.ledger = RedisLedger(self.settings)
        self.outbox = RedisOutbox(self.ledger.server, retention_s=60)
        self.webhooks = Webhooks(self.settings)

    def submit(self, url: str, *, events: tuple[str, ...] = ("job.queued",)) -> Job:
        hooks = [{"url": url, "events": events, "secret_ref": "app1"}]
        job = Job.parse({**self.job.model_dump(mode="json"), "id": new_id(), "webhooks": hooks})
        self.ledger.submit(job)
        return job

    def run(self, job: Job) -> None:
        document = self.ledger.claim(self.ledger.read(job.id), WORKER).document
        self.ledger.finish(document, status="succeeded")

    def send(self, delivery: Delivery, event: StatusEvent) -> None:
        assert delivery.webhook
        hook = delivery.webhook
        self.webhooks.send(hook.url, hook.secret_ref, event, message_id(delivery.document))

    @contextlib.contextmanager
    def dispatchers(self, count: int = 1) -> Iterator[None]:
        """Run the dispatchers of so many workers."""
        made = [
            OutboxDispatcher(self.outbox, self.send, {}, threads=4, give_up_s=self.settings.webhook_give_up_s)
            for _ in range(count)
        ]
        for one in made:
            one.loop.start()
        try:
            yield
        finally:
            stop_all(one.loop for one in made)


@pytest.fixture
def post(settings: Settings, job: Job) -> Post:
    changes = {
        "private_networks": ("127.0.0.0/8",),
        "webhook_timeout_s": TIMEOUT_S,
        "webhook_secrets": SecretStr(f"app1={SECRET}"),
    }
    return Post(settings.model_copy(update=changes), job)


def allow(post: Post, *ports: int) -> None:
    """The operator allows these ports of this machine."""
    hosts = tuple(f"127.0.0.1:{port}" for port in ports)
    post.webhooks = Webhooks(post.settings.model_copy(update={"webhook_hosts": hosts}))


def wait_for(condition: Callable[[], object], seconds: float = SOON_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def port_of(server: Any) -> int:
    return int(server.host.rpartition(":")[2])


def test_a_black_hole_a_dead_and_a_broken_receiver_keep_no_one_elses_events_waiting(
    post: Post, http_server: Any, public_server: Any, answer: Any, silent_port: int, free_port: int
) -> None:
    good = http_server.url("/good", answer(204))
    broken = public_server.url("/broken", answer(500))
    bad = (f"http://127.0.0.1:{silent_port}/x", f"http://127.0.0.1:{free_port}/x", broken)
    allow(post, silent_port, free_port, port_of(http_server), port_of(public_server))
    for _ in range(100):
        for url in bad:
            post.submit(url)
    first = [post.submit(good, events=EVENTS) for _ in range(100)]
    for job in first:
        post.run(job)
    with post.dispatchers():
        wait_for(lambda: len(http_server.received) == 300)
        for _ in range(100):
            for url in bad:
                post.submit(url)
        second = [post.submit(good, events=EVENTS) for _ in range(10)]
        for job in second:
            post.run(job)
        wait_for(lambda: len(http_server.received) == 330)
        stopping = time.monotonic()
    assert time.monotonic() - stopping < SOON_S, "nor does the end of the worker wait for them"
    told: dict[str, list[int]] = {}
    headers = {one["webhook-id"]: one for one in http_server.headers}
    for _, body in http_server.received:
        data = json.loads(body)["data"]
        told.setdefault(data["id"], []).append(data["revision"])
        standardwebhooks.Webhook(SECRET).verify(body, headers[f"msg_{data['id']}_{data['revision']}"])
    assert told == {job.id: [1, 2, 3] for job in first + second}
    assert post.outbox.count_recipients() == 600, "the others are all still there"


def test_many_dispatchers_tell_everything_once_and_in_order(
    post: Post, http_server: Any, answer: Any
) -> None:
    url = http_server.url("/good", answer(204))
    allow(post, port_of(http_server))
    with post.dispatchers(3):
        jobs = [post.submit(url, events=EVENTS) for _ in range(60)]
        for job in jobs:
            post.run(job)
        wait_for(lambda: post.outbox.count_recipients() == 0)
    told: dict[str, list[int]] = {}
    for _, body in http_server.received:
        data = json.loads(body)["data"]
        told.setdefault(data["id"], []).append(data["revision"])
    assert told == {job.id: [1, 2, 3] for job in jobs}


def test_a_receiver_that_names_a_time_is_told_then_and_not_before(
    post: Post, http_server: Any, answer: Any
) -> None:
    times: list[float] = []
    busy = answer(503, headers={"retry-after": "4"}, before=lambda: times.append(time.monotonic()))
    url = http_server.url("/busy", busy)
    allow(post, port_of(http_server))
    for _ in range(3):
        post.submit(url)
    with post.dispatchers():
        wait_for(lambda: times)
        well = answer(204, before=lambda: times.append(time.monotonic()))
        http_server.answers["/busy"] = well
        wait_for(lambda: post.outbox.count_recipients() == 0)
    assert len(times) == 4, "the other jobs' events did not try their luck"
    assert times[1] - times[0] >= 3.9


def test_a_receiver_that_is_gone_is_left_alone_until_somebody_enables_it(
    post: Post, http_server: Any, answer: Any
) -> None:
    url = http_server.url("/gone", answer(410))
    allow(post, port_of(http_server))
    jobs = [post.submit(url) for _ in range(5)]
    with post.dispatchers():
        wait_for(lambda: len(post.outbox.find_parked()) == 5)
        assert len(http_server.received) == 1
        http_server.answers["/gone"] = answer(204)
        post.outbox.enable(url)
        assert all(post.outbox.unpark(one) for one in post.outbox.find_parked())
        wait_for(lambda: post.outbox.count_recipients() == 0)
    told = {json.loads(body)["data"]["id"] for _, body in http_server.received[1:]}
    assert told == {job.id for job in jobs}
