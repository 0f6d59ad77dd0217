"""The ledger in Redis: each step one script of `scripts`, and so atomic."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gradcam_worker.ledger import outbox, state_machine
from gradcam_worker.ledger.ledger import Entry, Ledger, Overdue, Renewed
from gradcam_worker.ledger.redis import scripts
from gradcam_worker.ledger.redis.client import RedisServer
from gradcam_worker.ledger.redis.pubsub import RedisJobUpdates
from gradcam_worker.schemas.shard import ROUTES
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

LONGEST_PAUSE_MS = 600_000  # before a message that seems lost is published yet another time
REMEMBERED_LEASES = 3  # after so many without a word a worker is gone, and not listed any more
DEAD_LETTERS_LISTED = 10_000


class RedisLedger(Ledger):
    """The ledger in one Redis or Valkey server."""

    def __init__(self, settings: Settings, *, timeout_s: float = 5, retries: int = 2) -> None:
        """Nothing is connected yet. `timeout_s` is how long one answer may take: see `RedisServer`."""
        self.server = RedisServer(settings, timeout_s=timeout_s, retries=retries)
        self._lease_ms = int(settings.lease_s * 1000)
        retention_s = settings.retention_s
        keyed_s = max(retention_s, settings.idempotency_retention_s)
        self._retention_ms = (int(retention_s * 1000), int(keyed_s * 1000))

    def _create_many(self, entries: Sequence[Entry]) -> list[Entry]:
        new = [self._new_job(entry) for entry in entries]
        retention_ms, keyed_ms = self._retention_ms
        found = self.server.run(
            scripts.CreateJobs(retention_ms=retention_ms, keyed_retention_ms=keyed_ms, jobs=new)
        )
        return [_held(entry, *one) for entry, one in zip(entries, found, strict=False)]

    def _new_job(self, entry: Entry) -> scripts.NewJob:
        document, key = entry.document, entry.idempotency_key
        digest = hashlib.sha256((key or "").encode()).hexdigest()
        webhooks = [
            {"lane": outbox.destination(webhook.url), "events": webhook.events, "text": webhook.to_json()}
            for webhook in entry.webhooks
        ]
        return scripts.NewJob(
            job_id=document.id,
            idempotency=f"{self.server.prefix}idempotency:{digest}" if key else "",
            fingerprint=entry.fingerprint,
            job=entry.job,
            document=document.to_json(),
            attempt=document.attempt,
            revision=document.revision,
            status=document.status,
            route=entry.route,
            webhooks=json.dumps(webhooks) if webhooks else "",
            expires_ms=_expires_ms(document),
            event=state_machine.event(None, document),
        )

    def _find(self, job_id: str) -> Entry | None:
        names = ("fingerprint", "job", "document", "route")
        with self.server.reaching():
            fingerprint, job, text, route = map(str, self.server.redis.hmget(self._key(job_id), *names))
        if fingerprint == str(None):
            return None
        return Entry(fingerprint, job, None, StatusDocument.model_validate_json(text), route)

    def _swap(
        self,
        before: StatusDocument,
        after: StatusDocument,
        *,
        delay_s: float = 0,
        due: bool = False,
        fingerprint: str | None = None,
    ) -> bool:
        retention_ms, keyed_ms = self._retention_ms
        return bool(
            self.server.run(
                scripts.ReplaceDocument(
                    job_id=before.id,
                    attempt_before=before.attempt,
                    revision_before=before.revision,
                    document=after.to_json(),
                    attempt=after.attempt,
                    revision=after.revision,
                    status=after.status,
                    delay_ms=int(delay_s * 1000),
                    fingerprint=fingerprint or "",
                    document_before=before.to_json() if fingerprint else "",
                    expires_ms=_expires_ms(after),
                    cancel_requested=after.cancel_requested_at is not None,
                    event=state_machine.event(before, after),
                    retention_ms=retention_ms,
                    keyed_retention_ms=keyed_ms,
                    lease_ms=self._lease_ms,
                    only_if_due=due,
                )
            )
        )

    def read_many(self, ids: Sequence[str]) -> dict[str, StatusDocument]:
        """See `Ledger.read_many`: one round trip."""
        with self.server.reaching(), self.server.redis.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hget(self._key(job_id), "document")
            texts = pipeline.execute()
        return {
            job_id: StatusDocument.model_validate_json(text)
            for job_id, text in zip(ids, texts, strict=True)
            if text
        }

    def open_updates(self) -> RedisJobUpdates:
        """See `Ledger.open_updates`."""
        return RedisJobUpdates(self.server.redis, self.server.prefix)

    def close(self) -> None:
        """See `Ledger.close`."""
        self.server.close()

    def count_jobs(self) -> tuple[int, int]:
        """See `Ledger.count_jobs`."""
        waiting = [*(f"queued:{route}" for route in ROUTES), "retrying"]
        with self.server.reaching(), self.server.redis.pipeline(transaction=False) as pipeline:
            for name in (*waiting, "running"):
                pipeline.zcard(self.server.prefix + name)
            *queued, running = pipeline.execute()
        return sum(queued), running

    def renew_leases(self, worker: str, health: str, held: Mapping[str, int]) -> Renewed:
        """See `Ledger.renew_leases`."""
        leases = [scripts.HeldLease(job_id, attempt) for job_id, attempt in held.items()]
        lost, canceled = self.server.run(
            scripts.RenewLeases(lease_ms=self._lease_ms, worker=worker, health=health, leases=leases)
        )
        return Renewed(frozenset(lost), frozenset(canceled))

    def find_workers(self) -> dict[str, str]:
        """See `Ledger.find_workers`."""
        found = self.server.run(scripts.FindWorkers(remembered_ms=REMEMBERED_LEASES * self._lease_ms))
        return dict(zip(found[::2], found[1::2], strict=True))

    def try_lead(self, worker: str, seconds: float) -> bool:
        """See `Ledger.try_lead`."""
        return bool(self.server.run(scripts.TryLead(worker=worker, lease_ms=int(seconds * 1000))))

    def find_overdue(self, limit: int) -> Overdue:
        """See `Ledger.find_overdue`."""
        return Overdue(*self.server.run(scripts.FindOverdue(limit=limit)))

    def find_unpublished(self, route: str, *, empty: bool, lost_after_s: float, limit: int) -> list[str]:
        """See `Ledger.find_unpublished`."""
        lost_after_ms = int(lost_after_s * 1000)
        return self.server.run(
            scripts.FindUnpublished(
                route=route,
                queue_is_empty=empty,
                lost_after_ms=lost_after_ms,
                limit=limit,
                longest_pause_ms=max(LONGEST_PAUSE_MS, lost_after_ms),
            )
        )

    def find_dead_letters(self) -> list[tuple[str, float]]:
        """See `Ledger.find_dead_letters`."""
        with self.server.reaching():
            found: Any = self.server.redis.zrange(
                f"{self.server.prefix}dead", 0, DEAD_LETTERS_LISTED - 1, desc=True, withscores=True
            )
        return [(str(job_id), score / 1000) for job_id, score in found]

    def drop_dead_letter(self, job_id: str) -> None:
        """See `Ledger.drop_dead_letter`."""
        with self.server.reaching():
            self.server.redis.zrem(f"{self.server.prefix}dead", job_id)

    def prune(self) -> None:
        """See `Ledger.prune`."""
        self.server.run(scripts.Prune(retention_ms=max(self._retention_ms)))
        self.find_workers()  # removes those that were not heard of

    def _key(self, job_id: str) -> str:
        return f"{self.server.prefix}job:{job_id}"


def _held(entry: Entry, *found: str) -> Entry:
    """The entry that was there before, where one was."""
    if not found:
        return entry
    fingerprint, job, text = found
    return Entry(fingerprint, job, entry.idempotency_key, StatusDocument.model_validate_json(text))


def _expires_ms(document: StatusDocument) -> int | None:
    return int(document.expires_at.timestamp() * 1000) if document.expires_at else None
