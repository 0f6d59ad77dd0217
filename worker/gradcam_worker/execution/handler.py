"""Handles one message: claims its job or shard, runs it, and writes the final state to the ledger."""

import contextlib
import json
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
from typing import Any, NoReturn

from pydantic import AwareDatetime, TypeAdapter

from gradcam_worker.errors import (
    AttemptFenced,
    DeviceOccupied,
    GradcamError,
    IdempotencyConflict,
    ImageFetchFailed,
    InternalError,
    InvalidJob,
    JobCanceled,
    JobTimeout,
    LedgerUnavailable,
    StorageUnavailable,
    UnknownBackfill,
    WeightsUnavailable,
    WorkerUnfit,
)
from gradcam_worker.execution import pipeline, shards
from gradcam_worker.execution.attempt import JobContext, Progress
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.execution.services import Services
from gradcam_worker.ledger.ledger import ClaimOutcome, Entry, Ledger, device_s_of
from gradcam_worker.ledger.state_machine import is_suspected
from gradcam_worker.observability import logs, tracing
from gradcam_worker.observability.events import NULL_OBSERVER, EndedJob, Observer
from gradcam_worker.observability.tracing import NO_TRACES, Traces
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.gate import ExclusiveGate
from gradcam_worker.resilience.retry import HALF_OR_MORE, RetryPolicy
from gradcam_worker.resilience.stall import StallDetector
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import ID_PATTERN, Job
from gradcam_worker.schemas.legacy_rows import row_state
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import Problem, StatusDocument, WorkerRef
from gradcam_worker.schemas.work import ROUTE, Work, parse, terms_of
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

WRITE_PROGRESS_INTERVAL_S = 0.5  # a shorter stage is not worth a request to the ledger
TURN_PAUSE_S = 0.01  # before the ledger is asked again whose turn it is
# So many attempts that found the device's memory with other processes do not count: a quarter of an hour
# with the pauses of the default settings. Not more: memory that this process keeps may be taken for theirs.
OCCUPIED_ATTEMPTS = 20
WRITE_PATIENCE_S = 30  # time to keep trying to write a final state or a checkpoint
# Errors that storage may cause by its silence, besides those that name it.
SILENCE_ERRORS = (ImageFetchFailed, JobTimeout)
TIMESTAMP = TypeAdapter(AwareDatetime)
Kind = type[Job] | type[Shard]
WRONG_QUEUE: dict[Kind, str] = {  # kind that the queue is for -> why the other kind is refused
    Job: "This is a shard; this queue is for jobs. Only `gradcam backfill` submits shards.",
    Shard: "This is a job; this queue is for shards. Send jobs to gradcam.interactive or gradcam.bulk.",
}


