"""The outbox in dictionaries, with the rules of the one in Redis: see `gradcam_worker.testing`."""

import threading
import time
from collections.abc import Callable, Mapping
from itertools import count

from gradcam_worker.ledger import outbox
from gradcam_worker.ledger.outbox import (
    DESTINATION_BACKOFF,
    DeadDelivery,
    Delivery,
    Outbox,
)
from gradcam_worker.schemas.job import Webhook
from gradcam_worker.schemas.status import StatusDocument

Key = tuple[str, str]  # destination, recipient


class MemoryOutbox(Outbox):
    """An outbox in memory."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Create an empty outbox. `clock` returns the time in seconds since the epoch."""
        self.sinks: set[str] = set()
        self._clock = clock
        self._events: dict[Key, list[str]] = {}
        self._due: dict[Key, float] = {}
        self._tokens: dict[Key, str] = {}
        self._waiting: dict[Key, tuple[int, float]] = {}  # tries, and since when the first event is due
        # Destination -> failures in a row, when its pause ends, the token of the delivery that probes it.
        self._pauses: dict[str, tuple[int, float, str]] = {}
        self._parked: dict[Key, float] = {}
        self._disabled: set[str] = set()
        self._quiet_until: dict[str, float] = {}  # URL -> until when nothing is delivered there
        self._token_numbers = count(1)
        self._lock = threading.RLock()

    def put(
        self, destination: str, recipient: str, event: str, webhook: Webhook | None, document: StatusDocument
    ) -> None:
        """Record an event, in the step that changes a job."""
        with self._lock:
            key = (destination, recipient)
            self._events.setdefault(key, []).append(outbox.serialize_delivery(event, webhook, document))
            if key not in self._parked and key not in self._due:
                self._enqueue(key)

    def open_sink(self, name: str) -> None:
        """See `Outbox.open_sink`."""
        self.sinks.add(name)

    def close_sink(self, name: str) -> None:
        """See `Outbox.close_sink`."""
        self.sinks.discard(name)

    def claim_deliveries(
        self, limit: int, *, lease_s: float, limits: Mapping[str, int], others_limit: int
    ) -> list[Delivery]:
        """See `Outbox.claim_deliveries`."""
        with self._lock:
            now, deliveries = self._clock(), list[Delivery]()
            remaining = dict(limits)
            for key, due in sorted(self._due.items(), key=lambda item: item[1]):
                destination = key[0]
                if destination not in remaining:
                    remaining[destination] = min(others_limit, 1) if destination.startswith("//") else 0
                failures, pause_ends, _ = self._pauses.get(destination, (0, 0.0, ""))
                if due > now or pause_ends > now or not remaining[destination] or len(deliveries) == limit:
                    continue
                if not self._is_wanted(key, now):
                    continue
                token = str(next(self._token_numbers))
                self._due[key], self._tokens[key] = now + lease_s, token
                remaining[destination] -= 1
                others_limit -= destination not in limits
                if failures:
                    self._pauses[destination] = failures, now + lease_s, token
                tries, since = self._waiting[key]
                text = self._events[key][0]
                deliveries.append(
                    outbox.parse_delivery(*key, text, tries=tries, waited_s=now - since, lease_token=token)
                )
            return deliveries

    def complete(self, delivery: Delivery) -> None:
        """See `Outbox.complete`."""
        with self._lock:
            key = (delivery.destination, delivery.recipient)
            if self._tokens.get(key) != delivery.lease_token:
                return
            self._dequeue(key)
            self._pauses.pop(delivery.destination, None)
            del self._events[key][0]
            if self._events[key]:
                self._enqueue(key)
            else:
                del self._events[key]

    def postpone(self, delivery: Delivery, delay_s: float, *, quiet_s: float = 0) -> None:
        """See `Outbox.postpone`."""
        with self._lock:
            destination, now = delivery.destination, self._clock()
            key = (destination, delivery.recipient)
            if self._tokens.get(key) != delivery.lease_token:
                return
            del self._tokens[key]
            tries, since = self._waiting[key]
            self._waiting[key], self._due[key] = (tries + 1, since), now + delay_s
            failures, pause_ends, probe = self._pauses.get(destination, (0, 0.0, ""))
            if now >= pause_ends or probe == delivery.lease_token:
                pause = DESTINATION_BACKOFF.pause_s(failures) if failures else 0
                self._pauses[destination] = failures + 1, now + pause, ""
            if quiet_s and delivery.webhook:
                self._quiet_until[delivery.webhook.url] = now + quiet_s

    def park(self, delivery: Delivery) -> None:
        """See `Outbox.park`."""
        with self._lock:
            key, now = (delivery.destination, delivery.recipient), self._clock()
            if self._tokens.get(key) != delivery.lease_token:
                return
            failures, _, probe = self._pauses.get(delivery.destination, (0, 0.0, ""))
            if probe == delivery.lease_token:
                self._pauses[delivery.destination] = failures, now, ""
            self._park(key)

    def park_overdue(self, destination: str, waited_s: float) -> int:
        """See `Outbox.park_overdue`."""
        with self._lock:
            now = self._clock()
            due = [key for key, since in self._due.items() if key[0] == destination and since <= now]
            overdue = [key for key in due if self._waiting[key][1] <= now - waited_s]
            for key in overdue:
                self._park(key)
            return len(overdue)

    def find_parked(self) -> list[DeadDelivery]:
        """See `Outbox.find_parked`."""
        newest = sorted(self._parked.items(), key=lambda item: -item[1])
        return [
            DeadDelivery(
                *key, since, len(self._events[key]), outbox.parse_delivery(*key, self._events[key][0])
            )
            for key, since in newest
        ]

    def unpark(self, parked: DeadDelivery) -> bool:
        """See `Outbox.unpark`."""
        with self._lock:
            key = (parked.destination, parked.recipient)
            if self._parked.pop(key, None) is None:
                return False
            self._enqueue(key)
            return True

    def disable(self, url: str) -> None:
        """See `Outbox.disable`."""
        self._disabled.add(url)

    def find_disabled(self) -> list[str]:
        """See `Outbox.find_disabled`."""
        return sorted(self._disabled)

    def enable(self, url: str) -> None:
        """See `Outbox.enable`."""
        self._disabled.discard(url)
        self._quiet_until.pop(url, None)

    def count_recipients(self) -> int:
        """See `Outbox.count_recipients`."""
        return len(self._waiting)

    def _is_wanted(self, key: Key, now: float) -> bool:
        """Whether the receiver accepts deliveries now; park the recipient if its URL is disabled."""
        webhook = outbox.parse_delivery(*key, self._events[key][0]).webhook
        if webhook and webhook.url in self._disabled:
            self._park(key)
            return False
        quiet_until = self._quiet_until.get(webhook.url, 0) if webhook else 0
        if quiet_until > now:
            self._due[key] = quiet_until
        return quiet_until <= now

    def _enqueue(self, key: Key) -> None:
        now = self._clock()
        self._due[key], self._waiting[key] = now, (0, now)

    def _dequeue(self, key: Key) -> None:
        del self._due[key], self._waiting[key]
        self._tokens.pop(key, None)
        if key[0] not in {destination for destination, _ in self._due}:
            self._pauses.pop(key[0], None)

    def _park(self, key: Key) -> None:
        self._dequeue(key)
        self._parked[key] = self._clock()
