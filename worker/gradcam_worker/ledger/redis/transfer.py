"""Export of a ledger to JSON Lines, and import: for a server that lost, or rolled back, what it had.

The first line is the header, the last one counts the others; between them is one record in each line:

    {"schema": "gradcam.ledger/v1", "version": ..., "now_ms": ...}      now_ms: the server's time
    {"job": {"id": ..., "fields": {...}, "ttl_ms": ..., "score": ..., "recipients": [...]}}
    {"hash": {"name": "tenants", "fields": {...}, "greatest": false, "ttl_ms": null}}
    {"disabled_url": {"url": ..., "until_ms": ...}}
    {"end": {"jobs": ..., "hashes": ..., "disabled_urls": ...}}

A job is read, and entered, at one moment: its document, its idempotency key, its place in queue or lists, its
dead letter, and the events that are still to be delivered. Jobs that change meanwhile are as they were when
their turn came.

Not exported are: messages (each queued job is published again), leases (a worker that lives renews its own;
else the reaper takes the job), shards that have ended and the records of backfills (these follow from the
dataset's files, and a running backfill writes its own again), rates and the quotas of a day, statistics.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import ValidationError

from gradcam_worker import __version__
from gradcam_worker.errors import InvalidExport
from gradcam_worker.ledger import outbox
from gradcam_worker.ledger.ledger import latest_days
from gradcam_worker.ledger.redis.store import EPOCH, expires_ms_of, names_of_lists
from gradcam_worker.ledger.redis.transfer_scripts import (
    ExportedField,
    ExportedJob,
    ExportJobs,
    ImportFields,
    ImportJobs,
)
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.resilience.blocking import run_blocking
from gradcam_worker.schemas.listing import position_of
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.schemas.work import ROUTE, ROUTES

SCHEMA = "gradcam.ledger/v1"
BATCH = 50  # jobs of one script: a few milliseconds of the server's time
BATCH_BYTES = 4 * 1024**2  # of one import
USAGE_DAYS = 400  # for which usage is kept
USAGE_TTL_MS = USAGE_DAYS * 86_400_000
PLACES = (*(f"queued:{route}" for route in ROUTES), "retrying", "running", "dead")
HASHES = ("tenants", "api_keys")  # what operators have made
MAX_ERRORS = 3  # that a message repeats

Record = Mapping[str, Any]


def export_ledger(server: RedisServer) -> Iterator[Record]:
    """Read a ledger, while it is used.

    Args:
        server: Its server.

    Yields:
        The records: see this module.

    Raises:
        LedgerUnavailable: The server cannot be reached.
    """
    yield {"schema": SCHEMA, "version": __version__, "now_ms": _server_ms(server)}
    counts = Counter[str](jobs=0, hashes=0, disabled_urls=0)
    for record in _read_hashes(server):
        counts["hashes"] += 1
        yield record
    for url, until_ms in _read_page(server, "gone", "-inf", -1):
        counts["disabled_urls"] += 1
        yield {"disabled_url": {"url": url, "until_ms": int(until_ms)}}
    # Shards are in no list; and what other users entered who may not write the lists.
    for place in (*PLACES, "listed::all"):
        for ids in _batches(_read_ids(server, place), BATCH):
            for record in _read_jobs(server, ids, only_unlisted=place in PLACES):
                counts["jobs"] += 1
                yield record
    yield {"end": dict(counts)}


def _server_ms(server: RedisServer) -> int:
    ((seconds, microseconds),) = run_blocking(server.ask_each([("TIME",)]))
    return int(seconds) * 1000 + int(microseconds) // 1000


def _read_hashes(server: RedisServer) -> Iterator[Record]:
    prefix = server.prefix
    texts = run_blocking(server.ask_each([("HGETALL", prefix + name) for name in HASHES]))
    found = {name: _as_dict(text) for name, text in zip(HASHES, texts, strict=True)}
    for name, fields in found.items():
        if fields:
            yield {"hash": {"name": name, "fields": fields, "greatest": False, "ttl_ms": None}}
    days = [(day - EPOCH).days for day in latest_days(USAGE_DAYS)]
    for tenant in found["tenants"]:
        names = [f"usage:{tenant}:{day}" for day in days]
        usage = run_blocking(server.ask_each([("HGETALL", prefix + name) for name in names]))
        for name, fields in zip(names, usage, strict=True):
            if fields:
                yield {
                    "hash": {
                        "name": name,
                        "fields": _as_dict(fields),
                        "greatest": True,
                        "ttl_ms": USAGE_TTL_MS,
                    }
                }


def _as_dict(reply: Any) -> dict[str, str]:
    """The fields of a hash, which redis-py returns as a dictionary or as a list."""
    return dict(reply) if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))


def _read_page(server: RedisServer, name: str, least: str, limit: int) -> list[tuple[str, float]]:
    command = ("ZRANGE", server.prefix + name, least, "+inf", "BYSCORE", "LIMIT", 0, limit, "WITHSCORES")
    (reply,) = run_blocking(server.ask_each([command]))
    if reply and isinstance(reply[0], list | tuple):
        return [(str(member), float(score)) for member, score in reply]
    return [(str(member), float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)]


def _read_ids(server: RedisServer, name: str) -> Iterator[str]:
    """The members of a sorted set by their scores, also while it changes, and those that come meanwhile."""
    least, limit, seen = "-inf", 10 * BATCH, set[str]()
    while True:
        page = _read_page(server, name, least, limit)
        yield from (member for member, _ in page if member not in seen)
        if len(page) < limit:
            return
        last = page[-1][1]
        latest = {member for member, score in page if score == last}
        limit = 10 * BATCH + len(latest)  # those are in the next page again
        seen = latest
        least = repr(last)


def _read_jobs(server: RedisServer, ids: Sequence[str], *, only_unlisted: bool) -> Iterator[Record]:
    found = server.run(ExportJobs(job_ids=ids))
    for job_id, (ttl_ms, score, is_listed, fields, recipients) in zip(ids, found, strict=True):
        named = _as_dict(fields)
        if not named or (only_unlisted and is_listed):
            continue
        named["idempotency"] = named.get("idempotency", "").removeprefix(server.prefix)
        yield {
            "job": {
                "id": job_id,
                "fields": {name: value for name, value in named.items() if name not in {"place", "rung"}},
                "ttl_ms": ttl_ms if ttl_ms >= 0 else None,
                "score": score,
                "recipients": [
                    {"recipient": name, "tries": tries, "events": events}
                    for name, tries, events in recipients
                ],
            }
        }


def _batches(ids: Iterable[str], size: int) -> Iterator[list[str]]:
    remaining = iter(ids)
    while batch := list(islice(remaining, size)):
        yield batch


@dataclass
class ImportCounts:
    """What became of the records of an export. The names of the fields are keys of `--json`."""

    added: int = 0  # jobs that the ledger did not have
    updated: int = 0  # jobs of which it had an earlier revision
    kept: int = 0  # jobs of which it has this revision, a later one, or another final one
    superseded: int = 0  # jobs whose idempotency key belongs to another job by now
    expired: int = 0  # jobs that have ended and whose time is over
    published: int = 0  # queued jobs whose message was published
    fields: int = 0  # of tenants, API keys, usage and disabled webhooks
    unreadable: int = 0  # lines
    problems: list[str] = field(default_factory=list)  # of the first of these


class LedgerImport:
    """Enters the records of an export in a ledger, which may be in use."""

    def __init__(
        self,
        server: RedisServer,
        publish: Callable[[Sequence[str], str], None],
        *,
        lease_s: float,
        retention_s: float,
        dry_run: bool = False,
    ) -> None:
        """Connect to nothing yet.

        Args:
            server: The server of the ledger.
            publish: Publishes queued jobs: their ids, and their route.
            lease_s: How long a running job waits for its worker to renew its lease.
            retention_s: The longest time for which the ledger keeps a job.
            dry_run: Only count: nothing is changed.
        """
        self._server, self._publish, self._dry = server, publish, dry_run
        self._lease_ms, self._retention_ms = int(lease_s * 1000), int(retention_s * 1000)
        self._jobs: list[ExportedJob] = []
        self._bytes, self._age_ms, self._now_ms = 0, 0, 0
        self.counts = ImportCounts()

    def run(self, lines: Iterable[str]) -> ImportCounts:
        """Import an export.

        Args:
            lines: Its lines.

        Returns:
            What became of its records.

        Raises:
            InvalidExport: It is no export, it ends before its last line, or lines of it cannot be read. All
                other records are entered nevertheless.
            LedgerUnavailable: The server cannot be reached. An import can be repeated.
        """
        numbered = enumerate(lines, 1)
        self._begin(next(numbered, (0, ""))[1])
        is_whole = False
        try:
            for number, line in numbered:
                try:
                    record = json.loads(line)
                    is_whole = is_whole or "end" in record
                    self._enter(record)
                except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
                    self.counts.unreadable += 1
                    if len(self.counts.problems) < MAX_ERRORS:
                        self.counts.problems.append(f"line {number}: {type(error).__name__}")
        finally:  # also what was read of a file that cannot be read to its end
            self._flush()
        if self.counts.unreadable or not is_whole:
            raise InvalidExport(self._describe_damage(is_whole=is_whole))
        return self.counts

    def _begin(self, line: str) -> None:
        try:
            header = json.loads(line)
            schema, exported_ms = header["schema"], int(header["now_ms"])
        except (ValueError, KeyError, TypeError):
            schema, exported_ms = None, 0
        if schema != SCHEMA:
            message = (
                f"The first line is not the header of an export: its schema is {schema!r}, not {SCHEMA!r}. "
                "`gradcam ledger export` writes one."
            )
            raise InvalidExport(message)
        self._now_ms = _server_ms(self._server)
        self._age_ms = max(self._now_ms - exported_ms, 0)

    def _describe_damage(self, *, is_whole: bool) -> str:
        what = []
        if not is_whole:
            what.append("it ends before its last line: what came after is missing")
        if self.counts.unreadable:
            where = ", ".join(self.counts.problems)
            what.append(f"{self.counts.unreadable} of its lines cannot be read ({where})")
        were = "would be" if self._dry else "were"
        done = f"{self.counts.added} jobs {were} added and {self.counts.updated} updated"
        return f"The export is damaged: {' and '.join(what)}. All other lines are used: {done}."

    def _enter(self, record: Record) -> None:
        if job := record.get("job"):
            entered = self._parse_job(job)
            if entered.ttl_ms is not None and entered.ttl_ms <= 0:
                self.counts.expired += 1
                return
            self._jobs.append(entered)
            self._bytes += sum(len(value) for value in entered if isinstance(value, str))
            if len(self._jobs) >= BATCH or self._bytes >= BATCH_BYTES:
                self._flush()
        elif exported := record.get("hash"):
            self._enter_hash(exported)
        elif disabled := record.get("disabled_url"):
            self._disable(str(disabled["url"]), int(disabled["until_ms"]))

    def _parse_job(self, job: Record) -> ExportedJob:
        fields: Mapping[str, str] = job["fields"]
        document = StatusDocument.model_validate_json(fields["document"])
        work = json.loads(fields["job"])
        asked = work.get("network") if isinstance(work, dict) else None
        network = str(asked or (document.network.name if document.network else ""))
        route, tenant = fields["route"], fields.get("tenant", "")
        ttl_ms = job["ttl_ms"]
        if document.final:  # from before its time to live was set, at the latest
            ttl_ms = (self._retention_ms if ttl_ms is None else int(ttl_ms)) - self._age_ms
        return ExportedJob(
            job_id=document.id,
            idempotency=fields.get("idempotency", ""),
            fingerprint=fields["fingerprint"],
            job=fields["job"],
            document=fields["document"],
            attempt=document.attempt,
            revision=document.revision,
            status=document.status,
            route=route,
            webhooks=fields.get("webhooks", ""),
            expires_ms=expires_ms_of(document),
            tenant=tenant,
            share=fields.get("share", "1"),
            created_us=position_of(document)[0],
            lists="" if route == ROUTE else "\n".join(names_of_lists(document, network)),
            cancel=document.cancel_requested_at is not None,
            ttl_ms=ttl_ms if document.final else None,
            score=str(job["score"]),
            recipients=json.dumps([_with_destination(one) for one in job["recipients"]]),
        )

    def _enter_hash(self, exported: Record) -> None:
        ttl_ms = exported["ttl_ms"]
        left_ms = None if ttl_ms is None else max(int(ttl_ms) - self._age_ms, 1)
        fields = [ExportedField(str(name), str(value)) for name, value in exported["fields"].items()]
        self.counts.fields += self._server.run(
            ImportFields(
                name=str(exported["name"]),
                dry=self._dry,
                greatest=bool(exported["greatest"]),
                ttl_ms=left_ms,
                exported=fields,
            )
        )

    def _disable(self, url: str, until_ms: int) -> None:
        if until_ms <= self._now_ms:
            return
        key = f"{self._server.prefix}gone"
        if not self._dry:
            run_blocking(self._server.ask_each([("ZADD", key, "GT", until_ms, url)]))
        self.counts.fields += 1

    def _flush(self) -> None:
        jobs, self._jobs, self._bytes = self._jobs, [], 0
        if not jobs:
            return
        outcomes = self._server.run(
            ImportJobs(dry=self._dry, lease_ms=self._lease_ms, retention_ms=self._retention_ms, jobs=jobs)
        )
        for outcome, count in Counter(outcomes).items():
            setattr(self.counts, outcome, getattr(self.counts, outcome) + count)
        queued: dict[str, list[str]] = {}
        for job, outcome in zip(jobs, outcomes, strict=True):
            if job.status == "queued" and outcome in {"added", "updated"}:
                queued.setdefault(job.route, []).append(job.job_id)
        for route, ids in queued.items():
            if not self._dry:
                self._publish(ids, route)
            self.counts.published += len(ids)


def _with_destination(recipient: Record) -> dict[str, Any]:
    """A recipient with its destination, which its first event tells: the webhook's host, or its sink."""
    name, events = str(recipient["recipient"]), [*map(str, recipient["events"])]
    hook = events[0].split("\n", 2)[1]
    sink = name.partition(":")[2]
    destination = outbox.destination_of(json.loads(hook)["url"]) if hook else sink
    return {
        "recipient": name,
        "destination": destination,
        "tries": str(recipient["tries"]),
        "events": events,
    }
