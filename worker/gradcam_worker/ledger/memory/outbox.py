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

Key = tuple[str, str]  # lane, recipient


class MemoryOutbox(Outbox):
    """The outbox's rules over a dictionary. `clock` gives its seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Empty."""
        self.sinks: set[str] = set()
        self._clock = clock
        self._events: dict[Key, list[str]] = {}
        self._due: dict[Key, float] = {}
        self._held: dict[Key, str] = {}
        self._waiting: dict[Key, tuple[int, float]] = {}  # how often it was tried, and since when it could be
        self._down: dict[str, tuple[int, float, str]] = {}  # failures, until when it is left alone, who tries
        self._parked: dict[Key, float] = {}
        self._gone: set[str] = set()
        self._later: dict[str, float] = {}  # URL -> until when it wants to hear nothing
        self._numbers = count(1)
        self._lock = threading.RLock()

    def put(
        self, lane: str, recipient: str, event: str, webhook: Webhook | None, document: StatusDocument
    ) -> None:
        """What the ledger does in the step that changes a job."""
        with self._lock:
            key = (lane, recipient)
            self._events.setdefault(key, []).append(outbox.write(event, webhook, document))
            if key not in self._parked and key not in self._due:
                self._enter(key)

    def open_sink(self, name: str) -> None:
        """See `Outbox.open_sink`."""
        self.sinks.add(name)

    def close_sink(self, name: str) -> None:
        """See `Outbox.close_sink`."""
        self.sinks.discard(name)

    def take(self, limit: int, keep_s: float, room: Mapping[str, int], others: int) -> list[Delivery]:
        """See `Outbox.take`."""
        with self._lock:
            now, deliveries = self._clock(), list[Delivery]()
            left = dict(room)
            for key, due in sorted(self._due.items(), key=lambda one: one[1]):
                lane = key[0]
                if lane not in left:
                    left[lane] = min(others, 1) if lane.startswith("//") else 0
                failures, ends, _ = self._down.get(lane, (0, 0.0, ""))
                if due > now or ends > now or not left[lane] or len(deliveries) == limit:
                    continue
                if not self._wanted(key, now):
                    continue
                held = str(next(self._numbers))
                self._due[key], self._held[key] = now + keep_s, held
                left[lane] -= 1
                others -= lane not in room
                if failures:
                    self._down[lane] = failures, now + keep_s, held
                tries, since = self._waiting[key]
                text = self._events[key][0]
                deliveries.append(outbox.read(*key, text, tries=tries, waited_s=now - since, held=held))
            return deliveries

    def delivered(self, delivery: Delivery) -> None:
        """See `Outbox.delivered`."""
        with self._lock:
            key = (delivery.destination, delivery.recipient)
            if self._held.get(key) != delivery.held:
                return
            self._leave(key)
            self._down.pop(delivery.destination, None)
            del self._events[key][0]
            if self._events[key]:
                self._enter(key)
            else:
                del self._events[key]

    def postpone(self, delivery: Delivery, delay_s: float, *, quiet_s: float = 0) -> None:
        """See `Outbox.postpone`."""
        with self._lock:
            key, lane, now = (delivery.destination, delivery.recipient), delivery.destination, self._clock()
            if self._held.get(key) != delivery.held:
                return
            del self._held[key]
            tries, since = self._waiting[key]
            self._waiting[key], self._due[key] = (tries + 1, since), now + delay_s
            failures, ends, tried_by = self._down.get(lane, (0, 0.0, ""))
            if now >= ends or tried_by == delivery.held:
                pause = DESTINATION_BACKOFF.pause_s(failures) if failures else 0
                self._down[lane] = failures + 1, now + pause, ""
            if quiet_s and delivery.webhook:
                self._later[delivery.webhook.url] = now + quiet_s

    def park(self, delivery: Delivery) -> None:
        """See `Outbox.park`."""
        with self._lock:
            key, now = (delivery.destination, delivery.recipient), self._clock()
            if self._held.get(key) != delivery.held:
                return
            failures, _, tried_by = self._down.get(delivery.destination, (0, 0.0, ""))
            if tried_by == delivery.held:
                self._down[delivery.destination] = failures, now, ""
            self._shelve(key)

    def park_old(self, lane: str, waited_s: float) -> int:
        """See `Outbox.park_old`."""
        with self._lock:
            now = self._clock()
            due = [key for key, since in self._due.items() if key[0] == lane and since <= now]
            old = [key for key in due if self._waiting[key][1] <= now - waited_s]
            for key in old:
                self._shelve(key)
            return len(old)

    def parked(self) -> list[DeadDelivery]:
        """See `Outbox.parked`."""
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
        self._gone.add(url)

    def disabled(self) -> list[str]:
        """See `Outbox.disabled`."""
        return sorted(self._gone)

    def enable(self, url: str) -> None:
        """See `Outbox.enable`."""
        self._gone.discard(url)
        self._later.pop(url, None)

    def count(self) -> int:
        """See `Outbox.count`."""
        return len(self._waiting)

    def _wanted(self, key: Key, now: float) -> bool:
        """Whether its receiver has not said that it wants to hear nothing, now or at all."""
        webhook = outbox.read(*key, self._events[key][0]).webhook
        if webhook and webhook.url in self._gone:
            self._shelve(key)
            return False
        later = self._later.get(webhook.url, 0) if webhook else 0
        if later > now:
            self._due[key] = later
        return later <= now

    def _enter(self, key: Key) -> None:
        now = self._clock()
        self._due[key], self._waiting[key] = now, (0, now)

    def _leave(self, key: Key) -> None:
        del self._due[key], self._waiting[key]
        self._held.pop(key, None)
        if key[0] not in {lane for lane, _ in self._due}:
            self._down.pop(key[0], None)

    def _shelve(self, key: Key) -> None:
        self._leave(key)
        self._parked[key] = self._clock()
