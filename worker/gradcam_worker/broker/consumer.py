"""Celery's consumer, made to survive messages that are no task messages.

The messages of a queue are untrusted. By default a malformed header or body ends the whole worker, which
receives the same message again after its restart; and a message that cannot be decoded is dropped, so that
its sender learns nothing, and its content is logged.
"""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from celery.bootsteps import RUN
from celery.concurrency.base import apply_target
from celery.concurrency.thread import ApplyResult, TaskPool
from celery.worker import request
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown, task_ready
from kombu.common import ignore_errors

from gradcam_worker.broker import envelope
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.resilience.outages import Outage
from gradcam_worker.resilience.stall import ORPHANED_AFTER_S, StallDetector
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

TURN_INTERVAL_S = 1.0  # between two reports that the event loop turns
REQUEUE_DELAY_S = 1.0  # before a message that cannot be handled now is requeued
CONNECT_PAUSE_S = 0.5  # between two attempts to connect; grows by as much each time
MAX_CONNECT_PAUSE_S = 5.0  # Celery's own is 32: meanwhile jobs wait for a broker that is back


class Request(request.Request):  # type: ignore[misc]  # celery ships no types
    """A received task. Celery's inspection commands do not show the content of its job."""

    def info(self, safe: bool = True) -> Any:  # noqa: ARG002  # as Celery asks
        """See `celery.worker.request.Request`."""
        return super().info(safe=True)


class NoThread(Exception):
    """No thread can be started for a message: a limit of processes or of memory is reached."""


