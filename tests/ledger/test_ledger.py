import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from devtools.faults.proxy import FaultyProxy
from gradcam_worker.errors import (
    AttemptFenced,
    IdempotencyConflict,
    InvalidJob,
    JobNotFailed,
    LedgerUnavailable,
    StorageUnavailable,
    UnknownJob,
)
from gradcam_worker.ledger.ledger import Claim, ClaimOutcome, Entry, LeaseRenewal, Ledger
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.ledger.state_machine import is_suspected
from gradcam_worker.operations import servers
from gradcam_worker.schemas.ids import new_id, utc_now
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import Problem, StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger

WORKER = WorkerRef(id="gpu-1:7", device="cpu")
LEASE_S = 1.0


@pytest.fixture(params=["memory", "redis"])
def ledger(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Ledger]:
    """Both ledgers keep the same promises."""
    if request.param == "memory":
        yield MemoryLedger(lease_s=LEASE_S)
    else:
        yield RedisLedger(short(settings))


def short(settings: Settings) -> Settings:
    return settings.model_copy(update={"retention_s": 60, "idempotency_retention_s": 60, "lease_s": LEASE_S})


def claim(ledger: Ledger, job: Job) -> Claim:
    """What a worker does with a message."""
    _, document = ledger.get_or_create(job.id, job.model_dump(mode="json"))
    return ledger.claim(document, WORKER)


def expired(ledger: Ledger, job: Job) -> bool:
    """Its worker is gone: the lease runs out. Whether the job is to be published."""
    wait_for(lambda: job.id in ledger.find_overdue(10).expired_leases)
    return ledger.expire_lease(job.id) is not None


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def with_key(job: Job, key: str, **changes: object) -> Job:
    return job.model_copy(update={"id": new_id(), "idempotency_key": key, **changes})


def test_a_submitted_job_is_queued_and_can_be_read(ledger: Ledger, job: Job) -> None:
    document = ledger.submit(job)
    assert (document.status, document.attempt, document.revision) == ("queued", 0, 1)
    assert ledger.read(job.id) == document
    assert ledger.count_jobs() == (1, 0)


def test_a_job_that_is_submitted_twice_is_entered_once(ledger: Ledger, job: Job) -> None:
    assert ledger.submit(job) == ledger.submit(job)
    assert ledger.count_jobs() == (1, 0)


def test_the_same_key_with_the_same_job_finds_the_first_also_when_it_is_final(
    ledger: Ledger, job: Job
) -> None:
    first = with_key(job, "k")
    taken = claim(ledger, first)
    ledger.finish(taken.document, status="succeeded")
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


def test_an_unknown_job_is_an_error(ledger: Ledger) -> None:
    with pytest.raises(UnknownJob, match="has no job"):
        ledger.read(new_id())


