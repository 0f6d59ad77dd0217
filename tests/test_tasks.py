from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pytest
import redis

from worker.contract import Delivery, Job, StatusDocument, WorkerRef
from worker.errors import (
    BrokerUnavailable,
    ImageFetchFailed,
    LedgerUnavailable,
    StatusUnavailable,
    StorageUnavailable,
    UriNotAllowed,
)
from worker.redis_ledger import RedisLedger
from worker.settings import Settings
from worker.tasks import Desk
from worker.testing import Doorbell, MemoryLedger, MemoryMessenger, MemoryStore, outside
from worker.wire import new_id

IMAGE = cv2.imencode(".png", np.full((20, 20, 3), (0, 0, 255), np.uint8))[1].tobytes()
WEBHOOK = {
    "url": "https://app/hook",
    "events": ["job.started", "job.retrying", "job.succeeded", "job.failed"],
}


@dataclass
class Office:
    """A desk with doubles all around it."""

    images: dict[str, bytes | Exception] = field(default_factory=lambda: {"s3://in/a.png": IMAGE})
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    store: MemoryStore = field(default_factory=MemoryStore)
    messenger: MemoryMessenger = field(default_factory=MemoryMessenger)
    doorbell: Doorbell = field(default_factory=Doorbell)
    deliveries: list[Delivery] = field(default_factory=list)
    one_desk: Any = None

    @property
    def desk(self) -> Desk:
        return Desk(
            Settings(retry_backoff_s=1),
            self.ledger,
            outside(self.images, store=self.store, webhooks=self.messenger),
            WorkerRef(id="w", device="cpu"),
            publish=self.doorbell,
            publish_delivery=lambda delivery, **_: self.deliveries.append(delivery),
        )

    def handle(self, payload: object, message_id: str | None = None) -> str:
        return self.desk.handle(payload, message_id or new_id())

    def read(self, job: Job) -> StatusDocument:
        return self.ledger.read(job.id)


@pytest.fixture
def office() -> Office:
    return Office()


def a_job(**changes: Any) -> Job:
    fields = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
    return Job.parse({**fields, **changes})