class ThreadPool(TaskPool):  # type: ignore[misc]  # celery ships no types
    """Celery's thread pool. Every message is acknowledged or requeued, whatever its thread raises.

    By default a SystemExit, a KeyboardInterrupt, a panic of a library in Rust or a MemoryError at the wrong
    moment ends in a future that nobody reads: the message is never settled, and its slot is never free again.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.running = set[str]()  # delivery tags of messages that a thread has or is about to have

    def on_apply(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...] | None = None,
        kwargs: dict[str, Any] | None = None,
        callback: Any = None,
        accept_callback: Any = None,
        **_: Any,
    ) -> ApplyResult:
        """Run a request in a thread. `callback` is a method of the request. Raises NoThread."""
        request = callback.__self__
        tag, started = request.message.delivery_tag, threading.Lock()
        self.running.add(tag)

        def run() -> None:
            if not started.acquire(blocking=False):
                return
            try:
                apply_target(target, args, kwargs, callback, accept_callback)
            except BaseException as error:
                log.exception("message_thread_failed", job_id=request.id, error_type=type(error).__name__)
                time.sleep(REQUEUE_DELAY_S)
                task_ready(request)
                request.reject(requeue=True)
            finally:
                self.running.discard(tag)

        try:
            return ApplyResult(self.executor.submit(run))
        except (RuntimeError, MemoryError) as error:
            # It is in the executor's queue nevertheless: another thread may have started it by now.
            if not started.acquire(blocking=False):
                return ApplyResult(Future())
            self.running.discard(tag)
            task_ready(request)
            raise NoThread(str(error)) from error


@dataclass(frozen=True)
class ConsumerHooks:
    """What the consumer reports to: malformed messages, and the state of its connection."""

    refuse: Callable[[str, str], object]  # records that the message of this id is no task, and the reason
    on_loop_turn: Callable[[], None]  # called each TURN_INTERVAL_S, and while the broker is unreachable
    stall: StallDetector
    broker_outage: Outage
    is_paused: Callable[[], bool] = lambda: False  # whether no message is to be received


class JobConsumer(Consumer):  # type: ignore[misc]  # celery ships no types
    """Celery's consumer. Every message that is no task goes to `ConsumerHooks.refuse`."""

    _turn_timer: Any = None
    _renewing = False  # the connection is about to be replaced
    _orphaned: Mapping[str, float] = {}  # delivery tag -> since when no thread has the message

    def __init__(self, *args: Any, hooks: ConsumerHooks, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hooks = hooks

    def on_ready(self) -> None:
        """Called when the event loop starts, after each connect: begin to report its turns."""
        super().on_ready()
        if self._turn_timer:  # Celery keeps some timers of the previous connection
            self._turn_timer.cancel()
        self.hooks.stall.broker_reachable()
        self._renewing, self._orphaned = False, {}
        self.task_consumer.channel.on_connection_unusable = self._renew_connection
        self.task_consumer.channel.is_paused = self.hooks.is_paused
        self.task_consumer.channel.watch_queues(lambda: self.hub.call_soon(lambda: None))
        self._turn()
        self._turn_timer = self.timer.call_repeatedly(TURN_INTERVAL_S, self._turn)

    def _turn(self) -> None:
        """Report that the loop turns, and requeue orphaned messages: each would hold its slot for ever."""
        self.hooks.on_loop_turn()
        self.hooks.broker_outage.answered()
        channel, now_s = self.task_consumer.channel, time.monotonic()
        if channel.has_moved:
            message = "another server is the master now"
            self._renew_connection(ConnectionError(message))
        channel.send_acks()
        without_thread = channel.unacknowledged().keys() - self.pool.running
        self._orphaned = {tag: self._orphaned.get(tag, now_s) for tag in without_thread}
        orphaned = [tag for tag, since_s in self._orphaned.items() if now_s - since_s > ORPHANED_AFTER_S]
        self.hooks.stall.orphaned_messages(len(orphaned))
        for tag in orphaned:
            log.error("orphaned_message_requeued", delivery_tag=tag)
            channel.basic_reject(tag, requeue=True)

    def _renew_connection(self, error: Exception) -> None:
        """Replace the connection: a message could not be acknowledged.

        After a failover it leads to a server that takes no writes. With all slots taken nothing is received,
        so nothing else would notice.
        """
        if self.blueprint.state == RUN and not self._renewing:
            self._renewing, ended = True, False

            def forget(_: object) -> None:  # another error has ended the loop, which calls what is left
                nonlocal ended
                ended = True

            def fail() -> None:
                self.hub.on_close.discard(forget)
                if not ended:
                    raise error

            self.hub.on_close.add(forget)
            self.hub.call_soon(fail)

    def connect(self) -> Any:
        """Return a connection that the event loop listens to. One that it cannot listen to is closed."""
        connection = self.connection_for_read(heartbeat=self.amqheartbeat)
        try:
            connection.transport.register_with_event_loop(connection.connection, self.hub)
        except BaseException:
            ignore_errors(connection, connection.close)
            raise
        return connection

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """Called when the server answers, but refuses what a consumer needs."""
        self._report_outage(exc)
        time.sleep(CONNECT_PAUSE_S)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Called when the connection is lost or unusable."""
        self._report_outage(exc)
        super().on_connection_error_after_connected(exc)

    def _report_outage(self, error: Exception) -> None:
        self.hooks.broker_outage.failed(f"no message is received until it is connected again: {error}")
        if self.hooks.stall.broker_unreachable():
            self.hooks.on_loop_turn()

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, however many attempts it takes, with pauses of at most MAX_CONNECT_PAUSE_S."""
        conn.ensure_connection(
            lambda error, _: self._report_outage(error),
            interval_start=CONNECT_PAUSE_S,
            interval_step=CONNECT_PAUSE_S,
            interval_max=MAX_CONNECT_PAUSE_S,
            callback=maybe_shutdown,
        )
        self.first_connection_attempt = False
        return conn

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Return Celery's handler of one message, which raises only the broker's own errors."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            reason = message.headers.get(envelope.REFUSED)
            if reason:  # `gradcam_worker.broker.transport` could not parse it
                self._refuse(message, str(reason))
                return
            try:
                handle(message)
            except self.connection_errors:
                raise  # the broker's fault, not the message's
            except (NoThread, MemoryError) as error:  # this process's fault
                self._requeue_later(message, f"this process lacks threads or memory: {error!r}")
            except Exception as error:  # noqa: BLE001  # whatever a malformed message leads to
                self._refuse(message, f"its headers or body are malformed ({type(error).__name__})")

        return on_task_received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Called when a body cannot be decoded. By default Celery logs it, and drops the message.

        The transport has parsed it already, so memory has run out: kombu turns a MemoryError into a
        DecodeError.
        """
        if any(isinstance(cause, MemoryError) for cause in exc.args):  # this process's fault
            self._requeue_later(message, f"this process lacks memory: {exc!r}")
        else:
            self._refuse(message, f"its body cannot be read as JSON ({type(exc).__name__})")

    def _refuse(self, message: Any, reason: str) -> None:
        """Record the reason in the ledger under the message's id, then acknowledge the message.

        While the ledger is unreachable the message is requeued at the end of the queue.
        """
        self.hooks.stall.progressed()
        headers = message.headers if isinstance(message.headers, dict) else {}
        try:
            self.hooks.refuse(str(headers.get("id")), reason)
        except LedgerUnavailable as error:
            self._requeue_later(message, str(error))
            return
        except Exception:
            log.exception("message_refusal_not_recorded", job_id=headers.get("id"))
        message.ack_log_error(log, self.connection_errors)

    def _requeue_later(self, message: Any, reason: str) -> None:
        """Requeue a message after REQUEUE_DELAY_S, without blocking the event loop."""
        log.warning("message_requeued", job_id=message.headers.get("id"), reason=reason)
        channel, tag, running = message.channel, message.delivery_tag, self.pool.running

        def requeue() -> None:
            # A lost connection has requeued it already; or a thread has started it nevertheless.
            if not channel.closed and tag in channel.unacknowledged() and tag not in running:
                message.reject_log_error(log, self.connection_errors, requeue=True)

        self.timer.call_after(REQUEUE_DELAY_S, requeue)
