"""Delivers events from the outbox to their recipients, in its own threads: no job waits for a receiver.

A failed delivery is repeated, with growing pauses, for days. Then its recipient is parked and can be
replayed. Slow or unreachable hosts occupy few threads: all hosts whose last delivery failed, or that have had
none yet, get at most half of the threads together, and one each.
"""

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
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

POLL_INTERVAL_S = 0.2  # of an empty outbox
# The pauses after failed deliveries. A receiver may be down for days. Jitter spreads the load when it is
# back.
REDELIVERY = RetryPolicy(first_s=2.0, max_s=3 * 3600.0, jitter=(0.8, 1.2))
LEASE_S = 60.0  # longer than any delivery; afterwards another dispatcher can claim it, if this process died
MAX_TRUSTED_DESTINATIONS = 100  # the least recent one is forgotten
STOP_TIMEOUT_S = 4.0  # for current deliveries; what is unfinished is due again when its lease ends

Deliver = Callable[[Delivery, StatusEvent], None]


class OutboxDispatcher:
    """Claims due deliveries and delivers them, several at a time."""

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
        """Start nothing yet.

        `to_webhook` and the sinks must return within `lease_s`. They may raise StatusUnavailable (to be tried
        again), EndpointGone, DeliveryRefused and UriNotAllowed.

        Args:
            outbox: The outbox.
            to_webhook: Delivers an event to a webhook.
            sinks: Deliver an event to a sink, by the sink's name.
            threads: The maximum number of simultaneous deliveries.
            give_up_s: The time after which a recipient is parked.
            lease_s: The time within which a claimed delivery must end.
            observer: Is notified of the result of each delivery.
            traces: Records a span for each delivery.
            outages: Records outages of the ledger.
        """
        self._outbox, self._to_webhook, self._sinks = outbox, to_webhook, sinks
        self._threads, self._give_up_s, self._lease_s = threads, give_up_s, lease_s
        self._observer, self._traces = observer, traces
        self._outages = outages or Outages()
        self._deliveries = SimpleQueue[Delivery | None]()
        self._lock, self._delivered = threading.Lock(), threading.Event()
        self._in_progress: Counter[str] = Counter()  # destination -> current deliveries
        # Destinations whose last delivery succeeded; the most recent one is last.
        self._trusted: dict[str, None] = {}
        self._claimed_some = False  # in the last step
        self.loop = BackgroundLoop(
            "dispatcher",
            self._step,
            lambda: 0 if self._claimed_some else POLL_INTERVAL_S,
            immediately=True,
            outages=self._outages,
            consequence="no event can be delivered",
            context=self._running(),
        )

    def run_round(self) -> None:
        """Deliver everything that is due, and wait until it is done.

        Raises:
            LedgerUnavailable: The ledger cannot be reached.
        """
        with self._threads_running():
            while self._claim() or self._in_progress.total():
                self._wait(self._lease_s)

    def _step(self) -> None:
        self._claimed_some = False
        self._claimed_some = self._claim()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """The context of the loop: when it ends, current deliveries are waited for."""
        with self._threads_running():
            yield
            self._wait(STOP_TIMEOUT_S)

    @contextmanager
    def _threads_running(self) -> Iterator[None]:
        """Run the threads. They are not joined, so that a hanging delivery cannot keep the process alive."""
        for _ in range(self._threads):
            threading.Thread(target=self._work, name="dispatcher", daemon=True).start()
        try:
            yield
        finally:
            for _ in range(self._threads):
                self._deliveries.put(None)

    def _wait(self, seconds: float) -> None:
        """Wait until no delivery is in progress, for at most `seconds`."""
        end = time.monotonic() + seconds
        while self._in_progress.total() and time.monotonic() < end:
            self._delivered.wait(POLL_INTERVAL_S / 4)
            self._delivered.clear()

    def _claim(self) -> bool:
        """Give due deliveries to the free threads; return whether there were any."""
        with self._lock:
            free = self._threads - self._in_progress.total()
            most = max(self._threads - 1, 1)  # no destination gets all threads
            limits = {
                destination: max(most - self._in_progress[destination], 0) for destination in self._trusted
            }
            untrusted = [
                destination for destination in (*self._sinks, *self._in_progress) if destination not in limits
            ]
            limits |= {destination: 0 if self._in_progress[destination] else 1 for destination in untrusted}
            others = max(self._threads // 2, 1) - sum(
                self._in_progress[destination] for destination in dict.fromkeys(untrusted)
            )
        if not free:
            return False
        deliveries = self._outbox.claim_deliveries(
            free, lease_s=self._lease_s, limits=limits, others_limit=max(others, 0)
        )
        with self._lock:
            self._in_progress.update(delivery.destination for delivery in deliveries)
        for delivery in deliveries:
            self._deliveries.put(delivery)
        return bool(deliveries)

    def _work(self) -> None:
        while (delivery := self._deliveries.get()) is not None:
            answered = False
            try:
                answered = self._deliver_with_context(delivery)
            except LedgerUnavailable as error:
                self._outages.ledger.failed(str(error))  # the delivery is due again when its lease ends
            except BaseException:
                log.exception(
                    "delivery_not_recorded", recipient=delivery.recipient, event_type=delivery.event
                )
            self._finish(delivery.destination, answered=answered)

    def _finish(self, destination: str, *, answered: bool) -> None:
        with self._lock:
            self._in_progress[destination] -= 1
            if not self._in_progress[destination]:
                del self._in_progress[destination]
            self._trusted.pop(destination, None)
            if answered:
                self._trusted[destination] = None
                if len(self._trusted) > MAX_TRUSTED_DESTINATIONS:
                    del self._trusted[next(iter(self._trusted))]
        self._delivered.set()
        self.loop.wake()

    def _deliver_with_context(self, delivery: Delivery) -> bool:
        """Deliver, with the job in the log context; return whether the destination answered."""
        document = delivery.document
        trace = trace_id(document.traceparent)
        with logs.log_context(job_id=document.id, attempt=document.attempt, trace_id=trace):
            return self._deliver_and_record(delivery)

    def _deliver_and_record(self, delivery: Delivery) -> bool:
        """Deliver, and record the result in the outbox; return whether the destination answered."""
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
                log.warning(
                    "delivery_dropped", recipient=delivery.recipient, event_type=delivery.event, error=error
                )
                self._observer.events_delivered("failed")
                self._outbox.complete(delivery)  # the receiver may still accept the final event
        except BaseException as error:
            log.exception("delivery_failed", recipient=delivery.recipient, event_type=delivery.event)
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
            traces = self._traces if traceparent else NO_TRACES  # recorded only as part of a job's trace
            attributes: dict[str, Any] = {"job_id": delivery.document.id, "event": delivery.event}
            with traces.start_span("webhook", traceparent, kind="CLIENT", tries=delivery.tries, **attributes):
                self._to_webhook(delivery, event)
        elif delivery.destination in self._sinks:
            self._sinks[delivery.destination](delivery, event)
        else:
            message = f"This worker has no status backend {delivery.destination!r}."
            raise StatusUnavailable(message)

    def _reschedule(self, delivery: Delivery, error: BaseException, retry_after_s: float) -> None:
        """Repeat a delivery later, not before the receiver's Retry-After; after `give_up_s`, park it."""
        if delivery.waited_s < self._give_up_s:
            pause_s = max(retry_after_s, REDELIVERY.pause_s(delivery.tries + 1))
            self._observer.events_delivered("failed")
            self._outbox.postpone(delivery, pause_s, quiet_s=retry_after_s)
            return
        self._park(delivery, error)
        others = 0
        while parked := self._outbox.park_overdue(delivery.destination, self._give_up_s):
            others += parked
        if others:
            self._observer.events_delivered("parked", others)
            log.error("overdue_deliveries_parked", destination=delivery.destination, recipients=others)

    def _park(self, delivery: Delivery, error: BaseException) -> None:
        reason = str(error) if isinstance(error, GradcamError) else type(error).__name__
        log.error("delivery_parked", recipient=delivery.recipient, event_type=delivery.event, reason=reason)
        self._observer.events_delivered("parked")
        self._outbox.park(delivery)
