"""Finding the master. `tests/faults/test_sentinel.py` has real Sentinels; those here are fast doubles."""

import asyncio
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis

from gradcam_worker.broker import app as broker
from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.redis_server import sentinel
from gradcam_worker.redis_server.sentinel import MasterFinder, MasterNotFound, MasterUnknown
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings

MASTER = "mymaster"
WAIT_S = 20.0


class SentinelDouble(socketserver.ThreadingTCPServer):
    """Says where a master is, as a Sentinel does."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, host: str, port: int, epoch: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.host, self.master_port, self.epoch = host, port, epoch
        self.connections = set[Any]()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def answer(self, words: list[str]) -> str:
        if words[0] == "HELLO":
            return "%1\r\n+proto\r\n:3\r\n"
        if words[:1] + words[2:] != ["SENTINEL", MASTER]:
            return "_\r\n" if words[0] == "SENTINEL" else "+OK\r\n"
        if words[1].upper() == "MASTER":
            return f"%2\r\n+config-epoch\r\n+{self.epoch}\r\n+flags\r\n+master\r\n"
        return f"*2\r\n+{self.host}\r\n+{self.master_port}\r\n"

    def end(self) -> None:
        """Close the door, and all connections."""
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with suppress(OSError):  # it was closed by the other side
                connection.shutdown(socket.SHUT_RDWR)


class _Answers(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server: Any = self.server
        server.connections.add(self.connection)
        try:
            while head := self.rfile.readline():
                words = []
                for _ in range(int(head[1:])):
                    self.rfile.readline()
                    words += (
                        self.rfile.readline().decode().split()
                    )  # redis-py sends two words as one at times
                self.wfile.write(server.answer(words).encode())
        except (OSError, ValueError):  # it has ended
            return


@pytest.fixture
def start() -> Iterator[Callable[..., SentinelDouble]]:
    with ExitStack() as stack:

        def start(host: str, port: int, epoch: int = 0) -> SentinelDouble:
            one = SentinelDouble(host, port, epoch)
            threading.Thread(target=one.serve_forever, args=[0.02], daemon=True).start()
            stack.callback(one.end)
            return one

        yield start


def finder(*sentinels: SentinelDouble, master: str = MASTER) -> MasterFinder:
    url = f"sentinel://{','.join(f'127.0.0.1:{one.port}' for one in sentinels)}/{master}/0"
    return MasterFinder(Settings(), url)


def test_of_sentinels_that_disagree_the_one_with_the_newest_configuration_is_believed(
    start: Callable[..., SentinelDouble],
) -> None:
    cut_off, newer = start("old", 1, epoch=9), start("new", 2, epoch=10)
    for order in ([cut_off, newer], [newer, cut_off]):
        found = finder(*order)
        assert found.find() == ("new", 2)
        found.close()


def test_while_no_sentinel_answers_the_last_answer_holds(start: Callable[..., SentinelDouble]) -> None:
    one = start("a", 1)
    found = finder(one)
    assert found.find() == ("a", 1)
    one.end()
    found.close()
    assert found.find() == ("a", 1)
    with pytest.raises(MasterNotFound, match=r"no Sentinel answers: .*127\.0\.0\.1:"):
        finder(one).find()


def test_a_master_of_two_names_has_not_moved_when_a_sentinel_ends(
    start: Callable[..., SentinelDouble],
) -> None:
    by_name, by_address = start("localhost", 1), start("127.0.0.1", 1)
    found = finder(by_name, by_address)
    assert found.find() == ("localhost", 1)
    by_name.end()
    found.close()
    assert found.find() == ("localhost", 1)
    by_address.master_port = 2
    assert found.find() == ("127.0.0.1", 2)
    found.close()


def test_a_name_that_no_sentinel_knows_is_an_error_of_its_own(start: Callable[..., SentinelDouble]) -> None:
    found = finder(start("a", 1), master="another")
    with pytest.raises(MasterUnknown, match="no master named 'another': check the name of the master"):
        found.find()
    found.close()


def test_a_connection_learns_that_the_master_has_moved_without_waiting(
    start: Callable[..., SentinelDouble], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sentinel, "CHECK_INTERVAL_S", 0.0)
    one = start("a", 1)
    found = finder(one)
    assert not found.has_moved(("a", 1)), "nothing is known yet"
    one.host, one.master_port = "b", 2
    end = time.monotonic() + WAIT_S
    while not found.has_moved(("a", 1)):
        assert time.monotonic() < end
        time.sleep(0.01)
    found.close()


def test_a_task_that_is_canceled_while_sentinels_are_asked_fails_no_thread(
    start: Callable[..., SentinelDouble],
) -> None:
    found, asked = finder(start("a", 1)), threading.Event()
    find = found.find

    def find_slowly() -> tuple[str, int]:
        asked.wait(WAIT_S)
        return find()

    found.find = find_slowly  # type: ignore[method-assign]

    async def cancel() -> None:
        task = asyncio.create_task(found.find_in_thread())
        await asyncio.sleep(0)
        task.cancel()
        asked.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    for thread in threading.enumerate():
        if thread.name == "gradcam-sentinels":
            thread.join(WAIT_S)  # an exception there is a warning, and so an error
    found.close()


@pytest.mark.parametrize("role", ["replica", b"replica"])
def test_a_server_that_is_no_master_is_refused(role: str | bytes) -> None:
    for reply in ({"role": role}, {b"role": role}, ["proto", 2, "role", role]):
        with pytest.raises(redis.exceptions.ConnectionError, match="h:1 is a replica, and no other master"):
            sentinel.require_master(reply, "h", 1)
    sentinel.require_master({"role": "master"}, "h", 1)
    sentinel.require_master({}, "h", 1)  # a server that does not say


def test_sentinels_and_server_are_reached_by_tls(
    settings: Settings, start: Callable[..., SentinelDouble], encrypted: Callable[[int], Any], job: Job
) -> None:
    server = encrypted(urlsplit(settings.broker_url).port or 0)
    door = encrypted(start("localhost", server.port).port)
    url = f"sentinels://localhost:{door.port}/{MASTER}/0"
    settings = settings.model_copy(update={"broker_url": url, "redis_ca": door.ca})
    client = GradcamClient(settings=settings)
    assert client.submit(job) == job.id
    assert asyncio.run(AsyncGradcamClient(settings=settings).status(job.id)).status == "queued"
    assert broker.is_reachable(broker.make_app(settings))
    client.close()
