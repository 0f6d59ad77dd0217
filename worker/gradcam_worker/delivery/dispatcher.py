"""Brings deliveries from the outbox to their recipients, in threads of its own: no job waits for a receiver.

A recipient that does not answer is asked again, with growing pauses, for days; then its deliveries are
parked, and can be replayed. Whoever answers slowly, or never, keeps few of the threads: hosts that have not
answered the last time, or not yet, may have half of them together and one each.
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
from gradcam_worker.observability.events import SILENT, Observer
from gradcam_worker.observability.tracing import OFF, Traces, trace_id
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.status import StatusEvent

log = logging.getLogger("gradcam")

EVERY_S = 0.2  # between two looks into an empty outbox
# After a failed delivery. A receiver may be down for days; jitter keeps its deliveries apart when it is back.
REDELIVERY = RetryPolicy(first_s=2.0, max_s=3 * 3600.0, jitter=(0.8, 1.2))
LEASE_S = 60.0  # more than a delivery takes: then another dispatcher gets the recipient of a dead process
TRUSTED = 100  # destinations that are remembered because they answered: beyond that, they begin anew
END_S = 4.0  # for what is under way when the dispatcher stops; it is due again LEASE_S after it was claimed

Deliver = Callable[[Delivery, StatusEvent], None]


class OutboxDispatcher:
    """Takes deliveries that are due and delivers them, a few at a time."""

    def __init__(
        self,
        outbox: Outbox,
        to_webhook: Deliver,
        sinks: Mapping[str, Deliver],
        *,
        threads: int,
        give_up_s: float,
        lease_s: float = LEASE_S,
        observer: Observer = SILENT,
        traces: Traces = OFF,
        outages: Outages | None = None,
    ) -> None:
        """What is delivered raises StatusUnavailable (again later), EndpointGone, DeliveryRefused,
        UriNotAllowed; within `lease_s`.
        """
        self._outbox, self._to_webhook, self._sinks = outbox, to_webhook, sinks
        self._threads, self._give_up_s, self._lease_s = threads, give_up_s, lease_s
        self._observer, self._traces = observer, traces
        self._outages = outages or Outages()
        self._deliveries = SimpleQueue[Delivery | None]()
        self._lock, self._freed = threading.Lock(), threading.Event()
        self._under_way: Counter[str] = Counter()  # destination -> deliveries that are under way there
        self._trusted: dict[
            str, None
        ] = {}  # destinations that answered the last time; the latest is the last
        self._claimed_some = False  # the last time
        self.loop = BackgroundLoop(
            "dispatcher",
            self._step,
            lambda: 0 if self._claimed_some else EVERY_S,
            immediately=True,
            outages=self._outages,
            consequence="nothing can be delivered",
            context=self._delivering(),
        )

    def round(self) -> None:
        """Deliver all that is due, and wait for it. Raises LedgerUnavailable."""
        with self._threads_running():
            while self._claim() or self._under_way.total():
                self._wait(self._lease_s)

    def _step(self) -> None:
        self._claimed_some = False
        self._claimed_some = self._claim()

    @contextmanager
    def _delivering(self) -> Iterator[None]:
        """What the loop runs in: at its end, what is under way is waited for, END_S at most."""
        with self._threads_running():
            yield
            self._wait(END_S)

    @contextmanager
    def _threads_running(self) -> Iterator[None]:
        """The threads. Nobody waits for them in the end: a process has to be able to end."""
        for _ in range(self._threads):
            threading.Thread(target=self._work, name="dispatcher", daemon=True).start()
        try:
            yield
        finally:
            for _ in range(self._threads):
                self._deliveries.put(None)

    def _wait(self, seconds: float) -> None:
        """Until nothing is under way, or for so long."""
        end = time.monotonic() + seconds
        while self._under_way.total() and time.monotonic() < end:
            self._freed.wait(EVERY_S / 4)
            self._freed.clear()

    def _claim(self) -> bool:
        """Hand what is due to the threads that are free; whether there was anything."""
        with self._lock:
            free = self._threads - self._under_way.total()
            most = max(self._threads - 1, 1)  # one destination never has them all
            limits = {
                destination: max(most - self._under_way[destination], 0) for destination in self._trusted
            }
            doubtful = [
                destination for destination in (*self._sinks, *self._under_way) if destination not in limits
            ]
            limits |= {destination: 0 if self._under_way[destination] else 1 for destination in doubtful}
            others = max(self._threads // 2, 1) - sum(
                self._under_way[destination] for destination in dict.fromkeys(doubtful)
            )
        if not free:
            return False
        deliveries = self._outbox.claim_deliveries(
            free, lease_s=self._lease_s, limits=limits, others_limit=max(others, 0)
        )
        with self._lock:
            self._under_way.update(delivery.destination for delivery in deliveries)
        for delivery in deliveries:
            self._deliveries.put(delivery)
        return bool(deliveries)

    def _work(self) -> None:
        while (delivery := self._deliveries.get()) is not None:
            answered = False
            try:
                answered = self._attempt(delivery)
            except LedgerUnavailable as error:
                self._outages.ledger.failed(
                    str(error)
                )  # it comes again by itself, `lease_s` after it was claimed
            except BaseException:
                log.exception("%s: %s was not delivered", delivery.recipient, delivery.event)
            self._done(delivery.destination, answered=answered)

    def _done(self, destination: str, *, answered: bool) -> None:
        with self._lock:
            self._under_way[destination] -= 1
            if not self._under_way[destination]:
                del self._under_way[destination]
            self._trusted.pop(destination, None)
            if answered:
                self._trusted[destination] = None
                if len(self._trusted) > TRUSTED:
                    del self._trusted[next(iter(self._trusted))]
        self._freed.set()
        self.loop.wake()

    def _attempt(self, delivery: Delivery) -> bool:
        """Deliver a delivery and write down what became of it; whether its destination answered."""
        document = delivery.document
        trace = trace_id(document.traceparent)
        with logs.about(job_id=document.id, attempt=document.attempt, trace_id=trace):
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
                self._observer.delivered("failed")
                self._outbox.complete(delivery)  # whoever does not want to hear this may want to hear the end
        except BaseException as error:
            log.exception("%s: %s was not delivered", delivery.recipient, delivery.event)
            self._reschedule(delivery, error, 0)
            return False
        else:
            self._observer.delivered("delivered")
            self._outbox.complete(delivery)
        return True

    def _deliver(self, delivery: Delivery) -> None:
        event = StatusEvent(type=f"gradcam.{delivery.event}", timestamp=utc_now(), data=delivery.document)
        if delivery.webhook:
            traceparent = delivery.document.traceparent
            known = self._traces if traceparent else OFF  # alone, a delivery is no trace worth looking at
            facts: dict[str, Any] = {"job_id": delivery.document.id, "event": delivery.event}
            with known.joined("webhook", traceparent, kind="CLIENT", tries=delivery.tries, **facts):
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
            self._observer.delivered("failed")
            self._outbox.postpone(delivery, pause_s, quiet_s=retry_after_s)
            return
        self._park(delivery, error)
        others = 0
        while more := self._outbox.park_overdue(delivery.destination, self._give_up_s):
            others += more
        if others:
            self._observer.delivered("parked", others)
            log.error(
                "%s: %d more recipients there are parked, who waited as long", delivery.destination, others
            )

    def _park(self, delivery: Delivery, error: BaseException) -> None:
        why = str(error) if isinstance(error, GradcamError) else type(error).__name__
        log.error("%s: %s is parked: %s", delivery.recipient, delivery.event, why)
        self._observer.delivered("parked")
        self._outbox.park(delivery)
