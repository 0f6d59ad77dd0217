import json
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from gradcam_worker.client.calls import REDIS_RETRIES
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import InvalidJob, LedgerUnavailable, UnknownJob
from gradcam_worker.ledger.dead_letters import DeadLetter, DeadLetters, make_replay, make_replay_id
from gradcam_worker.ledger.ledger import Ledger, Tenant
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.ids import new_id, utc_now
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, RecordingPublisher

WORKER = WorkerRef(id="gpu-1:7", device="cpu")
FAST = 1000.0  # jobs a second


class Setup:
    """A ledger in which jobs fail, and its dead letters."""

    def __init__(self, ledger: Ledger, job: Job) -> None:
        self.ledger, self.job, self.published = ledger, job, RecordingPublisher()
        self.client = GradcamClient(ledger=ledger, publish=self.published)
        self.dead = DeadLetters(
            ledger, lambda job, tenant: self.client.as_tenant(tenant if tenant.name else None).submit(job)
        )

    def failed(self, code: str = "storage_unavailable", **changes: Any) -> str:
        """The id of a job that failed."""
        given = {**self.job.model_dump(mode="json"), "id": new_id(), **changes}
        job = Job.parse(given)
        self.ledger.submit(job)
        return fail(self.ledger, job.id, code)

    def replay(self, *ids: str, rate: float = FAST) -> dict[str, str | None]:
        return {one.id: one.new_id for one in self.dead.replay(self.dead.find(ids), rate)}


def fail(ledger: Ledger, job_id: str, code: str = "storage_unavailable") -> str:
    document = ledger.claim(ledger.read(job_id), WORKER).document
    problem = {
        "type": f"urn:gradcam:problem:{code}",
        "title": "It failed",
        "detail": "The bucket is not there.",
        "code": code,
        "retryable": False,
        "attempt": document.attempt,
    }
    whole = StatusDocument.model_validate({**document.model_dump(mode="json"), "error": problem})
    ledger.finish(document, status="failed", error=whole.error)
    return job_id


@pytest.fixture(params=["memory", "redis"])
def setup(request: pytest.FixtureRequest, settings: Settings, job: Job) -> Setup:
    return Setup(MemoryLedger() if request.param == "memory" else RedisLedger(settings), job)


def test_a_replay_is_of_the_failed_jobs_tenant(setup: Setup) -> None:
    job = setup.job.model_copy(update={"id": new_id()})
    setup.ledger.submit(job, tenant=Tenant("acme"))
    fail(setup.ledger, job.id)
    (new,) = setup.replay(job.id).values()
    assert new
    assert setup.ledger.read(new, "acme").status == "queued"
    assert setup.ledger.read_tenant(new).name == "acme"


def test_dead_letters_are_found_newest_first_by_code_by_age_and_by_id(setup: Setup) -> None:
    first, second, third = (setup.failed(code) for code in ("timeout", "internal", "timeout"))
    setup.ledger.submit(setup.job)
    assert sorted(one.id for one in setup.dead.find()) == sorted([first, second, third])
    times = [one.failed_s for one in setup.dead.find()]
    assert times == sorted(times, reverse=True)
    assert {one.id for one in setup.dead.find(code="timeout")} == {first, third}
    assert [one.id for one in setup.dead.find([second])] == [second]
    assert len(setup.dead.find(since_s=60)) == 3
    assert setup.dead.find(since_s=-1) == []
    assert len(setup.dead.find(code="timeout", limit=1)) == 1
    [letter] = setup.dead.find([second])
    assert letter.document
    assert letter.document.error
    assert (letter.code, letter.document.error.detail) == ("internal", "The bucket is not there.")


def test_a_replay_is_a_new_job_with_the_same_content_and_the_old_one_stays_as_it_was(setup: Setup) -> None:
    old = setup.failed(idempotency_key="crm-42", metadata={"patient": "7"}, priority="low")
    before = setup.ledger.read(old)
    new = setup.replay(old)[old]
    assert new == make_replay_id(old) != old
    job = setup.ledger.read_job(new)
    assert isinstance(job, Job)
    assert (job.idempotency_key, job.metadata) == (None, {"patient": "7", "replay_of": old})
    assert (job.image, job.network, job.target, job.priority) == (
        setup.job.image,
        setup.job.network,
        setup.job.target,
        "low",
    )
    assert setup.ledger.read(new).status == "queued"
    assert [one.id for one in setup.published.jobs] == [new]
    assert setup.ledger.read(old) == before
    assert setup.dead.find() == []


