"""The typed calls of the ledger's scripts. Each class is one file of `lua/`, which documents what it does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradcam_worker.redis_server.script import LuaScript


class NewJob(NamedTuple):
    """A job to enter."""

    job_id: str
    idempotency: str  # the Redis key of its idempotency key; empty: it has none
    fingerprint: str
    job: str  # JSON
    document: str  # JSON
    attempt: int
    revision: int
    status: str
    route: str
    webhooks: str  # JSON; empty: none
    expires_ms: int | None
    event: str  # empty: nothing to deliver
    tenant: str  # its name; empty: nobody's
    created_us: int
    lists: str  # their names, a line each; empty: a shard, which is in none
    share: str  # of its tenant, a number
    queue: str  # the Redis key of a queue in this server; empty: nothing is published
    message: str  # for this queue


@dataclass(kw_only=True)
class CreateJobs(LuaScript[list[list[str]]], file="create_jobs"):
    """Enter jobs. Returns a list for each: see the script."""

    retention_ms: int
    keyed_retention_ms: int
    replicated: bool
    jobs: Sequence[NewJob]


@dataclass(kw_only=True)
class ReplaceDocument(LuaScript[int | list[str]], file="replace_document"):
    """Replace a job's document by its next revision. Returns 0 if another revision is current.

    A claim in turn returns the job whose turn it is, if it is another's.
    """

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
    status_before: str
    created_us: int
    device_us: int
    in_turn: bool


@dataclass(kw_only=True)
class FindTurn(LuaScript[list[str]], file="find_turn"):
    """Find the queued job whose turn it is in a route, if any. Returns its fields: see the script."""

    route: str


@dataclass(kw_only=True)
class ListJobs(LuaScript[list[str]], file="list_jobs"):
    """Find jobs that are in all of some lists. Returns where to go on, and documents: see the script."""

    scope: str
    is_nobodys: bool
    limit: int
    max_scanned: int
    newest_us: str
    oldest_us: str
    before_id: str
    names: Sequence[str]


class HeldLease(NamedTuple):
    """A lease to renew."""

    job_id: str
    attempt: int


@dataclass(kw_only=True)
class RenewLeases(LuaScript[tuple[list[str], list[str]]], file="renew_leases"):
    """Renew a worker's leases. Returns the ids of jobs that it has lost, and of running jobs to cancel."""

    lease_ms: int
    worker: str
    health: str
    leases: Sequence[HeldLease]


@dataclass(kw_only=True)
class FindWorkers(LuaScript[list[str]], file="find_workers"):
    """Find the live workers. Returns worker, health, worker, health, and so on."""

    worker_ttl_ms: int


@dataclass(kw_only=True)
class TryLead(LuaScript[int], file="try_lead"):
    """Become or remain the worker that runs the reaper. Returns 0 if another worker is the leader."""

    worker: str
    lease_ms: int


@dataclass(kw_only=True)
class FindOverdue(LuaScript[tuple[list[str], list[str], list[str]]], file="find_overdue"):
    """Find jobs to recover. Returns ids: of expired leases, of retries that are due, of expired jobs."""

    limit: int


@dataclass(kw_only=True)
class FindUnpublished(LuaScript[list[str]], file="find_unpublished"):
    """Find queued jobs whose message was lost. Returns their ids."""

    route: str
    queue_is_empty: bool
    lost_after_ms: int
    limit: int
    longest_pause_ms: int


@dataclass(kw_only=True)
class Prune(LuaScript[int], file="prune"):
    """Remove dead letters and parked recipients whose retention is over."""

    retention_ms: int


@dataclass(kw_only=True)
class ReadDepths(LuaScript[list[int]], file="read_depths"):
    """Read the lengths of queues. Returns 6 numbers, and 2 for each route: see the script."""

    worker_ttl_ms: int
    max_scanned: int
    routes: Sequence[str]
