"""Since when a server has been needed and has not answered: from its requests, not from jobs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class ServerActivity:
    """The requests of one kind to one server, from all threads of a process."""

    def __init__(self, is_answer: Callable[[BaseException], bool] = lambda _: False) -> None:
        """No request has been sent.

        Args:
            is_answer: Whether an error is the server's answer about what was asked for, as that an object is
                missing: then the server works.
        """
        self._is_answer = is_answer
        self._lock = threading.Lock()
        self._running = 0  # requests
        self._since_s: float | None = None  # since when there was no answer; None: none is missing
        self._failed = False  # whether a request has failed since then

    @property
    def silent_s(self) -> float:
        """Seconds without an answer since the last one, while one was needed; 0: none is missing."""
        since_s = self._since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    @property
    def has_failed(self) -> bool:
        """Whether a request has failed since the last answer."""
        return self._failed

    @contextmanager
    def request(self) -> Iterator[None]:
        """Send a request within the block. It is answered where the block ends, or raises such an answer."""
        with self._lock:
            self._running += 1
            if self._since_s is None:
                self._since_s = time.monotonic()
        answered = False
        try:
            yield
            answered = True
        except BaseException as error:
            answered = self._is_answer(error)
            self._failed = self._failed or not answered
            raise
        finally:
            with self._lock:
                self._running -= 1
            if answered:
                self.answered()

    def answered(self) -> None:
        """Report that the server answered, or sent a part of an answer."""
        with self._lock:
            self._since_s = time.monotonic() if self._running else None
            self._failed = False
