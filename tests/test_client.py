import json
import threading
import time
from datetime import datetime

import pytest
import redis

from worker import broker
from worker.client import GradcamClient
from worker.contract import Job, WorkerRef
from worker.errors import BrokerUnavailable, InvalidJob, UnknownJob, WaitTimeout
from worker.settings import Settings
from worker.testing import Doorbell, MemoryLedger
from worker.wire import new_id

FIELDS = {"image": "s3://in/pier.jpg", "network": "vgg16", "target": {"top_n": 2}}
WORKER = WorkerRef(id="w", device="cpu")


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger()


@pytest.fixture
def doorbell() -> Doorbell:
    return Doorbell()


@pytest.fixture
def client(ledger: MemoryLedger, doorbell: Doorbell) -> GradcamClient:
    return GradcamClient(settings=Settings(), ledger=ledger, publish=doorbell)


def test_submitting_enters_the_job_and_rings_the_bell(client: GradcamClient, doorbell: Doorbell) -> None:
    job_id = client.submit(**FIELDS)
    assert [job.id for job in doorbell.jobs] == [job_id]
    assert client.status(job_id).status == "queued"


def test_a_wrong_job_is_refused_before_anything_happens(client: GradcamClient, doorbell: Doorbell) -> None:
    with pytest.raises(InvalidJob, match="top_m: unknown field"):
        client.submit(**FIELDS, top_m=3)
    assert not doorbell.jobs


def test_the_same_key_returns_the_first_id_and_rings_for_the_first_job(
    client: GradcamClient, doorbell: Doorbell
) -> None:
    first = client.submit(**FIELDS, idempotency_key="k")
    assert client.submit(**FIELDS, idempotency_key="k") == first
    assert {job.id for job in doorbell.jobs} == {first}


def test_a_finished_job_is_not_rung_for_again(
    client: GradcamClient, ledger: MemoryLedger, doorbell: Doorbell
) -> None:
    job = Job.parse(FIELDS)
    ledger.advance(ledger.claim(ledger.submit(job), WORKER).document, status="succeeded")
    assert client.submit(job) == job.id
    assert not doorbell.jobs


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
        ledger.advance(document, status="failed")

    threading.Thread(target=work).start()
    assert client.wait(job.id, timeout_s=10).status == "failed"


def test_waiting_too_long_says_what_the_job_is_doing(client: GradcamClient) -> None:
    job_id = client.submit(**FIELDS)
    with pytest.raises(WaitTimeout, match=f"{job_id} is still queued after 0.05 s"):
        client.wait(job_id, timeout_s=0.05)


def test_an_unknown_job_is_not_waited_for(client: GradcamClient) -> None:
    with pytest.raises(UnknownJob):
        client.wait(new_id())


def test_a_job_in_the_ledger_is_accepted_though_the_broker_is_out_of_reach(
    ledger: MemoryLedger, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: Job) -> None:
        message = "The broker cannot be reached."
        raise BrokerUnavailable(message)

    job = Job.parse(FIELDS)
    assert GradcamClient(settings=Settings(), ledger=ledger, publish=broken).submit(job) == job.id
    assert ledger.silent("normal", empty=True, lost_after_s=0, limit=9) == [job.id], "the reaper finds it"
    assert "nobody could be told at once" in caplog.text


def test_a_job_too_large_for_a_message_is_not_accepted(ledger: MemoryLedger, doorbell: Doorbell) -> None:
    small = Settings(max_message_bytes=2000)
    client = GradcamClient(settings=small, ledger=ledger, publish=doorbell)
    with pytest.raises(InvalidJob, match="2,000"):
        client.submit(**{**FIELDS, "image": f"data:image/png;base64,{'A' * 3000}"})
    assert ledger.counts() == (0, 0)


def test_a_job_can_be_cancelled(client: GradcamClient) -> None:
    job_id = client.submit(**FIELDS)
    assert client.cancel(job_id).status == "canceled"
    assert client.wait(job_id).status == "canceled"
    with pytest.raises(UnknownJob):
        client.cancel(new_id())


def test_the_message_says_when_its_job_was_entered(settings: Settings) -> None:
    client = GradcamClient(settings=settings)
    job_id = client.submit(**FIELDS)
    queue = f"{settings.key_prefix}{broker.INTERACTIVE}\x06\x163"
    message = json.loads(redis.Redis.from_url(settings.broker_url).lpop(queue) or "{}")  # type: ignore[arg-type]
    moment = datetime.fromisoformat(message["headers"][broker.ENTERED_AT])
    assert moment == client.status(job_id).created_at


def test_urls_given_by_hand_go_before_the_environment(settings: Settings) -> None:
    client = GradcamClient(settings.broker_url, settings=Settings(key_prefix=settings.key_prefix))
    job_id = client.submit(**FIELDS)
    assert GradcamClient(settings=settings).status(job_id).status == "queued"
