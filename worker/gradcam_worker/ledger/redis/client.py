"""Connections to a Redis or Valkey server: one client a process, errors as ours, scripts by their sha."""

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.ledger.redis.script import LuaScript, Result
from gradcam_worker.settings import ONE_SERVER, Settings
from gradcam_worker.text.urls import without_secrets

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


POLL_S = 0.05  # between two tries to get a connection: that one was freed can be missed


class WaitingPool(redis.ConnectionPool):
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
                self._freed.wait(POLL_S)

    def release(self, connection: Any) -> None:
        """Give a connection back, to whoever waits for one."""
        super().release(connection)
        with self._freed:
            self._freed.notify()


class RedisClients:
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
            client = redis.Redis(connection_pool=WaitingPool.from_url(self._url, **self._options))
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
            unchanged = refused or isinstance(error, UNCHANGED) or said.startswith(UNCHANGED_WORDS)
            unchanged = unchanged or UNSENT in getattr(error, "__notes__", ())
            message, again = f"{self._who} {what}.", not (refused or cluster)
            raise self._unavailable(message, retryable=again, changed_nothing=unchanged) from error


class RedisServer:
    """A Redis or Valkey server, not a Redis Cluster, and the scripts that run there."""

    def __init__(self, settings: Settings, *, timeout_s: float = 5, retries: int = 2) -> None:
        """`timeout_s` is how long one answer may take; what fails is asked again, `retries` times."""
        self.prefix = settings.key_prefix
        self._clients = RedisClients(
            settings, settings.ledger, LedgerUnavailable, timeout_s=timeout_s, retries=retries
        )
        self.reaching, self.close = self._clients.reaching, self._clients.close
        self.mode = self._clients.mode
        self._scripts: dict[type, Any] = {}

    @property
    def redis(self) -> redis.Redis:
        """The client of this process."""
        return self._clients.mine()

    def run(self, call: LuaScript[Result]) -> Result:
        """Run a script.

        Args:
            call: The script and its arguments. The prefix of all keys is put in front of these.

        Returns:
            What the script returns.

        Raises:
            LedgerUnavailable: The server cannot be reached, refuses us or is full.
        """
        kind = type(call)
        if kind not in self._scripts:
            self._scripts[kind] = self.redis.register_script(kind.source())
        with self.reaching():
            found: Result = self._scripts[kind](
                keys=call.keys(), args=[self.prefix, *call.arguments()], client=self.redis
            )
        return found
