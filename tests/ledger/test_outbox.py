import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest

from gradcam_worker.errors import StorageUnavailable
from gradcam_worker.ledger import outbox
from gradcam_worker.ledger.ledger import ClaimOutcome, Ledger, Tenant
from gradcam_worker.ledger.outbox import DESTINATION_BACKOFF, Delivery, Outbox
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import Problem, StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger

WORKER = WorkerRef(id="gpu-1:7", device="cpu")
LEASE_S = 30.0
PAUSE_S = 0.6  # of a destination, after its second failure in a row
A, B = "//a.example", "//b.example"
EVERYTHING = ("job.queued", "job.started", "job.progress", "job.retrying", "job.succeeded", "job.failed")


@dataclass
class Setup:
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
def setup(
    request: pytest.FixtureRequest, settings: Settings, job: Job, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Setup]:
    """Both outboxes keep the same promises."""
    for module in ("memory.outbox", "redis.outbox"):
        monkeypatch.setattr(
            f"gradcam_worker.ledger.{module}.DESTINATION_BACKOFF",
            replace(DESTINATION_BACKOFF, first_s=PAUSE_S),
        )
    if request.param == "memory":
        ledger = MemoryLedger()
        yield Setup(ledger, ledger.outbox, job)
    else:
        yield in_redis(settings, job)


@pytest.fixture
def redis_setup(settings: Settings, job: Job) -> Setup:
    return in_redis(settings, job)


def in_redis(settings: Settings, job: Job) -> Setup:
    ledger = RedisLedger(settings.model_copy(update={"retention_s": 60, "idempotency_retention_s": 60}))
    return Setup(ledger, RedisOutbox(ledger.server, retention_s=60), job)


def keys(setup: Setup) -> set[str]:
    """What is in Redis, without what belongs to the job itself."""
    server: Any = setup.outbox._server  # type: ignore[attr-defined]
    found = {key.removeprefix(server.prefix) for key in server.redis.scan_iter(f"{server.prefix}*")}
    own = ("job:", "queued:", "running", "dead", "claimed", "ended:", "listed:")
    return {key for key in found if not key.startswith(own)}


def wait_for(condition: Callable[[], list[Delivery]]) -> list[Delivery]:
    end = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def test_each_change_of_a_job_records_the_events_that_its_webhooks_receive_and_no_others(
    setup: Setup,
) -> None:
    job = setup.submit("https://a.example/x", "https://b.example/y", events=EVERYTHING)
    quiet = setup.submit("https://b.example/z", events=("job.failed",))
    running = setup.start(job)
    setup.ledger.finish(setup.ledger.advance(running, stage="explain"), status="succeeded")
    setup.ledger.finish(setup.start(quiet), status="succeeded")
    seen: dict[str, list[str]] = {}
    while deliveries := setup.claim():
        for one in deliveries:
            seen.setdefault(one.recipient, []).append(one.event)
            setup.outbox.complete(one)
    told = ["job.queued", "job.started", "job.progress", "job.succeeded"]
    assert seen == {f"{job.id}:hook1": told, f"{job.id}:hook2": told}


def test_a_retried_job_sends_its_webhooks_a_second_final_event(setup: Setup) -> None:
    job = setup.submit("https://a.example/x", events=("job.queued", "job.failed", "job.succeeded"))
    setup.ledger.finish(setup.start(job), status="failed")
    setup.ledger.retry(job.id)
    setup.ledger.finish(setup.start(job), status="succeeded")
    told = []
    while deliveries := setup.claim():
        for one in deliveries:
            told.append((one.event, one.document.revision))
            setup.outbox.complete(one)
    assert [event for event, _ in told] == ["job.queued", "job.failed", "job.queued", "job.succeeded"]
    assert [revision for _, revision in told] == [1, 3, 4, 6]


def test_a_delivery_contains_everything_that_is_needed_to_send_it(setup: Setup) -> None:
    job = setup.submit("https://A.example:8443/x?y=1", events=("job.started",))
    running = setup.start(job)
    [delivery] = setup.claim()
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
def test_each_host_has_a_destination_that_no_sink_can_have(url: str, destination: str) -> None:
    assert outbox.destination_of(url) == destination


