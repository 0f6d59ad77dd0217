"""Reads a slow source in a thread, a few items ahead of its user."""

import queue
import sys
import threading
from collections.abc import Iterable
from typing import Generic, Self, TypeVar

STOP_POLL_INTERVAL_S = 0.05  # between two checks whether the thread is to stop
T = TypeVar("T")


class Prefetcher(Generic[T]):
    """A context manager that reads a source while it is entered."""

    def __init__(self, source: Iterable[T], max_ahead: int = 4) -> None:
        """Reading starts when the context is entered.

        Args:
            source: read by the thread alone.
            max_ahead: the most items that are read and not taken.
        """
        self.ended = False  # all items have been taken
        self._source = source
        # At exit Python closes standard input, and crashes where a thread reads it, unless it is referenced.
        self._stdin = sys.stdin
        self._items: queue.Queue[T | BaseException | None] = queue.Queue(max_ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(STOP_POLL_INTERVAL_S * 4)  # a thread that is blocked in a read is left behind

    def next(self, timeout_s: float) -> T | None:
        """Return the next item.

        Args:
            timeout_s: how long to wait for it.

        Returns:
            The item; None where none was ready in time or, when `ended` is true, none is left.

        Raises:
            BaseException: the error of the source.
        """
        if self.ended:
            return None
        try:
            item = self._items.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        self.ended = item is None
        return item

    def _run(self) -> None:
        try:
            for item in self._source:
                self._put(item)
                if self._stopped.is_set():
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001  # `next` raises it
            self._put(error)

    def _put(self, item: T | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                self._items.put(item, timeout=STOP_POLL_INTERVAL_S)
            except queue.Full:
                continue
            return
