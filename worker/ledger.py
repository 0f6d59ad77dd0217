"""The truth about every job: submit once, claim, advance, finish. The queue is a doorbell.

A job is written here before its message is published, and every later change is one atomic
compare-and-set on (attempt, revision), so an attempt that has been overtaken can change nothing.
`Ledger` holds the rules; a backend (`redis_ledger`) holds two atomic steps.

    queued -> running -> succeeded | failed        running -> retrying -> running (next attempt)
    queued -> expired                              running -> running (next attempt), failed
"""

import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from worker.contract import FINAL, ID_PATTERN, Job, Problem, StatusDocument, WorkerRef
from worker.deadline import Deadline
from worker.errors import (
    AttemptFenced,
    GradcamError,
    IdempotencyConflict,
    InvalidJob,
    JobExpired,
    LedgerUnavailable,
    MaxAttemptsExceeded,
    UnknownJob,
)
from worker.wire import utc_now

ASK_AGAIN_S = 0.5  # between two tries to reach the ledger
Outcome = Literal["claimed", "held", "finished", "ended"]


@dataclass(frozen=True)
class Entry:
    """What the ledger holds for a job from the start: its fingerprint tells it from any other."""

    fingerprint: str
    job: str  # JSON
    idempotency_key: str | None
    document: StatusDocument


@dataclass(frozen=True)
class Claim:
    """What a worker learned when it asked for a job.

    `claimed`: run it. `held`: a worker that seems alive has it: ask again later. `finished`: it was
    final already, the message is a duplicate. `ended`: the claim itself made it final, because it had
    expired or had used up its attempts.
    """

    outcome: Outcome
    document: StatusDocument


