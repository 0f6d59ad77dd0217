"""The running backfills, and the process of each. They share the workers, and none runs twice at a time.

The process that runs a backfill holds a lease on its output, and renews it every second, in Redis:

    backfills              a sorted set of the outputs, by the time of the last renewal
    backfill:<output>      a hash: `owner` (id of the lease), `beat` (of the last renewal, in ms), `facts`
                           (JSON, its progress), `shards` (JSON, ids in flight), `cancel` (a cancel was
                           requested), `token` (which its shards must carry)

Which shards are done is not stored here, but follows from the output's files. The token is random, and stays
the same as long as the record exists, because a resumed backfill may still have shards of the previous run in
the queue.
"""

import hashlib
import hmac
import json
import os
import platform
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

from gradcam_worker.errors import BackfillConflict, BackfillRunning, GradcamError, LedgerUnavailable
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.redis_server.script import LuaScript
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

RENEWAL_INTERVAL_S = 1.0
LEASE_S = 5.0  # without a renewal, a lease expires
RECORD_TTL_S = 7 * 86_400  # after the last renewal


@dataclass(kw_only=True)
class RenewBackfillLease(LuaScript[tuple[int, int, int, str, str, str]], file="renew_backfill_lease"):
    """Renew a lease.

    Returns whether it is held, the number of running backfills, whether a cancel is requested, facts, shards,
    token.
    """

    output: str
    owner: str
    facts: str
    shards: str
    fresh_ms: int
    remembered_ms: int
    enter: bool
    new_token: str


@dataclass(kw_only=True)
class ReleaseLease(LuaScript[int], file="release_lease"):
    """Release a lease. Returns 0 if it is not held."""

    output: str
    owner: str
    facts: str
    shards: str


@dataclass(kw_only=True)
class FindBackfill(LuaScript[tuple[str, str, int] | tuple[()]], file="find_backfill"):
    """Find a backfill. Returns its facts, its shards and whether it runs; empty if there is none."""

    output: str
    fresh_ms: int
    cancel: bool


@dataclass(frozen=True)
class BackfillRecord:
    """What the registry stores for a backfill."""

    facts: dict[str, Any]  # of `BackfillLease`, with `host` and `pid`
    shards: tuple[str, ...]  # ids of those in flight
    is_running: bool  # a process holds its lease


@dataclass(frozen=True)
class LeaseStatus:
    """What a renewal returned."""

    is_owner: bool  # the lease is held
    running: int = 1  # backfills, this one included
    cancel_requested: bool = False
    previous: BackfillRecord | None = None  # stored before this renewal
    token: str = field(default="", repr=False)  # which its shards must carry


class BackfillRegistry(Protocol):
    """All backfills. Every method raises LedgerUnavailable if Redis is unreachable."""

    def renew(
        self,
        output: str,
        owner: str,
        facts: dict[str, Any],
        shards: Sequence[str],
        token: str,
        *,
        enter: bool = False,
    ) -> LeaseStatus:
        """Renew the lease on an output; `enter`: acquire it. `token` is stored for a backfill without one."""
        ...

    def release(self, output: str, owner: str, facts: dict[str, Any], shards: Sequence[str]) -> None:
        """Release the lease on an output."""
        ...

    def find(self, output: str) -> BackfillRecord | None:
        """Return the record of the backfill of an output; None if there is none."""
        ...

    def request_cancel(self, output: str) -> BackfillRecord | None:
        """Request that the running backfill of an output stops; return its record, as `find`."""
        ...


