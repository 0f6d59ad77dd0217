"""One message in, one `Disposition` out."""

import contextlib
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import partial
from typing import Any

from pydantic import AwareDatetime, TypeAdapter

from gradcam_worker.errors import (
    AttemptFenced,
    GradcamError,
    IdempotencyConflict,
    InternalError,
    InvalidJob,
    JobCanceled,
    LedgerUnavailable,
    StorageUnavailable,
    UnknownBackfill,
    WorkerUnfit,
)
from gradcam_worker.execution import pipeline, shards
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.execution.pipeline import JobContext, Stage
from gradcam_worker.execution.services import Services
from gradcam_worker.ledger.ledger import ClaimOutcome, Ledger
from gradcam_worker.ledger.state_machine import suspected
from gradcam_worker.observability import logs, tracing
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.observability.tracing import NO_TRACES, Traces
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.gate import ExclusiveGate
from gradcam_worker.resilience.retry import HALF_OR_MORE, RetryPolicy
from gradcam_worker.resilience.stall import StallDetector
from gradcam_worker.schemas.earlier import row_state
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import ID_PATTERN, Job
from gradcam_worker.schemas.shard import Shard, Work, parse, terms_of
from gradcam_worker.schemas.status import Problem, StatusDocument, WorkerRef
from gradcam_worker.settings import Settings

log = logging.getLogger("gradcam")

WRITE_STAGE_EVERY_S = 0.5  # a stage that is shorter is not worth a round trip
WRITE_FOR_S = 30  # how long the ledger is tried for a final state or a checkpoint
TIMESTAMP = TypeAdapter(AwareDatetime)
Kind = type[Job] | type[Shard]
WRONG_QUEUE: dict[Kind, str] = {  # why it is refused where a queue is for something else
    Job: "This is a shard, and among jobs none is taken: only `gradcam backfill` submits shards.",
    Shard: "This is no shard, and its queue is for nothing else: send jobs to gradcam.interactive or "
    "gradcam.bulk.",
}


class Disposition(Enum):
    """What becomes of a message. The values are the `outcome` label of the metric `job_attempts_total`."""

    FINISHED = "done"
    """The job is final: succeeded, failed, canceled or expired."""

    RETRY = "later"
    """A retryable error: the ledger holds when the next attempt is due, and the reaper publishes it then."""

    DROP = "dropped"
    """The job was final already, or another attempt holds it: the message is of no use."""

    REQUEUE = "returned"
    """The ledger is out of reach, or this worker is unfit: the message goes back to the queue.

    `JobHandler.handle` does not return this one: it raises the reason.
    """


