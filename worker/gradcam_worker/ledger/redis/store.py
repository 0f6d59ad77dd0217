"""The ledger in Redis: each step one script of `redis_scripts`, and so atomic."""

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.ledger import outbox, state_machine
from gradcam_worker.ledger.ledger import Entry, Ledger, Renewed
from gradcam_worker.ledger.redis import scripts
from gradcam_worker.ledger.redis.pubsub import RedisChanges
from gradcam_worker.schemas.job import StatusDocument
from gradcam_worker.schemas.shard import ROUTES
from gradcam_worker.settings import ONE_SERVER, Settings
from gradcam_worker.text.urls import without_secrets

LONGEST_PAUSE_MS = 600_000  # before a message that seems lost is published yet another time
LIVES = 3  # leases without a word: a worker that is gone, of which its health need not be told
REMEMBERED = 10_000  # dead letters that are listed
CONNECTIONS = 256  # at most, of a process: one for each thread that asks at the same moment
# What a server says to somebody whom it will never serve: asking again is of no use.
REFUSED = (
    redis.exceptions.AuthenticationError,
    redis.exceptions.AuthenticationWrongNumberOfArgsError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.NoPermissionError,
)
NO_DATABASE = "DB index"  # which is the only one without a class of its own
# What it says where a step has not been taken, and nothing of it: the first write of a script is refused.
UNCHANGED = (
    redis.exceptions.BusyLoadingError,
    redis.exceptions.MasterDownError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
)
UNCHANGED_WORDS = ("NOREPLICAS", "MISCONF")
# What one says that is part of a Redis Cluster: of another slot, or of keys that lie in several.
CLUSTER = (redis.exceptions.ClusterError, redis.exceptions.MovedError, redis.exceptions.AskError)
CLUSTER_WORDS = ("CROSSSLOT", "non local key", "do not hash to the same slot")
NO_CLUSTER = "is part of a Redis Cluster, which is not supported"
ALL_IN_USE = "Too many connections"  # redis-py's words
UNSENT = "nothing was asked"  # a note on an error of redis-py's
LOOK_S = 0.05  # that who waits for a connection sleeps at most: a moment to be told of can be missed


class Pool(redis.ConnectionPool):
    """The connections of one process. Who finds all of them in use waits for one, for a while."""

    def __init__(self, *args: Any, wait_s: float, **options: Any) -> None:
        """`wait_s` is for how long."""
        self._wait_s, self._freed = wait_s, threading.Condition()
        super().__init__(*args, **options)

    def get_connection(self, *args: Any, **options: Any) -> Any:
        """A connection that is connected. Whatever is raised has the note UNSENT."""
        end = time.monotonic() + self._wait_s
        while True:
            try:
                return super().get_connection(*args, **options)
            except redis.RedisError as error:
                error.add_note(UNSENT)
                if str(error) != ALL_IN_USE:
                    raise
            if time.monotonic() >= end:
                every = f"all {self.max_connections} connections of this process"
                message = f"{every} were in use for {self._wait_s:g} s"
                waited = redis.exceptions.ConnectionError(message)
                waited.add_note(UNSENT)
                raise waited
            with self._freed:
                self._freed.wait(LOOK_S)

    def release(self, connection: Any) -> None:
        """Give a connection back, to whoever waits for one."""
        super().release(connection)
        with self._freed:
            self._freed.notify()


