"""The leases of the jobs that run in this process. Nobody else runs a job while its lease is renewed."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradcam_worker.errors import AttemptFenced, JobCanceled, LedgerUnavailable
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.status import StatusDocument

log = logging.getLogger("gradcam")

RENEWALS_PER_LEASE = 3  # two in a row may fail
WRITE_STAGES_EVERY_S = 0.25  # the stages that jobs have begun and not written themselves
RENEW_AT_LEAST_EVERY_S = 1.0  # so that a job stops soon after it was cancelled


class LeaseManager:
    """Renews the leases of all jobs of this process in one request.

    The deadline of a job whose lease is lost, or that was cancelled, is cancelled.
    """

    def __init__(
        self,
        ledger: Ledger,
        worker: str,
        lease_s: float,
        health: Callable[[], str] = lambda: "",
        observer: Observer = NULL_OBSERVER,
        outages: Outages | None = None,
    ) -> None:
        """`health` is what the worker says of itself, `outages` of a ledger that is away."""
        self._ledger, self._worker, self._health = ledger, worker, health
        self._lease_s, self._observer = lease_s, observer
        self._releasing = False
        self._held: dict[str, tuple[int, Deadline]] = {}  # job id -> attempt
        self._stage_writers: dict[str, Callable[[], None]] = {}  # by job id
        self._lock = threading.Lock()
        self._renew_every_s = min(lease_s / RENEWALS_PER_LEASE, RENEW_AT_LEAST_EVERY_S)
        self._due_s = time.monotonic() + self._renew_every_s  # the next renewal
        self._reached = True  # the ledger, the last time
        self.loop = BackgroundLoop(
            "leases",
            self.step,
            self._pause_s,
            outages=outages or Outages(),
            consequence="no lease can be renewed",
        )

    @contextmanager
    def hold(
        self, document: StatusDocument, deadline: Deadline, write_stage: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Renew the lease of a job that has just been claimed, as long as the block lasts.

        Args:
            document: The job's, as it was claimed.
            deadline: The job's. It is cancelled when the lease is lost or the job is cancelled.
            write_stage: Called at intervals. It writes the job's stage, if that is not written yet.
        """
        begun = document.started_at or document.updated_at
        deadline.hold(self._lease_s - (utc_now() - begun).total_seconds())
        with self._lock:
            self._held[document.id] = document.attempt, deadline
            self._stage_writers[document.id] = write_stage
        try:
            yield
        except AttemptFenced:
            if not self._releasing:
                self._observer.lease_lost()
            raise
        finally:
            with self._lock:
                self._held.pop(document.id, None)
                self._stage_writers.pop(document.id, None)

    def jobs(self) -> dict[str, int]:
        """What runs here: job id -> attempt."""
        with self._lock:
            return {job_id: attempt for job_id, (attempt, _) in self._held.items()}

    def renew(self) -> None:
        """Renew all leases, and cancel the deadlines of jobs that have to stop. Raises LedgerUnavailable."""
        with self._lock:
            held = dict(self._held)
        sent_s = time.monotonic()
        renewed = self._ledger.renew_leases(
            self._worker, self._health(), {job_id: attempt for job_id, (attempt, _) in held.items()}
        )
        self._observer.leases_renewed(len(held.keys() - renewed.lost))
        for job_id, (attempt, deadline) in held.items():
            if job_id in renewed.lost:
                deadline.cancel(AttemptFenced(f"Attempt {attempt} of job {job_id} was overtaken."))
            elif job_id in renewed.canceled:
                deadline.cancel(JobCanceled("The job was cancelled on request."))
            else:
                deadline.hold(self._lease_s - (time.monotonic() - sent_s))

    def write_stages(self) -> None:
        """Have each job's stage written, where it is not written yet. Raises LedgerUnavailable."""
        with self._lock:
            writers = [*self._stage_writers.values()]
        for write in writers:
            write()

    def release_all(self) -> dict[str, int]:
        """Cancel the deadlines of all jobs that run here; return them: job id -> attempt."""
        self._releasing = True
        with self._lock:
            for attempt, deadline in self._held.values():
                deadline.cancel(AttemptFenced(f"Attempt {attempt} was handed back: its worker stops."))
        return self.jobs()

    def step(self) -> None:
        """Renew the leases where that is due, and write how far the jobs are. Raises LedgerUnavailable."""
        try:
            if time.monotonic() >= self._due_s:
                self._due_s = time.monotonic() + self._renew_every_s  # on schedule, however slow the answer
                self.renew()
                self._reached = True
            if self._reached:
                self.write_stages()
        except LedgerUnavailable:
            self._reached = False
            raise

    def _pause_s(self) -> float:
        left_s = max(self._due_s - time.monotonic(), 0)
        return min(left_s, WRITE_STAGES_EVERY_S) if self._reached else left_s
