"""Which backfills run, and who runs them: so that they share the workers, and nobody runs one twice.

Whoever runs a backfill says so every second, in Redis, under the name of its output:

    backfills              a sorted set of the outputs, by when somebody was heard of last
    backfill:<output>      a hash: `owner` (whose it is), `beat` (when, in ms), `facts` (JSON, how far it
                           is), `shards` (JSON, ids in flight), `cancel` (somebody wants it to end),
                           `token` (what its shards have to show)

What is done is not written here: that is what lies in the output. The token is random, and stays
the same for as long as the backfill is remembered: a resumed backfill may still have shards of the previous
run in the queue.
"""

import hashlib
import hmac
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

from gradcam_worker.errors import BackfillConflict, LedgerUnavailable
from gradcam_worker.ledger.redis.client import RedisServer
from gradcam_worker.ledger.redis.script import LuaScript
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.shard import Shard

log = logging.getLogger("gradcam")

EVERY_S = 1.0  # between two signs of life
FRESH_S = 5.0  # after the last of which an output is its owner's
REMEMBERED_S = 7 * 86_400  # that a backfill can be asked about after its last sign


@dataclass(frozen=True, kw_only=True)
class RenewLease(LuaScript[tuple[int, int, int, str, str, str]], file="renew_lease"):
    """Say that a backfill is run. Returns: is it ours, how many run, is it to end, facts, shards, token."""

    output: str
    owner: str
    facts: str
    shards: str
    fresh_ms: int
    remembered_ms: int
    enter: bool
    new_token: str


@dataclass(frozen=True, kw_only=True)
class ReleaseLease(LuaScript[int], file="release_lease"):
    """Say that nobody runs a backfill any more. Returns 0 where it is somebody else's."""

    output: str
    owner: str
    facts: str
    shards: str


@dataclass(frozen=True, kw_only=True)
class FindBackfill(LuaScript[tuple[str, str, int] | tuple[()]], file="find_backfill"):
    """Find a backfill. Returns its facts, its shards and whether somebody runs it, or nothing."""

    output: str
    fresh_ms: int
    cancel: bool


@dataclass(frozen=True)
class BackfillRecord:
    """What is remembered of a backfill."""

    facts: dict[str, Any]  # as `BackfillLease` was given them, and `host` and `pid`
    shards: tuple[str, ...]  # ids of those in flight
    lives: bool  # somebody runs it


@dataclass(frozen=True)
class LeaseStatus:
    """What whoever runs a backfill learned when it said so."""

    owner: bool  # the output is its own
    running: int = 1  # backfills, this one included
    cancel: bool = False  # it is to end
    before: BackfillRecord | None = None  # what was held until now
    token: str = field(default="", repr=False)  # what its shards have to show


class BackfillRegistry(Protocol):
    """All backfills. Raises LedgerUnavailable wherever it cannot be reached."""

    def beat(
        self,
        output: str,
        owner: str,
        facts: dict[str, Any],
        shards: Sequence[str],
        token: str,
        *,
        enter: bool = False,
    ) -> LeaseStatus:
        """Say that a backfill is run. `enter`: as the first thing of all, with a token of its own choice."""
        ...

    def leave(self, output: str, owner: str, facts: dict[str, Any], shards: Sequence[str]) -> None:
        """Say that nobody runs it any more."""
        ...

    def find(self, output: str, *, cancel: bool = False) -> BackfillRecord | None:
        """What is remembered of the backfill of an output; with `cancel`, whoever runs it shall end it."""
        ...


