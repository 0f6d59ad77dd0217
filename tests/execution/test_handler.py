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
from redis.client import Pipeline

from gradcam_worker.errors import (
    AttemptFenced,
    DeviceOccupied,
    GradcamError,
    ImageFetchFailed,
    ImageNotFound,
    JobTimeout,
    LedgerUnavailable,
    OutputNotAllowed,
    StorageUnavailable,
    UnknownJob,
    WeightsUnavailable,
    WorkerUnfit,
)
from gradcam_worker.execution.attempt import Progress
from gradcam_worker.execution.handler import Disposition, JobHandler, _ProgressWriter
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.images import fetch
from gradcam_worker.ledger.ledger import Tenant, device_s_of
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.resilience.server_activity import ServerActivity
from gradcam_worker.runtime.processes import bootstrap
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
    fixed_handler: Any = None  # a handler that a test uses for several messages
    known_token: str = ""  # of the only registered backfill; '': all backfills are registered

    @property
    def handler(self) -> JobHandler:
        return JobHandler(
            Settings(retry_backoff_s=1),
            self.ledger,
            fake_services(self.images, store=self.store),
            WorkerRef(id="w", device="cpu"),
            LeaseManager(self.ledger, "w", 15),
            self.breaker,
            admits=lambda shard: self.known_token in {"", shard.token},
        )

    def handle(self, payload: object, message_id: str | None = None, kind: Any = Job) -> Disposition:
        return self.handler.handle(payload, message_id or new_id(), kind=kind)

    def read(self, job: Job) -> StatusDocument:
        return self.ledger.read(job.id)

    def handle_retry(self, job: Job) -> Disposition:
        """Requeue a job as the reaper does when its backoff is over, and handle its message."""
        self.ledger._due[job.id] = 0
        assert self.ledger.requeue(job.id)
        return self.handle(payload(job))


@pytest.fixture
def harness() -> Harness:
    return Harness()


def make_job(**changes: Any) -> Job:
    fields = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
    return Job.parse({**fields, **changes})


def payload(job: Job) -> dict[str, Any]:
    return job.model_dump(mode="json")


def test_a_job_succeeds_and_its_document_holds_the_result(harness: Harness) -> None:
    job = make_job(metadata={"batch": "7"})
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


def test_a_message_that_is_delivered_again_is_dropped(harness: Harness) -> None:
    job = make_job()
    harness.handle(payload(job))
    document = harness.read(job)
    assert harness.handle(payload(job)) == Disposition.DROP
    assert harness.read(job) == document


@pytest.mark.parametrize("entered_at", [True, False], ids=["fresh", "read"])
def test_where_several_tenants_wait_a_message_is_used_for_the_job_whose_turn_it_is(
    harness: Harness, entered_at: bool
) -> None:
    jobs = [make_job() for _ in range(6)]
    documents = [harness.ledger.submit(job, tenant=Tenant("acme")) for job in jobs[:5]]
    documents += [harness.ledger.submit(jobs[5], tenant=Tenant("other"))]
    ran = list[int]()
    for job, document in zip(jobs, documents, strict=True):
        moment = document.created_at.isoformat() if entered_at else None
        assert harness.handler.handle(payload(job), job.id, entered_at=moment) == Disposition.FINISHED
        ran += [n for n, one in enumerate(jobs) if n not in ran and harness.read(one).final]
    assert ran == [0, 5, 1, 2, 3, 4], "the second message was used for the other's job"
    assert [harness.read(one).attempt for one in jobs] == [1] * 6
    assert harness.ledger.read_usage("acme", 1)[0].jobs == 5


def test_a_message_whose_job_has_ended_is_used_for_the_next_turn(harness: Harness) -> None:
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        harness.ledger.submit(job, tenant=Tenant("acme"))
    harness.ledger.cancel(jobs[0].id)
    assert harness.handle({"id": jobs[0].id}) == Disposition.FINISHED
    assert harness.handle(payload(jobs[2])) == Disposition.FINISHED
    assert [harness.read(job).status for job in jobs] == ["canceled", "succeeded", "succeeded"]
    assert harness.handle(payload(jobs[1])) == Disposition.DROP


