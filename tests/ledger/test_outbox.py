import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest

from gradcam_worker.ledger import outbox
from gradcam_worker.ledger.ledger import ClaimOutcome, Ledger
from gradcam_worker.ledger.outbox import DESTINATION_BACKOFF, Delivery, Outbox
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger

WORKER = WorkerRef(id="gpu-1:7", device="cpu")
LEASE_S = 30.0
PAUSE_S = 0.6  # of a destination, after its second failure in a row
A, B = "//a.example", "//b.example"
EVERYTHING = ("job.queued", "job.started", "job.progress", "job.retrying", "job.succeeded", "job.failed")


@dataclass
class Post:
    """A ledger and its outbox."""

    ledger: Ledger
    outbox: Outbox
    job: Job

    def submit(self, *urls: str, events: tuple[str, ...] = ("job.queued",)) -> Job:
        """A new job with these webhooks."""
        hooks = [{"url": url, "events": events} for url in urls]
        job = Job.parse({**self.job.model_dump(mode="json"), "id": new_id(), "webhooks": hooks})
        self.ledger.submit(job)
        return job

    def start(self, job: Job) -> StatusDocument:
        return self.ledger.claim(self.ledger.read(job.id), WORKER).document

    def claim(
        self, limit: int = 100, lease_s: float = LEASE_S, others: int = 100, **room: int
    ) -> list[Delivery]:
        """From host a and host b, as much as there is."""
        named = {f"//{name}.example": most for name, most in {"a": 100, "b": 100, **room}.items()}
        return self.outbox.claim_deliveries(limit, lease_s=lease_s, limits=named, others_limit=others)

    def fail(self, delivery: Delivery, delay_s: float = 0.0, **more: float) -> None:
        self.outbox.postpone(delivery, delay_s, **more)


@pytest.fixture(params=["memory", "redis"])
def post(
    request: pytest.FixtureRequest, settings: Settings, job: Job, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Post]:
    """Both outboxes keep the same promises."""
    for module in ("memory.outbox", "redis.outbox"):
        monkeypatch.setattr(
            f"gradcam_worker.ledger.{module}.DESTINATION_BACKOFF",
            replace(DESTINATION_BACKOFF, first_s=PAUSE_S),
        )
    if request.param == "memory":
        ledger = MemoryLedger()
        yield Post(ledger, ledger.outbox, job)
    else:
        yield in_redis(settings, job)


@pytest.fixture
def redis_post(settings: Settings, job: Job) -> Post:
    return in_redis(settings, job)


def in_redis(settings: Settings, job: Job) -> Post:
    ledger = RedisLedger(settings.model_copy(update={"retention_s": 60, "idempotency_retention_s": 60}))
    return Post(ledger, RedisOutbox(ledger.server, retention_s=60), job)


def keys(post: Post) -> set[str]:
    """What is in Redis, without what belongs to the job itself."""
    server: Any = post.outbox._server  # type: ignore[attr-defined]
    found = {key.removeprefix(server.prefix) for key in server.redis.scan_iter(f"{server.prefix}*")}
    own = ("job:", "queued:", "running", "dead", "claimed", "ended:")
    return {key for key in found if not key.startswith(own)}


def wait_for(condition: Callable[[], list[Delivery]]) -> list[Delivery]:
    end = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_each_change_of_a_job_leaves_what_its_webhooks_asked_for_and_no_more(post: Post) -> None:
    job = post.submit("https://a.example/x", "https://b.example/y", events=EVERYTHING)
    quiet = post.submit("https://b.example/z", events=("job.failed",))
    running = post.start(job)
    post.ledger.advance(post.ledger.advance(running, stage="explain"), status="succeeded")
    post.ledger.advance(post.start(quiet), status="succeeded")
    seen: dict[str, list[str]] = {}
    while deliveries := post.claim():
        for one in deliveries:
            seen.setdefault(one.recipient, []).append(one.event)
            post.outbox.complete(one)
    told = ["job.queued", "job.started", "job.progress", "job.succeeded"]
    assert seen == {f"{job.id}:hook1": told, f"{job.id}:hook2": told}


def test_webhooks_are_told_again_how_a_job_ends_that_is_tried_again(post: Post) -> None:
    job = post.submit("https://a.example/x", events=("job.queued", "job.failed", "job.succeeded"))
    post.ledger.advance(post.start(job), status="failed")
    post.ledger.retry(job.id)
    post.ledger.advance(post.start(job), status="succeeded")
    told = []
    while deliveries := post.claim():
        for one in deliveries:
            told.append((one.event, one.document.revision))
            post.outbox.complete(one)
    assert [event for event, _ in told] == ["job.queued", "job.failed", "job.queued", "job.succeeded"]
    assert [revision for _, revision in told] == [1, 3, 4, 6]


