"""The supervisor over small programs; over the real worker in `live/test_worst_days.py`."""

import ctypes
import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.runtime import devices
from gradcam_worker.runtime.devices import Device
from gradcam_worker.runtime.processes import supervisor as supervisor_module
from gradcam_worker.runtime.processes.supervisor import Supervisor, plan_processes
from gradcam_worker.settings import Settings

TIMEOUT_S = 40
PR_SET_CHILD_SUBREAPER = 36
OWN = ("GRADCAM_METRICS_PORT", "GRADCAM_STARTS")


class Started:
    """A supervisor over a Python program, on a host of so many GPUs, in a fork of this process."""

    def __init__(
        self,
        child: str,
        *,
        gpus: int = 0,
        limit_s: float = 1,
        stalled_after_s: float = 60,
        job_processes: int = 0,
        first: Callable[[], object] = lambda: None,
    ) -> None:
        def run() -> None:
            os.dup2(writes, sys.__stderr__.fileno())  # type: ignore[union-attr]  # pytest has one
            logging.basicConfig(stream=sys.__stderr__, level=logging.INFO, format="%(message)s", force=True)
            devices._local_gpus = lambda *_: [str(number) for number in range(gpus)]
            supervisor_module.RESTART = RetryPolicy(0.01, 30)
            supervisor_module.REQUEUE_TIMEOUT_S, supervisor_module.WORKER_POLL_INTERVAL_S = 1, 0.2
            settings = Settings(shutdown_timeout_s=limit_s, job_processes=job_processes)
            settings = settings.model_copy(update={"stalled_after_s": stalled_after_s})
            first()
            sys.exit(Supervisor(settings, (sys.executable, "-c", child)).run())

        reads, writes = os.pipe()
        self.process = get_context("fork").Process(target=run)
        self.process.start()
        os.close(writes)
        self._said = os.fdopen(reads)

    def end(self) -> tuple[int | None, str]:
        """Wait for its end. Return its exit code, and what it and its workers have written."""
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(self._said.read()))
        reader.start()
        self.process.join(TIMEOUT_S)
        reader.join(TIMEOUT_S)
        self.process.kill()
        self._said.close()
        return self.process.exitcode, "".join(said)


def supervise(
    child: str, *, started: tuple[Path, ...] = (), signals: int = 0, **options: Any
) -> tuple[int | None, str]:
    """Run a supervisor; send it SIGTERM when all its workers are up."""
    supervisor = Started(child, **options)
    for _ in range(signals):
        wait_for(lambda: all(mark.exists() for mark in started))
        supervisor.process.terminate()
        time.sleep(0.2)
    return supervisor.end()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


GPUS = [Device(f"GPU {number}", Settings(threads=64).to_environment(), is_gpu=True) for number in range(2)]
CPU = Device("cpu", Settings().to_environment())


def roles(chosen: list[Device], settings: Settings, cores: int = 2) -> list[str]:
    return [process.role for process in plan_processes(chosen, settings, lambda: cores)]


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, 1), (2, 1), (8, 3), (9, 3), (16, 7), (34, 16), (400, 16)], ids=str
)
def test_each_gpu_has_a_job_process_for_each_core_of_its_share_but_one(cores: int, expected: int) -> None:
    assert roles(GPUS, Settings(), cores) == 2 * ["engine", *["jobs"] * expected]


def test_on_a_cpu_whose_cores_compute_one_process_does_everything() -> None:
    assert roles([CPU], Settings(), 64) == ["worker"]


def test_the_number_of_job_processes_may_be_given() -> None:
    assert roles([CPU], Settings(job_processes=3)) == ["engine", "jobs", "jobs", "jobs"]
    assert roles(GPUS, Settings(job_processes=0), 64) == ["worker", "worker"]


