"""Connections to a Redis or Valkey server: one client for each process, errors of ours, calls of scripts."""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import isawaitable
from typing import Any, cast

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.redis_server import sentinel
from gradcam_worker.redis_server.script import LuaScript, Result
from gradcam_worker.resilience.blocking import blocking, run_blocking
from gradcam_worker.resilience.outages import Outage
from gradcam_worker.settings import ONE_SERVER, Settings
from gradcam_worker.text.urls import without_secrets

MAX_CONNECTIONS = 256  # of one process: each thread needs one while it waits for an answer
RELEASE_POLL_S = 0.05  # while waiting for a connection: the notification that one was released can be missed
REPLICATED_S = 1.0  # within which replicas must have what was written
Command = Sequence[str | int]  # its name and its arguments
POOL_EXHAUSTED = "Too many connections"  # redis-py's message when its pool is exhausted
BACKOFF = ExponentialBackoff(cap=0.5, base=0.05)  # of a command that redis-py retries
UNSENT = "no command was sent"  # a note on errors of redis-py that were raised before a command was sent

# The server will refuse this client again: retrying is of no use.
ACCESS_ERRORS = (
    redis.exceptions.AuthenticationError,
    redis.exceptions.AuthenticationWrongNumberOfArgsError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.NoPermissionError,
)
REFUSED_PREFIXES = ("DB index", "DENIED")  # of such errors that have no class of their own
UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"  # another try finds the same certificate

# The command changed nothing: a server that answers so refuses the first write of a script.
UNCHANGED_ERRORS = (
    redis.exceptions.BusyLoadingError,
    redis.exceptions.MasterDownError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.ReadOnlyError,
)
UNCHANGED_PREFIXES = ("NOREPLICAS", "MISCONF", "BUSY ")

NO_DISK = "MISCONF"
REFUSALS: tuple[tuple[type[redis.RedisError], str, str], ...] = (  # class, beginning of the text, meaning
    (redis.exceptions.ReadOnlyError, "", "is a replica, which takes no writes"),
    (redis.exceptions.BusyLoadingError, "", "is still loading what it holds"),
    # Then it does not even answer a ping.
    (redis.RedisError, NO_DISK, "cannot write to its disk, and refuses all writes until it can"),
    (redis.RedisError, "NOREPLICAS", "refuses writes, since too few replicas have followed it lately"),
)

# Only a node of a Redis Cluster answers so: the key is in another slot, or the keys are in several.
CLUSTER_ERRORS = (redis.exceptions.ClusterError, redis.exceptions.MovedError, redis.exceptions.AskError)
CLUSTER_TEXTS = ("CROSSSLOT", "non local key", "do not hash to the same slot")
NO_CLUSTER = "is part of a Redis Cluster, which is not supported"


def exhausted(connections: int, waited_s: float) -> redis.exceptions.ConnectionError:
    """The error of a caller that has waited in vain for one of a pool's connections."""
    message = f"all {connections} connections of this process were in use for {waited_s:g} s"
    error = redis.exceptions.ConnectionError(message)
    error.add_note(UNSENT)
    return error


class WaitingPool(redis.ConnectionPool):
    """The connections of one process. A thread that finds all of them in use waits for one to be released."""

    def __init__(self, *args: Any, wait_s: float, **options: Any) -> None:
        """`wait_s`: how long a thread waits. The other arguments are those of `redis.ConnectionPool`."""
        self._wait_s, self._released = wait_s, threading.Condition()
        super().__init__(*args, **options)

    def get_connection(self, *args: Any, **options: Any) -> Any:
        """Take a connection, connected. Errors have the note UNSENT."""
        end = time.monotonic() + self._wait_s
        while True:
            try:
                return super().get_connection(*args, **options)
            except redis.RedisError as error:
                error.add_note(UNSENT)
                if str(error) != POOL_EXHAUSTED:
                    raise
            if time.monotonic() >= end:
                raise exhausted(self.max_connections, self._wait_s)
            with self._released:
                self._released.wait(RELEASE_POLL_S)

    def release(self, connection: Any) -> None:
        """Put a connection back and wake a thread that waits for one."""
        super().release(connection)
        with self._released:
            self._released.notify()


