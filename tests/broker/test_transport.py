"""How many messages of one queue a process has in hand, beside those of the others."""

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from gradcam_worker.broker import app as broker
from gradcam_worker.broker import publisher
from gradcam_worker.broker.publisher import INTERACTIVE, SHARDS, Publisher
from gradcam_worker.schemas import work
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.settings import Settings

WAIT_S = 20
THREADS, IN_HAND = 3, 2


class Consumer:
    """What a worker process does with its queues, turn by turn; it acknowledges what it is told to."""

    def __init__(self, app: Any, queues: tuple[str, ...] = publisher.QUEUES) -> None:
        self.connection = app.connection_for_read()
        self.channel = self.connection.default_channel
        self.channel.brpop_timeout = 0.1
        self.held: list[Any] = []
        self.most = 0  # shards at once
        self._consumer = self.connection.Consumer(
            [app.amqp.queues[name] for name in queues],
            channel=self.channel,
            on_message=self._take,
            accept=["json"],
        )
        self._consumer.qos(prefetch_count=THREADS + IN_HAND)
        self._consumer.consume()

    def _take(self, message: Any) -> None:
        self.held.append(message)
        self.most = max(self.most, len(self.shards))

    def turns(self, seconds: float = 0.4) -> list[str]:
        """Receive until nothing comes for so long: longer than a look at the queues takes."""
        with contextlib.suppress(socket.timeout):
            while True:
                self.connection.drain_events(timeout=seconds)
        return [self.id(one) for one in self.held]

    @staticmethod
    def id(message: Any) -> str:
        return str(message.headers["id"])

    @property
    def shards(self) -> list[Any]:
        return [one for one in self.held if one.delivery_info["routing_key"] == SHARDS]

    def acknowledge(self, *messages: Any) -> None:
        for one in messages:
            one.ack()
            self.held.remove(one)


@pytest.fixture
def app(settings: Settings) -> Any:
    return broker.make_app(settings.model_copy(update={"threads": THREADS, "shards": IN_HAND}))


@pytest.fixture
def consumer(app: Any) -> Iterator[Consumer]:
    one = Consumer(app)
    yield one
    one.connection.release()


Publish = Callable[[str, int], list[str]]


@pytest.fixture
def publish(settings: Settings) -> Publish:
    """Puts so many messages of a priority into its queue, and returns their ids."""
    one = Publisher(settings)

    def put(priority: str, count: int) -> list[str]:
        ids = [new_id() for _ in range(count)]
        for job_id in ids:
            one.republish([job_id], priority)
        return ids

    return put


def test_a_process_has_so_many_shards_in_hand_and_takes_whatever_else_comes(
    publish: Publish, consumer: Consumer, settings: Settings
) -> None:
    shards = publish(work.ROUTE, 7)
    assert consumer.turns() == shards[:2]
    urgent = publish("normal", 1)
    assert consumer.turns() == [*shards[:2], *urgent]
    consumer.acknowledge(
        *consumer.shards
    )  # and nothing else comes, which alone would bring kombu's book up to date
    assert consumer.turns() == [*urgent, *shards[2:4]]
    consumer.acknowledge(consumer.shards[0])
    assert consumer.turns() == [*urgent, shards[3], shards[4]]
    assert Publisher(settings).queue_length(work.ROUTE) == 2
    assert consumer.most == IN_HAND


def test_whoever_is_urgent_may_have_every_place_and_shards_wait_until_one_is_free(
    publish: Publish, consumer: Consumer
) -> None:
    shards, urgent = publish(work.ROUTE, 3), publish("normal", THREADS + IN_HAND + 1)
    assert consumer.turns() == urgent[:-1]
    consumer.acknowledge(*consumer.held[:2])
    assert consumer.turns() == [*urgent[2:], shards[0]]
    consumer.acknowledge(*consumer.held[:3])
    assert consumer.turns() == [urgent[-1], shards[0], shards[1]]
    assert consumer.most == IN_HAND


