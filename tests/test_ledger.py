import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest

from worker.contract import Job, StatusDocument, WorkerRef, new_id, utc_now
from worker.errors import AttemptFenced, IdempotencyConflict, InvalidJob, LedgerUnavailable, UnknownJob
from worker.ledger import Ledger
from worker.redis_ledger import RedisLedger
from worker.settings import Settings
from worker.testing import MemoryLedger

WORKER = WorkerRef(id="gpu-1:7", device="cpu")


@pytest.fixture(params=["memory", "redis"])
def ledger(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Ledger]:
    """Both ledgers keep the same promises."""
    if request.param == "memory":
        yield MemoryLedger()
    else:
        yield RedisLedger(settings.ledger, prefix=settings.key_prefix, retention_s=60)


def with_key(job: Job, key: str, **changes: object) -> Job:
    return job.model_copy(update={"id": new_id(), "idempotency_key": key, **changes})


def test_a_submitted_job_is_queued_and_can_be_read(ledger: Ledger, job: Job) -> None:
    document = ledger.submit(job)
    assert (document.status, document.attempt, document.revision) == ("queued", 0, 1)
    assert ledger.read(job.id) == document
    assert ledger.counts() == (1, 0)


def test_submitting_twice_finds_the_first(ledger: Ledger, job: Job) -> None:
    assert ledger.submit(job) == ledger.submit(job)
    assert ledger.counts() == (1, 0)


def test_the_same_key_with_the_same_job_finds_the_first_also_when_it_is_final(
    ledger: Ledger, job: Job
) -> None:
    first = with_key(job, "k")
    claim = ledger.claim(first, WORKER)
    ledger.advance(claim.document, status="succeeded")
    again = ledger.submit(with_key(job, "k"))
    assert (again.id, again.status) == (first.id, "succeeded")


def test_the_same_key_with_another_job_is_refused(ledger: Ledger, job: Job) -> None:
    first = with_key(job, "k")
    ledger.submit(first)
    with pytest.raises(IdempotencyConflict, match=first.id):
        ledger.submit(with_key(job, "k", network="vgg16"))


