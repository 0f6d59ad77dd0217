"""Whatever lies in the queue: a real Celery consumer over a real Valkey, and a desk that takes notes."""

import base64
import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import redis
from celery.app.trace import reset_worker_optimizations, setup_worker_optimizations
from celery.bootsteps import RUN
from celery.concurrency.base import apply_target
from celery.worker import state
from celery.worker.control import Panel
from kombu.asynchronous.hub import Hub
from kombu.serialization import registry

from gradcam_worker.broker import app as broker
from gradcam_worker.broker import publisher
from gradcam_worker.broker.consumer import (
    MAX_CONNECT_PAUSE_S,
    REQUEUE_DELAY_S,
    ConsumerHooks,
    JobConsumer,
    Request,
    ThreadPool,
)
from gradcam_worker.broker.envelope import INSPECTIONS, check_job
from gradcam_worker.broker.transport import REPLY_TTL_MS, Channel
from gradcam_worker.errors import InvalidJob, LedgerUnavailable
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.resilience.stall import StallDetector
from gradcam_worker.runtime.processes import worker_process
from gradcam_worker.schemas import strict_json
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import RateLimitedCount

WAIT_S = 30
JOB = {"image": "s3://in/a.png", "network": "vgg16", "target": {"top_n": 1}}


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.01)


@dataclass
class Reception:
    """A worker that is no more than its consumer: what it hands on, and what it refuses."""

    settings: Settings
    redis: redis.Redis
    ledger_down: bool = False
    paused: bool = False
    said_paused: int = 0  # how often its channel was told so
    handled: dict[str, Any] = field(default_factory=dict)  # message id -> its one argument
    headers: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # message id -> why
    hold: threading.Event = field(default_factory=threading.Event)  # as long as it is not set, tasks wait
    raises: dict[str, BaseException] = field(default_factory=dict)  # message id -> once, in its thread
    holds: dict[str, threading.Event] = field(default_factory=dict)  # message id -> what its thread waits for
    stall: StallDetector = field(default_factory=lambda: StallDetector(lambda: False, math.inf))

    def is_paused(self) -> bool:
        self.said_paused += self.paused
        return self.paused

    def key(self, name: str) -> str:
        return f"{self.settings.key_prefix}{name}"

    def put(self, item: bytes, queue: str = publisher.INTERACTIVE) -> None:
        self.redis.lpush(self.key(queue), item)

    def aside(self) -> list[dict[str, Any]]:
        items: Any = self.redis.lrange(self.key("unreadable"), 0, -1)
        return [json.loads(item) for item in items]

    def goes_on(self) -> None:
        """It handles a good message that comes after."""
        message_id = new_id()
        self.put(envelope(message_id))
        wait_for(lambda: message_id in self.handled, "the next message")

    def unacked(self) -> int:
        return int(self.redis.hlen(self.key("unacked")))

    def refuse(self, message_id: str, why: str) -> None:
        if self.ledger_down:
            message = "The ledger is out of reach."
            raise LedgerUnavailable(message)
        self.refused[message_id] = why


def envelope(message_id: str, body: object = None, **changes: Any) -> bytes:
    """A message as Celery writes it; `headers` and `properties` are changed field by field."""
    body = json.dumps([[JOB], {}, {"chain": None}]).encode() if body is None else body
    headers = {"lang": "py", "task": publisher.EXPLAIN, "id": message_id, "root_id": message_id, "eta": None}
    properties = {
        "correlation_id": message_id,
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": publisher.INTERACTIVE},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": new_id(),
    }
    message = {
        "body": base64.b64encode(body).decode() if isinstance(body, bytes) else body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers | changes.pop("headers", {}),
        "properties": properties | changes.pop("properties", {}),
    }
    return json.dumps(message | changes).encode()


