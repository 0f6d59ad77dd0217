"""The jobs that run in this process, and the leases that keep others from running them, too."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradcam_worker.errors import AttemptFenced, JobCanceled, LedgerUnavailable
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.observability.events import SILENT, Observer
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.outages import Outage
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
        outage: Outage | None = None,
    ) -> None:
        """`health` is what the worker says of itself, `outage` of a ledger that is away."""
        self._outage = outage or Outage("the ledger")
        self._ledger, self._worker, self._health = ledger, worker, health
        self._lease_s, self._observer = lease_s, observer
        self._letting_go = False
        self._held: dict[str, tuple[int, Deadline]] = {}  # job id -> attempt
        self._behind: dict[str, Callable[[], None]] = {}  # job id -> what writes how far it is
        self._door = threading.Lock()

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

    def run(self, stopped: threading.Event) -> None:
        """Renew until `stopped`; a ledger out of reach is asked again."""
        every_s, reached = min(self._lease_s / BEATS, LOOK_S), True
        due_s = time.monotonic() + every_s
        while not stopped.wait(min(max(due_s - time.monotonic(), 0), CATCH_UP_S)):
            try:
                if time.monotonic() >= due_s:
                    due_s = time.monotonic() + every_s
                    self.renew()
                    self._outage.answered()
                    reached = True
                if reached:
                    self.catch_up()
            except LedgerUnavailable as error:
                reached = False
                self._outage.failed(f"no lease can be renewed: {error}")
            except BaseException:
                # Whatever it is, without this thread every job here would be lost to others, for ever.
                log.exception("leases could not be renewed")
