"""Jobs that are to stop: cancelled, expired, or longer at it than they may be."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gradcam_worker.errors import UnknownJob
from gradcam_worker.operations import servers
from gradcam_worker.schemas.ids import new_id, utc_now
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.storage.s3 import S3

pytestmark = [pytest.mark.live]

FIELDS: dict[str, Any] = {"network": "efficientnet_lite0", "target": {"top_n": 1}}
WAIT_S = 120  # for what happens at once, but for a busy machine
FETCH_S = 300  # that an image may take here: so long nobody waits by mistake
SOON_S = 60  # what is promised within a few seconds; far less than FETCH_S
THREADS = 4 + 2  # of a worker of `make_stage`: its own and those of shards


@dataclass
class Gate:
    """An image that is not given out before it is opened."""

    url: str
    asked: threading.Event
    open: threading.Event


@dataclass
class Place:
    """A stage with a worker, and with servers that are slow in ways of their own."""

    stage: Any
    s3_pid: int
    results: Path
    silent: str  # a host that accepts a connection and says nothing
    dripping: str  # a host that says a byte of its answer now and then
    canceled: str  # a job that was cancelled before there was a worker
    expired: str  # a job whose time had passed by then
    early: Gate  # the image of both

    def submit(self, image: str, **changes: Any) -> str:
        job_id: str = self.stage.client.submit(image=image, **FIELDS | changes)
        return job_id

    def wait(self, job_id: str) -> StatusDocument:
        document: StatusDocument = self.stage.client.wait(job_id, WAIT_S)
        return document

    def left_by(self, job_id: str) -> set[str]:
        """The names of what a job has left in the bucket."""
        return {path.name for path in self.results.glob(f"**/{job_id}/*")}


def drip(listener: socket.socket, stopped: threading.Event) -> None:
    """Answer one caller after another, a byte at a time, for as long as they listen."""

    def serve(caller: socket.socket) -> None:
        with caller, contextlib.suppress(OSError):
            caller.recv(65_536)
            caller.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            while not stopped.wait(0.1):
                caller.sendall(b"x")

    with contextlib.suppress(OSError):  # until it is shut down
        while True:
            caller, _ = listener.accept()
            threading.Thread(target=serve, args=[caller], daemon=True).start()


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[str, str]]:
    """Two hosts that are slow: one that says nothing, one that drips."""
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as dripping:
        threading.Thread(target=drip, args=[dripping, stopped], daemon=True).start()
        one, other = (f"127.0.0.1:{listener.getsockname()[1]}" for listener in (silent, dripping))
        yield one, other
        stopped.set()
        dripping.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def gates(public_server: Any, photos: Path) -> Iterator[Callable[[], Gate]]:
    """As many gates as are wanted, all of them open in the end."""
    made: list[Gate] = []
    photo = (photos / "coffee.jpg").read_bytes()

    def make() -> Gate:
        gate = Gate(f"/cancel-{len(made)}", threading.Event(), threading.Event())

        def hold() -> None:
            gate.asked.set()
            gate.open.wait(WAIT_S + FETCH_S)

        answer = type(
            "Answer", (), {"status": 200, "body": photo, "headers": {}, "before": staticmethod(hold)}
        )
        gate.url = public_server.url(gate.url, answer)
        made.append(gate)
        return gate

    yield make
    for gate in made:
        gate.open.set()


@pytest.fixture(scope="module")
def place(
    make_stage: Callable[..., Any],
    hosts: tuple[str, str],
    gates: Callable[[], Gate],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    stage = make_stage("cancel", fetch_timeout_s=FETCH_S)
    with servers.s3(tmp_path_factory.mktemp("stopped"), ("results",)) as store:
        changes = {
            "image_hosts": (*stage.settings.image_hosts, *hosts),
            "s3_endpoint_url": store.url,
            "s3_access_key_id": store.access_key_id,
            "s3_secret_access_key": SecretStr(store.secret_access_key),
        }
        settings = stage.settings.model_copy(update=changes)
        stage = replace(stage, settings=settings, s3=S3(settings))
        keeper = store.process.pid
        pid = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text())
        early = gates()
        place = Place(stage, pid, store.root / "results", *hosts, "", "", early)
        place.canceled = place.submit(early.url)
        stage.client.cancel(place.canceled)
        place.expired = place.submit(early.url, expires_at=utc_now() + timedelta(seconds=0.2))
        time.sleep(0.3)
        with stage.worker("cancel", tiny=True):
            yield place


def test_what_was_cancelled_or_expired_in_the_queue_never_starts(place: Place, gates: Any) -> None:
    for job_id, status in ((place.canceled, "canceled"), (place.expired, "expired")):
        document = place.wait(job_id)
        assert (document.status, document.attempt, document.started_at) == (status, 0, None)
        assert document.error is not None
        assert document.error.code == status
    later = gates()
    later.open.set()
    assert place.wait(place.submit(later.url)).status == "succeeded"
    assert not place.early.asked.is_set()
    assert not place.left_by(place.canceled) | place.left_by(place.expired)


def test_a_running_job_is_cancelled_though_its_image_does_not_come(place: Place, gates: Any) -> None:
    gate = gates()
    job_id = place.submit(gate.url, timeout_s=300)
    assert gate.asked.wait(WAIT_S)
    begun = time.monotonic()
    marked = place.stage.client.cancel(job_id)
    assert (marked.status, marked.final) == ("running", False)
    document = place.wait(job_id)
    assert time.monotonic() - begun < SOON_S
    assert (document.status, document.attempt) == ("canceled", 1)
    assert document.cancel_requested_at == marked.cancel_requested_at
    assert document.error is not None
    assert (document.error.code, document.error.stage) == ("canceled", "fetch")
    gate.open.set()
    assert place.stage.client.cancel(job_id) == document, "a final job stays as it is"
    assert place.wait(place.submit(gate.url)).status == "succeeded", "the worker goes on"
    assert not place.left_by(job_id)


def test_a_job_that_has_succeeded_is_not_cancelled_and_an_unknown_one_cannot_be(
    place: Place, gates: Any
) -> None:
    gate = gates()
    gate.open.set()
    document = place.wait(place.submit(gate.url))
    assert place.stage.client.cancel(document.id) == document
    assert document.status == "succeeded"
    with pytest.raises(UnknownJob):
        place.stage.client.cancel(new_id())


def test_a_job_expires_and_another_is_cancelled_while_the_worker_is_busy(place: Place, gates: Any) -> None:
    busy = [gates() for _ in range(THREADS)]
    jobs = [place.submit(gate.url, timeout_s=300) for gate in busy]
    for gate in busy:
        assert gate.asked.wait(WAIT_S)
    waiting = gates()
    expires = place.submit(waiting.url, expires_at=utc_now() + timedelta(seconds=0.5))
    canceled = place.submit(waiting.url)
    assert place.stage.client.cancel(canceled).status == "canceled"
    document = place.wait(expires)
    assert (document.status, document.attempt) == ("expired", 0)
    assert [place.stage.client.status(job_id).status for job_id in jobs] == ["running"] * THREADS
    for gate in busy:
        gate.open.set()
    assert [place.wait(job_id).status for job_id in jobs] == ["succeeded"] * THREADS
    waiting.open.set()
    assert place.wait(place.submit(waiting.url)).status == "succeeded"
    assert place.stage.client.status(expires) == document
    assert not place.left_by(expires) | place.left_by(canceled)


@pytest.mark.parametrize("how", ["silent", "dripping"])
def test_an_image_that_comes_too_slowly_ends_its_job_in_time(place: Place, how: str) -> None:
    begun = time.monotonic()
    document = place.wait(place.submit(f"http://{getattr(place, how)}/a.jpg", timeout_s=1))
    assert time.monotonic() - begun < SOON_S
    assert document.status == "failed"
    assert document.error is not None
    assert (document.error.code, document.error.stage) == ("timeout", "fetch")
    assert "timeout_s of 1 s" in document.error.detail
    assert not place.left_by(document.id)


def test_storage_that_hangs_ends_no_job_and_keeps_none_that_is_cancelled(place: Place, gates: Any) -> None:
    gate, canceled = gates(), gates()
    late = place.submit(gate.url, timeout_s=5, max_attempts=1)
    stopped = place.submit(canceled.url, timeout_s=300)
    for one in (gate, canceled):
        assert one.asked.wait(WAIT_S)
    os.kill(place.s3_pid, signal.SIGSTOP)
    try:
        for one in (gate, canceled):
            one.open.set()
        end = time.monotonic() + WAIT_S
        while place.stage.client.status(late).status != "queued":  # and then the other one has come as far
            assert time.monotonic() < end, "it is not handed back"
            time.sleep(0.1)
        begun = time.monotonic()
        place.stage.client.cancel(stopped)
        ended = place.wait(stopped)
        assert time.monotonic() - begun < SOON_S
    finally:
        os.kill(place.s3_pid, signal.SIGCONT)
    assert (ended.status, ended.error and ended.error.stage) == ("canceled", "upload")
    assert place.wait(late).status == "succeeded", "its time and its only attempt did not count"
    assert ended.result is None
    assert "manifest.json" not in place.left_by(ended.id)
