"""Python programs in forks of this process, which has imported what they need.

    forks.Popen((sys.executable, "-P", "program.py", "word"), env=..., pass_fds=[7])

`Popen`, with `PIPE` and `TimeoutExpired`, stands for the module `subprocess` where a supervisor starts its
processes. A fork is a process of its own, with its own environment, files, signals and exit code; only what
/proc tells of its command and its first environment is this process's.
"""

import atexit
import builtins
import logging
import os
import runpy
import select
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import thread as pools
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import PIPE, TimeoutExpired
from typing import Any, NoReturn

__all__ = ["PIPE", "Popen", "TimeoutExpired", "end_with", "keep_files", "run"]

FIRST_FD = 3  # after the standard streams


def run(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a program, as `python WORDS` does.

    Args:
        words: `-P`, `-W` and what it takes, the program's file or `-m` and a module, its arguments.
        environment: All of it.
    """
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # the environment names it
    words, finds_neighbours = [*words], True
    while words[0] in {"-P", "-W"}:
        if words.pop(0) == "-P":
            finds_neighbours = False
        else:
            given: Any = words.pop(0).split(":")
            action, _, category, module = given
            warnings.filterwarnings(action, category=getattr(builtins, category), module=module)
    sys.argv = words
    is_module = words[0] == "-m"
    if finds_neighbours:
        sys.path.insert(0, str(Path.cwd() if is_module else Path(words[0]).resolve().parent))
    if is_module:
        del words[0]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def keep_files(wanted: Iterable[int]) -> None:
    """Close all files of this process but these and the standard streams."""
    last = FIRST_FD - 1
    for fd in [*sorted(fd for fd in wanted if fd > last), os.sysconf("SC_OPEN_MAX")]:
        if fd > last + 1:  # else `closerange` would close all that follow
            os.closerange(last + 1, fd)
        last = fd


class Popen:
    """A program in a fork: what of `subprocess.Popen` a supervisor needs. It may be called in any thread."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,  # noqa: ARG002  # PIPE, always
        pass_fds: Iterable[int],
        env: Mapping[str, str],
        start_new_session: bool,  # noqa: ARG002  # always
    ) -> None:
        """Start it, with a pipe as its standard input, in a new session.

        Args:
            command: The interpreter, and what `run` takes.
            stdin: `PIPE`.
            pass_fds: As for `subprocess.Popen`.
            env: All of its environment.
            start_new_session: True.
        """
        self.returncode: int | None = None
        self._lock = threading.Lock()
        reads, writes = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            _be(command[1:], reads, pass_fds, env)
        os.close(reads)
        self.stdin = os.fdopen(writes, "wb")

    def poll(self) -> int | None:
        """Return its exit code; None: it runs."""
        with self._lock:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code once it has ended. Raises TimeoutExpired."""
        with suppress(ProcessLookupError):  # another thread has waited for it
            ended = os.pidfd_open(self.pid)
            try:
                select.select([ended], [], [], timeout)
            finally:
                os.close(ended)
        code = self.poll()
        if code is None:
            raise TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _be(words: Sequence[str], stdin: int, files: Iterable[int], environment: Mapping[str, str]) -> None:
    """Run a program in this process, a fork, to its end."""
    try:
        os.setsid()
        os.dup2(stdin, 0)
        keep_files(files)
        sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):  # which exec would have reset
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.getLogger().handlers.clear()  # the program says how it logs
        pools._threads_queues.clear()  # type: ignore[attr-defined]  # noqa: SLF001  # threads of the parent
        end_with(partial(run, words, environment))
    finally:
        os._exit(1)


def end_with(program: Callable[[], object]) -> NoReturn:
    """Run a program in this process, a fork, and end as the interpreter does.

    But free nothing: to go through all that is imported would copy it.
    """
    code = 1
    try:
        code = _code_of(program)
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001  # waits for threads
        atexit._run_exitfuncs()  # noqa: SLF001
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        if code == -signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code)


def _code_of(program: Callable[[], object]) -> int:
    """Run a program; return its exit code."""
    try:
        program()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0