class Clients:
    """The client of a server, one for each process that was forked since.

    Redis-py means to survive a fork, but waits for ever for a lock that another thread held just then.
    """

    def __init__(
        self,
        settings: Settings,
        url: str,
        unavailable: type[BrokerUnavailable | LedgerUnavailable],
        *,
        timeout_s: float,
        retries: int,
    ) -> None:
        """Nothing is connected yet. `timeout_s` is how long one answer may take.

        A server that accepts connections and says nothing is waited for (`retries` + 1) squared times as
        long: redis-py connects so often for each time that it asks.
        """
        self._url, self._unavailable = url, unavailable
        name = "ledger" if unavailable is LedgerUnavailable else "broker"
        self._who = f"The {name} at {without_secrets(url)}"
        self._options: dict[str, Any] = {
            **settings.redis_tls(url),
            "decode_responses": True,
            "max_connections": CONNECTIONS,
            "wait_s": timeout_s,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": min(timeout_s, 3),
            "socket_keepalive": True,
            "health_check_interval": 15,
            "retry": Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=retries),
            # After a failover, the node of before takes no writes: redis-py connects anew before each retry.
            "retry_on_error": [redis.exceptions.ReadOnlyError],
        }
        self._clients: dict[int, redis.Redis] = {}  # by process; threads share one

    def mine(self) -> redis.Redis:
        """This process's own."""
        process = os.getpid()
        if process not in self._clients:
            for inherited in [*self._clients.values()]:
                inherited.auto_close_connection_pool = False  # whose lock it would wait for in the end
            client = redis.Redis(connection_pool=Pool.from_url(self._url, **self._options))
            client.auto_close_connection_pool = True
            self._clients.setdefault(process, client)
        return self._clients[process]

    def close(self) -> None:
        """Close all connections but those on which somebody waits for an answer."""
        self.mine().connection_pool.disconnect(inuse_connections=False)

    def memory(self) -> Mapping[str, Any]:
        """What the server says of its memory; nothing where the user may not ask. As `reaching` raises."""
        with self.reaching():
            try:
                found: Any = self.mine().info("memory")
            except redis.exceptions.NoPermissionError:
                return {}
        return found  # type: ignore[no-any-return]  # redis-py's types do not say

    def mode(self) -> str:
        """What the server calls itself: standalone, cluster or sentinel; empty where it does not say."""
        with self.reaching():
            try:
                client: Any = self.mine()
                said = client.execute_command("HELLO")
            except redis.exceptions.ResponseError:  # it does not know the question, or may not be asked
                return ""
        facts = said if isinstance(said, dict) else dict(zip(said[::2], said[1::2], strict=True))
        return str(facts.get("mode", ""))

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """What Redis raises is BrokerUnavailable or LedgerUnavailable here."""
        try:
            yield
        except redis.RedisError as error:
            said, refused = str(error), isinstance(error, REFUSED) or str(error).startswith(NO_DATABASE)
            cluster = isinstance(error, CLUSTER) or any(words in said for words in CLUSTER_WORDS)
            what = f"cannot be reached ({error})"
            if isinstance(error, redis.exceptions.OutOfMemoryError):
                what = "is full: it takes nothing new until it has memory (maxmemory) again"
            elif refused:
                what = f"refuses us ({error}): look at the user, the password and the database of its URL"
            elif cluster:
                what = f"{NO_CLUSTER} ({error}): {ONE_SERVER}"
            unavailable = self._unavailable(f"{self._who} {what}.")
            unavailable.hopeless = refused or cluster
            unavailable.retryable = not unavailable.hopeless
            unchanged = refused or isinstance(error, UNCHANGED) or said.startswith(UNCHANGED_WORDS)
            unavailable.unsent = unchanged or UNSENT in getattr(error, "__notes__", ())
            raise unavailable from error


class Server:
    """A Redis or Valkey server, not a Redis Cluster, and the scripts that run there."""

    def __init__(self, settings: Settings, *, timeout_s: float = 5, retries: int = 2) -> None:
        """`timeout_s` is how long one answer may take; what fails is asked again, `retries` times."""
        self.prefix = settings.key_prefix
        self._clients = Clients(
            settings, settings.ledger, LedgerUnavailable, timeout_s=timeout_s, retries=retries
        )
        self.reaching, self.close = self._clients.reaching, self._clients.close
        self.mode = self._clients.mode
        self._scripts: dict[str, Any] = {}

    @property
    def redis(self) -> redis.Redis:
        """The client of this process."""
        return self._clients.mine()

    def run(self, script: str, *arguments: str | float) -> Any:
        """Run a script of `redis_scripts` with the prefix and these arguments. Raises LedgerUnavailable."""
        if script not in self._scripts:
            self._scripts[script] = self.redis.register_script(script)
        with self.reaching():
            return self._scripts[script](args=[self.prefix, *arguments], client=self.redis)