class Ledger(ABC):
    """The rules of a job's life. Raises LedgerUnavailable wherever it cannot be reached."""

    @abstractmethod
    def _create(self, entry: Entry) -> Entry:
        """Atomically: the entry that has this idempotency key or id already, else this new one."""

    @abstractmethod
    def _find(self, job_id: str) -> Entry | None:
        """The entry of a job."""

    @abstractmethod
    def _swap(self, before: StatusDocument, after: StatusDocument, fingerprint: str | None = None) -> bool:
        """Atomically: replace `before` by `after`, if (attempt, revision) are still those of `before`.

        With a fingerprint, only if the job has that one, and `before` is to the letter what is held.
        """

    @abstractmethod
    def read_many(self, ids: Sequence[str]) -> dict[str, StatusDocument]:
        """The documents of those of these jobs that the ledger knows."""

    @abstractmethod
    def counts(self) -> tuple[int, int]:
        """How many jobs are queued (waiting for a retry included), and how many are running."""

    def submit(self, job: Job) -> StatusDocument:
        """Enter a job, once: the same job with the same id or idempotency key finds the first.

        Raises IdempotencyConflict where the id or the key belongs to a different job.
        """
        fingerprint = _fingerprint(job)
        document = _fresh(job.id, job)
        held = self._create(Entry(fingerprint, job.to_json(), job.idempotency_key, document))
        if held.fingerprint != fingerprint:
            theirs = held.document.id
            what = f"id {job.id}" if theirs == job.id else f"idempotency key {job.idempotency_key!r}"
            message = f"The {what} belongs to a different job, {theirs}: use a new one."
            raise IdempotencyConflict(message)
        return held.document

    def receive(self, job_id: str, payload: object) -> tuple[Job, StatusDocument]:
        """The job that a message is about: the ledger's own, or the message's, which is entered now.

        Raises InvalidJob, IdempotencyConflict.
        """
        held = self._find(job_id)
        if held:
            return Job.parse(json.loads(held.job)), held.document
        job = Job.parse(payload)
        document = self.submit(job)  # perhaps the first with this idempotency key, which has its own id
        return job.model_copy(update={"id": document.id}), document

    def refuse(self, job_id: str, payload: object, error: GradcamError) -> StatusDocument:
        """Write down that a message could not become a job.

        A good job that has this id is left alone; one that this version cannot read is failed.
        """
        text = json.dumps(payload, sort_keys=True, default=repr)
        problem = Problem.of(error, stage="receive", attempt=0)
        document = _fresh(job_id).model_copy(
            update={"status": "failed", "error": problem, "completed_at": utc_now()}
        )
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        held = self._create(Entry(fingerprint, "null", None, document))
        if held.document.final or _readable(held):
            return held.document
        return self.advance(held.document, status="failed", error=problem)

    def read(self, job_id: str) -> StatusDocument:
        """The document of a job. Raises UnknownJob."""
        documents = self.read_many([job_id]) if re.fullmatch(ID_PATTERN, job_id) else {}
        if job_id not in documents:
            message = f"The ledger has no job {job_id}: its id is wrong, or it ended too long ago."
            raise UnknownJob(message)
        return documents[job_id]

    def take(self, job: Job, entered_at: datetime, worker: WorkerRef) -> StatusDocument | None:
        """Claim a job that nobody has touched since it was entered, without reading it first.

        None where it was touched, is another one, has expired, or was entered at another moment: see
        `receive` and `claim`, which find out.
        """
        now = utc_now()
        if job.expires_at and job.expires_at <= now:
            return None
        before = _fresh(job.id, job, entered_at)
        after = _begun(before, worker, now)
        return after if self._swap(before, after, _fingerprint(job)) else None

    def claim(
        self,
        job: Job,
        before: StatusDocument,
        worker: WorkerRef,
        *,
        redelivered: bool = False,
        lost_after_s: float = 3600,
    ) -> Claim:
        """Take the next attempt at a job, whose last known document is `before`.

        A running job is taken over where its message was `redelivered`, which the broker does when the
        worker that had it is gone, or where it began `lost_after_s` ago; the attempt before is fenced.
        """
        while True:
            if before.final:
                return Claim("finished", before)
            if before.status == "running" and not redelivered and _age_s(before) < lost_after_s:
                return Claim("held", before)
            now = utc_now()
            ended: GradcamError | None = None
            if before.status == "queued" and job.expires_at and job.expires_at <= now:
                ended = JobExpired(f"The job expired at {job.expires_at}, before it was started.")
            elif before.attempt >= job.max_attempts:
                ended = MaxAttemptsExceeded(
                    f"The job was started {before.attempt} time(s), as often as max_attempts allows, "
                    "and never came to an end: its worker was killed or lost each time."
                )
            if ended:
                problem = Problem.of(ended, stage="queue", attempt=before.attempt)
                status = "expired" if isinstance(ended, JobExpired) else "failed"
                after = _next(before, status=status, error=problem)
            else:
                after = _begun(before, worker, now)
            if self._swap(before, after):
                return Claim("ended" if ended else "claimed", after)
            before = self.read(before.id)

    def advance(self, document: StatusDocument, *, patience_s: float = 0, **changes: Any) -> StatusDocument:
        """Write changes to a job that this attempt holds; final with a final `status`.

        A ledger out of reach is asked again for `patience_s`: writing the same twice is harmless.
        Raises AttemptFenced where another attempt holds the job by now.
        """
        after, patience = _next(document, **changes), Deadline(patience_s)
        while True:
            try:
                swapped = self._swap(document, after)
            except LedgerUnavailable:
                if not patience.left_s():
                    raise
                time.sleep(ASK_AGAIN_S)
            else:
                break
        if not swapped:
            message = f"Attempt {document.attempt} of job {document.id} was overtaken: it must stop."
            raise AttemptFenced(message)
        return after


def _fingerprint(job: Job) -> str:
    return hashlib.sha256(job.fingerprint().encode()).hexdigest()


def _fresh(job_id: str, job: Job | None = None, entered_at: datetime | None = None) -> StatusDocument:
    now = entered_at or utc_now()
    return StatusDocument(
        id=job_id,
        status="queued",
        max_attempts=job.max_attempts if job else 0,
        created_at=now,
        queued_at=now,
        updated_at=now,
        expires_at=job.expires_at if job else None,
        metadata=job.metadata if job else {},
    )


def _readable(entry: Entry) -> bool:
    try:
        Job.parse(json.loads(entry.job))
    except InvalidJob:
        return False
    return True


def _age_s(document: StatusDocument) -> float:
    """Seconds since the running attempt began."""
    return (utc_now() - (document.started_at or document.created_at)).total_seconds()


def _begun(before: StatusDocument, worker: WorkerRef, now: datetime) -> StatusDocument:
    """The next attempt, which begins now."""
    return _next(
        before,
        status="running",
        stage="fetch",
        attempt=before.attempt + 1,
        started_at=now,
        worker=worker,
        error=None,
        metrics={"queue_s": round((now - before.queued_at).total_seconds(), 4)},
    )


def _next(before: StatusDocument, **changes: Any) -> StatusDocument:
    """The next revision of a document. A final one is at no stage, and says when it was completed."""
    now = utc_now()
    if changes.get("status") in FINAL:
        changes = {"stage": None, "completed_at": now, **changes}
    return before.model_copy(update={"revision": before.revision + 1, "updated_at": now, **changes})
