"""Celery's consumer, made to survive messages that are no task messages.

A queue can be written to by strangers. As it comes, Celery's consumer ends the whole worker over a
malformed header or body (and gets the same message again when it is back), drops what it cannot
decode without a word to whoever sent it, and logs the contents.
"""

import logging
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

from gradcam_worker.broker import message as envelope
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.resilience.outages import Outage
from gradcam_worker.resilience.stall import ORPHANED_AFTER_S, StallDetector

log = logging.getLogger("gradcam")

TURN_EVERY_S = 1.0  # between two signs of life
RETURN_AFTER_S = 1.0  # before a message goes back that cannot be handled now
CONNECT_EVERY_S = 0.5  # the pause before it is tried again; grows by as much each time
CONNECT_MAX_S = 5.0  # its longest, of half a minute as it comes: a broker that is back is work that waits


class Request(request.Request):  # type: ignore[misc]  # celery ships no types
    """A task in hand, that shows nobody who inspects this worker what its job says."""

    def info(self, safe: bool = True) -> Any:  # noqa: ARG002  # as Celery asks
        """See `celery.worker.request.Request`."""
        return super().info(safe=True)


class NoThread(Exception):
    """There is no thread for a message: a limit of processes or of memory is reached."""


class ThreadPool(TaskPool):  # type: ignore[misc]  # celery ships no types
    """Celery's pool of threads, in which every message comes to an end, whatever its thread raises.

    As it comes, a SystemExit, a KeyboardInterrupt, a panic of a library in Rust or a MemoryError at the wrong
    moment ends in a future that nobody reads: the message is never acknowledged, and its place never free.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.running = set[str]()  # delivery tags of what is run, or is about to be

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
        tag, begun = request.message.delivery_tag, threading.Lock()
        self.running.add(tag)

        def run() -> None:
            if not begun.acquire(blocking=False):
                return
            try:
                apply_target(target, args, kwargs, callback, accept_callback)
            except BaseException as error:
                what = type(error).__name__
                log.exception("message %s: its thread failed (%s): it goes back", request.id, what)
                time.sleep(RETURN_AFTER_S)
                task_ready(request)
                request.reject(requeue=True)
            finally:
                self.running.discard(tag)

        try:
            return ApplyResult(self.executor.submit(run))
        except (RuntimeError, MemoryError) as error:
            # It is queued all the same, and a thread that becomes free may have begun it by now.
            if not begun.acquire(blocking=False):
                return ApplyResult(Future())
            self.running.discard(tag)
            task_ready(request)
            raise NoThread(str(error)) from error


@dataclass(frozen=True)
class ConsumerHooks:
    """What a worker process hands to its consumer, to report messages and the connection's state to."""

    refuse: Callable[[str, str], object]  # records that the message of this id is no task, and why
    on_loop_turn: Callable[[], None]  # called on each turn of the loop, and while the broker is away
    stall: StallDetector
    broker_outage: Outage