@dataclass(frozen=True)
class JobHandler:
    """Handles the messages of one worker process."""

    settings: Settings
    ledger: Ledger
    services: Services
    worker: WorkerRef
    leases: LeaseManager
    breaker: CircuitBreaker
    gate: ExclusiveGate = field(default_factory=ExclusiveGate)
    observer: Observer = NULL_OBSERVER
    traces: Traces = NO_TRACES
    admits: Callable[[Shard], bool] = lambda _: (
        False
    )  # whether a shard is of a backfill that the ledger knows
    stall: StallDetector = field(default_factory=lambda: StallDetector(lambda: False, math.inf))

    def handle(
        self,
        payload: object,
        message_id: str,
        *,
        entered_at: object = None,
        kind: Kind = Job,
    ) -> Disposition:
        """Handle one message, to the end of the attempt that it starts.

        Args:
            payload: What the message holds: a job, a shard, or `{"id": ...}` of one in the ledger.
            message_id: The broker's id of the message.
            entered_at: When its job was entered in the ledger, if the message says so.
            kind: What the queue that the message comes from is for.

        Returns:
            What became of it. Never `Disposition.REQUEUE`.

        Raises:
            LedgerUnavailable: The ledger is out of reach. The message has to go back to the queue.
            WorkerUnfit: This worker cannot run jobs now. The message has to go back to the queue.
        """
        disposition = Disposition.REQUEUE
        try:
            with self.stall.running_job(), logs.log_context(job_id=_job_id(payload, message_id)):
                disposition = self._process(payload, message_id, entered_at, kind)
        finally:
            self.observer.message_handled(disposition.value)
        return disposition

    def _process(self, payload: object, message_id: str, entered_at: object, kind: Kind) -> Disposition:
        if self.breaker.open_reason:
            raise WorkerUnfit(self.breaker.open_reason)
        job_id = _job_id(payload, message_id)
        try:
            if entered_at and kind is Job and (end := self._try_fast_claim(payload, entered_at)):
                return end
            while not (end := self._claim(job_id, payload, kind)):
                pass
        except (InvalidJob, IdempotencyConflict, UnknownBackfill) as error:
            if payload == {"id": job_id} and not self.ledger.route(job_id):
                log.warning("job %s is not in the ledger any more: its message is dropped", job_id)
                return Disposition.DROP
            self.refuse(job_id, payload, error)
            return Disposition.FINISHED
        except AttemptFenced as error:
            log.warning("%s", error)
            if payload != {"id": job_id} and not self.ledger.route(job_id):
                message = f"The ledger has lost job {job_id}: its message goes back, and enters it again."
                raise LedgerUnavailable(message) from error
            return Disposition.DROP
        return end

    def _try_fast_claim(self, payload: object, entered_at: object) -> Disposition | None:
        """Claim an untouched job with one request to the ledger, and run it. None: `_claim` has to look."""
        try:
            job, moment = Job.parse(payload), TIMESTAMP.validate_python(entered_at)
        except (InvalidJob, ValueError):
            return None  # the ledger may know better
        with self.gate.enter(job.id) as free:
            asked_at = utc_now()
            document = self.ledger.claim_fresh(job, moment, self.worker) if free else None
            return self._run(job, document, asked_at) if document else None

    def _claim(self, job_id: str, payload: object, kind: Kind) -> Disposition | None:
        """Read the job in the ledger, claim it and run it. None: it has changed in between."""
        job, document = self.ledger.get_or_create(job_id, _add_id(payload, job_id), partial(self._read, kind))
        if job is None:
            log.info("job %s is %s: nothing to do", document.id, document.status)
            return Disposition.DROP
        if end := self._reject_wrong_queue(job, document, kind):
            return end
        # A job under which a worker died runs alone in the process. Wait for that before the attempt begins.
        with self.gate.enter(job.id, alone=suspected(document)) as free:
            if not free:
                return Disposition.DROP
            asked_at = utc_now()
            claim = self.ledger.claim(document, self.worker)
            if claim.outcome is ClaimOutcome.CLAIMED:
                return self._run(
                    job, claim.document, asked_at, crashed=document if suspected(document) else None
                )
        if claim.outcome is ClaimOutcome.CHANGED:
            return None
        log.info("job %s is %s: nothing to do", job.id, claim.document.status)
        return Disposition.FINISHED if claim.outcome is ClaimOutcome.ENDED else Disposition.DROP

    def _read(self, kind: Kind, payload: object) -> Work:
        """Parse a message that holds the job itself. Backfills enter their shards, and send ids only."""
        work = parse(payload)
        if not isinstance(work, kind):
            raise InvalidJob(WRONG_QUEUE[kind])
        if isinstance(work, Shard) and not (work.token and self.admits(work)):
            raise _unknown_backfill(work)
        return work

    def _reject_wrong_queue(self, job: Work, document: StatusDocument, kind: Kind) -> Disposition | None:
        """Refuse what came by the wrong queue, and a shard of no known backfill. None: it may run."""
        if not isinstance(job, kind):  # another message for it is in its own queue
            log.warning("the message of %s came by a queue that is not for it: dropped", job.id)
            return Disposition.DROP
        if not isinstance(job, Shard) or document.status != "queued" or self.admits(job):
            return None
        error = _unknown_backfill(job)
        problem = Problem.of(error, stage="receive", attempt=document.attempt)
        self.ledger.advance(document, status="failed", error=problem)
        log.warning("shard %s refused: %s", job.id, error)
        return Disposition.FINISHED

    def refuse(self, message_id: str, payload: object, error: GradcamError) -> StatusDocument:
        """Write a message that is no job into the ledger, as failed. Raises LedgerUnavailable."""
        document = self.ledger.refuse(_job_id(payload, message_id), payload, error)
        log.warning("job %s refused: %s", document.id, error)
        return document

    def requeue_unfinished(self) -> list[str]:
        """Stop all jobs of this process and put them back into the queue. These attempts do not count.

        Nothing begins here any more. A second call finds jobs that were just beginning at the first.

        Returns:
            Ids of the jobs whose messages have to be published again.
        """
        self.gate.close()
        back = []
        for job_id, attempt in self.leases.release_all().items():
            try:
                if self.ledger.requeue_unfinished(job_id, attempt):
                    back.append(job_id)
            except LedgerUnavailable as error:  # the caller still has to publish the others
                log.warning("job %s is not handed back: %s", job_id, error)
        return back

    def _run(
        self,
        job: Work,
        document: StatusDocument,
        asked_at: datetime,
        *,
        crashed: StatusDocument | None = None,
    ) -> Disposition:
        """Run a job that was claimed. `crashed` is its document of before, if a worker died under it."""
        with self._job_context(job, document, asked_at) as traced:
            return self._execute(job, traced, crashed)

    @contextmanager
    def _job_context(
        self, job: Work, document: StatusDocument, asked_at: datetime
    ) -> Iterator[StatusDocument]:
        """Within it, log lines and spans belong to this attempt. Yields the document with its trace."""
        above = terms_of(job).traceparent or document.traceparent
        facts: dict[str, Any] = {"job_id": job.id, "attempt": document.attempt}
        more: dict[str, Any] = {"network": job.network, "worker": self.worker.id}
        with self.traces.start_span("job", above, kind="CONSUMER", since=asked_at, **facts, **more):
            tracing.record_past_span("queue", document.queued_at, asked_at, above)
            tracing.record_past_span("claim", asked_at, document.started_at or asked_at)
            traceparent = tracing.current_traceparent() or above
            with logs.log_context(**facts, trace_id=tracing.trace_id(traceparent)):
                yield document.model_copy(update={"traceparent": traceparent})

    def _execute(self, job: Work, document: StatusDocument, crashed: StatusDocument | None) -> Disposition:
        progress = _StageReporter(self.ledger, document, self.stall.progressed)
        context = JobContext(
            Deadline(job.timeout_s),
            progress,
            attempt=document.attempt,
            checkpoint=progress.checkpoint,
            after_crash=crashed is not None,
            row_search=row_state(crashed).search if crashed else None,
            is_last_attempt=document.attempt >= document.max_attempts,
        )
        shard = isinstance(job, Shard)
        with (
            self._track_in_flight(document, context, shard=shard),
            self.leases.hold(document, context.deadline, progress.write_pending),
        ):
            try:
                if isinstance(job, Shard):
                    done = shards.run_shard(job, self.services, context)
                else:
                    done = pipeline.run_job(job, self.services, context)
            except (AttemptFenced, LedgerUnavailable):
                raise
            except BaseException as error:  # noqa: BLE001  # the one place where anything at all becomes a Problem
                return self._on_error(job, progress.close(), context, error)
            self.breaker.succeeded()
            last = progress.close()
            metrics = {**last.metrics, **context.metrics, **done.metrics}
            self._write(last, status="succeeded", **{**vars(done), "metrics": metrics})
            if isinstance(job, Shard):
                failed = sum(done.rows.failed.values()) if done.rows else 0
                self.observer.shard_finished(len(job.rows) - failed, failed)
        return Disposition.FINISHED

    @contextmanager
    def _track_in_flight(
        self, document: StatusDocument, context: JobContext, *, shard: bool
    ) -> Iterator[None]:
        """Tell the observer that a job runs, and at the end how long each stage took."""
        self.observer.in_flight_changed(1, shard=shard)
        try:
            yield
        finally:
            self.observer.in_flight_changed(-1, shard=shard)
            if not shard:
                self.observer.stages_measured({**document.metrics, **context.metrics})

    def _on_error(
        self, job: Work, document: StatusDocument, context: JobContext, error: BaseException
    ) -> Disposition:
        if not isinstance(error, GradcamError):
            log.error("job %s: unforeseen at %s", job.id, context.current_stage, exc_info=error)
            error = InternalError.of(error)
        if isinstance(error, StorageUnavailable):
            self.breaker.failed(error)
        tracing.annotate(error)
        problem = Problem.of(error, stage=context.current_stage, attempt=document.attempt)
        changes: dict[str, Any] = {"error": problem, "metrics": {**document.metrics, **context.metrics}}
        if isinstance(error, JobCanceled):
            self._write(document, status="canceled", **changes)
            return Disposition.FINISHED
        if not error.retryable or document.attempt >= document.max_attempts:
            self._write(document, status="failed", **changes)
            return Disposition.FINISHED
        delay_s = self._backoff_s(document.attempt)
        log.warning("job %s waits %.1f s for its next attempt: %s", job.id, delay_s, error)
        self._write(document, status="retrying", delay_s=delay_s, queued_at=utc_now(), **changes)
        return Disposition.RETRY

    def _write(self, document: StatusDocument, *, delay_s: float = 0, **changes: Any) -> None:
        with tracing.span("write"):
            after = self.ledger.advance(document, patience_s=WRITE_FOR_S, delay_s=delay_s, **changes)
        tracing.annotate(status=after.status)
        code = f" ({after.error.code})" if after.error else ""
        log.info("job %s attempt %d: %s%s", after.id, after.attempt, after.status, code)

    def _backoff_s(self, attempt: int) -> float:
        settings = self.settings
        policy = RetryPolicy(settings.retry_backoff_s, settings.retry_backoff_max_s, jitter=HALF_OR_MORE)
        return policy.pause_s(attempt)


