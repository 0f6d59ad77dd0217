"""`gradcam worker`: keeps the Celery worker process alive, and ends it cleanly.

A worker that dies unasked (out of memory, a crash in native code, a broker restart that Celery does
not survive) is started again, with backoff. One that never gets as far as taking jobs is given up.
"""

import logging
import os
import signal
import subprocess
import sys
import threading

from worker.settings import Settings

log = logging.getLogger("gradcam.supervisor")

WORKER = (sys.executable, "-P", "-m", "worker", "worker", "--unsupervised", "--ready-fd")
STARTS = 5  # in a row that may fail before it is given up
BACKOFF_S = 0.5  # before the second start; doubles
BACKOFF_MAX_S = 30
ENDED_CLEANLY = {0, -signal.SIGTERM}  # the latter before Celery has taken the signal over


class Supervisor:
    """One worker process after another, until asked to stop."""

    def __init__(self, settings: Settings, command: tuple[str, ...] = WORKER) -> None:
        """The child gets the same settings, by its environment.

        The last word of its command is the file descriptor on which it says that it takes jobs.
        """
        self._settings = settings
        self._command = command
        self._asked_to_stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT; return the exit code: 0 after a clean stop."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        deaths = failed_starts = 0
        while True:
            code, took_jobs = self._one_life()
            if self._asked_to_stop.is_set():
                return 0 if code in ENDED_CLEANLY else 1
            deaths = 1 if took_jobs else deaths + 1
            failed_starts = 0 if took_jobs else failed_starts + 1
            if failed_starts >= STARTS:
                log.error("the worker could not start, %d times in a row: given up", failed_starts)
                return 1
            delay_s = min(BACKOFF_S * 2 ** (deaths - 1), BACKOFF_MAX_S)
            log.warning("the worker ended unasked (exit code %s): again in %.1f s", code, delay_s)
            if self._asked_to_stop.wait(delay_s):
                return 0

    def _one_life(self) -> tuple[int, bool]:
        """Start a worker, wait for its end; return its exit code, and whether it ever took jobs."""
        ready, says_ready = os.pipe()
        with os.fdopen(ready, "rb") as said:
            child = subprocess.Popen(
                (*self._command, str(says_ready)),
                stdin=subprocess.PIPE,  # its lifeline to this process
                pass_fds=[says_ready],
                env=self._settings.environment_for_child(),
                start_new_session=True,  # Ctrl-C reaches the supervisor, which passes it on once
            )
            os.close(says_ready)
            self._child = child
            log.info("worker process %d started", child.pid)
            if self._asked_to_stop.is_set():  # the signal came while the process was being made
                self._end(child)
            code = child.wait()
            self._child = None
            if child.stdin:
                child.stdin.close()
            return code, bool(said.read(1))

    def _stop(self, *_: object) -> None:
        """First signal: end cleanly within the limit. Second: end now; its messages come back."""
        again = self._asked_to_stop.is_set()
        self._asked_to_stop.set()
        if self._child is None:
            return
        if again:
            self._child.kill()
        else:
            self._end(self._child)

    def _end(self, child: "subprocess.Popen[bytes]") -> None:
        child.terminate()
        timer = threading.Timer(self._settings.shutdown_timeout_s, child.kill)
        timer.daemon = True
        timer.start()