class JobConsumer(Consumer):  # type: ignore[misc]  # celery ships no types
    """Hands every message that is no task to `ConsumerHooks.refuse`, and goes on."""

    _turn_timer: Any = None
    _renewing = False  # the connection is about to be given up
    _orphaned: Mapping[str, float] = {}  # delivery tag -> since when nobody is at work on it

    def __init__(self, *args: Any, hooks: ConsumerHooks, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hooks = hooks

    def on_ready(self) -> None:
        """Whenever the loop starts: from now on, each of its rounds is a sign of life."""
        super().on_ready()
        if self._turn_timer:  # Celery keeps timers of an earlier connection that began where this one does
            self._turn_timer.cancel()
        self.hooks.stall.broker_reachable()
        self._renewing, self._orphaned = False, {}
        self.task_consumer.channel.on_ack_failed = self._renew_connection
        self.task_consumer.channel.wait_by_peeking(lambda: self.hub.call_soon(lambda: None))
        self._turn()
        self._turn_timer = self.timer.call_repeatedly(TURN_EVERY_S, self._turn)

    def _turn(self) -> None:
        """A sign of life; and what nobody is at work on goes back, or its place would be taken for ever."""
        self.hooks.on_loop_turn()
        self.hooks.broker_outage.answered()
        channel, now_s = self.task_consumer.channel, time.monotonic()
        held = channel.unacknowledged().keys() - self.pool.running
        self._orphaned = {tag: self._orphaned.get(tag, now_s) for tag in held}
        late = [tag for tag, since_s in self._orphaned.items() if now_s - since_s > ORPHANED_AFTER_S]
        self.hooks.stall.orphaned_messages(len(late))
        for tag in late:
            log.error("a message was not acknowledged, and nobody is at work on it: it goes back")
            channel.basic_reject(tag, requeue=True)

    def _renew_connection(self, error: Exception) -> None:
        """A message could not be acknowledged: this connection is of no use any more.

        After a failover it leads to a server that takes no writes. With all places taken nothing is read
        from it, so nobody else would notice.
        """
        if self.blueprint.state == RUN and not self._renewing:
            self._renewing = True

            def fail() -> None:
                raise error

            self.hub.call_soon(fail)

    def connect(self) -> Any:
        """A connection that the loop listens to; one that it cannot listen to is closed, not left behind."""
        connection = self.connection_for_read(heartbeat=self.amqheartbeat)
        try:
            connection.transport.register_with_event_loop(connection.connection, self.hub)
        except BaseException:
            ignore_errors(connection, connection.close)
            raise
        return connection

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        """The server answers, and refuses what a consumer needs."""
        self._report_outage(exc)
        time.sleep(CONNECT_EVERY_S)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """The connection is lost, or of no use any more."""
        self._report_outage(exc)
        super().on_connection_error_after_connected(exc)

    def _report_outage(self, error: Exception) -> None:
        self.hooks.broker_outage.failed(f"nothing is received, it is tried to connect: {error}")
        if self.hooks.stall.broker_unreachable():
            self.hooks.on_loop_turn()

    def ensure_connected(self, conn: Any) -> Any:
        """The connection, when it stands; tried again and again, at most CONNECT_MAX_S apart."""
        conn.ensure_connection(
            lambda error, _: self._report_outage(error),
            interval_start=CONNECT_EVERY_S,
            interval_step=CONNECT_EVERY_S,
            interval_max=CONNECT_MAX_S,
            callback=maybe_shutdown,
        )
        self.first_connection_attempt = False
        return conn

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's handler of one message, in a net."""
        handle = super().create_task_handler(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            why = message.headers.get(envelope.REFUSED)
            if why:  # `gradcam_worker.broker.transport` found that it is none
                self._refuse(message, str(why))
                return
            try:
                handle(message)
            except self.connection_errors:
                raise  # the broker's trouble, not the message's
            except (NoThread, MemoryError) as error:  # this process's trouble
                self._return_later(message, f"this process lacks threads or memory: {error!r}")
            except Exception as error:  # noqa: BLE001  # whatever a malformed message leads to
                self._refuse(message, f"its headers or body are malformed ({type(error).__name__})")

        return on_task_received

    def _refuse(self, message: Any, why: str) -> None:
        """Write down why, under the message's own id, then take it from the queue.

        Where the ledger is out of reach it goes back to the end of the queue, and comes again.
        """
        self.hooks.stall.progressed()
        headers = message.headers if isinstance(message.headers, dict) else {}
        try:
            self.hooks.refuse(str(headers.get("id")), why)
        except LedgerUnavailable as error:
            self._return_later(message, str(error))
            return
        except Exception:
            log.exception("a message that is no job could not be written down")
        message.ack_log_error(log, self.connection_errors)

    def _return_later(self, message: Any, why: str) -> None:
        """Put a message back after a pause, in which the loop goes on."""
        log.warning("message %r goes back: %s", message.headers.get("id"), why)
        channel, tag, running = message.channel, message.delivery_tag, self.pool.running

        def put_back() -> None:
            # A connection that was lost has put it back, and a thread may have begun it all the same.
            if not channel.closed and tag in channel.unacknowledged() and tag not in running:
                message.reject_log_error(log, self.connection_errors, requeue=True)

        self.timer.call_after(RETURN_AFTER_S, put_back)
