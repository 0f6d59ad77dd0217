"""Background work: a step that a thread repeats beside the jobs."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

LOG_INTERVAL_S = 30.0  # between two lines about a step that keeps failing with the same type of error


class BackgroundLoop:
    """Calls a step again and again in a daemon thread until it is stopped, whatever the step raises.

    Without its background loops a process loses its jobs' leases, or delivers nothing. So no error ends a
    loop, not even SystemExit:

    * LedgerUnavailable and BrokerUnavailable are reported to `outages`, which logs when an outage begins and
      ends.
    * Any other error is a defect. Its first occurrence is logged with its traceback, then every
      LOG_INTERVAL_S the number of failures, until the step succeeds.

    Examples:
        >>> loop = BackgroundLoop("reaper", reaper.run_round, 0.5)
        >>> loop.start()
        >>> loop.stop(timeout_s=5)
        True
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], object],
        pause_s: float | Callable[[], float],
        *,
        immediately: bool = False,
        outages: Outages | None = None,
        consequence: str = "",
        context: AbstractContextManager[object] | None = None,
    ) -> None:
        """The thread starts with `start`.

        Args:
            name: The name of the thread, also used in log lines.
            step: The function that is called again and again.
            pause_s: The seconds between the end of a step, successful or not, and the next; or a function
                that returns them. It is called after each step, and so can keep a schedule after a slow step.
            immediately: Whether the first step is called at once, instead of after the first pause.
            outages: Is told when a server is unreachable, and after each successful step that the ledger
                answers. None where the step does not use the ledger, or the caller reports its outages.
            consequence: What is not done while a server is unreachable, for the log.
            context: A context that the thread enters before the first step and leaves after the last.
        """
        self.name = name
        self._step, self._outages, self._consequence = step, outages, consequence
        self._pause_s = pause_s if callable(pause_s) else lambda: pause_s
        self._immediately = immediately
        self._context: AbstractContextManager[object] = context or contextlib.nullcontext()
        self._changed = threading.Condition()  # guards the two flags below
        self._stopping = self._woken = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._step_ended_s = time.monotonic()  # or when the loop was started
        self._failures = 0  # in a row
        self._failure: type[BaseException] | None = None
        self._logged_s = 0.0

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def since_last_step_s(self) -> float:
        """Seconds since the last step ended, or since the start where none has."""
        return time.monotonic() - self._step_ended_s

    def start(self) -> None:
        """Start the thread. Raises RuntimeError on a second call."""
        self._step_ended_s = time.monotonic()
        self._thread.start()

    def wake(self) -> None:
        """End the pause now.

        A pause that follows a failure is kept: a step that fails must not become a busy loop.
        """
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def stop(self, timeout_s: float | None = None) -> bool:
        """End the loop after the current step.

        Args:
            timeout_s: How long to wait for that; None: without limit.

        Returns:
            Whether it has ended. A thread that has not does not keep the process from ending.
        """
        return not stop_all([self], timeout_s)

    def request_stop(self) -> None:
        """End the loop after the current step, without waiting for that."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread to end, at most `timeout_s`. Returns whether it has ended, or never started."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self.alive

    def _run(self) -> None:
        try:
            with self._context:
                pause_s, succeeded = 0 if self._immediately else self._pause_s(), True
                while not self._wait(pause_s, until_woken=succeeded):
                    succeeded = self._try_step()
                    self._step_ended_s = time.monotonic()
                    pause_s = self._pause_s()
        except (
            BaseException
        ):  # of the context, or of the function that returns the pause: `_try_step` raises none
            log.exception("background_loop_ended", loop=self.name)

    def _wait(self, seconds: float, *, until_woken: bool) -> bool:
        """Pause. Returns whether the loop is to end. A later `wake` ends the pause after the next step."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or (self._woken and until_woken), seconds)
            self._woken = False
            return self._stopping

    def _try_step(self) -> bool:
        try:
            self._step()
        except (LedgerUnavailable, BrokerUnavailable) as error:
            text = f"{self._consequence}: {error}" if self._consequence else str(error)
            if self._outages:
                self._outages.of(error).failed(text)
            else:
                log.debug("background_loop_step_failed", loop=self.name, reason=text)
            return False
        except BaseException as error:
            if self._count_failure(error):
                log.exception("background_loop_failed", loop=self.name)
            else:
                self._log_repeated_failure(error)
            return False
        if self._outages:
            self._outages.ledger.answered()
        if self._failures:
            log.warning("background_loop_recovered", loop=self.name, failures=self._failures)
            self._failures = 0
        return True

    def _count_failure(self, error: BaseException) -> bool:
        """Count a failure. Returns whether the one before, if any, was of another type."""
        self._failures += 1
        if self._failures > 1 and type(error) is self._failure:
            return False
        self._failure, self._logged_s = type(error), time.monotonic()
        return True

    def _log_repeated_failure(self, error: BaseException) -> None:
        now_s = time.monotonic()
        if now_s - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = now_s
            log.error(
                "background_loop_still_failing",
                loop=self.name,
                failures=self._failures,
                error_type=type(error).__name__,
                error=error,
            )


def stop_all(loops: Iterable[BackgroundLoop], timeout_s: float | None = None) -> list[BackgroundLoop]:
    """Ask several loops to end, then wait for all of them together.

    Args:
        loops: The loops to stop.
        timeout_s: How long to wait for all of them together; None: without limit.

    Returns:
        The loops that have not ended; each is logged.
    """
    loops = [*loops]
    for loop in loops:
        loop.request_stop()
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    running = [
        loop for loop in loops if not loop.join(None if end_s is None else max(end_s - time.monotonic(), 0))
    ]
    for loop in running:
        log.warning("background_loop_not_stopped", loop=loop.name, step_s=loop.since_last_step_s)
    return running