@pytest.fixture
def reception(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reception]:
    settings = settings.model_copy(update={"visibility_timeout_s": 5, "max_message_bytes": 100_000})
    app = broker.make_app(settings)
    with redis.Redis.from_url(settings.broker_url) as connection:
        handler = Reception(settings, connection)
        handler.hold.set()

        def explain(self: Any, *args: object) -> None:
            handler.hold.wait(WAIT_S)
            if error := handler.raises.pop(self.request.id, None):
                raise error
            if opened := handler.holds.pop(self.request.id, None):
                opened.wait(WAIT_S)
            handler.headers[self.request.id] = self.request.headers
            handler.handled[self.request.id] = [*args]

        app.task(explain, name=publisher.EXPLAIN, bind=True, shared=False, Request=Request)
        outage = Outages().broker
        hooks = ConsumerHooks(
            handler.refuse, lambda: None, handler.stall, outage, is_paused=handler.is_paused
        )
        setup_worker_optimizations(app)
        worker = app.WorkController(
            pool=ThreadPool,
            consumer_cls=partial(JobConsumer, hooks=hooks),
            concurrency=2,
            queues=list(publisher.QUEUES),
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
        thread = threading.Thread(target=worker.start, daemon=True)
        thread.start()
        try:
            handler.goes_on()
            yield handler
            assert thread.is_alive(), "the worker has ended"
            wait_for(lambda: handler.unacked() == 0, "the last acknowledgement")
        finally:
            monkeypatch.setattr(state, "should_stop", 0)
            thread.join(WAIT_S)
            assert not thread.is_alive()
            reset_worker_optimizations(app)


SHAPES: dict[str, bytes] = {
    "garbage": b"garbage",
    "nothing": b"",
    "binary": bytes(range(256)),
    "a list": b"[1, 2]",
    "a number": b"7",
    "a text": b'"text"',
    "null": b"null",
    "an object": b"{}",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 5_000,
    "no end": b'{"headers": {"a": 1',
    "utf-16": json.dumps({"headers": {}}).encode("utf-16"),
    "no id": b'{"headers": {}, "properties": {}, "body": ""}',
    "headers are a list": b'{"headers": [], "properties": {}, "body": ""}',
    "50 MB": b"x" * 50_000_000,
}


def test_an_item_without_a_name_is_set_aside_and_the_worker_goes_on(
    reception: Reception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "gradcam"):
        for item in SHAPES.values():
            reception.put(item)
        reception.put(b'{"password": "planted"}')
        reception.goes_on()
    kept = reception.aside()
    assert [one["bytes"] for one in kept[:0:-1]] == [len(item) for item in SHAPES.values()]
    assert reception.redis.get(reception.key("unreadable:count")) == str(len(SHAPES) + 1).encode()
    assert all(one["why"] and len(one["begins"]) < 1000 for one in kept)
    lines = [record.getMessage() for record in caplog.records]
    assert kept[0]["sha256"] in lines[-1], "the log has what it takes to find it"
    assert "planted" not in caplog.text, "and not what it says"
    assert not reception.refused


def test_a_worker_that_is_paused_leaves_messages_to_others_and_receives_them_afterwards(
    reception: Reception,
) -> None:
    reception.paused = True
    # What is under way by then may still take a message.
    wait_for(lambda: reception.said_paused > len(publisher.QUEUES), "the end of the last request")
    messages = [new_id() for _ in range(3)]
    for message_id in messages:
        reception.put(envelope(message_id))
    time.sleep(1.5)  # longer than it takes to check all lists again
    assert reception.redis.llen(reception.key(publisher.INTERACTIVE)) == len(messages)
    assert reception.unacked() == 0
    reception.paused = False
    wait_for(lambda: reception.handled.keys() >= {*messages}, "the messages")


def test_of_nameless_items_only_the_last_are_kept(reception: Reception) -> None:
    for number in range(130):
        reception.put(b"rubbish %d" % number)
    reception.goes_on()
    kept = reception.aside()
    assert (len(kept), kept[0]["begins"]) == (100, "rubbish 129")
    assert 0 < int(reception.redis.ttl(reception.key("unreadable"))) <= 7 * 86_400


HALVES = ("\ud800", "a\udfffb", '\\"\udc00 x')


def follow(**embed: Any) -> bytes:
    return json.dumps([[JOB], {}, embed]).encode()


def with_job(text: str) -> bytes:
    """A body whose job says this."""
    return b"[[%s], {}, {}]" % text.encode()


# What a stranger may write under an id, and what the answer must say.
MESSAGES: dict[str, tuple[dict[str, Any], str]] = {
    "too large a body": (
        {"body": with_job(f'"{"x" * 101_100}"')},
        "its body has 101,114 bytes; at most 101,024",
    ),
    "too large an item": ({"body": b"x" * 5_000_000}, "GRADCAM_MAX_MESSAGE_BYTES"),
    "too large headers": ({"headers": {"more": "x" * 900_000}}, "GRADCAM_MAX_MESSAGE_BYTES"),
    "a deep body": ({"body": with_job("[" * 17 + "]" * 17)}, "deeper than 16 levels"),
    "a very deep body": ({"body": b"[" * 90_000}, "deeper than 16 levels"),
    "depth between strings": ({"body": with_job('"\\\\", "\\"[", ' + "[" * 15 + "]" * 15)}, "16 levels"),
    "NaN": ({"body": with_job('{"timeout_s": NaN}')}, "holds NaN"),
    "Infinity": ({"body": with_job('{"timeout_s": -Infinity}')}, "holds -Infinity"),
    "an infinite float": ({"body": with_job("1e999")}, "larger than any float64"),
    "a huge number": ({"body": with_job("9" * 50_000)}, "50,000 digits; at most 40"),
    "a field twice": ({"body": with_job('{"image": "s3://a", "image": "s3://b"}')}, "names a field twice"),
    "kombu's own types": ({"body": with_job('{"__type__": "decimal", "__value__": "1e9"}')}, "__type__"),
    "not JSON": ({"body": b"garbage"}, "cannot be read as JSON"),
    "not UTF-8": ({"body": b"\xff\xfe"}, "is not UTF-8"),
    "not a call": ({"body": b"[1]"}, "must be a list of arguments"),
    "an empty body": ({"body": b""}, "cannot be read as JSON"),
    "not base64": ({"body": "?"}, "not base64"),
    "a body that is a number": ({"body": 7}, "its body must be text"),
    "another encoding": ({"content-encoding": "utf-7"}, "JSON in UTF-8"),
    "pickle": ({"content-type": "application/x-python-serialize"}, "JSON in UTF-8"),
    "compressed": ({"headers": {"compression": "bzip2"}}, "compressed"),
    "no task": ({"headers": {"task": None}}, "names no task"),
    "a task that is a list": ({"headers": {"task": ["a"]}}, "names no task"),
    "another task": (
        {"headers": {"task": "gradcam.everything\n"}},
        "no task of that name in the queue gradcam.interactive, only gradcam.explain",
    ),
    "the task of somebody's own": (
        {"headers": {"task": "shop.tasks.explain"}},
        "no task 'shop.tasks.explain'",
    ),
    "a task that may be a secret": ({"headers": {"task": "whsec_x"}}, "no task of that name"),
    "for later": ({"headers": {"eta": "2199-01-01T00:00:00Z"}}, "eta is not allowed"),
    "for a while": ({"headers": {"expires": "2001-01-01T00:00:00Z"}}, "say expires_at in the job"),
    "a task that follows": ({"body": follow(callbacks=[{"task": "x"}])}, "tasks that are to follow"),
    "a chain": (
        {"body": follow(chain=[{"task": "x", "options": {"queue": "y"}}])},
        "tasks that are to follow",
    ),
    "a shard's task among jobs": (
        {"headers": {"task": publisher.EXPLAIN_SHARD}},
        "no task 'gradcam.explain_shard' in the queue gradcam.interactive, only gradcam.explain",
    ),
    "half a pair in the job": ({"body": with_job('"\\ud800x"')}, r"half of a surrogate pair ('\ud800')"),
    "half a pair in a name": ({"body": with_job('{"\\udfff": 1}')}, "half of a surrogate pair"),
    "half a pair in a header": ({"headers": {"origin": "\ud800"}}, "half of a surrogate pair"),
    "half a pair in the task": ({"headers": {"task": "\udc00"}}, "half of a surrogate pair"),
    "half a pair in a property": ({"properties": {"reply_to": "\udc00"}}, "half of a surrogate pair"),
    "an envelope that is too deep": ({"headers": {"x": json.loads("[" * 20 + "]" * 20)}}, "16 levels"),
}


def test_a_message_that_is_no_task_is_refused_under_its_id_with_the_reason(reception: Reception) -> None:
    expected = {}
    for what, (changes, why) in MESSAGES.items():
        message_id = new_id()
        expected[message_id] = (what, why)
        reception.put(envelope(message_id, **changes))
    reception.goes_on()
    wrong = {
        what: reception.refused.get(message_id)
        for message_id, (what, why) in expected.items()
        if why not in reception.refused.get(message_id, "")
    }
    assert not wrong
    assert not expected.keys() & reception.handled.keys()
    assert not reception.aside()


def test_a_task_of_celerys_own_is_refused_before_celery_sees_it(reception: Reception) -> None:
    """Each would publish, or run, what its arguments say, with the worker's rights."""
    item = {"task": publisher.EXPLAIN, "args": [JOB], "options": {"queue": "events:1:hook1", "task_id": "x"}}
    bodies: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "celery.group": ([[item], None, None], {}),
        "celery.map": ([item, [[JOB]]], {}),
        "celery.starmap": ([item, [[JOB]]], {}),
        "celery.chunks": ([item, [[JOB]], 1], {}),
        "celery.chain": ([item], {}),
        "celery.chord": ([[item], item], {}),
        "celery.chord_unlock": (["g", item], {"result": []}),
        "celery.accumulate": ([1], {}),
        "celery.backend_cleanup": ([], {}),
        "celery.ping": ([], {}),
    }
    ids = {}
    for queue in publisher.QUEUES:
        for name, (args, kwargs) in bodies.items():
            message_id = ids[queue, name] = new_id()
            body = json.dumps([args, kwargs, {}]).encode()
            reception.put(envelope(message_id, body, headers={"task": name}), queue)
    ids[publisher.SHARDS, publisher.EXPLAIN] = message_id = new_id()
    reception.put(envelope(message_id), publisher.SHARDS)
    reception.goes_on()
    wait_for(lambda: {*ids.values()} <= reception.refused.keys(), "the refusals")
    for (queue, name), message_id in ids.items():
        assert f"no task {name!r} in the queue {queue}, only" in reception.refused[message_id]
    assert not reception.aside()
    left: Any = reception.redis.keys(reception.key("*events*"))
    assert not left, "nothing was published"


