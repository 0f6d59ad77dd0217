"""The reaper: recovers jobs with expired leases, due retries and lost messages, and ends expired jobs.

Every worker has one, and one of them acts at a time, the leader. When that worker is gone, another becomes
the leader within seconds.
"""

import time
from collections.abc import Callable

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.schemas.work import ROUTES
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

ROUND_INTERVAL_S = 0.5  # also the precision of the pauses before retries
LEADER_LEASE_S = 5.0  # renewed in each round
MAX_JOBS_PER_ROUND = 200  # of each kind
LOST_MESSAGES_INTERVAL_S = 2.0  # each search also asks the broker for the lengths of its queues
PRUNE_INTERVAL_S = 600.0
RENEWAL_INTERVAL_S = 2.0  # within which every live worker renews its leases
MAX_ANSWER_S = 1.0  # if the ledger answered more slowly, workers may not have been able to renew their leases


class Reaper:
    """Acts on overdue jobs in a ledger, again and again while its loop runs."""

    def __init__(
        self,
        ledger: Ledger,
        worker: str,
        publish: Callable[[str, str], None],
        count_messages: Callable[[str], int],
        *,
        lease_s: float,
        lost_after_s: float,
        observer: Observer = NULL_OBSERVER,
        outages: Outages | None = None,
    ) -> None:
        """Start nothing yet.

        Args:
            ledger: The ledger.
            worker: The id of this worker.
            publish: Publishes a job again, by its id and route.
            count_messages: Returns the number of messages in the queue of a route.
            lease_s: The duration of a lease. After an outage of the ledger no lease is expired for so long.
            lost_after_s: The time within which a message must be received.
            observer: Is notified of jobs that are published again.
            outages: Records outages of ledger and broker.
        """
        self._ledger, self._worker = ledger, worker
        self._publish, self._count_messages = publish, count_messages
        self._lease_s, self._lost_after_s = lease_s, lost_after_s
        self._observer = observer
        self.loop = BackgroundLoop(
            "reaper",
            self.run_round,
            ROUND_INTERVAL_S,
            outages=outages or Outages(),
            consequence="no job can be recovered",
        )
        self._leases_valid_from_s = 0.0  # until then, expired leases may only mean that the ledger was away
        self._searched_s = self._pruned_s = 0.0
        self._answered_s: float | None = None  # when the ledger last answered
        self._was_unreachable = False
        self._unreadable: set[str] = set()  # jobs whose record this version cannot read

    def run_round(self) -> None:
        """Act once on all overdue jobs, if this worker is the leader.

        Raises:
            LedgerUnavailable: The ledger cannot be reached.
            BrokerUnavailable: A job cannot be published.
        """
        try:
            self._run_round()
        except LedgerUnavailable:
            self._was_unreachable = True
            raise

    def _run_round(self) -> None:
        leads, now_s = self._ledger.try_lead(self._worker, LEADER_LEASE_S), time.monotonic()
        if self._was_unreachable or (
            self._answered_s is not None and now_s - self._answered_s > LEADER_LEASE_S
        ):
            # No worker could renew a lease during the outage: each gets a whole lease to do so.
            self._leases_valid_from_s, self._was_unreachable = now_s + self._lease_s, False
        elif self._answered_s is None:  # this worker may have started together with the ledger
            self._leases_valid_from_s = now_s + RENEWAL_INTERVAL_S
        self._answered_s = now_s
        if not leads:
            return
        self._recover_overdue(expire_leases=now_s >= self._leases_valid_from_s)
        if now_s - self._searched_s > LOST_MESSAGES_INTERVAL_S:
            self._searched_s = now_s
            self._recover_lost_messages()
        if now_s - self._pruned_s > PRUNE_INTERVAL_S:
            self._pruned_s = now_s
            self._ledger.prune()

    def _recover_overdue(self, *, expire_leases: bool) -> None:
        asked_s = time.monotonic()
        overdue = self._ledger.find_overdue(MAX_JOBS_PER_ROUND + len(self._unreadable))
        expire_leases = expire_leases and time.monotonic() - asked_s < MAX_ANSWER_S
        for job_id in overdue.expired_jobs:
            self._change(job_id, self._ledger.expire)
        for job_id in overdue.due_retries:
            if route := self._change(job_id, self._ledger.requeue):
                log.info("job_retry_due", job_id=job_id)
                self._publish(job_id, route)
        for job_id in overdue.expired_leases if expire_leases else ():
            if route := self._change(job_id, self._ledger.expire_lease):
                log.info("job_lease_expired", job_id=job_id)
                self._publish(job_id, route)

    def _change(self, job_id: str, change: Callable[[str], str | None]) -> str | None:
        """Change one job. A record that this version cannot read does not stop the recovery of others."""
        try:
            return change(job_id)
        except (LedgerUnavailable, BrokerUnavailable):
            raise
        except BaseException:
            if job_id not in self._unreadable:
                log.exception("job_recovery_failed", job_id=job_id)
            self._unreadable.add(job_id)
            return None

    def _recover_lost_messages(self) -> None:
        for route in ROUTES:
            job_ids = self._ledger.find_unpublished(
                route,
                queue_is_empty=not self._count_messages(route),
                lost_after_s=self._lost_after_s,
                limit=MAX_JOBS_PER_ROUND,
            )
            for job_id in job_ids:
                self._observer.message_republished()
                log.info("job_message_lost", job_id=job_id)
                self._publish(job_id, route)