def test_an_event_carries_all_that_it_takes_to_deliver_it(post: Post) -> None:
    job = post.submit("https://A.example:8443/x?y=1", events=("job.started",))
    running = post.start(job)
    [delivery] = post.claim()
    assert (delivery.destination, delivery.event) == ("//a.example:8443", "job.started")
    assert (delivery.webhook, delivery.document) == (job.webhooks[0], running)
    assert (delivery.tries, delivery.waited_s < 20) == (0, True)


@pytest.mark.parametrize(
    ("url", "destination"),
    [
        ("https://App.example/hook/1", "//app.example"),
        ("https://u:p@app.example:8443?job=1", "//app.example:8443"),
        ("https://app.example#job", "//app.example"),
        ("http:\\\\app.example", "//"),
        ("nothing", "//"),
        ("https://sql", "//sql"),
    ],
)
def test_hosts_have_a_destination_each_which_no_sink_can_have(url: str, destination: str) -> None:
    assert outbox.destination_of(url) == destination


def test_a_change_that_is_written_twice_is_told_once(post: Post) -> None:
    running = post.start(post.submit("https://a.example/x", events=("job.succeeded",)))
    after = running.model_copy(update={"status": "succeeded", "revision": running.revision + 1})
    for _ in range(2):
        assert post.ledger._compare_and_set(running, after)
    [delivery] = post.claim()
    post.outbox.complete(delivery)
    assert not post.claim()


def test_a_change_that_is_refused_is_not_told(post: Post) -> None:
    job = post.submit("https://a.example/x", events=("job.started",))
    before = post.ledger.read(job.id)
    post.ledger.claim(before, WORKER)
    assert post.ledger.claim(before, WORKER).outcome is ClaimOutcome.CHANGED
    [delivery] = post.claim()
    post.outbox.complete(delivery)
    assert not post.claim()


def test_whatever_fails_in_between_a_recipient_is_told_in_the_order_of_revisions(post: Post) -> None:
    job = post.submit("https://a.example/x", events=EVERYTHING)
    document = post.start(job)
    for stage in ("decode", "explain", "render"):
        document = post.ledger.advance(document, stage=stage)
    post.ledger.advance(document, status="succeeded")
    told: list[int] = []
    for failures in (0, 1, 0, 2, 1, 0):
        for tries in range(failures + 1):
            [delivery] = wait_for(post.claim)
            assert (delivery.tries, post.claim()) == (tries, []), "the next one waits for this one"
            if tries < failures:
                post.fail(delivery)
        post.outbox.complete(delivery)
        told.append(delivery.document.revision)
    assert told == [1, 2, 3, 4, 5, 6]
    assert post.outbox.count_recipients() == 0


def test_what_a_courier_took_that_died_is_due_again_and_not_before(post: Post) -> None:
    post.submit("https://a.example/x")
    begun = time.monotonic()
    [first] = post.claim(lease_s=0.3)
    [second] = wait_for(lambda: post.claim(lease_s=LEASE_S))
    assert time.monotonic() - begun >= 0.29
    assert (second.document, second.tries) == (first.document, 0)


@pytest.mark.parametrize("word", ["delivered", "postponed", "parked"])
def test_a_courier_that_was_too_slow_has_no_say_any_more(post: Post, word: str) -> None:
    post.start(post.submit("https://a.example/x", events=("job.queued", "job.started")))
    [slow] = post.claim(lease_s=0.05)
    [quick] = wait_for(post.claim)
    if word == "delivered":
        post.outbox.complete(slow)
    elif word == "postponed":
        post.fail(slow)
    else:
        post.outbox.park(slow)
    assert (post.claim(), post.outbox.find_parked()) == ([], []), "the other one still has it"
    post.outbox.complete(quick)
    assert [one.event for one in post.claim()] == ["job.started"]


