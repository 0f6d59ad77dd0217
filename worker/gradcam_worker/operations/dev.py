"""`gradcam dev`: everything that an app needs to develop against, on this machine, until Ctrl-C.

A Valkey server, an S3 server, a worker and the HTTP API, each in its own process, as in production. They
stop when this process ends, however it ends.
"""

import fcntl
import json
import secrets
import shlex
import signal
import subprocess
import tempfile
import time
from base64 import b64encode
from contextlib import ExitStack, suppress
from pathlib import Path

from gradcam_worker import extras
from gradcam_worker.errors import GradcamError, InvalidSettings, WorkerLost
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.operations.demo import BUCKETS, NETWORK, SHUTDOWN_TIMEOUT_S
from gradcam_worker.operations.signals import exit_on_sigterm
from gradcam_worker.operations.terminal import console
from gradcam_worker.runtime import parent_watch
from gradcam_worker.settings import Settings
from gradcam_worker.text import comma_lists

PORT = 8000
APP_PORTS = 9  # those after the port of the HTTP API are for apps: webhooks may go there
KEEP = ("--appendonly", "yes")
SAMPLES = {
    "cat.jpg": "chelsea.jpg",
    "cats/1.jpg": "chelsea.jpg",
}  # the name that the documentation uses -> a photo of this package
ENVIRONMENT = "environment"  # a file that a shell reads
SECRET_NAME = "dev"  # noqa: S105  # the name of the webhooks' secret, not the secret
SHOWN = (
    "broker_url",
    "output",
    "uploads",
    "s3_endpoint_url",
    "s3_access_key_id",
    "s3_secret_access_key",
    "webhook_secrets",
)
POLL_S = 0.2


def run(port: int, folder: Path | None) -> int:
    """Run everything until this process is told to stop.

    `GRADCAM_*` variables say the rest, as for a worker: the registry of networks, what images may be read.

    Args:
        port: Of the HTTP API, on 127.0.0.1.
        folder: Keeps jobs, photos and results for the next time; None: a temporary one.

    Returns:
        Nothing: it is left by Ctrl-C or SIGTERM.

    Raises:
        InvalidSettings: The port or the folder is in use, a package is missing, or a setting is wrong.
        WorkerLost: One of the processes has ended.
    """
    with extras.required(
        "The HTTP API of gradcam dev", "serve", "demo", extras.WORKER, raises=InvalidSettings
    ):
        from gradcam_worker.gateway import server  # noqa: F401  # said here, and not in the log of a process
    if servers.accepts_connections(port):
        message = f"Port {port} of 127.0.0.1 is in use: choose another one with --port."
        raise InvalidSettings(message)
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradcam-dev-")))
        place.mkdir(parents=True, exist_ok=True)
        _lock(stack, place)
        settings = _start_servers(stack, place, port, keep=folder is not None)
        _copy_samples(place / "buckets" / BUCKETS[0])
        processes = {}
        for name, *words in (("worker",), ("serve", "--host", "127.0.0.1", "--port", str(port))):
            log = place / f"{name}.log"
            # The worker has the port of the metrics, if there is one; the API serves its own at --port.
            its = settings if name == "worker" else settings.model_copy(update={"metrics_port": 0})
            processes[log] = servers.gradcam(name, *words, settings=its, log=log)
            stack.callback(parent_watch.stop, processes[log])
        variables = place / ENVIRONMENT
        _write_private(variables, _exports(settings))
        _describe(settings, port, place, variables)
        with console.err.status("The worker and the HTTP API are starting"):
            _wait_until_ready(settings, port, processes)
        console.out.print("[green]Ready.[/] Stop everything with Ctrl-C.")
        while True:
            _raise_if_ended(processes)
            time.sleep(POLL_S)


def _start_servers(stack: ExitStack, place: Path, port: int, *, keep: bool) -> Settings:
    """Start the Valkey server and the S3 server; return the settings of everybody who uses them."""
    keys = _keys(place)
    apps = range(port + 1, port + 1 + APP_PORTS)
    s3_port, valkey_port = (_port_near(apps.stop + offset) for offset in (0, 1))
    valkey = stack.enter_context(servers.valkey(place, *(KEEP if keep else ()), port=valkey_port))
    store = stack.enter_context(
        servers.s3(place, BUCKETS, (keys["id"], keys["secret"]), port=s3_port, allow_origin="*")
    )
    given = Settings.from_environment()
    hosts = [f"{host}:{app}" for host in ("127.0.0.1", "localhost") for app in apps]
    return Settings.from_environment(
        broker_url=f"redis://127.0.0.1:{valkey.port}/0",
        ledger_url="",
        redis_ca="",
        key_prefix="gradcam:",
        output=f"s3://{BUCKETS[1]}/cams",
        output_prefixes="",
        uploads=f"s3://{BUCKETS[0]}/uploads",
        s3_endpoint_url=store.url,
        s3_access_key_id=store.access_key_id,
        s3_secret_access_key=store.secret_access_key,
        status_sql_url="",
        webhook_hosts=comma_lists.join((*given.webhook_hosts, *hosts)),
        webhook_secrets=f"{SECRET_NAME}={keys['webhooks']}",
        private_networks=comma_lists.join((*given.private_networks, "127.0.0.0/8", "::1/128")),
        preload=comma_lists.join(given.preload or (NETWORK,)),
        shutdown_timeout_s=str(SHUTDOWN_TIMEOUT_S),
    )


