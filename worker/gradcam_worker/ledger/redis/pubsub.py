"""Being told that a job has changed: one connection of Redis's publish and subscribe, for any number of jobs.

Only one thread may use it. It says that something has changed, and never what: that stands in the ledger.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import redis

from gradcam_worker.errors import LedgerUnavailable

CHECK_S = 5.0  # between two questions whether anybody is at the other end


class RedisJobUpdates:
    """The channels `<prefix>changed:<job id>` of one server. Raises LedgerUnavailable, and is closed then."""

    def __init__(self, server: redis.Redis, prefix: str) -> None:
        """Nothing is connected before the first subscription."""
        self._pool, self._channel = server.connection_pool, f"{prefix}changed:"
        self._connection: Any = None  # redis-py leaves half of it untyped
        self._check_at = 0.0
        self._asked = False  # and nothing was heard since

    def subscribe(self, begun: Iterable[str], ended: Iterable[str]) -> None:
        """Hear of these jobs from now on (see `heard` for when), and of those no more."""
        with self._reaching():
            for command, ids in (("SUBSCRIBE", begun), ("UNSUBSCRIBE", ended)):
                channels = [f"{self._channel}{job_id}" for job_id in ids]
                if channels:
                    self._connected().send_command(command, *channels, check_health=False)

    def poll(self) -> tuple[set[str], set[str]]:
        """What has come in since the last time: jobs whose subscription has begun, and jobs that changed."""
        found: dict[str, set[str]] = {"subscribe": set(), "message": set()}
        with self._reaching():
            while self._connection and self._connection.can_read(0):
                said = self._connection.read_response(push_request=True)
                self._asked = False
                if isinstance(said, list) and said[0] in found:
                    found[said[0]].add(said[1].removeprefix(self._channel))
            self._check()
        return found["subscribe"], found["message"]

    def fileno(self) -> int | None:
        """What to wait on for something to be heard; None without a connection."""
        sock = self._connection and self._connection._sock  # noqa: SLF001  # there is no public way
        return sock.fileno() if sock else None

    def close(self) -> None:
        """Hear nothing more. It can be used again: with no subscriptions."""
        connection, self._connection = self._connection, None
        if connection:
            connection.disconnect()
            self._pool.release(connection)

    def abandon(self) -> None:
        """Leave the connection to the parent of a forked process, and its pool, perhaps locked for ever."""
        if self._connection:
            self._connection.disconnect()

    def _connected(self) -> Any:
        if not self._connection:
            self._connection = self._pool.get_connection()
            self._asked, self._check_at = False, time.monotonic() + CHECK_S
        return self._connection

    def _check(self) -> None:
        """A connection that was cut without a word looks like one with nothing to say: ask."""
        if not self._connection or time.monotonic() < self._check_at:
            return
        if self._asked:
            message = f"no answer for {CHECK_S:g} s"
            raise redis.exceptions.TimeoutError(message)
        self._asked, self._check_at = True, time.monotonic() + CHECK_S
        self._connection.send_command("PING", check_health=False)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            self.close()
            message = f"The ledger does not tell of changes ({error})."
            raise LedgerUnavailable(message) from error
