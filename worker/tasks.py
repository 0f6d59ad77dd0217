"""One message in, one of four ends out.

done      the job is final: succeeded, failed or expired, and whoever asked is told
later     a retryable error, or the job runs just now: the message is looked at again
dropped   the job was final already, or another attempt has it: the message is a duplicate
returned  the ledger or the broker is out of reach: the message goes back to the queue
"""

import logging
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import AwareDatetime, TypeAdapter, ValidationError

from worker import pipeline
from worker.contract import ID_PATTERN, Delivery, Job, Problem, StatusDocument, StatusEvent, WorkerRef
from worker.deadline import Deadline
from worker.errors import (
    AttemptFenced,
    BrokerUnavailable,
    GradcamError,
    IdempotencyConflict,
    InternalError,
    InvalidJob,
    LedgerUnavailable,
    StatusUnavailable,
)
from worker.ledger import Ledger
from worker.outside import Outside
from worker.pipeline import Journey
from worker.settings import Settings
from worker.wire import describe, utc_now

log = logging.getLogger("gradcam")

PROGRESS_EVERY_S = 0.5  # stages that pass faster are not worth a round trip
ASK_AGAIN_S = 5  # before a second message of a running job is looked at again
LEDGER_PATIENCE_S = 30  # a finished job's last word is worth waiting for
MOMENT = TypeAdapter(AwareDatetime)
EVENTS = {  # a state of the job -> the event a webhook can ask for
    "running": "job.started",
    "retrying": "job.retrying",
    "succeeded": "job.succeeded",
    "failed": "job.failed",
    "expired": "job.expired",
}


