"""The typed calls of the scripts of export and import. Each class is one file of `lua/`: see there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradcam_worker.redis_server.script import LuaScript

Recipient = tuple[str, str, list[str]]  # its name, "tries since" (empty: it is parked), its events


@dataclass(kw_only=True)
class ExportJobs(LuaScript[list[tuple[int, str, int, list[str], list[Recipient]]]], file="export_jobs"):
    """Read all that the ledger holds of jobs. Returns for each: see the script."""

    job_ids: Sequence[str]


class ExportedJob(NamedTuple):
    """A job to enter again."""

    job_id: str
    idempotency: str  # the Redis key of its idempotency key without the prefix; empty: it has none
    fingerprint: str
    job: str  # JSON
    document: str  # JSON
    attempt: int
    revision: int
    status: str
    route: str
    webhooks: str  # JSON; empty: none
    expires_ms: int | None
    tenant: str  # its name; empty: nobody's
    share: str  # of its tenant, a number
    created_us: int
    lists: str  # their names, a line each; empty: a shard, which is in none
    cancel: bool
    ttl_ms: int | None  # of a final job
    score: str  # in the sorted set of its place, as exported
    recipients: str  # JSON: of each its name, destination, tries and events


@dataclass(kw_only=True)
class ImportJobs(LuaScript[list[str]], file="import_jobs"):
    """Enter exported jobs. Returns what became of each: added, updated, kept or superseded."""

    dry: bool
    lease_ms: int
    retention_ms: int
    jobs: Sequence[ExportedJob]


class ExportedField(NamedTuple):
    """A field of a hash."""

    field: str
    value: str


@dataclass(kw_only=True)
class ImportFields(LuaScript[int], file="import_fields"):
    """Enter exported fields of a hash. Returns how many were entered."""

    name: str
    dry: bool
    greatest: bool
    ttl_ms: int | None
    exported: Sequence[ExportedField]