class RedisLedger(Ledger):
    """The ledger in one Redis or Valkey server."""

    def __init__(self, settings: Settings, *, timeout_s: float = 5, retries: int = 2) -> None:
        """Nothing is connected yet. `timeout_s` is how long one answer may take: see `Server`."""
        self.server = Server(settings, timeout_s=timeout_s, retries=retries)
        self._lease_ms = int(settings.lease_s * 1000)
        retention_s = settings.retention_s
        keyed_s = max(retention_s, settings.idempotency_retention_s)
        self._retention_ms = (int(retention_s * 1000), int(keyed_s * 1000))

    def _create_many(self, entries: Sequence[Entry]) -> list[Entry]:
        asked: list[str | float] = [*self._retention_ms]
        for entry in entries:
            document, key = entry.document, entry.idempotency_key
            digest = hashlib.sha256((key or "").encode()).hexdigest()
            hooks = [
                {"lane": outbox.lane(hook.url), "events": hook.events, "text": hook.to_json()}
                for hook in entry.webhooks
            ]
            asked += [
                document.id,
                f"{self.server.prefix}idempotency:{digest}" if key else "",
                entry.fingerprint,
                entry.job,
                document.to_json(),
                document.attempt,
                document.revision,
                document.status,
                entry.route,
                json.dumps(hooks) if hooks else "",
                _expires_ms(document),
                state_machine.event(None, document),
            ]
        found: list[list[str]] = self.server.run(scripts.CREATE, *asked)
        return [_held(entry, *one) for entry, one in zip(entries, found, strict=False)]

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
        swapped = self.server.run(
            scripts.SWAP,
            before.id,
            before.attempt,
            before.revision,
            after.to_json(),
            after.attempt,
            after.revision,
            after.status,
            int(delay_s * 1000),
            fingerprint or "",
            before.to_json() if fingerprint else "",
            _expires_ms(after),
            "canceling" if after.cancel_requested_at else "",
            state_machine.event(before, after),
            *self._retention_ms,
            self._lease_ms,
            "due" if due else "",
        )
        return bool(swapped)

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

    def changes(self) -> RedisChanges:
        """See `Ledger.changes`."""
        return RedisChanges(self.server.redis, self.server.prefix)

    def close(self) -> None:
        """See `Ledger.close`."""
        self.server.close()

    def counts(self) -> tuple[int, int]:
        """See `Ledger.counts`."""
        waiting = [*(f"queued:{route}" for route in ROUTES), "retrying"]
        with self.server.reaching(), self.server.redis.pipeline(transaction=False) as pipeline:
            for name in (*waiting, "running"):
                pipeline.zcard(self.server.prefix + name)
            *queued, running = pipeline.execute()
        return sum(queued), running

    def beat(self, worker: str, health: str, held: Mapping[str, int]) -> Renewed:
        """See `Ledger.beat`."""
        pairs = [part for job_id, attempt in held.items() for part in (job_id, attempt)]
        lost, canceled = self.server.run(scripts.BEAT, self._lease_ms, worker, health, *pairs)
        return Renewed(frozenset(lost), frozenset(canceled))

    def workers(self) -> dict[str, str]:
        """See `Ledger.workers`."""
        found = self.server.run(scripts.WORKERS, LIVES * self._lease_ms)
        return dict(zip(found[::2], found[1::2], strict=True))

    def lead(self, worker: str, seconds: float) -> bool:
        """See `Ledger.lead`."""
        return bool(self.server.run(scripts.LEAD, worker, int(seconds * 1000)))

    def overdue(self, limit: int) -> dict[str, list[str]]:
        """See `Ledger.overdue`."""
        lost, due, expired = self.server.run(scripts.OVERDUE, limit)
        return {"lost": lost, "due": due, "expired": expired}

    def silent(self, route: str, *, empty: bool, lost_after_s: float, limit: int) -> list[str]:
        """See `Ledger.silent`."""
        lost_after_ms = int(lost_after_s * 1000)
        said = "empty" if empty else ""
        found: list[str] = self.server.run(
            scripts.SILENT, route, said, lost_after_ms, limit, max(LONGEST_PAUSE_MS, lost_after_ms)
        )
        return found

    def dead(self) -> list[tuple[str, float]]:
        """See `Ledger.dead`."""
        with self.server.reaching():
            found: Any = self.server.redis.zrange(
                f"{self.server.prefix}dead", 0, REMEMBERED - 1, desc=True, withscores=True
            )
        return [(str(job_id), score / 1000) for job_id, score in found]

    def bury(self, job_id: str) -> None:
        """See `Ledger.bury`."""
        with self.server.reaching():
            self.server.redis.zrem(f"{self.server.prefix}dead", job_id)

    def sweep(self) -> None:
        """See `Ledger.sweep`."""
        self.server.run(scripts.SWEEP, max(self._retention_ms))
        self.workers()

    def _key(self, job_id: str) -> str:
        return f"{self.server.prefix}job:{job_id}"


def _held(entry: Entry, *found: str) -> Entry:
    """The entry that was there before, where one was."""
    if not found:
        return entry
    fingerprint, job, text = found
    return Entry(fingerprint, job, entry.idempotency_key, StatusDocument.model_validate_json(text))


def _expires_ms(document: StatusDocument) -> str:
    return str(int(document.expires_at.timestamp() * 1000)) if document.expires_at else ""
