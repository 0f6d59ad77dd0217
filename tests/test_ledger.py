import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from worker.contract import Job, StatusDocument, WorkerRef
from worker.errors import AttemptFenced, IdempotencyConflict, InvalidJob, LedgerUnavailable, UnknownJob
from worker.ledger import Claim, Entry, Ledger
from worker.redis_ledger import RedisLedger
from worker.settings import Settings
from worker.testing import MemoryLedger
from worker.wire import new_id, utc_now

WORKER = WorkerRef(id="gpu-1:7", device="cpu")


@pytest.fixture(params=["memory", "redis"])
def ledger(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Ledger]:
    """Both ledgers keep the same promises."""
    if request.param == "memory":
        yield MemoryLedger()
    else:
        yield RedisLedger(settings.ledger, prefix=settings.key_prefix, retention_s=60)


def claim(ledger: Ledger, job: Job, **options: Any) -> Claim:
    """What a worker does with a message."""
    _, document = ledger.receive(job.id, job.model_dump(mode="json"))
    return ledger.claim(job, document, WORKER, **options)


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
    taken = claim(ledger, first)
    ledger.advance(taken.document, status="succeeded")
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
    taken = claim(ledger, job)
    assert taken.outcome == "claimed"
    assert (taken.document.status, taken.document.attempt, taken.document.worker) == ("running", 1, WORKER)
    assert taken.document.started_at is not None
    assert taken.document.metrics["queue_s"] >= 0
    assert ledger.counts() == (0, 1)


def test_an_untouched_job_is_taken_without_being_read(ledger: Ledger, job: Job) -> None:
    entered = ledger.submit(job)
    taken = ledger.take(job, entered.created_at, WORKER)
    assert taken == ledger.read(job.id)
    assert (taken.status, taken.stage, taken.attempt, taken.revision) == ("running", "fetch", 1, 2)
    assert (taken.worker, taken.queued_at) == (WORKER, entered.queued_at)
    assert taken.metrics["queue_s"] >= 0
    assert ledger.counts() == (0, 1)
    assert ledger.advance(taken, status="succeeded").final


@pytest.mark.parametrize("what", ["unknown", "another", "another moment", "running", "retrying", "expired"])
def test_a_job_that_is_not_as_it_was_entered_is_not_taken(ledger: Ledger, job: Job, what: str) -> None:
    if what == "expired":
        job = job.model_copy(update={"expires_at": utc_now() - timedelta(seconds=1)})
    elif what == "unknown":
        assert ledger.take(job, utc_now(), WORKER) is None
    entered = ledger.submit(job)
    moment = entered.created_at
    if what in {"running", "retrying"}:
        entered = claim(ledger, job).document
    if what == "retrying":
        entered = ledger.advance(entered, status="retrying")
    if what == "another":
        job = job.model_copy(update={"network": "vgg16"})
    if what in {"another moment", "unknown"}:
        moment += timedelta(microseconds=1)
    assert ledger.take(job, moment, WORKER) is None
    assert ledger.read(job.id) == entered


def test_many_threads_take_a_job_and_one_has_it(ledger: Ledger, job: Job) -> None:
    moment = ledger.submit(job).created_at
    taken: list[StatusDocument | None] = []
    threads = [
        threading.Thread(target=lambda who: taken.append(ledger.take(job, moment, who)), args=[who])
        for who in (WORKER.model_copy(update={"id": f"worker-{number}"}) for number in range(8))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one is not None for one in taken) == 1


def test_a_claim_enters_a_job_that_a_stranger_published(ledger: Ledger, job: Job) -> None:
    assert claim(ledger, job).document.attempt == 1


def test_a_running_job_is_held_and_a_duplicate_changes_nothing(ledger: Ledger, job: Job) -> None:
    first = claim(ledger, job).document
    for _ in range(5):
        assert claim(ledger, job).outcome == "held"
    assert ledger.read(job.id) == first


