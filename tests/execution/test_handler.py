import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import redis

from gradcam_worker.errors import (
    AttemptFenced,
    ImageFetchFailed,
    ImageNotFound,
    LedgerUnavailable,
    StorageUnavailable,
    UnknownJob,
    WorkerUnfit,
)
from gradcam_worker.execution.handler import Disposition, JobHandler, _StageReporter
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.execution.pipeline import Stage
from gradcam_worker.images import fetch
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.runtime import bootstrap
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import RowSearch, RowState, StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores
from gradcam_worker.testing import MemoryLedger, MemoryStore, fake_services

IMAGE = cv2.imencode(".png", np.full((20, 20, 3), (0, 0, 255), np.uint8))[1].tobytes()


@dataclass
class Harness:
    """A handler with doubles around it."""

    images: dict[str, bytes | BaseException] = field(default_factory=lambda: {"s3://in/a.png": IMAGE})
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    store: MemoryStore = field(default_factory=MemoryStore)
    breaker: CircuitBreaker = field(default_factory=lambda: CircuitBreaker(lambda: None))
    one_handler: Any = None
    known: str = ""  # the token of the one backfill that there is; '': all are known

    @property
    def handler(self) -> JobHandler:
        return JobHandler(
            Settings(retry_backoff_s=1),
            self.ledger,
            fake_services(self.images, store=self.store),
            WorkerRef(id="w", device="cpu"),
            LeaseManager(self.ledger, "w", 15),
            self.breaker,
            admits=lambda shard: self.known in {"", shard.token},
        )

    def handle(self, payload: object, message_id: str | None = None, kind: Any = Job) -> Disposition:
        return self.handler.handle(payload, message_id or new_id(), kind=kind)

    def read(self, job: Job) -> StatusDocument:
        return self.ledger.read(job.id)

    def again(self, job: Job) -> Disposition:
        """The pause is over, and the reaper has rung."""
        self.ledger._due[job.id] = 0
        assert self.ledger.requeue(job.id)
        return self.handle(payload(job))


@pytest.fixture
def harness() -> Harness:
    return Harness()


def a_job(**changes: Any) -> Job:
    fields = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
    return Job.parse({**fields, **changes})


