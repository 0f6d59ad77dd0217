"""Something slow, read in a thread of its own, a little ahead, so that it keeps nobody waiting."""

import queue
import sys
import threading
from collections.abc import Iterable
from typing import Generic, Self, TypeVar

LOOK_S = 0.05  # between two looks whether anybody still wants it
T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Reads while it is entered; never more than `most` that nobody has taken."""

    def __init__(self, source: Iterable[T], most: int = 4) -> None:
        """`source` is read by the thread alone."""
        self.ended = False  # all of it has been taken
        self._source = source
        # At its end, Python closes standard input, and dies where a thread reads it: unless that holds it.
        self._held = sys.stdin
        self._read: queue.Queue[T | BaseException | None] = queue.Queue(most)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(LOOK_S * 4)  # one that waits for a stream is left to itself

    def next(self, patience_s: float) -> T | None:
        """The next; None where none is ready within so long, or, with `ended`, will ever be.

        Raises what reading raised.
        """
        if self.ended:
            return None
        try:
            found = self._read.get(timeout=patience_s)
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        self.ended = found is None
        return found

    def _keep(self) -> None:
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
                self._read.put(one, timeout=LOOK_S)
            except queue.Full:
                continue
            return
