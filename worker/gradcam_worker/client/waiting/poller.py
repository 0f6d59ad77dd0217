"""The one thread of a process that reads the ledger for all subscriptions: see `client.waiting.waiter`."""

import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from selectors import EVENT_READ, DefaultSelector
from socket import socket, socketpair
from typing import Protocol, TypeVar

from gradcam_worker.errors import InternalError, LedgerUnavailable
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

RECHECK_S = 5.0  # a job whose changes are pushed is read again after this time: a push may be lost
POLL_FIRST_S = 0.002  # first poll interval of a job whose changes are not pushed
POLL_SHARE = 0.1  # later intervals, as a share of the time waited: the result is late by no more
POLL_LAST_S = 0.5  # the longest interval
RESUBSCRIBE = RetryPolicy(first_s=0.1, max_s=30.0)  # meanwhile jobs are polled
IDLE_BEFORE_END_S = 30.0  # without anybody who waits, before the thread ends
READ_AT_ONCE = 500  # jobs read in one round trip
CLOSE_TIMEOUT_S = 1.0  # the thread may be waiting for an answer of the ledger

U = TypeVar("U")
StatusUpdate = StatusDocument | Exception  # a job's document, or why it could not be read


class Subscriber(Protocol):
    """Receives the updates of one job: a `gradcam_worker.client.waiting.waiter.Subscription`."""

    job_id: str
    unchecked_owner: str | None
    """the tenant whose job it must be, as long as that is not known; None: anybody's"""

    def notify(self, update: StatusUpdate) -> None:
        """Receive an update. Raises RuntimeError where the receiver is gone."""

    def end(self, error: Exception) -> None:
        """Receive why there are no more updates."""


@dataclass
class WatchedJob:
    """A job with subscribers. Times are those of `time.monotonic`."""

    since: float  # the last subscriber was added
    due: float  # the next read
    pushed: bool = False  # whether the ledger pushes its changes
    subscribers: set[Subscriber] = field(default_factory=set)

    def pause_s(self, now: float) -> float:
        """Seconds until the next read, unless a change is pushed."""
        return (
            RECHECK_S if self.pushed else min(max(POLL_SHARE * (now - self.since), POLL_FIRST_S), POLL_LAST_S)
        )


