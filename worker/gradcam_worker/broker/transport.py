"""Kombu's Redis transport, made to keep its connections and to survive what strangers put into a queue."""

import hashlib
import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import redis.exceptions
from kombu.exceptions import KombuError
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str

from gradcam_worker.broker import message as envelope
from gradcam_worker.ledger.redis.script import Key, LuaScript
from gradcam_worker.schemas import strict_json
from gradcam_worker.schemas.ids import utc_now

log = logging.getLogger("gradcam")

UNREADABLE_KEY = "unreadable"  # a list in Redis, and with `:count` how many there ever were
UNREADABLE_MAX = 100  # items
UNREADABLE_BYTES = 200  # of each item: enough to see what it is
UNREADABLE_TTL_MS = 7 * 86_400_000  # after the last one
ANSWER_MS = 60_000  # to a remote command: more than anybody waits for one
IGNORED_EVERY_S = 10.0  # between two lines about remote commands
CHECK_ALL_EVERY_S = 1.0  # between two looks at all lists while they are empty
PEEK_TIMEOUT_S = 1  # that a thread waits at its list at a time
NOT_ALLOWED = ""  # in the place of a script that may not be run here
CHECK_ROOM_EVERY_S = 0.05  # between two looks whether a queue that is at its limit has room again
EMPTY = kombu_redis.Empty


@dataclass(frozen=True, kw_only=True)
class Receive(LuaScript[tuple[int, bytes] | None], file="receive"):
    """Take an item and note it as unacknowledged in one step. Returns which list it was in, and the item."""

    unacked: Key
    unacked_index: Key
    lists: Sequence[Key]
    delivery_tag: str
    received_s: str
    queues: Sequence[str]  # as JSON


class QoS(kombu_redis.QoS):  # type: ignore[misc]  # kombu ships no types
    """Kombu's book of unacknowledged messages, where one that is rubbish does not keep the others there."""

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Put a message back into its queue; what cannot be put back is set aside.

        As kombu's, which would put it back as a stranger wrote it, or lose it and log what it says.
        """
        rubbish: list[bytes] = []

        def restore(pipe: Any) -> None:
            rubbish.clear()
            held = pipe.hget(self.unacked_key, tag)
            pipe.multi()
            self._remove_from_indices(tag, pipe)
            if not held:
                return
            channel = self.channel
            if opened := envelope.reopened(held, channel.max_message_bytes, channel.tasks):
                channel._do_restore_message(*opened, pipe, leftmost)  # noqa: SLF001  # as kombu does
            else:
                rubbish.append(held)

        with self.channel.conn_or_acquire(client) as connected:
            connected.transaction(restore, self.unacked_key)
        for item in rubbish:
            self.channel.set_aside(item, self.unacked_key, "it cannot be put back into a queue")


class Message(virtual.Message):  # type: ignore[misc]
    """Kombu's message, which tells its channel where it could not be acknowledged: kombu only logs that."""

    def ack_log_error(self, logger: Any, errors: Any, multiple: bool = False) -> None:  # noqa: ARG002
        """Acknowledge it; see `Channel.ack_failed`."""
        self._settle(partial(self.ack, multiple=multiple), errors)

    def reject_log_error(self, logger: Any, errors: Any, requeue: bool = False) -> None:  # noqa: ARG002
        """Give it back, or drop it; see `Channel.ack_failed`."""
        self._settle(partial(self.reject, requeue=requeue), errors)

    def _settle(self, how: Callable[[], None], errors: Any) -> None:
        try:
            how()
        except (*errors, redis.exceptions.RedisError) as error:
            self.channel.ack_failed(self.headers.get("id"), error)