def test_couriers_that_race_never_have_a_recipient_twice_and_lose_nothing(post: Post) -> None:
    jobs = [post.submit("https://a.example/x", events=EVERYTHING) for _ in range(30)]
    for job in jobs:
        post.ledger.advance(post.start(job), status="succeeded")
    told: dict[str, list[int]] = {}
    out, most, lock = Counter[str](), [0], threading.Lock()

    def deliver() -> None:
        while deliveries := post.claim(limit=3):
            with lock:
                out.update(one.recipient for one in deliveries)
                most[0] = max(most[0], *out.values())
            time.sleep(0.001)
            with lock:
                for one in deliveries:
                    told.setdefault(one.recipient, []).append(one.document.revision)
                out.subtract(one.recipient for one in deliveries)
            for one in deliveries:
                post.outbox.complete(one)

    for _ in range(2):  # one that found nothing for a moment has stopped
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: deliver(), range(6)))
    assert most == [1]
    assert told == {f"{job.id}:hook1": [1, 2, 3] for job in jobs}


def test_a_destination_that_failed_twice_is_left_alone_and_then_tried_with_one_delivery(post: Post) -> None:
    for _ in range(4):
        post.submit("https://a.example/x")
    for delivery in post.claim(limit=2):
        post.fail(delivery, 60)
    begun = time.monotonic()
    assert not post.claim()
    post.submit("https://a.example/x")
    assert not post.claim(), "nor does a new job change that"
    [probe] = wait_for(post.claim)
    assert time.monotonic() - begun >= PAUSE_S * 0.9
    assert not post.claim(), "one at a time, whoever takes it"
    post.outbox.complete(probe)
    assert len(post.claim()) == 2, "it answers: as many as there are, without those that have to wait"


def test_one_failure_alone_holds_up_no_other_job_at_the_host_for_long(post: Post) -> None:
    post.submit("https://a.example/bad")
    [bad] = post.claim()
    post.fail(bad, 3600)
    post.submit("https://a.example/good")
    post.submit("https://a.example/good")
    [probe] = post.claim()
    assert probe.webhook
    assert probe.webhook.url == "https://a.example/good"
    post.outbox.complete(probe)
    assert len(post.claim()) == 1


def test_a_destination_is_left_alone_twice_as_long_each_time(post: Post) -> None:
    post.submit("https://a.example/x")
    [delivery] = post.claim()
    post.fail(delivery)
    for pause_s in (0, PAUSE_S, 2 * PAUSE_S):
        begun = time.monotonic()
        [delivery] = wait_for(post.claim)
        assert time.monotonic() - begun >= pause_s * 0.9
        post.fail(delivery)


def test_what_was_under_way_when_a_destination_failed_does_not_count_again(post: Post) -> None:
    for _ in range(12):
        post.submit("https://a.example/x")
    for delivery in post.claim():
        post.fail(delivery)
    begun = time.monotonic()
    wait_for(post.claim)
    assert time.monotonic() - begun < 2**10 * PAUSE_S / 50


def test_a_destination_whose_probe_was_lost_with_its_dispatcher_is_tried_again(post: Post) -> None:
    for _ in range(2):
        post.submit("https://a.example/x")
    [delivery] = post.claim(limit=1)
    post.fail(delivery, 60)
    [lost] = post.claim(lease_s=0.8)
    assert not post.claim()
    [found] = wait_for(post.claim)
    assert found.recipient == lost.recipient


def test_a_destination_whose_probe_is_parked_goes_on(post: Post) -> None:
    for _ in range(3):
        post.submit("https://a.example/x")
    [delivery] = post.claim(limit=1)
    post.fail(delivery, 60)
    [probe] = post.claim()
    post.outbox.park(probe)
    assert len(post.claim()) == 1


def test_other_destinations_go_on_while_one_is_down(post: Post) -> None:
    for _ in range(3):
        post.submit("https://a.example/x", "https://b.example/x")
    for delivery in post.claim(b=0):
        post.fail(delivery, 60)
    assert [one.destination for one in post.claim()] == [B] * 3


def test_a_courier_gets_as_much_as_it_asked_for(post: Post) -> None:
    for _ in range(5):
        post.submit(*(f"https://{name}.example/x" for name in "abcd"))
    destinations = Counter(one.destination for one in post.claim(a=2, b=0, others=1))
    assert destinations in ({A: 2, "//c.example": 1}, {A: 2, "//d.example": 1})
    assert len(post.claim(limit=3)) == 3
    assert not post.claim(a=0, b=0, others=0)