def test_bulk_goes_before_shards_and_is_not_held_up_by_them(publish: Publish, consumer: Consumer) -> None:
    shards, bulk = publish(work.ROUTE, 3), publish("bulk", 2)
    assert consumer.turns() == [*bulk, *shards[:2]]


def test_a_shard_that_is_put_back_leaves_its_place(publish: Publish, consumer: Consumer) -> None:
    shards = publish(work.ROUTE, 3)
    assert consumer.turns() == shards[:2]
    back = consumer.shards[0]
    back.reject(requeue=True)
    consumer.held.remove(back)
    assert len(consumer.turns()) == IN_HAND
    assert consumer.most == IN_HAND


def test_a_lost_connection_gives_all_places_back(app: Any, publish: Publish, settings: Settings) -> None:
    shards = publish(work.ROUTE, 5)
    first = Consumer(app)
    assert first.turns() == shards[:2]
    with redis.Redis.from_url(settings.broker_url) as server:
        for client in server.client_list(_type="normal"):
            if int(client["id"]) != server.client_id():
                server.client_kill_filter(_id=client["id"])
    with contextlib.suppress(*first.connection.connection_errors):
        first.turns()
    first.channel.qos.restore_unacked_once()  # as it does when a process ends
    first.connection.release()
    again = Consumer(app)
    assert len(again.turns()) == IN_HAND
    assert again.most == IN_HAND
    again.acknowledge(*again.shards)
    assert len(again.turns()) == IN_HAND
    again.connection.release()


def bare(message_id: str) -> str:
    """As little as a stranger may write."""
    body = json.dumps([[{"id": message_id}], {}, {}])
    headers = {"id": message_id, "task": publisher.EXPLAIN}
    kinds = {"content-type": "application/json", "content-encoding": "utf-8"}
    return json.dumps({"body": body, "headers": headers, "properties": {}, **kinds})


FORMS: dict[str, Callable[[str], str]] = {
    "bare": str,
    "refused": lambda text: text.replace('"headers"', '"heads"'),
    "priority Infinity": lambda text: with_priority(text, "Infinity"),
    "priority NaN": lambda text: with_priority(text, "NaN"),
    "a huge priority": lambda text: with_priority(text, "9" * 5000),
    "priority is a text": lambda text: with_priority(text, '"high"'),
    "priority is a list": lambda text: with_priority(text, "[1]"),
    "deep": lambda text: with_priority(text, "[" * 5000 + "]" * 5000),
    "text after it": lambda text: f'{text}, "", "other"',
}


def with_priority(text: str, priority: str) -> str:
    """Shaped as kombu itself would have it."""
    given = f'"properties": {{"delivery_info": {{}}, "priority": {priority}}}'
    return text.replace('"properties": {}', given)


