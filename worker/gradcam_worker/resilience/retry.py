"""Retries of calls that failed temporarily.

`RetryPolicy` is a constant: pauses, number of tries, total time. `Retries` is one piece of work under a
policy. All reads and writes of storage have one policy, `storage.s3.STORAGE`, so that retries do not
multiply.
"""

import contextlib
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from gradcam_worker.errors import JobTimeout, RedisUnavailable
from gradcam_worker.resilience.blocking import block, run_blocking
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

T = TypeVar("T")

HALF_OR_MORE = (0.5, 1.0)  # the usual jitter: calls that failed together are not retried together
MAX_EXPONENT = 64  # of the factor: there any pause is at its maximum, and no float overflows
UNRESPONSIVE_S = 5.0  # work that took longer was delayed by the server, not by the job
CANCEL_POLL_INTERVAL_S = 0.25  # between two checks whether a waiting job was cancelled


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential backoff with jitter; for `call` also limits, and the errors after which it retries.

    tenacity and stamina compute the same pauses, but have neither a total time that parallel calls share nor
    a deadline that is extended, or cancelled with an error, while a call waits.

    Examples:
        >>> policy = RetryPolicy(first_s=0.5, max_s=3)
        >>> [policy.pause_s(failures) for failures in (1, 2, 3, 4)]
        [0.5, 1.0, 2.0, 3.0]

    Attributes:
        first_s: The pause after the first failure, in seconds.
        max_s: The longest pause in seconds, before jitter.
        factor: The ratio of a pause to the one before.
        jitter: Each pause is multiplied by a random number between these two.
        total_s: How long `call` retries, in seconds; one more try may follow the last pause.
        max_tries: How often `call` tries.
        errors: The errors after which `call` tries again.
        hopeless: Returns whether such an error would occur again, as a missing permission would.
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
        """Return the pause before the next try, in seconds, with jitter.

        Args:
            failures: The number of tries in a row that have failed, 1 or more.
        """
        pause_s = min(self.first_s * self.factor ** min(failures - 1, MAX_EXPONENT), self.max_s)
        return pause_s * random.uniform(*self.jitter)  # noqa: S311  # jitter, not a secret

    def start(self, deadline: Deadline | None = None) -> "Retries":
        """Begin a piece of work: `total_s` counts from now, and ends at the job's deadline at the latest."""
        return Retries(self, deadline or Deadline(math.inf))

    def call(self, once: Callable[[], T], deadline: Deadline | None = None) -> T:
        """Begin a piece of work that is a single call: see `Retries.call`."""
        return self.start(deadline).call(once)


class Retries:
    """One piece of work under a policy. Its calls, parallel ones too, share the time that is left.

    Tries run in threads of a pool. The job waits for them until its deadline, whatever the server does. A try
    that is running then is left to its own timeouts, and no other is started.
    """

    def __init__(self, policy: RetryPolicy, deadline: Deadline) -> None:
        """The time starts now."""
        self._policy, self._deadline = policy, deadline
        self._started_s = time.monotonic()
        self._end_s = self._started_s + policy.total_s
        self._ended = False  # no try is repeated
        self._failure = ""  # the last one so far

    def left_s(self) -> float:
        """Seconds left, never below zero."""
        return max(min(self._deadline.left_s(), self._end_s - time.monotonic()), 0.0)

    def stop_clock(self) -> None:
        """Count no time until `begin_again`: calls are tried for as long as the job may run."""
        self._end_s = math.inf

    def begin_again(self) -> None:
        """Give the calls that are not done all of the time, from now on."""
        self._started_s = time.monotonic()
        self._end_s = self._started_s + self._policy.total_s

    def end(self) -> None:
        """Repeat no try from now on, not even one whose pause has begun."""
        self._ended = True

    def check(self, doing: str) -> None:
        """Raise the error that ended the job; TimeoutError where only the time of this work is up."""
        self._deadline.check(doing)
        if not self.left_s():
            self.give_up(doing)

    def call(self, once: Callable[[], T]) -> T:
        """Try until it succeeds, is hopeless, or no time is left for another try.

        Args:
            once: The call of one try.

        Returns:
            The result of the successful try.

        Raises:
            Exception: The last of the policy's `errors`; or the error that cancelled the deadline.
        """

        async def attempt() -> T:
            return once()

        return run_blocking(self.call_awaited(attempt, block))

    async def call_awaited(
        self, once: Callable[[], Awaitable[T]], pause: Callable[[float], Awaitable[None]]
    ) -> T:
        """See `call`.

        Args:
            once: The call of one try.
            pause: Sleeps so many seconds: `asyncio.sleep`, or `resilience.blocking.block`.

        Returns:
            The result of the successful try.

        Raises:
            Exception: As `call`.
        """
        failures = 0
        while True:
            self.raise_if_cancelled()
            try:
                return await once()
            except self._policy.errors as error:
                failures += 1
                pause_s = self._policy.pause_s(failures)
                tried_out = self._ended or failures >= self._policy.max_tries or self.left_s() <= pause_s
                if tried_out or self._policy.hopeless(error):
                    self.raise_if_cancelled()
                    raise
                if isinstance(error, RedisUnavailable):
                    pass  # it is logged as an outage, with its length
                elif self._failure:  # a failure of this work has been told
                    log.debug("call_failed_again", delay_s=pause_s, error=error)
                else:
                    log.info("call_retry_scheduled", delay_s=pause_s, error=error)
                self.record_failure(error)
                await pause(pause_s)
                if self._ended:
                    self.raise_if_cancelled()
                    raise

    def wait_for(self, calls: Sequence["Future[T]"], doing: str) -> list[T]:
        """Wait for parallel calls of this work.

        After a failure no call is started or retried; the error is raised when the running calls have ended.

        Args:
            calls: The running calls of a thread pool.
            doing: What the job does, for the error.

        Returns:
            Their results, in the order of `calls`.

        Raises:
            Exception: The error of a call, or the error that ended the job.
            TimeoutError: The time is up.
        """
        missing: set[Future[T]] = set(calls)
        while missing and self.left_s():
            timeout_s = min(self.left_s(), CANCEL_POLL_INTERVAL_S)
            ended, missing = wait(missing, timeout=timeout_s, return_when=FIRST_EXCEPTION)
            if any(call.exception() for call in ended if not call.cancelled()):
                self.end()
                missing = {call for call in missing if not call.cancel()}
        for call in missing:
            call.cancel()
        for call in calls:
            if call.done() and not call.cancelled():
                call.result()  # raises its error
        if missing:
            self.give_up(doing)
        return [call.result() for call in calls]

    def record_failure(self, error: Exception) -> None:
        """Note a failure of the server: if time runs out now, that is not the job's fault."""
        self._failure = str(error).partition("\n")[0]

    def give_up(self, doing: str) -> NoReturn:
        """Raise the error that ended the job; TimeoutError where the server was the cause."""
        waited_s = time.monotonic() - self._started_s
        if waited_s < UNRESPONSIVE_S and not self._failure:
            self._deadline.check(doing)
        self.raise_if_cancelled()
        message = f"no answer within {waited_s:.1f} s"
        raise TimeoutError(f"{message}, after: {self._failure}" if self._failure else message)

    def raise_if_cancelled(self) -> None:
        """Raise the error that cancelled the deadline. An expired deadline alone raises nothing."""
        with contextlib.suppress(JobTimeout):
            self._deadline.check("storage")
