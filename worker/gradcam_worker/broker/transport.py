"""Kombu's Redis transport, made to keep its connections and to accept untrusted items in a queue."""

import json
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

from gradcam_worker.broker import envelope, unreadable_items
from gradcam_worker.broker.queue_watch import QueueWatch
from gradcam_worker.redis_server.script import Key, LuaScript
from gradcam_worker.redis_server.sentinel import MasterConnection, MasterFinder, MasterTLSConnection
from gradcam_worker.schemas import strict_json
from gradcam_worker.text.log_events import EventLogger, RateLimitedCount

log = EventLogger("gradcam")

REPLY_TTL_MS = 60_000  # of the replies to a remote command: longer than any caller waits
IGNORED_LOG_INTERVAL_S = 10.0  # between two lines about ignored remote commands
CHECK_ALL_INTERVAL_S = 1.0  # between two checks of all lists while they are empty
ROOM_POLL_INTERVAL_S = 0.05  # while a queue is at its limit
NO_PERMISSION = ""  # instead of a script's SHA: this user may not load scripts
EMPTY = kombu_redis.Empty


@dataclass(kw_only=True)
class Receive(LuaScript[tuple[int, bytes] | None], file="receive"):
    """Take an item and note it as unacknowledged in one step. Returns which list it was in, and the item.

    Messages that were acknowledged since the last step are forgotten before.
    """

    unacked: Key
    unacked_index: Key
    lists: Sequence[Key]
    delivery_tag: str
    received_s: str
    acknowledged: str  # delivery tags, with spaces between
    queues: Sequence[str]  # as JSON


class QoS(kombu_redis.QoS):  # type: ignore[misc]  # kombu ships no types
    """Kombu's record of unacknowledged messages. A malformed one does not block the return of the others."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Note a message as unacknowledged. The script that took it has noted it in the server already."""
        if delivery_tag == self.channel.receive_tag:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge a message: with the next request for another one, if that comes at once."""
        if self.channel.defer_ack(delivery_tag):
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Put a message back into its queue. One that cannot be put back is set aside.

        Kombu's own method puts it back unchecked, or loses it and logs its content.
        """
        malformed: list[bytes] = []

        def restore(pipe: Any) -> None:
            malformed.clear()
            entry = pipe.hget(self.unacked_key, tag)
            pipe.multi()
            self._remove_from_indices(tag, pipe)
            if not entry:
                return
            channel = self.channel
            if parsed := envelope.parse_unacknowledged(entry, channel.max_message_bytes, channel.tasks):
                channel._do_restore_message(*parsed, pipe, leftmost)  # noqa: SLF001  # as kombu does
            else:
                malformed.append(entry)

        with self.channel.conn_or_acquire(client) as connected:
            connected.transaction(restore, self.unacked_key)
        for entry in malformed:
            self.channel.set_aside(entry, self.unacked_key, "it cannot be put back into a queue")


class Message(virtual.Message):  # type: ignore[misc]
    """Kombu's message. A failed acknowledgement is reported to its channel, where kombu only logs it."""

    def ack_log_error(self, logger: Any, errors: Any, multiple: bool = False) -> None:  # noqa: ARG002
        """Acknowledge the message; see `Channel.ack_failed`."""
        self._settle(partial(self.ack, multiple=multiple), errors)

    def reject_log_error(self, logger: Any, errors: Any, requeue: bool = False) -> None:  # noqa: ARG002
        """Requeue or drop the message; see `Channel.ack_failed`."""
        self._settle(partial(self.reject, requeue=requeue), errors)

    def _settle(self, action: Callable[[], None], errors: Any) -> None:
        try:
            action()
        except (*errors, redis.exceptions.RedisError) as error:
            self.channel.ack_failed(self.headers.get("id"), error)


