"""A forked program is a process like any other to whoever starts it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from devtools import processes, warm_python

PROGRAM = """
import os, sys, warnings
print(sys.argv[1:], os.getcwd(), os.environ["ASKED"], sys.stdin.read(), "fractions" in sys.modules)
print(__name__, file=sys.stderr)
if sys.argv[1:] == ["warn"]:
    warnings.warn("old", DeprecationWarning)
if sys.argv[1:2] == ["die"]:
    os.kill(os.getpid(), int(sys.argv[2]))
sys.exit(7)
"""
WAITS = """
import os, sys, time
os.write(int(sys.argv[1]), f"{os.getpid()} {' '.join(sys.path)}\\n".encode())
time.sleep(600)
"""


def test_a_program_has_its_words_folder_environment_streams_and_end(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, "ASKED": "yes"},
            input="given",
            capture_output=True,
            text=True,
            check=False,
        )

    with warm_python.running(tmp_path / "warm", ["fractions"]) as programs:
        ended = run(programs / "python", "program.py", "a", "b c")
        assert (ended.returncode, ended.stderr) == (7, "__main__\n")
        assert ended.stdout == f"['a', 'b c'] {tmp_path} yes given True\n"
        strict = ["-W", "error::DeprecationWarning:__main__"]
        assert "DeprecationWarning: old" in run(programs / "python", *strict, "program.py", "warn").stderr
        for number in (signal.SIGKILL, signal.SIGINT):
            assert run(programs / "python", "program.py", "die", str(int(number))).returncode == -number
        assert run(programs / "gradcam", "no-command").returncode == 2
        code = "import sys; print(sys.executable, 'fractions' in sys.modules)"
        assert run(programs / "python", "-c", code).stdout == f"{sys.executable} False\n", (
            "it is Python itself"
        )
        (tmp_path / "waits.py").write_text(WAITS)
        listens, told = os.pipe()
        words = [str(programs / "python"), "-P", str(tmp_path / "waits.py"), str(told)]
        with os.fdopen(listens) as said, subprocess.Popen(words, pass_fds=[told]) as waits:
            os.close(told)
            forked, *path = said.readline().split()
            assert str(tmp_path) not in path, "-P"
            end = time.monotonic() + 30
            while int(forked) not in processes.children(os.getpid()):
                assert time.monotonic() < end
            waits.terminate()
            assert waits.wait(30) == -signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(int(forked), 0)
