"""Trying again what failed for the moment: after which pause, how often, for how long.

`RetryPolicy` is a constant that says so; `Retries` is one piece of work that is done under it. All that is
read from storage, or written there, has one policy, `storage.s3.STORAGE`, so that retries do not multiply.
"""

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from gradcam_worker.errors import JobTimeout
from gradcam_worker.resilience.deadline import Deadline

log = logging.getLogger("gradcam")

T = TypeVar("T")

HALF_OR_MORE = (0.5, 1.0)  # the usual jitter: those that failed together do not come back together
MAX_EXPONENT = 64  # of the factor: by then any pause is at its maximum, and a float does not overflow
UNRESPONSIVE_S = 5.0  # work that took so long was held up by the server: not the job's fault
POLL_CANCELLED_S = 0.25  # between two checks whether a job that waits was cancelled


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter, and where work is retried in place, for how long and after what.

    tenacity and stamina compute the same pauses, but know neither a total that parallel calls share nor a
    deadline that is put off, or cancelled with an error of its own, while a call waits: that part would stay.

    Example:
        >>> policy = RetryPolicy(first_s=0.5, max_s=3)
        >>> [policy.pause_s(failures) for failures in (1, 2, 3, 4)]
        [0.5, 1.0, 2.0, 3.0]

    Attributes:
        first_s: pause after the first failure, in seconds.
        max_s: the longest pause, before jitter.
        factor: by which a pause is longer than the one before.
        jitter: each pause is multiplied by a random number between these two.
        total_s: for how long `call` tries; one more try may follow the last pause.
        max_tries: how often `call` tries.
        errors: what `call` tries again after.
        hopeless: which of these cannot succeed the next time, such as a missing permission.
    """

    first_s: float
    max_s: float
    factor: float = 2.0
    jitter: tuple[float, float] = (1.0, 1.0)
    total_s: float = math.inf
    max_tries: float = math.inf
    errors: tuple[type[Exception], ...] = (Exception,)
    hopeless: Callable[[Exception], bool] = lambda _: False

    def pause_s(self, failures: int) -> float:
        """Seconds before the next try.

        Args:
            failures: how many tries in a row have failed, 1 or more.

        Returns:
            The pause, with jitter.
        """
        pause_s = min(self.first_s * self.factor ** min(failures - 1, MAX_EXPONENT), self.max_s)
        return pause_s * random.uniform(*self.jitter)  # noqa: S311  # jitter, not a secret

    def start(self, deadline: Deadline | None = None) -> "Retries":
        """Begin a piece of work: its `total_s` runs from now on, and never past the job's deadline."""
        return Retries(self, deadline or Deadline(math.inf))

    def call(self, once: Callable[[], T], deadline: Deadline | None = None) -> T:
        """Begin a piece of work that is a single call: see `Retries.call`."""
        return self.start(deadline).call(once)


class Retries:
    """One piece of work under a policy: what its calls, also parallel ones, share is the time that is left.

    Tries run in threads of a pool. The job waits for them as long as its deadline allows, whatever the server
    does; what is under way then is left to its own timeouts, and nothing new is begun for it.
    """

    def __init__(self, policy: RetryPolicy, deadline: Deadline) -> None:
        """Its time begins now."""
        self._policy, self._deadline = policy, deadline
        self._begun = time.monotonic()
        self._end = self._begun + policy.total_s
        self._ended = False  # nothing is tried again
        self._failure = ""  # the last one so far

    def left_s(self) -> float:
        """Seconds left, never below zero."""
        return max(min(self._deadline.left_s(), self._end - time.monotonic()), 0.0)

    def check(self, doing: str) -> None:
        """Raise what ended the job, or TimeoutError where the job's time is not up but this is."""
        self._deadline.check(doing)
        if not self.left_s():
            self.give_up(doing)

    def call(self, once: Callable[[], T]) -> T:
        """Try until it succeeds, is hopeless, or there is no time for another try.

        Args:
            once: one try.

        Returns:
            What the try that succeeded returns.

        Raises:
            Exception: the last of the policy's `errors`; or what the deadline was cancelled with.
        """
        failures = 0
        while True:
            self.raise_if_cancelled()
            try:
                return once()
            except self._policy.errors as error:
                failures += 1
                pause_s = self._policy.pause_s(failures)
                tried_out = self._ended or failures >= self._policy.max_tries or self.left_s() <= pause_s
                if tried_out or self._policy.hopeless(error):
                    self.raise_if_cancelled()
                    raise
                self.record_failure(error)
                log.info("tried again in %.2f s: %s", pause_s, error)
                time.sleep(pause_s)

    def wait_for(self, calls: Sequence["Future[T]"], doing: str) -> list[T]:
        """Wait for parallel calls of this work.

        After a failure none is begun, or tried again; it is raised when those under way have ended.

        Args:
            calls: in a pool.
            doing: what the job does, for the error.

        Returns:
            What they return, in the order given.

        Raises:
            Exception: what a call raised, or what ended the job.
            TimeoutError: the time is up.
        """
        missing: set[Future[T]] = set(calls)
        while missing and self.left_s():
            timeout_s = min(self.left_s(), POLL_CANCELLED_S)
            ended, missing = wait(missing, timeout=timeout_s, return_when=FIRST_EXCEPTION)
            if any(one.exception() for one in ended if not one.cancelled()):
                self._ended = True
                missing = {one for one in missing if not one.cancel()}
        for one in missing:
            one.cancel()
        for one in calls:
            if one.done() and not one.cancelled():
                one.result()  # raises what it raised
        if missing:
            self.give_up(doing)
        return [one.result() for one in calls]

    def record_failure(self, error: Exception) -> None:
        """The server has failed once: should time run out now, that is not the job's fault."""
        self._failure = str(error).partition("\n")[0]

    def give_up(self, doing: str) -> NoReturn:
        """Raise what ended the job, unless that was the server's doing: then TimeoutError."""
        waited_s = time.monotonic() - self._begun
        if waited_s < UNRESPONSIVE_S and not self._failure:
            self._deadline.check(doing)
        self.raise_if_cancelled()
        message = f"no answer within {waited_s:.1f} s"
        raise TimeoutError(f"{message}, after: {self._failure}" if self._failure else message)

    def raise_if_cancelled(self) -> None:
        """Raise what the deadline was cancelled with. That time is up is no reason by itself."""
        with contextlib.suppress(JobTimeout):
            self._deadline.check("storage")
