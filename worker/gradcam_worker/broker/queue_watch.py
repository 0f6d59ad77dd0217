"""Waiting for a message without taking it."""

import threading
import time
from collections.abc import Callable, Mapping

import redis
import redis.exceptions

from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

BLOCK_S = 1  # the longest time that one command blocks
RETRY_PAUSE_S = 1.0  # after a failed command
REQUEST_POLL_INTERVAL_S = 1.0
ROOM_POLL_INTERVAL_S = 0.05  # while a queue is at its limit


class QueueWatch:
    """Waits for a message in any of several lists, in one thread for each.

    BLMOVE from the end of a list to the same end changes nothing, and blocks until the list has an item.
    Redis has no command that waits for several lists without taking from one of them.
    """

    def __init__(
        self,
        pool: redis.ConnectionPool,
        lists: Mapping[str, str],
        *,
        has_room: Callable[[str], bool],
        on_message: Callable[[], object],
        on_read_only: Callable[[Exception], object],
    ) -> None:
        """Start the threads. They wait for messages only after `start_waiting`.

        Args:
            pool: Connections for these threads alone; `close` disconnects them.
            lists: The key of each list, with its queue.
            has_room: Whether a message of this queue could be received now.
            on_message: Called, from any thread, when a list has a message, or when the threads end because
                the server does not allow BLMOVE.
            on_read_only: Called when the server takes no writes: it is a replica since a failover.
        """
        self.usable = True
        self._pool, self._redis = pool, redis.Redis(connection_pool=pool)
        self._has_room, self._on_message, self._on_read_only = has_room, on_message, on_read_only
        self._requested = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=[key, queue], name="queue watch", daemon=True)
            for key, queue in lists.items()
        ]
        for thread in self._threads:
            thread.start()

    def start_waiting(self) -> None:
        """Wait in the background until a list has a message, then call `on_message`."""
        self._requested.set()

    def close(self) -> None:
        """Ask the threads to end, and close their connections."""
        self.usable = False
        self._requested.set()
        self._pool.disconnect()

    def join(self, timeout_s: float) -> bool:
        """Wait at most this long for each thread to end. Returns whether all have."""
        for thread in self._threads:
            thread.join(timeout_s)
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, key: str, queue: str) -> None:
        while self._wait_for_request():
            if self._has_room(queue):
                self._wait_for_message(key)
            else:
                time.sleep(ROOM_POLL_INTERVAL_S)
        self._pool.disconnect()  # this thread may have connected while `close` disconnected the others

    def _wait_for_request(self) -> bool:
        """Block until `start_waiting` is called. Returns False when the thread is to end."""
        while self.usable and not self._requested.wait(REQUEST_POLL_INTERVAL_S):
            pass
        return self.usable

    def _wait_for_message(self, key: str) -> None:
        try:
            item = self._redis.blmove(key, key, BLOCK_S, "RIGHT", "RIGHT")
        except redis.exceptions.ReadOnlyError as error:  # nothing else would notice the failover
            if self.usable:
                self._on_read_only(error)
            time.sleep(RETRY_PAUSE_S)
        except BaseException as error:  # noqa: BLE001  # the event loop's own connection reports an outage
            if "unknown command" in str(error) or isinstance(error, redis.exceptions.NoPermissionError):
                self._disable(error)
            else:
                time.sleep(RETRY_PAUSE_S)
        else:
            if item is not None:
                self._requested.clear()
                self._on_message()

    def _disable(self, error: BaseException) -> None:
        if self.usable:
            log.warning(
                "queue_watch_disabled",
                reason="BLMOVE is not available, so a process that is killed may lose a message",
                error=error,
            )
        self.usable = False
        self._on_message()