class Channel(kombu_redis.Channel):  # type: ignore[misc]
    """Kombu's channel, with one Redis client for the lifetime of its connection pool.

    By default kombu makes a new client for each message that it receives and for each that it acknowledges: a
    sixth of the CPU time of a worker whose jobs do nothing. After a restart of the broker it raises an
    AttributeError, which ends the worker, and so does an item that is not JSON or not written by kombu.
    """

    QoS = QoS
    Message = Message
    from_transport_options = (
        *kombu_redis.Channel.from_transport_options,
        "finder",
        "max_message_bytes",
        "unacknowledged_limits",
        "tasks",
        "watched_lists",
    )
    finder: MasterFinder | None = None  # where Sentinels say which server is the broker
    max_message_bytes = 1024 * 1024  # of a job as JSON
    unacknowledged_limits: Mapping[str, int] = {}  # queue -> messages received here and not acknowledged
    tasks: Mapping[str, str] = {}  # queue -> the only task that it accepts
    watched_lists: Sequence[tuple[str, int]] = ()  # queue and priority
    on_connection_unusable: Callable[[Exception], None] = staticmethod(lambda _: None)
    is_paused: Callable[[], bool] = staticmethod(lambda: False)  # whether no message is to be received

    _reused_client: Any = None
    _queue_watch: QueueWatch | None = None
    _checked_all_s = 0.0  # when all lists were last checked
    _queue_cycle: Any
    _all_empty = False  # all lists were empty at the last check
    _receive_sha: str | None = None  # of `Receive`, once the server has it
    receive_tag = ""  # the delivery tag of the receive script that is under way; empty with BRPOP
    _receive_queues = tuple[str, ...]()  # the queue of each list that the script checks
    _acknowledged = tuple[str, ...]()  # delivery tags that the server is told of with the next receive script
    _told = tuple[str, ...]()  # delivery tags that it was told of with the last one

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

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if self.finder:
            self.connection_class, self.connection_class_ssl = MasterConnection, MasterTLSConnection
        options: dict[str, Any] = super()._connparams(asynchronous)
        return options | ({"finder": self.finder} if self.finder else {})

    @property
    def has_moved(self) -> bool:
        """Whether this is connected to a server that was replaced by another master."""
        return bool(getattr(self.client.connection, "has_moved", False))

    def close(self) -> None:
        """Close the channel and all its connections, also where unacknowledged messages cannot be put back.

        Kombu puts them back when its connections are closed already, opens new ones for that, and leaves
        those open. A message that cannot be put back now is redelivered after its visibility timeout.
        """
        if self.has_moved:
            self._in_poll = None  # a former master may never answer
        try:
            self.send_acks()
        except (redis.exceptions.RedisError, KombuError, OSError) as error:
            log.debug("acks_not_sent", messages=len(self._told), error=error)
        try:
            super().close()
        except (redis.exceptions.RedisError, KombuError, OSError) as error:
            log.debug("messages_not_requeued", error=error)
        finally:
            self.closed = True
            self._reused_client = None
            if self._queue_watch:
                self._queue_watch.close()
            self._disconnect_pools()

    def has_room(self, queue: str) -> bool:
        """Whether another message of this queue may be received now."""
        if self.is_paused():
            return False
        limit = self.unacknowledged_limits.get(queue)
        return limit is None or self._unacknowledged_count(queue) < limit

    def _unacknowledged_count(self, queue: str) -> int:
        messages = self.unacknowledged().values()
        return sum(message.delivery_info.get("routing_key") == queue for message in messages)

    def unacknowledged(self) -> dict[str, Any]:
        """The messages that were received here and are not acknowledged yet, by delivery tag."""
        # Kombu removes an acknowledged message only when the next is received: at its limit, never.
        qos = self.qos
        return {tag: message for tag, message in [*qos._delivered.items()] if tag not in qos._dirty}  # noqa: SLF001

    def defer_ack(self, delivery_tag: str) -> bool:
        """Acknowledge a message with the next receive script. Only the thread of the event loop calls this.

        If the process ends before, or the script fails, the message is redelivered after its visibility
        timeout, and recognised as done: as where its acknowledgement fails.

        Returns:
            False if it is not certain that a script is sent soon.
        """
        if not self.receive_tag or self._all_empty or not self.active_queues or self.closed:
            return False
        self._acknowledged = (*self._acknowledged, delivery_tag)
        return True

    def send_acks(self) -> None:
        """Acknowledge now what waits for the next receive script."""
        if tags := self._acknowledged:
            self._acknowledged, self._told = (), tags
            with self.conn_or_acquire() as client, client.pipeline() as pipe:
                pipe.zrem(self.unacked_index_key, *tags).hdel(self.unacked_key, *tags).execute()

    def ack_failed(self, message_id: object, error: Exception) -> None:
        """Note that a message could not be acknowledged. It is redelivered, and then recognised as done."""
        log.debug("message_ack_failed", job_id=message_id, channel_closed=self.closed, error=error)
        if not self.closed:  # a closed channel has given up all its messages
            self.on_connection_unusable(error)

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for the next item of the queues that have room; where none has, soon again.

        While there are items, each is noted as unacknowledged in the step that takes it: a process that dies
        before it reads the item loses nothing. While all lists are empty, the next item is waited for without
        taking it (see `QueueWatch`). BRPOP cannot do that; it is used only where there is no queue watch.
        """
        watch = self._queue_watch if self._queue_watch and self._queue_watch.usable else None
        if watch and self._all_empty and time.monotonic() - self._checked_all_s < CHECK_ALL_INTERVAL_S:
            self.send_acks()
            watch.start_waiting()
            return
        if (watch or not self._all_empty) and self._send_receive():
            return
        self.send_acks()
        all_queues: Any = self._queue_cycle
        self._queue_cycle, self.receive_tag = _QueuesWithRoom(all_queues, self.has_room), ""
        try:
            super()._brpop_start(
                timeout if all(map(self.has_room, self.unacknowledged_limits)) else ROOM_POLL_INTERVAL_S
            )
        finally:
            self._queue_cycle = all_queues

    def _send_receive(self) -> bool:
        """Send the `Receive` script. Returns False where it cannot be used."""
        queues = [
            queue for queue in self._queue_cycle.consume(len(self.active_queues)) if self.has_room(queue)
        ]
        if not queues or self._receive_sha == NO_PERMISSION:
            return False
        if self._receive_sha is None:
            self._receive_sha = self._load_receive()
            if self._receive_sha == NO_PERMISSION:
                return False
        self._receive_queues = tuple(queue for _ in self.priority_steps for queue in queues)
        lists = [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]
        self.receive_tag, connection = str(uuid.uuid4()), self.client.connection
        script = Receive(
            unacked=self._key(self.unacked_key),
            unacked_index=self._key(self.unacked_index_key),
            lists=[self._key(name) for name in lists],
            delivery_tag=self.receive_tag,
            received_s=repr(time.time()),
            acknowledged=" ".join(self._acknowledged),
            queues=[json.dumps(queue) for queue in self._receive_queues],
        )
        self._in_poll = connection
        self._checked_all_s = self._brpop_sent_at = time.monotonic()
        keys = script.keys()
        connection.send_command("EVALSHA", self._receive_sha, len(keys), *keys, *script.arguments())
        self._acknowledged, self._told = (), self._acknowledged
        return True

    def _key(self, name: str) -> Key:
        return Key(f"{self.global_keyprefix}{name}")

    def watch_queues(self, wake: Callable[[], object]) -> None:
        """From now on, wait for messages without taking them.

        Args:
            wake: Called from any thread when a list has a message; makes the event loop turn.
        """

        def check_again() -> None:
            self._all_empty = False
            wake()

        if self._queue_watch is None and self._receive_sha != NO_PERMISSION:
            self._queue_watch = QueueWatch(
                self._get_pool(),
                {self._key(self._q_for_pri(queue, step)): queue for queue, step in self.watched_lists},
                has_room=self.has_room,
                on_message=check_again,
                on_read_only=self.on_connection_unusable,
            )

    def _load_receive(self) -> str:
        try:
            return str(bytes_to_str(self._create_client().script_load(Receive.source)))
        except redis.exceptions.NoPermissionError as error:
            log.warning(
                "receive_script_not_permitted",
                reason="messages are received by BRPOP alone, which may lose one where a process is killed",
                error=error,
            )
            return NO_PERMISSION

    def _brpop_read(self, **options: Any) -> bool:
        """Receive one item, and deliver its message. As kombu's, except for how the item is parsed."""
        tag, command = self.receive_tag, "EVALSHA" if self.receive_tag else "BRPOP"
        try:
            try:
                received = self.client.parse_response(self.client.connection, command, **options)
            except self.connection_errors:
                self.client.connection.disconnect()  # the next command connects again
                raise
            except redis.exceptions.NoScriptError:  # the server was restarted
                self._receive_sha, self._acknowledged = None, (*self._told, *self._acknowledged)
                raise EMPTY from None
            self._all_empty = not received
            if not received:
                raise EMPTY
            source, item = received
            queue = self._receive_queues[source - 1] if tag else bytes_to_str(source).rsplit(self.sep, 1)[0]
            self._queue_cycle.rotate(queue)
            if message := self._parse_item(item, queue, tag):
                self.connection._deliver(message, queue)  # noqa: SLF001  # a channel is part of its transport
            elif tag:
                self.qos._remove_from_indices(tag).execute()  # noqa: SLF001  # as above
            return True
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _parse_item(self, item: bytes, queue: str, tag: str) -> dict[str, Any] | None:
        """Parse an item of a queue.

        Args:
            item: The item as it was received.
            queue: The queue that it was in.
            tag: The delivery tag under which it is noted as unacknowledged already; empty: it is not.

        Returns:
            The message, or a refused one that carries the reason; None where the item names no id.
        """
        try:
            message = envelope.parse_message(item, queue, self.max_message_bytes, self.tasks.get(queue, ""))
        except strict_json.Unreadable as error:
            message_id = envelope.find_id(item)
            if not message_id:
                self.set_aside(item, queue, str(error))
                return None
            message = envelope.refused_message(message_id, queue, str(error))
        if tag:
            message["properties"]["delivery_tag"] = tag
        return message

    def _handle_message(self, client: Any, r: Any) -> dict[str, Any]:
        """Read a remote command. Only a command that changes nothing reaches Celery."""
        response: dict[str, Any] = super()._handle_message(client, r)
        if bytes_to_str(response["type"]).endswith("message") and response["data"]:
            try:
                response["data"] = envelope.parse_inspection(response["data"])
            except strict_json.Unreadable as error:
                response["data"] = None  # nothing to deliver
                if count := ignored_commands():
                    log.warning("remote_command_ignored", reason=error, since_last_log=count)
        return response

    def _lookup(self, exchange: str, routing_key: str, default: Any = None) -> list[str]:
        """Return the queues that a message goes to. Replies go to reply queues only, whatever is bound."""
        queues: list[str] = super()._lookup(exchange, routing_key, default)
        if exchange == envelope.REPLY_EXCHANGE:
            return [queue for queue in queues if queue.endswith(f".{exchange}")]
        return queues

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        """Publish a message. A reply gets a time to live, as it may never be fetched.

        Kombu sets the caller's time to live, on the key without our prefix, which does not exist.
        """
        super()._put(queue, message, **options)
        if queue.endswith(f".{envelope.REPLY_EXCHANGE}"):
            redis.Redis(connection_pool=self.pool).pexpire(self._key(queue), REPLY_TTL_MS)

    def set_aside(self, item: bytes, source: str, reason: str) -> None:
        """See `unreadable_items.set_aside`."""
        unreadable_items.set_aside(self.pool, self.global_keyprefix, item, source, reason)


class Transport(kombu_redis.Transport):  # type: ignore[misc]
    """Kombu's Redis transport with our channel. A read-only node after a failover is a lost connection."""

    Channel = Channel
    connection_errors = (*kombu_redis.Transport.connection_errors, redis.exceptions.ReadOnlyError)


class _QueuesWithRoom:
    """A cycle of queues without those that have no room."""

    def __init__(self, cycle: Any, has_room: Callable[[str], bool]) -> None:
        self._queues, self._has_room = cycle, has_room

    def consume(self, count: int) -> list[str]:
        return [queue for queue in self._queues.consume(count) if self._has_room(queue)]


ignored_commands = RateLimitedCount(IGNORED_LOG_INTERVAL_S)  # of all connections of this process