class RedisClients:
    """The clients of one server, one for each process that was forked since.

    Redis-py intends its client to survive a fork, but the child then waits for ever for a lock that another
    thread of the parent held at that moment.
    """

    def __init__(
        self,
        settings: Settings,
        url: str,
        unavailable: type[BrokerUnavailable | LedgerUnavailable],
        *,
        timeout_s: float,
        retries: int,
        outage: Outage | None = None,
    ) -> None:
        """Connect to nothing yet.

        A server that accepts connections and never answers is waited for up to (`retries` + 1)² * `timeout_s`
        seconds: redis-py retries to connect each time that it retries a command.

        Args:
            settings: The TLS settings are read from it.
            url: The server's URL.
            unavailable: The error that is raised when the server cannot be used.
            timeout_s: The maximum time for one answer.
            retries: How often redis-py retries a command that failed.
            outage: Is told how each call of `ask` and `ask_each` ends; None: the caller reports outages.
        """
        self._finder = sentinel.finder_for(settings, url)
        self._url, self._unavailable = self._finder.server_url if self._finder else url, unavailable
        self._outage = outage
        name = "ledger" if unavailable is LedgerUnavailable else "broker"
        self._server = f"The {name} at {without_secrets(url)}"
        self._wait_s = timeout_s  # for a connection
        self._options: dict[str, Any] = {
            **settings.redis_tls(url),
            "decode_responses": True,
            "max_connections": MAX_CONNECTIONS,
            "socket_timeout": timeout_s,
            "socket_connect_timeout": min(timeout_s, 3),
            "socket_keepalive": True,
            "health_check_interval": 15,
            # After a failover the former primary refuses writes: redis-py reconnects before each retry.
            "retry_on_error": [redis.exceptions.ReadOnlyError],
        }
        self._retries = retries
        self._clients: dict[int, redis.Redis] = {}  # by process id; threads share one
        self._scripts: dict[type, Any] = {}

    def get_client(self) -> redis.Redis:
        """Get the client of the current process."""
        process_id = os.getpid()
        if process_id not in self._clients:
            for inherited in [*self._clients.values()]:
                inherited.auto_close_connection_pool = False  # closing would wait for the parent's lock
            retry = Retry(BACKOFF, self._retries)
            pool = WaitingPool.from_url(self._url, **self._options, retry=retry, wait_s=self._wait_s)
            if self._finder:
                sentinel.lead_to_master(pool, self._finder)
            client = redis.Redis(connection_pool=pool)
            client.auto_close_connection_pool = True
            self._clients.setdefault(process_id, client)
        return self._clients[process_id]

    async def ask_each(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands in one round trip. It blocks, unless these are `AsyncRedisClients`.

        Args:
            commands: Each is its name and its arguments.

        Returns:
            The reply to each.

        Raises:
            BrokerUnavailable, LedgerUnavailable: See `translate_errors`.
        """
        client = await self._find_client()
        with self._reporting(), self.translate_errors():
            pipeline = client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = await _received(pipeline.execute())
        return replies

    async def ask(self, script: LuaScript[Result], prefix: str) -> Result:
        """Run a script. It blocks, unless these are `AsyncRedisClients`.

        Args:
            script: The script and its arguments.
            prefix: The prefix of all keys, which is put in front of the arguments.

        Returns:
            What the script returns.

        Raises:
            BrokerUnavailable, LedgerUnavailable: See `translate_errors`.
        """
        client = await self._find_client()
        with self._reporting(), self.translate_errors():
            result: Result = await _received(self._call(client, script, prefix))
        return result

    async def ask_replicated(self, script: LuaScript[Result], prefix: str, replicas: int) -> Result:
        """Run a script, and wait until what it has written is in the memory of some replicas.

        Of a script that writes nothing Redis waits for what the connection wrote before.

        Args:
            script: The script and its arguments.
            prefix: The prefix of all keys, which is put in front of the arguments.
            replicas: How many replicas.

        Returns:
            What the script returns.

        Raises:
            BrokerUnavailable, LedgerUnavailable: See `translate_errors`; or too few replicas answered within
                REPLICATED_S. The script may then have changed something nevertheless.
        """
        client = await self._find_client()
        keys, sha = script.keys(), client.register_script(script.source).sha
        with self._reporting():
            with self.translate_errors():
                for last in (False, True):
                    pipeline = client.pipeline(transaction=False)
                    pipeline.execute_command("EVALSHA", sha, len(keys), *keys, prefix, *script.arguments())
                    pipeline.execute_command("WAIT", replicas, int(REPLICATED_S * 1000))
                    result, count = await _received(pipeline.execute(raise_on_error=False))
                    if last or not isinstance(result, redis.exceptions.NoScriptError):
                        break
                    await _received(client.script_load(script.source))
                for reply in (result, count):
                    if isinstance(reply, Exception):
                        raise reply
            if count < replicas:
                message = (
                    f"{self._server} has {count} replicas that follow, and GRADCAM_SUBMIT_REPLICAS requires "
                    f"{replicas}: nothing is accepted before they do. What was sent may run nevertheless."
                )
                raise self._unavailable(message, retryable=True, changed_nothing=False)
        return cast("Result", result)

    def _call(self, client: Any, script: LuaScript[Any], prefix: str) -> Any:
        script_class = type(script)
        if script_class not in self._scripts:
            self._scripts[script_class] = client.register_script(script_class.source)
        arguments = [prefix, *script.arguments()]
        return self._scripts[script_class](keys=script.keys(), args=arguments, client=client)

    async def _find_client(self) -> Any:
        """The client of `ask` and `ask_each`."""
        return self.get_client()

    @blocking
    async def close(self) -> None:
        """Close all connections except those on which a thread waits for an answer."""
        self.get_client().connection_pool.disconnect(inuse_connections=False)
        if self._finder:
            self._finder.close()

    def read_info(self) -> Mapping[str, Any]:
        """Read the server's INFO.

        Returns:
            Its fields; empty if the user has no permission to read it, or the server has no such command.

        Raises:
            BrokerUnavailable, LedgerUnavailable: See `translate_errors`.
        """
        with self.translate_errors():
            try:
                info: Any = self.get_client().info()
            except redis.exceptions.NoPermissionError:
                return {}
            except redis.exceptions.ResponseError as error:
                if not str(error).startswith("unknown command"):
                    raise
                return {}
        return info  # type: ignore[no-any-return]  # redis-py's types do not say

    def read_mode(self) -> str:
        """Read the server's mode.

        Returns:
            standalone, cluster or sentinel; empty if the server does not report it.

        Raises:
            BrokerUnavailable, LedgerUnavailable: See `translate_errors`.
        """
        with self.translate_errors():
            try:
                client: Any = self.get_client()
                reply = client.execute_command("HELLO")
            except redis.exceptions.ResponseError:  # an unknown command, or one that is not permitted
                return ""
        fields = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))
        return str(fields.get("mode", ""))

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Tell the outage, if there is one, how the block ends."""
        try:
            yield
        except (BrokerUnavailable, LedgerUnavailable) as error:
            if self._outage:
                self._outage.failed(str(error))
            raise
        if self._outage:
            self._outage.answered()

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Raise BrokerUnavailable or LedgerUnavailable for errors of redis-py within the block."""
        try:
            yield
        except redis.RedisError as error:
            raise self.translate(error) from error

    def translate(self, error: redis.RedisError) -> BrokerUnavailable | LedgerUnavailable:
        """Make the error of ours for an error of redis-py.

        Args:
            error: What redis-py raised.

        Returns:
            BrokerUnavailable or LedgerUnavailable: whether to retry, and whether the server may have changed
            something.
        """
        text = str(error)
        refused = isinstance(error, ACCESS_ERRORS) or text.startswith(REFUSED_PREFIXES)
        cluster = isinstance(error, CLUSTER_ERRORS) or any(part in text for part in CLUSTER_TEXTS)
        problem = f"cannot be reached ({text})"
        if isinstance(error, sentinel.SentinelRefused):
            pass  # its text says what to check
        elif isinstance(error, redis.exceptions.OutOfMemoryError):
            problem = "is full: it accepts no writes until memory is freed or maxmemory is raised"
        elif meanings := [
            meaning for kind, start, meaning in REFUSALS if isinstance(error, kind) and text.startswith(start)
        ]:
            problem = f"{meanings[0]} ({text})"
        elif refused:
            problem = f"refuses access ({text}): check the user, the password and the database of its URL"
        elif cluster:
            problem = f"{NO_CLUSTER} ({text}): {ONE_SERVER}"
        unchanged = refused or isinstance(error, UNCHANGED_ERRORS) or text.startswith(UNCHANGED_PREFIXES)
        unchanged = unchanged or UNSENT in getattr(error, "__notes__", ())
        hopeless = refused or cluster or UNTRUSTED in text
        return self._unavailable(
            f"{self._server} {problem}.", retryable=not hopeless, changed_nothing=unchanged
        )


async def _received(reply: Any) -> Any:
    """The reply of redis-py: from redis.asyncio it is still to be awaited."""
    return await reply if isawaitable(reply) else reply


class RedisServer:
    """A Redis or Valkey server, or the master of Sentinels, and the scripts that run there."""

    def __init__(
        self, settings: Settings, *, timeout_s: float = 5, retries: int = 2, outage: Outage | None = None
    ) -> None:
        """Connect to nothing yet.

        Args:
            settings: `ledger`, `key_prefix` and the TLS settings are read from it.
            timeout_s: The maximum time for one answer.
            retries: How often a command that failed is retried.
            outage: See `RedisClients`.
        """
        self.prefix, self.replicas = settings.key_prefix, settings.submit_replicas
        self._clients = self._connect(
            settings, settings.ledger, LedgerUnavailable, timeout_s=timeout_s, retries=retries, outage=outage
        )
        self.translate_errors, self.close = self._clients.translate_errors, self._clients.close
        self.read_mode, self.ask_each = self._clients.read_mode, self._clients.ask_each

    _connect = RedisClients

    @property
    def redis(self) -> redis.Redis:
        """The client of the current process."""
        return self._clients.get_client()

    async def ask(self, script: LuaScript[Result]) -> Result:
        """Run a script. It blocks, unless the server is an `AsyncRedisServer`.

        Args:
            script: The script and its arguments. The prefix of all keys is put in front of these.

        Returns:
            What the script returns.

        Raises:
            LedgerUnavailable: The server cannot be reached, refuses access or is full.
        """
        return await self._clients.ask(script, self.prefix)

    async def ask_replicated(self, script: LuaScript[Result]) -> Result:
        """As `ask`, and wait until GRADCAM_SUBMIT_REPLICAS replicas have what the script has written."""
        if not self.replicas:
            return await self.ask(script)
        return await self._clients.ask_replicated(script, self.prefix, self.replicas)

    def run(self, script: LuaScript[Result]) -> Result:
        """Run a script: see `ask`."""
        return run_blocking(self.ask(script))
