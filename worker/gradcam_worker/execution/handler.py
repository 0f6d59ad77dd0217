"""One message in, one `Disposition` out."""

import contextlib
import logging
import math
import random
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
from gradcam_worker.observability.events import SILENT, Observer
from gradcam_worker.observability.tracing import OFF, Traces
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.gate import ExclusiveGate
from gradcam_worker.resilience.stall import Stall
from gradcam_worker.schemas.earlier import row_state
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import ID_PATTERN, Job
from gradcam_worker.schemas.shard import Shard, Work, parse, terms_of
from gradcam_worker.schemas.status import Problem, StatusDocument, WorkerRef
from gradcam_worker.settings import Settings

log = logging.getLogger("gradcam")

PROGRESS_EVERY_S = 0.5  # stages that pass faster are not worth a round trip
LEDGER_PATIENCE_S = 30  # a finished job's last word is worth waiting for
MOMENT = TypeAdapter(AwareDatetime)
Kind = type[Job] | type[Shard]
MISPLACED: dict[Kind, str] = {  # why it is refused where a queue is for something else
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
    observer: Observer = SILENT
    traces: Traces = OFF
    admits: Callable[[Shard], bool] = lambda _: (
        False
    )  # whether a shard is of a backfill that the ledger knows
    stall: Stall = field(default_factory=lambda: Stall(lambda: False, math.inf))

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
            with self.stall.in_hand(), logs.about(job_id=_identify(payload, message_id)):
                disposition = self._process(payload, message_id, entered_at, kind)
        finally:
            self.observer.attempt_ended(disposition.value)
        return disposition

    def _process(self, payload: object, message_id: str, entered_at: object, kind: Kind) -> Disposition:
        if self.breaker.open_reason:
            raise WorkerUnfit(self.breaker.open_reason)
        job_id = _identify(payload, message_id)
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
        """What most messages need: one question to the ledger, then the job. None: it is not so simple."""
        try:
            job, moment = Job.parse(payload), MOMENT.validate_python(entered_at)
        except (InvalidJob, ValueError):
            return None  # the ledger may know better
        with self.gate.enter(job.id) as free:
            asked_at = utc_now()
            document = self.ledger.claim_fresh(job, moment, self.worker) if free else None
            return self._run(job, document, asked_at) if document else None

    def _claim(self, job_id: str, payload: object, kind: Kind) -> Disposition | None:
        """Ask the ledger what the job is, then for the job. None: it has changed in between."""
        job, document = self.ledger.get_or_create(
            job_id, _with_id(payload, job_id), partial(self._read, kind)
        )
        if job is None:
            log.info("job %s is %s: nothing to do", document.id, document.status)
            return Disposition.DROP
        if end := self._reject_wrong_queue(job, document, kind):
            return end
        # Where a worker died under it, it has the process for itself, before the attempt begins.
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
        """What a message holds itself. Whoever runs a backfill enters its shards, and sends ids."""
        work = parse(payload)
        if not isinstance(work, kind):
            raise InvalidJob(MISPLACED[kind])
        if isinstance(work, Shard) and not (work.token and self.admits(work)):
            raise _unknown(work)
        return work

    def _reject_wrong_queue(self, job: Work, document: StatusDocument, kind: Kind) -> Disposition | None:
        """How a message ends that may not have what the ledger holds under its id; None: it may."""
        if not isinstance(job, kind):  # it has a message of its own, in the queue that is for it
            log.warning("the message of %s came by a queue that is not for it: dropped", job.id)
            return Disposition.DROP
        if not isinstance(job, Shard) or document.status != "queued" or self.admits(job):
            return None
        error = _unknown(job)
        problem = Problem.of(error, stage="receive", attempt=document.attempt)
        self.ledger.advance(document, status="failed", error=problem)
        log.warning("shard %s refused: %s", job.id, error)
        return Disposition.FINISHED

    def refuse(self, message_id: str, payload: object, error: GradcamError) -> StatusDocument:
        """Write down a message that is no job. Raises LedgerUnavailable."""
        document = self.ledger.refuse(_identify(payload, message_id), payload, error)
        log.warning("job %s refused: %s", document.id, error)
        return document

    def requeue_unfinished(self) -> list[str]:
        """Give up all that runs here, without loss of an attempt; return what is to be published again.

        Nothing is begun here any more. Asked again, it finds what was just beginning then.
        """
        self.gate.close()
        back = []
        for job_id, attempt in self.leases.release_all().items():
            try:
                if self.ledger.requeue_unfinished(job_id, attempt):
                    back.append(job_id)
            except LedgerUnavailable as error:  # those that are back already have to be told of
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
        """Within it, lines and spans are this attempt's; yields its document, which says in which trace."""
        above = terms_of(job).traceparent or document.traceparent
        facts: dict[str, Any] = {"job_id": job.id, "attempt": document.attempt}
        more: dict[str, Any] = {"network": job.network, "worker": self.worker.id}
        with self.traces.joined("job", above, kind="CONSUMER", since=asked_at, **facts, **more):
            tracing.past("queue", document.queued_at, asked_at, above)
            tracing.past("claim", asked_at, document.started_at or asked_at)
            traceparent = tracing.here() or above
            with logs.about(**facts, trace_id=tracing.trace_id(traceparent)):
                yield document.model_copy(update={"traceparent": traceparent})

    def _execute(self, job: Work, document: StatusDocument, crashed: StatusDocument | None) -> Disposition:
        progress = _StageReporter(self.ledger, document, self.stall.moved)
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
            self.leases.hold(document, context.deadline, progress.catch_up),
        ):
            try:
                if isinstance(job, Shard):
                    done = shards.run_shard(job, self.services, context)
                else:
                    done = pipeline.run_job(job, self.services, context)
            except (AttemptFenced, LedgerUnavailable):
                raise
            except BaseException as error:  # noqa: BLE001  # the one place where anything at all becomes a Problem
                return self._failed(job, progress.end(), context, error)
            self.breaker.succeeded()
            last = progress.end()
            metrics = {**last.metrics, **context.metrics, **done.metrics}
            self._write(last, status="succeeded", **{**vars(done), "metrics": metrics})
            if isinstance(job, Shard):
                failed = sum(done.rows.failed.values()) if done.rows else 0
                self.observer.rows_ended(len(job.rows) - failed, failed)
        return Disposition.FINISHED

    @contextmanager
    def _track_in_flight(
        self, document: StatusDocument, context: JobContext, *, shard: bool
    ) -> Iterator[None]:
        """Within it, a job is run; the observer hears when and how long, stage by stage."""
        self.observer.in_flight(1, shard=shard)
        try:
            yield
        finally:
            self.observer.in_flight(-1, shard=shard)
            if not shard:
                self.observer.staged({**document.metrics, **context.metrics})

    def _failed(
        self, job: Work, document: StatusDocument, context: JobContext, error: BaseException
    ) -> Disposition:
        if not isinstance(error, GradcamError):
            log.error("job %s: unforeseen at %s", job.id, context.current_stage, exc_info=error)
            error = InternalError.of(error)
        if isinstance(error, StorageUnavailable):
            self.breaker.failed(error)
        tracing.note(error)
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
            after = self.ledger.advance(document, patience_s=LEDGER_PATIENCE_S, delay_s=delay_s, **changes)
        tracing.note(status=after.status)
        code = f" ({after.error.code})" if after.error else ""
        log.info("job %s attempt %d: %s%s", after.id, after.attempt, after.status, code)

    def _backoff_s(self, attempt: int) -> float:
        """Doubles with every attempt; jitter keeps jobs that failed together from coming together."""
        doubled = self.settings.retry_backoff_s * 2.0 ** (attempt - 1)
        return min(doubled, self.settings.retry_backoff_max_s) * random.uniform(0.5, 1)  # noqa: S311  # jitter, not a secret