@pytest.mark.parametrize("form", ["ours", *FORMS])
def test_what_was_taken_by_somebody_who_died_before_he_read_it_comes_again(
    app: Any, publish: Publish, settings: Settings, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = f"{settings.key_prefix}{INTERACTIVE}"
    with redis.Redis.from_url(settings.broker_url) as server:
        if form == "ours":
            [message_id] = publish("high", 1)
        else:
            message_id = new_id()
            text = bare(message_id)
            server.lpush(key, FORMS[form](text))
        first = Consumer(app)
        first.connection.transport.cycle.on_poll_start()  # it asks
        assert first.channel.client.connection.can_read(timeout=WAIT_S)
        first.channel.client.connection.disconnect()  # and is no more
        assert not server.exists(key)
        [tag] = server.hkeys(f"{settings.key_prefix}unacked")
        server.zadd(f"{settings.key_prefix}unacked_index", {tag: 1})  # long ago
        second = Consumer(app)
        second.channel.qos.restore_visible()
        second.turns()
        assert [second.id(one) for one in second.held] == [message_id]
        second.acknowledge(*second.held)
        assert not server.exists(f"{settings.key_prefix}unacked", key)
        assert "Could not restore" not in caplog.text
    second.connection.release()


def test_a_message_that_was_received_is_noted_once_and_comes_again_if_it_is_not_acknowledged(
    app: Any, settings: Settings
) -> None:
    message_id = new_id()
    unacked = f"{settings.key_prefix}unacked"
    with redis.Redis.from_url(settings.broker_url, decode_responses=True) as server:
        server.lpush(f"{settings.key_prefix}{INTERACTIVE}", bare(message_id))
        first = Consumer(app)
        assert first.turns() == [message_id]
        [(tag, entry)] = server.hgetall(unacked).items()
        assert tag == first.held[0].delivery_tag
        assert entry == f'[{bare(message_id)}, "", "{INTERACTIVE}"]', "as the script wrote it"
        server.zadd(f"{unacked}_index", {tag: 1})  # long ago
        second = Consumer(app)
        second.channel.qos.restore_visible()
        assert second.turns() == [message_id]
        assert second.held[0].delivery_info["redelivered"]
    second.acknowledge(*second.held)
    second.connection.release()
    first.connection.release()


def test_where_scripts_are_not_allowed_messages_are_received_all_the_same(
    app: Any, publish: Publish, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> str:
        message = "this user has no permissions to run the 'script|load' command"
        raise redis.exceptions.NoPermissionError(message)

    monkeypatch.setattr(redis.Redis, "script_load", refuse)
    ids = publish("normal", 3)
    one = Consumer(app)
    assert one.turns() == ids
    assert caplog.text.count("received by BRPOP alone") == 1
    one.connection.release()


def test_a_server_that_has_forgotten_the_script_is_told_it_again(
    app: Any, publish: Publish, settings: Settings
) -> None:
    one = Consumer(app)
    first = publish("normal", 1)
    assert one.turns() == first
    with redis.Redis.from_url(settings.broker_url) as server:
        server.script_flush()
    assert one.turns() == first
    second = publish("normal", 2)
    assert one.turns() == [*first, *second]
    one.connection.release()


def acknowledged_first(app: Any, publish: Publish) -> tuple[Consumer, str]:
    """A consumer that has acknowledged the first of several messages, and its delivery tag."""
    publish("normal", 3)
    one = Consumer(app)
    one.connection.drain_events(timeout=WAIT_S)
    (message,) = one.held
    one.acknowledge(message)
    assert one.channel.unacknowledged() == {}, "there is room for another one"
    return one, message.delivery_tag


def test_an_acknowledgement_goes_with_the_next_request_for_a_message(
    app: Any, publish: Publish, settings: Settings
) -> None:
    unacked = f"{settings.key_prefix}unacked"
    one, tag = acknowledged_first(app, publish)
    with redis.Redis.from_url(settings.broker_url, decode_responses=True) as server:
        assert server.hkeys(unacked) == [tag]
        one.connection.drain_events(timeout=WAIT_S)
        assert server.hkeys(unacked) == [message.delivery_tag for message in one.held]
        assert server.zscore(f"{unacked}_index", tag) is None
        one.turns()
        one.acknowledge(*one.held)
        assert not server.exists(unacked), "no request follows: all queues are empty"
    one.connection.release()


@pytest.mark.parametrize("by", ["the event loop", "the end of the channel", "a script that is forgotten"])
def test_an_acknowledgement_that_waits_is_not_lost(
    app: Any, publish: Publish, settings: Settings, by: str
) -> None:
    unacked = f"{settings.key_prefix}unacked"
    one, tag = acknowledged_first(app, publish)
    with redis.Redis.from_url(settings.broker_url, decode_responses=True) as server:
        if by == "the event loop":
            one.channel.send_acks()
        elif by == "the end of the channel":
            one.channel.close()
        else:
            server.script_flush()
            one.turns()
        assert tag not in server.hkeys(unacked)
        assert server.zscore(f"{unacked}_index", tag) is None
    one.connection.release()


def test_without_a_limit_there_is_none(settings: Settings, publish: Publish) -> None:
    app = broker.make_app(settings.model_copy(update={"threads": THREADS, "shards": IN_HAND}))
    app.conf.broker_transport_options["unacknowledged_limits"] = {}
    shards = publish(work.ROUTE, 4)
    one = Consumer(app, (INTERACTIVE, SHARDS))
    assert one.turns() == shards
    one.connection.release()