def test_the_same_id_with_another_job_is_refused(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    with pytest.raises(IdempotencyConflict, match=f"id {job.id}"):
        ledger.submit(job.model_copy(update={"network": "vgg16"}))


def test_an_unknown_job_says_so(ledger: Ledger) -> None:
    with pytest.raises(UnknownJob, match="has no job"):
        ledger.read(new_id())


def test_a_claim_starts_the_first_attempt(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    claim = ledger.claim(job, WORKER)
    assert claim.outcome == "claimed"
    assert (claim.document.status, claim.document.attempt, claim.document.worker) == ("running", 1, WORKER)
    assert claim.document.started_at is not None
    assert claim.document.metrics["queue_s"] >= 0
    assert ledger.counts() == (0, 1)


def test_a_claim_enters_a_job_that_a_stranger_published(ledger: Ledger, job: Job) -> None:
    assert ledger.claim(job, WORKER).document.attempt == 1


def test_a_second_claim_takes_over_and_fences_the_first(ledger: Ledger, job: Job) -> None:
    first = ledger.claim(job, WORKER).document
    second = ledger.claim(job, WORKER).document
    assert second.attempt == 2
    with pytest.raises(AttemptFenced):
        ledger.advance(first, status="succeeded")
    assert ledger.advance(second, status="succeeded").attempt == 2


def test_a_final_job_cannot_be_reopened(ledger: Ledger, job: Job) -> None:
    document = ledger.claim(job, WORKER).document
    final = ledger.advance(document, status="failed")
    assert final.completed_at is not None
    assert final.stage is None
    assert ledger.claim(job, WORKER).outcome == "finished"
    with pytest.raises(AttemptFenced):
        ledger.advance(document, status="succeeded")
    assert ledger.read(job.id) == final
    assert ledger.counts() == (0, 0)


def test_each_write_is_one_revision(ledger: Ledger, job: Job) -> None:
    document = ledger.claim(job, WORKER).document
    assert ledger.advance(document, stage="decode").revision == document.revision + 1


def test_a_retrying_job_waits_in_the_queue_and_gets_its_next_attempt(ledger: Ledger, job: Job) -> None:
    document = ledger.claim(job, WORKER).document
    ledger.advance(document, status="retrying")
    assert ledger.counts() == (1, 0)
    assert ledger.claim(job, WORKER).document.attempt == 2


def test_a_job_that_never_ends_is_failed_after_its_attempts(ledger: Ledger, job: Job) -> None:
    for _ in range(job.max_attempts):
        assert ledger.claim(job, WORKER).outcome == "claimed"
    claim = ledger.claim(job, WORKER)
    assert claim.outcome == "ended"
    assert claim.document.status == "failed"
    assert claim.document.error is not None
    assert claim.document.error.code == "max_attempts_exceeded"


def test_an_expired_job_is_not_started(ledger: Ledger, job: Job) -> None:
    late = job.model_copy(update={"expires_at": utc_now() - timedelta(seconds=1)})
    claim = ledger.claim(late, WORKER)
    assert (claim.outcome, claim.document.status) == ("ended", "expired")
    assert claim.document.error is not None
    assert claim.document.error.code == "expired"


def test_a_refused_message_is_written_down(ledger: Ledger) -> None:
    job_id = new_id()
    document = ledger.refuse(job_id, {"image": 7}, InvalidJob("no"))
    assert ledger.read(job_id) == document
    assert (document.status, document.error and document.error.code) == ("failed", "invalid_job")


def test_a_refused_message_cannot_touch_a_job_that_has_its_id(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    ledger.refuse(job.id, "garbage", InvalidJob("no"))
    assert ledger.read(job.id).status == "queued"


def test_many_threads_claim_a_job_and_every_attempt_has_one_owner(ledger: Ledger, job: Job) -> None:
    job = job.model_copy(update={"max_attempts": 20})
    claims: list[StatusDocument] = []
    threads = [
        threading.Thread(target=lambda: claims.append(ledger.claim(job, WORKER).document)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claim.attempt for claim in claims) == list(range(1, 9))


def test_two_racing_submissions_with_one_key_yield_one_job(ledger: Ledger, job: Job) -> None:
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(ledger.submit(with_key(job, "race")).id)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1


def test_many_are_read_at_once_and_the_unknown_left_out(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    assert list(ledger.read_many([job.id, new_id()])) == [job.id]


def test_final_jobs_leave_redis_after_their_retention(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings.ledger, prefix=settings.key_prefix, retention_s=60)
    keyed = with_key(job, "k")
    document = ledger.claim(keyed, WORKER).document
    names = list(ledger._redis.scan_iter(f"{settings.key_prefix}*"))
    assert {ledger._redis.ttl(name) for name in names} == {-1}, "a job that is not final must not vanish"
    ledger.advance(document, status="succeeded")
    names = list(ledger._redis.scan_iter(f"{settings.key_prefix}*"))
    assert len(names) == 2, "the job and its idempotency key"
    assert all(0 < ledger._redis.ttl(name) <= 60 for name in names)


def test_a_write_whose_reply_was_lost_succeeds_again(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings.ledger, prefix=settings.key_prefix, retention_s=60)
    before = ledger.submit(job)
    after = before.model_copy(update={"revision": 2, "stage": "fetch"})
    assert ledger._swap(before, after)
    assert ledger._swap(before, after), "the same write sent again"
    assert not ledger._swap(before, after.model_copy(update={"stage": "decode"}))


def test_a_ledger_out_of_reach_says_where_it_was_looked_for() -> None:
    ledger = RedisLedger("redis://user:planted@127.0.0.1:1/0", prefix="", retention_s=60)
    with pytest.raises(LedgerUnavailable, match=r"redis://127\.0\.0\.1:1/0") as caught:
        ledger.read(new_id())
    assert "planted" not in str(caught.value)