def _unknown(shard: Shard) -> UnknownBackfill:
    return UnknownBackfill(
        f"The ledger knows no backfill {shard.backfill} into {shard.output} that has submitted this shard: "
        "only `gradcam backfill` submits shards, and with --resume it submits them again."
    )


def _identify(payload: object, message_id: str) -> str:
    """The id under which a message is written down: the job's own, else its message's, else made of it.

    A message that comes again gets the same id again.
    """
    own = payload.get("id") if isinstance(payload, dict) else None
    for candidate in (own, message_id):
        if isinstance(candidate, str) and re.fullmatch(ID_PATTERN, candidate):
            return candidate
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"gradcam:{message_id}"))


def _with_id(payload: object, job_id: str) -> object:
    """A stranger may leave the id out; a wrong one is not replaced, it is refused."""
    if isinstance(payload, dict) and payload.get("id") is None:
        return {**payload, "id": job_id}
    return payload


class _StageReporter:
    """Writes the stage of a running job, at most every half second, and the last one in any case.

    What was begun sooner after the last write is written by the thread that renews leases: see `catch_up`.
    """

    def __init__(self, ledger: Ledger, document: StatusDocument, moved: Callable[[], None]) -> None:
        self._document, self._ledger, self._moved = document, ledger, moved
        self._written_s = time.monotonic()
        self._begun: Stage | None = None  # a stage that is not written yet
        self._turn = threading.Lock()

    def end(self) -> StatusDocument:
        """The job's document as it stands; no stage is written any more."""
        with self._turn:
            self._begun, self._written_s = None, math.inf
            return self._document

    def checkpoint(self, stage: Stage) -> None:
        """Write a stage now. Raises LedgerUnavailable."""
        self._moved()
        with self._turn:
            self._begun = None  # or it would be written over this one
            self._document = self._ledger.advance(self._document, patience_s=LEDGER_PATIENCE_S, **vars(stage))

    def catch_up(self) -> None:
        """Write the stage that is not written yet, if its half second is over. Raises LedgerUnavailable."""
        if not self._turn.acquire(blocking=False):  # the job's own thread is writing
            return
        try:
            self._write()
        except AttemptFenced:  # which the job hears by its lease
            self._begun = None
        finally:
            self._turn.release()

    def __call__(self, stage: Stage) -> None:
        self._moved()
        with self._turn, contextlib.suppress(LedgerUnavailable):
            # No reason to give up: whether the job is still ours, its deadline knows.
            self._begun = stage
            self._write()
        if self._document.cancel_requested_at:
            message = "The job was cancelled on request."
            raise JobCanceled(message)

    def _write(self) -> None:
        if self._begun is None or time.monotonic() - self._written_s < PROGRESS_EVERY_S:
            return
        self._document = self._ledger.advance(self._document, **vars(self._begun))
        self._begun, self._written_s = None, time.monotonic()
