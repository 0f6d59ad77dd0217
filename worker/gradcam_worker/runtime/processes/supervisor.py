"""`gradcam worker`: keeps a Celery worker process alive on each device, and ends them cleanly.

A worker process that dies (out of memory, a crash in native code, a broker restart that Celery does not
survive) is restarted after a pause, and so is one that shows no sign of life (see
`gradcam_worker.runtime.liveness`). If none gets as far as taking jobs, the supervisor gives up; at once if
each reports wrong settings. As long as one works, the others are restarted: a broken GPU must not end the
work of seven good ones, again and again, as it would if the service manager restarted everything.
"""

import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.observability import native_output
from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.runtime import devices
from gradcam_worker.runtime.devices import Device
from gradcam_worker.runtime.liveness import WORKS
from gradcam_worker.settings import AUTO, Settings
from gradcam_worker.text.log_events import EventLogger

if TYPE_CHECKING:
    from gradcam_worker.runtime.processes.host_telemetry import HostTelemetry

log = EventLogger("gradcam.supervisor")

WORKER = (sys.executable, "-P", "-m", "gradcam_worker", "worker", "--unsupervised", "--ready-fd")
MIN_JOB_THREADS = 4  # of a job process
ENGINE_CORES = 1  # of the share of a GPU
# A job takes 7 to 14 ms of a job process, so these bring 1000 to 2000 jobs a second, and more rows of shards.
MAX_AUTO_JOB_PROCESSES = 16
# Of job processes: the C library would keep a heap for each of a process's many threads and give little of it
# back, and OpenBLAS would start a thread for each core, in each process.
LIGHT = {
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),  # with 1 MiB each job asked the system for its arrays anew
    "MALLOC_TRIM_THRESHOLD_": str(8 * 2**20),
    "OPENBLAS_NUM_THREADS": "1",
}
MAX_FAILED_STARTS = 5  # in a row, on every device, before the supervisor gives up
RESTART = RetryPolicy(first_s=0.5, max_s=30.0)  # short after one crash, long on a broken device
SIGNAL_POLL_INTERVAL_S = 0.5  # see `_next_event`
LAST_PORT = 65_535
MAX_SOCKET_PATH_BYTES = 107  # of Linux
FOLDER_PREFIX = "gradcam-sockets-"
LEFT_AFTER_S = (
    3600  # since anything was made in a folder: its processes may outlive their supervisor for a while
)
WORKER_POLL_INTERVAL_S = 1.0  # between two checks whether a worker has died: the pipe may stay open
REQUEUE_TIMEOUT_S = 10.0  # for a worker whose time is up to requeue its running jobs
ENDED_CLEANLY = {0, -signal.SIGTERM}  # the latter before Celery handles the signal


@dataclass(frozen=True, eq=False)
class Process:
    """A process that the supervisor keeps alive."""

    name: str  # in log lines
    label: str  # in metrics: "engine-0", "jobs-0-1"
    role: Literal["worker", "engine", "jobs"]  # "worker" is both others in one
    device: Device
    variables: Mapping[str, str]


def plan_processes(
    chosen: Sequence[Device], settings: Settings, cores: Callable[[], int] = devices.usable_cores
) -> list[Process]:
    """Choose the processes of each device: one worker, or an engine and several processes for jobs.

    What the settings do not say, as the number of threads, stays what it is for a device: job processes share
    it. So as many jobs are there at a time as keep the device busy, twice a batch.

    Args:
        chosen: The devices.
        settings: `job_processes`, and what job processes share.
        cores: Counts the cores that the processes of all devices may use.

    Raises:
        InvalidSettings: This system has no memory that an engine can share with its job processes.
    """
    processes = []
    for device in chosen:
        count = _count_job_processes(device, settings, len(chosen), cores)
        if not count:
            processes.append(Process(device.name, f"worker-{device.number}", "worker", device, {}))
            continue
        label, variables = f"engine-{device.number}", {"GRADCAM_ROLE": "engine"}
        processes.append(Process(f"{device.name}, engine", label, "engine", device, variables))
        has_core_each = cores() >= (count + ENGINE_CORES) * len(chosen)
        variables = _job_variables(device, settings, count, has_core_each=has_core_each)
        processes += [
            Process(
                f"{device.name}, jobs {number}", f"jobs-{device.number}-{number}", "jobs", device, variables
            )
            for number in range(1, count + 1)
        ]
    return processes