def test_only_the_two_tasks_are_there(settings: Settings) -> None:
    app = broker.make_app(settings)
    worker_process.register(app, Mock(), Outages().ledger)
    assert {*app.tasks} == {"gradcam.explain", "gradcam.explain_shard"}


def test_a_message_whose_id_is_no_utf_8_is_refused_under_what_it_says(reception: Reception) -> None:
    for half in HALVES:
        reception.put(envelope(half))
    reception.goes_on()
    assert {*reception.refused} == {half.encode(errors="backslashreplace").decode() for half in HALVES}
    assert all("half of a surrogate pair" in why for why in reception.refused.values())
    assert not reception.aside()


STUMBLING_BLOCKS: tuple[dict[str, Any], ...] = (
    {},
    {"headers": {"timelimit": "x", "shadow": "a\nb", "retries": "x", "argsrepr": 7, "origin": {}, "lang": 5}},
    {"properties": {"delivery_tag": ["x"], "priority": 1e300, "reply_to": {}, "correlation_id": None}},
    {"properties": {"delivery_info": None, "priority": "x"}},
    {"properties": {"delivery_info": {"routing_key": "job:1", "exchange": ["a"]}}},
    {"body": with_job('"\\ud83d\\ude00\\u0000\\n"')},
    {"body": b'[[], {"self": {}}, {"callbacks": null}]'},
    {"headers": {publisher.ENTERED_AT: "2026-01-01T00:00:00Z"}},
    {"body": json.dumps([[], {"self": JOB, "task_id": 1, "\ud83d\ude00": 2}, {}]).encode()},
    {"properties": {"body_encoding": "utf-8"}, "body": with_job('"plain"').decode()},
)