@pytest.mark.parametrize("tenant", [None, Tenant("acme")])
def test_the_webhooks_of_a_tenants_job_receive_what_the_tenant_sees_and_a_database_everything(
    setup: Setup, tenant: Tenant | None
) -> None:
    setup.outbox.open_sink("sql")
    hooks = [{"url": "https://a.example/hook"}]
    job = Job.parse({**setup.job.model_dump(mode="json"), "id": new_id(), "webhooks": hooks})
    setup.ledger.submit(job, tenant=tenant)
    error = Problem.of(StorageUnavailable("s3://others is not there."), stage="upload", attempt=1)
    failed = setup.ledger.finish(setup.start(job), status="failed", error=error)
    (told,) = setup.claim()
    assert told.document == (failed.for_tenant() if tenant else failed)
    assert ("others" in told.document.to_json()) == (tenant is None)
    for _ in range(3):  # queued, started, failed
        (stored,) = setup.outbox.claim_deliveries(9, lease_s=LEASE_S, limits={"sql": 9}, others_limit=0)
        setup.outbox.complete(stored)
    assert stored.document == failed


def test_a_change_that_is_written_twice_records_one_event(setup: Setup) -> None:
    running = setup.start(setup.submit("https://a.example/x", events=("job.succeeded",)))
    after = running.model_copy(update={"status": "succeeded", "revision": running.revision + 1})
    for _ in range(2):
        assert setup.ledger._compare_and_set(running, after)
    [delivery] = setup.claim()
    setup.outbox.complete(delivery)
    assert not setup.claim()


def test_a_change_that_is_refused_records_no_event(setup: Setup) -> None:
    job = setup.submit("https://a.example/x", events=("job.started",))
    before = setup.ledger.read(job.id)
    setup.ledger.claim(before, WORKER)
    assert setup.ledger.claim(before, WORKER).outcome is ClaimOutcome.CHANGED
    [delivery] = setup.claim()
    setup.outbox.complete(delivery)
    assert not setup.claim()


def test_a_recipient_gets_events_in_the_order_of_revisions_even_if_deliveries_fail(setup: Setup) -> None:
    job = setup.submit("https://a.example/x", events=EVERYTHING)
    document = setup.start(job)
    for stage in ("decode", "explain", "render"):
        document = setup.ledger.advance(document, stage=stage)
    setup.ledger.finish(document, status="succeeded")
    told: list[int] = []
    for failures in (0, 1, 0, 2, 1, 0):
        for tries in range(failures + 1):
            [delivery] = wait_for(setup.claim)
            assert (delivery.tries, setup.claim()) == (tries, []), "the next one waits for this one"
            if tries < failures:
                setup.fail(delivery)
        setup.outbox.complete(delivery)
        told.append(delivery.document.revision)
    assert told == [1, 2, 3, 4, 5, 6]
    assert setup.outbox.count_recipients() == 0


def test_a_delivery_claimed_by_a_dispatcher_that_died_is_due_when_its_lease_ends(setup: Setup) -> None:
    setup.submit("https://a.example/x")
    begun = time.monotonic()
    [first] = setup.claim(lease_s=0.3)
    [second] = wait_for(lambda: setup.claim(lease_s=LEASE_S))
    assert time.monotonic() - begun >= 0.29
    assert (second.document, second.tries) == (first.document, 0)


@pytest.mark.parametrize("word", ["delivered", "postponed", "parked"])
def test_a_dispatcher_whose_lease_ended_can_change_nothing(setup: Setup, word: str) -> None:
    setup.start(setup.submit("https://a.example/x", events=("job.queued", "job.started")))
    [slow] = setup.claim(lease_s=0.05)
    [quick] = wait_for(setup.claim)
    if word == "delivered":
        setup.outbox.complete(slow)
    elif word == "postponed":
        setup.fail(slow)
    else:
        setup.outbox.park(slow)
    assert (setup.claim(), setup.outbox.find_parked()) == ([], []), "the other one still has it"
    setup.outbox.complete(quick)
    assert [one.event for one in setup.claim()] == ["job.started"]


def test_concurrent_dispatchers_never_share_a_recipient_and_lose_no_event(setup: Setup) -> None:
    jobs = [setup.submit("https://a.example/x", events=EVERYTHING) for _ in range(30)]
    for job in jobs:
        setup.ledger.finish(setup.start(job), status="succeeded")
    told: dict[str, list[int]] = {}
    out, most, lock = Counter[str](), [0], threading.Lock()

    def deliver() -> None:
        while deliveries := setup.claim(limit=3):
            with lock:
                out.update(one.recipient for one in deliveries)
                most[0] = max(most[0], *out.values())
            time.sleep(0.001)
            with lock:
                for one in deliveries:
                    told.setdefault(one.recipient, []).append(one.document.revision)
                out.subtract(one.recipient for one in deliveries)
            for one in deliveries:
                setup.outbox.complete(one)

    for _ in range(2):  # one that found nothing for a moment has stopped
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: deliver(), range(6)))
    assert most == [1]
    assert told == {f"{job.id}:hook1": [1, 2, 3] for job in jobs}


