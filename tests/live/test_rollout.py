"""A new version beside the old one: what a Deployment with `maxUnavailable: 0` sees of real workers.

It ends an old pod when a new one is ready, and not before. So a version that cannot work must never be ready.
"""

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from subprocess import Popen
from typing import Any

import pytest

from gradcam_worker.operations import servers

pytestmark = [pytest.mark.live]

WAIT_S = 120
BROKEN: dict[str, dict[str, Any]] = {
    "network": {"preload": ("vgg61",)},
    "storage": {"s3_endpoint_url": "http://127.0.0.1:1"},
}


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.1)


def ask(port: int, path: str = "/ready") -> tuple[int, str]:
    """The answer of a worker's health server: a status, 0 while there is none, and its text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except OSError:
        return 0, ""
    finally:
        connection.close()


def is_ready(port: int) -> bool:
    return ask(port)[0] == 200


@contextmanager
def pod(stage: Any, name: str, **changes: Any) -> Iterator[tuple[Popen[bytes], int]]:
    """A worker with its port for probes."""
    port = servers.free_port()
    settings = stage.settings.model_copy(update={"metrics_port": port, **changes})
    with replace(stage, settings=settings).worker(name, tiny=True) as process:
        yield process, port


@pytest.fixture
def stage(make_stage: Callable[..., Any]) -> Any:
    return make_stage("rollout")


@pytest.fixture
def held(stage: Any, public_server: Any, answer: Any, photos: Any) -> Iterator[tuple[str, threading.Event]]:
    """A job whose image is not given out before the event is set."""
    opened = threading.Event()
    data = answer(200, (photos / "coffee.jpg").read_bytes(), before=lambda: opened.wait(WAIT_S))
    image = public_server.url("/rollout", data)
    yield stage.client.submit(image=image, network="efficientnet_lite0", target={"top_n": 1}), opened
    opened.set()


def test_a_version_that_cannot_work_is_never_ready_and_one_that_can_takes_over(
    stage: Any, held: tuple[str, threading.Event]
) -> None:
    job_id, opened = held
    with (
        pod(stage, "old", shutdown_timeout_s=1, fetch_timeout_s=WAIT_S) as (old, old_port),
        ExitStack() as pods,
    ):
        wait_for(lambda: is_ready(old_port), "the old worker's readiness")
        wait_for(lambda: stage.client.status(job_id).status == "running", "the job's start")
        bad = {name: pods.enter_context(pod(stage, name, **changes)) for name, changes in BROKEN.items()}

        def watch(condition: Callable[[], object], what: str) -> None:
            """Wait, while no new version is ready and the old one is."""

            def watched() -> object:
                assert [name for name, (_, port) in bad.items() if is_ready(port)] == []
                assert is_ready(old_port)
                return condition()

            wait_for(watched, what)

        watch(lambda: bad["network"][0].poll() is not None, "the end of a worker without its network")
        watch(lambda: "worker_started" in stage.log("storage"), "the start of a worker without storage")
        watch(lambda: "storage" in ask(bad["storage"][1])[1], "that a worker without storage says so")
        pods.close()
        with pod(stage, "new") as (_, new_port):
            wait_for(lambda: is_ready(old_port) and is_ready(new_port), "the new worker's readiness")
            old.terminate()  # as a Deployment does now
            wait_for(lambda: not is_ready(old_port) and is_ready(new_port), "the end of the old worker")
            assert old.wait(WAIT_S) == 0
            opened.set()
            document = stage.client.wait(job_id, WAIT_S)
    assert document.status == "succeeded"
    assert f"job_requeued_at_stop job_id={job_id}" in stage.log("old")
