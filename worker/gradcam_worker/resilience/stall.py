"""Whether a process still gets on with its work: takes what waits, and brings to an end what it took."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradcam_worker.errors import GradcamError
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.text.visible import counted

UNREADY_S = 15.0  # without anything taken, though something waits: no server is so slow for so long
IDLE_S = 45.0  # of it: the process is started again
ASK_EVERY_S = 5.0  # between two questions whether anything waits; who is busy asks nothing
AWAY_S = 1800.0  # that a broker may be away, and answer others: then a new process tries it
HELD_S = 10.0  # that a message may be unacknowledged without anybody at work on it


class Stall:
    """Notices that nothing moves though there is work. A move: a job is taken, reaches a stage, or ends."""

    def __init__(self, waiting: Callable[[], bool], hung_after_s: float) -> None:
        """`waiting` says whether any message waits in a queue; it may raise a GradcamError.

        `hung_after_s`: how long jobs that run may go without a move while others wait.
        """
        self._waiting, self._hung_after_s = waiting, hung_after_s
        self._door = threading.Lock()
        self._in_hand = 0  # jobs
        self._moved_s = self._asked_s = time.monotonic()
        self._since_s: float | None = None  # from when on something waited at every look, and nothing moved
        self._away_s: float | None = None  # from when on the broker could not be used
        self._orphaned_s: float | None = None  # from when on a message was held by nobody
        self.loop = BackgroundLoop("stall", self.look, ASK_EVERY_S / 2)

    @contextmanager
    def in_hand(self) -> Iterator[None]:
        """Within it, a job is run."""
        with self._door:
            self._in_hand += 1
        self.moved()
        try:
            yield
        finally:
            with self._door:
                self._in_hand -= 1
            self.moved()

    def moved(self) -> None:
        """Something has happened."""
        self._moved_s, self._since_s = time.monotonic(), None

    def away(self) -> bool:
        """The broker is away, and is tried again: no fault of this process, for AWAY_S at most."""
        self._away_s = self._away_s or time.monotonic()
        fine = time.monotonic() - self._away_s < AWAY_S
        if fine:
            self.moved()
        return fine

    def back(self) -> None:
        """It is there again."""
        self._away_s = None
        self.moved()

    def orphaned_messages(self, messages: int) -> None:
        """So many messages are not acknowledged, with nobody at work on them, and that for HELD_S already."""
        if not messages:
            self._orphaned_s = None
        elif self._orphaned_s is None:
            self._orphaned_s = time.monotonic()

    def look(self) -> None:
        """Ask whether anything waits, where nothing has moved for a while."""
        now_s = time.monotonic()
        if now_s - self._moved_s < ASK_EVERY_S or now_s - self._asked_s < ASK_EVERY_S:
            return
        self._asked_s = now_s
        try:
            waits = self._waiting()
        except GradcamError:  # whose fault that is others say
            waits = False
        if not waits:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s

    def unready(self) -> str | None:
        """Why this process should be given nothing new, if anything."""
        return self._found(UNREADY_S)

    def trouble(self) -> str | None:
        """Why this process should be started again, if anything."""
        return self._found(IDLE_S)

    def _found(self, patience_s: float) -> str | None:
        now_s = time.monotonic()
        if self._orphaned_s is not None and now_s - self._orphaned_s > patience_s and not self._in_hand:
            return "messages are not acknowledged, and no job is in hand"
        if self._since_s is None:
            return None
        still_s = now_s - self._since_s
        if self._in_hand:
            if still_s > self._hung_after_s:
                jobs = counted(self._in_hand, "job is", "jobs are")
                return f"{jobs} in hand, others wait, and none has got on for {still_s:.0f} s"
        elif still_s > patience_s:
            return f"jobs have waited for {still_s:.0f} s, and none was taken"
        return None
