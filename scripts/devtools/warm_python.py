"""A Python process that has imported what commands need, and forks for each command that a test runs.

    with warm_python.running(folder, warm_python.COMMANDS) as programs:  # a folder for PATH: gradcam, python
        subprocess.run([programs / "gradcam", "explain", "photo.jpg"])

Most of the CPU time of a command is its imports: half a second, with TensorFlow four. A command is still a
process of its own, with its own folder, environment, standard streams and exit code. It is no test of how a
command starts: what it imports is there already.
"""

import builtins
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from devtools import import_path
from gradcam_worker import extras
from gradcam_worker.runtime import parent_watch

COMMANDS = ("gradcam_worker.cli.commands", "boto3", "celery", "cv2", "pyarrow.dataset")
TENSORFLOW = (*COMMANDS, "gradcam_worker.gradcam.backend")
START_S = 120
LENGTH_BYTES = 4  # before a request, which says how long it is
# Stands for a command: it sends what it was called with, and waits for the end.
STAND_IN = """#!{python} -IS
import array, json, os, signal, socket, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
file = words[:]
while file[:1] == ["-W"]:
    file = file[2:]
if name == "python" and (not file or file[0].startswith("-")):
    os.execv({python!r}, [{python!r}, *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = {{"name": name, "words": words, "folder": os.getcwd(), "environment": dict(os.environ)}}
    request = json.dumps(asked).encode()
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    server.sendmsg([len(request).to_bytes({length})], streams)
    server.sendall(request)
    answers = server.makefile("r")
    process = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(process, number))
    code = int(answers.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextmanager
def running(folder: Path, imported: Sequence[str]) -> Iterator[Path]:
    """Start the process, and make the programs.

    Args:
        folder: An empty one, with a short path.
        imported: The modules that are there already.

    Yields:
        The folder of the programs `gradcam` and `python`.
    """
    programs, address = folder / "programs", folder / "socket"
    programs.mkdir(parents=True)
    text = STAND_IN.format(python=sys.executable, address=str(address), length=LENGTH_BYTES)
    for name in ("gradcam", "python"):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    process = parent_watch.spawn(
        [sys.executable, "-P", __file__, str(address), *imported],
        log=folder / "log",
        environment=import_path(),
    )
    try:
        end = time.monotonic() + START_S
        while not address.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((folder / "log").read_text())
            time.sleep(0.05)
        yield programs
    finally:
        parent_watch.stop(process)


def main(address: str, *imported: str) -> None:
    """Import, then fork for each request; in a fork, run its program and return."""
    extras.run_as_command()  # TensorFlow as commands import it, which is the smaller part
    for module in imported:
        import_module(module)
    gc.freeze()  # a fork neither searches nor copies what is imported
    extras._is_command = False  # noqa: SLF001  # a program is none, until it says so
    if request := _serve(Path(address)):
        _run(request)


def _serve(address: Path) -> dict[str, Any] | None:
    """Answer requests until this process is told to end; return one in each fork."""
    listener = socket.socket(socket.AF_UNIX)
    beginning = address.with_suffix(".new")
    listener.bind(str(beginning))
    listener.listen(64)
    beginning.rename(address)  # it exists once it accepts connections
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                with suppress(EOFError):
                    if request := _begin(connection, selector):
                        selector.close()
                        listener.close()
                        return request
                continue
            process, ended, connection = key.data
            if key.fileobj is connection:  # who asked is gone
                selector.unregister(connection)
                os.kill(process, signal.SIGKILL)
                continue
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            selector.unregister(ended)
            os.close(ended)
            with suppress(KeyError):
                selector.unregister(connection)
            with connection, suppress(OSError):
                connection.sendall(f"{code}\n".encode())


def _begin(connection: socket.socket, selector: selectors.BaseSelector) -> dict[str, Any] | None:
    """Read a request and fork; return the request in the fork. Raises EOFError if there is none."""
    head, streams, _, _ = socket.recv_fds(connection, LENGTH_BYTES, 3)
    with connection.makefile("rb", buffering=0) as rest:
        request = b""
        while len(request) < int.from_bytes(head):
            if not (data := rest.read(int.from_bytes(head) - len(request))):
                raise EOFError
            request += data
    process = os.fork()
    if process:
        for stream in streams:
            os.close(stream)
        connection.sendall(f"{process}\n".encode())
        ended = os.pidfd_open(process)
        for file in (ended, connection):
            selector.register(file, selectors.EVENT_READ, (process, ended, connection))
        return None
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    connection.close()
    asked: dict[str, Any] = json.loads(request)
    return asked


def _run(asked: dict[str, Any]) -> None:
    """Run a program as Python does it, with its folder, environment and words."""
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    words: list[str] = asked["words"]
    sys.orig_argv = [asked["name"], *words]
    if asked["name"] == "gradcam":
        from gradcam_worker.cli.main import main as gradcam

        sys.argv = ["gradcam", *words]
        sys.exit(gradcam())
    while words[0] == "-W":
        given: Any = words[1].split(":")
        action, _, category, module = given
        warnings.filterwarnings(action, category=getattr(builtins, category), module=module)
        words = words[2:]
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).resolve().parent))
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