def test_a_destination_that_failed_twice_is_paused_and_then_probed_with_one_delivery(setup: Setup) -> None:
    for _ in range(4):
        setup.submit("https://a.example/x")
    for delivery in setup.claim(limit=2):
        setup.fail(delivery, 60)
    begun = time.monotonic()
    assert not setup.claim()
    setup.submit("https://a.example/x")
    assert not setup.claim(), "nor does a new job change that"
    [probe] = wait_for(setup.claim)
    assert time.monotonic() - begun >= PAUSE_S * 0.9
    assert not setup.claim(), "one at a time, whoever takes it"
    setup.outbox.complete(probe)
    assert len(setup.claim()) == 2, "it answers: as many as there are, without those that have to wait"


def test_a_single_failure_does_not_delay_other_jobs_at_the_host_for_long(setup: Setup) -> None:
    setup.submit("https://a.example/bad")
    [bad] = setup.claim()
    setup.fail(bad, 3600)
    setup.submit("https://a.example/good")
    setup.submit("https://a.example/good")
    [probe] = setup.claim()
    assert probe.webhook
    assert probe.webhook.url == "https://a.example/good"
    setup.outbox.complete(probe)
    assert len(setup.claim()) == 1


def test_the_pause_of_a_destination_doubles_each_time(setup: Setup) -> None:
    setup.submit("https://a.example/x")
    [delivery] = setup.claim()
    setup.fail(delivery)
    for pause_s in (0, PAUSE_S, 2 * PAUSE_S):
        begun = time.monotonic()
        [delivery] = wait_for(setup.claim)
        assert time.monotonic() - begun >= pause_s * 0.9
        setup.fail(delivery)


def test_a_failure_of_a_delivery_claimed_before_the_pause_does_not_count(setup: Setup) -> None:
    for _ in range(12):
        setup.submit("https://a.example/x")
    for delivery in setup.claim():
        setup.fail(delivery)
    begun = time.monotonic()
    wait_for(setup.claim)
    assert time.monotonic() - begun < 2**10 * PAUSE_S / 50


def test_a_destination_whose_probe_was_lost_with_its_dispatcher_is_tried_again(setup: Setup) -> None:
    for _ in range(2):
        setup.submit("https://a.example/x")
    [delivery] = setup.claim(limit=1)
    setup.fail(delivery, 60)
    [lost] = setup.claim(lease_s=0.8)
    assert not setup.claim()
    [found] = wait_for(setup.claim)
    assert found.recipient == lost.recipient


def test_a_destination_whose_probe_is_parked_is_tried_again(setup: Setup) -> None:
    for _ in range(3):
        setup.submit("https://a.example/x")
    [delivery] = setup.claim(limit=1)
    setup.fail(delivery, 60)
    [probe] = setup.claim()
    setup.outbox.park(probe)
    assert len(setup.claim()) == 1


def test_a_destination_that_is_down_does_not_delay_others(setup: Setup) -> None:
    for _ in range(3):
        setup.submit("https://a.example/x", "https://b.example/x")
    for delivery in setup.claim(b=0):
        setup.fail(delivery, 60)
    assert [one.destination for one in setup.claim()] == [B] * 3


def test_a_dispatcher_claims_at_most_what_its_limits_allow(setup: Setup) -> None:
    for _ in range(5):
        setup.submit(*(f"https://{name}.example/x" for name in "abcd"))
    destinations = Counter(one.destination for one in setup.claim(a=2, b=0, others=1))
    assert destinations in ({A: 2, "//c.example": 1}, {A: 2, "//d.example": 1})
    assert len(setup.claim(limit=3)) == 3
    assert not setup.claim(a=0, b=0, others=0)


def test_a_host_named_in_the_limits_is_found_however_many_others_wait(setup: Setup) -> None:
    hosts = [f"https://{number}.example/x" for number in range(300)]
    setup.submit(*hosts[:4])
    time.sleep(0.003)  # times are kept in milliseconds
    for index in range(4, len(hosts), 4):
        setup.submit(*hosts[index : index + 4])
    setup.submit("https://a.example/x")
    assert [one.destination for one in setup.claim(limit=4, others=0)] == [A]
    strangers = {one.destination for one in setup.claim(limit=4, others=2)}
    assert len(strangers) == 2
    assert strangers < {f"//{number}.example" for number in range(4)}, "who waited longest"


def test_the_destination_that_is_due_longest_comes_first_named_or_not(setup: Setup) -> None:
    for url in ("https://c.example/x", "https://a.example/x", "https://d.example/x", "https://b.example/x"):
        setup.submit(url)
        time.sleep(0.003)
    assert [setup.claim(limit=1)[0].destination for _ in range(4)] == ["//c.example", A, "//d.example", B]


