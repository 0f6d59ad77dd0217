"""`gradcam worker`: keeps the Celery worker process alive, watches it, ends it cleanly.

A worker that dies unasked (out of memory, a crash in native code, a broker restart that Celery does
not survive) is started again, with backoff. One that cannot even start is given up, with its exit code.
"""

import logging
import signal
import subprocess
import sys
import threading
import time

from worker.settings import Settings

log = logging.getLogger("gradcam.supervisor")

WORKER = (sys.executable, "-P", "-m", "worker", "worker", "--unsupervised", "--tethered")
HEALTHY_S = 30  # a worker that lived this long had started properly
STARTS = 5  # in a row that may fail
BACKOFF_S = 0.5  # before the second start; doubles


class Supervisor:
    """One worker process after another, until asked to stop."""

    def __init__(self, settings: Settings, command: tuple[str, ...] = WORKER) -> None:
        """The child runs `command` and gets the same settings, by its environment."""
        self._settings = settings
        self._command = command
        self._asked_to_stop = threading.Event()
        self._signals = 0
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT; return the exit code: 0 after a clean stop."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        failures = 0
        while not self._asked_to_stop.is_set():
            begun = time.monotonic()
            code = self._one_life()
            if self._asked_to_stop.is_set():
                return 0 if code in {0, None} else 1
            failures = 1 if time.monotonic() - begun > HEALTHY_S else failures + 1
            if failures >= STARTS:
                log.error("the worker ended %d times in a row within %d s: given up", failures, HEALTHY_S)
                return 1
            delay_s = BACKOFF_S * 2 ** (failures - 1)
            log.warning("the worker ended unasked (exit code %s): again in %.1f s", code, delay_s)
            self._asked_to_stop.wait(delay_s)
        return 0

    def _one_life(self) -> int | None:
        """Start a worker and wait for its end. Its standard input is its lifeline to this process."""
        self._child = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            env=self._settings.environment_for_child(),
            start_new_session=True,  # Ctrl-C reaches the supervisor, which passes it on once
        )
        log.info("worker process %d started", self._child.pid)
        if self._asked_to_stop.is_set():  # the signal came while the process was being made
            self._child.terminate()
        return self._child.wait()

    def _stop(self, *_: object) -> None:
        """First signal: end cleanly within the limit. Second: end now; its messages come back."""
        self._signals += 1
        self._asked_to_stop.set()
        child = self._child
        if child is None:
            return
        if self._signals == 1:
            child.terminate()
            timer = threading.Timer(self._settings.shutdown_timeout_s, child.kill)
            timer.daemon = True
            timer.start()
        else:
            child.kill()