def _lock(stack: ExitStack, place: Path) -> None:
    """Keep a folder for this process: two Valkey servers would spoil each other's files."""
    file = stack.enter_context((place / "lock").open("wb"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        message = f"Another gradcam dev uses {place}/: choose another folder, or stop it."
        raise InvalidSettings(message) from error


def _keys(place: Path) -> dict[str, str]:
    """The keys of the S3 server and of webhooks: those of the last time, where the folder has them."""
    file = place / "keys.json"
    if not file.exists():
        webhooks = f"whsec_{b64encode(secrets.token_bytes(32)).decode()}"
        keys = {"id": secrets.token_hex(10), "secret": secrets.token_hex(20), "webhooks": webhooks}
        _write_private(file, json.dumps(keys))
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _write_private(file: Path, text: str) -> None:
    """Write a file that no other user of this machine can read."""
    file.touch(mode=0o600)
    file.write_text(text, encoding="utf-8")


def _port_near(port: int) -> int:
    """This port, so that the environment stays the same from one time to the next, or a free one."""
    return servers.free_port() if servers.accepts_connections(port) else port


def _copy_samples(bucket: Path) -> None:
    """Put the photos of the demo into the bucket, and one under the names that the documentation uses."""
    photos = {photo.name: photo.name for photo in (DATA / "photos").glob("*.jpg")}
    for name, photo in (photos | SAMPLES).items():
        if not (bucket / name).exists():
            (bucket / name).parent.mkdir(exist_ok=True)
            (bucket / name).write_bytes((DATA / "photos" / photo).read_bytes())


def _exports(settings: Settings) -> str:
    """The lines that a shell reads."""
    variables = settings.to_environment()
    names = [f"GRADCAM_{name.upper()}" for name in SHOWN]
    return "".join(f"export {name}={shlex.quote(variables[name])}\n" for name in names)


def _describe(settings: Settings, port: int, place: Path, variables: Path) -> None:
    url = f"http://127.0.0.1:{port}"
    table = console.table("", "")
    table.show_header = False
    for name, where in (
        ("Page", f"{url}/"),
        ("HTTP API", f"{url}/v1/jobs, described by {url}/openapi.json"),
        ("Valkey", settings.broker_url),
        ("S3 server", f"{settings.s3_endpoint_url}, with the buckets {' and '.join(BUCKETS)}"),
        ("A photo to try", f"s3://{BUCKETS[0]}/{next(iter(SAMPLES))}"),
        ("Your app's webhooks", f"http://127.0.0.1:{port + 1} to {port + APP_PORTS}, secret {SECRET_NAME}"),
        ("Data and logs", f"{place}/"),
    ):
        table.add_row(name, where)
    console.out.print(table)
    for text in (
        "\nFor your app, and for the command gradcam, in another terminal:\n",
        f"source {shlex.quote(str(variables))}\n",
        "which says\n",
        variables.read_text(encoding="utf-8"),
    ):
        console.out.print(text, markup=False, soft_wrap=True)


def _wait_until_ready(settings: Settings, port: int, processes: dict[Path, subprocess.Popen[bytes]]) -> None:
    """Wait for the HTTP API, and for a worker in the ledger. Raises WorkerLost."""
    ledger = RedisLedger(settings)
    while True:
        _raise_if_ended(processes)
        with suppress(GradcamError):
            if servers.accepts_connections(port) and ledger.find_workers():
                return
        time.sleep(POLL_S)


def _raise_if_ended(processes: dict[Path, subprocess.Popen[bytes]]) -> None:
    """Raise WorkerLost if one of the processes, by their logs, has ended."""
    for log, process in processes.items():
        if process.poll() is not None:
            told = console.show_log_end(log)
            message = f"gradcam {log.stem} has ended with code {process.returncode}. {told}"
            raise WorkerLost(message)