class StatusPoller:
    """Reads jobs in a thread, which starts with the first subscriber and ends some time after the last."""

    def __init__(self, ledger: Ledger) -> None:
        """Nothing is started yet."""
        self._ledger, self._changes = ledger, ledger.open_updates()
        self._lock = threading.RLock()  # guards all attributes below, apart from the last two
        self._watched: dict[str, WatchedJob] = {}
        self._to_subscribe: set[str] = set()
        self._to_unsubscribe: set[str] = set()
        self._next_due = math.inf  # no read is due before
        self._idle_until = 0.0
        self._thread: threading.Thread | None = None
        self._wakeup: tuple[socket, socket] | None = (
            None  # a byte in the second interrupts the thread's sleep
        )
        self._closing = False
        self._failures, self._resubscribe_at = 0, 0.0  # of the subscription; used by the thread alone

    def read(self, job_id: str, owner: str | None = None) -> StatusUpdate:
        """Read a job once, in the calling thread. `owner`: the tenant that may read it."""
        try:
            return self._ledger.read(job_id, owner)
        except Exception as error:  # noqa: BLE001  # it is raised where the job is waited for
            return error

    def add(self, subscriber: Subscriber) -> None:
        """Notify a subscriber of its job's updates from now on; the job is read at once."""
        with self._lock:
            now = time.monotonic()
            watched = self._watched.get(subscriber.job_id)
            if not watched:
                watched = self._watched[subscriber.job_id] = WatchedJob(now, now)
                self._to_subscribe.add(subscriber.job_id)
                self._to_unsubscribe.discard(subscriber.job_id)
            watched.since = now
            watched.due = now if watched.pushed else now + POLL_FIRST_S
            watched.subscribers.add(subscriber)
            self._next_due = min(self._next_due, watched.due)
            if not self._thread:
                self._start()
            self._wake()

    def remove(self, subscriber: Subscriber) -> None:
        """Notify a subscriber no more."""
        with self._lock:
            watched = self._watched.get(subscriber.job_id)
            if not watched:
                return
            watched.subscribers.discard(subscriber)
            if watched.subscribers:
                return
            del self._watched[subscriber.job_id]
            if subscriber.job_id in self._to_subscribe:
                self._to_subscribe.discard(subscriber.job_id)
            else:
                self._to_unsubscribe.add(subscriber.job_id)
            self._idle_until = time.monotonic() + IDLE_BEFORE_END_S
            self._wake()

    def close(self) -> None:
        """End the thread and its connection; all subscribers receive an error."""
        with self._lock:
            thread, self._closing = self._thread, True
            self._wake()
        if thread and thread is not threading.current_thread():
            thread.join(CLOSE_TIMEOUT_S)

    def abandon(self) -> None:
        """Close, in a forked process, the copies of the parent's sockets: its thread runs on there."""
        if self._changes:
            self._changes.abandon()
        self._close_wakeup()

    def _start(self) -> None:
        self._closing, self._wakeup = False, socketpair()
        for end in self._wakeup:
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="gradcam-poller", daemon=True)
        self._thread.start()

    def _wake(self) -> None:
        if self._wakeup:
            with suppress(BlockingIOError):  # it is about to wake up
                self._wakeup[1].send(b"!")

    def _close_wakeup(self) -> None:
        wakeup, self._wakeup = self._wakeup, None
        for end in wakeup or ():
            end.close()

    def _run(self) -> None:
        try:
            while not self._should_end():
                self._update(self._listen())
                self._sleep()
        except BaseException as error:
            log.exception("status_poller_failed")
            self._end(error if isinstance(error, Exception) else InternalError.of(error))

    def _should_end(self) -> bool:
        """Whether the thread is to end; if so it counts as ended, and the next subscriber starts another."""
        with self._lock:
            if not self._closing and (self._watched or time.monotonic() < self._idle_until):
                return False
            self._end(LedgerUnavailable("The client was closed while it waited for the job."))
            return True

    def _end(self, why: Exception) -> None:
        with self._lock:
            subscribers = [
                subscriber for watched in self._watched.values() for subscriber in watched.subscribers
            ]
            self._watched, self._to_subscribe, self._to_unsubscribe = {}, set(), set()
            self._next_due, self._thread = math.inf, None
            if self._changes:
                self._changes.close()
            self._close_wakeup()
        for subscriber in subscribers:
            self._deliver(subscriber, subscriber.end, why)

    def _listen(self) -> set[str]:
        """The jobs to read now: they have changed, or their changes are pushed from now on."""
        if not self._changes or time.monotonic() < self._resubscribe_at:
            return set()
        with self._lock:
            added, self._to_subscribe = self._to_subscribe, set()
            removed, self._to_unsubscribe = self._to_unsubscribe, set()
        try:
            self._changes.subscribe(added, removed)
            started, changed = self._changes.poll()
        except LedgerUnavailable as error:
            self._fall_back_to_polling(error)
            return set()
        with self._lock:
            for job_id in started & self._watched.keys():
                self._watched[job_id].pushed = True
        if started:
            self._failures = 0
        return started | changed

    def _fall_back_to_polling(self, why: LedgerUnavailable) -> None:
        """The ledger pushes no changes: poll the jobs, and subscribe again after a pause."""
        if not self._failures:
            log.info("status_subscription_failed", error=why, reason="Jobs are polled instead.")
        now = time.monotonic()
        self._failures += 1
        self._resubscribe_at = now + RESUBSCRIBE.pause_s(self._failures)
        with self._lock:
            self._to_subscribe, self._to_unsubscribe = set(self._watched), set()
            for watched in self._watched.values():
                if watched.pushed:
                    watched.pushed, watched.since, watched.due = False, now, now
                    self._next_due = now

    def _update(self, changed: set[str]) -> None:
        """Read the jobs that changed or are due, in one round trip, and notify their subscribers."""
        now = time.monotonic()
        with self._lock:
            any_due = now >= self._next_due
            if any_due:
                changed |= {job_id for job_id, watched in self._watched.items() if watched.due <= now}
            ids = [job_id for job_id in changed if job_id in self._watched]
            for job_id in ids[READ_AT_ONCE:]:  # in the next round
                self._watched[job_id].due = self._next_due = now
        updates = self._read(ids[:READ_AT_ONCE])
        deliveries: list[tuple[Subscriber, StatusUpdate]] = []
        with self._lock:
            now = time.monotonic()
            for job_id, update in updates.items():
                if watched := self._watched.get(job_id):
                    failed = isinstance(update, LedgerUnavailable)
                    watched.due = now + (POLL_LAST_S if failed else watched.pause_s(now))
                    self._next_due = min(self._next_due, watched.due)
                    deliveries += [(subscriber, update) for subscriber in watched.subscribers]
            if any_due:
                self._next_due = min((watched.due for watched in self._watched.values()), default=math.inf)
        for subscriber, update in deliveries:
            if subscriber.unchecked_owner is not None and isinstance(update, StatusDocument):
                update = self.read(subscriber.job_id, subscriber.unchecked_owner)  # noqa: PLW2901
            self._deliver(subscriber, subscriber.notify, update)

    def _read(self, ids: list[str]) -> dict[str, StatusUpdate]:
        try:
            documents = self._ledger.read_many(ids) if ids else {}
        except LedgerUnavailable as error:
            return dict.fromkeys(ids, error)
        except Exception:  # noqa: BLE001  # one document cannot be read: each is read alone
            documents = {}
        return {job_id: documents.get(job_id) or self.read(job_id) for job_id in ids}

    def _deliver(self, subscriber: Subscriber, receive: Callable[[U], None], update: U) -> None:
        try:
            receive(update)
        except RuntimeError:  # the subscriber's event loop is closed
            self.remove(subscriber)

    def _sleep(self) -> None:
        """Sleep until a change is pushed, the thread is woken, or a job is due."""
        with self._lock:
            until = self._next_due if self._watched else self._idle_until
            wakeup = self._wakeup[0] if self._wakeup else None
        with DefaultSelector() as selector:
            for end in (wakeup, self._changes.fileno() if self._changes else None):
                if end is not None:
                    selector.register(end, EVENT_READ)
            selector.select(max(until - time.monotonic(), 0))
        if wakeup is not None:
            with suppress(BlockingIOError):
                wakeup.recv(4096)
