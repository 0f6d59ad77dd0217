"""Ledger and outbox over dictionaries: the same rules as in Redis, for tests. See `worker.testing`."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from worker import outbox, transitions
from worker.contract import StatusDocument, Webhook
from worker.ledger import Entry, Ledger, Renewed
from worker.outbox import Outbox, Parcel, Parked


class MemoryLedger(Ledger):
    """The ledger's rules over a dictionary. `clock` gives its seconds."""

    def __init__(self, *, lease_s: float = 15, clock: Callable[[], float] = time.time) -> None:
        """Empty."""
        self.outbox = MemoryOutbox(clock)
        self.health: dict[str, str] = {}
        self._lease_s, self._clock = lease_s, clock
        self._entries: dict[str, Entry] = {}
        self._keys: dict[str, str] = {}
        self._due: dict[str, float] = {}  # job id -> when its lease, its pause or its patience ends
        self._rung: dict[str, int] = {}
        self._claimed: dict[str, float] = {}  # route -> the latest message that came through
        self._dead: dict[str, float] = {}
        self._leader: tuple[str, float] = ("", 0)
        self._lock = threading.RLock()

    def _create(self, entry: Entry) -> Entry:
        with self._lock:
            key = entry.idempotency_key
            owner = self._keys.get(key, entry.document.id) if key else entry.document.id
            owner = owner if owner in self._entries else entry.document.id
            if owner not in self._entries:
                self._place(entry, None)
                if key:
                    self._keys[key] = owner
            return self._entries[owner]

    def _find(self, job_id: str) -> Entry | None:
        return self._entries.get(job_id)

    def _swap(
        self,
        before: StatusDocument,
        after: StatusDocument,
        *,
        delay_s: float = 0,
        fingerprint: str | None = None,
    ) -> bool:
        with self._lock:
            entry = self._entries.get(before.id)
            if entry and entry.document == after:
                return True
            if not entry or (fingerprint and (entry.fingerprint, entry.document) != (fingerprint, before)):
                return False
            held = entry.document
            if (held.attempt, held.revision) != (before.attempt, before.revision):
                return False
            self._place(replace(entry, document=after), held, delay_s)
            return True

    def _place(self, entry: Entry, before: StatusDocument | None, delay_s: float = 0) -> None:
        after, now = entry.document, self._clock()
        self._entries[after.id] = entry
        if before is None or before.status != after.status:
            if before and before.status == "queued" and after.status == "running":
                published = min(self._due.get(after.id, 0), now)
                self._claimed[entry.route] = max(published, self._claimed.get(entry.route, 0))
            self._due[after.id] = now + (self._lease_s if after.status == "running" else delay_s)
            self._rung.pop(after.id, None)
        if after.status == "failed":
            self._dead.setdefault(after.id, now)
        event = transitions.event(before, after)
        for index, hook in enumerate(entry.webhooks):
            if event in hook.events:
                self.outbox.put(outbox.lane(hook.url), f"{after.id}:hook{index + 1}", event, hook, after)
        for sink in self.outbox.sinks if event else ():
            self.outbox.put(sink, f"{after.id}:{sink}", event, None, after)

    def read_many(self, ids: Sequence[str]) -> dict[str, StatusDocument]:
        """See `Ledger.read_many`."""
        return {one: self._entries[one].document for one in ids if one in self._entries}

    def counts(self) -> tuple[int, int]:
        """See `Ledger.counts`."""
        states = [entry.document.status for entry in self._entries.values()]
        return states.count("queued") + states.count("retrying"), states.count("running")

    def beat(self, worker: str, health: str, held: Mapping[str, int]) -> Renewed:
        """See `Ledger.beat`."""
        with self._lock:
            self.health[worker] = health
            lost = set()
            for job_id, attempt in held.items():
                document = self._entries[job_id].document
                if (document.attempt, document.status) == (attempt, "running"):
                    self._due[job_id] = self._clock() + self._lease_s
                else:
                    lost.add(job_id)
            running = [one.document for one in self._entries.values() if one.document.status == "running"]
            return Renewed(frozenset(lost), frozenset(one.id for one in running if one.cancel_requested_at))

    def workers(self) -> dict[str, str]:
        """See `Ledger.workers`."""
        return dict(self.health)

    def lead(self, worker: str, seconds: float) -> bool:
        """See `Ledger.lead`."""
        leader, until = self._leader
        if leader not in {"", worker} and until > self._clock():
            return False
        self._leader = worker, self._clock() + seconds
        return True

    def overdue(self, limit: int) -> dict[str, list[str]]:
        """See `Ledger.overdue`."""
        now, found = self._clock(), {"lost": "running", "due": "retrying"}
        documents = [entry.document for entry in self._entries.values()]
        late = {
            name: [one.id for one in documents if one.status == status and self._due[one.id] <= now][:limit]
            for name, status in found.items()
        }
        waiting = [one for one in documents if one.status in {"queued", "retrying"} and one.expires_at]
        expired = [one.id for one in waiting if one.expires_at and one.expires_at.timestamp() <= now]
        return {**late, "expired": expired[:limit]}

    def silent(self, route: str, *, empty: bool, lost_after_s: float, limit: int) -> list[str]:
        """See `Ledger.silent`."""
        with self._lock:
            now = self._clock()
            newest = now if empty else min(self._claimed.get(route, 0), now)
            found = [
                job_id
                for job_id, entry in self._entries.items()
                if (entry.route, entry.document.status) == (route, "queued")
                and self._due[job_id] <= newest - lost_after_s
            ][:limit]
            for job_id in found:
                self._rung[job_id] = self._rung.get(job_id, 0) + 1
                self._due[job_id] = now + lost_after_s * (2.0 ** (self._rung[job_id] - 1) - 1)
            return found

    def dead(self) -> list[tuple[str, float]]:
        """See `Ledger.dead`."""
        return sorted(self._dead.items(), key=lambda one: -one[1])

    def bury(self, job_id: str) -> None:
        """See `Ledger.bury`."""
        self._dead.pop(job_id, None)

    def sweep(self) -> None:
        """See `Ledger.sweep`: nothing is forgotten here."""


