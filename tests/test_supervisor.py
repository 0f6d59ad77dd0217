"""The supervisor over small programs; over the real worker in `live/test_kill.py`."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

TIMEOUT_S = 40


def supervise(child: str, *, started: Path | None = None, signals: int = 0) -> tuple[int, str]:
    """Run a supervisor over a Python program in a process of its own; send it SIGTERM when it is up."""
    program = textwrap.dedent(f"""
        import logging, sys
        from worker.settings import Settings
        from worker.supervisor import Supervisor
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        sys.exit(Supervisor(Settings(shutdown_timeout_s=1), (sys.executable, "-c", {child!r})).run())
    """)
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as supervisor:
        for _ in range(signals):
            end = time.monotonic() + TIMEOUT_S
            while started and not started.exists():
                assert time.monotonic() < end
                time.sleep(0.02)
            supervisor.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        _, said = supervisor.communicate(timeout=TIMEOUT_S)
    return supervisor.returncode, said


def test_a_worker_that_cannot_start_is_given_up_with_a_sentence() -> None:
    code, said = supervise("raise SystemExit(3)")
    assert code == 1
    assert said.count("the worker ended unasked (exit code 3)") == 4
    assert "the worker could not start, 5 times in a row: given up" in said


def test_a_worker_is_asked_to_end_and_ends_cleanly(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    child = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
pathlib.Path({str(mark)!r}).touch()
time.sleep(60)
"""
    assert supervise(child, started=mark, signals=1)[0] == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_worker_that_does_not_end_is_killed_after_the_limit_or_by_a_second_signal(
    tmp_path: Path, signals: int
) -> None:
    mark = tmp_path / "started"
    child = f"""
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({str(mark)!r}).touch()
time.sleep(60)
"""
    assert supervise(child, started=mark, signals=signals)[0] == 1


def test_a_worker_that_took_jobs_is_started_again_however_often_it_dies(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    child = f"""
import os, sys
os.write(int(sys.argv[1]), b"1")
with open({str(lives)!r}, "a") as file: file.write("x")
os.abort()
"""
    program = textwrap.dedent(f"""
        import sys
        from worker import supervisor
        from worker.settings import Settings
        supervisor.BACKOFF_S = 0.01
        sys.exit(supervisor.Supervisor(Settings(), (sys.executable, "-c", {child!r})).run())
    """)
    with subprocess.Popen([sys.executable, "-c", program]) as supervisor:
        end = time.monotonic() + TIMEOUT_S
        while not lives.exists() or len(lives.read_text()) <= 6:
            assert supervisor.poll() is None, "given up"
            assert time.monotonic() < end
            time.sleep(0.05)
        supervisor.terminate()
        assert supervisor.wait(TIMEOUT_S) in {0, 1}, "1 where the signal met a worker that was just dying"


def test_a_worker_that_is_stopped_while_it_starts_ends_cleanly(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    child = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    assert supervise(child, started=mark, signals=1)[0] == 0
