"""Connections to a Redis or Valkey server from event loops: one client for each loop, errors as in `client`.

Nothing waits in the default executor of a loop, which is the app's: asyncio looks names up there.
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from contextvars import ContextVar
from copy import copy
from ipaddress import ip_address
from threading import Thread
from typing import Any

import redis
import redis.asyncio as redis_asyncio
from redis.asyncio.connection import Connection, SSLConnection
from redis.asyncio.retry import Retry

from gradcam_worker.redis_server import sentinel
from gradcam_worker.redis_server.client import BACKOFF, UNSENT, RedisClients, RedisServer, exhausted
from gradcam_worker.resilience.blocking import blocking

MAX_CONNECTIONS = 32  # of one event loop: more would not be faster, and opening each costs a millisecond
PATIENCE = 1.5  # a task waits for a connection for longer than one may take to open, and shares its failure
FAILURE_SHARED_S = 0.1  # less than any caller pauses before it tries again
POOL_EXHAUSTED = "No connection available."  # redis-py's message when its blocking pool is exhausted


class Addresses:
    """Looks names up, each in a thread of its own; who asks meanwhile for the same name shares the answer."""

    def __init__(self) -> None:
        """No thread is started yet."""
        self._running: dict[tuple[int, str, int], Future[list[str] | OSError]] = {}  # by process, host, port

    async def find(self, host: str, port: int) -> list[str]:
        """Find the addresses of a host, in the order in which to try them. Raises OSError."""
        with suppress(ValueError):
            return [str(ip_address(host))]
        future, key = Future[list[str] | OSError](), (os.getpid(), host, port)
        running = self._running.setdefault(key, future)
        if running is future:
            thread = Thread(target=self._look_up, args=(key, future), name="gradcam-resolver", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # this process can have no more of them just now
                self._answer(key, future, OSError(str(error)))
        found = await asyncio.shield(asyncio.wrap_future(running))
        if isinstance(found, OSError):
            raise copy(found)  # others raise it, too
        return found

    def _look_up(self, key: tuple[int, str, int], future: "Future[list[str] | OSError]") -> None:
        found: list[str] | OSError
        try:
            infos = socket.getaddrinfo(*key[1:], type=socket.SOCK_STREAM)
            found = [*dict.fromkeys(str(address[0]) for *_, address in infos)]
        except (OSError, UnicodeError) as error:
            found = error if isinstance(error, OSError) else OSError(str(error))
        self._answer(key, future, found)

    def _answer(
        self, key: tuple[int, str, int], future: "Future[list[str] | OSError]", found: list[str] | OSError
    ) -> None:
        self._running.pop(key, None)
        future.set_result(found)


class ResolvedConnection(Connection):
    """A connection to the first address of a host that accepts it."""

    def __init__(self, *, addresses: Addresses, **options: Any) -> None:
        """`addresses` finds those of `host`. The other arguments are those of redis-py."""
        super().__init__(**options)
        self._addresses, self._address = addresses, ""

    async def _connect(self) -> None:
        failure: OSError | None = None
        async with asyncio.timeout(self.socket_connect_timeout):
            for address in await self._addresses.find(self.host, self.port):
                self._address = address
                try:
                    await super()._connect()  # type: ignore[no-untyped-call]  # of redis-py
                except OSError as error:  # the next one may accept
                    failure = error
                else:
                    return
        raise failure or OSError(f"{self.host} has no address")

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send a command. Redis-py's own `asyncio.wait_for` can lose a cancellation before Python 3.12."""
        seconds, self.socket_timeout = self.socket_timeout, None
        try:
            async with asyncio.timeout(seconds):
                await super().send_packed_command(command, check_health)
        except TimeoutError:
            message = "Timeout writing to socket"
            raise redis.exceptions.TimeoutError(message) from None
        finally:
            self.socket_timeout = seconds

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "host": self._address}


class ResolvedTLSConnection(ResolvedConnection, SSLConnection):
    """The same, encrypted: the certificate must be that of the name, not of the address."""

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "server_hostname": self.host}


