"""One message in, one of four ends out.

done      the job is final: succeeded, failed or expired, and whoever asked is told
later     a retryable error: the job waits and gets its next attempt
dropped   the job was final already, or another attempt has it: the message is a duplicate
returned  the ledger or the broker is out of reach: the message goes back to the queue
"""

import logging
import os
import random
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from celery import Celery
from celery.exceptions import Reject
from celery.signals import setup_logging
from pydantic import ValidationError

from worker import broker, lifeline, pipeline, wiring
from worker.contract import (
    ID_PATTERN,
    Delivery,
    Job,
    Problem,
    StatusDocument,
    StatusEvent,
    WorkerRef,
    describe,
    utc_now,
)
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

log = logging.getLogger("gradcam")

PROGRESS_EVERY_S = 0.5  # stages that pass faster are not worth a round trip
RETURN_AFTER_S = 1  # before a message goes back, so that an outage makes no busy loop
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

    def handle(self, payload: object, message_id: str) -> str:
        """Bring one message to its end; return which. Raises LedgerUnavailable, BrokerUnavailable."""
        job_id = _identify(payload, message_id)
        try:
            job = Job.parse({**payload, "id": job_id} if isinstance(payload, dict) else payload)
            claim = self.ledger.claim(job, self.worker)
        except (InvalidJob, IdempotencyConflict) as error:
            self.ledger.refuse(job_id, payload, error)
            log.warning("job %s refused: %s", job_id, error)
            return "done"
        if claim.outcome == "finished":
            log.info("job %s is %s already: dropped", job.id, claim.document.status)
            return "dropped"
        job = job.model_copy(update={"id": claim.document.id})  # the first with this idempotency key
        self._tell(job, claim.document)
        if claim.outcome == "ended":
            return "done"
        try:
            return self._run(job, claim.document)
        except AttemptFenced as error:
            log.warning("%s", error)
            return "dropped"

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
            error = InternalError(f"Unforeseen {type(error).__name__}: {error}")
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
        after = self.ledger.advance(document, **changes)
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
        if isinstance(candidate, str) and re.match(ID_PATTERN, candidate):
            return candidate
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"gradcam:{message_id}"))


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


def register(app: Celery, desk: Desk) -> None:
    """Give the app its tasks."""

    def task(name: str, handler: Callable[[object, str], str]) -> None:
        def receive(self: Any, payload: object = None) -> None:
            try:
                handler(payload, self.request.id)
            except (LedgerUnavailable, BrokerUnavailable) as error:
                log.warning("message %s goes back: %s", self.request.id, error)
                time.sleep(RETURN_AFTER_S)
                raise Reject(str(error), requeue=True) from error

        app.task(receive, name=name, bind=True)

    task(broker.EXPLAIN, desk.handle)
    task(broker.DELIVER, lambda payload, _: desk.deliver(payload))


def run(settings: Settings, *, tethered: bool = False) -> int:
    """Consume jobs in this process until it is asked to stop; return its exit code.

    `tethered` processes end, cleanly, when whoever holds their standard input is gone.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for chatty in ("httpx", "celery.app.trace"):  # our own lines say it in the job's words
        logging.getLogger(chatty).setLevel(logging.WARNING)
    setup_logging.connect(_keep_logging)
    if tethered:
        lifeline.watch(lambda: _end(settings.shutdown_timeout_s))
    app = broker.make_app(settings)
    outside = wiring.outside(settings)
    desk = Desk(
        settings,
        wiring.ledger(settings),
        outside,
        wiring.worker_ref(),
        publish=partial(broker.publish, app),
        publish_delivery=partial(broker.publish_delivery, app),
    )
    register(app, desk)
    for name in settings.preload:
        outside.residents.warm(name)
        log.info("%s is loaded", name)
    consumer = app.Worker(
        pool="threads",
        concurrency=settings.threads,
        queues=list(broker.QUEUES),
        without_gossip=True,  # with it, a restart of the broker can end the worker
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
    log.info("%s on %s takes jobs, %d threads", desk.worker.id, desk.worker.device, settings.threads)
    consumer.start()
    return int(consumer.exitcode or 0)


def _keep_logging(**_: object) -> None:
    """Being connected to Celery's signal is what keeps Celery from configuring the logs."""


def _end(timeout_s: float) -> None:
    log.warning("whoever started this worker is gone: ending")
    threading.Timer(timeout_s, os._exit, [1]).start()
    os.kill(os.getpid(), signal.SIGTERM)