def test_however_many_hosts_wait_one_that_is_named_is_found(post: Post) -> None:
    hosts = [f"https://{number}.example/x" for number in range(300)]
    post.submit(*hosts[:4])
    time.sleep(0.003)  # times are kept in milliseconds
    for index in range(4, len(hosts), 4):
        post.submit(*hosts[index : index + 4])
    post.submit("https://a.example/x")
    assert [one.destination for one in post.claim(limit=4, others=0)] == [A]
    strangers = {one.destination for one in post.claim(limit=4, others=2)}
    assert len(strangers) == 2
    assert strangers < {f"//{number}.example" for number in range(4)}, "who waited longest"


def test_who_waited_longest_comes_first_whether_it_is_named_or_not(post: Post) -> None:
    for url in ("https://c.example/x", "https://a.example/x", "https://d.example/x", "https://b.example/x"):
        post.submit(url)
        time.sleep(0.003)
    assert [post.claim(limit=1)[0].destination for _ in range(4)] == ["//c.example", A, "//d.example", B]


def test_sinks_are_told_of_every_job_from_when_they_are_opened_and_have_to_be_asked_for(post: Post) -> None:
    post.submit()
    post.outbox.open_sink("sql")
    job = post.submit("https://a.example/x")
    assert [one.destination for one in post.claim()] == [A]
    [delivery] = post.outbox.claim_deliveries(10, lease_s=LEASE_S, limits={"sql": 1}, others_limit=0)
    assert (delivery.destination, delivery.recipient, delivery.webhook) == ("sql", f"{job.id}:sql", None)
    post.outbox.close_sink("sql")
    post.submit()
    assert not post.outbox.claim_deliveries(10, lease_s=LEASE_S, limits={"sql": 9}, others_limit=9)


def test_what_is_parked_is_listed_and_told_in_order_when_it_is_replayed(post: Post) -> None:
    job = post.submit("https://a.example/x", events=EVERYTHING)
    [delivery] = post.claim()
    post.outbox.park(delivery)
    document = post.start(job)
    assert not post.claim(), "what comes behind waits, too"
    [parked] = post.outbox.find_parked()
    assert (parked.destination, parked.recipient, parked.events) == (A, f"{job.id}:hook1", 2)
    assert parked.first
    assert (parked.first.event, parked.first.webhook) == ("job.queued", job.webhooks[0])
    assert abs(parked.since_s - time.time()) < 60
    assert post.outbox.count_recipients() == 0
    assert post.outbox.unpark(parked)
    assert (post.outbox.unpark(parked), post.outbox.find_parked()) == (False, [])
    post.ledger.advance(document, status="succeeded")
    for event in ("job.queued", "job.started", "job.succeeded"):
        [delivery] = post.claim()
        assert (delivery.event, delivery.tries, delivery.waited_s < 20) == (event, 0, True)
        post.outbox.complete(delivery)
    assert post.outbox.count_recipients() == 0


def test_the_newest_parked_is_listed_first(post: Post) -> None:
    for name in "ab":
        post.submit(f"https://{name}.example/x")
        [delivery] = post.claim()
        post.outbox.park(delivery)
        time.sleep(0.01)
    assert [one.destination for one in post.outbox.find_parked()] == [B, A]


def test_those_who_waited_too_long_at_a_dead_host_are_parked_though_their_turn_never_came(post: Post) -> None:
    for _ in range(4):
        post.submit("https://a.example/x", "https://b.example/x")
    [held] = post.claim(limit=1, b=0)
    time.sleep(1.2)
    young = post.submit("https://a.example/x")
    assert post.outbox.park_overdue(A, 1.1) == 3
    assert post.outbox.park_overdue(A, 1.1) == 0
    post.outbox.complete(held)
    left = {one.recipient for one in post.claim() if one.destination == A}
    assert left == {f"{young.id}:hook1"}
    assert {one.destination for one in post.outbox.find_parked()} == {A}


def test_a_receiver_that_names_a_time_is_told_nothing_of_any_job_until_then(post: Post) -> None:
    for _ in range(3):
        post.submit("https://a.example/x")
    deliveries = post.claim(limit=2)
    begun = time.monotonic()
    post.fail(deliveries[0], 1, quiet_s=1)
    post.submit("https://a.example/y")
    [other] = post.claim()
    assert other.webhook
    assert other.webhook.url == "https://a.example/y", "another receiver at the same host"
    post.outbox.complete(other)
    wait_for(post.claim)
    assert time.monotonic() - begun >= 0.99


def test_a_replay_need_not_wait_for_the_time_that_a_receiver_named(post: Post) -> None:
    for _ in range(2):
        post.submit("https://a.example/x")
    [delivery] = post.claim(limit=1)
    post.fail(delivery, 3600, quiet_s=3600)
    post.outbox.enable("https://a.example/x")
    assert len(post.claim()) == 1


