"""Waiting for messages without taking them, over a real Valkey."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from gradcam_worker.broker import app as broker
from gradcam_worker.broker.queue_watch import QueueWatch
from gradcam_worker.settings import Settings

WAIT_S = 30
KEY = "a list"


@pytest.fixture
def server(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.broker_url) as connection:
        yield connection
        connection.delete(KEY)


Watch = Callable[..., QueueWatch]


@pytest.fixture
def watch(settings: Settings) -> Iterator[Watch]:
    """Watches the lists that are named."""
    watches: list[QueueWatch] = []

    def start(*keys: str, **callbacks: Any) -> QueueWatch:
        options: dict[str, Any] = {
            "has_room": lambda _: True,
            "on_message": lambda: None,
            "on_read_only": lambda _: None,
        }
        pool = redis.ConnectionPool.from_url(settings.broker_url)
        watches.append(QueueWatch(pool, dict.fromkeys(keys, "queue"), **options | callbacks))
        return watches[-1]

    yield start
    for one in watches:
        one.close()
        assert one.join(WAIT_S)


def watching(server: redis.Redis) -> int:
    return sum(client["cmd"] == "blmove" for client in server.client_list())


def wait_until_watching(server: redis.Redis, count: int) -> None:
    end_s = time.monotonic() + WAIT_S
    while watching(server) != count:
        assert time.monotonic() < end_s, f"{watching(server)} connections wait, not {count}"
        time.sleep(0.01)


def test_a_message_is_noticed_and_stays_where_it_is(server: redis.Redis, watch: Watch) -> None:
    noticed = threading.Event()
    watch(KEY, "another list", on_message=noticed.set).start_waiting()
    server.lpush(KEY, "second", "first")
    assert noticed.wait(WAIT_S)
    assert server.lrange(KEY, 0, -1) == [b"first", b"second"]


@pytest.mark.parametrize("waiting", [True, False])
def test_a_closed_watch_leaves_no_connection_and_no_thread(
    server: redis.Redis, watch: Watch, waiting: bool
) -> None:
    """Also where it was not waiting: closing wakes the threads, and they must not connect then."""
    one = watch(KEY, "another list")
    if waiting:
        one.start_waiting()
        wait_until_watching(server, 2)
    one.close()
    assert one.join(WAIT_S)
    assert watching(server) == 0


def test_a_watch_that_is_closed_while_a_thread_connects_leaves_no_connection(
    server: redis.Redis, watch: Watch
) -> None:
    asked, closed = threading.Event(), threading.Event()

    def has_room(_: str) -> bool:
        asked.set()
        return closed.wait(WAIT_S)

    one = watch(KEY, has_room=has_room)
    one.start_waiting()
    assert asked.wait(WAIT_S)
    one.close()
    closed.set()
    assert one.join(WAIT_S)
    assert watching(server) == 0


def test_a_server_that_does_not_allow_blmove_is_reported_and_the_watch_ends(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        message = "this user has no permissions to run the 'blmove' command"
        raise redis.exceptions.NoPermissionError(message)

    monkeypatch.setattr(redis.Redis, "blmove", refuse)
    noticed = threading.Event()
    one = watch(KEY, on_message=noticed.set)
    one.start_waiting()
    assert noticed.wait(WAIT_S)
    assert one.join(WAIT_S)
    assert not one.usable
    assert caplog.text.count("queue_watch_disabled") == 1


def test_a_server_that_takes_no_writes_is_reported(server: redis.Redis, watch: Watch) -> None:
    reported = threading.Event()
    server.replicaof("127.0.0.1", 1)
    try:
        watch(KEY, on_read_only=lambda _: reported.set()).start_waiting()
        assert reported.wait(WAIT_S)
    finally:
        server.replicaof("NO", "ONE")


def test_a_channel_that_is_closed_closes_its_watch(server: redis.Redis, settings: Settings) -> None:
    connection = broker.make_app(settings).connection_for_read()
    channel = connection.default_channel
    channel.watch_queues(lambda: None)
    connection.release()
    assert channel._queue_watch.join(WAIT_S)
    assert watching(server) == 0