class Disposition(Enum):
    """What becomes of a message. The values are the label `outcome` of the metric `job_attempts_total`."""

    FINISHED = "done"
    """The job is final: succeeded, failed, canceled or expired."""

    RETRY = "later"
    """A retryable error. When the backoff is over, the reaper publishes the job again."""

    DROP = "dropped"
    """The job was final already, or another attempt holds its lease: the message is redundant."""

    REQUEUE = "returned"
    """The ledger cannot be reached, or this worker is unfit: the message is requeued.

    `JobHandler.handle` does not return this value, but raises the reason.
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
    admits: Callable[[Shard], bool] = lambda _: False  # whether a shard belongs to a registered backfill
    stall: StallDetector = field(default_factory=lambda: StallDetector(lambda: False, math.inf))

    def handle(
        self,
        payload: object,
        message_id: str,
        *,
        entered_at: object = None,
        kind: Kind = Job,
    ) -> Disposition:
        """Handle one message. Return when the attempt that it starts has finished.

        Args:
            payload: The content of the message: a job, a shard, or `{"id": ...}` of one in the ledger.
            message_id: The broker's id of the message.
            entered_at: The time when its job was entered in the ledger, if the message has one.
            kind: The kind of work that the message's queue is for.

        Returns:
            What became of the message. Never `Disposition.REQUEUE`.

        Raises:
            LedgerUnavailable: The ledger cannot be reached. The caller has to requeue the message.
            WorkerUnfit: This worker cannot run jobs at present. The caller has to requeue the message.
        """
        disposition = Disposition.REQUEUE
        try:
            with self.stall.running_job(), logs.log_context(job_id=_job_id(payload, message_id)):
                disposition = self._claim_run_or_refuse(payload, message_id, entered_at, kind)
        finally:
            self.observer.message_handled(disposition.value)
        return disposition

    def _claim_run_or_refuse(
        self, payload: object, message_id: str, entered_at: object, kind: Kind
    ) -> Disposition:
        """Claim the work of a message and run it, refuse a message without valid work, or drop it."""
        if self.breaker.open_reason:
            raise WorkerUnfit(self.breaker.open_reason)
        job_id = _job_id(payload, message_id)
        try:
            if entered_at and kind is Job and (disposition := self._claim_fresh_and_run(payload, entered_at)):
                return disposition
            while not (disposition := self._read_claim_and_run(job_id, payload, kind)):
                pass
            if disposition is Disposition.DROP and kind is Job:
                disposition = self._run_turn_of(job_id, payload)
        except (InvalidJob, IdempotencyConflict, UnknownBackfill) as error:
            if payload == {"id": job_id} and not self.ledger.read_route(job_id):
                log.warning("job_message_dropped", reason="the job is no longer in the ledger")
                return Disposition.DROP
            self.refuse(job_id, payload, error)
            return Disposition.FINISHED
        except AttemptFenced as error:
            log.warning("job_attempt_fenced", error=error)
            if payload != {"id": job_id} and not self.ledger.read_route(job_id):
                message = (
                    f"The ledger has lost job {job_id}. Its message is requeued, and enters the job again."
                )
                raise LedgerUnavailable(message) from error
            return Disposition.DROP
        return disposition

    def _claim_fresh_and_run(self, payload: object, entered_at: object) -> Disposition | None:
        """Claim a new job with a single request, and run it. None: it has to be read first."""
        try:
            job, created_at = Job.parse(payload), TIMESTAMP.validate_python(entered_at)
        except (InvalidJob, ValueError):
            return None
        with self.gate.enter(job.id) as free:
            claim_sent_at = utc_now()
            claimed = self.ledger.claim_fresh(job, created_at, self.worker) if free else None
            if isinstance(claimed, StatusDocument):
                return self._run_traced(job, claimed, claim_sent_at)
        return self._claim_turn_and_run(claimed) if claimed else None

    def _run_turn_of(self, job_id: str, payload: object) -> Disposition:
        """Use a message whose own job is not queued for the job whose turn it is in the same route.

        Several tenants wait there. The message of that job, when it comes, is used for another in the same
        way: there are as many messages as queued jobs.
        """
        route = self.ledger.read_route(job_id) or _priority(payload)
        while route and route != ROUTE and (entry := self.ledger.find_turn(route)):
            if disposition := self._claim_turn_and_run(entry):
                return disposition
        return Disposition.DROP

    def _claim_turn_and_run(self, entry: Entry) -> Disposition | None:
        """Claim and run the job that the ledger has named. None: it has changed in the meantime."""
        job_id = entry.document.id
        try:
            job = parse(json.loads(entry.job))
        except InvalidJob as error:
            self.refuse(job_id, {"id": job_id}, error)
            return Disposition.FINISHED
        with self.gate.enter(job_id) as free:
            if not free:  # it is being claimed here for another message
                time.sleep(TURN_PAUSE_S)
                return None
            claim_sent_at = utc_now()
            claim = self.ledger.claim(entry.document, self.worker, in_turn=False)
            if claim.outcome is ClaimOutcome.CLAIMED:
                return self._run_traced(job, claim.document, claim_sent_at)
        return Disposition.FINISHED if claim.outcome is ClaimOutcome.ENDED_BY_CLAIM else None

    def _read_claim_and_run(self, job_id: str, payload: object, kind: Kind) -> Disposition | None:
        """Read the work from the ledger, claim it and run it. None: it changed in the meantime."""
        work, document = self.ledger.get_or_create(
            job_id, _add_id(payload, job_id), partial(self._parse_work, kind)
        )
        if work is None:
            log.info("job_message_redundant", job_id=document.id, status=document.status)
            return Disposition.DROP
        if disposition := self._drop_or_refuse(work, document, kind):
            return disposition
        # A job that was running when a worker died runs alone in this process: wait for the other jobs first.
        with self.gate.enter(work.id, alone=is_suspected(document)) as free:
            if not free:
                return Disposition.DROP
            claim_sent_at = utc_now()
            claim = self.ledger.claim(document, self.worker)
            if claim.outcome is ClaimOutcome.CLAIMED:
                return self._run_traced(
                    work, claim.document, claim_sent_at, crashed=document if is_suspected(document) else None
                )
        if claim.outcome in {ClaimOutcome.CHANGED, ClaimOutcome.OTHERS_TURN}:
            return self._claim_turn_and_run(claim.other) if claim.other else None
        log.info("job_claim_refused", job_id=work.id, status=claim.document.status)
        return Disposition.FINISHED if claim.outcome is ClaimOutcome.ENDED_BY_CLAIM else Disposition.DROP

    def _parse_work(self, kind: Kind, payload: object) -> Work:
        """Parse a message that holds the whole job. Backfills send ids of shards in the ledger only."""
        work = parse(payload)
        if not isinstance(work, kind):
            raise InvalidJob(WRONG_QUEUE[kind])
        if isinstance(work, Shard) and not (work.token and self.admits(work)):
            raise _unknown_backfill(work)
        return work

    def _drop_or_refuse(self, work: Work, document: StatusDocument, kind: Kind) -> Disposition | None:
        """Drop a message in the wrong queue, refuse a shard of an unknown backfill. None: it may run."""
        if not isinstance(work, kind):  # the right queue has its own message for it
            log.warning("job_message_in_wrong_queue", job_id=work.id)
            return Disposition.DROP
        if not isinstance(work, Shard) or document.status != "queued" or self.admits(work):
            return None
        error = _unknown_backfill(work)
        problem = Problem.of(error, stage="receive", attempt=document.attempt)
        self.ledger.finish(document, status="failed", error=problem)
        log.warning("shard_refused", job_id=work.id, error=error)
        return Disposition.FINISHED

    def refuse(self, message_id: str, payload: object, error: GradcamError) -> StatusDocument:
        """Enter an invalid message in the ledger as a failed job.

        Args:
            message_id: The broker's id of the message.
            payload: The content of the message.
            error: Why it is invalid.

        Returns:
            The document of the failed job.

        Raises:
            LedgerUnavailable: The ledger cannot be reached.
        """
        document = self.ledger.refuse(_job_id(payload, message_id), payload, error)
        log.warning("job_refused", job_id=document.id, error=error)
        return document

    def requeue_unfinished(self) -> list[str]:
        """Stop all jobs of this process and set them to queued again. These attempts do not count.

        No job starts in this process any more. Call again for jobs that were just starting during the first
        call.

        Returns:
            Ids of the jobs whose messages the caller has to publish again.
        """
        self.gate.close()
        requeued = []
        for job_id, attempt in self.leases.release_all().items():
            try:
                if self.ledger.requeue_unfinished(job_id, attempt):
                    requeued.append(job_id)
            except LedgerUnavailable as error:  # the caller still has to publish the others
                log.warning("job_requeue_failed", job_id=job_id, attempt=attempt, error=error)
        return requeued

    def _run_traced(
        self,
        work: Work,
        document: StatusDocument,
        claim_sent_at: datetime,
        *,
        crashed: StatusDocument | None = None,
    ) -> Disposition:
        """Run claimed work, with its attempt bound to log lines and spans.

        `crashed` is its document before the claim, if a worker died while running it.
        """
        with self._attempt_context(work, document, claim_sent_at) as traced_document:
            return self._run_attempt(work, traced_document, crashed)

    @contextmanager
    def _attempt_context(
        self, work: Work, document: StatusDocument, claim_sent_at: datetime
    ) -> Iterator[StatusDocument]:
        """Bind log lines and spans to this attempt. Yields the document with the trace context."""
        parent = terms_of(work).traceparent or document.traceparent
        log_fields: dict[str, Any] = {"job_id": work.id, "attempt": document.attempt}
        attributes: dict[str, Any] = {**log_fields, "network": work.network, "worker": self.worker.id}
        with self.traces.start_span("job", parent, kind="CONSUMER", since=claim_sent_at, **attributes):
            tracing.record_past_span("queue", document.queued_at, claim_sent_at, parent)
            tracing.record_past_span("claim", claim_sent_at, document.started_at or claim_sent_at)
            traceparent = tracing.current_traceparent() or parent
            with logs.log_context(**log_fields, trace_id=tracing.trace_id(traceparent)):
                yield document.model_copy(update={"traceparent": traceparent})

    def _run_attempt(
        self, work: Work, document: StatusDocument, crashed: StatusDocument | None
    ) -> Disposition:
        progress_writer = _ProgressWriter(self.ledger, document, self.stall.progressed)
        context = JobContext(
            Deadline(work.timeout_s),
            progress_writer.write,
            attempt=document.attempt,
            created_at=document.created_at,
            checkpoint=progress_writer.checkpoint,
            after_crash=crashed is not None,
            row_search=row_state(crashed).search if crashed else None,
            is_last_attempt=document.attempt >= document.max_attempts,
            progressed=self.stall.progressed,
            storage_fails=self.breaker.is_to_blame,
        )
        with (
            self._track_in_flight(document, context, shard=isinstance(work, Shard)),
            self.leases.hold(document, context.deadline, progress_writer.write_pending),
        ):
            log.info("job_attempt_started", network=work.network)
            try:
                if isinstance(work, Shard):
                    result = shards.run_shard(work, self.services, context)
                else:
                    result = pipeline.run_job(work, self.services, context)
            except (AttemptFenced, LedgerUnavailable):
                raise
            except BaseException as error:  # noqa: BLE001  # whatever a job raises becomes its Problem here
                return self._end_with_error(work, progress_writer.close(), context, error)
            self.breaker.succeeded()
            latest = progress_writer.close()
            metrics = {**latest.metrics, **context.measured(), **result.metrics}
            self._finish(work, latest, status="succeeded", **{**vars(result), "metrics": metrics})
            if isinstance(work, Shard):
                failed = sum(result.rows.failed.values()) if result.rows else 0
                self.observer.shard_finished(len(work.rows) - failed, failed)
        return Disposition.FINISHED

    @contextmanager
    def _track_in_flight(
        self, document: StatusDocument, context: JobContext, *, shard: bool
    ) -> Iterator[None]:
        """Tell the observer that a job runs, and when it finishes how long each stage took."""
        self.observer.in_flight_changed(1, shard=shard)
        try:
            yield
        finally:
            self.observer.in_flight_changed(-1, shard=shard)
            if not shard:
                self.observer.stages_measured({**document.metrics, **context.metrics})

    def _end_with_error(
        self, work: Work, document: StatusDocument, context: JobContext, error: BaseException
    ) -> Disposition:
        if not isinstance(error, GradcamError):
            log.exception(  # noqa: LOG004  # called in the `except` block of `_run_attempt`
                "job_failed_unexpectedly", stage=context.current_stage
            )
            error = InternalError.of(error)
        if self._storage_is_to_blame(error):
            self._hand_back(document, error)
        tracing.annotate(error)
        problem = Problem.of(error, stage=context.current_stage, attempt=document.attempt)
        changes: dict[str, Any] = {"error": problem, "metrics": {**document.metrics, **context.measured()}}
        if isinstance(error, JobCanceled):
            self._finish(work, document, status="canceled", **changes)
            return Disposition.FINISHED
        is_not_counted = isinstance(error, DeviceOccupied) and document.uncounted_attempts < OCCUPIED_ATTEMPTS
        if not error.retryable or (document.attempt >= document.max_attempts and not is_not_counted):
            self._finish(work, document, status="failed", **changes)
            return Disposition.FINISHED
        delay_s = self._backoff_s(document.attempt)
        log.warning("job_retry_scheduled", delay_s=delay_s, error=error)
        changes["queued_at"] = utc_now()
        if is_not_counted:
            changes["max_attempts"] = document.max_attempts + 1
            changes["uncounted_attempts"] = document.uncounted_attempts + 1
        with tracing.span("write"):
            written = self.ledger.postpone(document, delay_s=delay_s, patience_s=WRITE_PATIENCE_S, **changes)
        _report_end(written)
        return Disposition.RETRY

    def _storage_is_to_blame(self, error: GradcamError) -> bool:
        """Whether no job could succeed here at present: the storage is down, or gives this worker no access.

        Where the storage works when it is probed after the error, the attempt counts: else a job that no
        server can store would be tried for ever.
        """
        if isinstance(error, StorageUnavailable):
            return self.breaker.confirm() or _has_no_keys(error)
        if isinstance(error, SILENCE_ERRORS):
            return self.breaker.is_to_blame()
        return isinstance(error, WeightsUnavailable) and self.breaker.confirm()

    def _hand_back(self, document: StatusDocument, error: GradcamError) -> NoReturn:
        """Queue a job again without counting this attempt.

        Raises:
            WorkerUnfit: The caller has to requeue its message.
            LedgerUnavailable: As `handle`. The job is queued again when its lease has expired.
        """
        self.ledger.requeue_unfinished(document.id, document.attempt)
        log.warning("job_handed_back", error=error)
        raise WorkerUnfit(str(error)) from error

    def _finish(self, work: Work, document: StatusDocument, *, status: str, **changes: Any) -> None:
        with tracing.span("write"):
            written = self.ledger.finish(document, status=status, patience_s=WRITE_PATIENCE_S, **changes)
        _report_end(written)
        if isinstance(work, Job):
            age_s = ((written.completed_at or utc_now()) - written.created_at).total_seconds()
            network = self._known_network(work.network)
            ended = EndedJob(network, work.priority, written.status, max(age_s, 0), device_s_of(written))
            self.observer.job_ended(ended)

    def _known_network(self, name: str) -> str | None:
        """The name of a network; None if there is no such network."""
        try:
            return self.services.networks.find(name).name
        except GradcamError:
            return None

    def _backoff_s(self, attempt: int) -> float:
        settings = self.settings
        policy = RetryPolicy(settings.retry_backoff_s, settings.retry_backoff_max_s, jitter=HALF_OR_MORE)
        return policy.pause_s(attempt)


def _has_no_keys(error: StorageUnavailable) -> bool:
    """Whether this worker has no valid keys for its storage."""
    if error.__cause__ is None:
        return False
    from gradcam_worker.storage.s3_errors import has_no_keys  # not where jobs are eager

    return has_no_keys(error.__cause__)


def _report_end(written: StatusDocument) -> None:
    """Log how an attempt ended, and add it to the trace."""
    tracing.annotate(status=written.status)
    error = written.error
    log.info(
        "job_attempt_finished",
        status=written.status,
        code=error and error.code,
        stage=error and error.stage,
        error=error and error.detail,
    )


def _unknown_backfill(shard: Shard) -> UnknownBackfill:
    return UnknownBackfill(
        f"No backfill {shard.backfill} into {shard.output} that submitted this shard is in the ledger. "
        "Only `gradcam backfill` submits shards; with --resume it submits them again."
    )


def _job_id(payload: object, message_id: str) -> str:
    """Choose the job id of a message: the job's own, else the message id, else one derived from it.

    A message that is delivered again gets the same id.
    """
    payload_id = payload.get("id") if isinstance(payload, dict) else None
    for candidate in (payload_id, message_id):
        if isinstance(candidate, str) and re.fullmatch(ID_PATTERN, candidate):
            return candidate
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"gradcam:{message_id}"))


def _priority(payload: object) -> str | None:
    """The priority of the job that a message contains: of one that the ledger does not know any more."""
    try:
        return Job.parse(payload).priority
    except InvalidJob:
        return None


def _add_id(payload: object, job_id: str) -> object:
    """Add the id if a message has none. An invalid one is kept, and refused later."""
    if isinstance(payload, dict) and payload.get("id") is None:
        return {**payload, "id": job_id}
    return payload


class _ProgressWriter:
    """Writes the progress of a running job to the ledger, at most every `WRITE_PROGRESS_INTERVAL_S`.

    Progress that is reported sooner after the last write is pending. The thread that renews leases writes it,
    by `write_pending`.
    """

    def __init__(self, ledger: Ledger, document: StatusDocument, on_progress: Callable[[], None]) -> None:
        self._document, self._ledger, self._on_progress = document, ledger, on_progress
        self._written_s = time.monotonic()
        self._pending: Progress | None = None
        self._lock = threading.Lock()

    def write(self, progress: Progress) -> None:
        """Write this progress, now or later. Raises AttemptFenced, and JobCanceled if that was requested."""
        self._on_progress()
        with self._lock, contextlib.suppress(LedgerUnavailable):
            # The job may go on: its deadline is cancelled if it loses its lease.
            self._pending = progress
            self._write()
        if self._document.cancel_requested_at:
            message = "The job was cancelled on request."
            raise JobCanceled(message)

    def checkpoint(self, progress: Progress) -> None:
        """Write this progress now, and wait until it is written. Raises AttemptFenced, LedgerUnavailable."""
        self._on_progress()
        with self._lock:
            self._pending = None  # it would overwrite the checkpoint
            self._document = self._ledger.advance(
                self._document, patience_s=WRITE_PATIENCE_S, **vars(progress)
            )

    def write_pending(self) -> None:
        """Write the pending progress, if it is due. Raises LedgerUnavailable."""
        if not self._lock.acquire(blocking=False):  # the job's own thread is writing
            return
        try:
            self._write()
        except AttemptFenced:  # the renewal of the lease cancels the job's deadline
            self._pending = None
        finally:
            self._lock.release()

    def close(self) -> StatusDocument:
        """Stop writing progress. Return the latest document of the job."""
        with self._lock:
            self._pending, self._written_s = None, math.inf
            return self._document

    def _write(self) -> None:
        if self._pending is None or time.monotonic() - self._written_s < WRITE_PROGRESS_INTERVAL_S:
            return
        self._document = self._ledger.advance(self._document, **vars(self._pending))
        self._pending, self._written_s = None, time.monotonic()
