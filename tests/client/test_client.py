import asyncio
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

import pytest
import redis

from gradcam_worker.broker import envelope, publisher
from gradcam_worker.client import calls
from gradcam_worker.client import client as client_module
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import (
    BrokerUnavailable,
    IdempotencyConflict,
    InvalidJob,
    InvalidSettings,
    JobNotFailed,
    LedgerUnavailable,
    UnknownJob,
    WaitTimeout,
)
from gradcam_worker.ledger.ledger import ClaimOutcome, Ledger
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.resilience.retry import Retries
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, MemoryObjects, MemoryStore, RecordingPublisher

FIELDS: dict[str, Any] = {"image": "s3://in/pier.jpg", "network": "vgg16", "target": {"top_n": 2}}
WORKER = WorkerRef(id="w", device="cpu")


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger()


@pytest.fixture
def published() -> RecordingPublisher:
    return RecordingPublisher()


@pytest.fixture
def client(ledger: MemoryLedger, published: RecordingPublisher) -> GradcamClient:
    return GradcamClient(settings=Settings(), ledger=ledger, publish=published)


@pytest.mark.parametrize("image", ["cat.jpg", "./photos/cat.jpg", "C:\\cat.jpg", {"uri": "cat.jpg"}])
def test_a_file_in_place_of_a_uri_is_refused_before_it_is_accepted(
    image: Any, client: GradcamClient, published: RecordingPublisher
) -> None:
    with pytest.raises(
        InvalidJob, match=r"image\.uri: .*cat\.jpg' has no scheme: .* upload_and_submit takes a file"
    ):
        client.submit(**{**FIELDS, "image": image})
    with pytest.raises(InvalidJob, match=r"Job number 2 of those given: .* has no scheme"):
        client.submit_many([FIELDS, {**FIELDS, "image": image}])
    assert len(published.jobs) == 1


def test_submitting_enters_the_job_and_publishes_it(
    client: GradcamClient, published: RecordingPublisher
) -> None:
    job_id = client.submit(**FIELDS)
    assert [job.id for job in published.jobs] == [job_id]
    assert client.status(job_id).status == "queued"


def test_a_wrong_job_is_refused_before_anything_happens(
    client: GradcamClient, published: RecordingPublisher
) -> None:
    with pytest.raises(InvalidJob, match="top_m: unknown field"):
        client.submit(**FIELDS, top_m=3)  # type: ignore[call-overload]
    assert not published.jobs


def test_the_same_key_returns_the_first_id_and_rings_for_the_first_job(
    client: GradcamClient, published: RecordingPublisher
) -> None:
    first = client.submit(**FIELDS, idempotency_key="k")
    assert client.submit(**FIELDS, idempotency_key="k") == first
    assert {job.id for job in published.jobs} == {first}


def test_a_finished_job_is_not_published_again(
    client: GradcamClient, ledger: MemoryLedger, published: RecordingPublisher
) -> None:
    job = Job.parse(FIELDS)
    ledger.finish(ledger.claim(ledger.submit(job), WORKER).document, status="succeeded")
    assert client.submit(job) == job.id
    assert not published.jobs


def test_many_are_submitted_in_order(client: GradcamClient) -> None:
    jobs = [Job.parse(FIELDS) for _ in range(3)]
    assert client.submit_many(jobs) == [job.id for job in jobs]
    assert client.statuses([jobs[0].id, new_id()]).keys() == {jobs[0].id}


def test_waiting_ends_when_the_job_does(client: GradcamClient, ledger: MemoryLedger) -> None:
    job = Job.parse(FIELDS)
    client.submit(job)

    def work() -> None:
        document = ledger.claim(ledger.submit(job), WORKER).document
        time.sleep(0.1)
        ledger.finish(document, status="failed")

    threading.Thread(target=work).start()
    assert client.wait(job.id, timeout_s=10).status == "failed"


def test_waiting_too_long_says_what_the_job_is_doing(client: GradcamClient) -> None:
    job_id = client.submit(**FIELDS)
    with pytest.raises(WaitTimeout, match=f"{job_id} is still queued after 0.05 s"):
        client.wait(job_id, timeout_s=0.05)


