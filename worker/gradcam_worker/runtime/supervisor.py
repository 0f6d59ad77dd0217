"""`gradcam worker`: keeps a Celery worker process alive on each device, and ends them cleanly.

A worker that dies unasked (out of memory, a crash in native code, a broker restart that Celery does
not survive) is started again, with backoff, and so is one that shows no sign of life any more (see
`gradcam_worker.runtime.liveness`). Where none gets as far as taking jobs, all is given up: at once where each
says that its
settings are wrong.
As long as one does, the others are tried again: a broken GPU must not end the work of seven good ones,
again and again, as it would if whoever runs the supervisor started everything anew.
"""

import logging
import os
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.runtime import devices
from gradcam_worker.runtime.devices import Device
from gradcam_worker.settings import Settings

log = logging.getLogger("gradcam.supervisor")

WORKER = (sys.executable, "-P", "-m", "gradcam_worker", "worker", "--unsupervised", "--ready-fd")
STARTS = 5  # in a row that may fail, on every device, before all is given up
RESTART = RetryPolicy(first_s=0.5, max_s=30.0)  # a crash by chance costs little, a broken device no busy loop
POLL_SIGNALS_S = 0.5  # see `_next_event`
LAST_PORT = 65_535
POLL_WORKER_S = 1.0  # between two checks whether a worker has died, which the pipe may not show
HAND_BACK_S = 10.0  # for a worker whose time is up: what it runs goes back into the queue
ENDED_CLEANLY = {0, -signal.SIGTERM}  # the latter before Celery has taken the signal over