def test_a_job_that_this_version_cannot_read_does_not_keep_its_tenants_turn(harness: Harness) -> None:
    strange, other = make_job(), make_job()
    harness.ledger.submit(strange, tenant=Tenant("acme"))
    harness.ledger.submit(make_job(), tenant=Tenant("other"))
    entry = harness.ledger._entries[strange.id]
    harness.ledger._entries[strange.id] = replace(entry, job='{"schema": "gradcam.job/v9"}')
    harness.ledger.submit(other, tenant=Tenant("other"))
    assert harness.handle(payload(other)) == Disposition.FINISHED
    assert harness.read(strange).status == "failed"
    assert harness.handle(payload(strange)) == Disposition.FINISHED
    assert harness.read(other).status == "queued"


def test_a_permanent_error_fails_the_job_at_once(harness: Harness) -> None:
    job = make_job(image="s3://in/none.png")
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
    """A panic of a Rust library, which is not an Exception."""


class Mute(Exception):
    def __str__(self) -> str:
        raise Panic


@pytest.mark.parametrize(
    "error",
    [Panic("too long"), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), MemoryError("no more"), Mute()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_job_raises_it_gets_a_final_state_and_its_lease_is_released(
    harness: Harness, error: BaseException
) -> None:
    harness.images["s3://in/a.png"] = error
    job, handler = make_job(max_attempts=2), harness.handler
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


def test_only_a_jobs_own_passes_count_as_its_use_of_the_device(harness: Harness) -> None:
    class FullStore(MemoryStore):
        def put_many(self, *_: Any, **__: Any) -> list[str]:
            raise OutputNotAllowed

    unexplained, unstored = make_job(method={"layer": "no such"}), make_job(metrics=["deletion"])
    harness.handle(payload(unexplained))
    harness.store = FullStore()
    harness.handle(payload(unstored))
    waited, computed = harness.read(unexplained), harness.read(unstored)
    assert (waited.error and waited.error.stage, waited.metrics["device_s"]) == ("explain", 0)
    assert computed.error
    assert (computed.error.stage, device_s_of(computed)) == ("upload", computed.metrics["device_s"])
    stages_s = computed.metrics["explain_s"] + computed.metrics["measure_s"]
    assert 0 < device_s_of(computed) < stages_s


def test_no_attempt_counts_while_others_have_the_devices_memory_for_a_bounded_time(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.execution.handler.OCCUPIED_ATTEMPTS", 4)
    harness.images["s3://in/a.png"] = DeviceOccupied("23.8 GiB are elsewhere")
    job = make_job(max_attempts=2)
    assert harness.handle(payload(job)) == Disposition.RETRY
    assert [harness.handle_retry(job) for _ in range(2)] == [Disposition.RETRY] * 2
    document = harness.read(job)
    assert (document.status, document.error and document.error.code) == ("retrying", "device_occupied")
    assert (document.attempt, document.max_attempts) == (3, 5)
    assert [harness.handle_retry(job) for _ in range(3)] == [Disposition.RETRY] * 2 + [Disposition.FINISHED]
    document = harness.read(job)
    assert (document.status, document.attempt, document.uncounted_attempts) == ("failed", 6, 4)
    harness.ledger.retry(job.id)
    assert harness.handle(payload(job)) == Disposition.RETRY
    assert [harness.handle_retry(job) for _ in range(5)] == [Disposition.RETRY] * 4 + [Disposition.FINISHED]
    assert harness.read(job).attempt == 12, "a replayed job has the same allowance"


def test_a_retryable_error_schedules_a_retry_with_a_growing_backoff(harness: Harness) -> None:
    harness.images["s3://in/a.png"] = ImageFetchFailed("HTTP 503")
    job = make_job()
    assert harness.handle(payload(job)) == Disposition.RETRY
    document = harness.read(job)
    assert (document.status, document.error and document.error.code) == ("retrying", "image_fetch_failed")
    pauses = [harness.ledger._due[job.id] - time.time()]
    assert harness.handle(payload(job)) == Disposition.DROP, "its backoff is not over"
    assert harness.handle_retry(job) == Disposition.RETRY
    pauses.append(harness.ledger._due[job.id] - time.time())
    assert harness.handle_retry(job) == Disposition.FINISHED
    assert harness.read(job).status == "failed", "the third attempt was the last"
    assert 0 < pauses[0] <= 1
    assert 0 < pauses[1] <= 2


def test_a_retry_that_succeeds_leaves_no_error(harness: Harness) -> None:
    harness.images["s3://in/a.png"] = ImageFetchFailed("HTTP 503")
    job = make_job()
    harness.handle(payload(job))
    harness.images["s3://in/a.png"] = IMAGE
    assert harness.handle_retry(job) == Disposition.FINISHED
    document = harness.read(job)
    assert (document.status, document.attempt, document.error) == ("succeeded", 2, None)


def test_an_unexpected_error_is_an_internal_problem_and_is_retryable(harness: Harness) -> None:
    harness.images["s3://in/a.png"] = RuntimeError("surprise")
    job = make_job(max_attempts=1)
    assert harness.handle(payload(job)) == Disposition.FINISHED
    error = harness.read(job).error
    assert error is not None
    assert (error.code, error.retryable) == ("internal", True)
    assert "RuntimeError: surprise" in error.detail


def test_a_storage_error_fails_the_attempt_only(harness: Harness) -> None:
    @dataclass
    class Broken(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            message = "HTTP 503"
            raise StorageUnavailable(message)

    harness.store = Broken()
    job = make_job()
    assert harness.handle(payload(job)) == Disposition.RETRY
    assert harness.read(job).result is None


@pytest.mark.parametrize(
    "message", [None, "garbage", 7, [1], {}, {"image": "x"}, {"id": "../..", "image": 3}]
)
def test_an_invalid_message_becomes_a_failed_job_under_the_message_id(
    harness: Harness, message: object
) -> None:
    message_id = new_id()
    assert harness.handle(message, message_id) == Disposition.FINISHED
    document = harness.ledger.read(message_id)
    assert (document.status, document.error and document.error.code) == ("failed", "invalid_job")


def test_an_invalid_job_with_an_id_becomes_a_failed_job_under_that_id(harness: Harness) -> None:
    job_id = new_id()
    harness.handle({"id": job_id, "network": "vgg16"}, new_id())
    assert harness.ledger.read(job_id).status == "failed"


def test_a_message_id_that_is_not_a_job_id_leads_to_one_document(harness: Harness) -> None:
    assert harness.handle("garbage", "my-own-id") == Disposition.FINISHED
    assert harness.handle("garbage", "my-own-id") == Disposition.FINISHED
    assert len(harness.ledger._entries) == 1


def test_a_job_without_an_id_gets_the_message_id(harness: Harness) -> None:
    message_id = new_id()
    job_without_id = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
    assert harness.handle(job_without_id, message_id) == Disposition.FINISHED
    assert harness.ledger.read(message_id).status == "succeeded"


def test_a_different_job_with_a_used_idempotency_key_is_refused_under_its_own_id(harness: Harness) -> None:
    first, second = make_job(idempotency_key="k"), make_job(idempotency_key="k", target={"top_n": 2})
    harness.handle(payload(first))
    assert harness.handle(payload(second)) == Disposition.FINISHED
    error = harness.read(second).error
    assert error is not None
    assert error.code == "idempotency_conflict"
    assert harness.read(first).status == "succeeded"


def test_a_fenced_attempt_stops_and_writes_nothing(harness: Harness) -> None:
    job = make_job()

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


def test_if_the_ledger_cannot_be_reached_the_message_is_requeued(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> bool:
        message = "gone"
        raise LedgerUnavailable(message)

    job = make_job()
    harness.ledger.submit(job)
    monkeypatch.setattr(harness.ledger, "_claim_in_turn", unreachable)
    with pytest.raises(LedgerUnavailable):
        harness.handle(payload(job))
    monkeypatch.undo()
    assert harness.handle(payload(job)) == Disposition.FINISHED, "nothing was left locked"


def test_a_second_message_for_a_running_job_is_dropped_and_changes_nothing(harness: Harness) -> None:
    job = make_job(max_attempts=1)
    dispositions = []

    @dataclass
    class Meanwhile(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            dispositions.append(harness.fixed_handler.handle(payload(job), new_id()))  # by this process
            dispositions.append(harness.handle(payload(job)))  # by another one
            return super().put(key, data, media_type)

    harness.store = Meanwhile()
    harness.fixed_handler = harness.handler
    assert harness.fixed_handler.handle(payload(job), new_id()) == Disposition.FINISHED
    assert set(dispositions) == {Disposition.DROP}
    assert (harness.read(job).status, harness.read(job).attempt) == ("succeeded", 1)


def test_a_job_that_is_cancelled_while_it_runs_uploads_nothing_more(harness: Harness) -> None:
    job = make_job()

    @dataclass
    class Cancelling(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            harness.ledger.cancel(job.id)
            harness.fixed_handler.leases.renew()
            return super().put(key, data, media_type)

    harness.store = Cancelling()
    harness.fixed_handler = harness.handler
    assert harness.fixed_handler.handle(payload(job), new_id()) == Disposition.FINISHED
    document = harness.read(job)
    assert (document.status, document.error and document.error.code) == ("canceled", "canceled")
    assert document.cancel_requested_at is not None
    assert document.result is None
    assert len(harness.store.objects) == 1, "the one whose upload was in progress"


def test_a_job_that_was_cancelled_in_the_queue_never_starts(harness: Harness) -> None:
    job = make_job()
    harness.ledger.submit(job)
    harness.ledger.cancel(job.id)
    assert harness.handle(payload(job)) == Disposition.DROP
    assert (harness.read(job).status, harness.read(job).attempt) == ("canceled", 0)


def test_an_attempt_that_finds_the_manifest_of_an_earlier_one_only_writes_the_final_state(
    harness: Harness,
) -> None:
    job, lost = make_job(), WorkerRef(id="lost", device="cpu")
    harness.handle(payload(job))
    objects, first = dict(harness.store.objects), harness.read(job)
    ledger = MemoryLedger()
    ledger.submit(job)
    harness.ledger = ledger
    ledger.claim(ledger.read(job.id), lost)
    ledger._due[job.id] = 0
    ledger.expire_lease(job.id)  # the worker died between the manifest and the final state
    harness.store.objects = ReadOnly(objects)
    assert harness.handle(payload(job)) == Disposition.FINISHED
    second = harness.read(job)
    assert (second.status, second.attempt) == ("succeeded", 2)
    assert second.result == first.result
    assert second.predictions == first.predictions
    assert second.network == first.network
    assert second.warnings == first.warnings


@pytest.mark.parametrize("same_uri", [True, False], ids=["other bytes", "another image"])
def test_the_manifest_of_an_earlier_job_is_never_the_result_of_a_different_job_with_the_same_id(
    harness: Harness, same_uri: bool
) -> None:
    first = make_job()
    harness.handle(payload(first))
    stale = harness.read(first)
    harness.ledger = MemoryLedger()  # without the job: its document expired, or Redis was flushed
    uri = first.image.uri if same_uri else "s3://in/other.png"
    harness.images[uri] = cv2.imencode(".png", np.full((32, 32, 3), (255, 0, 0), np.uint8))[1].tobytes()
    second = Job.parse({**payload(first), "image": uri})
    harness.ledger.submit(second)
    harness.ledger.claim(harness.ledger.read(second.id), WorkerRef(id="lost", device="cpu"))
    harness.ledger._due[second.id] = 0
    harness.ledger.expire_lease(second.id)
    assert harness.handle(payload(second)) == Disposition.FINISHED
    document = harness.read(second)
    assert (document.status, document.attempt) == ("succeeded", 2)
    assert document.result != stale.result
    assert document.predictions[0].name == "blue" != stale.predictions[0].name


class ReadOnly(dict[str, bytes]):
    def __setitem__(self, key: str, value: bytes) -> None:
        raise AssertionError(key)


def test_a_worker_whose_storage_is_down_runs_no_job(harness: Harness) -> None:
    job = make_job()
    harness.breaker = CircuitBreaker(fails("HTTP 503"))
    harness.breaker.probe()
    with pytest.raises(WorkerUnfit, match="503"):
        harness.handle(payload(job))
    with pytest.raises(UnknownJob):
        harness.read(job)


def fails(why: str) -> Callable[[], object]:
    """A probe of a storage that is down."""

    def probe() -> None:
        raise StorageUnavailable(why)

    return probe


def unanswered(seconds: float) -> ServerActivity:
    """Requests that have had no answer for so long."""
    activity = ServerActivity()
    activity._since_s = time.monotonic() - seconds
    return activity


@pytest.mark.parametrize("kind", [ImageFetchFailed, JobTimeout, StorageUnavailable, WeightsUnavailable])
def test_while_the_storage_is_down_no_attempt_counts_whatever_a_job_ends_with(
    harness: Harness, kind: type[GradcamError]
) -> None:
    job = make_job(max_attempts=1)
    harness.images["s3://in/a.png"] = kind("no answer")
    harness.breaker = CircuitBreaker(fails("HTTP 503"), activities=[unanswered(3)])
    with pytest.raises(WorkerUnfit, match="no answer"):
        harness.handle(payload(job))
    assert harness.breaker.open_reason, "at once, not after the next job"
    document = harness.read(job)
    assert (document.status, document.attempt, document.max_attempts) == ("queued", 1, 2)
    harness.images["s3://in/a.png"] = IMAGE
    harness.breaker.succeeded()
    assert harness.handle({"id": job.id}, job.id) == Disposition.FINISHED
    assert harness.read(job).status == "succeeded"


def test_an_error_counts_where_the_storage_works_or_is_not_concerned(harness: Harness) -> None:
    harness.images["s3://in/a.png"] = StorageUnavailable("no proxy lets it through")
    assert harness.handle(payload(make_job())) == Disposition.RETRY
    harness.images["s3://in/a.png"] = ImageFetchFailed("a host of the web does not answer")
    probed: list[int] = []
    harness.breaker = CircuitBreaker(lambda: probed.append(1), activities=[ServerActivity()])
    assert harness.handle(payload(make_job())) == Disposition.RETRY
    assert not probed


def test_a_cancelled_job_is_not_handed_back(harness: Harness) -> None:
    job = make_job()

    def cancel() -> StorageUnavailable:
        harness.ledger.cancel(job.id)
        return StorageUnavailable("HTTP 503")

    harness.images = Images(a=cancel)
    harness.breaker = CircuitBreaker(fails("HTTP 503"))
    with pytest.raises(WorkerUnfit):
        harness.handle(payload(job))
    assert harness.read(job).status == "canceled"


def test_jobs_fail_no_attempt_while_s3_credentials_are_unavailable_and_finish_afterwards(
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
    services = replace(fake_services({}), images=fetch.UriFetcher(settings, s3), stores=stores)
    worker, leases = WorkerRef(id="w", device="cpu"), LeaseManager(harness.ledger, "w", 15)
    handler = JobHandler(Settings(retry_backoff_s=1e-6), harness.ledger, services, worker, leases, breaker)
    jobs = [make_job(image="s3://photos/a.png", max_attempts=1) for _ in range(2)]
    refusal = b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>No</Message></Error></ErrorResponse>"
    http_server.url("/", answer(403, refusal))
    http_server.url("/photos/a.png", answer(200, IMAGE))
    for job in jobs:
        with pytest.raises(WorkerUnfit, match=r"AssumeRoleWithWebIdentity.*AccessDenied"):
            handler.handle(payload(job), job.id)
    assert harness.read(jobs[0]).status == "queued"
    assert harness.breaker.open_reason, "the output can be written, but images cannot be read"
    http_server.url("/", answer(200, CREDENTIALS_RESPONSE))
    breaker.probe()
    assert not breaker.open_reason
    for job in jobs:
        assert handler.handle(payload(job), job.id) == Disposition.FINISHED
        assert harness.read(job).status == "succeeded"


CREDENTIALS_RESPONSE = b"""<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>
<SessionToken>t</SessionToken><SecretAccessKey>s</SecretAccessKey><Expiration>2999-01-01T00:00:00Z</Expiration>
<AccessKeyId>A</AccessKeyId></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


def test_a_running_job_is_requeued_when_the_worker_has_to_stop(harness: Harness) -> None:
    job = make_job(max_attempts=1)
    requeued: list[str] = []

    @dataclass
    class Stopping(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            requeued.extend(harness.fixed_handler.requeue_unfinished())
            return super().put(key, data, media_type)

    harness.store = Stopping()
    harness.fixed_handler = harness.handler
    assert harness.fixed_handler.handle(payload(job), new_id()) == Disposition.DROP
    assert requeued == [job.id]
    assert harness.read(job).status == "queued"
    harness.store = MemoryStore()
    assert harness.handle(payload(job)) == Disposition.FINISHED
    assert (harness.read(job).status, harness.read(job).attempt) == ("succeeded", 2)


@pytest.mark.parametrize(
    "job_id",
    [5, "x", "01A2062B-306E-7164-A139-13398DA125F6", "01a2062b-306e-7164-a139-13398da125f6\n", "\ud800"],
)
def test_an_invalid_id_is_refused_and_not_replaced(harness: Harness, job_id: object) -> None:
    message_id = new_id()
    assert harness.handle({**payload(make_job()), "id": job_id}, message_id) == Disposition.FINISHED
    error = harness.ledger.read(message_id).error
    assert error is not None
    assert error.code == "invalid_job"
    assert "id: " in error.detail


def test_a_second_message_with_the_same_idempotency_key_runs_the_first_job(harness: Harness) -> None:
    first, second = make_job(idempotency_key="k"), make_job(idempotency_key="k")
    harness.ledger.submit(first)
    assert harness.handle(payload(second)) == Disposition.FINISHED
    assert harness.read(first).status == "succeeded"
    assert {key.partition("/")[0] for key in harness.store.objects} == {first.id}


@pytest.mark.parametrize(
    ("entered_at", "requests"),
    [
        ("as it was", 2),
        ("never", 3),
        ("2020-01-01T00:00:00Z", 4),
        ("2020-01-01T00:00:00", 3),
        ("soon", 3),
        ([5], 3),
    ],
)
def test_a_message_with_the_time_of_its_submission_saves_a_request_to_the_ledger(
    harness: Harness, settings: Settings, monkeypatch: pytest.MonkeyPatch, entered_at: Any, requests: int
) -> None:
    ledger = RedisLedger(settings)
    harness.ledger = ledger  # type: ignore[assignment]
    job = make_job()
    entered = ledger.submit(job)
    moment = {"as it was": entered.created_at.isoformat(), "never": None}.get(str(entered_at), entered_at)
    harness.handle(payload(make_job()))  # loads the scripts and opens the connection
    commands: list[object] = []
    execute: Any = redis.Redis.execute_command

    def counted(self: Any, *command: Any, **options: Any) -> Any:
        commands.append(command)
        return execute(self, *command, **options)

    send: Any = Pipeline.execute

    def counted_together(self: Any, *args: Any) -> Any:
        commands.append(args)
        return send(self, *args)

    monkeypatch.setattr(redis.Redis, "execute_command", counted)
    monkeypatch.setattr(Pipeline, "execute", counted_together)
    assert harness.handler.handle(payload(job), job.id, entered_at=moment) == Disposition.FINISHED
    assert len(commands) == requests
    document = ledger.read(job.id)
    assert (document.status, document.attempt, document.revision) == ("succeeded", 1, 3)


def test_an_invalid_job_is_refused_also_with_the_time_of_its_submission(harness: Harness) -> None:
    message_id = new_id()
    assert (
        harness.handler.handle({"image": 7}, message_id, entered_at="2026-01-01T00:00:00Z")
        == Disposition.FINISHED
    )
    assert harness.ledger.read(message_id).status == "failed"


def test_a_stage_that_begins_right_after_another_is_written_while_it_lasts(harness: Harness) -> None:
    job = make_job()
    stages: list[str | None] = []

    @dataclass
    class Waiting(MemoryStore):
        def put(self, key: str, data: bytes, media_type: str) -> str:
            end = time.monotonic() + 30
            while harness.read(job).stage != "upload" and time.monotonic() < end:
                time.sleep(0.01)
            stages.append(harness.read(job).stage)
            return super().put(key, data, media_type)

    harness.store = Waiting()
    handler = harness.handler
    handler.leases.loop.start()
    try:
        assert handler.handle(payload(job), job.id) == Disposition.FINISHED
    finally:
        assert handler.leases.loop.stop(30)
    assert {*stages} == {"upload"}
    assert harness.read(job).status == "succeeded"


class TestProgress:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr("gradcam_worker.execution.handler.time.monotonic", lambda: now[0])
        return now

    @pytest.fixture
    def writer(self, harness: Harness, clock: list[float]) -> _ProgressWriter:
        del clock
        claim = harness.ledger.claim(harness.ledger.submit(make_job()), WorkerRef(id="w", device="cpu"))
        return _ProgressWriter(harness.ledger, claim.document, lambda: None)

    def written_stage(self, harness: Harness, writer: _ProgressWriter) -> tuple[str | None, int]:
        document = harness.ledger.read(writer._document.id)
        return document.stage, document.revision

    def test_the_last_of_several_short_stages_is_written_once_when_the_interval_is_over(
        self, harness: Harness, writer: _ProgressWriter, clock: list[float]
    ) -> None:
        before = self.written_stage(harness, writer)
        for stage in ("fetch", "decode", "load"):
            clock[0] += 0.1
            writer.write(Progress(stage))
            writer.write_pending()
        assert self.written_stage(harness, writer) == before, "short stages cost no request"
        clock[0] += 0.25
        for _ in range(3):
            writer.write_pending()
        assert self.written_stage(harness, writer) == ("load", before[1] + 1)
        clock[0] += 0.1
        writer.write(Progress("explain"))
        clock[0] += 0.5
        writer.write(Progress("render"))
        assert self.written_stage(harness, writer) == ("render", before[1] + 2)

    def test_a_checkpoint_is_not_written_over_by_a_stage_that_began_before(
        self, harness: Harness, writer: _ProgressWriter, clock: list[float]
    ) -> None:
        writer.write(Progress("explain"))
        writer.checkpoint(Progress("row 4"))
        clock[0] += 1
        writer.write_pending()
        assert self.written_stage(harness, writer)[0] == "row 4"

    def test_pending_progress_is_not_written_after_the_end_or_while_the_job_writes(
        self, harness: Harness, writer: _ProgressWriter, clock: list[float]
    ) -> None:
        before = self.written_stage(harness, writer)
        writer.write(Progress("fetch"))
        clock[0] += 1
        with writer._lock:
            writer.write_pending()
        writer.close()
        writer.write_pending()
        writer.write(Progress("decode"))
        assert self.written_stage(harness, writer) == before

    def test_pending_progress_of_a_fenced_attempt_is_dropped_without_an_error(
        self, harness: Harness, writer: _ProgressWriter, clock: list[float]
    ) -> None:
        harness.ledger.requeue_unfinished(writer._document.id, 1)
        writer.write(Progress("fetch"))
        clock[0] += 1
        writer.write_pending()
        assert self.written_stage(harness, writer)[0] is None


def make_shard(count: int = 6, **changes: Any) -> Shard:
    fields = {
        "backfill": new_id(),
        "index": 0,
        "key": "00000000-0123456789abcdef",
        "first": 0,
        "rows": [{"uri": f"s3://in/{index}.png"} for index in range(count)],
        "network": "efficientnet_lite0",
        "target": {"top_n": 1},
        "output": "s3://out",
    }
    return Shard.model_validate({**fields, **changes})


class Images(dict[str, bytes | BaseException]):
    """The same image at every URI. A function by index is called first, and may return an error."""

    def __init__(self, **functions: Callable[[], object]) -> None:
        super().__init__()
        self.functions = functions

    def get(self, key: str, default: Any = None) -> Any:
        error = self.functions.get(key.removeprefix("s3://in/").removesuffix(".png"), lambda: None)()
        return error or IMAGE


class Died(AttemptFenced):
    """Simulates the death of the process: ends a shard at once, whichever row raises it."""


def forget_rows(ledger: MemoryLedger, job_id: str) -> None:
    """Simulate a reaper of an earlier version, which drops fields that it does not know."""
    entry = ledger._entries[job_id]
    document = entry.document.model_copy(update={"rows": None})
    ledger._entries[job_id] = replace(entry, document=document)


class TestShards:
    def submit_and_handle(self, harness: Harness, shard: Shard) -> Disposition:
        """Submit a shard as a backfill does, and handle its message."""
        harness.ledger.submit(shard)
        return harness.handle({"id": shard.id}, kind=Shard)

    def test_a_shard_succeeds_and_its_document_counts_its_rows(self, harness: Harness) -> None:
        harness.images = Images(**{"2": lambda: ImageNotFound("There is nothing.")})
        shard = make_shard()
        assert self.submit_and_handle(harness, shard) == Disposition.FINISHED
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
    def test_a_shard_that_kills_workers_is_done_without_the_row_that_kills_them(
        self, harness: Harness, old_reaper: bool
    ) -> None:
        def die() -> None:
            raise Died

        harness.images, shard = Images(**{"4": die}), make_shard()
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

    def test_a_shard_that_is_requeued_runs_again_and_writes_the_same_file(self, harness: Harness) -> None:
        shard = make_shard()
        harness.images = Images(**{"3": lambda: harness.fixed_handler.requeue_unfinished() and None})
        harness.ledger.submit(shard)
        for attempt in (1, 2):
            harness.fixed_handler = harness.handler
            assert harness.fixed_handler.handle({"id": shard.id}, new_id(), kind=Shard) == Disposition.DROP
            document = harness.ledger.read(shard.id)
            assert (document.status, document.attempt, document.error) == ("queued", attempt, None)
            assert not harness.store.objects
        harness.images = Images()
        assert harness.handle({"id": shard.id}, kind=Shard) == Disposition.FINISHED
        objects = dict(harness.store.objects)
        other = Harness(Images())
        self.submit_and_handle(other, shard.model_copy(update={"id": new_id()}))
        assert other.store.objects == objects

    def test_a_shard_whose_images_cannot_be_fetched_is_retried_and_its_last_attempt_records_them(
        self, harness: Harness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gradcam_worker.execution.shards.RETRY_ROWS_AFTER_S", 0)
        down = {str(index): lambda: ImageFetchFailed("HTTP 503") for index in range(4)}
        harness.images, shard = Images(**down), make_shard(max_attempts=2)
        assert self.submit_and_handle(harness, shard) == Disposition.RETRY
        document = harness.ledger.read(shard.id)
        assert (document.status, document.error and document.error.code) == ("retrying", "image_fetch_failed")
        harness.ledger._due[shard.id] = 0
        assert harness.ledger.requeue(shard.id) == "shard"
        assert harness.handle({"id": shard.id}, kind=Shard) == Disposition.FINISHED
        document = harness.ledger.read(shard.id)
        assert (document.status, document.metrics["failed_image_fetch_failed"]) == ("succeeded", 4)

    def test_a_shard_that_is_cancelled_while_it_runs_writes_nothing(self, harness: Harness) -> None:
        shard = make_shard()

        def cancel() -> None:
            harness.ledger.cancel(shard.id)
            harness.fixed_handler.leases.renew()

        harness.images = Images(**{"1": cancel})
        harness.fixed_handler = harness.handler
        harness.ledger.submit(shard)
        assert harness.fixed_handler.handle({"id": shard.id}, new_id(), kind=Shard) == Disposition.FINISHED
        document = harness.ledger.read(shard.id)
        assert (document.status, document.error and document.error.code) == ("canceled", "canceled")
        assert not harness.store.objects

    def test_a_shard_in_a_job_queue_is_refused_and_does_not_run(self, harness: Harness) -> None:
        shard, harness.known_token = make_shard(token="t"), "t"
        assert harness.handle(json.loads(shard.to_json()), shard.id) == Disposition.FINISHED
        problem = harness.ledger.read(shard.id).error
        assert problem is not None
        assert (problem.code, problem.detail) == (
            "invalid_job",
            "This is a shard; this queue is for jobs. Only `gradcam backfill` submits shards.",
        )
        assert not harness.store.objects

    def test_a_job_in_the_shard_queue_is_refused(self, harness: Harness) -> None:
        job = make_job()
        assert harness.handle(payload(job), kind=Shard) == Disposition.FINISHED
        problem = harness.read(job).error
        assert problem is not None
        assert problem.code == "invalid_job"
        assert "Send jobs to gradcam.interactive" in problem.detail

    def test_an_id_in_the_wrong_queue_is_dropped_and_its_work_still_runs_from_the_right_queue(
        self, harness: Harness
    ) -> None:
        job, shard, harness.known_token = make_job(), make_shard(token="t"), "t"
        harness.ledger.submit(job)
        harness.ledger.submit(shard)
        assert harness.handle({"id": shard.id}) == Disposition.DROP
        assert harness.handle({"id": job.id}, kind=Shard) == Disposition.DROP
        for work in (job, shard):
            assert harness.handle({"id": work.id}, kind=type(work)) == Disposition.FINISHED
            assert harness.ledger.read(work.id).status == "succeeded"

    @pytest.mark.parametrize("token", ["", "guessed", "T"])
    def test_a_forged_shard_is_refused_whether_or_not_it_is_in_the_ledger(
        self, harness: Harness, token: str
    ) -> None:
        harness.known_token = "t"
        sent, entered = make_shard(token=token, keep=True), make_shard(token=token, keep=True)
        harness.ledger.submit(entered)
        assert harness.handle(json.loads(sent.to_json()), sent.id, kind=Shard) == Disposition.FINISHED
        assert harness.handle({"id": entered.id}, kind=Shard) == Disposition.FINISHED
        for shard in (sent, entered):
            document = harness.ledger.read(shard.id)
            assert (document.status, document.error and document.error.code) == ("failed", "unknown_backfill")
            assert document.error
            assert not token or token not in document.error.detail.split()
        assert not harness.store.objects

    def test_a_shard_in_a_message_needs_a_token_even_if_its_backfill_has_none(self, harness: Harness) -> None:
        """Only shards in the ledger, which is trusted, may lack a token: those of earlier versions."""
        sent = make_shard()
        assert harness.handle(json.loads(sent.to_json()), sent.id, kind=Shard) == Disposition.FINISHED
        assert harness.ledger.read(sent.id).status == "failed"

    def test_a_running_shard_is_not_failed_when_its_backfill_is_no_longer_registered(
        self, harness: Harness
    ) -> None:
        shard = make_shard(token="t")

        def forget() -> None:
            harness.known_token = "another"
            assert harness.handle({"id": shard.id}, kind=Shard) == Disposition.DROP

        harness.images = Images(**{"1": forget})
        assert self.submit_and_handle(harness, shard) == Disposition.FINISHED
        assert harness.ledger.read(shard.id).status == "succeeded"
