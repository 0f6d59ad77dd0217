"""Renews the leases of the jobs that run in this process.

No other worker runs a job while its lease is valid.
"""

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

RENEWALS_PER_LEASE = 3  # so that two renewals in a row may fail
MAX_RENEWAL_INTERVAL_S = 1.0  # a renewal is also how a job learns that it was cancelled
PENDING_PROGRESS_INTERVAL_S = 0.25  # for progress that the threads of the jobs left pending


class LeaseManager:
    """Renews the leases of all jobs of this process with one request.

    When a job loses its lease, or its cancellation was requested, its deadline is cancelled.
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
        """Start no thread yet: see `loop`.

        Args:
            ledger: Holds the leases.
            worker: The id of this worker.
            lease_s: Duration of a lease in seconds.
            health: Returns the worker's state of health, which each renewal reports.
            observer: Counts renewed and lost leases.
            outages: Logs the outages of the ledger.
        """
        self._ledger, self._worker, self._health = ledger, worker, health
        self._lease_s, self._observer = lease_s, observer
        self._releasing = False
        self._held: dict[str, tuple[int, Deadline]] = {}  # job id -> attempt, deadline
        self._progress_writers: dict[str, Callable[[], None]] = {}  # by job id
        self._lock = threading.Lock()
        self._renewal_interval_s = min(lease_s / RENEWALS_PER_LEASE, MAX_RENEWAL_INTERVAL_S)
        self._due_s = time.monotonic() + self._renewal_interval_s  # when the next renewal is due
        self._ledger_reached = True  # whether the latest request succeeded
        self.loop = BackgroundLoop(
            "leases",
            self.step,
            self._pause_s,
            outages=outages or Outages(),
            consequence="no lease can be renewed",
        )

    @contextmanager
    def hold(
        self, document: StatusDocument, deadline: Deadline, write_pending: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Renew the lease of a job that has just been claimed, as long as the block lasts.

        Args:
            document: The document of the claimed job.
            deadline: The job's deadline. It is cancelled if the lease is lost or the job is cancelled.
            write_pending: Called at intervals, to write progress that the job left pending.
        """
        begun = document.started_at or document.updated_at
        deadline.hold(self._lease_s - (utc_now() - begun).total_seconds())
        with self._lock:
            self._held[document.id] = document.attempt, deadline
            self._progress_writers[document.id] = write_pending
        try:
            yield
        except AttemptFenced:
            if not self._releasing:
                self._observer.lease_lost()
            raise
        finally:
            with self._lock:
                self._held.pop(document.id, None)
                self._progress_writers.pop(document.id, None)

    def jobs(self) -> dict[str, int]:
        """The jobs that run in this process: job id -> attempt."""
        with self._lock:
            return {job_id: attempt for job_id, (attempt, _) in self._held.items()}

    def renew(self) -> None:
        """Renew all leases, and cancel the deadlines of jobs that have to stop.

        Raises:
            LedgerUnavailable: The ledger cannot be reached.
        """
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

    def write_progress(self) -> None:
        """Write the pending progress of all jobs. Raises LedgerUnavailable."""
        with self._lock:
            writers = [*self._progress_writers.values()]
        for write_pending in writers:
            write_pending()

    def release_all(self) -> dict[str, int]:
        """Cancel the deadlines of all jobs that run here. Return job id -> attempt."""
        self._releasing = True
        with self._lock:
            for attempt, deadline in self._held.values():
                deadline.cancel(AttemptFenced(f"Attempt {attempt} was requeued: its worker stops."))
        return self.jobs()

    def step(self) -> None:
        """Renew the leases if that is due, and write pending progress. Raises LedgerUnavailable."""
        try:
            if time.monotonic() >= self._due_s:
                # Set before the request: a slow response does not delay the next renewal.
                self._due_s = time.monotonic() + self._renewal_interval_s
                self.renew()
                self._ledger_reached = True
            if self._ledger_reached:
                self.write_progress()
        except LedgerUnavailable:
            self._ledger_reached = False
            raise

    def _pause_s(self) -> float:
        left_s = max(self._due_s - time.monotonic(), 0)
        return min(left_s, PENDING_PROGRESS_INTERVAL_S) if self._ledger_reached else left_s
