"""What is attacked: real servers behind faulty proxies, real workers, and jobs that are repeatable."""

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import redis
from pydantic import SecretStr

from devtools.faults import tiny_network, webhook_receiver
from devtools.faults.proxy import FaultyProxy
from devtools.faults.releases import PRESENT, Release
from devtools.processes import children
from gradcam_worker.broker import app, publisher
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import InvalidJob, LedgerUnavailable
from gradcam_worker.gradcam.imaging.overlay import encode
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings

START_S = 60.0  # within which a worker takes jobs
SUBMIT_S = 120.0  # within which a job is accepted
KEYS = ("attacker", "0" * 40)  # of the S3 server: they stay when it is started again
IMAGES = 12  # no two the same
SIZE = (48, 64)  # of them, in pixels: small jobs, so that many are under way at a kill
AGAIN_S = 0.2  # before something out of reach is asked again
# How broker and ledger are run: with these, what was answered survives the end of the server's process.
APPEND_ONLY = ("--appendonly", "yes", "--appendfsync", "everysec")


@contextlib.contextmanager
def suspended(pid: int) -> Iterator[None]:
    """SIGSTOP within the block: the process is there, and does nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


class Server:
    """One that can be killed, stopped and started again behind a proxy, whose port stays."""

    def __init__(self, name: str, start: Callable[[], AbstractContextManager[Any]], seed: int) -> None:
        """`start` starts it; it keeps what it has on disk between two starts."""
        self.name, self._start, self._running = name, start, ExitStack()
        self.now: Any = self._running.enter_context(start())  # what runs at the moment
        self.proxy = FaultyProxy(self.now.port, seed=seed).__enter__()

    @property
    def pid(self) -> int:
        """Of the server itself."""
        return children(self.now.process.pid)[0]

    def switch(self, other: Any) -> Any:
        """New connections lead to `other` from now on, those that stand stay; return who led before."""
        before, self.now = self.now, other
        self.proxy.target = other.port
        return before

    @contextlib.contextmanager
    def dead(self) -> Iterator[None]:
        """SIGKILL at the start of the block, started again at its end."""
        os.kill(self.pid, signal.SIGKILL)
        self._running.close()
        try:
            yield
        finally:
            self.switch(self._running.enter_context(self._start()))

    def close(self) -> None:
        """The end of it."""
        self.proxy.__exit__()
        self._running.close()


class Worker:
    """A supervisor and its worker process, below a keeper."""

    def __init__(self, settings: Settings, log: Path, release: Release = PRESENT) -> None:
        """Its output is added to `log`."""
        temporary = log.parent / "tmp"
        temporary.mkdir(exist_ok=True)
        self.log, self.release = log, release
        self.keeper = release.spawn(release.worker_command, settings, log, TMPDIR=str(temporary))

    @property
    def supervisor(self) -> int | None:
        """Its process."""
        return next(iter(children(self.keeper.pid)), None)

    @property
    def process(self) -> int | None:
        """The worker process that the supervisor runs just now, if it runs one."""
        return next(iter(children(self.supervisor)), None) if self.supervisor else None

    @property
    def log_lines(self) -> list[str]:
        """The log of all workers of the cluster."""
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    @property
    def restarts(self) -> list[str]:
        """The lines of the log about worker processes that ended unexpectedly, with their exit codes."""
        return [line for line in self.log_lines if "worker_process_ended" in line]

    def stop(self) -> None:
        """Cleanly."""
        parent_watch.stop(self.keeper)


@dataclass
class Cluster:
    """Everything that an attack needs."""

    name: str
    seed: int
    folder: Path
    broker: Server
    s3: Server
    receiver: Server
    settings: Settings
    accepted: dict[str, float] = field(default_factory=dict)  # job id -> when `submit` returned (monotonic)
    workers: list[Worker] = field(default_factory=list)
    refused: int = 0  # times that `submit` had to be tried again
    unexpected: list[str] = field(default_factory=list)  # errors that the client does not document

    @property
    def bucket(self) -> Path:
        """Where the S3 server keeps the results."""
        return self.folder / "buckets" / "results"

    def manifest(self, job_id: str) -> Path:
        """Where the S3 server keeps the manifest of a job."""
        return self.bucket / "cams" / job_id / "manifest.json"

    @property
    def ledger(self) -> redis.Redis:
        """A connection to the ledger's server, without a proxy between."""
        port = self.broker.now.port
        return redis.Redis(port=port, decode_responses=True, socket_timeout=5, socket_connect_timeout=2)

    def work(self, settings: Settings | None = None, release: Release = PRESENT) -> Worker:
        """Start a worker."""
        self.workers.append(Worker(settings or self.settings, self.folder / "worker.log", release))
        return self.workers[-1]

    def job(self, number: int, **changes: Any) -> Job:
        """The job of this number: always the same one for the same seed and attack."""
        draw = random.Random(f"{self.name} {self.seed} {number}")  # noqa: S311  # repeatable, not secret
        overlay, heatmap = {"kind": "overlay"}, {"kind": "heatmap"}
        fields: dict[str, Any] = {
            "id": str(uuid.UUID(int=draw.getrandbits(128), version=4)),
            "image": f"s3://photos/{draw.randrange(IMAGES)}.jpg",
            "network": tiny_network.NETWORK,
            "target": {"top_n": draw.randint(1, 3)},
            "artifacts": draw.choice([[overlay], [overlay, heatmap], [heatmap]]),
            "priority": draw.choice(["normal", "normal", "normal", "high", "low", "bulk"]),
            "max_attempts": 20,
            "timeout_s": 300,
        }
        return Job.parse({**fields, **changes})

    def hook(self) -> list[dict[str, Any]]:
        """A webhook that leads to the receiver."""
        return [{"url": f"http://127.0.0.1:{self.receiver.proxy.port}/hook"}]

    @cached_property
    def client(self) -> GradcamClient:
        """A client of the attacked ledger."""
        return GradcamClient(settings=self.settings)

    def submit(self, job: Job, by: Callable[[Job], object] | None = None) -> None:
        """Submit a job until it is accepted: from then on, it must never be lost.

        `by` submits it; None: the cluster's own client.
        """
        end = time.monotonic() + SUBMIT_S
        while True:
            try:
                (by or self.client.submit)(job)
                break
            except LedgerUnavailable:
                self.refused += 1
            except InvalidJob:  # trying again does not help
                raise
            except Exception as error:  # noqa: BLE001  # a finding: it goes into the verdict
                self.unexpected.append(f"{type(error).__name__}: {error}")
            if time.monotonic() > end:
                message = f"Job {job.id} could not be submitted within {SUBMIT_S:g} s."
                raise TimeoutError(message)
            time.sleep(AGAIN_S)
        self.accepted[job.id] = time.monotonic()

    def send(self, job_id: str, payload: dict[str, Any]) -> None:
        """Publish what may be a job past the client and the ledger, as another Celery program would."""
        words: dict[str, Any] = {"queue": publisher.INTERACTIVE, "task_id": job_id, "priority": 0}
        self._celery.send_task(publisher.EXPLAIN, args=[payload], **words)

    @cached_property
    def _celery(self) -> Any:
        return app.make_app(self.settings)

    def stop_workers(self) -> None:
        """All of them, cleanly."""
        while self.workers:
            self.workers.pop().stop()

    def store(self, name: str, pixels: Any) -> str:
        """Store an image of pixels (height, width, 3) uint8, or of one colour; return its URI."""
        whole = np.broadcast_to(np.asarray(pixels, np.uint8), (*SIZE, 3))
        (self.folder / "buckets" / "photos" / name).write_bytes(encode(np.ascontiguousarray(whole)))
        return f"s3://photos/{name}"


