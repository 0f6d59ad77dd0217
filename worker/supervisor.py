"""`gradcam worker`: keeps a Celery worker process alive on each device, and ends them cleanly.

A worker that dies unasked (out of memory, a crash in native code, a broker restart that Celery does
not survive) is started again, with backoff. Where none gets as far as taking jobs, all is given up.
As long as one does, the others are tried again: a broken GPU must not end the work of seven good ones,
again and again, as it would if whoever runs the supervisor started everything anew.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue

from worker import devices
from worker.devices import Device
from worker.settings import Settings

log = logging.getLogger("gradcam.supervisor")

WORKER = (sys.executable, "-P", "-m", "worker", "worker", "--unsupervised", "--ready-fd")
STARTS = 5  # in a row that may fail, on every device, before all is given up
BACKOFF_S = 0.5  # before the second start; doubles
BACKOFF_MAX_S = 30
LOOK_UP_S = 0.5
DOUBLINGS = 10  # more than it takes to get there
ENDED_CLEANLY = {0, -signal.SIGTERM}  # the latter before Celery has taken the signal over


class Supervisor:
    """One worker process after another on each device, until asked to stop."""

    def __init__(self, settings: Settings, command: tuple[str, ...] = WORKER) -> None:
        """A child gets the same settings, by its environment. Raises InvalidSettings.

        The last word of its command is the file descriptor on which it says that it takes jobs.
        """
        self._timeout_s = settings.shutdown_timeout_s
        self._command = command
        self._devices = devices.choose(settings)
        self._failed_starts = {device.name: 0 for device in self._devices}  # in a row, so far
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._door = threading.Lock()  # of the three above: once it stops, no child is started
        self._notes: SimpleQueue[int | Future[int]] = SimpleQueue()

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT; return the exit code: 0 after a clean stop.

        First signal: end cleanly within the limit. Second: end now; the messages come back.
        """
        # A handler may run between any two steps of this thread: it leaves a note, no more.
        signal.signal(signal.SIGTERM, lambda number, _: self._notes.put(number))
        signal.signal(signal.SIGINT, lambda number, _: self._notes.put(number))
        signals = 0
        with ThreadPoolExecutor(len(self._devices)) as pool:
            kept = [pool.submit(self._keep, device) for device in self._devices]
            for one in kept:
                one.add_done_callback(self._notes.put)
            while not all(one.done() for one in kept):
                note = self._next_note()
                if isinstance(note, int):
                    signals += 1
                    self._end(now=signals > 1)
                elif note and note.exception():
                    self._end()
        return max(one.result() for one in kept)

    def _next_note(self) -> "int | Future[int] | None":
        """What happened next; None from time to time.

        A signal may reach a thread other than this one, whose wait it then does not end: the handler
        runs as soon as this thread looks up.
        """
        with suppress(Empty):
            return self._notes.get(timeout=LOOK_UP_S)
        return None

    def _keep(self, device: Device) -> int:
        """Keep one device's worker alive; return 1 where it was given up or did not end cleanly."""
        deaths = 0
        while True:
            code, took_jobs = self._one_life(device)
            if self._stopping.is_set():
                return 0 if code in ENDED_CLEANLY else 1
            deaths = 1 if took_jobs else deaths + 1
            if self._given_up(device, took_jobs=took_jobs):
                return 1
            delay_s = min(BACKOFF_S * 2 ** min(deaths - 1, DOUBLINGS), BACKOFF_MAX_S)
            said = "%s: the worker ended unasked (exit code %s): again in %.1f s"
            log.warning(said, device.name, code, delay_s)
            if self._stopping.wait(delay_s):
                return 0

    def _one_life(self, device: Device) -> tuple[int, bool]:
        """Start a worker, wait for its end; return its exit code, and whether it ever took jobs."""
        ready, says_ready = os.pipe()
        with os.fdopen(ready, "rb") as said, os.fdopen(says_ready, "wb") as saying:
            with self._door:
                if self._stopping.is_set():
                    return 0, False
                child = self._children[device.name] = subprocess.Popen(
                    (*self._command, str(says_ready)),
                    stdin=subprocess.PIPE,  # its lifeline to this process
                    pass_fds=[says_ready],
                    env=device.environment,
                    start_new_session=True,  # Ctrl-C reaches the supervisor, which passes it on once
                )
            saying.close()
            log.info("%s: worker process %d started", device.name, child.pid)
            code = child.wait()
            with self._door:
                del self._children[device.name]
            if child.stdin:
                child.stdin.close()
            return code, bool(said.read(1))

    def _given_up(self, device: Device, *, took_jobs: bool) -> bool:
        """Count the failed starts of a device; end everything where every one of them has too many."""
        with self._door:
            self._failed_starts[device.name] = 0 if took_jobs else self._failed_starts[device.name] + 1
            fewest = min(self._failed_starts.values())
        if fewest < STARTS:
            return False
        log.error("%s: the worker could not start, %d times in a row: given up", device.name, fewest)
        self._end()
        return True

    def _end(self, *, now: bool = False) -> None:
        """Ask all children to end, within the limit; or end them now."""
        with self._door:
            self._stopping.set()
            for child in self._children.values():
                child.kill() if now else child.terminate()
        if not now:
            timer = threading.Timer(self._timeout_s, self._end, kwargs={"now": True})
            timer.daemon = True
            timer.start()