def test_an_unknown_job_is_not_waited_for(client: GradcamClient) -> None:
    with pytest.raises(UnknownJob):
        client.wait(new_id())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that gives up soon."""
    monkeypatch.setattr(client_module, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(calls, "REDIS_RETRIES", replace(calls.REDIS_RETRIES, total_s=0.5))


@pytest.mark.usefixtures("hasty")
def test_a_job_in_the_ledger_is_accepted_though_the_broker_is_out_of_reach(
    ledger: MemoryLedger, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Job) -> None:
        message = "The broker cannot be reached."
        raise BrokerUnavailable(message)

    job = Job.parse(FIELDS)
    assert GradcamClient(settings=Settings(), ledger=ledger, publish=broken).submit(job) == job.id
    assert ledger.find_unpublished("normal", queue_is_empty=True, lost_after_s=0, limit=9) == [job.id], (
        "the reaper finds it"
    )
    assert "publish_failed" in caplog.text


def test_a_job_too_large_for_a_message_is_not_accepted(
    ledger: MemoryLedger, published: RecordingPublisher
) -> None:
    small = Settings(max_message_bytes=2000)
    client = GradcamClient(settings=small, ledger=ledger, publish=published)
    with pytest.raises(InvalidJob, match="2,000"):
        client.submit(**{**FIELDS, "image": f"data:image/png;base64,{'A' * 3000}"})
    assert ledger.count_jobs() == (0, 0)


def test_a_job_can_be_cancelled(client: GradcamClient) -> None:
    job_id = client.submit(**FIELDS)
    assert client.cancel(job_id).status == "canceled"
    assert client.wait(job_id).status == "canceled"
    with pytest.raises(UnknownJob):
        client.cancel(new_id())


def test_the_message_says_when_its_job_was_entered(settings: Settings) -> None:
    client = GradcamClient(settings=settings)
    job_id = client.submit(**FIELDS)
    queue = f"{settings.key_prefix}{publisher.INTERACTIVE}\x06\x163"
    message = json.loads(redis.Redis.from_url(settings.broker_url).lpop(queue) or "{}")  # type: ignore[arg-type]
    moment = datetime.fromisoformat(message["headers"][publisher.ENTERED_AT])
    assert moment == client.status(job_id).created_at


def test_urls_given_by_hand_go_before_the_environment(settings: Settings) -> None:
    client = GradcamClient(settings.broker_url, settings=Settings(key_prefix=settings.key_prefix))
    job_id = client.submit(**FIELDS)
    assert GradcamClient(settings=settings).status(job_id).status == "queued"


def waiting(settings: Settings, route: str = "normal") -> list[dict[str, Any]]:
    """What lies in a queue, the next one first, as a worker reads it."""
    queue, number = publisher.ROUTES[route]
    key = f"{settings.key_prefix}{queue}\x06\x16{number}"
    items: Any = redis.Redis.from_url(settings.broker_url).lrange(key, 0, -1)
    return [
        envelope.parse_message(item, queue, settings.max_message_bytes, publisher.TASKS[queue])
        for item in reversed(items)
    ]


def test_many_are_entered_and_published_in_order_in_a_few_round_trips(settings: Settings) -> None:
    client = GradcamClient(settings=settings)
    server = redis.Redis.from_url(settings.broker_url)
    server.script_flush()  # a server that was started anew knows no scripts
    before: Any = server.info("stats")["total_commands_processed"]
    ids = client.submit_many({**FIELDS, "metadata": {"n": str(n)}} for n in range(1200))
    after: Any = server.info("stats")["total_commands_processed"]
    messages = waiting(settings)
    assert [one["headers"]["id"] for one in messages] == ids
    documents = client.statuses(ids)
    assert [documents[one].metadata["n"] for one in ids] == [str(n) for n in range(1200)]
    assert {one["headers"][publisher.ENTERED_AT] for one in messages} == {
        one.created_at.isoformat() for one in documents.values()
    }
    assert after - before < 1200 * 18, "about 16 commands of a script for each job, but no more"


def test_a_generator_is_read_as_its_jobs_are_taken(
    client: GradcamClient, ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "CHUNK", 10)
    ahead = []

    def jobs() -> Iterator[Job]:
        for number in range(95):
            ahead.append(number - ledger.count_jobs()[0])
            yield Job.parse(FIELDS)

    assert len(client.submit_many(jobs())) == 95
    assert max(ahead) == 9, "no more than one step of them is ever in memory"


def fail(ledger: Ledger, job_id: str) -> StatusDocument:
    return ledger.finish(ledger.claim(ledger.read(job_id), WORKER).document, status="failed")


def test_a_failed_job_is_tried_again_and_the_queue_is_told(
    client: GradcamClient, ledger: MemoryLedger, published: RecordingPublisher
) -> None:
    job_id = client.submit(**FIELDS)
    fail(ledger, job_id)
    assert client.retry(job_id).status == "queued"
    assert client.retry(job_id).status == "queued", "asked twice, it is told twice, which costs nothing"
    assert [job.id for job in published.jobs] == [job_id] * 3
    assert ledger.claim(client.status(job_id), WORKER).outcome is ClaimOutcome.CLAIMED
    assert client.retry(job_id).status == "running"
    assert len(published.jobs) == 3
    client.cancel(job_id)
    ledger.finish(client.status(job_id), status="canceled")
    with pytest.raises(JobNotFailed):
        client.retry(job_id)


def test_an_upload_that_came_late_is_explained_under_the_key_that_had_failed(
    ledger: MemoryLedger, published: RecordingPublisher, caplog: pytest.LogCaptureFixture
) -> None:
    client = GradcamClient(
        settings=Settings(uploads="s3://in/up"),
        ledger=ledger,
        publish=published,
        objects=MemoryObjects(MemoryStore(), {}),
    )
    wish: dict[str, Any] = {"network": "vgg16", "target": {"top_n": 2}, "idempotency_key": "order"}
    job_id = client.upload_and_submit(b"photo", **wish)
    fail(ledger, job_id)
    caplog.set_level("INFO", "gradcam")
    assert client.upload_and_submit(b"photo", **wish) == job_id
    assert client.status(job_id).status == "failed"
    assert "retry_failed=True, tries it again" in caplog.text
    assert client.upload_and_submit(b"photo", retry_failed=True, **wish) == job_id
    assert client.status(job_id).status == "queued"
    fail(ledger, job_id)
    job = ledger.read_job(job_id)
    assert isinstance(job, Job)
    assert client.submit_many([job, {**FIELDS, "metadata": {"n": "1"}}], retry_failed=True)[0] == job_id
    assert client.status(job_id).status == "queued"
    assert [one.id for one in published.jobs].count(job_id) == 3


def test_large_jobs_go_in_smaller_steps(
    client: GradcamClient, ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "CHUNK_BYTES", 30_000)
    steps: list[int] = []

    def enter(jobs: Sequence[Any], **options: Any) -> Any:
        steps.append(len(jobs))
        return MemoryLedger.enter_many(ledger, jobs, **options)

    monkeypatch.setattr(ledger, "enter_many", enter)
    client.submit_many({**FIELDS, "image": f"data:image/png;base64,{'A' * 20_000}"} for _ in range(5))
    assert steps == [2, 2, 1]


@pytest.fixture(params=["memory", "redis"])
def any_ledger(request: pytest.FixtureRequest, settings: Settings) -> Ledger:
    return MemoryLedger() if request.param == "memory" else RedisLedger(settings)


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        ({"top_m": 3}, InvalidJob, "Job number 8 of those given: .*top_m: unknown field"),
        ({"image": "x" * 5000}, InvalidJob, "Job number 8 .*2,000"),
        ({"idempotency_key": "taken"}, IdempotencyConflict, "Job number 8 .*'taken' belongs to"),
    ],
    ids=["invalid", "too large", "conflict"],
)
def test_what_comes_before_a_wrong_job_is_accepted_and_what_comes_after_is_not(
    any_ledger: Ledger,
    published: RecordingPublisher,
    monkeypatch: pytest.MonkeyPatch,
    wrong: dict[str, Any],
    error: type[InvalidJob] | type[IdempotencyConflict],
    match: str,
) -> None:
    monkeypatch.setattr(calls, "CHUNK", 5)
    client = GradcamClient(settings=Settings(max_message_bytes=2000), ledger=any_ledger, publish=published)
    client.submit(**{**FIELDS, "image": "s3://in/other.jpg"}, idempotency_key="taken")
    good = [{**FIELDS, "id": new_id()} for _ in range(9)]
    with pytest.raises((InvalidJob, IdempotencyConflict), match=match) as caught:
        client.submit_many([*good[:7], {**FIELDS, **wrong}, *good[7:]])
    assert type(caught.value) is error
    assert caught.value.accepted == tuple(one["id"] for one in good[:7])
    assert [job.id for job in published.jobs[1:]] == list(caught.value.accepted)
    assert client.statuses(str(one["id"]) for one in good).keys() == set(caught.value.accepted)


def test_an_error_of_the_callers_own_comes_through_when_what_came_before_is_accepted(
    client: GradcamClient, published: RecordingPublisher, caplog: pytest.LogCaptureFixture
) -> None:
    def jobs() -> Iterator[dict[str, Any]]:
        yield FIELDS
        yield FIELDS
        raise OSError("the disk is gone")  # noqa: EM101, TRY003

    with pytest.raises(OSError, match="the disk is gone"):
        client.submit_many(jobs())
    assert len(published.jobs) == 2
    assert "submit_many_interrupted accepted=2" in caplog.text


def test_no_job_at_all_is_no_error(client: GradcamClient) -> None:
    assert client.submit_many([]) == []


def test_submitting_many_again_with_their_keys_finds_the_first_ones(client: GradcamClient) -> None:
    jobs = [{**FIELDS, "idempotency_key": f"k{n % 3}"} for n in range(6)]
    ids = client.submit_many(jobs)
    assert len(set(ids)) == 3
    assert client.submit_many(jobs) == ids


def test_a_webhook_that_is_no_web_address_is_refused_before_the_job_is_accepted(
    client: GradcamClient, published: RecordingPublisher
) -> None:
    with pytest.raises(InvalidJob, match=r"webhooks\.0\.url: 'ftp://host/x' is no web address: write https"):
        client.submit(**FIELDS, webhook="ftp://host/x")
    assert not published.jobs


def test_metadata_and_inputs_may_come_in_any_order(
    client: GradcamClient, published: RecordingPublisher
) -> None:
    tables = ({"b": "2", "a": "1"}, {"a": "1", "b": "2"})
    jobs = [{**FIELDS, "idempotency_key": "k", "metadata": one, "inputs": one} for one in tables]
    assert len({client.submit(**jobs[0]), *client.submit_many(jobs)}) == 1
    assert {job.fingerprint() for job in published.jobs} == {Job.parse(jobs[1]).fingerprint()}


@pytest.mark.usefixtures("hasty")
def test_many_are_accepted_though_the_broker_is_out_of_reach_and_it_is_waited_for_once(
    ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calls, "CHUNK", 4)
    asked = []

    def broken(job: Job) -> None:
        asked.append(job.id)
        message = "The broker cannot be reached."
        raise BrokerUnavailable(message)

    client = GradcamClient(settings=Settings(), ledger=ledger, publish=broken)
    ids = client.submit_many(FIELDS for _ in range(12))
    assert ledger.find_unpublished("normal", queue_is_empty=True, lost_after_s=0, limit=99) == ids, (
        "the reaper finds them"
    )
    assert sum("publish_failed" in line and " jobs=4 " in line for line in caplog.text.splitlines()) == 3
    tries = Counter(asked)
    assert tries[ids[0]] > 1
    assert (tries[ids[4]], tries[ids[8]]) == (1, 1)


class Blinking(MemoryLedger):
    """Out of reach for some of the times that it is asked; the answer to the first one is lost."""

    def __init__(self, failures: float) -> None:
        super().__init__()
        self.failures = failures

    def _blink(self) -> None:
        self.failures -= 1
        if self.failures >= 0:
            message = "The ledger cannot be reached."
            raise LedgerUnavailable(message)

    def enter_many(self, jobs: Sequence[Any], **options: Any) -> Any:
        entered = super().enter_many(jobs, **options)
        self._blink()
        return entered

    def read_many(self, ids: Sequence[str], tenant: str | None = None) -> dict[str, StatusDocument]:
        self._blink()
        return super().read_many(ids, tenant)


def test_a_ledger_that_blinks_is_asked_again_and_nothing_is_entered_twice(
    published: RecordingPublisher,
) -> None:
    ledger = Blinking(0)
    client = GradcamClient(settings=Settings(), ledger=ledger, publish=published)
    ledger.failures = 2
    job_id = client.submit(**FIELDS)
    ledger.failures = 1
    ids = client.submit_many([FIELDS, FIELDS])
    ledger.failures = 1
    assert client.status(job_id).status == "queued"
    ledger.failures = 1
    assert client.statuses(ids).keys() == set(ids)
    ledger.failures = 1
    assert client.cancel(job_id).status == "canceled"
    assert [job.id for job in published.jobs] == [job_id, *ids]
    assert ledger.count_jobs() == (2, 0)


@pytest.mark.usefixtures("hasty")
def test_a_ledger_that_stays_away_is_an_error_that_says_what_is_known(
    published: RecordingPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "CHUNK", 2)
    ledger = Blinking(0)
    client = GradcamClient(settings=Settings(), ledger=ledger, publish=published)
    jobs = [Job.parse(FIELDS) for _ in range(4)]

    def given() -> Iterator[Job]:
        yield from jobs[:2]
        ledger.failures = float("inf")
        yield from jobs[2:]

    with pytest.raises(LedgerUnavailable, match=r"Whether 2 jobs were accepted is not known: submit") as many:
        client.submit_many(given())
    assert many.value.accepted == (jobs[0].id, jobs[1].id)
    assert many.value.in_doubt == (jobs[2].id, jobs[3].id)
    with pytest.raises(LedgerUnavailable, match=f"Whether job {jobs[3].id} was accepted is not known"):
        client.submit(jobs[3])
    with pytest.raises(LedgerUnavailable, match="was cancelled is not known: ask again"):
        client.cancel(jobs[0].id)
    ledger.failures = 0
    assert client.submit_many(jobs[2:]) == [jobs[2].id, jobs[3].id], "as the error says: with the same ids"
    assert ledger.count_jobs() == (4, 0)


def test_a_server_that_does_not_answer_for_a_while_loses_nothing_and_doubles_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "TIMEOUT_S", 0.2)
    client, server = GradcamClient(settings=settings), redis.Redis.from_url(settings.broker_url)
    client.submit(**FIELDS)
    server.client_pause(600)  # ms: longer than an answer may take, shorter than the time to retry
    job_id = client.submit(**FIELDS)
    server.client_pause(600)
    ids = client.submit_many([FIELDS, FIELDS])
    server.client_kill_filter(_type="normal", skipme=True)
    ids.append(client.submit(**FIELDS))
    assert client.statuses([job_id, *ids]).keys() == {job_id, *ids}
    assert {one["headers"]["id"] for one in waiting(settings)} >= {job_id, *ids}
    assert RedisLedger(settings).count_jobs() == (5, 0)


@pytest.mark.usefixtures("hasty")
def test_a_server_that_accepts_and_never_answers_is_given_up_in_time(
    settings: Settings, silent_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    silent = f"redis://127.0.0.1:{silent_port}/0"
    begun = time.monotonic()
    with pytest.raises(LedgerUnavailable, match=r"Timeout .* was not accepted\.$"):
        GradcamClient(silent, settings=settings).submit(**FIELDS)
    job_id = GradcamClient(silent, settings.broker_url, settings=settings).submit(**FIELDS)
    assert f"publish_failed job_id={job_id} jobs=1 " in caplog.text
    assert time.monotonic() - begun < 10, (
        "Redis is asked for half a second here, and redis-py does not ask again"
    )


def unreachable(**changes: Any) -> LedgerUnavailable:
    return LedgerUnavailable("The ledger cannot be reached.", **changes)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    ("unchanged", "said"),
    [
        ([True], "was not accepted."),
        ([False], "was accepted is not known: submit again"),
        ([False, True], "was accepted is not known: submit again"),
        ([True, False], "was accepted is not known: submit again"),
    ],
)
def test_what_cannot_have_been_accepted_is_said_to_be_so(
    published: RecordingPublisher, monkeypatch: pytest.MonkeyPatch, unchanged: list[bool], said: str
) -> None:
    ledger = MemoryLedger()
    failures = iter([*unchanged, *[unchanged[-1]] * 1000])

    def away(*_: Any, **__: Any) -> Any:
        raise unreachable(changed_nothing=next(failures))

    for name in ("enter_many", "cancel", "retry"):
        monkeypatch.setattr(ledger, name, away)
    client = GradcamClient(settings=Settings(), ledger=ledger, publish=published)
    job = Job.parse(FIELDS)
    with pytest.raises(LedgerUnavailable) as caught:
        client.submit(job)
    assert said in str(caught.value)
    assert caught.value.in_doubt == (() if unchanged == [True] else (job.id,))
    assert caught.value.retryable
    for ask, done in ((client.cancel, "was cancelled"), (client.retry, "is tried again")):
        failures = iter([*unchanged, *[unchanged[-1]] * 1000])
        with pytest.raises(LedgerUnavailable) as caught:
            ask(job.id)
        known = done.replace("was ", "was not ").replace("is ", "is not ")
        assert (f"Job {job.id} {known}." in str(caught.value)) is (unchanged == [True])
        assert (f"Whether job {job.id} {done} is not known" in str(caught.value)) is (unchanged != [True])


def test_what_an_error_of_redis_means_is_told_apart(settings: Settings, free_port: int) -> None:
    reaching = RedisLedger(settings).server.translate_errors
    for error, unchanged, retryable in (
        (redis.exceptions.OutOfMemoryError("OOM"), True, True),
        (redis.exceptions.ReadOnlyError("READONLY"), True, True),
        (redis.exceptions.ResponseError("NOREPLICAS Not enough good replicas to write."), True, True),
        (redis.exceptions.NoPermissionError("no permissions"), True, False),
        (redis.exceptions.ResponseError("DB index is out of range"), True, False),
        (redis.exceptions.ResponseError("DENIED Redis is running in protected mode"), True, False),
        (redis.exceptions.ResponseError("BUSY Redis is busy running a script."), True, True),
        (redis.exceptions.ConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] unknown"), False, False),
        (redis.exceptions.TimeoutError("Timeout reading from socket"), False, True),
        (redis.exceptions.ConnectionError("Connection closed by server."), False, True),
        (
            redis.exceptions.ResponseError("CROSSSLOT Keys in request don't hash to the same slot"),
            False,
            False,
        ),
    ):
        with pytest.raises(LedgerUnavailable) as caught, reaching():
            raise error
        assert (caught.value.changed_nothing, caught.value.retryable) == (unchanged, retryable), error
    nobody = RedisLedger(settings.changed(broker_url=f"redis://127.0.0.1:{free_port}/0"), retries=0)
    with pytest.raises(LedgerUnavailable) as caught:
        nobody.count_jobs()
    assert caught.value.changed_nothing


def test_errors_that_time_may_cure_are_retryable() -> None:
    assert LedgerUnavailable.retryable
    assert BrokerUnavailable.retryable
    assert WaitTimeout.retryable
    assert not JobNotFailed.retryable


def test_who_finds_all_connections_in_use_waits_for_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.redis_server.client.MAX_CONNECTIONS", 2)
    client = GradcamClient(settings=settings)
    job_id = client.submit(**FIELDS)
    with ThreadPoolExecutor(60) as pool:
        found = list(pool.map(lambda _: client.status(job_id).id, range(600)))
    assert set(found) == {job_id}
    assert len(redis.Redis.from_url(settings.broker_url).client_list()) < 60


@pytest.mark.usefixtures("hasty")
def test_who_waits_in_vain_for_a_connection_is_told_what_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.redis_server.client.MAX_CONNECTIONS", 2)
    monkeypatch.setattr(client_module, "TIMEOUT_S", 0.05)
    ledger = RedisLedger(settings, timeout_s=0.05, retries=0)
    client = GradcamClient(settings=settings, ledger=ledger)
    pool = ledger.server.redis.connection_pool
    held = [pool.get_connection() for _ in range(2)]
    with pytest.raises(
        LedgerUnavailable, match=r"all 2 connections of this process were in use .* was not accepted\.$"
    ):
        client.submit(**FIELDS)
    pool.release(held.pop())
    assert client.submit(**FIELDS)


def test_many_threads_share_one_client(settings: Settings) -> None:
    client = GradcamClient(settings=settings)

    def work(_: int) -> list[str]:
        ids: list[str] = []
        for _ in range(50):
            ids.append(client.submit(**FIELDS))
            assert client.status(ids[-1]).id == ids[-1]
        return ids

    with ThreadPoolExecutor(32) as pool:
        ids = [one for found in pool.map(work, range(32)) for one in found]
    assert len(set(ids)) == 32 * 50
    assert sorted(one["headers"]["id"] for one in waiting(settings)) == sorted(ids)


FORKING = """
import os, signal, sys, threading
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.settings import Settings