def payload(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json")


def test_a_good_job_succeeds_and_its_document_tells_all(office: Office) -> None:
    job = a_job(metadata={"batch": "7"})
    assert office.handle(payload(job)) == "done"
    document = office.read(job)
    assert (document.status, document.stage, document.attempt) == ("succeeded", None, 1)
    assert document.predictions[0].name == "red"
    assert document.network is not None
    assert document.network.layer == "blocks"
    assert document.result is not None
    assert document.result.manifest_uri.endswith(f"{job.id}/manifest.json")
    assert document.metrics.keys() >= {"queue_s", "fetch_s", "explain_s", "upload_s"}
    assert document.metadata == {"batch": "7"}


def test_a_message_that_comes_again_is_dropped(office: Office) -> None:
    job = a_job()
    office.handle(payload(job))
    document = office.read(job)
    assert office.handle(payload(job)) == "dropped"
    assert office.read(job) == document


def test_a_permanent_error_fails_the_job_at_once(office: Office) -> None:
    job = a_job(image="s3://in/none.png")
    assert office.handle(payload(job)) == "done"
    document = office.read(job)
    assert document.status == "failed"
    assert document.error is not None
    assert (document.error.code, document.error.stage, document.error.attempt) == (
        "image_not_found",
        "fetch",
        1,
    )
    assert not office.doorbell.jobs


def test_a_retryable_error_puts_the_job_back_with_a_growing_pause(office: Office) -> None:
    office.images["s3://in/a.png"] = ImageFetchFailed("HTTP 503")
    job = a_job()
    assert office.handle(payload(job)) == "later"
    document = office.read(job)
    assert (document.status, document.error and document.error.code) == ("retrying", "image_fetch_failed")
    assert office.handle(payload(job)) == "later"
    assert office.handle(payload(job)) == "done"
    assert office.read(job).status == "failed", "the third attempt was the last"
    first, second = office.doorbell.delays_s
    assert 0.5 <= first <= 1 <= second <= 2


def test_a_retry_that_succeeds_leaves_no_error(office: Office) -> None:
    office.images["s3://in/a.png"] = ImageFetchFailed("HTTP 503")
    job = a_job()
    office.handle(payload(job))
    office.images["s3://in/a.png"] = IMAGE
    assert office.handle(payload(job)) == "done"
    document = office.read(job)
    assert (document.status, document.attempt, document.error) == ("succeeded", 2, None)


def test_what_nobody_foresaw_is_an_internal_problem_and_is_tried_again(office: Office) -> None:
    office.images["s3://in/a.png"] = RuntimeError("surprise")
    job = a_job(max_attempts=1)
    assert office.handle(payload(job)) == "done"
    error = office.read(job).error
    assert error is not None
    assert (error.code, error.retryable) == ("internal", True)
    assert "RuntimeError: surprise" in error.detail


def test_storage_that_fails_fails_no_more_than_the_attempt(office: Office) -> None:
    @dataclass
    class Broken(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            message = "HTTP 503"
            raise StorageUnavailable(message)

    office.store = Broken()
    job = a_job()
    assert office.handle(payload(job)) == "later"
    assert office.read(job).result is None


@pytest.mark.parametrize(
    "message", [None, "garbage", 7, [1], {}, {"image": "x"}, {"id": "../..", "image": 3}]
)
def test_a_message_that_is_no_job_is_written_down_under_its_own_id(office: Office, message: object) -> None:
    message_id = new_id()
    assert office.handle(message, message_id) == "done"
    document = office.ledger.read(message_id)
    assert (document.status, document.error and document.error.code) == ("failed", "invalid_job")


def test_a_wrong_job_with_an_id_is_written_down_under_that_id(office: Office) -> None:
    job_id = new_id()
    office.handle({"id": job_id, "network": "vgg16"}, new_id())
    assert office.ledger.read(job_id).status == "failed"


def test_a_message_id_of_another_kind_still_leads_to_one_document(office: Office) -> None:
    assert office.handle("garbage", "my-own-id") == "done"
    assert office.handle("garbage", "my-own-id") == "done"
    assert len(office.ledger._entries) == 1


def test_a_stranger_may_leave_out_the_id_and_find_the_job_by_the_message(office: Office) -> None:
    message_id = new_id()
    stranger = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
    assert office.handle(stranger, message_id) == "done"
    assert office.ledger.read(message_id).status == "succeeded"


def test_a_strangers_second_job_with_a_taken_key_is_refused_under_its_own_id(office: Office) -> None:
    first, second = a_job(idempotency_key="k"), a_job(idempotency_key="k", target={"top_n": 2})
    office.handle(payload(first))
    assert office.handle(payload(second)) == "done"
    error = office.read(second).error
    assert error is not None
    assert error.code == "idempotency_conflict"
    assert office.read(first).status == "succeeded"


def test_an_overtaken_attempt_stops_without_a_word(office: Office) -> None:
    job = a_job()

    @dataclass
    class Overtaking(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            if office.read(job).attempt == 1:
                other = WorkerRef(id="other", device="cpu")
                office.ledger.claim(job, office.read(job), other, redelivered=True)
            return super().put(key, data, media_type)

    office.store = Overtaking()
    assert office.handle(payload(job)) == "dropped"
    assert office.read(job).worker == WorkerRef(id="other", device="cpu")
    assert office.read(job).status == "running"


def test_a_ledger_out_of_reach_hands_the_message_back(
    office: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> bool:
        message = "gone"
        raise LedgerUnavailable(message)

    job = a_job()
    office.ledger.submit(job)
    monkeypatch.setattr(office.ledger, "_swap", unreachable)
    with pytest.raises(LedgerUnavailable):
        office.handle(payload(job))
    monkeypatch.undo()
    assert office.handle(payload(job)) == "done", "and leaves nothing locked"


def test_a_second_message_for_a_running_job_waits_and_changes_nothing(office: Office) -> None:
    job = a_job(max_attempts=1)
    ends = []

    @dataclass
    class Meanwhile(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            ends.append(office.one_desk.handle(payload(job), new_id(), redelivered=True))  # by this process
            ends.append(office.handle(payload(job)))  # by another one
            return super().put(key, data, media_type)

    office.store = Meanwhile()
    office.one_desk = office.desk
    assert office.one_desk.handle(payload(job), new_id()) == "done"
    assert set(ends) == {"later"}
    assert (office.read(job).status, office.read(job).attempt) == ("succeeded", 1)
    assert set(office.doorbell.delays_s) == {5}
    assert office.handle(payload(job)) == "dropped", "when it rings again the job is final"


@pytest.mark.parametrize(
    "job_id", [5, "x", "01A2062B-306E-7164-A139-13398DA125F6", f"{new_id()}\n", "\ud800"]
)
def test_a_wrong_id_is_refused_and_not_replaced_in_silence(office: Office, job_id: object) -> None:
    message_id = new_id()
    assert office.handle({**payload(a_job()), "id": job_id}, message_id) == "done"
    error = office.ledger.read(message_id).error
    assert error is not None
    assert error.code == "invalid_job"
    assert "id: " in error.detail


def test_a_broker_out_of_reach_at_a_retry_hands_the_message_back(office: Office) -> None:
    def broken(*_: object, **__: object) -> None:
        message = "gone"
        raise BrokerUnavailable(message)

    office.images["s3://in/a.png"] = ImageFetchFailed("HTTP 503")
    office.doorbell = broken  # type: ignore[assignment]
    job = a_job()
    with pytest.raises(BrokerUnavailable):
        office.handle(payload(job))
    office.images["s3://in/a.png"] = IMAGE
    office.doorbell = Doorbell()
    assert office.handle(payload(job)) == "done"
    assert office.read(job).attempt == 2


def test_whoever_asked_is_told_what_they_asked_for_in_order(office: Office) -> None:
    job = a_job(webhooks=[WEBHOOK, {"url": "https://b/hook", "events": ["job.failed"]}])
    office.handle(payload(job))
    told = [(delivery.url, delivery.event.type) for delivery in office.deliveries]
    assert told == [
        ("https://app/hook", "gradcam.job.started"),
        ("https://app/hook", "gradcam.job.succeeded"),
    ]
    revisions = [delivery.event.data.revision for delivery in office.deliveries]
    assert revisions == sorted(set(revisions))


def delivery() -> Delivery:
    office = Office()
    office.handle(payload(a_job(webhooks=[WEBHOOK])))
    return office.deliveries[-1]


def test_a_delivery_is_sent(office: Office) -> None:
    one = delivery()
    assert office.desk.deliver(one.model_dump(mode="json")) == "done"
    assert office.messenger.sent == [one]


def test_a_receiver_that_is_down_is_tried_again_a_few_times(office: Office) -> None:
    office.messenger.failure = StatusUnavailable("HTTP 503")
    ends = [office.desk.deliver(delivery().model_copy(update={"attempt": n}).model_dump()) for n in (1, 4, 5)]
    assert ends == ["later", "later", "done"]
    assert [one.attempt for one in office.deliveries] == [2, 5]


def test_a_receiver_that_refuses_is_not_tried_again(office: Office) -> None:
    office.messenger.failure = UriNotAllowed("no")
    assert office.desk.deliver(delivery().model_dump()) == "done"
    assert not office.deliveries


def test_what_is_no_delivery_is_dropped(office: Office) -> None:
    assert office.desk.deliver({"url": 3}) == "dropped"


def test_a_strangers_second_message_with_the_same_key_runs_the_first_job(office: Office) -> None:
    first, second = a_job(idempotency_key="k"), a_job(idempotency_key="k")
    office.ledger.submit(first)
    assert office.handle(payload(second)) == "done"
    assert office.read(first).status == "succeeded"
    assert {key.partition("/")[0] for key in office.store.objects} == {first.id}


@pytest.mark.parametrize(
    ("entered_at", "questions"),
    [
        ("as it was", 2),
        ("never", 3),
        ("2020-01-01T00:00:00Z", 4),
        ("2020-01-01T00:00:00", 3),
        ("soon", 3),
        ([5], 3),
    ],
)
def test_a_message_that_says_when_its_job_was_entered_spares_a_question_to_the_ledger(
    office: Office, settings: Settings, monkeypatch: pytest.MonkeyPatch, entered_at: Any, questions: int
) -> None:
    ledger = RedisLedger(settings.ledger, prefix=settings.key_prefix, retention_s=60)
    office.ledger = ledger  # type: ignore[assignment]
    job = a_job()
    entered = ledger.submit(job)
    moment = {"as it was": entered.created_at.isoformat(), "never": None}.get(str(entered_at), entered_at)
    ledger.counts()  # the scripts and the connection are there
    asked: list[object] = []
    execute: Any = redis.Redis.execute_command

    def counted(self: Any, *command: Any, **options: Any) -> Any:
        asked.append(command)
        return execute(self, *command, **options)

    monkeypatch.setattr(redis.Redis, "execute_command", counted)
    assert office.desk.handle(payload(job), job.id, entered_at=moment) == "done"
    document = ledger.read(job.id)
    assert (document.status, document.attempt, document.revision) == ("succeeded", 1, 3)
    assert len(asked) == questions


def test_a_message_of_a_job_that_runs_just_now_is_kept_also_if_it_says_when_it_was_entered(
    office: Office,
) -> None:
    job = a_job()
    moment = office.ledger.submit(job).created_at.isoformat()
    desk = office.desk
    with desk.busy.entered(job.id):
        assert desk.handle(payload(job), job.id, entered_at=moment) == "later"
    assert office.read(job).status == "queued"
    assert desk.handle(payload(job), job.id, entered_at=moment) == "done"
    assert desk.handle(payload(job), job.id, entered_at=moment) == "dropped"


def test_what_is_no_job_is_refused_also_if_it_says_when_it_was_entered(office: Office) -> None:
    message_id = new_id()
    assert office.desk.handle({"image": 7}, message_id, entered_at="2026-01-01T00:00:00Z") == "done"
    assert office.ledger.read(message_id).status == "failed"
