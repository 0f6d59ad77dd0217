"""The ledger in Redis: each step is one script of `scripts`, and so atomic."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from typing import Any

from gradcam_worker.ledger import outbox, state_machine
from gradcam_worker.ledger.ledger import (
    Entry,
    LeaseRenewal,
    Ledger,
    Overdue,
    Tenant,
    UsageDay,
    device_s_of,
    latest_days,
)
from gradcam_worker.ledger.redis import scripts
from gradcam_worker.ledger.redis.pubsub import RedisJobUpdates
from gradcam_worker.redis_server.async_client import AsyncRedisServer
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.resilience.blocking import awaited, blocking
from gradcam_worker.resilience.outages import Outage
from gradcam_worker.schemas import listing
from gradcam_worker.schemas.listing import JobPage, JobQuery
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.schemas.work import ROUTE, ROUTES
from gradcam_worker.settings import Settings

MAX_REPUBLISH_PAUSE_MS = 600_000  # between publications of a message that seems lost
WORKER_TTL_LEASES = 3  # a worker that has renewed no lease for so many lease durations is not listed
MAX_DEAD_LETTERS_LISTED = 10_000
MAX_SCANNED_JOBS = 1000  # for one page of a list: a few milliseconds of the server's time
EPOCH = date(1970, 1, 1)
PUBLISHED = ("published",)  # what the script says of a new job whose message is in its queue


class RedisLedger(Ledger):
    """The ledger in one Redis or Valkey server."""

    def __init__(
        self,
        settings: Settings,
        *,
        timeout_s: float = 5,
        retries: int = 2,
        connect: type[RedisServer] = RedisServer,
        outage: Outage | None = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            settings: `ledger`, `key_prefix`, `lease_s`, the retentions and the TLS settings are read from it.
            timeout_s: The maximum time for one answer.
            retries: How often a command that failed is retried.
            connect: Makes the server.
            outage: Is told of calls that fail; None: the caller reports outages.
        """
        self.server = connect(settings, timeout_s=timeout_s, retries=retries, outage=outage)
        self._for_asyncio = partial(
            RedisLedger,
            settings,
            timeout_s=timeout_s,
            retries=retries,
            connect=AsyncRedisServer,
            outage=outage,
        )
        self._lease_ms = int(settings.lease_s * 1000)
        retention_s = settings.retention_s
        keyed_s = max(retention_s, settings.idempotency_retention_s)
        self._retention_ms = (int(retention_s * 1000), int(keyed_s * 1000))

    def for_asyncio(self) -> "RedisLedger":
        """See `Ledger.for_asyncio`."""
        return self._for_asyncio()

    @blocking
    async def _create_many(self, entries: Sequence[Entry]) -> list[Entry]:
        jobs = [self._make_new_job(entry) for entry in entries]
        retention_ms, keyed_ms = self._retention_ms
        existing = await self.server.ask_replicated(
            scripts.CreateJobs(
                retention_ms=retention_ms,
                keyed_retention_ms=keyed_ms,
                replicated=self.server.replicas > 0,
                jobs=jobs,
            )
        )
        return [_existing_or_new(entry, *fields) for entry, fields in zip(entries, existing, strict=False)]

    def _make_new_job(self, entry: Entry) -> scripts.NewJob:
        document, key = entry.document, entry.idempotency_key
        digest = hashlib.sha256((key or "").encode()).hexdigest()
        tenant = entry.tenant.name
        owned = f"{tenant}:{digest}" if tenant else digest
        webhooks = [
            {"lane": outbox.destination_of(webhook.url), "events": webhook.events, "text": webhook.to_json()}
            for webhook in entry.webhooks
        ]
        return scripts.NewJob(
            job_id=document.id,
            idempotency=f"{self.server.prefix}idempotency:{owned}" if key else "",
            fingerprint=entry.fingerprint,
            job=entry.job,
            document=document.to_json(),
            attempt=document.attempt,
            revision=document.revision,
            status=document.status,
            route=entry.route,
            webhooks=json.dumps(webhooks) if webhooks else "",
            expires_ms=expires_ms_of(document),
            event=state_machine.name_event(None, document),
            tenant=tenant,
            created_us=listing.position_of(document)[0],
            share=repr(entry.tenant.share),
            queue=entry.message.key if entry.message else "",
            message=entry.message.text if entry.message else "",
            lists="" if entry.route == ROUTE else "\n".join(names_of_lists(document, entry.network)),
        )

    @blocking
    async def _find(self, job_id: str) -> Entry | None:
        names = ("fingerprint", "job", "document", "route", "tenant")
        (fields,) = await self.server.ask_each([("HMGET", self._key(job_id), *names)])
        return _entry_of(*fields) if fields[0] is not None else None  # None: the job does not exist

    @blocking
    async def _compare_and_set(
        self,
        before: StatusDocument,
        after: StatusDocument,
        *,
        delay_s: float = 0,
        only_if_due: bool = False,
    ) -> bool:
        replace = self._replacement(before, after, delay_s=delay_s, only_if_due=only_if_due)
        replace.in_turn = after.status == "queued" and not state_machine.is_suspected(after)
        replaced = await self.server.ask(replace)
        return bool(replaced)

    def _claim_in_turn(
        self, before: StatusDocument, after: StatusDocument, fingerprint: str | None = None
    ) -> bool | Entry:
        claim = self._replacement(before, after)
        claim.in_turn = True
        if fingerprint:
            claim.fingerprint, claim.document_before = fingerprint, before.to_json()
        claimed = self.server.run(claim)
        return bool(claimed) if isinstance(claimed, int) else _entry_of(*claimed)

    def _replacement(
        self, before: StatusDocument, after: StatusDocument, *, delay_s: float = 0, only_if_due: bool = False
    ) -> scripts.ReplaceDocument:
        retention_ms, keyed_ms = self._retention_ms
        return scripts.ReplaceDocument(
            job_id=before.id,
            attempt_before=before.attempt,
            revision_before=before.revision,
            document=after.to_json(),
            attempt=after.attempt,
            revision=after.revision,
            status=after.status,
            delay_ms=int(delay_s * 1000),
            fingerprint="",
            document_before="",
            expires_ms=expires_ms_of(after),
            cancel_requested=after.cancel_requested_at is not None,
            event=state_machine.name_event(before, after),
            retention_ms=retention_ms,
            keyed_retention_ms=keyed_ms,
            lease_ms=self._lease_ms,
            only_if_due=only_if_due,
            status_before=before.status,
            created_us=listing.position_of(after)[0],
            device_us=round(device_s_of(after) * 1e6) if after.final else 0,
            in_turn=False,
        )

    def find_turn(self, route: str) -> Entry | None:
        """See `Ledger.find_turn`."""
        found = self.server.run(scripts.FindTurn(route=route))
        return _entry_of(*found) if found else None

    @blocking
    async def read_many(self, ids: Sequence[str], tenant: str | None = None) -> dict[str, StatusDocument]:
        """See `Ledger.read_many`: one round trip."""
        found = await self.server.ask_each(
            [("HMGET", self._key(job_id), "document", "tenant") for job_id in ids]
        )
        return {
            job_id: StatusDocument.model_validate_json(text)
            for job_id, (text, owner) in zip(ids, found, strict=True)
            if text and tenant in {None, owner or ""}
        }

    def open_updates(self) -> RedisJobUpdates:
        """See `Ledger.open_updates`."""
        return RedisJobUpdates(self.server.redis, self.server.prefix)

    @blocking
    async def close(self) -> None:
        """See `Ledger.close`."""
        await awaited(self.server.close)

    @blocking
    async def count_jobs(self) -> tuple[int, int]:
        """See `Ledger.count_jobs`."""
        waiting = [*(f"queued:{route}" for route in ROUTES), "retrying"]
        names = (*waiting, "running")
        *queued, running = await self.server.ask_each(
            [("ZCARD", self.server.prefix + name) for name in names]
        )
        return sum(queued), running

    def renew_leases(self, worker: str, health: str, held: Mapping[str, int]) -> LeaseRenewal:
        """See `Ledger.renew_leases`."""
        leases = [scripts.HeldLease(job_id, attempt) for job_id, attempt in held.items()]
        lost, canceled = self.server.run(
            scripts.RenewLeases(lease_ms=self._lease_ms, worker=worker, health=health, leases=leases)
        )
        return LeaseRenewal(frozenset(lost), frozenset(canceled))

    @blocking
    async def find_workers(self) -> dict[str, str]:
        """See `Ledger.find_workers`."""
        reply = await self.server.ask(scripts.FindWorkers(worker_ttl_ms=WORKER_TTL_LEASES * self._lease_ms))
        return dict(zip(reply[::2], reply[1::2], strict=True))

    def remove_worker(self, worker: str) -> None:
        """See `Ledger.remove_worker`."""
        with self.server.translate_errors():
            self.server.redis.hdel(self.server.prefix + "workers", worker)

    def try_lead(self, worker: str, seconds: float) -> bool:
        """See `Ledger.try_lead`."""
        return bool(self.server.run(scripts.TryLead(worker=worker, lease_ms=int(seconds * 1000))))

    def find_overdue(self, limit: int) -> Overdue:
        """See `Ledger.find_overdue`."""
        return Overdue(*self.server.run(scripts.FindOverdue(limit=limit)))

    def find_unpublished(
        self, route: str, *, queue_is_empty: bool, lost_after_s: float, limit: int
    ) -> list[str]:
        """See `Ledger.find_unpublished`."""
        lost_after_ms = int(lost_after_s * 1000)
        return self.server.run(
            scripts.FindUnpublished(
                route=route,
                queue_is_empty=queue_is_empty,
                lost_after_ms=lost_after_ms,
                limit=limit,
                longest_pause_ms=max(MAX_REPUBLISH_PAUSE_MS, lost_after_ms),
            )
        )

    @blocking
    async def list_jobs(self, query: JobQuery, tenant: str | None = None) -> JobPage:
        """See `Ledger.list_jobs`."""
        newest_us, before_id = listing.parse_cursor(query.cursor) if query.cursor else ("+inf", "")
        names = [f"status:{query.status}"] if query.status else []
        names += [_network_list(query.network)] if query.network else []
        names += [_label_list(query.label)] if query.label else []
        last_us, last_id, more, *texts = await self.server.ask(
            scripts.ListJobs(
                scope=tenant or "",
                is_nobodys=tenant == "",
                limit=query.limit,
                max_scanned=MAX_SCANNED_JOBS,
                newest_us=str(newest_us),
                oldest_us=str(int(query.created_after.timestamp() * 1e6)) if query.created_after else "-inf",
                before_id=before_id,
                names=names or ["all"],
            )
        )
        documents = [StatusDocument.model_validate_json(text) for text in texts]
        return JobPage(
            jobs=tuple(document for document in documents if query.accepts(document)),
            cursor=listing.cursor_after((int(last_us), last_id)) if more and last_id else None,
        )

    @blocking
    async def read_usage(self, tenant: str, days: int) -> list[UsageDay]:
        """See `Ledger.read_usage`: one round trip."""
        listed = latest_days(days)
        prefix = f"{self.server.prefix}usage:{tenant}:"
        found = await self.server.ask_each(
            [("HMGET", f"{prefix}{(day - EPOCH).days}", "jobs", "device_us") for day in listed]
        )
        return [
            UsageDay(day, int(jobs or 0), int(device_us or 0) / 1e6)
            for day, (jobs, device_us) in zip(listed, found, strict=True)
        ]

    def find_dead_letters(self) -> list[tuple[str, float]]:
        """See `Ledger.find_dead_letters`."""
        with self.server.translate_errors():
            members: Any = self.server.redis.zrange(
                f"{self.server.prefix}dead", 0, MAX_DEAD_LETTERS_LISTED - 1, desc=True, withscores=True
            )
        return [(str(job_id), score / 1000) for job_id, score in members]

    def drop_dead_letter(self, job_id: str) -> None:
        """See `Ledger.drop_dead_letter`."""
        with self.server.translate_errors():
            self.server.redis.zrem(f"{self.server.prefix}dead", job_id)

    def prune(self) -> None:
        """See `Ledger.prune`."""
        self.server.run(scripts.Prune(retention_ms=max(self._retention_ms)))
        self.find_workers()  # which removes workers that are gone

    def _key(self, job_id: str) -> str:
        return f"{self.server.prefix}job:{job_id}"