class Supervisor:
    """One worker process after another on each device, until asked to stop."""

    def __init__(self, settings: Settings, command: tuple[str, ...] = WORKER) -> None:
        """A child gets the same settings, by its environment. Raises InvalidSettings.

        The last word of its command is the file descriptor on which it says again and again, from when it
        takes jobs, that all is well.
        """
        self._timeout_s = settings.shutdown_timeout_s
        self._stalled_after_s = settings.stalled_after_s
        self._command = command
        self._devices = devices.choose(settings)
        last = settings.metrics_port + len(self._devices) - 1
        if settings.metrics_port and last > LAST_PORT:
            message = f"GRADCAM_METRICS_PORT: the last of {len(self._devices)} processes would be at {last}."
            raise InvalidSettings(message)
        self._metrics_ports = {
            device.name: settings.metrics_port and settings.metrics_port + number
            for number, device in enumerate(self._devices)
        }
        self._starts = {device.name: 0 for device in self._devices}
        self._failed_starts = {device.name: 0 for device in self._devices}  # in a row, so far
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._proven = False  # whether any of them ever took jobs: its settings cannot be hopeless
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # of the three above: once it stops, no child is started
        self._events: SimpleQueue[int | Future[int]] = SimpleQueue()

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT; return the exit code: 0 after a clean stop.

        First signal: end cleanly within the limit, then hand back what still runs. Second: hand it back at
        once. A worker that does neither is killed, its jobs come back when their leases run out, and the
        code is 1.
        """
        # A handler may run between any two steps of this thread: it queues an event, no more.
        signal.signal(signal.SIGTERM, lambda number, _: self._events.put(number))
        signal.signal(signal.SIGINT, lambda number, _: self._events.put(number))
        signals = 0
        with ThreadPoolExecutor(len(self._devices)) as pool:
            devices_done = [pool.submit(self._supervise, device) for device in self._devices]
            for one in devices_done:
                one.add_done_callback(self._events.put)
            while not all(one.done() for one in devices_done):
                event = self._next_event()
                if isinstance(event, int):
                    signals += 1
                    self._end(timeout_s=0 if signals > 1 else self._timeout_s)
                elif event and event.exception():
                    self._end(timeout_s=self._timeout_s)
        return max(one.result() for one in devices_done)

    def _next_event(self) -> "int | Future[int] | None":
        """What happened next; None from time to time.

        A signal may reach a thread other than this one, whose wait it then does not end: the handler
        runs as soon as this thread looks up.
        """
        with suppress(Empty):
            return self._events.get(timeout=POLL_SIGNALS_S)
        return None

    def _supervise(self, device: Device) -> int:
        """Keep one device's worker alive; return 1 where it was given up or did not end cleanly."""
        deaths = 0
        while True:
            code, took_jobs = self._run_worker(device)
            if self._stopping.is_set():
                return 0 if code in ENDED_CLEANLY else 1
            deaths = 1 if took_jobs else deaths + 1
            if self._gives_up(device, hopeless=code == os.EX_CONFIG):
                return 1
            delay_s = RESTART.pause_s(deaths)
            text = "%s: the worker ended unasked (exit code %s): again in %.1f s"
            log.warning(text, device.name, code, delay_s)
            if self._stopping.wait(delay_s):
                return 0

    def _run_worker(self, device: Device) -> tuple[int, bool]:
        """Start a worker, wait for its end; return its exit code, and whether it ever took jobs."""
        self._starts[device.name] += 1
        own = {
            "GRADCAM_METRICS_PORT": str(self._metrics_ports[device.name]),
            "GRADCAM_STARTS": str(self._starts[device.name]),
        }
        signs, shows_signs = os.pipe()
        with os.fdopen(signs, "rb") as seen, os.fdopen(shows_signs, "wb") as showing:
            with self._lock:
                if self._stopping.is_set():
                    return 0, False
                child = self._children[device.name] = subprocess.Popen(
                    (*self._command, str(shows_signs)),
                    stdin=subprocess.PIPE,  # closed when this process ends: see parent_watch
                    pass_fds=[shows_signs],
                    env={**device.environment, **own},
                    start_new_session=True,  # Ctrl-C reaches the supervisor, which passes it on once
                )
            showing.close()
            log.info("%s: worker process %d started", device.name, child.pid)
            took_jobs = self._watch(device, child, seen.fileno())
            code = child.wait()
            with self._lock:
                del self._children[device.name]
            if child.stdin:
                child.stdin.close()
            return code, took_jobs

    def _watch(self, device: Device, child: "subprocess.Popen[bytes]", signs: int) -> bool:
        """Return when a worker is dead, or has been killed because it stalled; whether it ever took jobs.

        The seconds of silence are counted, not read from a clock: whoever stops the whole container for a
        while and lets it go on must not find that everybody was silent.
        """
        took_jobs, proven, silent_s, listening = False, False, 0.0, True
        while True:
            dead = child.poll() is not None  # asked before the look: its last sign is still to be seen
            if not listening:
                # It has closed its end, and lives: nothing will ever be heard of it.
                with suppress(subprocess.TimeoutExpired):
                    child.wait(POLL_WORKER_S)
                silent_s += POLL_WORKER_S
            elif select.select([signs], [], [], 0 if dead else POLL_WORKER_S)[0]:
                listening = bool(os.read(signs, 4096))
                took_jobs, silent_s = took_jobs or listening, 0.0
            else:
                silent_s += POLL_WORKER_S
            if took_jobs and not proven:  # at once: it may be years until it dies
                proven = True
                with self._lock:
                    self._proven, self._failed_starts[device.name] = True, -1  # its death makes it 0
            if dead:
                return took_jobs
            if took_jobs and silent_s >= self._stalled_after_s and not self._stopping.is_set():
                text = "%s: worker process %d has shown no sign of life for %.0f s: killed"
                log.error(text, device.name, child.pid, silent_s)
                child.kill()
                return took_jobs

    def _gives_up(self, device: Device, *, hopeless: bool) -> bool:
        """Count the failed starts of a device; end everything where every one of them has too many.

        One is too many where it is `hopeless`, as what is wrong stands in the settings. It may be the one GPU
        that is broken all the same: whether the others say so, too, is waited for.
        """
        with self._lock:
            hopeless = hopeless and not self._proven
            self._failed_starts[device.name] += STARTS if hopeless else 1
            fewest = min(self._failed_starts.values())
        if fewest < STARTS:
            return False
        if not hopeless:
            log.error("%s: the worker could not start, %d times in a row: given up", device.name, fewest)
        self._end(timeout_s=self._timeout_s)
        return True

    def _end(self, *, timeout_s: float) -> None:
        """Ask all children to end within so many seconds; whoever asks twice has them end at once.

        Each sees to it that it does, and hands back what it cannot finish. One that does not is killed.
        """
        with self._lock:
            self._stopping.set()
            for child in self._children.values():
                child.terminate()
        timer = threading.Timer(timeout_s + HAND_BACK_S, self._kill)
        timer.daemon = True
        timer.start()

    def _kill(self) -> None:
        with self._lock:
            for device, child in self._children.items():
                if child.poll() is None:
                    log.error("%s: worker process %d does not end: killed", device, child.pid)
                    child.kill()
