"""Workers that are killed, stopped and restarted: once a whole one, else with a tiny network."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.live]

WAIT_S = 120


@pytest.fixture(scope="module")
def stage(make_stage: Callable[..., Any]) -> Any:
    return make_stage("kill")


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.05)


class Gate:
    """An image that is not given out before it is opened, so that a job can be caught in the act."""

    def __init__(self, server: Any, answer: Any, path: str, data: bytes) -> None:
        self.asked = threading.Event()
        self.open = threading.Event()
        self.url = server.url(path, answer(200, data, before=self._wait))

    def _wait(self) -> None:
        self.asked.set()
        self.open.wait(WAIT_S)


@pytest.fixture
def gate(public_server: Any, answer: Any, photos: Path, request: pytest.FixtureRequest) -> Gate:
    return Gate(public_server, answer, f"/{request.node.name}", (photos / "coffee.jpg").read_bytes())


def submit(stage: Any, gate: Gate, **changes: Any) -> str:
    fields = {"image": gate.url, "network": "efficientnet_lite0", "target": {"top_n": 1}, **changes}
    job_id: str = stage.client.submit(**fields)
    assert gate.asked.wait(WAIT_S), "no worker took the job"
    return job_id


def pid_of(stage: Any, job_id: str) -> int:
    return int(stage.client.status(job_id).worker.id.rpartition(":")[2])


@pytest.mark.tensorflow
def test_a_killed_workers_job_is_run_again_by_the_next(stage: Any, gate: Gate) -> None:
    with stage.worker("killed"):
        job_id = submit(stage, gate)
        os.kill(pid_of(stage, job_id), signal.SIGKILL)
        gate.open.set()
        document = stage.client.wait(job_id, WAIT_S)
    assert (document.status, document.attempt) == ("succeeded", 2)
    assert "exit_code=-9 " in stage.log("killed")
    assert stage.store.get(f"{job_id}/overlay-1-967-espresso.jpg")


def test_a_job_that_kills_its_worker_ends_after_its_attempts(stage: Any, gate: Gate) -> None:
    with stage.worker("poisoned", tiny=True):
        job_id = submit(stage, gate, max_attempts=1)
        os.kill(pid_of(stage, job_id), signal.SIGKILL)
        gate.open.set()
        document = stage.client.wait(job_id, WAIT_S)
    assert document.error is not None
    assert document.error.code == "max_attempts_exceeded"


def test_a_worker_that_is_asked_to_stop_finishes_what_it_has(stage: Any, gate: Gate) -> None:
    with stage.worker("stopped", tiny=True) as supervisor:
        job_id = submit(stage, gate)
        supervisor.terminate()
        time.sleep(0.5)
        gate.open.set()
        assert supervisor.wait(WAIT_S) == 0
    assert stage.client.status(job_id).status == "succeeded"
    assert stage.client.status(job_id).attempt == 1


def test_a_worker_does_not_outlive_its_killed_supervisor(stage: Any, gate: Gate) -> None:
    with stage.worker("orphaned", tiny=True) as keeper:
        job_id = submit(stage, gate)
        worker = pid_of(stage, job_id)
        supervisor = int(Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text())
        os.kill(supervisor, signal.SIGKILL)
        gate.open.set()
        wait_for(lambda: not Path(f"/proc/{worker}").exists(), "the worker's end")
    assert stage.client.status(job_id).status == "succeeded", "it finished what it had"


def test_a_job_in_the_queue_waits_for_a_worker(stage: Any) -> None:
    job_id = stage.client.submit(
        image="s3://photos/coffee.jpg", network="efficientnet_lite0", target={"top_n": 1}
    )
    assert stage.client.status(job_id).status == "queued"
    with stage.worker("late", tiny=True):
        assert stage.client.wait(job_id, WAIT_S).status == "succeeded"