class MemoryOutbox(Outbox):
    """The outbox's rules over a dictionary. `clock` gives its seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Empty."""
        self.sinks: set[str] = set()
        self.gone: set[str] = set()
        self._clock = clock
        self._events: dict[tuple[str, str], list[str]] = {}  # (lane, recipient) -> what it is to be told
        self._due: dict[tuple[str, str], float] = {}
        self._pause: dict[str, float] = {}  # lane -> until when it is left alone
        self._tries: dict[tuple[str, str], tuple[int, float]] = {}
        self._parked: dict[tuple[str, str], float] = {}
        self._lock = threading.RLock()

    def put(
        self, lane: str, recipient: str, event: str, webhook: Webhook | None, document: StatusDocument
    ) -> None:
        """What the ledger does in the step that changes a job."""
        with self._lock:
            self._events.setdefault((lane, recipient), []).append(outbox.write(event, webhook, document))
            if (lane, recipient) not in self._parked:
                self._due.setdefault((lane, recipient), self._clock())

    def open_sink(self, name: str) -> None:
        """See `Outbox.open_sink`."""
        self.sinks.add(name)

    def close_sink(self, name: str) -> None:
        """See `Outbox.close_sink`."""
        self.sinks.discard(name)

    def take(self, limit: int, keep_s: float) -> list[Parcel]:
        """See `Outbox.take`."""
        with self._lock:
            now = self._clock()
            parcels: list[Parcel] = []
            for key, due in sorted(self._due.items(), key=lambda one: one[1]):
                if due > now or self._pause.get(key[0], 0) > now or len(parcels) == limit:
                    continue
                self._due[key] = now + keep_s
                tries, first = self._tries.get(key, (0, now))
                parcels.append(outbox.read(*key, self._events[key][0], tries, now - first))
            return parcels

    def delivered(self, parcel: Parcel) -> None:
        """See `Outbox.delivered`."""
        with self._lock:
            key = (parcel.lane, parcel.recipient)
            if self._events.get(key, [""])[0] == parcel.text:
                del self._events[key][0]
                self._tries.pop(key, None)
                self._due[key] = self._clock()
            if not self._events.get(key):
                self._events.pop(key, None)
                self._due.pop(key, None)

    def postpone(self, parcel: Parcel, delay_s: float) -> None:
        """See `Outbox.postpone`."""
        with self._lock:
            key, now = (parcel.lane, parcel.recipient), self._clock()
            self._tries[key] = parcel.tries + 1, self._tries.get(key, (0, now))[1]
            self._due[key], self._pause[parcel.lane] = now + delay_s, now + min(delay_s, 2)

    def park(self, parcel: Parcel) -> None:
        """See `Outbox.park`."""
        with self._lock:
            key = (parcel.lane, parcel.recipient)
            self._due.pop(key, None)
            self._tries.pop(key, None)
            self._parked[key] = self._clock()

    def parked(self) -> list[Parked]:
        """See `Outbox.parked`."""
        newest = sorted(self._parked.items(), key=lambda one: -one[1])
        return [Parked(*key, since, outbox.read(*key, self._events[key][0])) for key, since in newest]

    def unpark(self, one: Parked) -> bool:
        """See `Outbox.unpark`."""
        with self._lock:
            key = (one.lane, one.recipient)
            if self._parked.pop(key, None) is None:
                return False
            self._due[key] = self._clock()
            return True

    def disable(self, url: str) -> None:
        """See `Outbox.disable`."""
        self.gone.add(url)

    def disabled(self, url: str) -> bool:
        """See `Outbox.disabled`."""
        return url in self.gone

    def enable(self, url: str) -> None:
        """See `Outbox.enable`."""
        self.gone.discard(url)

    def count(self) -> int:
        """See `Outbox.count`."""
        return len({lane for lane, _ in self._due})
