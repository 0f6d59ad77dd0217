"""Recovers expired leases, due retries, expired jobs and lost messages.

One worker at a time does it, any of them; another takes over within seconds where that one is gone.
"""

import logging
import time
from collections.abc import Callable

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.schemas.shard import ROUTES

log = logging.getLogger("gradcam")

EVERY_S = 0.5  # a pause before a retry is as exact as this
LEADER_LEASE_S = 5.0  # that the others leave it to this worker, which renews it each round
AT_ONCE = 200  # jobs of each kind in one round
LOST_MESSAGES_EVERY_S = 2.0  # a search for them asks the broker for the lengths of its queues
PRUNE_EVERY_S = 600.0
RENEWED_WITHIN_S = 2.0  # in which every worker that lives renews its leases
SLOW_ANSWER_S = 1.0  # after an answer that took longer, leases are in doubt: nobody could renew them


class Reaper:
    """Acts on what is overdue in a ledger, again and again: see `loop`."""

    def __init__(
        self,
        ledger: Ledger,
        worker: str,
        publish: Callable[[str, str], None],
        waiting: Callable[[str], int],
        *,
        lease_s: float,
        lost_after_s: float,
        observer: Observer = NULL_OBSERVER,
        outages: Outages | None = None,
    ) -> None:
        """Nothing is done yet.

        Args:
            ledger: Where to look.
            worker: The id of this worker.
            publish: Publishes a job again, by its id and priority.
            waiting: How many messages the queue of a priority holds.
            lease_s: How long a lease lasts: after an outage of the ledger, none is expired for so long.
            lost_after_s: How long a message may take to be received.
            observer: Is told of what is published again.
            outages: Where outages of ledger and broker are noted.
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
        self._searched_s = self._pruned_s = 0.0
        self._answered_s: float | None = None  # when the ledger answered last
        self._was_unreachable = False  # the ledger was out of reach
        self._unreadable: set[str] = set()  # jobs whose record cannot be read

    def round(self) -> None:
        """Act once on all that is overdue, where this worker leads.

        Raises:
            LedgerUnavailable: The ledger cannot be reached.
            BrokerUnavailable: A job cannot be published.
        """
        try:
            self._round()
        except LedgerUnavailable:
            self._was_unreachable = True
            raise

    def _round(self) -> None:
        leads, now_s = self._ledger.try_lead(self._worker, LEADER_LEASE_S), time.monotonic()
        if self._was_unreachable or (
            self._answered_s is not None and now_s - self._answered_s > LEADER_LEASE_S
        ):
            # Nobody could renew a lease while the ledger was away: all of them get the time to.
            self._trusted_s, self._was_unreachable = now_s + self._lease_s, False
        elif self._answered_s is None:  # this worker may have come up together with the ledger
            self._trusted_s = now_s + RENEWED_WITHIN_S
        self._answered_s = now_s
        if not leads:
            return
        self._recover_overdue(trusted=now_s >= self._trusted_s)
        if now_s - self._searched_s > LOST_MESSAGES_EVERY_S:
            self._searched_s = now_s
            self._recover_lost_messages()
        if now_s - self._pruned_s > PRUNE_EVERY_S:
            self._pruned_s = now_s
            self._ledger.prune()

    def _recover_overdue(self, *, trusted: bool) -> None:
        asked_s = time.monotonic()
        overdue = self._ledger.find_overdue(AT_ONCE + len(self._unreadable))
        trusted = trusted and time.monotonic() - asked_s < SLOW_ANSWER_S  # else nobody could renew meanwhile
        for job_id in overdue.expired_jobs:
            self._change(job_id, self._ledger.expire)
        for job_id in overdue.due_retries:
            if route := self._change(job_id, self._ledger.requeue):
                self._publish_again(job_id, route, "is due again")
        for job_id in overdue.expired_leases if trusted else ():
            if route := self._change(job_id, self._ledger.expire_lease):
                self._publish_again(job_id, route, "was lost with its worker: it runs again, alone")

    def _change(self, job_id: str, change: Callable[[str], str | None]) -> str | None:
        """Change one job; one whose record cannot be read must not keep the others waiting."""
        try:
            return change(job_id)
        except (LedgerUnavailable, BrokerUnavailable):
            raise
        except BaseException:
            if job_id not in self._unreadable:
                log.exception("job %s cannot be put right", job_id)
            self._unreadable.add(
                job_id
            )  # a later version's, perhaps: others must get their turn all the same
            return None

    def _recover_lost_messages(self) -> None:
        for route in ROUTES:
            lost = self._ledger.find_unpublished(
                route, empty=not self._waiting(route), lost_after_s=self._lost_after_s, limit=AT_ONCE
            )
            for job_id in lost:
                self._observer.message_republished()
                self._publish_again(
                    job_id, route, "has no message that is to be found: it is published again"
                )

    def _publish_again(self, job_id: str, route: str, why: str) -> None:
        log.info("job %s %s", job_id, why)
        self._publish(job_id, route)
