"""The truth about every job: submit once, claim, advance, finish. The queue is a doorbell.

A job is written here before its message is published, and every later change is one atomic
compare-and-set on (attempt, revision), so an attempt that has been overtaken can change nothing.
`Ledger` holds the rules; a backend (`redis_ledger`) holds two atomic steps.

    queued -> running -> succeeded | failed        running -> retrying -> running (next attempt)
    queued -> expired                              running -> running (next attempt), failed
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from worker.contract import Job, Problem, StatusDocument, WorkerRef, utc_now
from worker.errors import (
    AttemptFenced,
    GradcamError,
    IdempotencyConflict,
    JobExpired,
    MaxAttemptsExceeded,
    UnknownJob,
)

Outcome = Literal["claimed", "finished", "ended"]


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

    `claimed`: run it. `finished`: it was final already, the message is a duplicate. `ended`: the
    claim itself made it final, because it had expired or had used up its attempts.
    """

    outcome: Outcome
    document: StatusDocument


class Ledger(ABC):
    """The rules of a job's life. Raises LedgerUnavailable wherever it cannot be reached."""

    @abstractmethod
    def _create(self, entry: Entry) -> Entry:
        """Atomically: the entry that has this idempotency key or id already, else this new one."""

    @abstractmethod
    def _swap(self, before: StatusDocument, after: StatusDocument) -> bool:
        """Atomically: replace `before` by `after`, if (attempt, revision) are still those of `before`."""

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
        fingerprint = hashlib.sha256(job.fingerprint().encode()).hexdigest()
        document = _fresh(job.id, job)
        held = self._create(Entry(fingerprint, job.to_json(), job.idempotency_key, document))
        if held.fingerprint != fingerprint:
            theirs = held.document.id
            what = f"id {job.id}" if theirs == job.id else f"idempotency key {job.idempotency_key!r}"
            message = f"The {what} belongs to a different job, {theirs}: use a new one."
            raise IdempotencyConflict(message)
        return held.document

    def refuse(self, job_id: str, payload: object, error: GradcamError) -> StatusDocument:
        """Write down that a message could not become a job. A job that has this id is left alone."""
        text = json.dumps(payload, sort_keys=True, default=repr)
        problem = Problem.of(error, stage="receive", attempt=0)
        document = _fresh(job_id).model_copy(
            update={"status": "failed", "error": problem, "completed_at": utc_now()}
        )
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        return self._create(Entry(fingerprint, "null", None, document)).document

    def read(self, job_id: str) -> StatusDocument:
        """The document of a job. Raises UnknownJob."""
        documents = self.read_many([job_id])
        if job_id not in documents:
            message = f"The ledger has no job {job_id}: its id is wrong, or it ended too long ago."
            raise UnknownJob(message)
        return documents[job_id]

    def claim(self, job: Job, worker: WorkerRef) -> Claim:
        """Take the next attempt at a job.

        A job that still counts as running is taken over: its message came back, so the attempt
        before is dead, or will be fenced. Raises IdempotencyConflict as `submit` does.
        """
        while True:
            before = self.submit(job)  # which also enters a job that a stranger published by name
            if before.final:
                return Claim("finished", before)
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
                after = _next(before, status=status, error=problem, completed_at=now, stage=None)
            else:
                after = _next(
                    before,
                    status="running",
                    stage="fetch",
                    attempt=before.attempt + 1,
                    started_at=now,
                    worker=worker,
                    error=None,
                    metrics={"queue_s": round((now - before.queued_at).total_seconds(), 4)},
                )
            if self._swap(before, after):
                return Claim("ended" if ended else "claimed", after)

    def advance(self, document: StatusDocument, **changes: Any) -> StatusDocument:
        """Write changes to a job that this attempt holds; final with a final `status`.

        Raises AttemptFenced where another attempt holds it by now.
        """
        if changes.get("status") in {"succeeded", "failed"}:
            changes = {"stage": None, "completed_at": utc_now(), **changes}
        after = _next(document, **changes)
        if not self._swap(document, after):
            message = f"Attempt {document.attempt} of job {document.id} was overtaken: it must stop."
            raise AttemptFenced(message)
        return after


def _fresh(job_id: str, job: Job | None = None) -> StatusDocument:
    now = utc_now()
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


def _next(before: StatusDocument, **changes: Any) -> StatusDocument:
    """The next revision of a document."""
    return before.model_copy(update={"revision": before.revision + 1, "updated_at": utc_now(), **changes})