def _unknown_backfill(shard: Shard) -> UnknownBackfill:
    return UnknownBackfill(
        f"The ledger knows no backfill {shard.backfill} into {shard.output} that has submitted this shard: "
        "only `gradcam backfill` submits shards, and with --resume it submits them again."
    )


def _job_id(payload: object, message_id: str) -> str:
    """A message's job id: the job's own, else the message's, else one made of it.

    A message that comes again gets the same id again.
    """
    own = payload.get("id") if isinstance(payload, dict) else None
    for candidate in (own, message_id):
        if isinstance(candidate, str) and re.fullmatch(ID_PATTERN, candidate):
            return candidate
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"gradcam:{message_id}"))


def _add_id(payload: object, job_id: str) -> object:
    """Add the id where a message leaves it out. A wrong one is not replaced, but refused later."""
    if isinstance(payload, dict) and payload.get("id") is None:
        return {**payload, "id": job_id}
    return payload


class _StageReporter:
    """Writes the stage of a running job to the ledger, at most every `WRITE_STAGE_EVERY_S`.

    A stage that begins sooner after the last write is pending: the thread that renews leases writes it, by
    `write_pending`.
    """

    def __init__(self, ledger: Ledger, document: StatusDocument, on_progress: Callable[[], None]) -> None:
        self._document, self._ledger, self._on_progress = document, ledger, on_progress
        self._written_s = time.monotonic()
        self._pending: Stage | None = None  # a stage that is not written yet
        self._lock = threading.Lock()

    def close(self) -> StatusDocument:
        """Write no stage any more; return the job's document as it is."""
        with self._lock:
            self._pending, self._written_s = None, math.inf
            return self._document

    def checkpoint(self, stage: Stage) -> None:
        """Write a stage now, and wait until it is written. Raises LedgerUnavailable."""
        self._on_progress()
        with self._lock:
            self._pending = None  # it would be written over this one
            self._document = self._ledger.advance(self._document, patience_s=WRITE_FOR_S, **vars(stage))

    def write_pending(self) -> None:
        """Write the pending stage, if it is due. Raises LedgerUnavailable."""
        if not self._lock.acquire(blocking=False):  # the job's own thread is writing
            return
        try:
            self._write()
        except AttemptFenced:  # the job's deadline is cancelled when its lease is renewed
            self._pending = None
        finally:
            self._lock.release()

    def __call__(self, stage: Stage) -> None:
        self._on_progress()
        with self._lock, contextlib.suppress(LedgerUnavailable):
            # No reason to stop: the deadline says whether the job is still this worker's.
            self._pending = stage
            self._write()
        if self._document.cancel_requested_at:
            message = "The job was cancelled on request."
            raise JobCanceled(message)

    def _write(self) -> None:
        if self._pending is None or time.monotonic() - self._written_s < WRITE_STAGE_EVERY_S:
            return
        self._document = self._ledger.advance(self._document, **vars(self._pending))
        self._pending, self._written_s = None, time.monotonic()