def payload(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json")


def test_a_good_job_succeeds_and_its_document_tells_all(harness: Harness) -> None:
    job = a_job(metadata={"batch": "7"})
    assert harness.handle(payload(job)) == Disposition.FINISHED
    document = harness.read(job)
    assert (document.status, document.stage, document.attempt) == ("succeeded", None, 1)
    assert document.predictions[0].name == "red"
    assert document.network is not None
    assert document.network.layer == "blocks"
    assert document.result is not None
    assert document.result.manifest_uri.endswith(f"{job.id}/manifest.json")
    assert document.metrics.keys() >= {"queue_s", "fetch_s", "explain_s", "upload_s"}
    assert document.metadata == {"batch": "7"}


def test_a_message_that_comes_again_is_dropped(harness: Harness) -> None:
    job = a_job()
    harness.handle(payload(job))
    document = harness.read(job)
    assert harness.handle(payload(job)) == Disposition.DROP
    assert harness.read(job) == document


def test_a_permanent_error_fails_the_job_at_once(harness: Harness) -> None:
    job = a_job(image="s3://in/none.png")
    assert harness.handle(payload(job)) == Disposition.FINISHED
    document = harness.read(job)
    assert document.status == "failed"
    assert document.error is not None
    assert (document.error.code, document.error.stage, document.error.attempt) == (
        "image_not_found",
        "fetch",
        1,
    )


class Panic(BaseException):
    """As a library in Rust panics: no Exception."""


class Mute(Exception):
    def __str__(self) -> str:
        raise Panic


@pytest.mark.parametrize(
    "error",
    [Panic("too long"), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), MemoryError("no more"), Mute()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_job_raises_it_ends_with_a_document_and_nothing_of_it_is_held(
    harness: Harness, error: BaseException
) -> None:
    harness.images["s3://in/a.png"] = error
    job, handler = a_job(max_attempts=2), harness.handler
    assert handler.handle(payload(job), new_id()) == Disposition.RETRY
    assert harness.read(job).status == "retrying"
    harness.ledger._due[job.id] = 0
    assert harness.ledger.requeue(job.id)
    assert handler.handle(payload(job), new_id()) == Disposition.FINISHED
    document = harness.read(job)
    assert document.error is not None
    assert (document.status, document.error.code, document.error.stage) == ("failed", "internal", "fetch")
    assert f"Unforeseen {type(error).__name__}" in document.error.detail
    assert not handler.leases.jobs()
    with handler.gate.enter(job.id) as free:
        assert free


def test_a_retryable_error_puts_the_job_back_with_a_growing_pause(harness: Harness) -> None:
    harness.images["s3://in/a.png"] = ImageFetchFailed("HTTP 503")
    job = a_job()
    assert harness.handle(payload(job)) == Disposition.RETRY
    document = harness.read(job)
    assert (document.status, document.error and document.error.code) == ("retrying", "image_fetch_failed")
    pauses = [harness.ledger._due[job.id] - time.time()]
    assert harness.handle(payload(job)) == Disposition.DROP, "its pause is not over"
    assert harness.again(job) == Disposition.RETRY
    pauses.append(harness.ledger._due[job.id] - time.time())
    assert harness.again(job) == Disposition.FINISHED
    assert harness.read(job).status == "failed", "the third attempt was the last"
    assert 0 < pauses[0] <= 1
    assert 0 < pauses[1] <= 2


def test_a_retry_that_succeeds_leaves_no_error(harness: Harness) -> None:
    harness.images["s3://in/a.png"] = ImageFetchFailed("HTTP 503")
    job = a_job()
    harness.handle(payload(job))
    harness.images["s3://in/a.png"] = IMAGE
    assert harness.again(job) == Disposition.FINISHED
    document = harness.read(job)
    assert (document.status, document.attempt, document.error) == ("succeeded", 2, None)


def test_what_nobody_foresaw_is_an_internal_problem_and_is_tried_again(harness: Harness) -> None:
    harness.images["s3://in/a.png"] = RuntimeError("surprise")
    job = a_job(max_attempts=1)
    assert harness.handle(payload(job)) == Disposition.FINISHED
    error = harness.read(job).error
    assert error is not None
    assert (error.code, error.retryable) == ("internal", True)
    assert "RuntimeError: surprise" in error.detail


def test_storage_that_fails_fails_no_more_than_the_attempt(harness: Harness) -> None:
    @dataclass
    class Broken(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            message = "HTTP 503"
            raise StorageUnavailable(message)

    harness.store = Broken()
    job = a_job()
    assert harness.handle(payload(job)) == Disposition.RETRY
    assert harness.read(job).result is None


@pytest.mark.parametrize(
    "message", [None, "garbage", 7, [1], {}, {"image": "x"}, {"id": "../..", "image": 3}]
)
def test_a_message_that_is_no_job_is_written_down_under_its_own_id(harness: Harness, message: object) -> None:
    message_id = new_id()
    assert harness.handle(message, message_id) == Disposition.FINISHED
    document = harness.ledger.read(message_id)
    assert (document.status, document.error and document.error.code) == ("failed", "invalid_job")


def test_a_wrong_job_with_an_id_is_written_down_under_that_id(harness: Harness) -> None:
    job_id = new_id()
    harness.handle({"id": job_id, "network": "vgg16"}, new_id())
    assert harness.ledger.read(job_id).status == "failed"


def test_a_message_id_of_another_kind_still_leads_to_one_document(harness: Harness) -> None:
    assert harness.handle("garbage", "my-own-id") == Disposition.FINISHED
    assert harness.handle("garbage", "my-own-id") == Disposition.FINISHED
    assert len(harness.ledger._entries) == 1


def test_a_stranger_may_leave_out_the_id_and_find_the_job_by_the_message(harness: Harness) -> None:
    message_id = new_id()
    stranger = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
    assert harness.handle(stranger, message_id) == Disposition.FINISHED
    assert harness.ledger.read(message_id).status == "succeeded"


def test_a_strangers_second_job_with_a_taken_key_is_refused_under_its_own_id(harness: Harness) -> None:
    first, second = a_job(idempotency_key="k"), a_job(idempotency_key="k", target={"top_n": 2})
    harness.handle(payload(first))
    assert harness.handle(payload(second)) == Disposition.FINISHED
    error = harness.read(second).error
    assert error is not None
    assert error.code == "idempotency_conflict"
    assert harness.read(first).status == "succeeded"


def test_an_overtaken_attempt_stops_without_a_word(harness: Harness) -> None:
    job = a_job()

    @dataclass
    class Overtaking(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            if harness.read(job).attempt == 1:
                harness.ledger._due[job.id] = 0
                harness.ledger.expire_lease(job.id)
                harness.ledger.claim(harness.read(job), WorkerRef(id="other", device="cpu"))
            return super().put(key, data, media_type)

    harness.store = Overtaking()
    assert harness.handle(payload(job)) == Disposition.DROP
    assert harness.read(job).worker == WorkerRef(id="other", device="cpu")
    assert harness.read(job).status == "running"


def test_a_ledger_out_of_reach_hands_the_message_back(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> bool:
        message = "gone"
        raise LedgerUnavailable(message)

    job = a_job()
    harness.ledger.submit(job)
    monkeypatch.setattr(harness.ledger, "_swap", unreachable)
    with pytest.raises(LedgerUnavailable):
        harness.handle(payload(job))
    monkeypatch.undo()
    assert harness.handle(payload(job)) == Disposition.FINISHED, "and leaves nothing locked"


def test_a_second_message_for_a_running_job_is_dropped_and_changes_nothing(harness: Harness) -> None:
    job = a_job(max_attempts=1)
    ends = []

    @dataclass
    class Meanwhile(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            ends.append(harness.one_handler.handle(payload(job), new_id()))  # by this process
            ends.append(harness.handle(payload(job)))  # by another one
            return super().put(key, data, media_type)

    harness.store = Meanwhile()
    harness.one_handler = harness.handler
    assert harness.one_handler.handle(payload(job), new_id()) == Disposition.FINISHED
    assert set(ends) == {Disposition.DROP}
    assert (harness.read(job).status, harness.read(job).attempt) == ("succeeded", 1)


def test_a_job_that_is_cancelled_while_it_runs_uploads_nothing_more(harness: Harness) -> None:
    job = a_job()

    @dataclass
    class Cancelling(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            harness.ledger.cancel(job.id)
            harness.one_handler.leases.renew()
            return super().put(key, data, media_type)

    harness.store = Cancelling()
    harness.one_handler = harness.handler
    assert harness.one_handler.handle(payload(job), new_id()) == Disposition.FINISHED
    document = harness.read(job)
    assert (document.status, document.error and document.error.code) == ("canceled", "canceled")
    assert document.cancel_requested_at is not None
    assert document.result is None
    assert len(harness.store.objects) == 1, "the one that was on its way"


def test_a_job_that_was_cancelled_in_the_queue_never_starts(harness: Harness) -> None:
    job = a_job()
    harness.ledger.submit(job)
    harness.ledger.cancel(job.id)
    assert harness.handle(payload(job)) == Disposition.DROP
    assert (harness.read(job).status, harness.read(job).attempt) == ("canceled", 0)


def test_a_rerun_that_finds_its_sealed_manifest_only_posts_it(harness: Harness) -> None:
    job, lost = a_job(), WorkerRef(id="lost", device="cpu")
    harness.handle(payload(job))
    sealed, first = dict(harness.store.objects), harness.read(job)
    rerun = MemoryLedger()
    rerun.submit(job)
    harness.ledger = rerun
    rerun.claim(rerun.read(job.id), lost)
    rerun._due[job.id] = 0
    rerun.expire_lease(job.id)  # it died between the manifest and its last word
    harness.store.objects = Untouched(sealed)
    assert harness.handle(payload(job)) == Disposition.FINISHED
    second = harness.read(job)
    assert (second.status, second.attempt) == ("succeeded", 2)
    assert second.result == first.result
    assert second.predictions == first.predictions
    assert second.network == first.network
    assert second.warnings == first.warnings


@pytest.mark.parametrize("same_uri", [True, False], ids=["other bytes", "another image"])
def test_a_manifest_of_before_is_never_posted_as_the_result_of_another_job_of_its_id(
    harness: Harness, same_uri: bool
) -> None:
    first = a_job()
    harness.handle(payload(first))
    stale = harness.read(first)
    harness.ledger = MemoryLedger()  # it has forgotten the job: its time there has passed, or it was flushed
    uri = first.image.uri if same_uri else "s3://in/other.png"
    harness.images[uri] = cv2.imencode(".png", np.full((32, 32, 3), (255, 0, 0), np.uint8))[1].tobytes()
    second = Job.parse({**payload(first), "image": uri})
    harness.ledger.submit(second)
    harness.ledger.claim(harness.ledger.read(second.id), WorkerRef(id="lost", device="cpu"))
    harness.ledger._due[second.id] = 0
    harness.ledger.expire_lease(second.id)
    assert harness.handle(payload(second)) == Disposition.FINISHED
    found = harness.read(second)
    assert (found.status, found.attempt) == ("succeeded", 2)
    assert found.result != stale.result
    assert found.predictions[0].name == "blue" != stale.predictions[0].name


class Untouched(dict[str, bytes]):
    def __setitem__(self, key: str, value: bytes) -> None:
        raise AssertionError(key)


def test_a_worker_whose_storage_is_down_takes_no_job(harness: Harness) -> None:
    job = a_job()
    for _ in range(10):
        harness.breaker.failed(StorageUnavailable("HTTP 503"))
    with pytest.raises(WorkerUnfit, match="503"):
        harness.handle(payload(job))
    with pytest.raises(UnknownJob):
        harness.read(job)


def test_a_worker_without_keys_for_s3_charges_no_job_and_finishes_them_when_it_has_keys(
    http_server: Any, answer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / "token"
    token.write_text("planted")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/gradcam")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://{http_server.host}")
    monkeypatch.setattr("gradcam_worker.storage.credentials.RETRY_AFTER_S", 0)
    settings = Settings(s3_endpoint_url=f"http://{http_server.host}", output=tmp_path.as_uri())
    s3, harness = S3(settings), Harness()
    stores = Stores(settings, s3)
    harness.breaker = breaker = CircuitBreaker(partial(bootstrap.use_storage, stores))
    around = replace(fake_services({}), images=fetch.UriFetcher(settings, s3), stores=stores)
    worker, leases = WorkerRef(id="w", device="cpu"), LeaseManager(harness.ledger, "w", 15)
    handler = JobHandler(Settings(retry_backoff_s=1e-6), harness.ledger, around, worker, leases, breaker)
    jobs = [a_job(image="s3://photos/a.png") for _ in range(4)]
    refusal = b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>No</Message></Error></ErrorResponse>"
    http_server.url("/", answer(403, refusal))
    http_server.url("/photos/a.png", answer(200, IMAGE))
    assert [handler.handle(payload(job), job.id) for job in jobs[:3]] == [Disposition.RETRY] * 3
    with pytest.raises(WorkerUnfit, match=r"AssumeRoleWithWebIdentity.*AccessDenied"):
        handler.handle(payload(jobs[3]), jobs[3].id)
    breaker.probe()
    assert harness.breaker.open_reason, "a folder can be written, and images cannot be read"
    http_server.url("/", answer(200, GIVEN))
    breaker.probe()
    assert not breaker.open_reason
    for job in jobs:
        harness.ledger._due[job.id] = 0
        harness.ledger.requeue(job.id)
        assert handler.handle(payload(job), job.id) == Disposition.FINISHED
        assert harness.read(job).status == "succeeded"


GIVEN = b"""<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>
<SessionToken>t</SessionToken><SecretAccessKey>s</SecretAccessKey><Expiration>2999-01-01T00:00:00Z</Expiration>
<AccessKeyId>A</AccessKeyId></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


def test_what_runs_is_handed_back_when_the_worker_has_to_stop(harness: Harness) -> None:
    job = a_job(max_attempts=1)
    handed: list[str] = []

    @dataclass
    class Stopping(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            handed.extend(harness.one_handler.requeue_unfinished())
            return super().put(key, data, media_type)

    harness.store = Stopping()
    harness.one_handler = harness.handler
    assert harness.one_handler.handle(payload(job), new_id()) == Disposition.DROP
    assert handed == [job.id]
    assert harness.read(job).status == "queued"
    harness.store = MemoryStore()
    assert harness.handle(payload(job)) == Disposition.FINISHED
    assert (harness.read(job).status, harness.read(job).attempt) == ("succeeded", 2)


@pytest.mark.parametrize(
    "job_id",
    [5, "x", "01A2062B-306E-7164-A139-13398DA125F6", "01a2062b-306e-7164-a139-13398da125f6\n", "\ud800"],
)
def test_a_wrong_id_is_refused_and_not_replaced_in_silence(harness: Harness, job_id: object) -> None:
    message_id = new_id()
    assert harness.handle({**payload(a_job()), "id": job_id}, message_id) == Disposition.FINISHED
    error = harness.ledger.read(message_id).error
    assert error is not None
    assert error.code == "invalid_job"
    assert "id: " in error.detail


def test_a_strangers_second_message_with_the_same_key_runs_the_first_job(harness: Harness) -> None:
    first, second = a_job(idempotency_key="k"), a_job(idempotency_key="k")
    harness.ledger.submit(first)
    assert harness.handle(payload(second)) == Disposition.FINISHED
    assert harness.read(first).status == "succeeded"
    assert {key.partition("/")[0] for key in harness.store.objects} == {first.id}


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
    harness: Harness, settings: Settings, monkeypatch: pytest.MonkeyPatch, entered_at: Any, questions: int
) -> None:
    ledger = RedisLedger(settings)
    harness.ledger = ledger  # type: ignore[assignment]
    job = a_job()
    entered = ledger.submit(job)
    moment = {"as it was": entered.created_at.isoformat(), "never": None}.get(str(entered_at), entered_at)
    harness.handle(payload(a_job()))  # the scripts and the connection are there
    asked: list[object] = []
    execute: Any = redis.Redis.execute_command

    def counted(self: Any, *command: Any, **options: Any) -> Any:
        asked.append(command)
        return execute(self, *command, **options)

    monkeypatch.setattr(redis.Redis, "execute_command", counted)
    assert harness.handler.handle(payload(job), job.id, entered_at=moment) == Disposition.FINISHED
    document = ledger.read(job.id)
    assert (document.status, document.attempt, document.revision) == ("succeeded", 1, 3)
    assert len(asked) == questions


def test_what_is_no_job_is_refused_also_if_it_says_when_it_was_entered(harness: Harness) -> None:
    message_id = new_id()
    assert (
        harness.handler.handle({"image": 7}, message_id, entered_at="2026-01-01T00:00:00Z")
        == Disposition.FINISHED
    )
    assert harness.ledger.read(message_id).status == "failed"


def test_a_stage_that_begins_right_after_another_is_told_while_it_lasts(harness: Harness) -> None:
    job = a_job()
    seen: list[str | None] = []

    @dataclass
    class Waiting(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            end = time.monotonic() + 30
            while harness.read(job).stage != "upload" and time.monotonic() < end:
                time.sleep(0.01)
            seen.append(harness.read(job).stage)
            return super().put(key, data, media_type)

    harness.store = Waiting()
    handler = harness.handler
    handler.leases.loop.start()
    try:
        assert handler.handle(payload(job), job.id) == Disposition.FINISHED
    finally:
        assert handler.leases.loop.stop(30)
    assert {*seen} == {"upload"}
    assert harness.read(job).status == "succeeded"


class TestProgress:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr("gradcam_worker.execution.handler.time.monotonic", lambda: now[0])
        return now

    @pytest.fixture
    def progress(self, harness: Harness, clock: list[float]) -> _StageReporter:
        del clock
        claim = harness.ledger.claim(harness.ledger.submit(a_job()), WorkerRef(id="w", device="cpu"))
        return _StageReporter(harness.ledger, claim.document, lambda: None)

    def stage(self, harness: Harness, progress: _StageReporter) -> tuple[str | None, int]:
        document = harness.ledger.read(progress._document.id)
        return document.stage, document.revision

    def test_the_last_of_many_stages_is_written_once_when_its_half_second_is_over(
        self, harness: Harness, progress: _StageReporter, clock: list[float]
    ) -> None:
        before = self.stage(harness, progress)
        for stage in ("fetch", "decode", "load"):
            clock[0] += 0.1
            progress(Stage(stage))
            progress.write_pending()
        assert self.stage(harness, progress) == before, "what passes fast costs no round trip"
        clock[0] += 0.25
        for _ in range(3):
            progress.write_pending()
        assert self.stage(harness, progress) == ("load", before[1] + 1)
        clock[0] += 0.1
        progress(Stage("explain"))
        clock[0] += 0.5
        progress(Stage("render"))
        assert self.stage(harness, progress) == ("render", before[1] + 2)

    def test_a_checkpoint_is_not_written_over_by_a_stage_that_began_before(
        self, harness: Harness, progress: _StageReporter, clock: list[float]
    ) -> None:
        progress(Stage("explain"))
        progress.checkpoint(Stage("row 4"))
        clock[0] += 1
        progress.write_pending()
        assert self.stage(harness, progress)[0] == "row 4"

    def test_nothing_is_written_after_the_end_or_while_the_job_writes(
        self, harness: Harness, progress: _StageReporter, clock: list[float]
    ) -> None:
        before = self.stage(harness, progress)
        progress(Stage("fetch"))
        clock[0] += 1
        with progress._lock:
            progress.write_pending()
        progress.close()
        progress.write_pending()
        progress(Stage("decode"))
        assert self.stage(harness, progress) == before

    def test_an_attempt_that_was_overtaken_hears_it_by_its_lease(
        self, harness: Harness, progress: _StageReporter, clock: list[float]
    ) -> None:
        harness.ledger.requeue_unfinished(progress._document.id, 1)
        progress(Stage("fetch"))
        clock[0] += 1
        progress.write_pending()
        assert self.stage(harness, progress)[0] is None


def a_shard(count: int = 6, **changes: Any) -> Shard:
    fields = {
        "backfill": new_id(),
        "index": 0,
        "key": "00000000-0123456789abcdef",
        "first": 0,
        "rows": [{"uri": f"s3://in/{place}.png"} for place in range(count)],
        "network": "efficientnet_lite0",
        "target": {"top_n": 1},
        "output": "s3://out",
    }
    return Shard.model_validate({**fields, **changes})


class Images(dict[str, bytes | BaseException]):
    """The same picture everywhere, but for what happens at some addresses."""

    def __init__(self, **happens: Callable[[], object]) -> None:
        super().__init__()
        self.happens = happens

    def get(self, key: str, default: Any = None) -> Any:
        found = self.happens.get(key.removeprefix("s3://in/").removesuffix(".png"), lambda: None)()
        return found or IMAGE


class Died(AttemptFenced):
    """The end of a process: ends a shard at once, whichever row meets it, and writes nothing."""


def forget_rows(ledger: MemoryLedger, job_id: str) -> None:
    """As a reaper of an earlier version does, which writes the document without what it does not know."""
    entry = ledger._entries[job_id]
    document = entry.document.model_copy(update={"rows": None})
    ledger._entries[job_id] = replace(entry, document=document)


class TestShards:
    def hand_in(self, harness: Harness, shard: Shard) -> Disposition:
        """As whoever runs a backfill does."""
        harness.ledger.submit(shard)
        return harness.handle({"id": shard.id}, kind=Shard)

    def test_a_shard_succeeds_and_its_document_counts_its_rows(self, harness: Harness) -> None:
        harness.images = Images(**{"2": lambda: ImageNotFound("There is nothing.")})
        shard = a_shard()
        assert self.hand_in(harness, shard) == Disposition.FINISHED
        document = harness.ledger.read(shard.id)
        assert (document.status, document.error, document.predictions) == ("succeeded", None, ())
        counts = {name: document.metrics[name] for name in ("rows", "failed", "failed_image_not_found")}
        assert counts == {"rows": 6, "failed": 1, "failed_image_not_found": 1}
        assert document.metrics["images_per_s"] > 0
        assert document.result
        assert document.result.manifest_uri == f"memory://data/{shard.key}.parquet"
        assert document.network
        assert (document.network.name, document.network.layer) == ("efficientnet_lite0", "blocks")
        assert document.metadata == {"backfill": shard.backfill, "shard": "0"}
        assert harness.handle({"id": shard.id}, kind=Shard) == Disposition.DROP

    @pytest.mark.parametrize("old_reaper", [False, True])
    def test_a_shard_under_which_processes_die_is_done_without_the_row_that_kills_them(
        self, harness: Harness, old_reaper: bool
    ) -> None:
        def die() -> None:
            raise Died

        harness.images, shard = Images(**{"4": die}), a_shard()
        harness.ledger.submit(shard)
        stages, searches = [], []
        for _ in range(3):
            assert harness.handle({"id": shard.id}, kind=Shard) == Disposition.DROP
            stages.append(harness.ledger.read(shard.id).stage)
            harness.ledger._due[shard.id] = 0
            assert harness.ledger.expire_lease(shard.id) == "shard"
            rows = harness.ledger.read(shard.id).rows
            searches.append(rows and rows.search)
            if old_reaper:
                forget_rows(harness.ledger, shard.id)
        assert stages == ["fetch", "rows 4 to 4", "row 4"]
        assert searches == [None, RowSearch(group=(4, 4)), RowSearch(row=4)]
        assert harness.handle({"id": shard.id}, kind=Shard) == Disposition.FINISHED
        document = harness.ledger.read(shard.id)
        assert (document.status, document.attempt) == ("succeeded", 4)
        assert document.metrics["failed_worker_lost"] == document.metrics["failed"] == 1
        assert document.rows == RowState(failed={"worker_lost": 1})
        assert b'"row": 4' in harness.store.objects[f"failed/{shard.key}.jsonl"]

    def test_a_shard_that_is_handed_back_runs_again_and_leaves_the_same(self, harness: Harness) -> None:
        shard = a_shard()
        harness.images = Images(**{"3": lambda: harness.one_handler.requeue_unfinished() and None})
        harness.ledger.submit(shard)
        for attempt in (1, 2):
            harness.one_handler = harness.handler
            assert harness.one_handler.handle({"id": shard.id}, new_id(), kind=Shard) == Disposition.DROP
            document = harness.ledger.read(shard.id)
            assert (document.status, document.attempt, document.error) == ("queued", attempt, None)
            assert not harness.store.objects
        harness.images = Images()
        assert harness.handle({"id": shard.id}, kind=Shard) == Disposition.FINISHED
        left = dict(harness.store.objects)
        other = Harness(Images())
        self.hand_in(other, shard.model_copy(update={"id": new_id()}))
        assert other.store.objects == left

    def test_a_shard_whose_images_cannot_be_had_waits_and_on_its_last_attempt_says_which(
        self, harness: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gradcam_worker.execution.shards.RETRY_ROWS_AFTER_S", 0)
        down = {str(place): lambda: ImageFetchFailed("HTTP 503") for place in range(4)}
        harness.images, shard = Images(**down), a_shard(max_attempts=2)
        assert self.hand_in(harness, shard) == Disposition.RETRY
        document = harness.ledger.read(shard.id)
        assert (document.status, document.error and document.error.code) == ("retrying", "image_fetch_failed")
        harness.ledger._due[shard.id] = 0
        assert harness.ledger.requeue(shard.id) == "shard"
        assert harness.handle({"id": shard.id}, kind=Shard) == Disposition.FINISHED
        document = harness.ledger.read(shard.id)
        assert (document.status, document.metrics["failed_image_fetch_failed"]) == ("succeeded", 4)

    def test_a_shard_that_is_cancelled_while_it_runs_leaves_nothing(self, harness: Harness) -> None:
        shard = a_shard()

        def cancel() -> None:
            harness.ledger.cancel(shard.id)
            harness.one_handler.leases.renew()

        harness.images = Images(**{"1": cancel})
        harness.one_handler = harness.handler
        harness.ledger.submit(shard)
        assert harness.one_handler.handle({"id": shard.id}, new_id(), kind=Shard) == Disposition.FINISHED
        document = harness.ledger.read(shard.id)
        assert (document.status, document.error and document.error.code) == ("canceled", "canceled")
        assert not harness.store.objects

    def test_a_shard_among_jobs_is_refused_and_runs_nothing(self, harness: Harness) -> None:
        shard, harness.known = a_shard(token="t"), "t"
        assert harness.handle(json.loads(shard.to_json()), shard.id) == Disposition.FINISHED
        problem = harness.ledger.read(shard.id).error
        assert problem is not None
        assert (problem.code, problem.detail) == (
            "invalid_job",
            "This is a shard, and among jobs none is taken: only `gradcam backfill` submits shards.",
        )
        assert not harness.store.objects

    def test_a_job_among_shards_is_refused(self, harness: Harness) -> None:
        job = a_job()
        assert harness.handle(payload(job), kind=Shard) == Disposition.FINISHED
        problem = harness.read(job).error
        assert problem is not None
        assert problem.code == "invalid_job"
        assert "send jobs to gradcam.interactive" in problem.detail

    def test_a_message_that_names_what_the_other_queue_is_for_is_dropped_and_harms_nothing(
        self, harness: Harness
    ) -> None:
        job, shard, harness.known = a_job(), a_shard(token="t"), "t"
        harness.ledger.submit(job)
        harness.ledger.submit(shard)
        assert harness.handle({"id": shard.id}) == Disposition.DROP
        assert harness.handle({"id": job.id}, kind=Shard) == Disposition.DROP
        for one in (job, shard):
            assert harness.handle({"id": one.id}, kind=type(one)) == Disposition.FINISHED
            assert harness.ledger.read(one.id).status == "succeeded"

    @pytest.mark.parametrize("token", ["", "guessed", "T"])
    def test_a_forged_shard_is_refused_whether_or_not_it_got_into_the_ledger(
        self, harness: Harness, token: str
    ) -> None:
        harness.known = "t"
        sent, entered = a_shard(token=token, keep=True), a_shard(token=token, keep=True)
        harness.ledger.submit(entered)
        assert harness.handle(json.loads(sent.to_json()), sent.id, kind=Shard) == Disposition.FINISHED
        assert harness.handle({"id": entered.id}, kind=Shard) == Disposition.FINISHED
        for one in (sent, entered):
            document = harness.ledger.read(one.id)
            assert (document.status, document.error and document.error.code) == ("failed", "unknown_backfill")
            assert document.error
            assert not token or token not in document.error.detail.split()
        assert not harness.store.objects

    def test_a_shard_in_a_message_has_to_show_a_token_also_where_the_backfill_has_none(
        self, harness: Harness
    ) -> None:
        """As those have none that an older version submits: into the ledger, where no stranger may write."""
        sent = a_shard()
        assert harness.handle(json.loads(sent.to_json()), sent.id, kind=Shard) == Disposition.FINISHED
        assert harness.ledger.read(sent.id).status == "failed"

    def test_a_shard_that_is_run_already_is_not_ended_by_a_backfill_that_is_forgotten(
        self, harness: Harness
    ) -> None:
        shard = a_shard(token="t")

        def forget() -> None:
            harness.known = "another"
            assert harness.handle({"id": shard.id}, kind=Shard) == Disposition.DROP

        harness.images = Images(**{"1": forget})
        assert self.hand_in(harness, shard) == Disposition.FINISHED
        assert harness.ledger.read(shard.id).status == "succeeded"
