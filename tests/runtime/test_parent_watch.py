import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gradcam_worker.runtime import parent_watch

TIMEOUT_S = 20


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def wait_for(condition: object, what: str) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"{what} did not happen within {TIMEOUT_S} s"
        time.sleep(0.02)


def test_a_program_runs_and_its_exit_code_comes_back() -> None:
    process = parent_watch.spawn([sys.executable, "-c", "raise SystemExit(7)"])
    assert process.wait(TIMEOUT_S) == 7
    assert parent_watch.stop(process) == 7


def test_stopping_asks_the_program_to_end(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    code = f"import pathlib, time; pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    process = parent_watch.spawn([sys.executable, "-c", code], log=tmp_path / "log")
    wait_for(mark.exists, "the start")
    assert parent_watch.stop(process) == 128 + 15


@pytest.mark.parametrize("signal_name", ["SIGKILL", "SIGTERM"])
def test_a_program_ends_with_a_parent_that_is_killed(tmp_path: Path, signal_name: str) -> None:
    pid_file = tmp_path / "pid"
    write = f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))"
    program = f"import os, pathlib, time; {write}; time.sleep(60)"
    parent = textwrap.dedent(f"""
        import os, pathlib, signal, sys, time
        from gradcam_worker.runtime import parent_watch
        parent_watch.spawn([sys.executable, "-c", {program!r}])
        while not pathlib.Path({str(pid_file)!r}).exists(): time.sleep(0.02)
        os.kill(os.getpid(), signal.{signal_name})
        time.sleep(60)
    """)
    subprocess.run([sys.executable, "-c", parent], check=False, timeout=TIMEOUT_S)
    wait_for(pid_file.read_text, "the start")
    wait_for(lambda: gone(int(pid_file.read_text())), "the end")


def test_a_parent_that_lives_keeps_its_program(tmp_path: Path) -> None:
    process = parent_watch.spawn([sys.executable, "-c", "import time; time.sleep(60)"])
    time.sleep(0.5)
    assert process.poll() is None
    parent_watch.stop(process)


def test_a_folder_named_worker_where_the_caller_stands_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    monkeypatch.chdir(tmp_path)
    process = parent_watch.spawn([sys.executable, "-c", "pass"])
    assert process.wait(TIMEOUT_S) == 0
    parent_watch.stop(process)


def test_a_program_that_does_not_end_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    code = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(mark)!r}).touch(); time.sleep(60)"
    )
    process = parent_watch.spawn([sys.executable, "-c", code], grace_s=0.2)
    wait_for(mark.exists, "the start")
    assert parent_watch.stop(process) == 128 + 9
