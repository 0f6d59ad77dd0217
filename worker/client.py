"""For web apps and scripts: submit a job, ask how it is, wait for it. No numpy, no TensorFlow.

>>> client = GradcamClient("redis://127.0.0.1:6379/0")
>>> job_id = client.submit(image="s3://in/pier.jpg", network="vgg16", target={"top_n": 5})
>>> client.wait(job_id).result.manifest_uri
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from worker import broker, envelope
from worker.contract import Job, StatusDocument
from worker.errors import BrokerUnavailable, WaitTimeout
from worker.ledger import Ledger
from worker.redis_ledger import RedisLedger
from worker.settings import Settings

log = logging.getLogger("gradcam")

TIMEOUT_S = 2  # for one answer of Redis: a web request is waiting
POLL_FIRST_S = 0.002  # between looks at a job
POLL_SHARE = 0.1  # of the time waited so far, where that is more: by so much an answer may be late
POLL_LAST_S = 0.5


class GradcamClient:
    """Submits jobs and reads what became of them. May be shared between threads."""

    def __init__(
        self,
        broker_url: str | None = None,
        status_url: str | None = None,
        *,
        settings: Settings | None = None,
        ledger: Ledger | None = None,
        publish: Callable[[Job], None] | None = None,
    ) -> None:
        """Without URLs, `GRADCAM_BROKER_URL` and `GRADCAM_LEDGER_URL` are used.

        `ledger` and `publish` stand in for Redis in unit tests: see `worker.testing`.
        """
        settings = settings or Settings.from_environment()
        given = {"broker_url": broker_url, "ledger_url": status_url}
        settings = settings.model_copy(update={name: url for name, url in given.items() if url})
        self._ledger = ledger or RedisLedger(settings, timeout_s=TIMEOUT_S)
        self._max_message_bytes = settings.max_message_bytes
        app = None if publish else broker.make_app(settings, timeout_s=TIMEOUT_S)
        self._app, self._publish = app, publish

    def submit(self, job: Job | None = None, /, **fields: Any) -> str:
        """Enter a job in the ledger, ring the queue, return the job's id.

        Give a `Job`, or its fields: `image`, `network` and `target` at least. Submitting the same
        job again (by id, or by `idempotency_key`) returns the first one's id and runs nothing twice.

        A job that is in the ledger is accepted: where the broker is out of reach just then, a worker finds
        the job within a minute of its turn. Raises InvalidJob, IdempotencyConflict, and LedgerUnavailable
        (it is not known whether the job was accepted: submit it again with the same id or key).
        """
        job = job or Job.parse(fields)
        envelope.check(job.model_dump(mode="json"), self._max_message_bytes)
        entered = self._ledger.submit(job)
        if entered.status == "queued":  # also of a job that was here before: perhaps its message was not
            try:
                self._ring(job.model_copy(update={"id": entered.id}), entered)
            except BrokerUnavailable as error:
                log.warning("job %s is accepted, but nobody could be told at once: %s", entered.id, error)
        return entered.id

    def _ring(self, job: Job, entered: StatusDocument) -> None:
        if self._publish:
            self._publish(job)
        else:
            broker.publish(self._app, job, entered_at=entered.created_at)

    def submit_many(self, jobs: Iterable[Job]) -> list[str]:
        """Submit jobs one after the other; return their ids in the same order. Raises as `submit`."""
        return [self.submit(job) for job in jobs]

    def status(self, job_id: str) -> StatusDocument:
        """What is known about a job. Raises UnknownJob, LedgerUnavailable."""
        return self._ledger.read(job_id)

    def statuses(self, job_ids: Iterable[str]) -> dict[str, StatusDocument]:
        """What is known about many jobs, in one round trip. Raises LedgerUnavailable."""
        return self._ledger.read_many(list(job_ids))

    def cancel(self, job_id: str) -> StatusDocument:
        """Stop a job: one that waits is `canceled` at once, a running one as soon as its worker sees it.

        A final one stays as it is: look at the document's `status`. Raises UnknownJob, LedgerUnavailable.
        """
        return self._ledger.cancel(job_id)

    def wait(self, job_id: str, timeout_s: float = 120) -> StatusDocument:
        """Wait until a job is final, whichever way it ended. Raises WaitTimeout, UnknownJob."""
        begun = time.monotonic()
        while True:
            document = self.status(job_id)
            if document.final:
                return document
            waited_s = time.monotonic() - begun
            if waited_s >= timeout_s:
                message = f"Job {job_id} is still {document.status} after {timeout_s:g} s."
                raise WaitTimeout(message)
            pause_s = min(max(POLL_SHARE * waited_s, POLL_FIRST_S), POLL_LAST_S)
            time.sleep(min(pause_s, timeout_s - waited_s))
