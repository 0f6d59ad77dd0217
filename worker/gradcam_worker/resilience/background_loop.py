"""A step that is repeated in a thread of its own, beside the jobs: the one loop for all background work."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.resilience.outages import Outages

log = logging.getLogger("gradcam")

LOG_EVERY_S = 30.0  # between two lines about a step that fails in the same way each time


class BackgroundLoop:
    """Calls a step again and again in a daemon thread until it is stopped, whatever the step raises.

    Without its background loops a process loses its jobs' leases, or delivers nothing. So no error ends a
    loop, not even SystemExit:

    * LedgerUnavailable and BrokerUnavailable go to `outages`, which logs where an outage begins and ends.
    * Any other error is a defect. It is logged with its traceback when it is met first, then once in a while
      with the number of failures, until the step succeeds.

    Example:
        >>> loop = BackgroundLoop("reaper", reaper.step, 0.5)
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
        """Nothing is started yet.

        Args:
            name: of the thread, and in log lines.
            step: what is repeated.
            pause_s: seconds between the end of a step, however it ended, and the next; or a function that is
                called after each step and returns them, and so can keep a schedule though a step was slow.
            immediately: call the step at once, instead of after the first pause.
            outages: what is told that a server is unreachable, and, after each step that succeeds, that the
                ledger answers. None where the step uses no ledger, or somebody else reports its outages.
            consequence: what is not done while a server is unreachable, for the log.
            context: what the thread enters before the first step, and leaves after the last.
        """
        self.name = name
        self._step, self._outages, self._consequence = step, outages, consequence
        self._pause_s = pause_s if callable(pause_s) else lambda: pause_s
        self._immediately = immediately
        self._context: AbstractContextManager[object] = context or contextlib.nullcontext()
        self._changed = threading.Condition()  # of the two that follow
        self._stopping = self._woken = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._ended_s = time.monotonic()  # the last step, or the start
        self._failures = 0  # in a row
        self._failure: type[BaseException] | None = None
        self._logged_s = 0.0

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def idle_s(self) -> float:
        """Seconds since the last step ended; before the first step has, since the start."""
        return time.monotonic() - self._ended_s

    def start(self) -> None:
        """Start the thread. Raises RuntimeError where it was started before."""
        self._ended_s = time.monotonic()
        self._thread.start()

    def wake(self) -> None:
        """End the pause now.

        A pause that follows a failure is kept: a step that fails must not become a busy loop.
        """
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def stop(self, timeout_s: float | None = None) -> bool:
        """End the loop after the step that runs just now.

        Args:
            timeout_s: how long to wait for that; None: as long as it takes.

        Returns:
            Whether it has ended. Where it has not, the thread is left to itself: it does not keep the process
            from ending.
        """
        return not stop_all([self], timeout_s)

    def request_stop(self) -> None:
        """As `stop`, without waiting."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, for so long; whether it has ended, or never began."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self.alive

    def _run(self) -> None:
        try:
            with self._context:
                pause_s, succeeded = 0 if self._immediately else self._pause_s(), True
                while not self._wait(pause_s, until_woken=succeeded):
                    succeeded = self._try_step()
                    self._ended_s = time.monotonic()
                    pause_s = self._pause_s()
        except BaseException:  # the step is guarded: it was the context, or the function that says the pause
            log.exception("background loop has ended by an error: loop=%s", self.name)

    def _wait(self, seconds: float, *, until_woken: bool) -> bool:
        """Pause; whether the loop is to end. A wake-up from now on ends the pause after the next step."""
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
                log.debug("background loop: loop=%s: %s", self.name, text)
            return False
        except BaseException as error:  # noqa: BLE001  # it is logged, with its traceback
            self._log_failure(error)
            return False
        if self._outages:
            self._outages.ledger.answered()
        if self._failures:
            log.warning("background loop works again: loop=%s failures=%d", self.name, self._failures)
            self._failures = 0
        return True

    def _log_failure(self, error: BaseException) -> None:
        now_s = time.monotonic()
        self._failures += 1
        if self._failures == 1 or type(error) is not self._failure:
            self._failure = type(error)
            log.error("background loop failed and goes on: loop=%s", self.name, exc_info=error)
        elif now_s - self._logged_s >= LOG_EVERY_S:
            text = "background loop still fails: loop=%s failures=%d: %s: %s"
            log.error(text, self.name, self._failures, type(error).__name__, error)
        else:
            return
        self._logged_s = now_s


def stop_all(loops: Iterable[BackgroundLoop], timeout_s: float | None = None) -> list[BackgroundLoop]:
    """Ask several loops to end, then wait for all of them together.

    Args:
        loops: what to stop.
        timeout_s: for all of them together; None: as long as it takes.

    Returns:
        Those that have not ended; each is logged.
    """
    loops = [*loops]
    for loop in loops:
        loop.request_stop()
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    left = [
        loop for loop in loops if not loop.join(None if end_s is None else max(end_s - time.monotonic(), 0))
    ]
    for loop in left:
        log.warning("background loop does not end: loop=%s step_s=%.1f", loop.name, loop.idle_s)
    return left
