"""Puts right what nobody else would: jobs whose worker died, whose pause is over, whose message was lost.

One worker at a time does it, any of them; another takes over within seconds where that one is gone.
"""

import logging
import time
from collections.abc import Callable

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.observability.events import SILENT, Observer
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.schemas.shard import ROUTES

log = logging.getLogger("gradcam")

EVERY_S = 0.5  # a pause before a retry is as exact as this
LEADS_S = 5.0  # that the others leave it to this worker, unless it says so again
AT_ONCE = 200  # jobs of each kind in one round
SILENT_EVERY_S = 2.0  # between two looks for lost messages: they cost a question to the broker
SWEEP_EVERY_S = 600.0
FIRST_LOOK_S = 2.0  # in which every worker that lives renews its leases
HUNG_S = 1.0  # that an answer may take: after a longer silence of the ledger, leases are in doubt


class Reaper:
    """Looks through the ledger again and again."""

    def __init__(
        self,
        ledger: Ledger,
        worker: str,
        publish: Callable[[str, str], None],
        waiting: Callable[[str], int],
        *,
        lease_s: float,
        lost_after_s: float,
        observer: Observer = SILENT,
        outages: Outages | None = None,
    ) -> None:
        """`publish` publishes a job again, by its id and priority; `waiting` says how many messages a
        priority's queue holds.
        """
        self._ledger, self._worker = ledger, worker
        self._publish, self._waiting = publish, waiting
        self._lease_s, self._lost_after_s = lease_s, lost_after_s
        self._observer = observer
        self.loop = BackgroundLoop(
            "reaper",
            self.round,
            EVERY_S,
            outages=outages or Outages(),
            consequence="nothing can be put right",
        )
        self._trusted_s = 0.0  # from when on a lease that has run out means what it says
        self._looked_s = self._swept_s = 0.0
        self._reached_s: float | None = None  # when the ledger answered last
        self._deaf = False  # the ledger was out of reach
        self._odd: set[str] = set()  # jobs whose record cannot be read

    def round(self) -> None:
        """Look once at everything that is due. Raises LedgerUnavailable, BrokerUnavailable."""
        try:
            self._round()
        except LedgerUnavailable:
            self._deaf = True
            raise

    def _round(self) -> None:
        leads, now_s = self._ledger.try_lead(self._worker, LEADS_S), time.monotonic()
        if self._deaf or (self._reached_s is not None and now_s - self._reached_s > LEADS_S):
            # Nobody could renew a lease while the ledger was away: all of them get the time to.
            self._trusted_s, self._deaf = now_s + self._lease_s, False
        elif self._reached_s is None:  # this worker may have come up together with the ledger
            self._trusted_s = now_s + FIRST_LOOK_S
        self._reached_s = now_s
        if not leads:
            return
        self._put_right(trusted=now_s >= self._trusted_s)
        if now_s - self._looked_s > SILENT_EVERY_S:
            self._looked_s = now_s
            self._look_for_lost_messages()
        if now_s - self._swept_s > SWEEP_EVERY_S:
            self._swept_s = now_s
            self._ledger.prune()

    def _put_right(self, *, trusted: bool) -> None:
        asked_s = time.monotonic()
        overdue = self._ledger.overdue(AT_ONCE + len(self._odd))
        trusted = trusted and time.monotonic() - asked_s < HUNG_S  # else nobody could renew meanwhile
        for job_id in overdue["expired"]:
            self._one(job_id, self._ledger.expire)
        for job_id in overdue["due"]:
            if route := self._one(job_id, self._ledger.requeue):
                self._publish_again(job_id, route, "is due again")
        for job_id in overdue["lost"] if trusted else ():
            if route := self._one(job_id, self._ledger.expire_lease):
                self._publish_again(job_id, route, "was lost with its worker: it runs again, alone")

    def _one(self, job_id: str, change: Callable[[str], str | None]) -> str | None:
        """Change one job; one whose record cannot be read must not keep the others waiting."""
        try:
            return change(job_id)
        except (LedgerUnavailable, BrokerUnavailable):
            raise
        except BaseException:
            if job_id not in self._odd:
                log.exception("job %s cannot be put right", job_id)
            self._odd.add(job_id)  # a later version's, perhaps: others must get their turn all the same
            return None

    def _look_for_lost_messages(self) -> None:
        for route in ROUTES:
            silent = self._ledger.find_unpublished(
                route, empty=not self._waiting(route), lost_after_s=self._lost_after_s, limit=AT_ONCE
            )
            for job_id in silent:
                self._observer.republished()
                self._publish_again(
                    job_id, route, "has no message that is to be found: it is published again"
                )

    def _publish_again(self, job_id: str, route: str, why: str) -> None:
        log.info("job %s %s", job_id, why)
        self._publish(job_id, route)
