"""Brings parcels from the outbox to their recipients, in threads of its own: no job waits for a receiver.

A recipient that does not answer is asked again, with growing pauses, for days; then its parcels are parked,
and can be replayed.
"""

import logging
import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from worker.contract import StatusEvent
from worker.errors import (
    DeliveryRefused,
    EndpointGone,
    GradcamError,
    LedgerUnavailable,
    StatusUnavailable,
    UriNotAllowed,
)
from worker.outbox import Outbox, Parcel
from worker.wire import utc_now

log = logging.getLogger("gradcam")

EVERY_S = 0.2  # between two looks into an empty outbox
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 3 * 3600.0  # after a failed try; doubles
KEEP_S = 60.0  # more than a delivery takes: another courier gets the recipient if this process dies meanwhile

Deliver = Callable[[Parcel, StatusEvent], None]


class Courier:
    """Takes parcels that are due and delivers them, a few at a time."""

    def __init__(
        self,
        outbox: Outbox,
        to_webhook: Deliver,
        sinks: Mapping[str, Deliver],
        *,
        threads: int,
        give_up_s: float,
    ) -> None:
        """What is delivered raises StatusUnavailable (again later), EndpointGone, DeliveryRefused,
        UriNotAllowed.
        """
        self._outbox, self._to_webhook, self._sinks = outbox, to_webhook, sinks
        self._threads, self._give_up_s = threads, give_up_s
        self._places = threading.Semaphore(threads)

    def keep(self, stopped: threading.Event) -> None:
        """Deliver until `stopped`; then end what is under way."""
        with ThreadPoolExecutor(self._threads, thread_name_prefix="courier") as pool:
            while not stopped.is_set():
                try:
                    taken = self._take(pool)
                except LedgerUnavailable as error:
                    log.warning("%s", error)
                    taken = False
                if not taken:
                    stopped.wait(EVERY_S)

    def round(self) -> None:
        """Deliver what is due now, and wait for it. Raises LedgerUnavailable."""
        with ThreadPoolExecutor(self._threads) as pool:
            self._take(pool)

    def _take(self, pool: ThreadPoolExecutor) -> bool:
        """Hand what is due to the threads; whether there was anything."""
        if not self._places.acquire(timeout=EVERY_S):
            return True
        self._places.release()
        parcels = self._outbox.take(self._threads, KEEP_S)
        for parcel in parcels:
            self._places.acquire()
            pool.submit(self._guarded, parcel)
        return bool(parcels)

    def _guarded(self, parcel: Parcel) -> None:
        try:
            self._bring(parcel)
        except LedgerUnavailable as error:
            log.warning("%s", error)  # it comes again by itself, KEEP_S after it was taken
        except Exception:
            log.exception("%s: %s was not delivered", parcel.recipient, parcel.event)
        finally:
            self._places.release()

    def _bring(self, parcel: Parcel) -> None:
        if parcel.webhook and self._outbox.disabled(parcel.webhook.url):
            self._outbox.park(parcel)
            return
        try:
            self._deliver(parcel)
        except StatusUnavailable as error:
            if parcel.waited_s < self._give_up_s:
                self._outbox.postpone(parcel, self._pause_s(parcel, error))
            else:
                self._park(parcel, error)
        except EndpointGone as error:
            if parcel.webhook:
                self._outbox.disable(parcel.webhook.url)
            self._park(parcel, error)
        except (DeliveryRefused, UriNotAllowed) as error:
            if parcel.document.final:
                self._park(parcel, error)
            else:
                log.warning("%s: %s is dropped: %s", parcel.recipient, parcel.event, error)
                self._outbox.delivered(parcel)  # whoever does not want to hear this may want to hear the end
        else:
            self._outbox.delivered(parcel)

    def _park(self, parcel: Parcel, error: GradcamError) -> None:
        log.error("%s: %s is parked: %s", parcel.recipient, parcel.event, error)
        self._outbox.park(parcel)

    def _deliver(self, parcel: Parcel) -> None:
        event = StatusEvent(type=f"gradcam.{parcel.event}", timestamp=utc_now(), data=parcel.document)
        if parcel.webhook:
            self._to_webhook(parcel, event)
        elif parcel.lane in self._sinks:
            self._sinks[parcel.lane](parcel, event)
        else:
            message = f"This worker does not know the status backend {parcel.lane!r}."
            raise StatusUnavailable(message)

    def _pause_s(self, parcel: Parcel, error: StatusUnavailable) -> float:
        """As long as the receiver asks for, else twice as long as the time before; jitter keeps many
        apart.
        """
        doubled = min(FIRST_PAUSE_S * 2.0 ** min(parcel.tries, 20), LONGEST_PAUSE_S)
        return max(error.retry_after_s or 0, doubled * random.uniform(0.8, 1.2))  # noqa: S311  # jitter, not a secret