def test_a_running_job_is_taken_over_when_its_attempt_began_too_long_ago(ledger: Ledger, job: Job) -> None:
    claim(ledger, job)
    assert claim(ledger, job, lost_after_s=0).document.attempt == 2


def test_a_message_that_came_back_takes_over_and_fences_the_first(ledger: Ledger, job: Job) -> None:
    first = claim(ledger, job).document
    second = claim(ledger, job, redelivered=True).document
    assert second.attempt == 2
    with pytest.raises(AttemptFenced):
        ledger.advance(first, status="succeeded")
    assert ledger.advance(second, status="succeeded").attempt == 2


def test_a_final_job_cannot_be_reopened(ledger: Ledger, job: Job) -> None:
    document = claim(ledger, job).document
    final = ledger.advance(document, status="failed")
    assert final.completed_at is not None
    assert final.stage is None
    assert claim(ledger, job).outcome == "finished"
    with pytest.raises(AttemptFenced):
        ledger.advance(document, status="succeeded")
    assert ledger.read(job.id) == final
    assert ledger.counts() == (0, 0)


def test_each_write_is_one_revision(ledger: Ledger, job: Job) -> None:
    document = claim(ledger, job).document
    assert ledger.advance(document, stage="decode").revision == document.revision + 1


def test_a_retrying_job_waits_in_the_queue_and_gets_its_next_attempt(ledger: Ledger, job: Job) -> None:
    document = claim(ledger, job).document
    ledger.advance(document, status="retrying")
    assert ledger.counts() == (1, 0)
    assert claim(ledger, job).document.attempt == 2


def test_a_job_that_never_ends_is_failed_after_its_attempts(ledger: Ledger, job: Job) -> None:
    for _ in range(job.max_attempts):
        assert claim(ledger, job, redelivered=True).outcome == "claimed"
    last = claim(ledger, job, redelivered=True)
    assert last.outcome == "ended"
    assert last.document.status == "failed"
    assert last.document.error is not None
    assert last.document.error.code == "max_attempts_exceeded"


def test_an_expired_job_is_not_started(ledger: Ledger, job: Job) -> None:
    late = job.model_copy(update={"expires_at": utc_now() - timedelta(seconds=1)})
    taken = claim(ledger, late)
    assert (taken.outcome, taken.document.status) == ("ended", "expired")
    assert taken.document.error is not None
    assert taken.document.error.code == "expired"


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
        threading.Thread(target=lambda: claims.append(claim(ledger, job, redelivered=True).document))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken.attempt for taken in claims) == list(range(1, 9))


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
    document = claim(ledger, keyed).document
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


def test_a_job_of_a_later_version_is_failed_and_not_left_in_the_queue(ledger: Ledger, job: Job) -> None:
    later = Entry("f", json.dumps({"id": job.id, "field_of_tomorrow": 1}), None, ledger.submit(job))
    other = later.document.model_copy(update={"id": new_id()})
    ledger._create(replace(later, document=other))
    with pytest.raises(InvalidJob, match="field_of_tomorrow: unknown field") as caught:
        ledger.receive(other.id, job.model_dump(mode="json"))
    assert ledger.refuse(other.id, None, caught.value).status == "failed"
    assert ledger.counts() == (1, 0)


def test_a_message_is_about_the_job_that_the_ledger_holds(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    assert ledger.receive(job.id, {"whatever": "else"})[0] == job


def test_the_last_word_is_worth_waiting_for(
    ledger: Ledger, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, swap, failures = claim(ledger, job).document, ledger._swap, [LedgerUnavailable("gone")] * 2

    def shaky(before: StatusDocument, after: StatusDocument) -> bool:
        if failures:
            raise failures.pop()
        return swap(before, after)

    monkeypatch.setattr(ledger, "_swap", shaky)
    with pytest.raises(LedgerUnavailable):
        ledger.advance(document, stage="decode")
    assert ledger.advance(document, patience_s=30, status="succeeded").final