def variables(count: int, **settings: Any) -> Mapping[str, str]:
    """Of the job processes of a GPU, without the prefix."""
    chosen = Settings(job_processes=count, **settings)
    device = Device("GPU 0", Settings(**{"threads": 64, **settings}).to_environment(), is_gpu=True)
    plan = plan_processes([device], chosen)
    found = [process.variables for process in plan if process.role == "jobs"]
    assert len(found) == count
    assert all(one == found[0] for one in found)
    return {name.removeprefix("GRADCAM_"): value for name, value in found[0].items()}


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_job_processes_share_what_one_process_would_have(count: int) -> None:
    shared = variables(count)
    assert 64 <= count * int(shared["THREADS"]) < 64 + count, "twice a batch"
    total = Settings()
    assert count * int(shared["MAX_BYTES_IN_FLIGHT"]) == total.max_bytes_in_flight or count == 5
    assert int(shared["MAX_PIXELS_IN_FLIGHT"]) == max(
        -(-total.max_pixels_in_flight // count), total.max_image_pixels
    )


def test_what_is_given_is_of_each_job_process() -> None:
    given = {"threads": 10, "max_bytes_in_flight": 1000, "max_pixels_in_flight": 2000}
    assert not {name.upper() for name in given} & variables(2, **given).keys()
    assert variables(32)["THREADS"] == "4", "fewer would leave a process idle"


def test_job_processes_have_few_heaps_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = devices.choose(Settings(devices="cpu"))
    light = plan_processes(host, Settings(job_processes=1))[1]
    assert light.variables["MALLOC_ARENA_MAX"] == "2"
    assert light.device.environment["TOKIO_WORKER_THREADS"] == "1"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    host = devices.choose(Settings(devices="cpu"))
    assert "MALLOC_ARENA_MAX" not in plan_processes(host, Settings(job_processes=1))[1].variables


@pytest.mark.parametrize(("cores", "is_off"), [(4, False), (3, True)])
def test_job_processes_stay_on_one_core_where_there_is_one_for_each_process(cores: int, is_off: bool) -> None:
    def variable(**settings: Any) -> str | None:
        plan = plan_processes(GPUS[:1], Settings(job_processes=3, **settings), lambda: cores)
        return plan[-1].variables.get("GRADCAM_ONE_CORE")

    assert variable() == ("false" if is_off else None)
    assert variable(one_core=True) is None


def test_a_worker_that_cannot_start_is_given_up_with_a_sentence() -> None:
    code, said = supervise("raise SystemExit(3)")
    assert code == 1
    assert said.count("exit_code=3 ") == said.count("worker_process_ended") == 4
    assert 'worker_process_given_up device="default device" failed_starts=5' in said


def test_wrong_settings_end_everything_at_once_and_are_not_tried_again() -> None:
    code, said = supervise("import os; os._exit(os.EX_CONFIG)")
    assert code == 1
    assert "worker_process_ended" not in said
    code, more = supervise("import os; os._exit(os.EX_CONFIG)", gpus=2)
    assert code == 1
    assert "given_up" not in said + more


ENGINE = """
import os, sys, time
if os.environ["GRADCAM_ROLE"] == "jobs": time.sleep(3600)
os.write(int(sys.argv[1]), b"0")
time.sleep(0.1)
"""


def test_an_engine_that_shows_life_but_never_works_is_given_up_with_its_job_processes() -> None:
    code, said = supervise(ENGINE + "os._exit(3)", job_processes=2)
    assert code == 1
    assert said.count("exit_code=3 ") == said.count("worker_process_ended") == 4
    assert 'worker_process_given_up device="default device, engine" failed_starts=5' in said
    code, said = supervise(ENGINE + "os._exit(os.EX_CONFIG)", job_processes=2)
    assert code == 1
    assert "worker_process_ended" not in said, "wrong settings are not tried again"


def test_an_engine_that_hangs_before_it_works_is_killed(tmp_path: Path) -> None:
    child = "os.write(fd, b'0')\nif first: time.sleep(3600)\nshows(3600)"
    said = lives(tmp_path, child, lambda pids: len(pids) == 2, stalled_after_s=2)
    assert said.count("worker_process_stalled") == said.count("silent_s=2 ") == 1


def test_an_engine_is_not_restarted_once_its_job_processes_have_been_asked_to_end() -> None:
    supervisor, ended = Supervisor(Settings(job_processes=1)), list[str]()
    for process in supervisor._processes:
        child: Any = SimpleNamespace(pid=1, terminate=partial(ended.append, process.role))
        supervisor._children[process] = child
    supervisor._restart_engines()
    assert ended == ["engine"]
    supervisor._stopping.set()
    supervisor._restart_engines()
    assert ended == ["engine"]


def test_a_folder_whose_name_is_too_long_for_sockets_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(InvalidSettings, match=r"TMPDIR: the path of a socket in .* the system allows 107"):
        Supervisor(Settings(job_processes=2)).run()


def test_a_system_without_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert Supervisor(Settings())
    with pytest.raises(InvalidSettings, match="GRADCAM_JOB_PROCESSES: 2 needs Linux"):
        Supervisor(Settings(job_processes=2))


def test_settings_with_which_a_worker_has_taken_jobs_are_tried_again(tmp_path: Path) -> None:
    mark = tmp_path / "taken"
    child = f"""
import os, pathlib, sys
if not pathlib.Path({str(mark)!r}).exists():
    pathlib.Path({str(mark)!r}).touch()
    os.write(int(sys.argv[1]), b"1")
os._exit(os.EX_CONFIG)
"""
    code, said = supervise(child)
    assert code == 1
    assert said.count("exit_code=78 ") == 5
    assert 'worker_process_given_up device="default device" failed_starts=5' in said


def test_a_worker_is_asked_to_end_and_ends_cleanly(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    child = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
pathlib.Path({str(mark)!r}).touch()
time.sleep(60)
"""
    assert supervise(child, started=(mark,), signals=1)[0] == 0


@pytest.mark.parametrize(("limit_s", "signals"), [(1, 1), (3600, 2)])
def test_a_worker_that_does_not_end_is_killed_when_it_has_had_the_time_to_hand_back(
    tmp_path: Path, limit_s: float, signals: int
) -> None:
    mark = tmp_path / "started"
    child = f"""
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({str(mark)!r}).touch()
time.sleep(60)
"""
    code, said = supervise(child, started=(mark,), signals=signals, limit_s=limit_s)
    assert code == 1
    assert "worker_process_stop_timed_out" in said


def test_a_second_signal_is_passed_on_and_a_worker_that_hands_back_then_ended_cleanly(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    child = f"""
import pathlib, signal, sys, time
signals = []
def note(*_):
    signals.append(1)
    if len(signals) == 2: sys.exit(0)
signal.signal(signal.SIGTERM, note)
pathlib.Path({str(mark)!r}).touch()
while True: time.sleep(60)
"""
    code, said = supervise(child, started=(mark,), signals=2, limit_s=3600)
    assert code == 0
    assert "is killed" not in said


# Each life writes down its process id; the first one behaves as the test wants it to.
LIFE = """
import os, pathlib, signal, subprocess, sys, time
folder, fd = pathlib.Path({folder!r}), int(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
with folder.joinpath("lives").open("a") as file: print(os.getpid(), file=file)
first = len(folder.joinpath("lives").read_text().split()) == 1
def shows(times):
    for _ in range(times):
        os.write(fd, b"1")
        time.sleep(0.1)
"""


def lives(folder: Path, child: str, until: Callable[[list[str]], object], **options: Any) -> str:
    """Run a supervisor over lives until they are as the test expects; return what it said."""
    child = LIFE.format(folder=str(folder)) + child
    supervisor, mark = Started(child, **options), folder / "lives"
    wait_for(lambda: mark.exists() and until(mark.read_text().split()))
    supervisor.process.terminate()
    return supervisor.end()[1]


def test_a_worker_that_shows_no_sign_of_life_any_more_is_killed_and_started_again(tmp_path: Path) -> None:
    child = "shows(3)\nif first: time.sleep(3600)\nshows(3600)"
    said = lives(tmp_path, child, lambda pids: len(pids) == 2, stalled_after_s=2)
    assert said.count("worker_process_stalled") == said.count("silent_s=2 ") == 1
    assert "exit_code=-9 " in said


def test_a_worker_that_was_stopped_is_killed_and_started_again(tmp_path: Path) -> None:
    child = "shows(3)\nif first: os.kill(os.getpid(), signal.SIGSTOP)\nshows(3600)"
    said = lives(tmp_path, child, lambda pids: len(pids) == 2, stalled_after_s=2)
    assert said.count("worker_process_stalled") == said.count("silent_s=2 ") == 1


def test_a_worker_that_closes_its_end_and_lives_is_killed_and_started_again(tmp_path: Path) -> None:
    child = "shows(3)\nif first: os.close(fd); time.sleep(3600)\nshows(3600)"
    said = lives(tmp_path, child, lambda pids: len(pids) == 2, stalled_after_s=2)
    assert said.count("worker_process_stalled") == said.count("silent_s=2 ") == 1


def test_a_worker_that_is_slow_to_start_is_not_killed(tmp_path: Path) -> None:
    child = """
time.sleep(3)
folder.joinpath("loaded").touch()
shows(3600)
"""
    said = lives(tmp_path, child, lambda _: (tmp_path / "loaded").exists(), stalled_after_s=1)
    assert "worker_process_stalled" not in said


def test_a_death_is_seen_though_somebody_else_holds_the_pipe(tmp_path: Path) -> None:
    child = """
if first:
    shows(1)
    sleep = [sys.executable, "-c", "import time; time.sleep(3600)"]
    held = subprocess.Popen(sleep, pass_fds=[fd], stderr=subprocess.DEVNULL)
    folder.joinpath("holder").write_text(str(held.pid))
    os._exit(3)
shows(3600)
"""
    try:
        said = lives(tmp_path, child, lambda pids: len(pids) == 2, stalled_after_s=3600)
    finally:
        os.kill(int((tmp_path / "holder").read_text()), signal.SIGKILL)
    assert "exit_code=3 " in said


def test_a_worker_that_took_jobs_is_started_again_however_often_it_dies(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    child = f"""
import os, sys
os.write(int(sys.argv[1]), b"1")
with open({str(lives)!r}, "a") as file: file.write("x")
os.abort()
"""
    supervisor = Started(child)
    wait_for(lambda: not supervisor.process.is_alive() or (lives.exists() and len(lives.read_text()) > 6))
    assert supervisor.process.is_alive(), "given up"
    supervisor.process.terminate()
    assert supervisor.end()[0] in {0, 1}, "1 where the signal met a worker that was just dying"


def test_a_worker_that_is_stopped_while_it_starts_ends_cleanly(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    child = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    assert supervise(child, started=(mark,), signals=1)[0] == 0


PER_GPU = """
import os, pathlib, signal, sys, time
folder, gpu = pathlib.Path({folder!r}), os.environ["CUDA_VISIBLE_DEVICES"]
def live(name="started"):
    os.write(int(sys.argv[1]), b"1")
    folder.joinpath(name + gpu).write_text(os.environ["GRADCAM_THREADS"])
    time.sleep(60)
"""


def test_a_signal_that_another_thread_receives_ends_it_too(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    child = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"

    def receive() -> None:
        wait_for(mark.exists)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    assert Started(child, first=threading.Thread(target=receive, daemon=True).start).end()[0] == 0


def test_each_gpu_has_a_worker_of_its_own_and_one_signal_ends_them_all(tmp_path: Path) -> None:
    child = PER_GPU.format(folder=str(tmp_path)) + "signal.signal(15, lambda *_: sys.exit(0))\nlive()"
    marks = tuple(tmp_path / f"started{gpu}" for gpu in range(3))
    code, said = supervise(child, started=marks, signals=1, gpus=3)
    assert code == 0
    assert [mark.read_text() for mark in marks] == ["64"] * 3
    for gpu in range(3):
        assert said.count(f'worker_process_started device="GPU {gpu}"') == 1


@pytest.mark.parametrize("signals", [1, 2])
def test_one_worker_of_several_that_does_not_end_is_killed(tmp_path: Path, signals: int) -> None:
    stubborn = "signal.signal(15, signal.SIG_IGN if gpu == '1' else lambda *_: sys.exit(0))\nlive()"
    marks = tuple(tmp_path / f"started{gpu}" for gpu in range(2))
    child = PER_GPU.format(folder=str(tmp_path)) + stubborn
    assert supervise(child, started=marks, signals=signals, gpus=2)[0] == 1


def test_one_gpus_worker_is_started_again_and_the_others_work_on(tmp_path: Path) -> None:
    dies_once = """
if gpu == "1" and not folder.joinpath("died").exists():
    os.write(int(sys.argv[1]), b"1")
    folder.joinpath("died").touch()
    os.abort()
live()
"""
    marks = tuple(tmp_path / f"started{gpu}" for gpu in range(2))
    child = PER_GPU.format(folder=str(tmp_path)) + dies_once
    code, said = supervise(child, started=marks, signals=1, gpus=2)
    assert code == 0
    assert said.count('worker_process_started device="GPU 0"') == 1
    assert said.count('worker_process_started device="GPU 1"') == 2
    assert 'worker_process_ended device="GPU 1" exit_code=-6 ' in said


@pytest.mark.parametrize("failure", [3, os.EX_CONFIG])
def test_a_gpu_that_never_works_is_tried_again_as_long_as_another_one_does(
    failure: int, tmp_path: Path
) -> None:
    broken = f"""
if gpu == "1":
    with folder.joinpath("starts").open("a") as file: file.write("x")
    if folder.joinpath("starts").stat().st_size > 7: folder.joinpath("mark1").touch()
    sys.exit({failure})
time.sleep(0.3)  # the other one says first that it cannot
live("mark")
"""
    marks = (tmp_path / "mark0", tmp_path / "mark1")
    child = PER_GPU.format(folder=str(tmp_path)) + broken
    code, said = supervise(child, started=marks, signals=1, gpus=2)
    assert "given_up" not in said
    assert said.count('worker_process_started device="GPU 0"') == 1
    assert code in {0, 1}, "1 where the signal met a worker that was just failing"


def test_starts_that_failed_before_a_worker_took_jobs_are_forgotten(tmp_path: Path) -> None:
    """GPU 0 fails, then works for good; GPU 1 works, then fails."""
    child = (
        PER_GPU.format(folder=str(tmp_path))
        + """
with folder.joinpath("starts" + gpu).open("a") as file: file.write("x")
starts = folder.joinpath("starts" + gpu).stat().st_size
if gpu == "0":
    if starts > 6: live()
    sys.exit(3)
while not folder.joinpath("started0").exists(): time.sleep(0.02)
if starts > 7: live()
if starts == 1: os.write(int(sys.argv[1]), b"1")
sys.exit(3)
"""
    )
    marks = (tmp_path / "started0", tmp_path / "started1")
    code, said = supervise(child, started=marks, signals=1, gpus=2)
    assert "given_up" not in said
    assert code == 0


def test_where_no_gpu_works_all_is_given_up() -> None:
    code, said = supervise("raise SystemExit(3)", gpus=2)
    assert code == 1
    assert said.count("worker_process_given_up") == said.count("failed_starts=5") == 1


def test_a_gpu_that_is_not_there_is_refused_by_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "gradcam_worker", "worker", "--devices", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "asks for GPU 3; there are: none." in done.stderr
    command[-1] = "gpu"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "GRADCAM_DEVICES: 'gpu' must be auto, cpu" in done.stderr


def test_engine_and_job_processes_serve_their_metrics_at_sockets_and_one_port_is_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "_local_gpus", lambda *_: ["0", "1", "2"])
    said = tmp_path / "said"
    own = (*OWN, "GRADCAM_METRICS_SOCKET", "GRADCAM_ENGINE_SOCKET")
    child = f"import os; print(*map(os.environ.get, {own!r}), file=open({str(said)!r}, 'a'))"
    for port in (65_535, 0):
        settings = Settings(metrics_port=port, job_processes=2, devices="0,2")
        supervisor = Supervisor(settings, (sys.executable, "-c", child))
        labels = [process.label for process in supervisor._processes]
        assert labels == ["engine-0", "jobs-0-1", "jobs-0-2", "engine-2", "jobs-2-1", "jobs-2-2"]
        supervisor._folder = tmp_path
        for process in supervisor._processes[2:4]:
            supervisor._run_child(process)
    assert said.read_text().splitlines() == [
        f"0 1 {tmp_path}/jobs-0-2.http {tmp_path}/engine-0",
        f"0 1 {tmp_path}/engine-2.http {tmp_path}/engine-2",
        f"0 1  {tmp_path}/engine-0",
        f"0 1  {tmp_path}/engine-2",
    ]


def test_each_process_has_a_port_of_its_own_for_its_metrics_and_hears_how_often_it_was_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "_local_gpus", lambda *_: ["0", "1"])
    said = tmp_path / "said"
    child = f"import os; print(*map(os.environ.get, {OWN!r}), file=open({str(said)!r}, 'a'))"
    supervisor = Supervisor(Settings(metrics_port=9464, job_processes=0), (sys.executable, "-c", child))
    for process in (*supervisor._processes, supervisor._processes[0]):
        supervisor._run_child(process)
    assert said.read_text().splitlines() == ["9464 1", "9465 1", "9464 2"]
    said.unlink()
    supervisor = Supervisor(Settings(job_processes=0), (sys.executable, "-c", child))
    supervisor._run_child(supervisor._processes[1])
    assert said.read_text() == "0 1\n", "nowhere is not the port beside nowhere"
    with pytest.raises(InvalidSettings, match="the last of 2 processes would be at 65536"):
        Supervisor(Settings(metrics_port=65_535, job_processes=0))


def test_the_first_process_of_a_container_reaps_what_others_have_left(tmp_path: Path) -> None:
    mark = tmp_path / "orphan"
    child = f"""
import os, signal, time
if os.fork() == 0:
    if os.fork() == 0:
        open({str(mark)!r}, "w").write(str(os.getpid()))
    os._exit(0)
os.wait()
time.sleep(60)
"""
    is_subreaper = partial(ctypes.CDLL(None).prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    supervisor = Started(child, first=is_subreaper)
    wait_for(lambda: mark.exists() and mark.read_text())
    wait_for(lambda: not Path(f"/proc/{mark.read_text()}").exists())
    assert supervisor.process.is_alive()
    supervisor.process.terminate()
    assert supervisor.end()[0] == 0


def test_the_folder_of_the_sockets_is_locked_and_those_of_killed_supervisors_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prefix, long_ago_s = supervisor_module.FOLDER_PREFIX, time.time() - 2 * supervisor_module.LEFT_AFTER_S
    left, young, other = (tmp_path / name for name in (f"{prefix}left", f"{prefix}young", "gradcam-left"))
    for folder in (left, young, other):
        folder.mkdir()
        (folder / "engine-0").touch()
    for folder in (left, other):
        os.utime(folder, (long_ago_s, long_ago_s))
    with supervisor_module._socket_folder() as used:
        os.utime(used, (long_ago_s, long_ago_s))
        lock = os.open(used, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(lock)
        supervisor_module._remove_left_folders()
        assert {*tmp_path.iterdir()} == {used, young, other}
    assert not used.exists()
