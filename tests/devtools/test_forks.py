"""A program in a fork is a process like any other to whoever starts it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from devtools import forks

PROGRAM = """
import atexit, logging, os, signal, sys, tempfile, threading
told = int(sys.argv[1])
has_handlers = signal.getsignal(signal.SIGTERM) != signal.SIG_DFL or logging.getLogger().handlers
if has_handlers or os.getsid(0) != os.getpid():
    os._exit(66)
try:
    os.fstat(int(os.environ["CLOSED"]))
    os._exit(67)
except OSError:
    pass
atexit.register(lambda: os.write(told, b"left"))
threading.Timer(0.1, lambda: os.write(told, b"waited ")).start()
os.write(told, f"{sys.argv[2:]} {[*os.environ]} {tempfile.gettempdir()} ".encode())
if sys.argv[2] == "wait":
    sys.stdin.read()
sys.exit(int(sys.argv[3]))
"""


@dataclass
class Starts:
    """Starts the program as a supervisor does it: in a thread of a pool."""

    folder: Path
    told: int  # where the program writes to
    closed: int  # a file that it does not get

    def __call__(self, *words: str) -> forks.Popen:
        program = self.folder / "program.py"
        program.write_text(PROGRAM)

        def start() -> forks.Popen:
            return forks.Popen(
                [sys.executable, "-P", str(program), str(self.told), *words],
                stdin=forks.PIPE,
                pass_fds=[self.told],
                env={"TMPDIR": str(self.folder), "CLOSED": str(self.closed)},
                start_new_session=True,
            )

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(start).result()


@pytest.fixture
def starts(tmp_path: Path) -> Iterator[Starts]:
    listens, told = os.pipe()
    yield Starts(tmp_path, told, listens)
    os.close(listens)
    os.close(told)


def test_it_has_its_words_files_and_environment_and_ends_as_a_program_ends(starts: Starts) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        process = starts("a b", "7")
        assert process.wait(30) == process.poll() == 7
    finally:
        signal.signal(signal.SIGTERM, before)
    process.stdin.close()
    said = os.read(starts.closed, 1000).decode()
    assert said == f"['a b', '7'] ['TMPDIR', 'CLOSED'] {starts.folder} waited left"


def test_it_can_be_waited_for_and_sent_signals(starts: Starts) -> None:
    process = starts("wait", "0")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert process.poll() is None
    waiting = threading.Thread(target=process.wait)
    waiting.start()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    waiting.join()
    process.terminate()  # it is gone
    process.stdin.close()


def test_it_sees_that_its_parent_has_ended(starts: Starts) -> None:
    process, other = starts("wait", "3"), starts("wait", "4")
    process.stdin.close()
    assert process.wait(30) == 3
    assert other.poll() is None
    other.stdin.close()
    assert other.wait(30) == 4
