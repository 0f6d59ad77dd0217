"""A child process that does not outlive its parent, not even a parent that was killed.

The parent holds the writing end of a pipe that is the child's standard input. However the parent
ends, the system closes that end, and the child reads the end of the file. `start` runs any program
below a small keeper that listens for this; a Python program may listen itself, with `watch`.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

GRACE_S = 10  # between asking a program to end and killing it


def start(
    command: Sequence[str],
    *,
    log: Path | IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """Run a program that ends when it is asked to (SIGTERM) or when this process is gone."""
    # -P: a folder named `worker` where the caller stands must not take this package's place.
    keeper = [sys.executable, "-P", "-m", "worker.lifeline", *command]
    output = log.open("ab") if isinstance(log, Path) else log
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
        if isinstance(log, Path) and output:
            output.close()


def stop(process: subprocess.Popen[bytes], timeout_s: float = GRACE_S + 5) -> int:
    """Ask a started program to end, wait, and return its exit code; kill it where it does not."""
    if process.poll() is None:
        process.terminate()
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    if process.stdin:
        process.stdin.close()
    return code


def watch(on_lost: Callable[[], object]) -> None:
    """Call `on_lost` from a thread when whoever started this process is gone."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        on_lost()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _keep(command: Sequence[str]) -> int:
    """Run a program, pass signals on, end it when the parent is gone; return its exit code."""
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def end(*_: object) -> None:
        program.terminate()
        threading.Timer(GRACE_S, program.kill).start()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    watch(end)
    code = program.wait()
    os._exit(code if code >= 0 else 128 - code)  # without waiting for the timer


if __name__ == "__main__":
    _keep(sys.argv[1:])
