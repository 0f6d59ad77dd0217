"""The state machine of a job: pure functions from one revision of its document to the next.

    queued -> running -> succeeded | failed | canceled        running -> retrying -> queued
    queued, retrying -> canceled | expired                    lease expired: running -> queued | failed
    failed -> queued, by an explicit request to retry

succeeded, failed, canceled and expired are final. Only a failed job can leave its final state. The ledger's
subclasses store the documents.
"""

from datetime import datetime
from typing import Any

from gradcam_worker.errors import GradcamError, JobCanceled, JobExpired, MaxAttemptsExceeded, WorkerLost
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.status import FINAL, Problem, StatusDocument, WorkerRef
from gradcam_worker.schemas.work import Work, terms_of


def new_document(job_id: str, work: Work | None = None, entered_at: datetime | None = None) -> StatusDocument:
    """Create the first document of a job or shard.

    Args:
        job_id: Its id.
        work: The job or shard; None for a message that contains neither.
        entered_at: When it is entered; None: now.

    Returns:
        The document, queued, at revision 1.
    """
    now, terms = entered_at or utc_now(), terms_of(work) if work else None
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


def next_revision(before: StatusDocument, **changes: Any) -> StatusDocument:
    """Create the next revision of a document.

    Args:
        before: The current revision.
        changes: Fields to replace. A final `status` also clears stage and rows and sets `completed_at`;
            `passes` are cleared unless they are among the changes.

    Returns:
        The next revision.
    """
    now = utc_now()
    if changes.get("status") in FINAL:
        changes = {"stage": None, "rows": None, "completed_at": now, **changes}
    update = {"revision": before.revision + 1, "updated_at": now, "passes": None, **changes}
    return before.model_copy(update=update)


def begin_attempt(before: StatusDocument, worker: WorkerRef, now: datetime) -> StatusDocument:
    """Begin the next attempt on a worker."""
    return next_revision(
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


def claim(before: StatusDocument, worker: WorkerRef) -> StatusDocument:
    """Claim a queued job for a worker.

    Args:
        before: A queued document.
        worker: The worker that claims it.

    Returns:
        The running document; expired where its time to start has passed, failed where all attempts are used.
    """
    now = utc_now()
    if before.expires_at and before.expires_at <= now:
        return expire(before)
    return (
        _end_exhausted(before)
        if before.attempt >= before.max_attempts
        else begin_attempt(before, worker, now)
    )


def expire(before: StatusDocument) -> StatusDocument:
    """End a waiting job whose `expires_at` has passed."""
    what = "its next attempt began" if before.attempt else "it was started"
    error = JobExpired(f"The job expired at {before.expires_at}, before {what}.")
    return _end_with_error(before, "expired", error, "queue")


def cancel(before: StatusDocument) -> StatusDocument:
    """Cancel a job: a waiting one ends now, a running one is marked for its worker to end."""
    marked = before.model_copy(update={"cancel_requested_at": utc_now()})
    return next_revision(marked) if before.status == "running" else _end_canceled(marked, "queue")


def requeue(before: StatusDocument) -> StatusDocument:
    """Queue a job whose pause before the next attempt is over."""
    return next_revision(before, status="queued", queued_at=utc_now())


def retry(before: StatusDocument, attempts: int) -> StatusDocument:
    """Queue a failed job again.

    Attempts are counted on from the previous ones, so that no earlier attempt can change the job.

    Args:
        before: A failed document.
        attempts: The number of further attempts.

    Returns:
        The queued document. An `expires_at` that has passed is removed.
    """
    now = utc_now()
    first = new_document(before.id).model_copy(
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
    return next_revision(first, queued_at=now)


def advance(before: StatusDocument, **changes: Any) -> StatusDocument:
    """Apply a worker's changes to a running job.

    Args:
        before: The current revision.
        changes: Fields to replace.

    Returns:
        The next revision: canceled instead of retrying where cancellation was requested.
    """
    if before.cancel_requested_at and changes.get("status") == "retrying":
        measured = before.model_copy(update={"metrics": changes.get("metrics", before.metrics)})
        return _end_canceled(measured, changes["error"].stage if "error" in changes else before.stage)
    return next_revision(before, **changes)


def release(before: StatusDocument) -> StatusDocument:
    """Queue a running job whose worker is stopping. The attempt does not count."""
    if before.cancel_requested_at:
        return _end_canceled(before, before.stage)
    return next_revision(
        before,
        status="queued",
        stage=None,
        rows=None,
        worker=None,
        queued_at=utc_now(),
        max_attempts=before.max_attempts + 1,
    )


def expire_lease(before: StatusDocument) -> StatusDocument:
    """Take a running job from a worker that has not renewed its lease.

    Args:
        before: A running document.

    Returns:
        The queued document, with the error `worker_lost`; failed where all attempts are used, canceled where
        cancellation was requested.
    """
    if before.cancel_requested_at:
        return _end_canceled(before, before.stage)
    if before.attempt >= before.max_attempts:
        return _end_exhausted(before)
    worker = before.worker.id if before.worker else "its worker"
    error = WorkerLost(f"Attempt {before.attempt} ended without a result: {worker} was killed or lost.")
    problem = Problem.of(error, stage=before.stage, attempt=before.attempt)
    rows = (
        before.rows if before.rows and before.rows.search else None
    )  # the next attempt continues the search
    return next_revision(before, status="queued", stage=None, queued_at=utc_now(), error=problem, rows=rows)


def is_suspected(document: StatusDocument) -> bool:
    """Whether a queued job's last worker died, perhaps because of the job, which then runs alone."""
    code = document.error.code if document.error else None
    return document.status == "queued" and code == WorkerLost.code


def name_event(before: StatusDocument | None, after: StatusDocument) -> str:
    """Name the event that a change is reported as.

    Args:
        before: The revision before; None for a new job.
        after: The revision after.

    Returns:
        The event, such as job.succeeded; empty for a change that is not reported.
    """
    if before and (before.status, before.attempt) == (after.status, after.attempt):
        return "job.progress" if before.stage != after.stage else ""
    return "job.started" if after.status == "running" else f"job.{after.status}"


def _end_canceled(before: StatusDocument, stage: str | None) -> StatusDocument:
    error = JobCanceled(f"The job was cancelled on request, at {before.cancel_requested_at}.")
    return _end_with_error(before, "canceled", error, stage)


def _end_exhausted(before: StatusDocument) -> StatusDocument:
    error = MaxAttemptsExceeded(
        f"The job was started {before.attempt} time(s), as often as max_attempts allows, "
        "and never finished: its worker was killed or lost each time."
    )
    return _end_with_error(before, "failed", error, "queue")


def _end_with_error(
    before: StatusDocument, status: str, error: GradcamError, stage: str | None
) -> StatusDocument:
    problem = Problem.of(error, stage=stage, attempt=before.attempt)
    return next_revision(before, status=status, error=problem)
