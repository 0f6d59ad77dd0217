"""A Python process that has imported what commands need, and forks for each command that a test runs.

    with warm_python.running(folder, warm_python.COMMANDS) as programs:  # a folder for PATH: gradcam, python
        subprocess.run([programs / "gradcam", "explain", "photo.jpg"])

Most of the CPU time of a command is its imports: half a second, with TensorFlow four. A command is still a
process of its own, with its own folder, environment, open files and exit code; `process_of` tells which one.
What it starts by `sys.executable` is such a process, too. It is no test of how a command starts: what it
imports is there already.
"""

import fcntl
import gc
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from devtools import forks, import_path
from gradcam_worker import extras
from gradcam_worker.runtime import parent_watch

OURS = "fork "  # begins the name of a process that stands for another one, see `process_of`
COMMANDS = ("gradcam_worker.cli.commands", "boto3", "celery", "cv2", "pyarrow.dataset")
TENSORFLOW = (*COMMANDS, "gradcam_worker.gradcam.backend")
START_S = 120
LENGTH_BYTES = 4  # before a request, which says how long it is
MAX_FILES = 16  # of a program, when it starts
# Stands for a command: it sends what it was called with, and waits for the end.
STAND_IN = """#!{python} -IS
import array, json, os, signal, socket, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
file = words[:]
while file[:1] in (["-P"], ["-W"]):
    file = file[1 if file[0] == "-P" else 2 :]
if name == "python" and (not file or file[0].startswith("-") and file[0] != "-m"):
    os.execv({python!r}, [{python!r}, *words])
files = []
for number in map(int, os.listdir("/proc/self/fd")):
    try:
        if os.get_inheritable(number):
            files.append(number)
    except OSError:  # it was of the folder that was listed
        pass
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = {{
        "program": os.path.abspath(sys.argv[0]),
        "words": words,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "files": files,
    }}
    request = json.dumps(asked).encode()
    sent = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
    server.sendmsg([len(request).to_bytes({length})], sent)
    server.sendall(request)
    answers = server.makefile("r")
    process = int(answers.readline())
    with open("/proc/self/comm", "w") as own:
        own.write(f"{ours}{{process}}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
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
    text = STAND_IN.format(python=sys.executable, address=str(address), length=LENGTH_BYTES, ours=OURS)
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


def process_of(pid: int) -> int:
    """Return the process for which one stands that a program of ours runs in; any other process itself."""
    name = ""
    with suppress(OSError):  # it has ended
        name = Path(f"/proc/{pid}/comm").read_text(encoding="ascii", errors="replace")
    return int(name.removeprefix(OURS)) if name.startswith(OURS) else pid


def main(address: str, *imported: str) -> None:
    """Import, then fork for each request; in a fork, run its program."""
    extras.run_as_command()  # TensorFlow as commands import it, which is the smaller part
    with extras.without_garbage_collection():
        for module in imported:
            import_module(module)
    gc.freeze()  # a fork neither searches nor copies what is imported
    extras._is_command = False  # noqa: SLF001  # a program is none, until it says so
    if request := _serve(Path(address)):
        forks.end_with(partial(_run, request))


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
    head, files, _, _ = socket.recv_fds(connection, LENGTH_BYTES, MAX_FILES)
    with connection.makefile("rb", buffering=0) as rest:
        request = b""
        while len(request) < int.from_bytes(head):
            if not (data := rest.read(int.from_bytes(head) - len(request))):
                raise EOFError
            request += data
    process = os.fork()
    if process:
        for file in files:
            os.close(file)
        connection.sendall(f"{process}\n".encode())
        ended = os.pidfd_open(process)
        for one in (ended, connection):
            selector.register(one, selectors.EVENT_READ, (process, ended, connection))
        return None
    connection.close()
    return {**json.loads(request), "received": files}


def _run(asked: dict[str, Any]) -> None:
    """Run a program as Python does it, with its folder, files, environment and words."""
    files, received = asked["files"], asked["received"]
    copies = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, max(*files, *received) + 1) for file in received]
    for copy, number in zip(copies, files, strict=True):
        os.dup2(copy, number)
    forks.keep_files(files)
    os.chdir(asked["folder"])
    program, words = Path(asked["program"]), asked["words"]
    sys.orig_argv = [program.name, *words]
    sys.executable = str(program.with_name("python"))
    if program.name != "gradcam":
        forks.run(words, asked["environment"])
        return
    os.environ.clear()
    os.environ.update(asked["environment"])
    from gradcam_worker.cli.main import main as gradcam

    sys.argv = ["gradcam", *words]
    sys.exit(gradcam())


if __name__ == "__main__":
    main(*sys.argv[1:])
