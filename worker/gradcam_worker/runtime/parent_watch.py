"""Child processes that do not outlive their parent, not even a parent that was killed.

The parent holds the write end of a pipe that is the child's standard input. However the parent ends, the
system closes it, and the child reads the end of the file. `spawn` runs any program below a small keeper
process that waits for this; a Python program can wait itself, with `on_parent_exit`.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

GRACE_S = 10.0  # between asking a program to end and killing it


def spawn(
    command: Sequence[str],
    *,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
) -> subprocess.Popen[bytes]:
    """Run a program that ends at SIGTERM, or when this process has ended.

    Args:
        command: The program and its arguments.
        log: A file to which its output is appended; None: the output of this process.
        environment: Variables in addition to those of this process.
        grace_s: Seconds between asking it to end and killing it.

    Returns:
        The keeper of the program: end it with `stop`.
    """
    # By its file, without site-packages: the keeper needs neither, and starts in half of the time.
    keeper = [sys.executable, "-I", "-S", __file__, str(grace_s), *command]
    output = log.open("ab") if log else None
    try:
        return subprocess.Popen(
            keeper,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone, which decides
        )
    finally:
        if output:
            output.close()


def stop(process: subprocess.Popen[bytes]) -> int:
    """Ask a program that `spawn` started to end. Waits for that, and returns its exit code."""
    if process.poll() is None:
        process.terminate()  # the keeper kills a program that does not end in time
    code = process.wait()
    if process.stdin:
        process.stdin.close()
    return code


def on_parent_exit(callback: Callable[[], object]) -> None:
    """Call `callback` from a thread when the parent of this process has ended."""

    def wait() -> None:
        # Signals must reach the main thread: one that this thread received would not wake it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while os.read(0, 1024):
            pass
        callback()

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


class _Keeper:
    """Runs one program, forwards signals to it, and ends it when the parent has ended."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._end_requested = False
        self._program: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str]) -> int:
        # First the handlers: a signal before them would end the keeper and leave the program running.
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        self._program = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        if self._end_requested:
            self._end()
        on_parent_exit(self._end)
        return self._program.wait()

    def _end(self, *_: object) -> None:
        self._end_requested = True
        if self._program is None:
            return
        self._program.terminate()
        timer = threading.Timer(self._grace_s, self._program.kill)
        timer.daemon = True
        timer.start()


if __name__ == "__main__":
    _code = _Keeper(float(sys.argv[1])).run(sys.argv[2:])
    sys.exit(_code if _code >= 0 else 128 - _code)
