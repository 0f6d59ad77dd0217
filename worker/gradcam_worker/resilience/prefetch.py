"""Reading a slow source in a thread of its own, a little ahead of its user."""

import queue
import sys
import threading
from collections.abc import Iterable
from typing import Generic, Self, TypeVar

POLL_STOPPED_S = 0.05  # between two checks whether it was stopped
T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Reads while it is entered; never more than `most` items ahead."""

    def __init__(self, source: Iterable[T], most: int = 4) -> None:
        """`source` is read by the thread alone."""
        self.ended = False  # all of it has been taken
        self._source = source
        # At its end, Python closes standard input, and dies where a thread reads it: unless that holds it.
        self._held = sys.stdin
        self._read: queue.Queue[T | BaseException | None] = queue.Queue(most)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(POLL_STOPPED_S * 4)  # one that waits for a stream is left to itself

    def next(self, timeout_s: float) -> T | None:
        """The next item.

        Args:
            timeout_s: how long to wait for it.

        Returns:
            The item; None where none was ready in time, or, with `ended`, none is left.

        Raises:
            BaseException: what reading raised.
        """
        if self.ended:
            return None
        try:
            found = self._read.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        self.ended = found is None
        return found

    def _run(self) -> None:
        try:
            for one in self._source:
                self._put(one)
                if self._stopped.is_set():
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001  # it is raised where somebody hears it
            self._put(error)

    def _put(self, one: T | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                self._read.put(one, timeout=POLL_STOPPED_S)
            except queue.Full:
                continue
            return
