"""The ledger in dictionaries, with the rules of the one in Redis: see `gradcam_worker.testing`."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date

from gradcam_worker.ledger import outbox, state_machine
from gradcam_worker.ledger.ledger import (
    Entry,
    LeaseRenewal,
    Ledger,
    Overdue,
    UsageDay,
    device_s_of,
    is_same_job,
    latest_days,
)
from gradcam_worker.ledger.memory.outbox import MemoryOutbox
from gradcam_worker.ledger.memory.turns import Turns
from gradcam_worker.schemas import listing
from gradcam_worker.schemas.listing import JobPage, JobQuery
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.schemas.work import ROUTE


class MemoryLedger(Ledger):
    """A ledger in memory."""

    def __init__(self, *, lease_s: float = 15, clock: Callable[[], float] = time.time) -> None:
        """Create an empty ledger.

        Args:
            lease_s: The duration of a lease.
            clock: Returns the time in seconds since the epoch.
        """
        self.outbox = MemoryOutbox(clock)
        self.health: dict[str, str] = {}
        self._lease_s, self._clock = lease_s, clock
        self._entries: dict[str, Entry] = {}
        self._keys: dict[tuple[str, str], str] = {}  # tenant and idempotency key -> job id
        self._due: dict[str, float] = {}  # job id -> when its lease or pause ends, or when it is missed
        self._republished: dict[str, int] = {}
        self._claimed: dict[str, float] = {}  # route -> when its latest received message was published
        self._dead: dict[str, float] = {}
        self._turns = defaultdict[str, Turns](Turns)  # by route
        self._usage: dict[tuple[str, date], tuple[int, float]] = {}  # jobs, and seconds of the device
        self._leader: tuple[str, float] = ("", 0)
        self._lock = threading.RLock()

    def _create_many(self, entries: Sequence[Entry]) -> list[Entry]:
        results: list[Entry] = []
        for entry in entries:
            results.append(self._create_one(entry))
            if not is_same_job(entry, results[-1]):
                break
        return results

    def _create_one(self, entry: Entry) -> Entry:
        with self._lock:
            key = entry.idempotency_key and (entry.tenant.name, entry.idempotency_key)
            owner = self._keys.get(key, entry.document.id) if key else entry.document.id
            owner = owner if owner in self._entries else entry.document.id
            if owner not in self._entries:
                self._store(replace(entry, message=None), None)  # there is no queue to publish to
                if key:
                    self._keys[key] = owner
            return self._entries[owner]

    def _find(self, job_id: str) -> Entry | None:
        return self._entries.get(job_id)

    def _compare_and_set(
        self,
        before: StatusDocument,
        after: StatusDocument,
        *,
        delay_s: float = 0,
        only_if_due: bool = False,
    ) -> bool:
        with self._lock:
            entry = self._entries.get(before.id)
            if entry and entry.document == after:
                return True
            if not entry or not _is_revision(entry, before):
                return False
            if only_if_due and self._due[before.id] > self._clock():
                return False
            self._store(replace(entry, document=after), entry.document, delay_s)
            return True

    def _claim_in_turn(
        self, before: StatusDocument, after: StatusDocument, fingerprint: str | None = None
    ) -> bool | Entry:
        with self._lock:
            entry = self._entries.get(before.id)
            if entry and entry.document == after:
                return True
            if not entry or not _is_revision(entry, before):
                return False
            if fingerprint and (entry.fingerprint, entry.document) != (fingerprint, before):
                return False
            tenant, turns = entry.tenant.name, self._turns[entry.route]
            own = (tenant, before.id, self._due[before.id], 1 / entry.tenant.share)
            chosen_id = turns.choose(self._is_queued, own)
            if entry.route != ROUTE and chosen_id not in {None, before.id}:
                turns.pass_over(tenant, before.id)
                return self._entries[str(chosen_id)]
            self._store(replace(entry, document=after), entry.document, in_turn=True)
            return True

    def find_turn(self, route: str) -> Entry | None:
        """See `Ledger.find_turn`."""
        with self._lock:
            chosen_id = self._turns[route].choose(self._is_queued)
            return self._entries[chosen_id] if chosen_id else None

    def _is_queued(self, job_id: str) -> bool:
        return self._entries[job_id].document.status == "queued"

    def _store(
        self,
        entry: Entry,
        before: StatusDocument | None,
        delay_s: float = 0,
        *,
        in_turn: bool = False,  # it is claimed for its own message
    ) -> None:
        after, now = entry.document, self._clock()
        keeps_job = after.status == "failed" or not after.final
        self._entries[after.id] = entry if keeps_job else replace(entry, job="null")
        if before is None or before.status != after.status:
            first = before and before.attempt == 0 and after.id not in self._republished
            if in_turn and first:
                published = min(self._due.get(after.id, 0), now)
                self._claimed[entry.route] = max(published, self._claimed.get(entry.route, 0))
            self._due[after.id] = now + (self._lease_s if after.status == "running" else delay_s)
            self._republished.pop(after.id, None)
            turns, tenant = self._turns[entry.route], entry.tenant
            if before and before.status == "queued":
                turns.leave(tenant.name, after.id, 1 / tenant.share if after.status == "running" else 0)
            if after.status == "queued" and entry.route != ROUTE and not state_machine.is_suspected(after):
                turns.join(tenant.name, after.id, now, 1 / tenant.share)
        if after.status == "failed":
            self._dead.setdefault(after.id, now)
        elif before and before.status == "failed":
            self._dead.pop(after.id, None)
        if after.final and entry.tenant.name:
            used = (entry.tenant.name, after.updated_at.date())
            jobs, device_s = self._usage.get(used, (0, 0.0))
            self._usage[used] = jobs + 1, device_s + device_s_of(after)
        self._put_events(entry, before)

    def _put_events(self, entry: Entry, before: StatusDocument | None) -> None:
        after = entry.document
        event = state_machine.name_event(before, after)
        for index, hook in enumerate(entry.webhooks):
            if event in hook.events:
                told = after.for_tenant() if entry.tenant.name else after
                self.outbox.put(
                    outbox.destination_of(hook.url), f"{after.id}:hook{index + 1}", event, hook, told
                )
        for sink in self.outbox.sinks if event else ():
            self.outbox.put(sink, f"{after.id}:{sink}", event, None, after)

    def read_many(self, ids: Sequence[str], tenant: str | None = None) -> dict[str, StatusDocument]:
        """See `Ledger.read_many`."""
        entries = {job_id: self._entries[job_id] for job_id in ids if job_id in self._entries}
        return {job_id: entry.document for job_id, entry in entries.items() if entry.belongs_to(tenant)}

    def count_jobs(self) -> tuple[int, int]:
        """See `Ledger.count_jobs`."""
        states = [entry.document.status for entry in self._entries.values()]
        return states.count("queued") + states.count("retrying"), states.count("running")

    def renew_leases(self, worker: str, health: str, held: Mapping[str, int]) -> LeaseRenewal:
        """See `Ledger.renew_leases`."""
        with self._lock:
            self.health[worker] = health
            lost = set()
            for job_id, attempt in held.items():
                document = self._entries[job_id].document
                if (document.attempt, document.status) == (attempt, "running"):
                    self._due[job_id] = self._clock() + self._lease_s
                else:
                    lost.add(job_id)
            documents = [entry.document for entry in self._entries.values()]
            running = [document for document in documents if document.status == "running"]
            return LeaseRenewal(
                frozenset(lost),
                frozenset(document.id for document in running if document.cancel_requested_at),
            )

    def find_workers(self) -> dict[str, str]:
        """See `Ledger.find_workers`."""
        return dict(self.health)

    def remove_worker(self, worker: str) -> None:
        """See `Ledger.remove_worker`."""
        with self._lock:
            self.health.pop(worker, None)

    def try_lead(self, worker: str, seconds: float) -> bool:
        """See `Ledger.try_lead`."""
        leader, until = self._leader
        if leader not in {"", worker} and until > self._clock():
            return False
        self._leader = worker, self._clock() + seconds
        return True

    def find_overdue(self, limit: int) -> Overdue:
        """See `Ledger.find_overdue`."""
        now = self._clock()
        documents = [entry.document for entry in self._entries.values()]
        due = [document for document in documents if self._due[document.id] <= now]
        waiting = [document for document in documents if document.status in {"queued", "retrying"}]
        return Overdue(
            [document.id for document in due if document.status == "running"][:limit],
            [document.id for document in due if document.status == "retrying"][:limit],
            [
                document.id
                for document in waiting
                if document.expires_at and document.expires_at.timestamp() <= now
            ][:limit],
        )

    def find_unpublished(
        self, route: str, *, queue_is_empty: bool, lost_after_s: float, limit: int
    ) -> list[str]:
        """See `Ledger.find_unpublished`."""
        with self._lock:
            now = self._clock()
            newest = now if queue_is_empty else min(self._claimed.get(route, 0), now)
            job_ids = [
                job_id
                for job_id, entry in self._entries.items()
                if (entry.route, entry.document.status) == (route, "queued")
                and self._due[job_id] <= newest - lost_after_s
                and (queue_is_empty or not self._turns[route].is_passed_over(entry.tenant.name, job_id))
            ][:limit]
            for job_id in job_ids:
                self._republished[job_id] = self._republished.get(job_id, 0) + 1
                self._due[job_id] = now + lost_after_s * (2.0 ** (self._republished[job_id] - 1) - 1)
            return job_ids

    def list_jobs(self, query: JobQuery, tenant: str | None = None) -> JobPage:
        """See `Ledger.list_jobs`."""
        entries = [
            entry
            for entry in self._entries.values()
            if entry.route != ROUTE
            and entry.belongs_to(tenant)
            and query.network in {None, entry.network}
            and query.accepts(entry.document)
        ]
        places = {listing.position_of(entry.document): entry.document for entry in entries}
        end = listing.parse_cursor(query.cursor) if query.cursor else None
        left = sorted((place for place in places if end is None or place < end), reverse=True)
        page = left[: query.limit]
        cursor = listing.cursor_after(page[-1]) if len(left) > len(page) else None
        return JobPage(jobs=tuple(places[place] for place in page), cursor=cursor)

    def read_usage(self, tenant: str, days: int) -> list[UsageDay]:
        """See `Ledger.read_usage`."""
        return [UsageDay(day, *self._usage.get((tenant, day), (0, 0.0))) for day in latest_days(days)]

    def find_dead_letters(self) -> list[tuple[str, float]]:
        """See `Ledger.find_dead_letters`."""
        return sorted(self._dead.items(), key=lambda item: -item[1])

    def drop_dead_letter(self, job_id: str) -> None:
        """See `Ledger.drop_dead_letter`."""
        self._dead.pop(job_id, None)

    def prune(self) -> None:
        """See `Ledger.prune`: this ledger forgets nothing."""


def _is_revision(entry: Entry, document: StatusDocument) -> bool:
    """Whether the document of an entry is this revision."""
    held = entry.document
    return (held.attempt, held.revision) == (document.attempt, document.revision)