class RedisBackfillRegistry:
    """The registry in one Redis or Valkey server: see `BackfillRegistry`."""

    def __init__(self, server: RedisServer) -> None:
        """`server`: the ledger's."""
        self._server = server

    def renew(
        self,
        output: str,
        owner: str,
        facts: dict[str, Any],
        shards: Sequence[str],
        token: str,
        *,
        enter: bool = False,
    ) -> LeaseStatus:
        """See `BackfillRegistry.renew`."""
        held, running, cancel, facts_before, shards_before, token = self._server.run(
            RenewBackfillLease(
                output=_output_key(output),
                owner=owner,
                facts=json.dumps(facts),
                shards=json.dumps(shards),
                fresh_ms=int(LEASE_S * 1000),
                remembered_ms=RECORD_TTL_S * 1000,
                enter=enter,
                new_token=token,
            )
        )
        record = (
            BackfillRecord(json.loads(facts_before), tuple(json.loads(shards_before)), not held)
            if facts_before
            else None
        )
        return LeaseStatus(bool(held), int(running), bool(cancel), record, token)

    def release(self, output: str, owner: str, facts: dict[str, Any], shards: Sequence[str]) -> None:
        """See `BackfillRegistry.release`."""
        self._server.run(
            ReleaseLease(
                output=_output_key(output), owner=owner, facts=json.dumps(facts), shards=json.dumps(shards)
            )
        )

    def find(self, output: str) -> BackfillRecord | None:
        """See `BackfillRegistry.find`."""
        return self._find(output, cancel=False)

    def request_cancel(self, output: str) -> BackfillRecord | None:
        """See `BackfillRegistry.request_cancel`."""
        return self._find(output, cancel=True)

    def _find(self, output: str, *, cancel: bool) -> BackfillRecord | None:
        lease_ms = int(LEASE_S * 1000)
        answer = self._server.run(FindBackfill(output=_output_key(output), fresh_ms=lease_ms, cancel=cancel))
        if not answer:
            return None
        facts, shards, is_running = answer
        return BackfillRecord(json.loads(facts), tuple(json.loads(shards)), bool(is_running))

    def admits(self, shard: Shard) -> bool:
        """Return whether a shard carries the token of its backfill's record. Raises LedgerUnavailable."""
        key = f"{self._server.prefix}backfill:{_output_key(shard.output)}"
        with self._server.translate_errors():
            facts, token = self._server.redis.hmget(key, "facts", "token")
        if not facts or json.loads(str(facts)).get("backfill") != shard.backfill:
            return False
        # Backfills of earlier versions and their shards have no token.
        return hmac.compare_digest(str(token or "").encode(), shard.token.encode())

    def running(self) -> list[dict[str, Any]]:
        """Return the facts of all running backfills. Raises LedgerUnavailable."""
        with self._server.translate_errors():
            seconds, micros = self._server.redis.time()
            renewed_ms = (seconds + micros / 1e6 - LEASE_S) * 1000
            prefix = self._server.prefix
            keys: Any = self._server.redis.zrangebyscore(f"{prefix}backfills", renewed_ms, "+inf")
            documents = [self._server.redis.hget(f"{prefix}backfill:{key}", "facts") for key in keys]
        return [json.loads(str(facts)) for facts in documents if facts]


def _output_key(output: str) -> str:
    """The part of a Redis key that stands for an output."""
    return hashlib.sha256(output.rstrip("/").encode()).hexdigest()[:32]


@dataclass
class BackfillLease:
    """The lease on a backfill's output, held and renewed by a background thread while it is entered."""

    registry: BackfillRegistry
    output: str
    facts: Callable[[], dict[str, Any]]
    shards: Callable[[], Sequence[str]]
    status: LeaseStatus = field(default=LeaseStatus(is_owner=True), init=False)
    previous: BackfillRecord | None = field(default=None, init=False)  # what was stored when it was entered
    token: str = field(default_factory=partial(secrets.token_urlsafe, 32), init=False, repr=False)
    _owner: str = field(default_factory=new_id, init=False)

    def __enter__(self) -> Self:
        """Acquire the lease. Raises BackfillRunning if another process holds it, LedgerUnavailable.

        BackfillConflict: it is held by the process of another backfill.
        """
        status, end = self.renew(enter=True), time.monotonic() + LEASE_S + RENEWAL_INTERVAL_S
        while not status.is_owner and _was_killed(status.previous) and time.monotonic() < end:
            time.sleep(RENEWAL_INTERVAL_S / 2)
            status = self.renew(enter=True)
        if not status.is_owner:
            raise self._held_elsewhere(status.previous)
        self.previous, self.token = status.previous, status.token
        # Without `outages`: the runner reports them.
        self._loop = BackgroundLoop("backfill-lease", self.renew, RENEWAL_INTERVAL_S)
        self._loop.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lease, so that another process can acquire it at once."""
        self._loop.stop()
        try:
            self.registry.release(self.output, self._owner, self._process_facts(), self.shards())
        except LedgerUnavailable as unavailable:  # the lease will expire
            log.debug("backfill_lease_release_failed", output=self.output, error=unavailable)

    def renew(self, *, enter: bool = False) -> LeaseStatus:
        """Renew the lease, with current facts and shards in flight. Raises LedgerUnavailable."""
        self.status = self.registry.renew(
            self.output, self._owner, self._process_facts(), self.shards(), self.token, enter=enter
        )
        return self.status

    def check(self) -> None:
        """Raise BackfillRunning if another process holds the lease now; BackfillConflict: as when entered."""
        if not self.status.is_owner:
            raise self._held_elsewhere(self.status.previous)

    def _process_facts(self) -> dict[str, Any]:
        return {**self.facts(), "host": platform.node(), "pid": os.getpid()}

    def _held_elsewhere(self, record: BackfillRecord | None) -> GradcamError:
        facts = record.facts if record else {}
        is_same = facts.get("backfill") == self.facts()["backfill"]
        kind, whose = (BackfillRunning, "The") if is_same else (BackfillConflict, "Another")
        return kind(
            f"{whose} backfill of {self.output} is run by process {facts.get('pid')} on {facts.get('host')}: "
            "wait for it, or stop it there, or by `gradcam backfill cancel`. If it was killed, try again in "
            f"{LEASE_S:g} seconds."
        )


def _was_killed(record: BackfillRecord | None) -> bool:
    """Whether the lease's owner was a process of this machine that does not exist any more."""
    facts = record.facts if record else {}
    if facts.get("host") != platform.node() or not isinstance(facts.get("pid"), int):
        return False
    try:
        os.kill(facts["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's process
        return False
    return False