FIELDS = {"image": "s3://in/pier.jpg", "network": "vgg16", "target": {"top_n": 2}}
client = GradcamClient(settings=Settings(broker_url=sys.argv[1], key_prefix=sys.argv[2]))
told = open(sys.argv[3], "a", buffering=1)

def work(count):
    for _ in range(count):
        for job_id in (client.submit(**FIELDS), *client.submit_many([FIELDS, FIELDS])):
            assert client.status(job_id).id == job_id
            os.write(told.fileno(), f"{job_id}\\n".encode())

work(1)  # made and used before the fork, and in use by a thread while it happens
held, forked = threading.Event(), threading.Event()

def hold():
    clients = client._ledger.server.redis, client.calls._publish._clients.get_client()
    ours = tuple(one.connection_pool for one in clients)
    with ours[0]._lock, ours[1]._lock:
        held.set()
        forked.wait()

threading.Thread(target=hold).start()
held.wait()
children = []
for _ in range(8):
    child = os.fork()
    if not child:
        signal.alarm(20)  # seconds, where it hangs
        try:
            work(5)
            os._exit(0)
        finally:
            os._exit(1)
    children.append(child)
forked.set()
work(60)
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""


def test_a_client_that_was_used_before_a_fork_is_everybodys_own_after_it(
    settings: Settings, tmp_path: Any
) -> None:
    told = tmp_path / "ids.txt"
    command = [sys.executable, "-c", FORKING, settings.broker_url, settings.key_prefix, str(told)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    ids = told.read_text().split()
    assert len(set(ids)) == len(ids) == 3 * (1 + 60 + 8 * 5)
    assert sorted(one["headers"]["id"] for one in waiting(settings)) == sorted(ids)


def test_it_works_where_an_event_loop_runs(settings: Settings) -> None:
    async def view() -> StatusDocument:
        with GradcamClient(settings=settings) as client:
            return client.status(client.submit(**FIELDS))

    assert asyncio.run(view()).status == "queued"


def test_ids_are_published_many_at_a_time(settings: Settings) -> None:
    queue, ids = publisher.Publisher(settings), [new_id() for _ in range(1001)]
    queue.republish(ids, "shard")
    messages = waiting(settings, "shard")
    assert [one["headers"]["id"] for one in messages] == ids
    assert {one["headers"]["task"] for one in messages} == {publisher.EXPLAIN_SHARD}
    assert queue.queue_length("shard") == 1001


def test_a_new_job_is_entered_and_published_in_one_step(settings: Settings) -> None:
    jobs = [Job.parse({**FIELDS, "priority": priority}) for priority in ("low", "normal", "normal", "bulk")]
    client, server = GradcamClient(settings=settings), redis.Redis.from_url(settings.broker_url)
    client.submit(**FIELDS, idempotency_key="first")  # the script is in the server from now on

    def commands() -> tuple[int, int]:
        info: Any = server.info("commandstats")
        return int(info["cmdstat_evalsha"]["calls"]), int(info["cmdstat_lpush"]["calls"])

    scripts, pushes = commands()
    client.submit_many(jobs)
    assert commands() == (scripts + 1, pushes + 4)
    again = client.submit(**FIELDS, idempotency_key="first")
    assert [one["headers"]["id"] for one in waiting(settings)][-1] == again, "its message may have been lost"
    by_hand = publisher.Publisher(settings)
    entered = {job.id: client.status(job.id).created_at for job in jobs}
    by_hand.publish((job, entered[job.id]) for job in jobs)
    for priority, count in (("low", 1), ("normal", 2), ("bulk", 1)):
        messages = [one for one in waiting(settings, priority) if one["headers"]["id"] in entered]
        for one in messages:
            del one["properties"]["delivery_tag"]
        assert messages[:count] == messages[count:] != [], "the same message"


def test_queues_in_another_database_are_published_to_apart(settings: Settings) -> None:
    other = settings.broker_url.removesuffix("/0") + "/1"
    settings = settings.model_copy(update={"ledger_url": other})
    job_id = GradcamClient(settings=settings).submit(**FIELDS)
    assert [one["headers"]["id"] for one in waiting(settings)] == [job_id]


def test_a_queue_that_cannot_be_written_to_loses_no_job_and_is_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calls, "REDIS_RETRIES", replace(calls.REDIS_RETRIES, total_s=0))
    server = redis.Redis.from_url(settings.broker_url)
    server.set(f"{settings.key_prefix}{publisher.INTERACTIVE}\x06\x163", "no list", ex=60)
    client = GradcamClient(settings=settings)
    with caplog.at_level("WARNING"):
        assert client.status(client.submit(**FIELDS)).status == "queued"
    assert "publish_failed" in caplog.text
    assert "WRONGTYPE" in caplog.text