def test_an_open_sink_gets_events_of_every_job_and_is_claimed_only_by_name(setup: Setup) -> None:
    setup.submit()
    setup.outbox.open_sink("sql")
    job = setup.submit("https://a.example/x")
    assert [one.destination for one in setup.claim()] == [A]
    [delivery] = setup.outbox.claim_deliveries(10, lease_s=LEASE_S, limits={"sql": 1}, others_limit=0)
    assert (delivery.destination, delivery.recipient, delivery.webhook) == ("sql", f"{job.id}:sql", None)
    setup.outbox.close_sink("sql")
    setup.submit()
    assert not setup.outbox.claim_deliveries(10, lease_s=LEASE_S, limits={"sql": 9}, others_limit=9)


def test_a_parked_recipient_is_listed_and_gets_its_events_in_order_when_replayed(setup: Setup) -> None:
    job = setup.submit("https://a.example/x", events=EVERYTHING)
    [delivery] = setup.claim()
    setup.outbox.park(delivery)
    document = setup.start(job)
    assert not setup.claim(), "what comes behind waits, too"
    [parked] = setup.outbox.find_parked()
    assert (parked.destination, parked.recipient, parked.events) == (A, f"{job.id}:hook1", 2)
    assert parked.first
    assert (parked.first.event, parked.first.webhook) == ("job.queued", job.webhooks[0])
    assert abs(parked.since_s - time.time()) < 60
    assert setup.outbox.count_recipients() == 0
    assert setup.outbox.unpark(parked)
    assert (setup.outbox.unpark(parked), setup.outbox.find_parked()) == (False, [])
    setup.ledger.finish(document, status="succeeded")
    for event in ("job.queued", "job.started", "job.succeeded"):
        [delivery] = setup.claim()
        assert (delivery.event, delivery.tries, delivery.waited_s < 20) == (event, 0, True)
        setup.outbox.complete(delivery)
    assert setup.outbox.count_recipients() == 0


def test_the_most_recently_parked_recipient_is_listed_first(setup: Setup) -> None:
    for name in "ab":
        setup.submit(f"https://{name}.example/x")
        [delivery] = setup.claim()
        setup.outbox.park(delivery)
        time.sleep(0.01)
    assert [one.destination for one in setup.outbox.find_parked()] == [B, A]


def test_recipients_that_waited_too_long_for_a_dead_host_are_parked_without_a_try(setup: Setup) -> None:
    for _ in range(4):
        setup.submit("https://a.example/x", "https://b.example/x")
    [held] = setup.claim(limit=1, b=0)
    time.sleep(1.2)
    young = setup.submit("https://a.example/x")
    assert setup.outbox.park_overdue(A, 1.1) == 3
    assert setup.outbox.park_overdue(A, 1.1) == 0
    setup.outbox.complete(held)
    left = {one.recipient for one in setup.claim() if one.destination == A}
    assert left == {f"{young.id}:hook1"}
    assert {one.destination for one in setup.outbox.find_parked()} == {A}


def test_a_url_with_retry_after_gets_no_event_of_any_job_before_that_time(setup: Setup) -> None:
    for _ in range(3):
        setup.submit("https://a.example/x")
    deliveries = setup.claim(limit=2)
    begun = time.monotonic()
    setup.fail(deliveries[0], 1, quiet_s=1)
    setup.submit("https://a.example/y")
    [other] = setup.claim()
    assert other.webhook
    assert other.webhook.url == "https://a.example/y", "another receiver at the same host"
    setup.outbox.complete(other)
    wait_for(setup.claim)
    assert time.monotonic() - begun >= 0.99


def test_a_replay_does_not_wait_for_a_retry_after(setup: Setup) -> None:
    for _ in range(2):
        setup.submit("https://a.example/x")
    [delivery] = setup.claim(limit=1)
    setup.fail(delivery, 3600, quiet_s=3600)
    setup.outbox.enable("https://a.example/x")
    assert len(setup.claim()) == 1


def test_a_disabled_url_gets_no_event_of_any_job_until_it_is_enabled(setup: Setup) -> None:
    gone = "https://a.example/gone"
    for _ in range(2):
        setup.submit(gone, "https://a.example/there")
    setup.outbox.disable(gone)
    deliveries = setup.claim()
    assert {one.webhook.url for one in deliveries if one.webhook} == {"https://a.example/there"}
    assert len(deliveries) == 2
    parked = setup.outbox.find_parked()
    assert len(parked) == 2
    assert setup.outbox.find_disabled() == [gone]
    assert setup.outbox.unpark(parked[0])
    assert not setup.claim(), "it is parked again"
    setup.outbox.enable(gone)
    assert setup.outbox.find_disabled() == []
    assert [setup.outbox.unpark(one) for one in setup.outbox.find_parked()] == [True, True]
    assert len(setup.claim()) == 2