def test_a_claim_starts_the_first_attempt(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    taken = claim(ledger, job)
    assert taken.outcome is ClaimOutcome.CLAIMED
    assert (taken.document.status, taken.document.attempt, taken.document.worker) == ("running", 1, WORKER)
    assert taken.document.started_at is not None
    assert taken.document.metrics["queue_s"] >= 0
    assert ledger.count_jobs() == (0, 1)


def test_an_unchanged_job_is_claimed_without_being_read(ledger: Ledger, job: Job) -> None:
    entered = ledger.submit(job)
    taken = ledger.claim_fresh(job, entered.created_at, WORKER)
    assert taken == ledger.read(job.id)
    assert (taken.status, taken.stage, taken.attempt, taken.revision) == ("running", "fetch", 1, 2)
    assert (taken.worker, taken.queued_at) == (WORKER, entered.queued_at)
    assert taken.metrics["queue_s"] >= 0
    assert ledger.count_jobs() == (0, 1)
    assert ledger.finish(taken, status="succeeded").final


@pytest.mark.parametrize("what", ["unknown", "another", "another moment", "running", "retrying", "expired"])
def test_a_job_that_is_not_as_it_was_entered_is_not_claimed_unread(
    ledger: Ledger, job: Job, what: str
) -> None:
    if what == "expired":
        job = job.model_copy(update={"expires_at": utc_now() - timedelta(seconds=1)})
    elif what == "unknown":
        assert ledger.claim_fresh(job, utc_now(), WORKER) is None
    entered = ledger.submit(job)
    moment = entered.created_at
    if what in {"running", "retrying"}:
        entered = claim(ledger, job).document
    if what == "retrying":
        entered = ledger.postpone(entered, delay_s=60)
    if what == "another":
        job = job.model_copy(update={"network": "vgg16"})
    if what in {"another moment", "unknown"}:
        moment += timedelta(microseconds=1)
    assert ledger.claim_fresh(job, moment, WORKER) is None
    assert ledger.read(job.id) == entered


def test_one_of_many_threads_claims_an_unread_job(ledger: Ledger, job: Job) -> None:
    moment = ledger.submit(job).created_at
    taken: list[object] = []
    threads = [
        threading.Thread(target=lambda who: taken.append(ledger.claim_fresh(job, moment, who)), args=[who])
        for who in (WORKER.model_copy(update={"id": f"worker-{number}"}) for number in range(8))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(one is not None for one in taken) == 1


def test_a_claim_enters_a_job_that_another_program_published(ledger: Ledger, job: Job) -> None:
    assert claim(ledger, job).document.attempt == 1


def test_a_running_job_is_held_and_a_duplicate_changes_nothing(ledger: Ledger, job: Job) -> None:
    first = claim(ledger, job).document
    for _ in range(5):
        assert claim(ledger, job).outcome is ClaimOutcome.HELD
    assert ledger.read(job.id) == first


def test_a_job_whose_lease_ran_out_is_queued_again_and_the_first_attempt_is_fenced(
    ledger: Ledger, job: Job
) -> None:
    first = claim(ledger, job).document
    assert expired(ledger, job)
    waiting = ledger.read(job.id)
    assert (waiting.status, waiting.attempt) == ("queued", 1)
    assert waiting.error is not None
    assert (waiting.error.code, "gpu-1:7" in waiting.error.detail) == ("worker_lost", True)
    assert is_suspected(waiting)
    assert not ledger.expire_lease(job.id), "it is put right once"
    second = claim(ledger, job).document
    assert (second.attempt, second.error, is_suspected(second)) == (2, None, False)
    with pytest.raises(AttemptFenced):
        ledger.finish(first, status="succeeded")
    assert ledger.finish(second, status="succeeded").attempt == 2


def test_a_lease_that_is_renewed_does_not_run_out(ledger: Ledger, job: Job) -> None:
    claim(ledger, job)
    other = job.model_copy(update={"id": new_id()})
    claim(ledger, other)
    end = time.monotonic() + 2 * LEASE_S
    while time.monotonic() < end:
        assert ledger.renew_leases("w", "well", {job.id: 1}) == LeaseRenewal()
        time.sleep(0.05)
    wait_for(lambda: ledger.find_overdue(10).expired_leases == [other.id])


def test_a_lease_of_an_attempt_that_was_overtaken_is_not_renewed(ledger: Ledger, job: Job) -> None:
    document = claim(ledger, job).document
    assert ledger.renew_leases("w", "", {job.id: 2}).lost == {job.id}
    ledger.finish(document, status="succeeded")
    assert ledger.renew_leases("w", "", {job.id: 1}).lost == {job.id}


def test_a_worker_reports_its_health(ledger: Ledger) -> None:
    ledger.renew_leases("gpu-1:7", '{"well": true}', {})
    assert ledger.find_workers() == {"gpu-1:7": '{"well": true}'}


def test_a_worker_that_has_stopped_is_found_no_more(ledger: Ledger) -> None:
    ledger.renew_leases("gpu-1:7", "{}", {})
    ledger.renew_leases("gpu-2:7", "{}", {})
    ledger.remove_worker("gpu-1:7")
    ledger.remove_worker("never there")
    assert ledger.find_workers() == {"gpu-2:7": "{}"}


def test_one_worker_reaps_and_another_takes_over_when_it_is_gone(ledger: Ledger) -> None:
    assert ledger.try_lead("a", 0.3)
    assert ledger.try_lead("a", 0.3)
    assert not ledger.try_lead("b", 0.3)
    wait_for(lambda: ledger.try_lead("b", 5))
    assert not ledger.try_lead("a", 5)


def test_a_waiting_job_is_cancelled_at_once_and_never_starts(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    document = ledger.cancel(job.id)
    assert (document.status, document.error and document.error.code) == ("canceled", "canceled")
    assert document.cancel_requested_at is not None
    assert claim(ledger, job).outcome is ClaimOutcome.ALREADY_FINAL
    assert ledger.claim_fresh(job, document.created_at, WORKER) is None
    assert ledger.cancel(job.id) == document
    assert ledger.count_jobs() == (0, 0)


def test_a_running_job_that_is_cancelled_is_marked_and_its_worker_ends_it(ledger: Ledger, job: Job) -> None:
    running = claim(ledger, job).document
    asked = ledger.cancel(job.id)
    assert (asked.status, asked.cancel_requested_at is not None) == ("running", True)
    assert ledger.renew_leases("w", "", {job.id: 1}).canceled == {job.id}
    after = ledger.finish(running, status="canceled")
    assert (after.status, after.cancel_requested_at) == ("canceled", asked.cancel_requested_at)
    assert after.revision == asked.revision + 1
    assert not ledger.renew_leases("w", "", {}).canceled


def test_a_job_to_cancel_whose_worker_dies_is_cancelled(ledger: Ledger, job: Job) -> None:
    claim(ledger, job)
    ledger.cancel(job.id)
    assert not expired(ledger, job)
    assert ledger.read(job.id).status == "canceled"


def test_a_released_job_keeps_all_its_attempts(ledger: Ledger, job: Job) -> None:
    job = job.model_copy(update={"max_attempts": 1})
    first = claim(ledger, job).document
    assert not ledger.requeue_unfinished(job.id, attempt=2)
    assert ledger.requeue_unfinished(job.id, attempt=1)
    assert not is_suspected(ledger.read(job.id))
    with pytest.raises(AttemptFenced):
        ledger.finish(first, status="succeeded")
    second = claim(ledger, job)
    assert (second.outcome, second.document.attempt, second.document.max_attempts) == (
        ClaimOutcome.CLAIMED,
        2,
        2,
    )


def test_a_job_that_expires_in_the_queue_is_found(ledger: Ledger, job: Job) -> None:
    soon = job.model_copy(update={"expires_at": utc_now() + timedelta(seconds=0.2)})
    ledger.submit(soon)
    wait_for(lambda: ledger.find_overdue(10).expired_jobs == [job.id])
    ledger.expire(job.id)
    assert ledger.read(job.id).status == "expired"
    assert ledger.find_overdue(10).expired_jobs == []


def test_a_job_that_has_begun_does_not_expire(ledger: Ledger, job: Job) -> None:
    soon = job.model_copy(update={"expires_at": utc_now() + timedelta(seconds=0.2)})
    claim(ledger, soon)
    time.sleep(0.3)
    assert ledger.find_overdue(10).expired_jobs == []


def test_a_queued_job_without_a_message_is_found_when_the_queue_is_empty(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    look = partial(ledger.find_unpublished, "normal", lost_after_s=0.2, limit=10)
    assert look(queue_is_empty=False) == []
    wait_for(lambda: look(queue_is_empty=True) == [job.id])
    assert look(queue_is_empty=True) == [], "it is not named again at once"
    wait_for(lambda: look(queue_is_empty=True) == [job.id])
    assert ledger.find_unpublished("high", queue_is_empty=True, lost_after_s=0, limit=10) == []


def test_a_queued_job_without_a_message_is_found_when_a_later_one_came_through(
    ledger: Ledger, job: Job
) -> None:
    ledger.submit(job)
    time.sleep(0.3)
    later = job.model_copy(update={"id": new_id()})
    claim(ledger, later)
    assert ledger.find_unpublished("normal", queue_is_empty=False, lost_after_s=60, limit=10) == []
    assert ledger.find_unpublished("normal", queue_is_empty=False, lost_after_s=0.2, limit=10) == [job.id]


def test_failed_jobs_are_dead_letters_until_they_are_dropped(ledger: Ledger, job: Job) -> None:
    ledger.finish(claim(ledger, job).document, status="failed")
    other = new_id()
    ledger.refuse(other, None, InvalidJob("no"))
    assert {job_id for job_id, _ in ledger.find_dead_letters()} == {job.id, other}
    ledger.drop_dead_letter(job.id)
    assert [job_id for job_id, _ in ledger.find_dead_letters()] == [other]


def test_a_final_job_cannot_be_reopened(ledger: Ledger, job: Job) -> None:
    document = claim(ledger, job).document
    final = ledger.finish(document, status="failed")
    assert final.completed_at is not None
    assert final.stage is None
    assert claim(ledger, job).outcome is ClaimOutcome.ALREADY_FINAL
    with pytest.raises(AttemptFenced):
        ledger.finish(document, status="succeeded")
    assert ledger.read(job.id) == final
    assert ledger.count_jobs() == (0, 0)


def test_each_write_is_one_revision(ledger: Ledger, job: Job) -> None:
    document = claim(ledger, job).document
    assert ledger.advance(document, stage="decode").revision == document.revision + 1


def test_a_retrying_job_waits_in_the_queue_and_gets_its_next_attempt(ledger: Ledger, job: Job) -> None:
    document = claim(ledger, job).document
    ledger.postpone(document, delay_s=0.2)
    assert ledger.count_jobs() == (1, 0)
    assert claim(ledger, job).outcome is ClaimOutcome.HELD, "its pause is not over"
    wait_for(lambda: ledger.find_overdue(10).due_retries == [job.id])
    assert ledger.requeue(job.id)
    assert not ledger.requeue(job.id)
    assert claim(ledger, job).document.attempt == 2


def test_a_job_that_never_ends_is_failed_after_its_attempts(ledger: Ledger, job: Job) -> None:
    job = job.model_copy(update={"max_attempts": 2})
    claim(ledger, job)
    assert expired(ledger, job)
    claim(ledger, job)
    assert not expired(ledger, job)
    last = ledger.read(job.id)
    assert (last.status, last.attempt) == ("failed", 2)
    assert last.error is not None
    assert last.error.code == "max_attempts_exceeded"


def test_an_expired_job_is_not_started(ledger: Ledger, job: Job) -> None:
    late = job.model_copy(update={"expires_at": utc_now() - timedelta(seconds=1)})
    taken = claim(ledger, late)
    assert (taken.outcome, taken.document.status) == (ClaimOutcome.ENDED_BY_CLAIM, "expired")
    assert taken.document.error is not None
    assert taken.document.error.code == "expired"


def test_a_refused_message_is_recorded_as_a_failed_job(ledger: Ledger) -> None:
    job_id = new_id()
    document = ledger.refuse(job_id, {"image": 7}, InvalidJob("no"))
    assert ledger.read(job_id) == document
    assert (document.status, document.error and document.error.code) == ("failed", "invalid_job")


def test_a_refused_message_cannot_change_a_job_with_its_id(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    ledger.refuse(job.id, "garbage", InvalidJob("no"))
    assert ledger.read(job.id).status == "queued"


def test_one_of_many_threads_claims_a_job(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    outcomes: list[ClaimOutcome] = []
    threads = [threading.Thread(target=lambda: outcomes.append(claim(ledger, job).outcome)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(ClaimOutcome.CLAIMED) == 1
    assert set(outcomes) <= {ClaimOutcome.CLAIMED, ClaimOutcome.CHANGED, ClaimOutcome.HELD}


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
    ledger = RedisLedger(short(settings))
    server = ledger.server.redis
    kept = tuple(f"{settings.key_prefix}{name}" for name in ("claimed", "ended:", "listed:"))  # no job's
    keyed = with_key(job, "k")
    document = claim(ledger, keyed).document
    names = [name for name in server.scan_iter(f"{settings.key_prefix}*") if not name.startswith(kept[2])]
    assert {server.ttl(name) for name in names} == {-1}, "a job that is not final must not vanish"
    ledger.finish(document, status="succeeded")
    names = [name for name in server.scan_iter(f"{settings.key_prefix}*") if not name.startswith(kept)]
    assert len(names) == 2, "the job and its idempotency key"
    assert all(0 < server.ttl(name) <= 60 for name in names)


def test_a_job_with_an_idempotency_key_is_remembered_as_long_as_the_operator_wants(
    settings: Settings, job: Job
) -> None:
    longer = short(settings).model_copy(update={"idempotency_retention_s": 3600})
    ledger = RedisLedger(longer)
    keyed = with_key(job, "k")
    for one in (job, keyed):
        ledger.finish(claim(ledger, one).document, status="succeeded")
    assert ledger.server.redis.ttl(f"{settings.key_prefix}job:{job.id}") <= 60
    assert ledger.server.redis.ttl(f"{settings.key_prefix}job:{keyed.id}") > 3000
    assert ledger.submit(with_key(job, "k")).id == keyed.id


def test_a_write_whose_reply_was_lost_succeeds_again(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings)
    before = ledger.submit(job)
    after = before.model_copy(update={"revision": 2, "stage": "fetch"})
    assert ledger._compare_and_set(before, after)
    assert ledger._compare_and_set(before, after), "the same write sent again"
    assert not ledger._compare_and_set(before, after.model_copy(update={"stage": "decode"}))


def test_the_error_of_an_unreachable_ledger_names_its_url() -> None:
    ledger = RedisLedger(Settings(ledger_url="redis://user:planted@127.0.0.1:1/0"))
    with pytest.raises(LedgerUnavailable, match=r"redis://127\.0\.0\.1:1/0") as caught:
        ledger.read(new_id())
    assert "planted" not in str(caught.value)


def test_a_job_of_a_later_version_is_failed_and_not_left_in_the_queue(ledger: Ledger, job: Job) -> None:
    later = Entry("f", json.dumps({"id": job.id, "field_of_tomorrow": 1}), None, ledger.submit(job))
    other = later.document.model_copy(update={"id": new_id()})
    ledger._create_many([replace(later, document=other)])
    with pytest.raises(InvalidJob, match="field_of_tomorrow: unknown field") as caught:
        ledger.get_or_create(other.id, job.model_dump(mode="json"))
    assert ledger.refuse(other.id, None, caught.value).status == "failed"
    assert ledger.count_jobs() == (1, 0)


def test_a_message_is_about_the_job_that_the_ledger_holds(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    assert ledger.get_or_create(job.id, {"whatever": "else"})[0] == job


def test_a_final_write_is_repeated_until_the_ledger_is_back(
    ledger: Ledger, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, swap, failures = (
        claim(ledger, job).document,
        ledger._compare_and_set,
        [LedgerUnavailable("gone")] * 2,
    )

    def shaky(before: StatusDocument, after: StatusDocument, **options: Any) -> bool:
        if failures:
            raise failures.pop()
        return swap(before, after, **options)

    monkeypatch.setattr(ledger, "_compare_and_set", shaky)
    with pytest.raises(LedgerUnavailable):
        ledger.advance(document, stage="decode")
    assert ledger.finish(document, patience_s=30, status="succeeded").final


@pytest.mark.parametrize("status", ["succeeded", "canceled", "expired", "failed"])
def test_the_content_of_a_final_job_is_kept_only_if_it_failed(ledger: Ledger, job: Job, status: str) -> None:
    keyed = with_key(job, "k")
    ledger.finish(claim(ledger, keyed).document, status=status)
    assert ledger.read_job(keyed.id) == (keyed if status == "failed" else None)
    assert ledger.submit(with_key(job, "k")).id == keyed.id, "it is still known by its fingerprint"
    again, document = ledger.get_or_create(keyed.id, keyed.model_dump(mode="json"))
    assert (again is None, document.status) == (status != "failed", status)
    assert ledger.claim(document, WORKER).outcome is ClaimOutcome.ALREADY_FINAL


def test_the_urls_of_a_final_job_are_not_in_redis(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings)
    webhook = {"url": "http://app/hook?token=planted", "events": ["job.started"]}
    signed = Job.parse(
        {**job.model_dump(mode="json"), "image": "http://h/a?X-Signature=planted", "webhooks": [webhook]}
    )
    ledger.finish(claim(ledger, signed).document, status="succeeded")
    held = ledger.server.redis.hgetall(f"{settings.key_prefix}job:{job.id}")
    assert "planted" not in json.dumps(held)


@pytest.mark.parametrize("seen", [True, False])
def test_a_job_to_cancel_gets_no_further_attempt_when_this_one_fails(
    ledger: Ledger, job: Job, *, seen: bool
) -> None:
    document = claim(ledger, job).document
    marked = ledger.cancel(job.id)
    problem = Problem.of(StorageUnavailable("It hangs."), stage="upload", attempt=1)
    after = ledger.postpone(marked if seen else document, delay_s=0, error=problem, metrics={"fetch_s": 1.0})
    assert (after.status, after.metrics) == ("canceled", {"fetch_s": 1.0})
    assert after.error is not None
    assert (after.error.code, after.error.stage) == ("canceled", "upload")
    assert ledger.count_jobs() == (0, 0)
    assert ledger.find_overdue(10).due_retries == []


def test_a_job_to_cancel_is_not_requeued(ledger: Ledger, job: Job) -> None:
    claim(ledger, job)
    ledger.cancel(job.id)
    assert not ledger.requeue_unfinished(job.id, 1), "nothing is to be published"
    assert ledger.read(job.id).status == "canceled"


def test_a_reaper_with_an_outdated_list_expires_no_renewed_lease_and_shortens_no_pause(
    ledger: Ledger, job: Job
) -> None:
    document = claim(ledger, job).document
    assert not ledger.expire_lease(job.id), "its lease has not run out"
    assert ledger.read(job.id) == document
    ledger.postpone(document, delay_s=60)
    assert not ledger.requeue(job.id)


def test_a_message_that_arrives_out_of_order_makes_no_others_seem_lost(ledger: Ledger, job: Job) -> None:
    """A job that was lost is published last and, where its first message is found again, taken first."""
    lost, *others = (job.model_copy(update={"id": new_id()}) for _ in range(4))
    claim(ledger, lost)
    for one in others:
        ledger.submit(one)
    time.sleep(0.2)
    assert expired(ledger, lost)
    claim(ledger, lost)
    assert ledger.find_unpublished("normal", queue_is_empty=False, lost_after_s=0.1, limit=10) == []


def test_ids_without_a_job_are_forgotten(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(short(settings))
    claim(ledger, job)
    other = job.model_copy(update={"id": new_id()})
    ledger.submit(other)
    server, prefix = ledger.server.redis, settings.key_prefix
    for one in (job, other):
        server.delete(f"{prefix}job:{one.id}")
    wait_for(lambda: ledger.find_overdue(10).expired_leases == [] and not server.zcard(f"{prefix}running"))
    assert ledger.find_unpublished("normal", queue_is_empty=True, lost_after_s=0, limit=10) == []
    assert not server.keys(f"{prefix}job:*"), "nothing is made by looking"
    assert ledger.count_jobs() == (0, 0)


def test_a_full_ledger_is_an_error_of_its_own_and_can_still_be_read(
    settings: Settings, job: Job, tmp_path: Path
) -> None:
    with servers.valkey(tmp_path) as server:
        own = Settings(broker_url=f"redis://127.0.0.1:{server.port}/0")
        ledger = RedisLedger(own)
        document = ledger.submit(job)
        ledger.server.redis.config_set("maxmemory", 1)
        with pytest.raises(LedgerUnavailable, match="is full"):
            ledger.submit(job.model_copy(update={"id": new_id()}))
        assert ledger.read(job.id) == document
        ledger.server.redis.config_set("maxmemory", 0)
        assert claim(ledger, job).outcome is ClaimOutcome.CLAIMED


def test_after_a_failover_the_former_primary_is_left(job: Job, tmp_path: Path) -> None:
    """Both stand behind one address, as in a managed Redis: new connections reach the new primary."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with (
        servers.valkey(tmp_path / "a") as first,
        servers.valkey(tmp_path / "b") as second,
        FaultyProxy(first.port) as proxy,
        closing(redis.Redis(port=first.port)) as old,
    ):
        ledger = RedisLedger(Settings(broker_url=f"redis://127.0.0.1:{proxy.port}/0"))
        ledger.submit(job)
        old.replicaof("127.0.0.1", second.port)
        proxy.target = second.port
        other = job.model_copy(update={"id": new_id()})
        assert ledger.submit(other).status == "queued"
        with closing(redis.Redis(port=second.port)) as new:
            assert new.exists(f"gradcam:job:{other.id}")


def failed(ledger: Ledger, job: Job) -> StatusDocument:
    """A job that has failed at its first attempt."""
    running = claim(ledger, job).document
    problem = Problem.of(StorageUnavailable("The bucket is away"), stage="fetch", attempt=running.attempt)
    return ledger.finish(running, status="failed", error=problem)


def test_a_failed_job_is_tried_again_as_the_same_one_with_all_its_attempts(ledger: Ledger, job: Job) -> None:
    job = with_key(job, "order", max_attempts=2)
    ledger.submit(job)
    ended = failed(ledger, job)
    again = ledger.retry(job.id)
    assert (again.id, again.status, again.error, again.completed_at) == (job.id, "queued", None, None)
    assert again.revision == ended.revision + 1
    assert (again.attempt, again.max_attempts) == (1, 3), "none of before can change it"
    assert ledger.read(job.id) == again
    assert ledger.find_dead_letters() == []
    assert ledger.count_jobs() == (1, 0)
    assert ledger.read_job(job.id) == job
    with pytest.raises(AttemptFenced):
        ledger.finish(ended, status="succeeded")
    for attempt in (2, 3):
        running = claim(ledger, job).document
        assert (running.status, running.attempt) == ("running", attempt)
        if attempt == 2:
            ledger.requeue(ledger.postpone(running, delay_s=0).id)
    assert ledger.finish(running, status="succeeded").status == "succeeded"


def test_two_retries_of_a_failed_job_are_one(ledger: Ledger, job: Job) -> None:
    ledger.submit(job)
    failed(ledger, job)
    again = ledger.retry(job.id)
    assert ledger.retry(job.id) == again
    running = claim(ledger, job).document
    assert ledger.retry(job.id) == running


def test_only_what_has_failed_is_tried_again(ledger: Ledger, job: Job) -> None:
    with pytest.raises(UnknownJob):
        ledger.retry(job.id)
    ledger.submit(job)
    ledger.cancel(job.id)
    with pytest.raises(JobNotFailed, match=r"is canceled: only a failed one.*another id and idempotency key"):
        ledger.retry(job.id)
    other = job.model_copy(update={"id": new_id()})
    ledger.submit(other)
    ledger.finish(claim(ledger, other).document, status="succeeded")
    with pytest.raises(JobNotFailed, match="is succeeded"):
        ledger.retry(other.id)
    ledger.refuse(nothing := new_id(), {"no": "job"}, InvalidJob("This is not a job."))
    with pytest.raises(JobNotFailed, match="can read no job in its message"):
        ledger.retry(nothing)


def test_a_key_finds_the_failed_job_unless_it_is_to_be_retried(ledger: Ledger, job: Job) -> None:
    first = with_key(job, "order")
    ledger.submit(first)
    ended = failed(ledger, first)
    assert ledger.submit(with_key(job, "order")) == ended
    again = ledger.submit(with_key(job, "order"), retry_failed=True)
    assert (again.id, again.status) == (first.id, "queued")
    assert ledger.submit(with_key(job, "order"), retry_failed=True) == again, "it is no failure any more"
    other = with_key(job, "order", image=job.image.model_copy(update={"uri": "s3://in/other.jpg"}))
    with pytest.raises(IdempotencyConflict, match="If that one has failed, it can be retried"):
        ledger.submit(other, retry_failed=True)


def test_a_job_that_another_client_retries_and_finishes_meanwhile_does_not_fail_a_batch(
    ledger: Ledger, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = with_key(job, "one"), with_key(job, "two")
    ledger.submit(first)
    failed(ledger, first)
    retry = ledger.retry

    def late(job_id: str) -> StatusDocument:
        ledger.finish(claim(ledger, first).document, status="succeeded")
        return retry(job_id)

    retry(first.id)
    create = ledger._create_many

    def stale(entries: Sequence[Entry]) -> list[Entry]:
        held, *others = create(entries)
        return [replace(held, document=held.document.model_copy(update={"status": "failed"})), *others]

    monkeypatch.setattr(ledger, "_create_many", stale)
    monkeypatch.setattr(ledger, "retry", late)
    answers = ledger.submit_many([first, second], retry_failed=True)
    assert [getattr(one, "status", one) for one in answers] == ["succeeded", "queued"]


def test_an_expires_at_that_has_passed_does_not_end_a_retried_job(ledger: Ledger, job: Job) -> None:
    soon = job.model_copy(update={"expires_at": utc_now() + timedelta(seconds=0.2)})
    ledger.submit(soon)
    failed(ledger, soon)
    wait_for(lambda: soon.expires_at and soon.expires_at <= utc_now())
    assert ledger.retry(soon.id).expires_at is None
    later = job.model_copy(update={"id": new_id(), "expires_at": utc_now() + timedelta(hours=1)})
    ledger.submit(later)
    failed(ledger, later)
    assert ledger.retry(later.id).expires_at == later.expires_at
    assert claim(ledger, soon).outcome is ClaimOutcome.CLAIMED


def test_no_key_of_a_retried_job_expires(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(short(settings))
    job = with_key(job, "order")
    server = redis.Redis.from_url(settings.ledger)
    ledger.submit(job)
    failed(ledger, job)
    names = [
        name for kind in ("job", "idempotency") for name in server.keys(f"{settings.key_prefix}{kind}:*")
    ]
    assert [server.pttl(name) > 0 for name in names] == [True, True]
    ledger.retry(job.id)
    assert [server.pttl(name) for name in names] == [-1, -1]
    server.delete(*(name for name in names if b"idempotency" in name))
    failed(ledger, job)
    ledger.retry(job.id)
    assert ledger.submit(with_key(job, "order")).id == job.id, "a key that was lost is found again"


def test_one_of_many_concurrent_retries_succeeds(settings: Settings, job: Job) -> None:
    ledger = RedisLedger(settings)
    ledger.submit(job)
    ended = failed(ledger, job)
    found: list[StatusDocument] = []
    threads = [threading.Thread(target=lambda: found.append(ledger.retry(job.id))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {(one.revision, one.attempt) for one in found} == {(ended.revision + 1, 1)}
    assert len(found) == 16