class Channel(kombu_redis.Channel):  # type: ignore[misc]
    """Kombu's channel, with one Redis client for as long as its pool of connections lives.

    As it comes, it makes a client anew for each message that it receives and for each that it
    acknowledges: a sixth of the CPU time of a worker whose jobs do nothing. And when a broker that
    restarts has closed it, it fails with an AttributeError, over which the worker ends; as it does
    over an item that is no JSON, or not what kombu itself would write.
    """

    QoS = QoS
    Message = Message
    from_transport_options = (
        *kombu_redis.Channel.from_transport_options,
        "max_message_bytes",
        "most_in_hand",
        "tasks",
        "peeked",
    )
    max_message_bytes = 1024 * 1024  # of a job as JSON
    on_ack_failed: Callable[[Exception], None] = staticmethod(lambda _: None)
    most_in_hand: Mapping[
        str, int
    ] = {}  # queue -> messages that are not yet acknowledged, where it is limited

    tasks: Mapping[str, str] = {}  # queue -> the one task that it is for

    peeked: Sequence[tuple[str, int]] = ()  # queue and priority: lists that are waited at

    _reused_client: Any = None
    _peeks: "_Peeks | None" = None
    _checked_all_s = 0.0  # when all lists were looked at last
    _queue_cycle: Any
    _all_empty = False  # all queues were, at the last look
    _receive_sha: str | None = None  # of `Receive`, where the server has it
    _receive_tag = ""  # the delivery tag of the receive script that is under way; empty with BRPOP
    _receive_queues = tuple[str, ...]()  # the queue of each list that it looks at

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:
            return super()._create_client(asynchronous)
        if self._reused_client is None or self._reused_client.connection_pool is not self.pool:
            self._reused_client = super()._create_client()
        return self._reused_client

    def _get_pool(self, asynchronous: bool = False) -> Any:
        if not (self.connection and self.connection.client):
            message = "The channel is closed."
            raise ConnectionError(message)
        return super()._get_pool(asynchronous)

    def close(self) -> None:
        """As kombu's, which puts back what is not acknowledged when its connections are closed already.

        For that it opens others, which nobody would close. That it cannot be put back now is no reason to
        leave anything open: it comes again when its visibility timeout is over.
        """
        try:
            super().close()
        except (redis.exceptions.RedisError, KombuError, OSError) as error:
            log.debug("messages were not put back: %s", error)
        finally:
            self.closed = True
            self._reused_client = None
            if self._peeks:
                self._peeks.close()
            self._disconnect_pools()

    def has_room(self, queue: str) -> bool:
        """Whether another message of this queue may be received now."""
        most = self.most_in_hand.get(queue)
        return most is None or self._in_hand(queue) < most

    def _in_hand(self, queue: str) -> int:
        # Kombu has no other way. What is acknowledged it strikes out when the next message comes, which for
        # want of room would be never.
        held = self.unacknowledged().values()
        return sum(one.delivery_info.get("routing_key") == queue for one in held)

    def unacknowledged(self) -> dict[str, Any]:
        """The messages that were received here and are not acknowledged yet, by delivery tag."""
        book = self.qos
        return {tag: one for tag, one in [*book._delivered.items()] if tag not in book._dirty}  # noqa: SLF001

    def ack_failed(self, message_id: object, error: Exception) -> None:
        """A message could not be acknowledged. It comes again, here or elsewhere, and then costs nothing."""
        if self.closed:  # its connection was given up meanwhile, and all that it held
            log.debug("message %s was received by a connection that is closed: %s", message_id, error)
            return
        log.debug("message %s could not be acknowledged: %s", message_id, error)
        self.on_ack_failed(error)

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for the next item of the queues that have room; soon again, where one has none just now.

        As long as there are any, each is written down as unacknowledged in the step that takes it: whoever
        dies before he reads it loses nothing. Where all queues are empty the next one is waited for without
        taking it (see `_Peeks`); with BRPOP, which cannot do that, only where nobody peeks.
        """
        peeks = self._peeks if self._peeks and self._peeks.usable else None
        if peeks and self._all_empty and time.monotonic() - self._checked_all_s < CHECK_ALL_EVERY_S:
            peeks.begin()
            return
        if (peeks or not self._all_empty) and self._ask_for_one():
            return
        all_queues: Any = self._queue_cycle
        self._queue_cycle, self._receive_tag = _WithRoom(all_queues, self.has_room), ""
        try:
            super()._brpop_start(
                timeout if all(map(self.has_room, self.most_in_hand)) else CHECK_ROOM_EVERY_S
            )
        finally:
            self._queue_cycle = all_queues

    def _ask_for_one(self) -> bool:
        """Ask by `Receive`; False where that cannot be done."""
        queues = [
            queue for queue in self._queue_cycle.consume(len(self.active_queues)) if self.has_room(queue)
        ]
        if not queues or self._receive_sha == NOT_ALLOWED:
            return False
        if self._receive_sha is None:
            self._receive_sha = self._load_receive()
            if self._receive_sha == NOT_ALLOWED:
                return False
        self._receive_queues = tuple(queue for _ in self.priority_steps for queue in queues)
        lists = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
        self._receive_tag, connection = str(uuid.uuid4()), self.client.connection
        call = Receive(
            unacked=self._key(self.unacked_key),
            unacked_index=self._key(self.unacked_index_key),
            lists=[self._key(one) for one in lists],
            delivery_tag=self._receive_tag,
            received_s=repr(time.time()),
            queues=[json.dumps(queue) for queue in self._receive_queues],
        )
        self._in_poll = connection
        self._checked_all_s = self._brpop_sent_at = time.monotonic()
        keys = call.keys()
        connection.send_command("EVALSHA", self._receive_sha, len(keys), *keys, *call.arguments())
        return True

    def _key(self, name: str) -> Key:
        return Key(f"{self.global_keyprefix}{name}")

    def wait_by_peeking(self, wake: Callable[[], object]) -> None:
        """From now on, take nothing while waiting; `wake`, called from any thread, has the loop go round."""

        def found() -> None:
            self._all_empty = False
            wake()

        if self._peeks is None and self._receive_sha != NOT_ALLOWED:
            self._peeks = _Peeks(self, found)

    def _load_receive(self) -> str:
        try:
            return str(bytes_to_str(self._create_client().script_load(Receive.source())))
        except redis.exceptions.NoPermissionError as error:
            said = "messages are received by BRPOP alone, which may lose one where a process is killed: %s"
            log.warning(said, error)
            return NOT_ALLOWED

    def _brpop_read(self, **options: Any) -> bool:
        """Receive one item, and deliver what it is a message of. As kombu's, but for the reading."""
        tag, asked = self._receive_tag, "EVALSHA" if self._receive_tag else "BRPOP"
        try:
            try:
                received = self.client.parse_response(self.client.connection, asked, **options)
            except self.connection_errors:
                self.client.connection.disconnect()  # the next look connects again
                raise
            except redis.exceptions.NoScriptError:  # the server has been started again
                self._receive_sha = None
                raise EMPTY from None
            self._all_empty = not received
            if not received:
                raise EMPTY
            where, item = received
            queue = self._receive_queues[where - 1] if tag else bytes_to_str(where).rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            if message := self._opened(item, queue, tag):
                self.connection._deliver(message, queue)  # noqa: SLF001  # a channel is part of its transport
            elif tag:
                self.qos._remove_from_indices(tag).execute()  # noqa: SLF001  # as above
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _opened(self, item: bytes, queue: str, tag: str = "") -> dict[str, Any] | None:
        """The message that an item is; where it is none, one that says so; None where nobody can be told.

        `tag`: under which it is written down already, if it is.
        """
        try:
            message = envelope.read(item, queue, self.max_message_bytes, self.tasks.get(queue, ""))
        except strict_json.Unreadable as error:
            message_id = envelope.identify(item)
            if not message_id:
                self.set_aside(item, queue, str(error))
                return None
            message = envelope.stand_in(message_id, queue, str(error))
        if tag:
            message["properties"]["delivery_tag"] = tag
        return message

    def _handle_message(self, client: Any, r: Any) -> dict[str, Any]:
        """A remote command: only what asks, and changes nothing, gets through to Celery."""
        found: dict[str, Any] = super()._handle_message(client, r)
        if bytes_to_str(found["type"]).endswith("message") and found["data"]:
            try:
                found["data"] = envelope.question(found["data"])
            except strict_json.Unreadable as error:
                found["data"] = None  # nothing to deliver
                if count := ignored():
                    log.warning("remote command ignored: %s (%d since the last such line)", error, count)
        return found

    def _lookup(self, exchange: str, routing_key: str, default: Any = None) -> list[str]:
        """Where something goes. Answers go to whoever asked, whatever is said to be bound there."""
        queues: list[str] = super()._lookup(exchange, routing_key, default)
        if exchange == envelope.REPLIES:
            return [queue for queue in queues if queue.endswith(f".{exchange}")]
        return queues

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        """As kombu's; but an answer that nobody fetches is forgotten: kombu leaves it there for ever.

        Kombu sets the time to live of who asked, and without our prefix, which is that of no key.
        """
        super()._put(queue, message, **options)
        if queue.endswith(f".{envelope.REPLIES}"):
            redis.Redis(connection_pool=self.pool).pexpire(self._key(queue), ANSWER_MS)

    def set_aside(self, item: bytes, queue: str, why: str) -> None:
        """Keep how a nameless item begins, for the operator to see. Never raises."""
        _log_unreadable(item, queue, why)
        record = {
            "at": utc_now().isoformat(),
            "queue": queue,
            "why": why,
            "bytes": len(item),
            "sha256": hashlib.sha256(item).hexdigest(),
            "begins": item[:UNREADABLE_BYTES].decode(errors="backslashreplace"),
        }
        key = f"{self.global_keyprefix}{UNREADABLE_KEY}"
        try:
            plain = redis.Redis(connection_pool=self.pool)  # kombu's own prefixes some commands, and some not
            with plain.pipeline() as pipe:
                pipe.lpush(key, json.dumps(record))
                pipe.ltrim(key, 0, UNREADABLE_MAX - 1)
                pipe.pexpire(key, UNREADABLE_TTL_MS)
                pipe.incr(f"{key}:count")
                pipe.execute()
        except (redis.exceptions.RedisError, KombuError, OSError) as error:
            log.error("it could not be kept in %s: %s", key, error)  # noqa: TRY400  # the cause is named


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    """Kombu's Redis, by our channel; a node that takes no writes after a failover is left for a new one."""

    Channel = Channel
    connection_errors = (*kombu_redis.Transport.connection_errors, redis.exceptions.ReadOnlyError)