def test_what_only_kombu_and_celery_would_stumble_over_is_left_out(reception: Reception) -> None:
    for number, changes in enumerate(STUMBLING_BLOCKS):
        reception.put(envelope(f"message {number}", **changes))
    reception.goes_on()
    wait_for(lambda: not reception.unacked(), "the acknowledgements")
    assert {f"message {number}" for number in range(len(STUMBLING_BLOCKS))} <= reception.handled.keys()
    assert not reception.refused
    assert not reception.aside()
    assert reception.handled["message 8"] == [JOB, 1, 2]
    assert reception.headers["message 7"][publisher.ENTERED_AT] == "2026-01-01T00:00:00Z"


def test_two_messages_with_one_delivery_tag_do_not_take_each_others_place(reception: Reception) -> None:
    first, second = new_id(), new_id()
    for message_id in (first, second):
        reception.put(envelope(message_id, properties={"delivery_tag": "mine"}))
    wait_for(lambda: {first, second} <= reception.handled.keys(), "both messages")


def test_a_refusal_that_cannot_be_written_down_comes_again_with_its_reason(
    reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.broker.consumer.REQUEUE_DELAY_S", 0)
    message_id = new_id()
    reception.ledger_down = True
    reception.put(envelope(message_id, body=b"garbage"))
    reception.goes_on()
    assert not reception.refused
    reception.ledger_down = False
    wait_for(lambda: message_id in reception.refused, "the refusal")
    assert "its body cannot be read as JSON" in reception.refused[message_id]


def test_a_refusal_that_cannot_be_written_down_waits_before_it_comes_again_and_is_progress() -> None:
    consumer, message = Mock(), Mock(delivery_tag="tag", headers={"id": "a"})
    message.channel.closed, consumer.pool.running = False, set()
    message.channel.unacknowledged.return_value = {"tag": message}
    consumer.hooks.refuse.side_effect = LedgerUnavailable("gone")
    consumer._requeue_later = partial(JobConsumer._requeue_later, consumer)
    JobConsumer._refuse(consumer, message, "it is none")
    assert consumer.hooks.stall.progressed.called
    assert not message.method_calls
    pause_s, requeue = consumer.timer.call_after.call_args.args
    requeue()
    assert pause_s == REQUEUE_DELAY_S
    assert message.reject_log_error.call_args.kwargs == {"requeue": True}
    assert not message.ack_log_error.called


def test_each_failed_attempt_to_connect_is_reported_as_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradcam_worker.broker.consumer.CONNECT_PAUSE_S", 0)
    consumer, connection = Mock(), Mock()
    consumer._report_outage = partial(JobConsumer._report_outage, consumer)
    JobConsumer.on_connection_error_before_connected(consumer, OSError("refused"))
    assert JobConsumer.ensure_connected(consumer, connection) is connection
    [report], options = connection.ensure_connection.call_args
    report(OSError("away"), 0.5)
    reported = [call.args[0] for call in consumer.hooks.broker_outage.failed.call_args_list]
    assert [text.rpartition(": ")[2] for text in reported] == ["refused", "away"]
    assert options["interval_max"] == MAX_CONNECT_PAUSE_S


def test_a_message_that_is_put_back_later_is_left_alone_when_a_thread_has_it_or_its_connection_is_gone() -> (
    None
):
    consumer, message = Mock(), Mock(delivery_tag="tag", headers={})
    for closed, running, held in (True, {}, {"tag"}), (False, {"tag"}, {"tag"}), (False, {}, {}):
        message.channel.closed, consumer.pool.running = closed, running
        message.channel.unacknowledged.return_value = held
        JobConsumer._requeue_later(consumer, message, "why")
        consumer.timer.call_after.call_args.args[1]()
    assert not message.reject_log_error.called


def test_a_job_for_which_there_is_no_thread_is_not_refused_comes_again_and_runs_once(
    reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.broker.consumer.REQUEUE_DELAY_S", 0)
    begun, failures = list[str](), list[int]()
    apply, start = apply_target, ThreadPoolExecutor._adjust_thread_count

    def counted(target: Any, args: Any, *others: Any) -> None:
        begun.append(args[1])
        apply(target, args, *others)

    def limited(self: ThreadPoolExecutor) -> None:
        if len(failures) < 2:
            failures.append(1)
            message = "can't start new thread"
            raise RuntimeError(message)
        start(self)

    first, second, opened = new_id(), new_id(), threading.Event()
    reception.holds = {first: opened}
    monkeypatch.setattr("gradcam_worker.broker.consumer.apply_target", counted)
    reception.put(envelope(first))
    wait_for(lambda: not reception.holds, "its start")
    monkeypatch.setattr(ThreadPoolExecutor, "_adjust_thread_count", limited)
    reception.put(envelope(second))
    wait_for(lambda: second in reception.handled, "the second, while the first has the only thread")
    opened.set()
    reception.goes_on()
    assert not reception.refused
    assert len(failures) == 2
    assert (begun.count(first), begun.count(second)) == (1, 1), "what could not be started is void"


def test_a_message_for_which_memory_runs_out_comes_again_and_one_that_cannot_be_decoded_is_refused(
    reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, failures = registry._decoders["application/json"], [MemoryError()]
    short_of_memory, unreadable = new_id(), new_id()

    def fail(body: Any) -> Any:
        if unreadable in str(body):
            raise ValueError
        if failures:
            raise failures.pop()
        return decode(body)

    monkeypatch.setitem(registry._decoders, "application/json", fail)
    reception.put(envelope(short_of_memory))
    reception.put(envelope(unreadable, json.dumps([[unreadable], {}, {}]).encode()))
    wait_for(lambda: short_of_memory in reception.handled and reception.refused, "both ends")
    assert not failures
    assert reception.refused == {unreadable: "its body cannot be read as JSON (DecodeError)"}


def test_rubbish_among_the_unacknowledged_keeps_no_other_message_there(reception: Reception) -> None:
    message_id = new_id()
    good = json.loads(envelope(message_id))
    held = {
        "garbage": b"garbage",
        "deep": b"[" * 100_000,
        "a list": b'[[1], "", "x"]',
        "two": b'[{}, ""]',
        "no properties": json.dumps([{"headers": {}}, "", publisher.INTERACTIVE]).encode(),
        "good": json.dumps([good, "", publisher.INTERACTIVE]).encode(),
    }
    for number, (tag, item) in enumerate(held.items()):
        reception.redis.hset(reception.key("unacked"), tag, item)
        reception.redis.zadd(reception.key("unacked_index"), {tag: number})
    wait_for(lambda: message_id in reception.handled, "the good message's return")
    wait_for(lambda: len(reception.aside()) == len(held) - 1, "the others' removal")
    assert {one["queue"] for one in reception.aside()} == {"unacked"}


def asking(settings: Settings) -> Any:
    """An app of Celery that only asks workers, with kombu's own transport."""
    app = broker.make_app(settings)
    app.conf.broker_transport = None
    return app


class Panic(BaseException):
    """As a library in Rust panics: no Exception."""


def test_whatever_a_thread_raises_its_message_comes_again_and_its_place_is_free(
    reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradcam_worker.broker.consumer.REQUEUE_DELAY_S", 0)
    errors = [Panic("too long"), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), MemoryError()]
    reception.raises = {f"message {number}": error for number, error in enumerate(errors)}
    for message_id in [*reception.raises]:
        reception.put(envelope(message_id))
    wait_for(lambda: len(reception.handled) > len(errors), "their return")
    wait_for(lambda: reception.unacked() == 0, "the acknowledgements")
    assert not reception.raises


def test_a_message_that_nobody_is_at_work_on_goes_back(
    reception: Reception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What should never be: as many as there are places, and nothing would be received any more."""
    monkeypatch.setattr("gradcam_worker.broker.consumer.TURN_INTERVAL_S", 0.05)
    monkeypatch.setattr("gradcam_worker.broker.consumer.ORPHANED_AFTER_S", 0.2)
    lost: list[Any] = []
    submit = ThreadPool.on_apply

    def forget(self: ThreadPool, *args: Any, **options: Any) -> Any:
        if len(lost) < 2:
            lost.append(args)
            return None
        return submit(self, *args, **options)

    told: list[int] = []
    monkeypatch.setattr(reception.stall, "orphaned_messages", told.append)
    monkeypatch.setattr(ThreadPool, "on_apply", forget)
    ids = [new_id() for _ in range(3)]
    for message_id in ids:
        reception.put(envelope(message_id))
    wait_for(lambda: reception.handled.keys() >= {*ids}, "all of them")
    assert len(lost) == 2
    assert caplog.text.count("orphaned_message_requeued") == 2
    assert 2 in told


def test_a_renewal_that_another_error_has_overtaken_is_no_error_of_its_own() -> None:
    for overtaken in (True, False):
        consumer, hub = object.__new__(JobConsumer), Hub()
        consumer.hub, consumer.blueprint = hub, SimpleNamespace(state=RUN)
        consumer._renew_connection(ConnectionError("gone"))
        if overtaken:
            hub.reset()
        else:
            with pytest.raises(ConnectionError, match="gone"):
                next(hub.create_loop())
        assert not hub.on_close
        hub.close()


def waiting_connections(server: redis.Redis) -> int:
    """How many connections wait, or last waited, for a message in an empty list."""
    return sum(client["cmd"] == "blmove" for client in server.client_list())


@contextlib.contextmanager
def refusing_writes(server: redis.Redis, how: str) -> Iterator[None]:
    """A server that answers, and takes no writes: it has lost its replicas, or is one itself by now."""
    if how == "NOREPLICAS":
        server.config_set("min-replicas-to-write", 1)
    else:
        server.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        server.config_set("min-replicas-to-write", 0)
        server.replicaof("NO", "ONE")


@pytest.mark.filterwarnings("ignore::celery.exceptions.CPendingDeprecationWarning")
@pytest.mark.parametrize("how", ["NOREPLICAS", "READONLY"])
def test_a_failed_acknowledgement_renews_the_connection_and_leaves_none_behind(
    reception: Reception, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("gradcam_worker.broker.consumer.CONNECT_PAUSE_S", 0.02)
    connects = 0
    connect = JobConsumer.connect

    def counted(self: JobConsumer) -> Any:
        nonlocal connects
        connects += 1
        return connect(self)

    monkeypatch.setattr(JobConsumer, "connect", counted)
    lists = len({*publisher.ROUTES.values()})
    wait_for(lambda: waiting_connections(reception.redis) == lists, "waiting at all lists")
    ids, opened = [new_id(), new_id()], threading.Event()  # as many as there are slots
    reception.holds = dict.fromkeys(ids, opened)
    for message_id in ids:
        reception.put(envelope(message_id))
    wait_for(lambda: not reception.holds, "their start")
    before = len(reception.redis.client_list())
    with refusing_writes(reception.redis, how):
        opened.set()
        wait_for(lambda: connects > 10, "attempts to connect")
        during = len(reception.redis.client_list())
    reception.goes_on()
    wait_for(lambda: len(reception.redis.client_list()) <= before + 4, "the end of other connections")
    assert during <= before + 4
    assert {*ids} <= reception.handled.keys()


@pytest.mark.filterwarnings("ignore::celery.exceptions.CPendingDeprecationWarning")
def test_a_consumer_leaves_a_master_that_was_replaced(
    reception: Reception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The master still answers: only the Sentinels say it (`tests/faults/test_sentinel.py` has real ones)."""
    connect, replaced = JobConsumer.connect, threading.Event()

    def connected(self: JobConsumer) -> Any:
        replaced.set()
        return connect(self)

    monkeypatch.setattr(JobConsumer, "connect", connected)
    monkeypatch.setattr(Channel, "has_moved", property(lambda _: not replaced.is_set()))
    wait_for(replaced.is_set, "a new connection")
    reception.goes_on()


def command(method: object, **more: Any) -> bytes:
    """A remote command as Celery writes it."""
    reply_to = {"exchange": "reply.celery.pidbox", "routing_key": new_id()}
    asked = {"method": method, "arguments": {}, "destination": None, "reply_to": reply_to, "ticket": new_id()}
    return envelope(new_id(), json.dumps(asked | more).encode())


COMMANDS = (
    b"garbage",
    b"[" * 100_000,
    b"{}",
    b'{"headers": {}}',
    b"7",
    b"\xff",
    command("ping", pattern="(a+)+$", matcher="pcre"),
    command("ping", reply_to={"exchange": "gradcam.bulk", "routing_key": "gradcam.bulk"}),
    command("ping", reply_to=None),
    command("ping", ticket={}),
    command("ping", destination=7),
    command(["ping"]),
    command("hello", arguments={"from_node": "x", "revoked": ["me"]}),
    *map(command, Panel.data.keys() - INSPECTIONS),
)


def test_a_remote_command_that_does_more_than_ask_is_ignored_with_a_line(
    reception: Reception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[int] = []
    seldom = RateLimitedCount(3600)

    def ignored() -> int:
        lines.append(seldom())
        return lines[-1]

    monkeypatch.setattr("gradcam_worker.broker.transport.ignored_commands", ignored)
    wait_for(reception.redis.pubsub_numpat, "its listening")
    channel, control = reception.key("/0.celery.pidbox"), asking(reception.settings).control
    with caplog.at_level(logging.WARNING):
        for one in COMMANDS:
            assert reception.redis.publish(channel, one) == 1
        control.revoke("revoked", terminate=True)
        control.rate_limit(publisher.EXPLAIN, "1/h")
        control.time_limit(publisher.EXPLAIN, soft=1, hard=1)
        control.cancel_consumer(publisher.INTERACTIVE)
        control.add_consumer("stolen")
        control.pool_shrink(2)
        control.pool_restart(reload=True)
        control.enable_events()
        control.shutdown()
        wait_for(lambda: len(lines) == len(COMMANDS) + 9, "the commands' arrival")
        reception.put(envelope("revoked"))
        reception.goes_on()
        reception.goes_on()
    assert "revoked" in reception.handled
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, "the others are counted"
    assert said[0].startswith('remote_command_ignored reason="its envelope cannot be read as JSON')
    assert not {key for key in reception.redis.keys(reception.key("*")) if b"stolen" in key}


def test_ping_and_inspection_are_answered_and_show_no_job_and_no_password(reception: Reception) -> None:
    app = asking(reception.settings)
    wait_for(reception.redis.pubsub_numpat, "its listening")
    secret = {**JOB, "image": "https://host/a.png?X-Amz-Signature=planted"}
    reception.hold.clear()
    try:
        for _ in range(3):  # one more than there are threads
            reception.put(envelope(new_id(), json.dumps([[secret], {}, {}]).encode()))
        wait_for(lambda: reception.unacked() >= 2, "their arrival")
        inspect = app.control.inspect(timeout=WAIT_S, limit=1)
        found = {name: getattr(inspect, name)() for name in INSPECTIONS}
    finally:
        reception.hold.set()
    for name, answer in found.items():
        assert answer, name
        assert len(answer) == 1
        assert "error" not in next(iter(answer.values())), name
    assert "planted" not in json.dumps(found)
    answers = {name: next(iter(answer.values())) for name, answer in found.items()}
    assert answers["ping"] == {"ok": "pong"}
    assert [one["name"] for one in answers["active"]] == [publisher.EXPLAIN] * 2
    assert [one["name"] for one in answers["active_queues"]] == [*publisher.QUEUES]


def test_an_answer_goes_to_nobody_else_whatever_is_bound(reception: Reception) -> None:
    wait_for(reception.redis.pubsub_numpat, "its listening")
    mine = {"exchange": "reply.celery.pidbox", "routing_key": "mine"}
    bound = reception.key("_kombu.binding.reply.celery.pidbox")
    for queue in ("events:1:hook1", "mine.reply.celery.pidbox"):
        reception.redis.sadd(bound, f"mine\x06\x16\x06\x16{queue}")
    reception.redis.publish(reception.key("/0.celery.pidbox"), command("ping", reply_to=mine))
    wait_for(lambda: reception.redis.llen(reception.key("mine.reply.celery.pidbox")), "the answer")
    assert not reception.redis.exists(reception.key("events:1:hook1"))
    wait_for(
        lambda: 0 < int(reception.redis.pttl(reception.key("mine.reply.celery.pidbox"))) <= REPLY_TTL_MS,
        "that an answer that nobody fetches gets a time to live",
    )


def test_what_is_said_seldom_says_how_often_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("gradcam_worker.broker.transport.time.monotonic", lambda: now[0])
    seldom = RateLimitedCount(10)
    assert [seldom(), seldom(), seldom()] == [1, 0, 0]
    now[0] += 10
    assert [seldom(), seldom()] == [3, 0]


def test_who_submits_a_job_that_no_worker_would_read_hears_it_at_once() -> None:
    check_job(json.dumps(JOB).encode(), 200)
    with pytest.raises(InvalidJob, match=r"it has 11,\d+ bytes; at most 10,000 are allowed \(GRADCAM_MAX"):
        check_job(json.dumps({**JOB, "image": "x" * 11_000}).encode(), 10_000)
    with pytest.raises(InvalidJob, match="50 digits"):
        check_job(json.dumps({**JOB, "target": {"classes": [10**49]}}).encode(), 10_000)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 16 + "]" * 16,
        '["[[[[[[[[[[[[[[[[[[[[[", "\\\\", "\\"{{{{{{{{{{{{{{{{{{{{{{{"]',
        "[{}, [], {}]" * 1,
    ],
)
def test_only_brackets_that_are_open_at_once_count_as_depth(text: str) -> None:
    assert strict_json.loads(text.encode(), "it") == json.loads(text)


def test_a_megabyte_of_brackets_and_quotes_is_judged_in_no_time() -> None:
    hard = [
        b"[" * 10**6,
        b"[]" * 500_000,
        b'"\\"' * 350_000,
        b'[{"a":' * 150_000,
        b"[[]" * 300_000,
        b"\\" * 10**6,
    ]
    begun = time.process_time()
    for text in hard:
        with pytest.raises(strict_json.Unreadable):
            strict_json.loads(text, "it")
    assert time.process_time() - begun < 10, "seconds of this process, where it needs a tenth of one"