@dataclass(frozen=True)
class Desk:
    """Where messages are handled."""

    settings: Settings
    ledger: Ledger
    outside: Outside
    worker: WorkerRef
    publish: Callable[..., None]  # a Job, delay_s=: see `broker.publish`
    publish_delivery: Callable[..., None]  # a Delivery, delay_s=: see `broker.publish_delivery`
    busy: "Busy" = field(default_factory=lambda: Busy())  # noqa: PLW0108  # defined below

    def handle(
        self, payload: object, message_id: str, *, redelivered: bool = False, entered_at: object = None
    ) -> str:
        """Bring one message to its end; return which. Raises LedgerUnavailable, BrokerUnavailable.

        `entered_at` is when the message says that its job was entered in the ledger, if it says so.
        """
        job_id = _identify(payload, message_id)
        try:
            if entered_at and (end := self._at_once(payload, entered_at)):
                return end
            job, document = self.ledger.receive(job_id, _with_id(payload, job_id))
            with self.busy.entered(job.id) as free:
                if not free:
                    return self._ask_again(job)
                return self._claim(job, document, redelivered=redelivered)
        except (InvalidJob, IdempotencyConflict) as error:
            self.refuse(job_id, payload, error)
            return "done"
        except AttemptFenced as error:
            log.warning("%s", error)
            return "dropped"

    def _at_once(self, payload: object, entered_at: object) -> str | None:
        """What most messages need: one question to the ledger, then the job. None: it is not so simple."""
        try:
            job, moment = Job.parse(payload), MOMENT.validate_python(entered_at)
        except (InvalidJob, ValueError):
            return None  # the ledger may know better
        with self.busy.entered(job.id) as free:
            document = self.ledger.take(job, moment, self.worker) if free else None
            if not document:
                return None
            self._tell(job, document)
            return self._run(job, document)

    def refuse(self, message_id: str, payload: object, error: GradcamError) -> StatusDocument:
        """Write down a message that is no job. Raises LedgerUnavailable."""
        document = self.ledger.refuse(_identify(payload, message_id), payload, error)
        log.warning("job %s refused: %s", document.id, error)
        return document

    def _claim(self, job: Job, document: StatusDocument, *, redelivered: bool) -> str:
        claim = self.ledger.claim(
            job,
            document,
            self.worker,
            redelivered=redelivered,
            lost_after_s=self.settings.visibility_timeout_s,
        )
        if claim.outcome == "held":
            return self._ask_again(job)
        if claim.outcome == "finished":
            log.info("job %s is %s already: dropped", job.id, claim.document.status)
            return "dropped"
        self._tell(job, claim.document)
        return "done" if claim.outcome == "ended" else self._run(job, claim.document)

    def _ask_again(self, job: Job) -> str:
        """A message for a job that runs just now is kept: it is needed if that attempt dies."""
        self.publish(job, delay_s=ASK_AGAIN_S)
        return "later"

    def _run(self, job: Job, document: StatusDocument) -> str:
        """Run a claimed job and write down how it went."""
        progress = _Progress(self.ledger, document)
        journey = Journey(Deadline(job.timeout_s), progress)
        try:
            done = pipeline.explain(job, self.outside, journey)
        except (AttemptFenced, LedgerUnavailable):
            raise
        except Exception as error:  # noqa: BLE001  # the one place where anything at all becomes a Problem
            return self._failed(job, progress.document, journey, error)
        metrics = {**progress.document.metrics, **journey.metrics}
        self._write(job, progress.document, status="succeeded", metrics=metrics, **vars(done))
        return "done"

    def _failed(self, job: Job, document: StatusDocument, journey: Journey, error: Exception) -> str:
        if not isinstance(error, GradcamError):
            log.error("job %s: unforeseen at %s", job.id, journey.stage, exc_info=error)
            error = InternalError.of(error)
        problem = Problem.of(error, stage=journey.stage, attempt=document.attempt)
        metrics = {**document.metrics, **journey.metrics}
        if not error.retryable or document.attempt >= job.max_attempts:
            self._write(job, document, status="failed", error=problem, metrics=metrics)
            return "done"
        delay_s = self._backoff_s(document.attempt)
        log.warning("job %s waits %.1f s for its next attempt: %s", job.id, delay_s, error)
        self._write(job, document, status="retrying", error=problem, metrics=metrics, queued_at=utc_now())
        self.publish(job, delay_s=delay_s)
        return "later"

    def _write(self, job: Job, document: StatusDocument, **changes: Any) -> None:
        after = self.ledger.advance(document, patience_s=LEDGER_PATIENCE_S, **changes)
        code = f" ({after.error.code})" if after.error else ""
        log.info("job %s attempt %d: %s%s", job.id, after.attempt, after.status, code)
        self._tell(job, after)

    def _backoff_s(self, attempt: int) -> float:
        """Doubles with every attempt; jitter keeps jobs that failed together from coming together."""
        doubled = self.settings.retry_backoff_s * 2.0 ** (attempt - 1)
        return min(doubled, self.settings.retry_backoff_max_s) * random.uniform(0.5, 1)  # noqa: S311  # jitter, not a secret

    def _tell(self, job: Job, document: StatusDocument) -> None:
        """Hand the event to whoever asked for it. The ledger has the truth if this fails."""
        event = EVENTS[document.status]
        for webhook in job.webhooks:
            if event not in webhook.events:
                continue
            data = StatusEvent(type=f"gradcam.{event}", timestamp=utc_now(), data=document)
            try:
                self.publish_delivery(Delivery(url=webhook.url, event=data))
            except BrokerUnavailable as error:
                log.error("job %s: %s was not sent: %s", job.id, event, error)  # noqa: TRY400

    def deliver(self, payload: object) -> str:
        """Send one event to one webhook; again later, with backoff, where that may help."""
        try:
            delivery = Delivery.model_validate(payload)
        except ValidationError as error:
            log.warning("not a delivery: %s", describe(error))
            return "dropped"
        try:
            self.outside.webhooks.send(delivery)
        except StatusUnavailable as error:
            if delivery.attempt < self.settings.webhook_attempts:
                again = delivery.model_copy(update={"attempt": delivery.attempt + 1})
                self.publish_delivery(again, delay_s=self._backoff_s(delivery.attempt))
                return "later"
            log.error("job %s: given up: %s", delivery.event.data.id, error)  # noqa: TRY400
        except GradcamError as error:
            log.warning("job %s: %s", delivery.event.data.id, error)
        return "done"


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


class Busy:
    """The jobs that this process is working on. A broker that restarts sends their messages again."""

    def __init__(self) -> None:
        self._jobs: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def entered(self, job_id: str) -> Iterator[bool]:
        """Whether the job was free; if so, it is taken meanwhile."""
        with self._lock:
            free = job_id not in self._jobs
            self._jobs.add(job_id)
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._jobs.discard(job_id)


class _Progress:
    """Writes the stage of a running job, at most every half second."""

    def __init__(self, ledger: Ledger, document: StatusDocument) -> None:
        self.document = document
        self._ledger = ledger
        self._written = time.monotonic()

    def __call__(self, stage: str) -> None:
        if time.monotonic() - self._written < PROGRESS_EVERY_S:
            return
        self.document = self._ledger.advance(self.document, stage=stage)
        self._written = time.monotonic()
