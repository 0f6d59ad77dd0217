"""The outbox over dictionaries: the same rules as in Redis, for tests. See `gradcam_worker.testing`."""

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
    """The outbox's rules over a dictionary. `clock` gives its seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Empty."""
        self.sinks: set[str] = set()
        self._clock = clock
        self._events: dict[Key, list[str]] = {}
        self._due: dict[Key, float] = {}
        self._tokens: dict[Key, str] = {}
        self._waiting: dict[Key, tuple[int, float]] = {}  # how often it was tried, and since when it could be
        self._pauses: dict[
            str, tuple[int, float, str]
        ] = {}  # failures, until when it is left alone, who tries
        self._parked: dict[Key, float] = {}
        self._disabled: set[str] = set()
        self._quiet_until: dict[str, float] = {}  # URL -> until when it wants to hear nothing
        self._numbers = count(1)
        self._lock = threading.RLock()

    def put(
        self, destination: str, recipient: str, event: str, webhook: Webhook | None, document: StatusDocument
    ) -> None:
        """What the ledger does in the step that changes a job."""
        with self._lock:
            key = (destination, recipient)
            self._events.setdefault(key, []).append(outbox.write(event, webhook, document))
            if key not in self._parked and key not in self._due:
                self._enter(key)

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
            left = dict(limits)
            for key, due in sorted(self._due.items(), key=lambda one: one[1]):
                destination = key[0]
                if destination not in left:
                    left[destination] = min(others_limit, 1) if destination.startswith("//") else 0
                failures, ends, _ = self._pauses.get(destination, (0, 0.0, ""))
                if due > now or ends > now or not left[destination] or len(deliveries) == limit:
                    continue
                if not self._wanted(key, now):
                    continue
                token = str(next(self._numbers))
                self._due[key], self._tokens[key] = now + lease_s, token
                left[destination] -= 1
                others_limit -= destination not in limits
                if failures:
                    self._pauses[destination] = failures, now + lease_s, token
                tries, since = self._waiting[key]
                text = self._events[key][0]
                deliveries.append(
                    outbox.read(*key, text, tries=tries, waited_s=now - since, lease_token=token)
                )
            return deliveries

    def complete(self, delivery: Delivery) -> None:
        """See `Outbox.complete`."""
        with self._lock:
            key = (delivery.destination, delivery.recipient)
            if self._tokens.get(key) != delivery.lease_token:
                return
            self._leave(key)
            self._pauses.pop(delivery.destination, None)
            del self._events[key][0]
            if self._events[key]:
                self._enter(key)
            else:
                del self._events[key]

    def postpone(self, delivery: Delivery, delay_s: float, *, quiet_s: float = 0) -> None:
        """See `Outbox.postpone`."""
        with self._lock:
            key, destination, now = (
                (delivery.destination, delivery.recipient),
                delivery.destination,
                self._clock(),
            )
            if self._tokens.get(key) != delivery.lease_token:
                return
            del self._tokens[key]
            tries, since = self._waiting[key]
            self._waiting[key], self._due[key] = (tries + 1, since), now + delay_s
            failures, ends, tried_by = self._pauses.get(destination, (0, 0.0, ""))
            if now >= ends or tried_by == delivery.lease_token:
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
            failures, _, tried_by = self._pauses.get(delivery.destination, (0, 0.0, ""))
            if tried_by == delivery.lease_token:
                self._pauses[delivery.destination] = failures, now, ""
            self._park(key)

    def park_overdue(self, destination: str, waited_s: float) -> int:
        """See `Outbox.park_overdue`."""
        with self._lock:
            now = self._clock()
            due = [key for key, since in self._due.items() if key[0] == destination and since <= now]
            old = [key for key in due if self._waiting[key][1] <= now - waited_s]
            for key in old:
                self._park(key)
            return len(old)

    def find_parked(self) -> list[DeadDelivery]:
        """See `Outbox.find_parked`."""
        newest = sorted(self._parked.items(), key=lambda one: -one[1])
        return [
            DeadDelivery(*key, since, len(self._events[key]), outbox.read(*key, self._events[key][0]))
            for key, since in newest
        ]

    def unpark(self, one: DeadDelivery) -> bool:
        """See `Outbox.unpark`."""
        with self._lock:
            key = (one.destination, one.recipient)
            if self._parked.pop(key, None) is None:
                return False
            self._enter(key)
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

    def _wanted(self, key: Key, now: float) -> bool:
        """Whether its receiver has not said that it wants to hear nothing, now or at all."""
        webhook = outbox.read(*key, self._events[key][0]).webhook
        if webhook and webhook.url in self._disabled:
            self._park(key)
            return False
        later = self._quiet_until.get(webhook.url, 0) if webhook else 0
        if later > now:
            self._due[key] = later
        return later <= now

    def _enter(self, key: Key) -> None:
        now = self._clock()
        self._due[key], self._waiting[key] = now, (0, now)

    def _leave(self, key: Key) -> None:
        del self._due[key], self._waiting[key]
        self._tokens.pop(key, None)
        if key[0] not in {destination for destination, _ in self._due}:
            self._pauses.pop(key[0], None)

    def _park(self, key: Key) -> None:
        self._leave(key)
        self._parked[key] = self._clock()