def _count_job_processes(
    device: Device, settings: Settings, device_count: int, cores: Callable[[], int]
) -> int:
    """The number of job processes of a device; 0: one process does everything. Raises InvalidSettings."""
    if settings.job_processes and not hasattr(os, "memfd_create"):
        if settings.job_processes == AUTO:
            return 0
        message = f"GRADCAM_JOB_PROCESSES: {settings.job_processes} needs Linux; 0 works everywhere."
        raise InvalidSettings(message)
    if settings.job_processes != AUTO:
        return settings.job_processes
    if not device.is_gpu:
        return 0
    return min(max(cores() // device_count - ENGINE_CORES, 1), MAX_AUTO_JOB_PROCESSES)


def _job_variables(device: Device, settings: Settings, count: int, *, has_core_each: bool) -> dict[str, str]:
    """The variables of each of so many job processes of a device.

    `has_core_each`: whether there is a core for each process of the host.
    """
    variables = {"GRADCAM_ROLE": "jobs"}
    if "one_core" not in settings.model_fields_set and not has_core_each:
        variables["GRADCAM_ONE_CORE"] = "false"
    least = {  # of each process
        "threads": MIN_JOB_THREADS,
        "max_bytes_in_flight": settings.max_image_bytes,
        "max_pixels_in_flight": settings.max_image_pixels,
    }
    for name in least.keys() - settings.model_fields_set:
        variable = f"GRADCAM_{name.upper()}"
        variables[variable] = str(max(-(-int(device.environment[variable]) // count), least[name]))
    return variables | {name: value for name, value in LIGHT.items() if name not in device.environment}


@contextmanager
def _socket_folder() -> Iterator[Path]:
    """Make a folder for sockets, which only this user can open; remove it in the end.

    It is locked meanwhile: systemd-tmpfiles removes from /tmp what is ten days old, but nothing in a folder
    with such a lock.
    """
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, ignore_cleanup_errors=True) as name:
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(name)
        finally:
            os.close(folder)


def _remove_left_folders() -> None:
    """Remove the folders of supervisors that were killed: nobody has locked them."""
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError):
            folder = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = os.fstat(folder)
                if status.st_uid == os.getuid() and time.time() - status.st_mtime > LEFT_AFTER_S:
                    shutil.rmtree(left)
            finally:
                os.close(folder)


def _metrics_socket(folder: Path, process: Process) -> Path:
    """Where a process serves its metrics and health, if not at a port."""
    return folder / f"{process.label}.http"


class Supervisor:
    """Runs one worker process on each device, and restarts it, until asked to stop."""

    def __init__(self, settings: Settings, command: tuple[str, ...] = WORKER) -> None:
        """No process is started yet.

        Args:
            settings: The settings of the supervisor; a worker process gets them in its environment.
            command: Starts a worker process. The file descriptor for its signs of life is added to it.

        Raises:
            InvalidSettings: A device does not exist, or there are too few ports for metrics.
        """
        self._timeout_s = settings.shutdown_timeout_s
        self._stalled_after_s = settings.stalled_after_s
        self._command = command
        self._folder: Path | None = None  # of the sockets, while `run` runs
        self._processes = plan_processes(devices.choose(settings), settings)
        self._settings = settings
        self._has_one_port = bool(settings.metrics_port) and any(
            process.role == "engine" for process in self._processes
        )
        self._telemetry: HostTelemetry | None = None  # of all processes, at that port
        last_port = settings.metrics_port + len(self._processes) - 1
        if settings.metrics_port and not self._has_one_port and last_port > LAST_PORT:
            message = (
                f"GRADCAM_METRICS_PORT: the last of {len(self._processes)} processes would be at {last_port}."
            )
            raise InvalidSettings(message)
        self._metrics_ports = {
            process: settings.metrics_port and settings.metrics_port + number
            for number, process in enumerate(self._processes)
        }
        self._starts = dict.fromkeys(self._processes, 0)
        self._failed_starts = dict.fromkeys(self._processes, 0)  # in a row
        self._children: dict[Process, subprocess.Popen[bytes]] = {}
        self._restarting: set[Process] = set()  # that end because they were asked to, and are started again
        self._proven = False  # whether any process ever took jobs: the settings cannot be wrong
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards the three above; once it is stopping, no child is started
        self._events: SimpleQueue[int | Future[int]] = SimpleQueue()

    def run(self) -> int:
        """Supervise until SIGTERM or SIGINT.

        After the first signal the running jobs may finish within `shutdown_timeout_s`; then they are
        requeued. After a second signal they are requeued at once. A worker that does neither is killed, and
        its jobs are requeued when their leases expire.

        Returns:
            The exit code: 0 after a clean stop; 1 where a worker was killed or given up.
        """
        # A handler may run between any two steps of this thread: it only queues an event.
        signal.signal(signal.SIGTERM, lambda number, _: self._events.put(number))
        signal.signal(signal.SIGINT, lambda number, _: self._events.put(number))
        if any(process.role == "engine" for process in self._processes):
            signal.signal(signal.SIGHUP, lambda number, _: self._events.put(number))
        _remove_left_folders()
        with _socket_folder() as folder:
            self._folder = folder
            self._check_socket_paths(folder)
            if self._has_one_port:
                self._telemetry = self._serve_metrics(self._folder)
            return self._run()

    def _check_socket_paths(self, folder: Path) -> None:
        """Raise InvalidSettings where the paths of the sockets in the folder are too long for the system."""
        paths = [_metrics_socket(folder, process) for process in self._processes if process.role != "worker"]
        longest = max((len(os.fsencode(path)) for path in paths), default=0)
        if longest > MAX_SOCKET_PATH_BYTES:
            message = (
                f"TMPDIR: the path of a socket in {folder} would have {longest} bytes; the system allows "
                f"{MAX_SOCKET_PATH_BYTES}."
            )
            raise InvalidSettings(message)

    def _serve_metrics(self, folder: Path) -> "HostTelemetry":
        """Serve the metrics and health of all processes. Raises InvalidSettings."""
        from gradcam_worker.runtime.processes.host_telemetry import HostProcess, HostTelemetry

        host_processes = [
            HostProcess(
                process.label,
                process.device.number,
                process.role == "engine",
                _metrics_socket(folder, process),
                partial(self._starts.__getitem__, process),
            )
            for process in self._processes
        ]
        telemetry = HostTelemetry(host_processes)
        telemetry.serve(self._settings)
        return telemetry

    def _run(self) -> int:
        signals = 0
        with ThreadPoolExecutor(len(self._processes)) as pool:
            all_done = [pool.submit(self._supervise, process) for process in self._processes]
            for done in all_done:
                done.add_done_callback(self._events.put)
            while not all(done.done() for done in all_done):
                event = self._next_event()
                self._reap_orphans()
                if self._telemetry:
                    self._telemetry.turned()
                if event == signal.SIGHUP:
                    self._restart_engines()
                elif isinstance(event, int):
                    signals += 1
                    self._end(timeout_s=0 if signals > 1 else self._timeout_s)
                elif event and event.exception():
                    self._end(timeout_s=self._timeout_s)
        return max(done.result() for done in all_done)

    def _restart_engines(self) -> None:
        """Replace the engine processes, as after an update of a driver. Jobs wait for their successors."""
        with self._lock:
            if self._stopping.is_set():  # nothing is started any more, and running jobs need their engine
                return
            for process, child in self._children.items():
                if process.role == "engine":
                    log.info("engine_restart_requested", device=process.name, pid=child.pid)
                    self._restarting.add(process)
                    child.terminate()

    def _reap_orphans(self) -> None:
        """Reap the processes that others have left, if they are children of this process now.

        They are where it is the first process of a container: nobody else would reap them.
        """
        if not hasattr(os, "waitid"):  # containers are Linux
            return
        with self._lock, suppress(ChildProcessError):
            ours = {child.pid for child in self._children.values()}
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended and ended.si_pid not in ours:
                os.waitpid(ended.si_pid, os.WNOHANG)
                log.debug("orphan_reaped", pid=ended.si_pid)

    def _next_event(self) -> "int | Future[int] | None":
        """Wait for a signal, or for the end of a process's supervision. Returns None after a timeout.

        The timeout is needed: a signal that another thread receives does not end this thread's wait, but its
        handler runs as soon as this thread wakes up.
        """
        with suppress(Empty):
            return self._events.get(timeout=SIGNAL_POLL_INTERVAL_S)
        return None

    def _supervise(self, process: Process) -> int:
        """Keep one process alive. Returns 1 where it was given up or did not end cleanly."""
        deaths = 0
        while True:
            code, took_jobs = self._run_child(process)
            if self._stopping.is_set():
                return 0 if code in ENDED_CLEANLY else 1
            with self._lock:
                if process in self._restarting:
                    self._restarting.discard(process)
                    continue
            deaths = 1 if took_jobs else deaths + 1
            if self._give_up(process, hopeless=code == os.EX_CONFIG):
                return 1
            delay_s = RESTART.pause_s(deaths)
            log.warning("worker_process_ended", device=process.name, exit_code=code, restart_delay_s=delay_s)
            if self._stopping.wait(delay_s):
                return 0

    def _run_child(self, process: Process) -> tuple[int, bool]:
        """Start a process and wait for its end. Returns its exit code, and whether it ever took jobs."""
        self._starts[process] += 1
        variables = {
            "GRADCAM_METRICS_PORT": str(self._metrics_ports[process]),
            "GRADCAM_STARTS": str(self._starts[process]),
            **process.variables,
        }
        if process.role != "worker":
            variables["GRADCAM_ENGINE_SOCKET"] = f"{self._folder}/engine-{process.device.number}"
        if self._has_one_port and self._folder:
            variables["GRADCAM_METRICS_PORT"] = "0"
            variables["GRADCAM_METRICS_SOCKET"] = str(_metrics_socket(self._folder, process))
        read_fd, write_fd = os.pipe()
        output = native_output.make_pipe()
        variables["GRADCAM_STDERR_PIPE"] = f"{output.read_fd},{output.write_fd}"
        with (
            os.fdopen(read_fd, "rb") as signs,
            os.fdopen(write_fd, "wb") as childs_end,
            os.fdopen(output.read_fd, "rb") as errors,
            os.fdopen(output.write_fd, "wb") as childs_errors,
        ):
            with self._lock:
                if self._stopping.is_set():
                    return 0, False
                child = self._children[process] = subprocess.Popen(
                    (*self._command, str(write_fd)),
                    stdin=subprocess.PIPE,  # closed when this process ends: see parent_watch
                    pass_fds=[write_fd, *output],
                    env={**process.device.environment, **variables},
                    start_new_session=True,  # Ctrl-C reaches the supervisor alone, which forwards it once
                )
            childs_end.close()
            childs_errors.close()
            log.info("worker_process_started", device=process.name, pid=child.pid)
            took_jobs = self._watch(process, child, signs.fileno())
            code = child.wait()
            native_output.log_last_output(errors.fileno(), device=process.name, pid=child.pid)
            with self._lock:
                del self._children[process]
                if self._stopping.is_set():
                    self._end_unused_engines()
            if child.stdin:
                child.stdin.close()
            return code, took_jobs

    def _watch(self, process: Process, child: "subprocess.Popen[bytes]", signs_fd: int) -> bool:
        """Wait until a worker is dead, or has been killed because it stalled. Returns whether it ever took
        jobs.

        The seconds of silence are counted, not read from a clock: after a pause of the whole container no
        worker must count as silent.
        """
        took_jobs, proven, silent_s, listening, signs = False, False, 0.0, True, b""
        while True:
            dead = child.poll() is not None  # asked first: its last sign may be unread
            if not listening:
                # It lives, but has closed the pipe: no sign will ever come.
                with suppress(subprocess.TimeoutExpired):
                    child.wait(WORKER_POLL_INTERVAL_S)
                silent_s += WORKER_POLL_INTERVAL_S
            elif select.select([signs_fd], [], [], 0 if dead else WORKER_POLL_INTERVAL_S)[0]:
                received = os.read(signs_fd, 4096)
                listening, silent_s, signs = bool(received), 0.0, received or signs
                took_jobs = took_jobs or WORKS in received
            else:
                silent_s += WORKER_POLL_INTERVAL_S
            if took_jobs and not proven:  # not after its end, which may be years away
                proven = True
                with self._lock:
                    self._proven, self._failed_starts[process] = True, -1  # its end makes it 0
            if dead:
                return took_jobs
            if signs and silent_s >= self._stalled_after_s and not self._stopping.is_set():
                log.error(
                    "worker_process_stalled",
                    device=process.name,
                    pid=child.pid,
                    silent_s=round(silent_s),
                    reason="it showed no sign of life and is killed",
                )
                child.kill()
                return took_jobs

    def _give_up(self, process: Process, *, hopeless: bool) -> bool:
        """Count a failed start. If every process of its role has too many, end all. Returns whether it did.

        A single failure is too many if it is `hopeless`: the settings are wrong. It may be a broken GPU
        nevertheless, so the processes of the other devices have to report it, too.
        """
        with self._lock:
            hopeless = hopeless and not self._proven
            self._failed_starts[process] += MAX_FAILED_STARTS if hopeless else 1
            fewest = min(count for other, count in self._failed_starts.items() if other.role == process.role)
        if fewest < MAX_FAILED_STARTS:
            return False
        if not hopeless:
            log.error("worker_process_given_up", device=process.name, failed_starts=fewest)
        self._end(timeout_s=self._timeout_s)
        return True

    def _end(self, *, timeout_s: float) -> None:
        """Ask all worker processes to end within `timeout_s`; asked a second time they end at once.

        Each requeues the jobs that it cannot finish. A process that does not end is killed.
        """
        if self._telemetry:
            self._telemetry.stopping()
        with self._lock:
            self._stopping.set()
            for process, child in self._children.items():
                if process.role != "engine":
                    child.terminate()
            self._end_unused_engines()
        timer = threading.Timer(timeout_s + REQUEUE_TIMEOUT_S, self._kill)
        timer.daemon = True
        timer.start()

    def _end_unused_engines(self) -> None:
        """End the engines whose job processes have ended: running jobs need their engine."""
        used = {process.device.name for process in self._children if process.role == "jobs"}
        for process, child in self._children.items():
            if process.role == "engine" and process.device.name not in used:
                child.terminate()

    def _kill(self) -> None:
        with self._lock:
            for process, child in self._children.items():
                if child.poll() is None:
                    log.error(
                        "worker_process_stop_timed_out",
                        device=process.name,
                        pid=child.pid,
                        reason="it is killed",
                    )
                    child.kill()