@contextlib.contextmanager
def running_cluster(name: str, seed: int, **changes: Any) -> Iterator[Cluster]:
    """Start the servers and their proxies, without a worker; stop all of it in the end.

    `changes` are settings; `webhook_hosts` are allowed beside the receiver. Times are short ones, so that
    many faults fit into little time.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gradcam-faults-")))

        def served(role: str, start: Callable[[], AbstractContextManager[Any]]) -> Server:
            return stack.enter_context(contextlib.closing(Server(role, start, seed)))

        broker = served("broker", lambda: servers.valkey(folder, *APPEND_ONLY))
        s3 = served("s3", lambda: servers.s3(folder, ("photos", "results"), KEYS))
        receiver = served("receiver", lambda: _receiver(folder))
        settings: dict[str, Any] = {
            "broker_url": f"redis://127.0.0.1:{broker.proxy.port}/0",
            "key_prefix": "attacked:",
            "output": "s3://results/cams",
            "s3_endpoint_url": f"http://127.0.0.1:{s3.proxy.port}",
            "s3_access_key_id": KEYS[0],
            "s3_secret_access_key": SecretStr(KEYS[1]),
            "private_networks": ("127.0.0.0/8",),
            "webhook_timeout_s": 3,
            "devices": "cpu",
            "max_batch": 1,  # float32 numbers are rounded in another way in a pass over another number
            "threads": 4,
            "lease_s": 2,
            "lost_after_s": 3,
            "retry_backoff_s": 0.1,
            "retry_backoff_max_s": 1,
            "shutdown_timeout_s": 10,
        }
        hosts = (f"127.0.0.1:{receiver.proxy.port}", *changes.pop("webhook_hosts", ()))
        settings |= {"webhook_hosts": hosts, **changes}
        cluster = Cluster(name, seed, folder, broker, s3, receiver, Settings(**settings))
        stack.callback(cluster.stop_workers)
        draw = np.random.default_rng(seed)
        for number in range(IMAGES):
            coarse = draw.integers(0, 256, (6, 8, 3), np.uint8)
            cluster.store(f"{number}.jpg", coarse.repeat(SIZE[0] // 6, 0).repeat(SIZE[1] // 8, 1))
        yield cluster


@contextlib.contextmanager
def _receiver(folder: Path) -> Iterator[servers.Server]:
    port = servers.free_port()
    command = [sys.executable, "-P", webhook_receiver.__file__, str(port), str(folder / "events.jsonl")]
    process = parent_watch.spawn(command, log=folder / "receiver.log")
    try:
        wait_for(lambda: servers.accepts_connections(port), START_S, "the receiver of webhooks listens")
        yield servers.Server(process, port)
    finally:
        parent_watch.stop(process)


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until a condition holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            message = f"Not within {seconds:g} s: {what}."
            raise TimeoutError(message)
        time.sleep(0.05)