def test_more_threads_than_connections_wait_for_their_turn(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "REDIS_RETRIES", replace(calls.REDIS_RETRIES, total_s=0))
    client, server = GradcamClient(settings=settings), redis.Redis.from_url(settings.broker_url)
    job_id = client.submit(**FIELDS)
    server.client_pause(300)  # ms, so that all of them ask at once
    with ThreadPoolExecutor(150) as pool:
        assert {one.id for one in pool.map(client.status, [job_id] * 150)} == {job_id}


@pytest.mark.parametrize(
    ("url", "match"),
    [
        (
            "redis://me:wrong@{}/0",
            "refuses access .*password.*: check the user, the password and the database",
        ),
        ("redis://{}/99", "refuses access .*out of range"),
        ("redis://nobody:secret@{}/0", "refuses access .*permissions"),
    ],
    ids=["password", "database", "permission"],
)
def test_what_is_refused_is_not_asked_for_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, url: str, match: str
) -> None:
    def again(_: Any, error: Exception) -> None:
        pytest.fail(f"asked again after: {error}")

    monkeypatch.setattr(Retries, "record_failure", again)
    admin = redis.Redis.from_url(settings.broker_url)
    admin.acl_setuser("nobody", enabled=True, passwords=["+secret"], commands=["+ping", "+select"])
    place = settings.broker_url.removeprefix("redis://").removesuffix("/0")
    client, known = GradcamClient(url.format(place), settings=settings), new_id()
    for ask in (client.status, client.wait, client.cancel, lambda _: client.submit(**FIELDS)):
        with pytest.raises(LedgerUnavailable, match=match):
            ask(known)
    client = GradcamClient(url.format(place), settings.broker_url, settings=settings)
    assert client.status(client.submit(**FIELDS)).status == "queued", "a reaper will publish it"
    admin.acl_deluser("nobody")


