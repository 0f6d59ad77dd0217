"""The one thread of a process that reads the ledger for all who wait: see `client.waiter`."""

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from selectors import EVENT_READ, DefaultSelector
from socket import socket, socketpair
from typing import Protocol

from gradcam_worker.errors import InternalError, LedgerUnavailable
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.schemas.status import StatusDocument

log = logging.getLogger("gradcam")

SAFETY_S = 5.0  # between two looks at a job that we are told of
POLL_FIRST_S = 0.002  # between two looks at one that we are not told of
POLL_SHARE = 0.1  # of the time waited so far, where that is more: by so much an answer may be late
POLL_LAST_S = 0.5
RESUBSCRIBE = RetryPolicy(
    first_s=0.1, max_s=30.0
)  # without a subscription jobs are polled, so there is no hurry
LINGER_S = 30.0  # without anybody who waits, before the thread ends
MOST = 500  # jobs looked at in one round trip
JOIN_S = 1.0  # it may be waiting for an answer just then

StatusUpdate = StatusDocument | Exception  # how a job is, or why that is not known


class Subscriber(Protocol):
    """Who waits for a job: a `gradcam_worker.client.waiter.Subscription`."""

    job_id: str

    def tell(self, news: StatusUpdate) -> None:
        """Hear what was seen. Raises RuntimeError where nobody is there to hear it any more."""

    def end(self, news: StatusUpdate) -> None:
        """Hear why nothing more will come."""


@dataclass
class WatchedJob:
    """A job that somebody waits for."""

    since: float  # the last one came
    due: float  # the next look
    pushed: bool = False  # whether we are told of its changes
    listeners: set[Subscriber] = field(default_factory=set)

    def pause_s(self, now: float) -> float:
        """How long until the next look, unless something is heard."""
        return (
            SAFETY_S if self.pushed else min(max(POLL_SHARE * (now - self.since), POLL_FIRST_S), POLL_LAST_S)
        )


