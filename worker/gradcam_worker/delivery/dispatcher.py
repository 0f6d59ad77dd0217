"""Delivers events from the outbox to webhooks and databases, in threads of its own: no job waits for that.

A recipient that does not answer is tried again, with growing pauses, for days; then its deliveries are
parked, and can be replayed. A host that answers slowly, or never, occupies few of the threads: hosts that did
not answer the last time, or were not asked yet, may have half of them together and one each.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from gradcam_worker.errors import (
    DeliveryRefused,
    EndpointGone,
    GradcamError,
    LedgerUnavailable,
    StatusUnavailable,
    UriNotAllowed,
)
from gradcam_worker.ledger.outbox import Delivery, Outbox
from gradcam_worker.observability import logs
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.observability.tracing import NO_TRACES, Traces, trace_id
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.status import StatusEvent

log = logging.getLogger("gradcam")

POLL_EVERY_S = 0.2  # while nothing is due
# After a failed delivery. A receiver may be down for days; jitter keeps its deliveries apart when it is back.
REDELIVERY = RetryPolicy(first_s=2.0, max_s=3 * 3600.0, jitter=(0.8, 1.2))
# How long a claimed delivery is this process's own, which is more than it takes. After that another
# dispatcher takes the deliveries of a process that died.
LEASE_S = 60.0
MAX_TRUSTED = 100  # destinations that are remembered because they answered
FINISH_S = 4.0  # for deliveries in progress when the dispatcher stops; they are due again after their lease

Deliver = Callable[[Delivery, StatusEvent], None]


class OutboxDispatcher:
    """Claims deliveries that are due in the outbox and makes them, a few at a time."""

    def __init__(
        self,
        outbox: Outbox,
        to_webhook: Deliver,
        sinks: Mapping[str, Deliver],
        *,
        threads: int,
        give_up_s: float,
        lease_s: float = LEASE_S,
        observer: Observer = NULL_OBSERVER,
        traces: Traces = NO_TRACES,
        outages: Outages | None = None,
    ) -> None:
        """What is delivered raises StatusUnavailable (again later), EndpointGone, DeliveryRefused,
        UriNotAllowed; within `lease_s`.
        """
        self._outbox, self._to_webhook, self._sinks = outbox, to_webhook, sinks
        self._threads, self._give_up_s, self._lease_s = threads, give_up_s, lease_s
        self._observer, self._traces = observer, traces
        self._outages = outages or Outages()
        self._queue = SimpleQueue[Delivery | None]()
        self._lock, self._freed = threading.Lock(), threading.Event()
        self._in_progress: Counter[str] = Counter()  # by destination
        self._trusted: dict[str, None] = {}  # destinations that answered the last time, the latest last
        self._claimed_some = False  # the last time
        self.loop = BackgroundLoop(
            "dispatcher",
            self._step,
            lambda: 0 if self._claimed_some else POLL_EVERY_S,
            immediately=True,
            outages=self._outages,
            consequence="nothing can be delivered",
            context=self._delivering(),
        )

    def run_round(self) -> None:
        """Deliver all that is due, and wait for it. Raises LedgerUnavailable."""
        with self._worker_threads():
            while self._claim() or self._in_progress.total():
                self._wait(self._lease_s)

    def _step(self) -> None:
        self._claimed_some = False
        self._claimed_some = self._claim()

    @contextmanager
    def _delivering(self) -> Iterator[None]:
        """What the loop runs in: at its end, deliveries in progress are waited for, FINISH_S at most."""
        with self._worker_threads():
            yield
            self._wait(FINISH_S)

    @contextmanager
    def _worker_threads(self) -> Iterator[None]:
        """Threads that make deliveries. They are not joined: a process has to be able to end."""
        for _ in range(self._threads):
            threading.Thread(target=self._work, name="dispatcher", daemon=True).start()
        try:
            yield
        finally:
            for _ in range(self._threads):
                self._queue.put(None)

    def _wait(self, seconds: float) -> None:
        """Until nothing is in progress, or for so long."""
        end = time.monotonic() + seconds
        while self._in_progress.total() and time.monotonic() < end:
            self._freed.wait(POLL_EVERY_S / 4)
            self._freed.clear()

    def _claim(self) -> bool:
        """Give what is due to the free threads; whether anything was."""
        with self._lock:
            free = self._threads - self._in_progress.total()
            most = max(self._threads - 1, 1)  # one destination never has them all
            limits = {
                destination: max(most - self._in_progress[destination], 0) for destination in self._trusted
            }
            untrusted = [
                destination for destination in (*self._sinks, *self._in_progress) if destination not in limits
            ]
            limits |= {destination: 0 if self._in_progress[destination] else 1 for destination in untrusted}
            others_limit = max(self._threads // 2, 1) - sum(
                self._in_progress[destination] for destination in dict.fromkeys(untrusted)
            )
        if not free:
            return False
        deliveries = self._outbox.claim_deliveries(
            free, lease_s=self._lease_s, limits=limits, others_limit=max(others_limit, 0)
        )
        with self._lock:
            self._in_progress.update(delivery.destination for delivery in deliveries)
        for delivery in deliveries:
            self._queue.put(delivery)
        return bool(deliveries)

    def _work(self) -> None:
        while (delivery := self._queue.get()) is not None:
            answered = False
            try:
                answered = self._attempt(delivery)
            except LedgerUnavailable as error:
                self._outages.ledger.failed(str(error))  # it is due again when its lease is over
            except BaseException:
                log.exception("%s: %s was not delivered", delivery.recipient, delivery.event)
            self._done(delivery.destination, answered=answered)

    def _done(self, destination: str, *, answered: bool) -> None:
        with self._lock:
            self._in_progress[destination] -= 1
            if not self._in_progress[destination]:
                del self._in_progress[destination]
            self._trusted.pop(destination, None)
            if answered:
                self._trusted[destination] = None
                if len(self._trusted) > MAX_TRUSTED:
                    del self._trusted[next(iter(self._trusted))]
        self._freed.set()
        self.loop.wake()

    def _attempt(self, delivery: Delivery) -> bool:
        """Deliver and record the result; whether the destination answered."""
        document = delivery.document
        trace = trace_id(document.traceparent)
        with logs.log_context(job_id=document.id, attempt=document.attempt, trace_id=trace):
            return self._record(delivery)

    def _record(self, delivery: Delivery) -> bool:
        try:
            self._deliver(delivery)
        except StatusUnavailable as error:
            self._reschedule(delivery, error, error.retry_after_s or 0)
            return False
        except EndpointGone as error:
            if delivery.webhook:
                self._outbox.disable(delivery.webhook.url)
            self._park(delivery, error)
        except (DeliveryRefused, UriNotAllowed) as error:
            if delivery.document.final:
                self._park(delivery, error)
            else:
                log.warning("%s: %s is dropped: %s", delivery.recipient, delivery.event, error)
                self._observer.events_delivered("failed")
                self._outbox.complete(delivery)  # the recipient may want the final event all the same
        except BaseException as error:
            log.exception("%s: %s was not delivered", delivery.recipient, delivery.event)
            self._reschedule(delivery, error, 0)
            return False
        else:
            self._observer.events_delivered("delivered")
            self._outbox.complete(delivery)
        return True

    def _deliver(self, delivery: Delivery) -> None:
        event = StatusEvent(type=f"gradcam.{delivery.event}", timestamp=utc_now(), data=delivery.document)
        if delivery.webhook:
            traceparent = delivery.document.traceparent
            known = (
                self._traces if traceparent else NO_TRACES
            )  # alone, a delivery is no trace worth looking at
            facts: dict[str, Any] = {"job_id": delivery.document.id, "event": delivery.event}
            with known.start_span("webhook", traceparent, kind="CLIENT", tries=delivery.tries, **facts):
                self._to_webhook(delivery, event)
        elif delivery.destination in self._sinks:
            self._sinks[delivery.destination](delivery, event)
        else:
            message = f"This worker does not know the status backend {delivery.destination!r}."
            raise StatusUnavailable(message)

    def _reschedule(self, delivery: Delivery, error: BaseException, retry_after_s: float) -> None:
        """Deliver it later, after as long as the receiver asks for at least; after `give_up_s`, park it."""
        if delivery.waited_s < self._give_up_s:
            pause_s = max(retry_after_s, REDELIVERY.pause_s(delivery.tries + 1))
            self._observer.events_delivered("failed")
            self._outbox.postpone(delivery, pause_s, quiet_s=retry_after_s)
            return
        self._park(delivery, error)
        others = 0
        while more := self._outbox.park_overdue(delivery.destination, self._give_up_s):
            others += more
        if others:
            self._observer.events_delivered("parked", others)
            log.error(
                "%s: %d more recipients there are parked, who waited as long", delivery.destination, others
            )

    def _park(self, delivery: Delivery, error: BaseException) -> None:
        why = str(error) if isinstance(error, GradcamError) else type(error).__name__
        log.error("%s: %s is parked: %s", delivery.recipient, delivery.event, why)
        self._observer.events_delivered("parked")
        self._outbox.park(delivery)