def test_a_replay_that_is_interrupted_and_repeated_creates_one_job(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = setup.failed(expires_at=(utc_now() + timedelta(seconds=0.5)).isoformat())
    letters = setup.dead.find()

    def interrupted(job_id: str) -> None:
        raise KeyboardInterrupt(job_id)

    with monkeypatch.context() as patched:
        patched.setattr(setup.ledger, "drop_dead_letter", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(setup.dead.replay(letters, FAST))
    time.sleep(0.6)  # the replay would be another job now: it would not expire
    assert setup.replay() == {old: make_replay_id(old)}
    assert {one.id for one in setup.published.jobs} == {make_replay_id(old)}
    assert setup.ledger.count_jobs() == (1, 0)
    assert setup.dead.find() == []


def test_replays_that_race_yield_one_job(setup: Setup) -> None:
    ids = [setup.failed() for _ in range(10)]
    letters = setup.dead.find()
    threads = [threading.Thread(target=lambda: list(setup.dead.replay(letters, FAST))) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert setup.ledger.count_jobs() == (10, 0)
    assert setup.ledger.read_many([make_replay_id(one) for one in ids]).keys() == set(
        map(make_replay_id, ids)
    )


def test_a_replay_that_fails_is_a_dead_letter_of_its_own(setup: Setup) -> None:
    old = setup.failed()
    new = setup.replay()[old]
    assert new
    fail(setup.ledger, new)
    assert [one.id for one in setup.dead.find()] == [new]
    newest = setup.replay()[new]
    assert newest
    job = setup.ledger.read_job(newest)
    assert isinstance(job, Job)
    assert job.metadata["replay_of"] == new


def test_only_dead_letters_are_replayed_and_for_other_jobs_the_reason_is_given(setup: Setup) -> None:
    old = setup.failed()
    setup.replay(old)
    with pytest.raises(UnknownJob, match=f"has been replayed already, as {make_replay_id(old)}"):
        setup.dead.find([old])
    setup.ledger.submit(setup.job)
    with pytest.raises(UnknownJob, match="is queued: only a failed one can be replayed"):
        setup.dead.find([setup.job.id])
    with pytest.raises(UnknownJob, match="has no job"):
        setup.dead.find([new_id()])


def test_a_refused_message_is_listed_and_cannot_be_replayed(setup: Setup) -> None:
    message_id, good = new_id(), setup.failed()
    setup.ledger.refuse(message_id, {"image": 7}, InvalidJob("This is not a job."))
    found = {one.id: one for one in setup.dead.find()}
    assert found[message_id].code == "invalid_job"
    assert "can read no job in its message" in str(setup.dead.prepare_replay(found[message_id]))
    assert setup.replay() == {message_id: None, good: make_replay_id(good)}
    assert [one.id for one in setup.dead.find()] == [message_id], "it is not forgotten for that"


def test_a_letter_whose_job_is_forgotten_cannot_be_replayed(setup: Setup) -> None:
    forgotten = DeadLetter(new_id(), time.time(), None)
    assert forgotten.code == "forgotten"
    [replayed] = setup.dead.replay([forgotten], FAST)
    assert (replayed.new_id, "can read no job" in replayed.why) == (None, True)


def test_the_oldest_is_replayed_first_and_the_rate_is_kept(setup: Setup) -> None:
    ids = []
    for _ in range(6):
        ids.append(setup.failed())
        time.sleep(0.003)  # two of one millisecond have no order
    begun = time.monotonic()
    assert list(setup.replay(rate=10)) == ids
    assert time.monotonic() - begun >= 5 / 10


def test_an_unreachable_ledger_ends_a_replay(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    setup.failed()
    letters = setup.dead.find()

    def away(jobs: Sequence[Job], **_: Any) -> None:
        message = f"The ledger cannot be reached for {jobs[0].id}."
        raise LedgerUnavailable(message)

    monkeypatch.setattr(setup.ledger, "enter_many", away)
    monkeypatch.setattr("gradcam_worker.client.calls.REDIS_RETRIES", replace(REDIS_RETRIES, total_s=0.1))
    with pytest.raises(LedgerUnavailable):
        list(setup.dead.replay(letters, FAST))
    assert len(setup.dead.find()) == 1


def test_full_metadata_is_kept_as_it_is(job: Job) -> None:
    full = {f"key {number}": "value" for number in range(16)}
    assert make_replay(job.model_copy(update={"metadata": full}), job.id).metadata == full
    full.popitem()
    assert make_replay(job.model_copy(update={"metadata": full}), job.id).metadata["replay_of"] == job.id


def test_an_expires_at_is_kept_only_if_it_has_not_passed(job: Job) -> None:
    past, future = utc_now() - timedelta(seconds=1), utc_now() + timedelta(hours=1)
    assert make_replay(job.model_copy(update={"expires_at": past}), job.id).expires_at is None
    assert make_replay(job.model_copy(update={"expires_at": future}), job.id).expires_at == future


def test_a_replay_is_a_valid_job(job: Job) -> None:
    ulid = job.model_copy(update={"id": "01ARZ3NDEKTSV4RRFFQ69G5FAV"})
    again = make_replay(ulid, ulid.id)
    assert Job.parse(json.loads(again.to_json())) == again
