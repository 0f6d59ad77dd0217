"""Patience with storage: what failed for the moment is tried again, and no server can hold a job up.

The one policy for all that is read from storage and written there, so that retries do not multiply:

* After a try that failed comes a pause (a quarter of a second, doubling up to five, with jitter) and another
  try, for `PATIENCE_S` in all and never past the job's deadline. Then the last failure is raised: another
  attempt at the job may fare better. What cannot succeed, such as a missing permission, is raised at once.
* Tries run in a thread of a pool; the job waits for them as long as its deadline allows, whatever the server
  does. What is under way then is left to its own timeouts, and nothing new is begun for it.
"""

import contextlib
import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import NoReturn, TypeVar

from gradcam_worker.errors import JobTimeout
from gradcam_worker.resilience.deadline import Deadline

log = logging.getLogger("gradcam")

T = TypeVar("T")

PATIENCE_S = 30.0  # a store that was restarted is back within it; then the job makes way for others
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0  # between two tries; doubles
STALLED_S = 5.0  # who waits so long for one object waits for the store: its fault, not the job's
LOOK_S = 0.25  # between two looks whether a job that waits has been cancelled


class RetryPolicy:
    """How much time one piece of work with a store gets, of what its job has left."""

    def __init__(
        self,
        deadline: Deadline,
        seconds: float = PATIENCE_S,
        *,
        insists: bool = True,
        longest_pause_s: float = LONGEST_PAUSE_S,
    ) -> None:
        """It begins now. Without insisting, one failure is enough."""
        self._deadline = deadline
        self._begun = time.monotonic()
        self._end = self._begun + seconds
        self._weary = not insists
        self._longest_pause_s = longest_pause_s
        self._failure = ""  # the last one so far

    def left_s(self) -> float:
        """Seconds left, never below zero."""
        return max(min(self._deadline.left_s(), self._end - time.monotonic()), 0.0)

    def check(self, doing: str) -> None:
        """Raise what ended the job, or TimeoutError where the job's time is not up but this is."""
        self._deadline.check(doing)
        if not self.left_s():
            self.give_up(doing)

    def call(
        self,
        once: Callable[[], T],
        failures: tuple[type[Exception], ...],
        hopeless: Callable[[Exception], bool],
    ) -> T:
        """Try until it succeeds, is hopeless, or there is no time for another try.

        Raises the last of `failures`, and what the deadline was cancelled with.
        """
        pause_s = FIRST_PAUSE_S
        while True:
            self.unless_cancelled()
            try:
                return once()
            except failures as error:
                jittered_s = pause_s * random.uniform(0.5, 1)  # noqa: S311  # jitter, not a secret
                if hopeless(error) or self._weary or self.left_s() <= jittered_s:
                    self.unless_cancelled()
                    raise
                self.record_failure(error)
                log.info("tried again in %.2f s: %s", jittered_s, error)
                time.sleep(jittered_s)
                pause_s = min(2 * pause_s, self._longest_pause_s)

    def gather(self, begun: Sequence["Future[T]"], doing: str) -> list[T]:
        """What they return, in the order given.

        After a failure none is begun, or tried again; it is raised when those under way have ended.
        Raises what they raise; what ended the job, or TimeoutError, when time is up.
        """
        missing: set[Future[T]] = set(begun)
        while missing and self.left_s():
            ended, missing = wait(missing, timeout=min(self.left_s(), LOOK_S), return_when=FIRST_EXCEPTION)
            if any(one.exception() for one in ended if not one.cancelled()):
                self._weary = True
                missing = {one for one in missing if not one.cancel()}
        for one in missing:
            one.cancel()
        for one in begun:
            if one.done() and not one.cancelled():
                one.result()  # raises what it raised
        if missing:
            self.give_up(doing)
        return [one.result() for one in begun]

    def record_failure(self, error: Exception) -> None:
        """The store has failed once: should time run out now, that is not the job's fault."""
        self._failure = str(error).partition("\n")[0]

    def give_up(self, doing: str) -> NoReturn:
        """Raise what ended the job, unless that was the store's doing: then TimeoutError."""
        waited_s = time.monotonic() - self._begun
        if waited_s < STALLED_S and not self._failure:
            self._deadline.check(doing)
        self.unless_cancelled()
        message = f"no answer within {waited_s:.1f} s"
        raise TimeoutError(f"{message}, after: {self._failure}" if self._failure else message)

    def unless_cancelled(self) -> None:
        """Raise what the deadline was cancelled with. That time is up is no reason by itself."""
        with contextlib.suppress(JobTimeout):
            self._deadline.check("storage")