class RedisBackfillRegistry:
    """The registry in one Redis or Valkey server: see `BackfillRegistry`."""

    def __init__(self, server: RedisServer) -> None:
        """The ledger's server."""
        self._server = server

    def beat(
        self,
        output: str,
        owner: str,
        facts: dict[str, Any],
        shards: Sequence[str],
        token: str,
        *,
        enter: bool = False,
    ) -> LeaseStatus:
        """See `BackfillRegistry.beat`."""
        own, running, cancel, before, theirs, token = self._server.run(
            RenewLease(
                output=_place(output),
                owner=owner,
                facts=json.dumps(facts),
                shards=json.dumps(shards),
                fresh_ms=int(FRESH_S * 1000),
                remembered_ms=REMEMBERED_S * 1000,
                enter=enter,
                new_token=token,
            )
        )
        record = BackfillRecord(json.loads(before), tuple(json.loads(theirs)), not own) if before else None
        return LeaseStatus(bool(own), int(running), bool(cancel), record, token)

    def leave(self, output: str, owner: str, facts: dict[str, Any], shards: Sequence[str]) -> None:
        """See `BackfillRegistry.leave`."""
        self._server.run(
            ReleaseLease(
                output=_place(output), owner=owner, facts=json.dumps(facts), shards=json.dumps(shards)
            )
        )

    def find(self, output: str, *, cancel: bool = False) -> BackfillRecord | None:
        """See `BackfillRegistry.find`."""
        found = self._server.run(
            FindBackfill(output=_place(output), fresh_ms=int(FRESH_S * 1000), cancel=cancel)
        )
        return (
            BackfillRecord(json.loads(found[0]), tuple(json.loads(found[1])), bool(found[2]))
            if found
            else None
        )

    def admits(self, shard: Shard) -> bool:
        """Whether a shard shows the token of a backfill that is remembered. Raises LedgerUnavailable."""
        key = f"{self._server.prefix}backfill:{_place(shard.output)}"
        with self._server.reaching():
            facts, token = self._server.redis.hmget(key, "facts", "token")
        if not facts or json.loads(str(facts)).get("backfill") != shard.backfill:
            return False
        # One that an older version runs has none, and neither have its shards, which the ledger has already.
        return hmac.compare_digest(str(token or "").encode(), shard.token.encode())

    def running(self) -> list[dict[str, Any]]:
        """The facts of all that are run, as `BackfillLease` was given them. Raises LedgerUnavailable."""
        with self._server.reaching():
            seconds, micros = self._server.redis.time()
            fresh_ms = (seconds + micros / 1e6 - FRESH_S) * 1000
            prefix = self._server.prefix
            places: Any = self._server.redis.zrangebyscore(f"{prefix}backfills", fresh_ms, "+inf")
            found = [self._server.redis.hget(f"{prefix}backfill:{place}", "facts") for place in places]
        return [json.loads(str(facts)) for facts in found if facts]


def _place(output: str) -> str:
    """An output as part of a key: it may hold what is no part of one."""
    return hashlib.sha256(output.rstrip("/").encode()).hexdigest()[:32]


@dataclass
class BackfillLease:
    """A backfill's place in the registry, for as long as it is run: says so from a thread of its own."""

    registry: BackfillRegistry
    output: str
    facts: Callable[[], dict[str, Any]]
    shards: Callable[[], Sequence[str]]
    heard: LeaseStatus = field(default=LeaseStatus(owner=True), init=False)
    before: BackfillRecord | None = field(default=None, init=False)  # what was remembered of it when it began
    token: str = field(default_factory=partial(secrets.token_urlsafe, 32), init=False, repr=False)
    _owner: str = field(default_factory=new_id, init=False)
    _stopped: threading.Event = field(default_factory=threading.Event, init=False)

    def __enter__(self) -> Self:
        """Raises BackfillConflict where somebody else runs it, LedgerUnavailable."""
        heard, end = self.beat(enter=True), time.monotonic() + FRESH_S + EVERY_S
        while not heard.owner and _was_killed(heard.before) and time.monotonic() < end:
            time.sleep(EVERY_S / 2)
            heard = self.beat(enter=True)
        if not heard.owner:
            raise BackfillConflict(_taken(self.output, heard.before))
        self.before, self.token = heard.before, heard.token
        self._thread = threading.Thread(target=self._keep, name="backfill-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave: somebody else may come at once."""
        self._stopped.set()
        self._thread.join()
        try:
            self.registry.leave(self.output, self._owner, self._said(), self.shards())
        except LedgerUnavailable as unavailable:  # it is forgotten soon enough
            log.debug("the registry of backfills is not told of the end: %s", unavailable)

    def beat(self, *, enter: bool = False) -> LeaseStatus:
        """Say now that it is run, and which shards are in flight. Raises LedgerUnavailable."""
        self.heard = self.registry.beat(
            self.output, self._owner, self._said(), self.shards(), self.token, enter=enter
        )
        return self.heard

    def check(self) -> None:
        """Raise BackfillConflict where somebody else has the output by now."""
        if not self.heard.owner:
            raise BackfillConflict(_taken(self.output, self.heard.before))

    def _said(self) -> dict[str, Any]:
        return {**self.facts(), "host": platform.node(), "pid": os.getpid()}

    def _keep(self) -> None:
        while not self._stopped.wait(EVERY_S):
            try:
                self.beat()
            except LedgerUnavailable as error:  # the backfill itself says so, once
                log.debug("the registry of backfills cannot be told: %s", error)
            except BaseException:  # without this thread the backfill would lose its output
                log.exception("the registry of backfills could not be told")


def _was_killed(record: BackfillRecord | None) -> bool:
    """Whether who said that it runs it was a process of this machine, and is none any more."""
    facts = record.facts if record else {}
    if facts.get("host") != platform.node() or not isinstance(facts.get("pid"), int):
        return False
    try:
        os.kill(facts["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is somebody else's
        return False
    return False


def _taken(output: str, record: BackfillRecord | None) -> str:
    facts = record.facts if record else {}
    return (
        f"The backfill of {output} is run by process {facts.get('pid')} on {facts.get('host')}: wait for it, "
        "or stop it there, or by `gradcam backfill cancel`. If it was killed, try again in "
        f"{FRESH_S:g} seconds."
    )
