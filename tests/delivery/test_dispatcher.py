import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from gradcam_worker.delivery import dispatcher as dispatcher_module
from gradcam_worker.delivery.dispatcher import REDELIVERY, OutboxDispatcher
from gradcam_worker.errors import (
    DeliveryRefused,
    EndpointGone,
    LedgerUnavailable,
    StatusUnavailable,
    UriNotAllowed,
)
from gradcam_worker.ledger.outbox import Delivery
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusEvent, WorkerRef
from gradcam_worker.testing import MemoryLedger

GIVE_UP_S = 3 * 86_400.0
WORKER = WorkerRef(id="gpu-1:7", device="cpu")


@dataclass
class Scene:
    """A ledger whose clock is set by hand, a dispatcher, and receivers with prepared answers."""

    job: Job
    now_s: float = 1000.0
    answers: dict[str, Callable[[], object]] = field(default_factory=dict)  # by URL: called; may raise
    told: list[tuple[str, str, int]] = field(default_factory=list)  # URL or sink, job id, revision

    def __post_init__(self) -> None:
        self.ledger = MemoryLedger(clock=lambda: self.now_s)
        self.outbox = self.ledger.outbox

    def dispatcher(self, threads: int = 4, *, sinks: tuple[str, ...] = ()) -> OutboxDispatcher:
        return OutboxDispatcher(
            self.outbox,
            self.receive,
            dict.fromkeys(sinks, self.receive),
            threads=threads,
            give_up_s=GIVE_UP_S,
        )

    def submit(self, *urls: str, events: tuple[str, ...] = ("job.queued",)) -> Job:
        hooks = [{"url": url, "events": events} for url in urls]
        job = Job.parse({**self.job.model_dump(mode="json"), "id": new_id(), "webhooks": hooks})
        self.ledger.submit(job)
        return job

    def end(self, job: Job) -> None:
        self.ledger.finish(self.ledger.claim(self.ledger.read(job.id), WORKER).document, status="succeeded")

    def receive(self, delivery: Delivery, event: StatusEvent) -> None:
        url = delivery.webhook.url if delivery.webhook else delivery.destination
        assert event.type == f"gradcam.{delivery.event}"
        self.answers.get(url, lambda: None)()
        self.told.append((url, event.data.id, event.data.revision))


@pytest.fixture
def scene(job: Job) -> Scene:
    return Scene(job)


def raising(error: BaseException) -> Callable[[], object]:
    def answer() -> None:
        raise error

    return answer


@contextmanager
def working(dispatcher: OutboxDispatcher) -> Iterator[BackgroundLoop]:
    """A dispatcher that delivers while the block runs."""
    dispatcher.loop.start()
    try:
        yield dispatcher.loop
    finally:
        assert dispatcher.loop.stop(20)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_every_event_is_delivered_to_every_recipient_in_order(scene: Scene) -> None:
    scene.outbox.open_sink("sql")
    events = ("job.queued", "job.started", "job.succeeded")
    jobs = [scene.submit("https://a.example/x", "https://b.example/y", events=events) for _ in range(20)]
    for job in jobs:
        scene.end(job)
    scene.dispatcher(sinks=("sql",)).run_round()
    assert len(scene.told) == len(set(scene.told)) == 20 * 3 * 3
    for job in jobs:
        for url in ("https://a.example/x", "https://b.example/y", "sql"):
            assert [one[2] for one in scene.told if one[:2] == (url, job.id)] == [1, 2, 3]
    assert scene.outbox.count_recipients() == 0


def test_a_receiver_that_sends_retry_after_is_not_tried_before(scene: Scene) -> None:
    for _ in range(3):
        scene.submit("https://a.example/x")
    tries: list[float] = []

    def busy() -> None:
        tries.append(scene.now_s)
        raising(StatusUnavailable("Webhook answered HTTP 429.", retry_after_s=500))()

    scene.answers["https://a.example/x"] = busy
    dispatcher = scene.dispatcher()
    while scene.now_s < 1499:
        dispatcher.run_round()
        scene.now_s += 20
    assert tries == [1000], "nor for any other job"
    scene.now_s = 1501
    scene.answers.clear()
    for _ in range(2):
        dispatcher.run_round()
    assert len(scene.told) == 3


def test_the_pauses_double_up_to_three_hours_and_the_jitter_is_a_fifth(scene: Scene) -> None:
    scene.submit("https://a.example/x")
    tries: list[float] = []

    def fails() -> None:
        tries.append(scene.now_s)
        raising(StatusUnavailable("Webhook answered HTTP 500."))()

    scene.answers["https://a.example/x"] = fails
    dispatcher = scene.dispatcher()
    while len(tries) < 17:
        dispatcher.run_round()
        scene.now_s = (
            min(scene.outbox._due.values(), default=0) + 61
        )  # and no destination is left alone any more
    pauses = [after - before - 61 for before, after in pairwise(tries)]
    expected = [min(2.0 * 2**number, REDELIVERY.max_s) for number in range(16)]
    assert all(0.79 * e <= p <= 1.21 * e for p, e in zip(pauses, expected, strict=True)), pauses
    assert expected[-1] == REDELIVERY.max_s