def _entry_of(fingerprint: str, job: str, text: str, route: str, tenant: str | None) -> Entry:
    document = StatusDocument.model_validate_json(text)
    return Entry(fingerprint, job, None, document, route, tenant=Tenant(tenant or ""))


def _existing_or_new(entry: Entry, *existing: str) -> Entry:
    """The existing entry, from its fingerprint, job, document and tenant; the new one if there is none.

    A new one whose message was not published has none.
    """
    if existing == PUBLISHED:
        return entry
    if not existing:
        return replace(entry, message=None)
    fingerprint, job, text, tenant = existing
    document = StatusDocument.model_validate_json(text)
    return Entry(fingerprint, job, entry.idempotency_key, document, tenant=Tenant(tenant))


def names_of_lists(document: StatusDocument, network: str) -> list[str]:
    """The names of the lists that a job is in: see "The lists" in `gradcam_worker.ledger.redis`."""
    labels = [_label_list(f"{name}={value}") for name, value in document.metadata.items()]
    networks = [_network_list(network)] if network else []
    return ["all", f"status:{document.status}", *networks, *labels]


def _network_list(network: str) -> str:
    return f"network:{_digest(network)}"


def _label_list(label: str) -> str:
    return f"label:{_digest(label)}"


def _digest(text: str) -> str:
    """A part of a key's name, which has no line breaks and a bounded length."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def expires_ms_of(document: StatusDocument) -> int | None:
    """When a job expires, in ms since the epoch; None: never."""
    return int(document.expires_at.timestamp() * 1000) if document.expires_at else None