class _Peeks:
    """Threads that wait for items without taking any, each at one list.

    BLMOVE from the end of a list to its very end changes nothing, and waits until there is something to
    move. Of several lists no command of Redis can wait for one without taking from it.
    """

    def __init__(self, channel: Channel, found: Callable[[], None]) -> None:
        """`found` is called when there is something."""
        self.usable = True
        self._channel, self._found = channel, found
        self._requested = threading.Event()
        pool = channel._get_pool()  # noqa: SLF001  # kombu has no other way
        self._redis = redis.Redis(connection_pool=pool)
        for queue, step in channel.peeked:
            key = f"{channel.global_keyprefix}{channel._q_for_pri(queue, step)}"  # noqa: SLF001  # as above
            threading.Thread(target=self._peek, args=[queue, key], name="peek", daemon=True).start()

    def begin(self) -> None:
        """Wait, until something is found."""
        self._requested.set()

    def close(self) -> None:
        """End the threads and their connections."""
        self.usable = False
        self._requested.set()
        self._redis.connection_pool.disconnect()

    def _peek(self, queue: str, key: str) -> None:
        while self.usable:
            if not self._requested.wait(CHECK_ALL_EVERY_S):
                continue
            if not self._channel.has_room(queue):
                time.sleep(CHECK_ROOM_EVERY_S)
                continue
            try:
                item = self._redis.blmove(key, key, PEEK_TIMEOUT_S, "RIGHT", "RIGHT")
            except redis.exceptions.ReadOnlyError as error:  # a failover: nobody else would notice
                self._report_failure(error)
            except BaseException as error:  # noqa: BLE001  # it is the loop's connection that tells of an outage
                if "unknown command" in str(error) or isinstance(error, redis.exceptions.NoPermissionError):
                    self._disable(error)
                time.sleep(CHECK_ALL_EVERY_S)
            else:
                if item is not None:
                    self._requested.clear()
                    self._found()

    def _report_failure(self, error: Exception) -> None:
        if self.usable:
            self._channel.on_ack_failed(error)
        time.sleep(CHECK_ALL_EVERY_S)

    def _disable(self, error: BaseException) -> None:
        if self.usable:
            log.warning("a process that is killed may lose a message, as BLMOVE is not to be had: %s", error)
        self.usable = False
        self._found()