def test_a_receiver_that_is_gone_is_told_nothing_of_any_job_until_it_is_enabled(post: Post) -> None:
    gone = "https://a.example/gone"
    for _ in range(2):
        post.submit(gone, "https://a.example/there")
    post.outbox.disable(gone)
    deliveries = post.claim()
    assert {one.webhook.url for one in deliveries if one.webhook} == {"https://a.example/there"}
    assert len(deliveries) == 2
    parked = post.outbox.find_parked()
    assert len(parked) == 2
    assert post.outbox.find_disabled() == [gone]
    assert post.outbox.unpark(parked[0])
    assert not post.claim(), "it is parked again"
    post.outbox.enable(gone)
    assert post.outbox.find_disabled() == []
    assert [post.outbox.unpark(one) for one in post.outbox.find_parked()] == [True, True]
    assert len(post.claim()) == 2


def test_when_everything_has_been_told_nothing_of_the_outbox_is_left(redis_post: Post) -> None:
    post = redis_post
    urls = ["https://a.example/x", "https://b.example/y", "https://c.example/z"]
    for _ in range(5):
        post.ledger.advance(post.start(post.submit(*urls, events=EVERYTHING)), status="succeeded")
    first = post.claim()
    for delivery in first[::2]:
        post.fail(delivery, quiet_s=0.01)
    for delivery in first[1::2]:
        post.outbox.park(delivery)
    for one in post.outbox.find_parked():
        assert post.outbox.unpark(one)
    while post.outbox.count_recipients():
        for delivery in post.claim():
            post.outbox.complete(delivery)
    time.sleep(0.05)
    assert not post.claim()
    assert keys(post) <= {"later"}
    post.submit("https://a.example/x")
    [delivery] = post.claim()
    post.outbox.complete(delivery)
    assert keys(post) == set()


def test_jobs_without_webhooks_leave_nothing_in_the_outbox(redis_post: Post) -> None:
    redis_post.ledger.advance(redis_post.start(redis_post.submit()), status="succeeded")
    assert keys(redis_post) == set()


def test_an_event_outlives_its_job(redis_post: Post) -> None:
    job = redis_post.submit("https://a.example/x")
    server: Any = redis_post.outbox._server  # type: ignore[attr-defined]
    server.redis.delete(f"{server.prefix}job:{job.id}")
    [delivery] = redis_post.claim()
    assert (delivery.document.id, delivery.webhook) == (job.id, job.webhooks[0])


def test_what_is_parked_is_forgotten_some_day_with_what_comes_behind_it(redis_post: Post) -> None:
    post = redis_post
    job = post.submit("https://a.example/x", events=EVERYTHING)
    [delivery] = post.claim()
    post.outbox.park(delivery)
    server: Any = post.outbox._server  # type: ignore[attr-defined]
    key = f"{server.prefix}events:{job.id}:hook1"
    assert 0 < server.redis.pttl(key) <= 60_000
    running = post.start(job)
    assert 0 < server.redis.pttl(key) <= 60_000
    [parked] = post.outbox.find_parked()
    assert post.outbox.unpark(parked)
    assert server.redis.pttl(key) == -1, "what is to be told again is not forgotten meanwhile"
    [delivery] = post.claim()
    post.outbox.park(delivery)
    server.redis.delete(key)  # that day
    [forgotten] = post.outbox.find_parked()
    assert (forgotten.first, forgotten.events) == (None, 0)
    post.ledger.advance(running, status="succeeded")
    assert 0 < server.redis.pttl(key) <= 60_000, "nothing is kept for ever for nobody"
    server.redis.delete(key)
    [forgotten] = post.outbox.find_parked()
    assert not post.outbox.unpark(forgotten)


def test_what_another_version_wrote_holds_up_no_other(redis_post: Post, caplog: Any) -> None:
    post = redis_post
    jobs = [post.submit("https://a.example/x") for _ in range(2)]
    server: Any = post.outbox._server  # type: ignore[attr-defined]
    key = f"{server.prefix}events:{jobs[0].id}:hook1"
    server.redis.lset(key, 0, server.redis.lindex(key, 0).replace('"status"', '"mood"'))
    assert [one.document.id for one in post.claim()] == [jobs[1].id]
    assert f"outbox_delivery_unreadable recipient={jobs[0].id}:hook1" in caplog.text
    assert server.redis.llen(key) == 1, "it waits for a worker that can"