def test_when_everything_is_delivered_no_key_of_the_outbox_is_left(redis_setup: Setup) -> None:
    setup = redis_setup
    urls = ["https://a.example/x", "https://b.example/y", "https://c.example/z"]
    for _ in range(5):
        setup.ledger.finish(setup.start(setup.submit(*urls, events=EVERYTHING)), status="succeeded")
    first = setup.claim()
    for delivery in first[::2]:
        setup.fail(delivery, quiet_s=0.01)
    for delivery in first[1::2]:
        setup.outbox.park(delivery)
    for one in setup.outbox.find_parked():
        assert setup.outbox.unpark(one)
    while setup.outbox.count_recipients():
        for delivery in setup.claim():
            setup.outbox.complete(delivery)
    time.sleep(0.05)
    assert not setup.claim()
    assert keys(setup) <= {"later"}
    setup.submit("https://a.example/x")
    [delivery] = setup.claim()
    setup.outbox.complete(delivery)
    assert keys(setup) == set()


def test_jobs_without_webhooks_record_nothing_in_the_outbox(redis_setup: Setup) -> None:
    redis_setup.ledger.finish(redis_setup.start(redis_setup.submit()), status="succeeded")
    assert keys(redis_setup) == set()


def test_an_event_outlives_its_job(redis_setup: Setup) -> None:
    job = redis_setup.submit("https://a.example/x")
    server: Any = redis_setup.outbox._server  # type: ignore[attr-defined]
    server.redis.delete(f"{server.prefix}job:{job.id}")
    [delivery] = redis_setup.claim()
    assert (delivery.document.id, delivery.webhook) == (job.id, job.webhooks[0])


def test_parked_recipients_expire_with_all_their_events(redis_setup: Setup) -> None:
    setup = redis_setup
    job = setup.submit("https://a.example/x", events=EVERYTHING)
    [delivery] = setup.claim()
    setup.outbox.park(delivery)
    server: Any = setup.outbox._server  # type: ignore[attr-defined]
    key = f"{server.prefix}events:{job.id}:hook1"
    assert 0 < server.redis.pttl(key) <= 60_000
    running = setup.start(job)
    assert 0 < server.redis.pttl(key) <= 60_000
    [parked] = setup.outbox.find_parked()
    assert setup.outbox.unpark(parked)
    assert server.redis.pttl(key) == -1, "what is to be told again is not forgotten meanwhile"
    [delivery] = setup.claim()
    setup.outbox.park(delivery)
    server.redis.delete(key)  # that day
    [forgotten] = setup.outbox.find_parked()
    assert (forgotten.first, forgotten.events) == (None, 0)
    setup.ledger.finish(running, status="succeeded")
    assert 0 < server.redis.pttl(key) <= 60_000, "nothing is kept for ever for nobody"
    server.redis.delete(key)
    [forgotten] = setup.outbox.find_parked()
    assert not setup.outbox.unpark(forgotten)


def test_an_event_that_this_version_cannot_read_does_not_delay_others(
    redis_setup: Setup, caplog: Any
) -> None:
    setup = redis_setup
    jobs = [setup.submit("https://a.example/x") for _ in range(2)]
    server: Any = setup.outbox._server  # type: ignore[attr-defined]
    key = f"{server.prefix}events:{jobs[0].id}:hook1"
    server.redis.lset(key, 0, server.redis.lindex(key, 0).replace('"status"', '"mood"'))
    assert [one.document.id for one in setup.claim()] == [jobs[1].id]
    assert f"outbox_delivery_unreadable recipient={jobs[0].id}:hook1" in caplog.text
    assert server.redis.llen(key) == 1, "it waits for a worker that can"


def test_a_webhook_of_a_job_that_is_gone_receives_what_a_tenant_sees(
    redis_setup: Setup, settings: Settings
) -> None:
    job = redis_setup.submit("https://a.example/x", events=("job.failed",))
    error = Problem.of(StorageUnavailable("s3://others is not there."), stage="upload", attempt=1)
    failed = redis_setup.ledger.finish(redis_setup.start(job), status="failed", error=error)
    RedisLedger(settings).server.redis.delete(f"{settings.key_prefix}job:{job.id}")
    (told,) = redis_setup.claim()
    assert told.document == failed.for_tenant()