@pytest.mark.parametrize("url", ["", "nonsense", "amqp://host", "redis://host:99999/0", "redis://h/0?a=b"])
def test_urls_given_by_hand_are_checked_as_those_of_the_environment_are(url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"^GRADCAM_BROKER_URL: .*must look like redis://host:6379/0"):
        GradcamClient(url)
    if url:
        with pytest.raises(
            InvalidSettings, match=r"^GRADCAM_LEDGER_URL: .*must look like redis://host:6379/0"
        ):
            GradcamClient(None, url, settings=Settings())


def test_a_job_may_be_given_as_its_fields_in_a_dictionary(client: GradcamClient) -> None:
    assert client.status(client.submit(FIELDS)).status == "queued"
    with pytest.raises(InvalidJob, match="Give a job or its fields, not both: priority"):
        client.submit(FIELDS, priority="high")  # type: ignore[call-overload]
    with pytest.raises(InvalidJob, match=r"submit\(image='s3://photos/cat.jpg', ...\), and network as it is"):
        client.submit("s3://photos/cat.jpg", network="vgg16")  # type: ignore[call-overload]
    with pytest.raises(InvalidJob, match="This is not a job"):
        client.submit(5)  # type: ignore[call-overload]


def test_an_id_may_be_a_uuid_as_web_frameworks_have_them(settings: Settings) -> None:
    with GradcamClient(settings=settings) as client:
        text = client.submit(**FIELDS)
        job_id: Any = UUID(text)
        assert client.status(job_id).id == text
        assert client.statuses([job_id]).keys() == {text}
        stream = client.stream(job_id, 30)
        assert next(stream).status == "queued"
        assert client.cancel(job_id).status == "canceled"
        assert next(stream).status == "canceled"
        nobody: Any = None
        for ask in (client.status, client.cancel, client.wait):
            with pytest.raises(UnknownJob, match="no job None"):
                ask(nobody)


