"""Subscriptions to changes of jobs, by Redis publish/subscribe: one connection for any number of jobs.

A notification only reports that a job has changed: the new document is in the ledger. One thread may use it.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import redis

from gradcam_worker.errors import LedgerUnavailable

PING_INTERVAL_S = 5.0  # also the time within which the server must answer


class RedisJobUpdates:
    """The channels `<prefix>changed:<job id>` of one server: see `JobUpdates`."""

    def __init__(self, server: redis.Redis, prefix: str) -> None:
        """Connect to nothing before the first subscription."""
        self._pool, self._channel = server.connection_pool, f"{prefix}changed:"
        self._connection: Any = None  # redis-py leaves half of it untyped
        self._next_ping_s = 0.0
        self._awaits_pong = False

    def subscribe(self, begun: Iterable[str], ended: Iterable[str]) -> None:
        """See `JobUpdates.subscribe`. `poll` reports when each subscription has begun."""
        with self._translate_errors():
            for command, ids in (("SUBSCRIBE", begun), ("UNSUBSCRIBE", ended)):
                channels = [f"{self._channel}{job_id}" for job_id in ids]
                if channels:
                    self._connect().send_command(command, *channels, check_health=False)

    def poll(self) -> tuple[set[str], set[str]]:
        """See `JobUpdates.poll`."""
        job_ids: dict[str, set[str]] = {"subscribe": set(), "message": set()}
        with self._translate_errors():
            while self._connection and self._connection.can_read(0):
                response = self._connection.read_response(push_request=True)
                self._awaits_pong = False
                if isinstance(response, list) and response[0] in job_ids:
                    job_ids[response[0]].add(response[1].removeprefix(self._channel))
            self._ping_if_due()
        return job_ids["subscribe"], job_ids["message"]

    def fileno(self) -> int | None:
        """See `JobUpdates.fileno`."""
        sock = self._connection and self._connection._sock  # noqa: SLF001  # redis-py has no public attribute
        return sock.fileno() if sock else None

    def close(self) -> None:
        """See `JobUpdates.close`."""
        connection, self._connection = self._connection, None
        if connection:
            connection.disconnect()
            self._pool.release(connection)

    def abandon(self) -> None:
        """See `JobUpdates.abandon`. The pool is not used: a lock of the parent may be held there for ever."""
        if self._connection:
            self._connection.disconnect()

    def _connect(self) -> Any:
        if not self._connection:
            self._connection = self._pool.get_connection()
            self._awaits_pong, self._next_ping_s = False, time.monotonic() + PING_INTERVAL_S
        return self._connection

    def _ping_if_due(self) -> None:
        """Detect a connection that was cut silently: it looks like one without notifications."""
        if not self._connection or time.monotonic() < self._next_ping_s:
            return
        if getattr(self._connection, "has_moved", False):
            message = "another server is the master now"
            raise redis.exceptions.ConnectionError(message)
        if self._awaits_pong:
            message = f"no answer for {PING_INTERVAL_S:g} s"
            raise redis.exceptions.TimeoutError(message)
        self._awaits_pong, self._next_ping_s = True, time.monotonic() + PING_INTERVAL_S
        self._connection.send_command("PING", check_health=False)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, OSError) as error:
            self.close()
            message = f"The ledger sends no notifications of changes ({error})."
            raise LedgerUnavailable(message) from error
