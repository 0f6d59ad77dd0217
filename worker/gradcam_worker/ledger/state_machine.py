"""How a job's document changes, without saying where it is kept.

    queued -> running -> succeeded | failed | canceled        running -> retrying -> queued
    queued, retrying -> canceled | expired                    lease lost: running -> queued, or failed
    failed -> queued, where somebody asks for it

The states on the right of the first line, and expired, are final and absorb otherwise.
"""

from datetime import datetime
from typing import Any

from gradcam_worker.errors import GradcamError, JobCanceled, JobExpired, MaxAttemptsExceeded, WorkerLost
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.shard import Work, terms_of
from gradcam_worker.schemas.status import FINAL, Problem, StatusDocument, WorkerRef


def fresh(job_id: str, job: Work | None = None, entered_at: datetime | None = None) -> StatusDocument:
    """A job as it is entered; without a job, what a message left that is none."""
    now, terms = entered_at or utc_now(), terms_of(job) if job else None
    return StatusDocument(
        id=job_id,
        status="queued",
        max_attempts=terms.max_attempts if terms else 0,
        created_at=now,
        queued_at=now,
        updated_at=now,
        expires_at=terms.expires_at if terms else None,
        metadata=terms.metadata if terms else {},
        traceparent=terms.traceparent if terms else None,
    )


def following(before: StatusDocument, **changes: Any) -> StatusDocument:
    """The next revision of a document. A final one is at no stage, and says when it was completed."""
    now = utc_now()
    if changes.get("status") in FINAL:
        changes = {"stage": None, "rows": None, "completed_at": now, **changes}
    return before.model_copy(update={"revision": before.revision + 1, "updated_at": now, **changes})


def begun(before: StatusDocument, worker: WorkerRef, now: datetime) -> StatusDocument:
    """The next attempt, which begins now."""
    return following(
        before,
        status="running",
        stage="fetch",
        attempt=before.attempt + 1,
        started_at=now,
        worker=worker,
        error=None,
        rows=None,
        metrics={"queue_s": round((now - before.queued_at).total_seconds(), 4)},
    )


def claimed(before: StatusDocument, worker: WorkerRef) -> StatusDocument:
    """A queued job whose turn it is: it begins, unless it comes too late or was begun too often."""
    now = utc_now()
    if before.expires_at and before.expires_at <= now:
        return expired(before)
    return _worn_out(before) if before.attempt >= before.max_attempts else begun(before, worker, now)


def expired(before: StatusDocument) -> StatusDocument:
    """Its time passed while it waited."""
    what = "its next attempt began" if before.attempt else "it was started"
    error = JobExpired(f"The job expired at {before.expires_at}, before {what}.")
    return _ended(before, "expired", error, "queue")


def canceled(before: StatusDocument) -> StatusDocument:
    """Somebody asked for it: a waiting job ends, a running one is marked, and its worker ends it."""
    marked = before.model_copy(update={"cancel_requested_at": utc_now()})
    return following(marked) if before.status == "running" else _canceled(marked, "queue")


def requeued(before: StatusDocument) -> StatusDocument:
    """The pause before its next attempt is over."""
    return following(before, status="queued", queued_at=utc_now())


def tried_again(before: StatusDocument, attempts: int) -> StatusDocument:
    """A failed job that somebody wants to be tried again: it has all its attempts once more.

    They count on, so that none of before can change anything. A time to expire that has passed is left out.
    """
    now = utc_now()
    first = fresh(before.id).model_copy(
        update={
            "revision": before.revision,
            "attempt": before.attempt,
            "max_attempts": before.attempt + attempts,
            "created_at": before.created_at,
            "expires_at": before.expires_at if before.expires_at and before.expires_at > now else None,
            "metadata": before.metadata,
            "traceparent": before.traceparent,
        }
    )
    return following(first, queued_at=now)


def advanced(before: StatusDocument, **changes: Any) -> StatusDocument:
    """As `following`; but a job that is to stop gets no other attempt, whatever ended this one."""
    if before.cancel_requested_at and changes.get("status") == "retrying":
        kept = before.model_copy(update={"metrics": changes.get("metrics", before.metrics)})
        return _canceled(kept, changes["error"].stage if "error" in changes else before.stage)
    return following(before, **changes)


def handed_back(before: StatusDocument) -> StatusDocument:
    """Its worker has to stop: this attempt does not count."""
    if before.cancel_requested_at:
        return _canceled(before, before.stage)
    return following(
        before,
        status="queued",
        stage=None,
        rows=None,
        worker=None,
        queued_at=utc_now(),
        max_attempts=before.max_attempts + 1,
    )


def lost(before: StatusDocument) -> StatusDocument:
    """Its worker has not been heard of for too long: it runs again, alone, while it has attempts left."""
    if before.cancel_requested_at:
        return _canceled(before, before.stage)
    if before.attempt >= before.max_attempts:
        return _worn_out(before)
    worker = before.worker.id if before.worker else "its worker"
    error = WorkerLost(f"Attempt {before.attempt} ended without a word: {worker} was killed or lost.")
    problem = Problem.of(error, stage=before.stage, attempt=before.attempt)
    rows = before.rows if before.rows and before.rows.search else None  # the next attempt goes on with it
    return following(before, status="queued", stage=None, queued_at=utc_now(), error=problem, rows=rows)


def suspected(document: StatusDocument) -> bool:
    """Whether a worker died under this job, perhaps of it: then it gets a process for itself."""
    code = document.error.code if document.error else None
    return document.status == "queued" and code == WorkerLost.code


def event(before: StatusDocument | None, after: StatusDocument) -> str:
    """What a change is called by those who are told of it; empty where it is nothing to tell."""
    if before and (before.status, before.attempt) == (after.status, after.attempt):
        return "job.progress" if before.stage != after.stage else ""
    return "job.started" if after.status == "running" else f"job.{after.status}"


def _canceled(before: StatusDocument, stage: str | None) -> StatusDocument:
    error = JobCanceled(f"The job was cancelled on request, at {before.cancel_requested_at}.")
    return _ended(before, "canceled", error, stage)


def _worn_out(before: StatusDocument) -> StatusDocument:
    error = MaxAttemptsExceeded(
        f"The job was started {before.attempt} time(s), as often as max_attempts allows, "
        "and never came to an end: its worker was killed or lost each time."
    )
    return _ended(before, "failed", error, "queue")


def _ended(before: StatusDocument, status: str, error: GradcamError, stage: str | None) -> StatusDocument:
    problem = Problem.of(error, stage=stage, attempt=before.attempt)
    return following(before, status=status, error=problem)