def test_a_client_that_is_closed_while_others_use_it_breaks_nobodys_call(settings: Settings) -> None:
    client, closing = GradcamClient(settings=settings), threading.Event()

    def use(_: int) -> None:
        while not closing.is_set():
            client.status(client.submit(**FIELDS))

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use, n) for n in range(4)]
        for _ in range(200):
            client.close()
            time.sleep(0.002)
        closing.set()
    for user in users:
        user.result()


GREENLETS = """
from gevent import joinall, monkey, spawn
monkey.patch_all()
import sys
from collections import Counter
import redis
from gradcam_worker import GradcamClient
from gradcam_worker.settings import Settings

client = GradcamClient(sys.argv[1], settings=Settings(key_prefix=sys.argv[2]))
job = client.submit(image="s3://in/a.jpg", network="vgg16", top_n=1)
server = redis.Redis.from_url(sys.argv[1])
server.client_pause(1000)  # ms, so that all of them ask at once

def ask(number):
    if number % 2:
        return client.status(job).status
    return client.submit(image="s3://in/a.jpg", network="vgg16", top_n=1, idempotency_key="k").status().status

tasks = [spawn(ask, number) for number in range(600)]
print(Counter(task.get() for task in tasks), len(server.client_list()) <= 600)
"""


def test_hundreds_of_greenlets_wait_for_a_connection(settings: Settings) -> None:
    command = [sys.executable, "-c", GREENLETS, settings.broker_url, settings.key_prefix]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout, done.stderr) == ("Counter({'queued': 600}) True\n", "")
