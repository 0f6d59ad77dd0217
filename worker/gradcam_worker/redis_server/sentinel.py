"""Finds the master that Sentinels have chosen, and makes connections that lead to it.

Each connection asks the Sentinels before it connects, and the server what it is after: a former master that
does not know yet that it was replaced is given up. While a connection is used, the Sentinels are asked each
second in the background, because a master that only they cannot reach still answers us, and forgets later
what it accepted.
"""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import redis
from redis.connection import Connection, SSLConnection
from redis.retry import Retry

from gradcam_worker.settings import Settings
from gradcam_worker.text import sentinel_urls

ANSWER_TIMEOUT_S = 0.5  # of one Sentinel: there are others
CHECK_INTERVAL_S = 1.0  # between two questions whether the master is still the same
SKIPPED_S = 5.0  # a Sentinel that did not answer is not asked again for so long, while others answer
HANDSHAKE_TIMEOUT_S = 2.0  # a stopped server accepts connections, too: then the Sentinels are asked again
ACCESS_FIX = "check GRADCAM_SENTINEL_USER and GRADCAM_SENTINEL_PASSWORD"
NAME_FIX = "check the name of the master in the URL"

Address = tuple[str, int]


class MasterNotFound(redis.exceptions.ConnectionError):
    """No Sentinel says where the master is."""


class MasterUnknown(MasterNotFound):
    """The Sentinels answer, and know no master of this name."""


class SentinelRefused(redis.exceptions.AuthenticationError):
    """The Sentinels refuse this client."""


@dataclass
class _Known:
    """What one process knows of a master. Locks are of no use to a child that was forked meanwhile."""

    asking: threading.Lock = field(default_factory=threading.Lock)
    refreshing: threading.Lock = field(default_factory=threading.Lock)
    sentinels: dict[Address, redis.Redis] = field(default_factory=dict)
    skipped_until_s: dict[Address, float] = field(default_factory=dict)
    master: Address | None = None
    asked_s: float = 0.0


class MasterFinder:
    """Asks Sentinels for the address of a master."""

    def __init__(self, settings: Settings, url: str) -> None:
        """Connect to nothing yet.

        Args:
            settings: The user, the password and the TLS settings of the Sentinels are read from it.
            url: A URL that names Sentinels: see `text.sentinel_urls`.
        """
        self._url = sentinel_urls.parse(url)
        self._options: dict[str, Any] = {
            "username": settings.sentinel_user or None,
            "password": settings.sentinel_password.get_secret_value() or None,
            "socket_timeout": ANSWER_TIMEOUT_S,
            "socket_connect_timeout": ANSWER_TIMEOUT_S,
            "retry": Retry(redis.backoff.NoBackoff(), 0),
            "ssl": self._url.tls,
            **settings.redis_tls(url),
        }
        self._by_process: dict[int, _Known] = {}

    @property
    def server_url(self) -> str:
        """A `redis://` or `rediss://` URL with user, password, database, and the host of a Sentinel."""
        return self._url.server_url

    def find(self) -> Address:
        """Ask the Sentinels where the master is. Who asks meanwhile in another thread shares the answer.

        While no Sentinel answers, the last answer holds: the master may be well.

        Raises:
            MasterNotFound: No Sentinel ever answered, or those that do know no such master.
            SentinelRefused: The Sentinels refuse this client.
        """
        known, begun_s = self._known(), time.monotonic()
        with known.asking:
            if known.master is None or known.asked_s < begun_s:
                found = self._ask(known)
                if not (known.master and _lead_to_one_server(known.master, found)):
                    known.master = found
                known.asked_s = time.monotonic()
            return known.master

    async def find_in_thread(self) -> Address:
        """As `find`, for event loops. Nothing waits in the default executor of a loop, which is the app's."""
        future = Future[Address]()
        future.set_running_or_notify_cancel()  # a task that is canceled must not fail the thread

        def find() -> None:
            try:
                future.set_result(self.find())
            except BaseException as error:  # noqa: BLE001  # it is raised in the loop
                future.set_exception(error)

        _start(find)
        return await asyncio.wrap_future(future)

    def has_moved(self, address: Address) -> bool:
        """Whether another server is the master, as far as this process knows. It does not block.

        Called for each use of a connection. If the last answer is older than CHECK_INTERVAL_S, the Sentinels
        are asked again in the background.
        """
        known = self._known()
        if time.monotonic() - known.asked_s > CHECK_INTERVAL_S and known.refreshing.acquire(blocking=False):
            try:
                _start(lambda: self._refresh(known))
            except redis.RedisError:
                known.refreshing.release()
        return known.master not in {None, address}

    def close(self) -> None:
        """Close the connections to the Sentinels."""
        for sentinel in [*self._known().sentinels.values()]:
            sentinel.connection_pool.disconnect(inuse_connections=False)

    def _known(self) -> _Known:
        process_id = os.getpid()
        if process_id not in self._by_process:
            self._by_process.setdefault(process_id, _Known())
        return self._by_process[process_id]

    def _refresh(self, known: _Known) -> None:
        try:
            self.find()
        except redis.RedisError:  # those who connect will report it
            known.asked_s = time.monotonic()
        finally:
            known.refreshing.release()

    def _ask(self, known: _Known) -> Address:
        """The master by the answer with the highest epoch: a Sentinel that is cut off may name an old one."""
        now_s = time.monotonic()
        answering = [one for one in self._url.sentinels if known.skipped_until_s.get(one, 0) <= now_s]
        answers: list[tuple[int, Address]] = []
        errors: list[redis.RedisError] = []
        for group in (answering, [one for one in self._url.sentinels if one not in answering]):
            for sentinel in group if not answers else ():
                try:
                    answers += self._ask_one(known, sentinel)
                except redis.RedisError as error:
                    known.skipped_until_s[sentinel] = time.monotonic() + SKIPPED_S
                    errors.append(error)
        if answers:
            return max(answers)[1]
        refused = next((error for error in errors if isinstance(error, SentinelRefused)), None)
        if refused:
            raise refused
        if len(errors) < len(self._url.sentinels):
            message = f"the Sentinels know no master named {self._url.master!r}: {NAME_FIX}"
            raise MasterUnknown(message)
        if known.master:
            return known.master
        message = f"no Sentinel answers: {'; '.join(dict.fromkeys(map(str, errors)))}"
        raise MasterNotFound(message)

    def _ask_one(self, known: _Known, sentinel: Address) -> list[tuple[int, Address]]:
        """The epoch and the address of the master, in a list; an empty one where the Sentinel knows none."""
        host, port = sentinel
        client = known.sentinels.setdefault(sentinel, redis.Redis(host, port, **self._options))
        try:
            address: Any = client.sentinel_get_master_addr_by_name(self._url.master)
        except (redis.exceptions.AuthenticationError, redis.exceptions.NoPermissionError) as error:
            why = str(error) if self._options["password"] else "no password is set"
            message = f"the Sentinel at {host}:{port} refuses access ({why}): {ACCESS_FIX}"
            raise SentinelRefused(message) from error
        if not address:
            return []
        try:
            state: Any = client.sentinel_master(self._url.master)
        except redis.exceptions.ResponseError:  # not permitted, or just removed
            state = {}
        return [(int(state.get("config-epoch", 0)), (_text(address[0]), int(address[1])))]