class StatusPoller:
    """A thread that begins with the first listener, and ends some time after the last."""

    def __init__(self, ledger: Ledger) -> None:
        """Nothing is started yet."""
        self._ledger, self._changes = ledger, ledger.open_updates()
        self._lock = threading.RLock()  # for all that follows
        self._watched: dict[str, WatchedJob] = {}
        self._begun: set[str] = set()  # to be subscribed to
        self._ended: set[str] = set()  # no more
        self._earliest = math.inf  # no look is due before
        self._idle_until = 0.0
        self._thread: threading.Thread | None = None
        self._wakeup: tuple[socket, socket] | None = None  # what is sent to one interrupts the thread's sleep
        self._closing = False
        self._failures, self._deaf_until = 0, 0.0  # of the subscription: the thread's own

    def look(self, job_id: str) -> StatusUpdate:
        """How a job is, or why that is not known."""
        try:
            return self._ledger.read(job_id)
        except Exception as error:  # noqa: BLE001  # it is raised where the job is waited for
            return error

    def add(self, listener: Subscriber) -> None:
        """Tell somebody what becomes of a job from now on, and what happened just before."""
        with self._lock:
            now = time.monotonic()
            watched = self._watched.get(listener.job_id)
            if not watched:
                watched = self._watched[listener.job_id] = WatchedJob(now, now)
                self._begun.add(listener.job_id)
                self._ended.discard(listener.job_id)
            watched.since = now
            watched.due = now if watched.pushed else now + POLL_FIRST_S
            watched.listeners.add(listener)
            self._earliest = min(self._earliest, watched.due)
            if not self._thread:
                self._start()
            self._wake()

    def remove(self, listener: Subscriber) -> None:
        """Tell somebody nothing more."""
        with self._lock:
            watched = self._watched.get(listener.job_id)
            if not watched:
                return
            watched.listeners.discard(listener)
            if watched.listeners:
                return
            del self._watched[listener.job_id]
            if listener.job_id in self._begun:
                self._begun.discard(listener.job_id)
            else:
                self._ended.add(listener.job_id)
            self._idle_until = time.monotonic() + LINGER_S
            self._wake()

    def close(self) -> None:
        """End the thread and its connection, and with an error all that wait."""
        with self._lock:
            thread, self._closing = self._thread, True
            self._wake()
        if thread and thread is not threading.current_thread():
            thread.join(JOIN_S)

    def abandon(self) -> None:
        """Give up, in a forked process, what belongs to the thread of its parent: it goes on there."""
        if self._changes:
            self._changes.abandon()
        self._hang_up()

    def _start(self) -> None:
        self._closing, self._wakeup = False, socketpair()
        for end in self._wakeup:
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="gradcam-poller", daemon=True)
        self._thread.start()

    def _wake(self) -> None:
        if self._wakeup:
            with suppress(BlockingIOError):  # a wake-up is there already
                self._wakeup[1].send(b"!")

    def _hang_up(self) -> None:
        wakeup, self._wakeup = self._wakeup, None
        for end in wakeup or ():
            end.close()

    def _run(self) -> None:
        try:
            while not self._over():
                self._look(self._listen())
                self._sleep()
        except BaseException as error:
            log.exception("waiting for jobs has failed")
            self._end(error if isinstance(error, Exception) else InternalError.of(error))

    def _over(self) -> bool:
        """Whether the thread ends. In the same step it has: the next listener starts another."""
        with self._lock:
            if not self._closing and (self._watched or time.monotonic() < self._idle_until):
                return False
            self._end(LedgerUnavailable("The client was closed while it waited for the job."))
            return True

    def _end(self, why: Exception) -> None:
        with self._lock:
            listeners = [one for watched in self._watched.values() for one in watched.listeners]
            self._watched, self._begun, self._ended = {}, set(), set()
            self._earliest, self._thread = math.inf, None
            if self._changes:
                self._changes.close()
            self._hang_up()
        for listener in listeners:
            self._say(listener, listener.end, why)

    def _listen(self) -> set[str]:
        """Which jobs to look at: they have changed, or their changes are told from now on."""
        if not self._changes or time.monotonic() < self._deaf_until:
            return set()
        with self._lock:
            begun, ended, self._begun, self._ended = self._begun, self._ended, set(), set()
        try:
            self._changes.subscribe(begun, ended)
            started, changed = self._changes.poll()
        except LedgerUnavailable as error:
            self._deafen(error)
            return set()
        with self._lock:
            for job_id in started & self._watched.keys():
                self._watched[job_id].pushed = True
        if started:
            self._failures = 0
        return started | changed

    def _deafen(self, why: LedgerUnavailable) -> None:
        """No change is told any more: look every now and then, and subscribe again in a while."""
        if not self._failures:
            log.info("jobs that are waited for are looked at every now and then: %s", why)
        now = time.monotonic()
        self._failures += 1
        self._deaf_until = now + RESUBSCRIBE.pause_s(self._failures)
        with self._lock:
            self._begun, self._ended = set(self._watched), set()
            for watched in self._watched.values():
                if watched.pushed:
                    watched.pushed, watched.since, watched.due = False, now, now
                    self._earliest = now

    def _look(self, heard: set[str]) -> None:
        """Read the jobs that changed, or are due, in one round trip, and tell who waits for them."""
        now = time.monotonic()
        with self._lock:
            all_of_them = now >= self._earliest
            if all_of_them:
                heard |= {job_id for job_id, watched in self._watched.items() if watched.due <= now}
            ids = [job_id for job_id in heard if job_id in self._watched]
            for job_id in ids[MOST:]:  # in the next round
                self._watched[job_id].due = self._earliest = now
        seen = self._read(ids[:MOST])
        told: list[tuple[Subscriber, StatusUpdate]] = []
        with self._lock:
            now = time.monotonic()
            for job_id, news in seen.items():
                if watched := self._watched.get(job_id):
                    failed = isinstance(news, LedgerUnavailable)
                    watched.due = now + (POLL_LAST_S if failed else watched.pause_s(now))
                    self._earliest = min(self._earliest, watched.due)
                    told += [(listener, news) for listener in watched.listeners]
            if all_of_them:
                self._earliest = min((one.due for one in self._watched.values()), default=math.inf)
        for listener, news in told:
            self._say(listener, listener.tell, news)

    def _read(self, ids: list[str]) -> dict[str, StatusUpdate]:
        try:
            found = self._ledger.read_many(ids) if ids else {}
        except LedgerUnavailable as error:
            return dict.fromkeys(ids, error)
        except Exception:  # noqa: BLE001  # one of them cannot be read, and spoils it for the others
            found = {}
        return {job_id: found.get(job_id) or self.look(job_id) for job_id in ids}

    def _say(self, listener: Subscriber, how: Callable[[StatusUpdate], None], news: StatusUpdate) -> None:
        try:
            how(news)
        except RuntimeError:  # his event loop is closed
            self.remove(listener)

    def _sleep(self) -> None:
        """Until something is heard, the thread is woken, or a job is due."""
        with self._lock:
            until = self._earliest if self._watched else self._idle_until
            wakeup = self._wakeup[0] if self._wakeup else None
        with DefaultSelector() as ears:
            for end in (wakeup, self._changes.fileno() if self._changes else None):
                if end is not None:
                    ears.register(end, EVENT_READ)
            ears.select(max(until - time.monotonic(), 0))
        if wakeup is not None:
            with suppress(BlockingIOError):
                wakeup.recv(4096)