class AsyncMasterConnection(ResolvedConnection):
    """A connection to the master that Sentinels have chosen: see `sentinel.MasterConnection`."""

    def __init__(self, *, finder: sentinel.MasterFinder, **options: Any) -> None:
        """`finder` finds the master. The other arguments are those of `ResolvedConnection`."""
        super().__init__(**options)
        self._finder = finder

    @property
    def has_moved(self) -> bool:
        """Whether this is connected to a former master."""
        return self.is_connected and self._finder.has_moved((self.host, self.port))

    async def _connect(self) -> None:
        self.host, self.port = await self._finder.find_in_thread()
        await super()._connect()

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in, and refuse a server that is no master."""
        seconds, self.socket_timeout = self.socket_timeout, sentinel.HANDSHAKE_TIMEOUT_S
        try:
            await super().on_connect_check_health(check_health)
            await self.send_command("HELLO", check_health=False)
            try:
                reply = await self.read_response()
            except redis.exceptions.ResponseError:  # an unknown command, or one that is not permitted
                reply = {}
        finally:
            self.socket_timeout = seconds
        sentinel.require_master(reply, self.host, self.port)


class AsyncMasterTLSConnection(AsyncMasterConnection, ResolvedTLSConnection):
    """The same, encrypted."""


RESOLVED: dict[type, type] = {Connection: ResolvedConnection, SSLConnection: ResolvedTLSConnection}
LEADING_TO_MASTER: dict[type, type] = {
    ResolvedConnection: AsyncMasterConnection,
    ResolvedTLSConnection: AsyncMasterTLSConnection,
}


# The latest failure of the pool when a task asked it for a connection.
_latest: ContextVar[redis.RedisError] = ContextVar("gradcam_latest_failure")


class AsyncWaitingPool(redis_asyncio.BlockingConnectionPool):
    """The connections of one event loop. A task that finds all of them in use waits for one.

    They are opened one after the other. All who wait while an attempt fails share its failure, and so do
    those who ask soon after: were each to try for itself, a server that is away would cost the event loop
    hundreds of attempts.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """See `redis.asyncio.BlockingConnectionPool`."""
        super().__init__(*args, **options)
        self._opening = asyncio.Lock()
        self._failure, self._failure_ends_s = redis.RedisError(), 0.0

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        """Take a connection, connected. Errors have the note UNSENT."""
        _latest.set(self._failure)
        try:
            return await super().get_connection(*args, **options)  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            if str(error) == POOL_EXHAUSTED:
                raise exhausted(self.max_connections, self.timeout or 0) from None
            error.add_note(UNSENT)
            raise

    async def ensure_connection(self, connection: Any) -> None:
        """Connect. Raises the failure of an attempt that has ended meanwhile, or just before."""
        if getattr(connection, "has_moved", False):
            await connection.disconnect()
        if connection.is_connected:
            await super().ensure_connection(connection)
            return
        async with self._opening:
            if self._failure is not _latest.get() or time.monotonic() < self._failure_ends_s:
                raise copy(self._failure)
            try:
                await super().ensure_connection(connection)
            except redis.RedisError as error:
                self._failure, self._failure_ends_s = copy(error), time.monotonic() + FAILURE_SHARED_S
                raise


class AsyncRedisClients(RedisClients):
    """The clients of one server, one for each event loop. Its coroutines do not block; all else does."""

    _addresses = Addresses()

    def __init__(self, *args: Any, **options: Any) -> None:
        """See `RedisClients`."""
        super().__init__(*args, **options)
        self._by_loop: dict[asyncio.AbstractEventLoop, redis_asyncio.Redis] = {}
        self._closing: dict[asyncio.AbstractEventLoop, AsyncGenerator[None, None]] = {}

    async def _find_client(self) -> redis_asyncio.Redis:
        """The client of the running event loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._by_loop:
            for other in [*self._by_loop]:
                if other.is_closed():  # without `shutdown_asyncgens`
                    self._forget(other)
            retry = Retry(BACKOFF, self._retries)
            options = {
                **self._options,
                "max_connections": MAX_CONNECTIONS,
                "timeout": PATIENCE * self._wait_s,
            }
            pool = AsyncWaitingPool.from_url(self._url, **options, retry=retry)
            if resolved := RESOLVED.get(pool.connection_class):
                pool.connection_class = resolved
                pool.connection_kwargs["addresses"] = self._addresses
            if self._finder:
                sentinel.lead_to_master(pool, self._finder, LEADING_TO_MASTER)
            self._by_loop[loop] = redis_asyncio.Redis.from_pool(pool)
            self._closing[loop] = self._close_with(loop)
            await anext(self._closing[loop])
        return self._by_loop[loop]

    async def _close_with(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None, None]:
        """Close the client of a loop at its end: asyncio closes all generators that wait then."""
        try:
            yield
        finally:
            await self._forget(loop).aclose()

    def _forget(self, loop: asyncio.AbstractEventLoop) -> redis_asyncio.Redis:
        self._closing.pop(loop, None)
        return self._by_loop.pop(loop)

    @blocking
    async def close(self) -> None:
        """Close all connections of the running event loop except those that wait for an answer."""
        if client := self._by_loop.get(asyncio.get_running_loop()):
            await client.connection_pool.disconnect(inuse_connections=False)
        if self._finder:
            self._finder.close()


class AsyncRedisServer(RedisServer):
    """A `RedisServer` for asyncio: `ask` and `ask_each` do not block. All other methods do."""

    _connect = AsyncRedisClients
    _clients: AsyncRedisClients