def test_after_three_days_the_event_is_parked_and_so_are_those_whose_turn_never_came(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    old = [scene.submit("https://a.example/x") for _ in range(5)]
    scene.answers["https://a.example/x"] = raising(StatusUnavailable("Webhook answered HTTP 500."))
    dispatcher = scene.dispatcher()
    dispatcher.run_round()
    scene.now_s += GIVE_UP_S - 1
    young = scene.submit("https://a.example/x")
    dispatcher.run_round()
    assert not scene.outbox.find_parked()
    scene.now_s += 100
    dispatcher.run_round()
    assert {one.recipient for one in scene.outbox.find_parked()} == {f"{job.id}:hook1" for job in old}
    assert scene.outbox.count_recipients() == 1, "the young one is tried for three days of its own"
    assert 'reason="Webhook answered HTTP 500."' in caplog.text
    scene.answers.clear()
    for one in scene.outbox.find_parked():
        assert scene.outbox.unpark(one)
    scene.now_s += 100
    for _ in range(2):
        dispatcher.run_round()
    assert {job_id for _, job_id, _ in scene.told} == {job.id for job in (*old, young)}


def test_what_was_replayed_is_tried_for_three_days_again(scene: Scene) -> None:
    scene.submit("https://a.example/x")
    scene.answers["https://a.example/x"] = raising(StatusUnavailable("Webhook answered HTTP 500."))
    dispatcher = scene.dispatcher()
    for _ in range(2):
        dispatcher.run_round()
        scene.now_s += GIVE_UP_S + 1
    [parked] = scene.outbox.find_parked()
    assert scene.outbox.unpark(parked)
    dispatcher.run_round()
    assert not scene.outbox.find_parked()


def test_a_receiver_that_is_gone_gets_no_further_event_of_any_job(scene: Scene) -> None:
    url = "https://a.example/x"
    for _ in range(3):
        scene.submit(url, "https://a.example/y")
    tries: list[str] = []

    def gone() -> None:
        tries.append(url)
        raising(EndpointGone("Webhook answered HTTP 410."))()

    scene.answers[url] = gone
    dispatcher = scene.dispatcher(threads=1)
    dispatcher.run_round()
    scene.submit(url)
    dispatcher.run_round()
    assert len(tries) == 1
    assert scene.outbox.find_disabled() == [url]
    assert len(scene.outbox.find_parked()) == 4
    assert len(scene.told) == 3, "its neighbour at the same host is told"


@pytest.mark.parametrize("error", [DeliveryRefused("HTTP 400."), UriNotAllowed("Not this host.")])
def test_a_receiver_that_refuses_progress_events_gets_the_final_event(scene: Scene, error: Exception) -> None:
    job = scene.submit("https://a.example/x", events=("job.queued", "job.started", "job.succeeded"))
    scene.end(job)
    refused = raising(error)
    scene.answers["https://a.example/x"] = lambda: refused() if left.pop() else None
    left = [False, True, True]
    scene.dispatcher().run_round()
    assert [revision for _, _, revision in scene.told] == [3]
    assert not scene.outbox.find_parked()


def test_a_final_event_for_a_host_that_is_not_allowed_is_parked(scene: Scene) -> None:
    scene.end(scene.submit("https://a.example/x", events=("job.succeeded",)))
    scene.answers["https://a.example/x"] = raising(UriNotAllowed("The host is not allowed."))
    scene.dispatcher().run_round()
    [parked] = scene.outbox.find_parked()
    assert parked.first
    assert parked.first.event == "job.succeeded"


@pytest.mark.parametrize("mistake", [ZeroDivisionError(), SystemExit(1)])
def test_a_defect_in_one_delivery_does_not_affect_the_others(
    scene: Scene, caplog: pytest.LogCaptureFixture, mistake: BaseException
) -> None:
    scene.submit("https://a.example/x", "https://b.example/y")
    scene.answers["https://a.example/x"] = raising(mistake)
    dispatcher = scene.dispatcher(threads=1)
    dispatcher.run_round()
    assert [url for url, _, _ in scene.told] == ["https://b.example/y"]
    assert "delivery_failed" in caplog.text
    scene.now_s += 10
    scene.answers.clear()
    dispatcher.run_round()
    assert [url for url, _, _ in scene.told] == ["https://b.example/y", "https://a.example/x"]


def test_a_ledger_that_cannot_be_reached_is_tried_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = iter([LedgerUnavailable("The ledger cannot be reached."), ZeroDivisionError(), SystemExit(1)])
    real = scene.outbox.claim_deliveries

    def claim(*args: object, **limits: object) -> list[Delivery]:
        for error in failing:
            raise error
        return real(*args, **limits)  # type: ignore[arg-type]

    monkeypatch.setattr(scene.outbox, "claim_deliveries", claim)
    scene.submit("https://a.example/x")
    with working(scene.dispatcher()):
        wait_for(lambda: scene.told)
    assert "The ledger cannot be reached." in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_events_for_a_sink_that_this_worker_lacks_are_left_to_one_that_has_it(scene: Scene) -> None:
    scene.outbox.open_sink("sql")
    scene.submit()
    scene.dispatcher().run_round()
    assert (scene.told, scene.outbox.count_recipients()) == ([], 1)
    scene.dispatcher(sinks=("sql",)).run_round()
    assert (len(scene.told), scene.outbox.count_recipients()) == (1, 0)


@dataclass
class Gate:
    """A receiver that keeps whoever comes until it is opened."""

    inside: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    opened: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def at(self, name: str) -> Callable[[], object]:
        def answer() -> None:
            with self.lock:
                self.inside.update([name, "all"])
                self.most |= self.inside
            self.opened.wait(20)
            with self.lock:
                self.inside.subtract([name, "all"])

        return answer


def test_there_are_never_more_under_way_than_threads_and_a_destination_never_has_them_all(
    scene: Scene,
) -> None:
    gate, hosts = Gate(), [f"https://{name}.example/x" for name in "abcdefgh"]
    dispatcher = scene.dispatcher()
    scene.submit(*hosts[:4])
    scene.submit(*hosts[4:])
    dispatcher.run_round()  # now they are known to answer
    for _ in range(20):
        scene.submit(hosts[0])
    scene.submit(*hosts[1:4])
    scene.submit(*hosts[4:])
    scene.answers = {url: gate.at(url) for url in hosts}
    with working(dispatcher):
        wait_for(lambda: gate.inside["all"] == 4)
        gate.opened.set()
        wait_for(lambda: scene.outbox.count_recipients() == 0)
    assert (gate.most["all"], gate.most[hosts[0]]) == (4, 3)


def test_hosts_that_never_answered_have_one_thread_each_and_half_of_them_together(scene: Scene) -> None:
    gate, slow = Gate(), [f"https://{name}.example/x" for name in "abc"]
    scene.answers = {url: gate.at(url) for url in slow}
    healthy = "https://z.example/x"
    dispatcher = scene.dispatcher()
    scene.submit(healthy)
    dispatcher.run_round()
    for _ in range(50):
        scene.submit(*slow)
    scene.submit(healthy)
    with working(dispatcher):
        wait_for(lambda: len(scene.told) == 2)
        assert gate.inside["all"] == 2, "nobody has answered there yet"
        for _ in range(20):
            scene.submit(healthy)
        wait_for(lambda: len(scene.told) == 22)
        gate.opened.set()
        wait_for(lambda: scene.outbox.count_recipients() == 0)
    assert len(scene.told) == 22 + 150


def test_hosts_that_no_longer_answer_have_half_of_the_threads_again(scene: Scene) -> None:
    slow = [f"https://{name}.example/x" for name in "abc"]
    dispatcher = scene.dispatcher()
    scene.submit(*slow)
    dispatcher.run_round()
    assert len(scene.told) == 3
    scene.answers = dict.fromkeys(slow, raising(StatusUnavailable("Webhook answered HTTP 500.")))
    scene.submit(*slow)
    dispatcher.run_round()
    gate = Gate()
    scene.answers = {url: gate.at(url) for url in slow}
    for _ in range(5):
        scene.submit(*slow)
    with working(dispatcher):
        wait_for(lambda: gate.inside["all"] == 2)
        scene.submit("https://z.example/x")
        scene.submit(slow[0])
        time.sleep(1)
        assert gate.most["all"] == 2
        gate.opened.set()
        wait_for(lambda: "https://z.example/x" in {url for url, _, _ in scene.told})
        scene.now_s += 100
        wait_for(lambda: scene.outbox.count_recipients() == 0)


def test_stopping_waits_for_what_is_under_way_but_not_for_ever(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    scene.answers["https://a.example/x"] = gate.at("a")
    scene.submit("https://a.example/x")
    with working(scene.dispatcher()) as loop:
        wait_for(lambda: gate.inside["a"])
        loop.request_stop()
        gate.opened.set()
    assert (len(scene.told), scene.outbox.count_recipients()) == (1, 0), "it was waited for"
    gate.opened.clear()
    gate.inside.clear()
    monkeypatch.setattr(dispatcher_module, "STOP_TIMEOUT_S", 0.2)
    scene.submit("https://a.example/x")
    with working(scene.dispatcher()) as loop:
        wait_for(lambda: gate.inside["a"])
        begun = time.monotonic()
        loop.request_stop()
    assert time.monotonic() - begun < 10
    assert (len(scene.told), scene.outbox.count_recipients()) == (1, 1), "it is not lost"
    gate.opened.set()
    wait_for(lambda: scene.outbox.count_recipients() == 0)


def test_a_dispatcher_with_one_thread_delivers_everything_and_logs_nothing(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(5):
        scene.submit("https://a.example/x", "https://b.example/y")
    scene.dispatcher(threads=1).run_round()
    assert (len(scene.told), caplog.text) == (10, "")
