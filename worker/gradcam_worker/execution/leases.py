"""The jobs that run in this process, and the leases that keep others from running them, too."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradcam_worker.errors import AttemptFenced, JobCanceled, LedgerUnavailable
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.observability.events import SILENT, Observer
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.status import StatusDocument

log = logging.getLogger("gradcam")

BEATS = 3  # in the time of one lease: two may fail
CATCH_UP_S = 0.25  # between two looks which jobs have begun a stage that is not written yet
LOOK_S = 1.0  # between two beats at most, so that a job is stopped soon after somebody has asked for it


class LeaseManager:
    """Renews all of them together. A job whose lease is gone, or that is to stop, is told by its deadline."""

    def __init__(
        self,
        ledger: Ledger,
        worker: str,
        lease_s: float,
        health: Callable[[], str] = lambda: "",
        observer: Observer = SILENT,
        outages: Outages | None = None,
    ) -> None:
        """`health` is what the worker says of itself, `outages` of a ledger that is away."""
        self._ledger, self._worker, self._health = ledger, worker, health
        self._lease_s, self._observer = lease_s, observer
        self._letting_go = False
        self._held: dict[str, tuple[int, Deadline]] = {}  # job id -> attempt
        self._behind: dict[str, Callable[[], None]] = {}  # job id -> what writes how far it is
        self._door = threading.Lock()
        self._renew_every_s = min(lease_s / BEATS, LOOK_S)
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
        self, document: StatusDocument, deadline: Deadline, catch_up: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        """Within it, the lease of a job that has just been claimed is renewed.

        `catch_up` is called again and again: it writes how far the job is, where that is not written yet.
        """
        begun = document.started_at or document.updated_at
        deadline.hold(self._lease_s - (utc_now() - begun).total_seconds())
        with self._door:
            self._held[document.id] = document.attempt, deadline
            self._behind[document.id] = catch_up
        try:
            yield
        except AttemptFenced:
            if not self._letting_go:
                self._observer.lease_lost()
            raise
        finally:
            with self._door:
                self._held.pop(document.id, None)
                self._behind.pop(document.id, None)

    def jobs(self) -> dict[str, int]:
        """What runs here: job id -> attempt."""
        with self._door:
            return {job_id: attempt for job_id, (attempt, _) in self._held.items()}

    def renew(self) -> None:
        """Renew all leases, and hear which jobs are to stop. Raises LedgerUnavailable."""
        with self._door:
            held = dict(self._held)
        asked_s = time.monotonic()
        learned = self._ledger.renew_leases(
            self._worker, self._health(), {job_id: attempt for job_id, (attempt, _) in held.items()}
        )
        self._observer.leases_renewed(len(held.keys() - learned.lost))
        for job_id, (attempt, deadline) in held.items():
            if job_id in learned.lost:
                deadline.cancel(AttemptFenced(f"Attempt {attempt} of job {job_id} was overtaken."))
            elif job_id in learned.canceled:
                deadline.cancel(JobCanceled("The job was cancelled on request."))
            else:
                deadline.hold(self._lease_s - (time.monotonic() - asked_s))

    def catch_up(self) -> None:
        """Have written how far each job is. Raises LedgerUnavailable."""
        with self._door:
            behind = [*self._behind.values()]
        for write in behind:
            write()

    def release_all(self) -> dict[str, int]:
        """Stop all that runs here; return what it was: job id -> attempt."""
        self._letting_go = True
        with self._door:
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
                self.catch_up()
        except LedgerUnavailable:
            self._reached = False
            raise

    def _pause_s(self) -> float:
        left_s = max(self._due_s - time.monotonic(), 0)
        return min(left_s, CATCH_UP_S) if self._reached else left_s