class MasterConnection(Connection):
    """A connection to the master. One that leads to a former master is replaced when it is next used."""

    def __init__(self, *, finder: MasterFinder, **options: Any) -> None:
        """`finder` finds the master. The other arguments are those of redis-py; `host` is of no meaning."""
        super().__init__(**options)  # type: ignore[no-untyped-call]  # of redis-py, as below
        self._finder = finder

    def connect(self) -> None:
        """Connect to the master unless this is connected to it. A pool calls this for each use."""
        if self.has_moved:
            self.disconnect()  # type: ignore[no-untyped-call]
        super().connect()  # type: ignore[no-untyped-call]

    @property
    def has_moved(self) -> bool:
        """Whether this is connected to a former master."""
        return bool(self._sock) and self._finder.has_moved((self.host, self.port))

    def _connect(self) -> Any:
        self.host, self.port = self._finder.find()
        return super()._connect()  # type: ignore[no-untyped-call]

    def on_connect_check_health(self, check_health: bool = True) -> None:
        """Log in, and refuse a server that is no master."""
        sock: Any = self._sock
        sock.settimeout(HANDSHAKE_TIMEOUT_S)
        super().on_connect_check_health(check_health)
        self.send_command("HELLO", check_health=False)  # type: ignore[no-untyped-call]
        try:
            reply = self.read_response()
        except redis.exceptions.ResponseError:  # an unknown command, or one that is not permitted
            reply = {}
        require_master(reply, self.host, self.port)
        sock.settimeout(self.socket_timeout)


class MasterTLSConnection(MasterConnection, SSLConnection):
    """The same, encrypted: the certificate must be that of the host that the Sentinels name."""


LEADING_TO_MASTER: dict[type, type] = {Connection: MasterConnection, SSLConnection: MasterTLSConnection}


def finder_for(settings: Settings, url: str) -> MasterFinder | None:
    """Make the finder of a URL's master. Returns None for a URL that names no Sentinels."""
    return MasterFinder(settings, url) if sentinel_urls.is_sentinel_url(url) else None


def lead_to_master(pool: Any, finder: MasterFinder, classes: Mapping[type, type] = LEADING_TO_MASTER) -> None:
    """Make all connections of a new pool, of redis-py, lead to a master.

    Args:
        pool: The pool, without a connection yet.
        finder: Finds the master.
        classes: The class of such a connection for each class of redis-py's.
    """
    pool.connection_class = classes[pool.connection_class]
    pool.connection_kwargs["finder"] = finder


def require_master(reply: Any, host: str, port: int) -> None:
    """Check a server's reply to HELLO. Raises redis.exceptions.ConnectionError for a replica's."""
    fields = reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=True))
    role = next((_text(value) for name, value in fields.items() if _text(name) == "role"), "master")
    if role != "master":
        message = f"{host}:{port} is a {role}, and no other master has been chosen yet"
        raise redis.exceptions.ConnectionError(message)


def _lead_to_one_server(one: Address, other: Address) -> bool:
    """Whether two addresses are of one server: a Sentinel may announce its name, another its address."""
    return one == other or (one[1] == other[1] and bool(_numeric(one[0]) & _numeric(other[0])))


def _numeric(host: str) -> set[str]:
    """The addresses of a host; empty if it is not known."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()


def _start(step: Any) -> None:
    """Run a step in a thread of its own. Raises MasterNotFound if this process can have no more of them."""
    try:
        threading.Thread(target=step, name="gradcam-sentinels", daemon=True).start()
    except RuntimeError as error:
        message = f"the Sentinels cannot be asked: {error}"
        raise MasterNotFound(message) from error


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
