"""A child process that does not outlive its parent, not even a parent that was killed.

The parent holds the writing end of a pipe that is the child's standard input. However the parent
ends, the system closes that end, and the child reads the end of the file. `spawn` runs any
program below a small keeper that listens for this; a Python program may listen itself, with `on_parent_exit`.
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
    """Run a program that ends when it is asked to (SIGTERM) or when this process is gone.

    Args:
        command: the program and its arguments.
        log: a file to which its output is appended; None: the output of this process.
        environment: what it gets beside the environment of this process.
        grace_s: after so many seconds it is killed where it has not ended.

    Returns:
        The keeper above the program: ask that to end, with `stop`.
    """
    # -P: a folder named `worker` where the caller stands must not take this package's place.
    keeper = [sys.executable, "-P", "-m", "gradcam_worker.runtime.parent_watch", str(grace_s), *command]
    output = log.open("ab") if log else None
    try:
        return subprocess.Popen(
            keeper,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent, which decides
        )
    finally:
        if output:
            output.close()


def stop(process: subprocess.Popen[bytes]) -> int:
    """Ask a started program to end, wait for it, and return its exit code."""
    if process.poll() is None:
        process.terminate()  # the keeper kills what does not end in time, so this does end
    code = process.wait()
    if process.stdin:
        process.stdin.close()
    return code


def on_parent_exit(callback: Callable[[], object]) -> None:
    """Call `callback` from a thread when whoever started this process is gone."""

    def wait() -> None:
        # Signals are for the main thread, which would not wake up from one that came here.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        while os.read(0, 1024):
            pass
        callback()

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


class _Keeper:
    """Runs one program, passes signals on, and ends it when the parent is gone."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._asked = False
        self._program: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str]) -> int:
        # The handlers come first: a signal that came between would leave the program alone.
        signal.signal(signal.SIGTERM, self._end)
        signal.signal(signal.SIGINT, self._end)
        self._program = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        if self._asked:
            self._end()
        on_parent_exit(self._end)
        return self._program.wait()

    def _end(self, *_: object) -> None:
        self._asked = True
        if self._program is None:
            return
        self._program.terminate()
        timer = threading.Timer(self._grace_s, self._program.kill)
        timer.daemon = True
        timer.start()


if __name__ == "__main__":
    _code = _Keeper(float(sys.argv[1])).run(sys.argv[2:])
    sys.exit(_code if _code >= 0 else 128 - _code)
