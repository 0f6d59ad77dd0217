"""The calls of the ledger's scripts: each class is one file of `lua/`. What they do is said there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradcam_worker.ledger.redis.script import LuaScript


class NewJob(NamedTuple):
    """A job to be entered."""

    job_id: str
    idempotency: str  # the key of its idempotency key, or empty
    fingerprint: str
    job: str  # JSON
    document: str  # JSON
    attempt: int
    revision: int
    status: str
    route: str
    webhooks: str  # JSON, or empty
    expires_ms: int | None
    event: str  # empty: nothing to deliver


@dataclass(frozen=True, kw_only=True)
class CreateJobs(LuaScript[list[list[str]]], file="create_jobs"):
    """Enter jobs. Returns of each what was there before: fingerprint, job, document; or nothing."""

    retention_ms: int
    keyed_retention_ms: int
    jobs: Sequence[NewJob]


@dataclass(frozen=True, kw_only=True)
class ReplaceDocument(LuaScript[int], file="replace_document"):
    """Replace a job's document by its next revision. Returns 1, or 0 where it has another one by now."""

    job_id: str
    attempt_before: int
    revision_before: int
    document: str
    attempt: int
    revision: int
    status: str
    delay_ms: int
    fingerprint: str
    document_before: str
    expires_ms: int | None
    cancel_requested: bool
    event: str
    retention_ms: int
    keyed_retention_ms: int
    lease_ms: int
    only_if_due: bool


class HeldLease(NamedTuple):
    """A lease to be renewed."""

    job_id: str
    attempt: int


@dataclass(frozen=True, kw_only=True)
class RenewLeases(LuaScript[tuple[list[str], list[str]]], file="renew_leases"):
    """Renew a worker's leases. Returns the ids of jobs that it lost, and of running ones that are to stop."""

    lease_ms: int
    worker: str
    health: str
    leases: Sequence[HeldLease]


@dataclass(frozen=True, kw_only=True)
class FindWorkers(LuaScript[list[str]], file="find_workers"):
    """Find the workers that live. Returns worker, health, worker, health and so on."""

    remembered_ms: int


@dataclass(frozen=True, kw_only=True)
class TryLead(LuaScript[int], file="try_lead"):
    """Become the worker that reaps, or stay it. Returns 1, or 0 where another one is."""

    worker: str
    lease_ms: int


@dataclass(frozen=True, kw_only=True)
class FindOverdue(LuaScript[tuple[list[str], list[str], list[str]]], file="find_overdue"):
    """Find jobs to be recovered. Returns ids of lost leases, of retries that are due, of expired jobs."""

    limit: int


@dataclass(frozen=True, kw_only=True)
class FindUnpublished(LuaScript[list[str]], file="find_unpublished"):
    """Find queued jobs whose message was lost. Returns their ids."""

    route: str
    queue_is_empty: bool
    lost_after_ms: int
    limit: int
    longest_pause_ms: int


@dataclass(frozen=True, kw_only=True)
class Prune(LuaScript[int], file="prune"):
    """Remove dead letters and parked recipients that are older than this."""

    retention_ms: int


@dataclass(frozen=True, kw_only=True)
class ReadDepths(LuaScript[list[int]], file="read_depths"):
    """Count what waits. Returns 6 numbers and 2 of each route: see the script."""

    remembered_ms: int
    scanned: int
    routes: Sequence[str]