class _WithRoom:
    """A cycle of queues without those that have no room."""

    def __init__(self, cycle: Any, has_room: Callable[[str], bool]) -> None:
        self._queues, self._has_room = cycle, has_room

    def consume(self, count: int) -> list[str]:
        return [queue for queue in self._queues.consume(count) if self._has_room(queue)]


class RateLimitedCount:
    """Counts what would be said, so that it is said at most once in a while."""

    def __init__(self, every_s: float) -> None:
        """Nothing was said yet."""
        self.every_s, self._count, self._said_s = every_s, 0, -math.inf

    def __call__(self) -> int:
        """Once more. How often it has been since it was said; 0: it is not to be said now."""
        self._count += 1
        now_s = time.monotonic()
        if now_s - self._said_s < self.every_s:
            return 0
        count, self._count, self._said_s = self._count, 0, now_s
        return count


ignored = RateLimitedCount(IGNORED_EVERY_S)  # remote commands, of all connections


def _log_unreadable(item: bytes, place: str, why: str) -> None:
    """Its contents are nobody's to read in a log."""
    digest = hashlib.sha256(item).hexdigest()
    log.error(
        "an item in %s is no message, and names no id: %s (%d bytes, sha256 %s)",
        place,
        why,
        len(item),
        digest,
    )
