"""Waiting for jobs: one thread of a process looks at the ledger for all who wait, when told of a change.

A ledger that can push (`Ledger.open_updates`) is subscribed to first; when that has begun, the job is looked
at, and then again whenever it is said to have changed. Nothing hangs on that: a job whose subscription has
not begun, was cut, or may not be had is looked at every now and then, and any other every SAFETY_S.

What it takes to follow a job is written once, without saying how to sleep: `JobWaiter.follow`.
`JobWaiter.stream`
sleeps in a thread, `gradcam_worker.client.async_client` in an event loop.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing

from gradcam_worker.client.poller import StatusPoller, StatusUpdate
from gradcam_worker.errors import LedgerUnavailable, WaitTimeout, with_sentence
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.text.visible import counted

OUTAGE_S = 60.0  # in a row, that a ledger out of reach is waited for: a failover takes less
LONGEST_SLEEP_S = 3600.0  # at once: no clock takes infinity


class Subscription:
    """Somebody who waits for a job: told in the thread of a `StatusPoller`, he takes it in his own."""

    def __init__(self, job_id: str, wake: Callable[[], object], timeout_s: float | None = None) -> None:
        """`wake` is called, in any thread, when there is something to `take`. The clock runs from now."""
        self.job_id = str(job_id)
        self._wake, self._timeout_s, self._begun = wake, timeout_s, time.monotonic()
        self._news: deque[StatusUpdate] = deque(
            maxlen=1
        )  # what was not taken in time gives way to what is newer
        self._revision = -1
        self._outage: tuple[float, LedgerUnavailable] | None = None  # since when, and why

    def tell(self, news: StatusUpdate) -> None:
        """Keep it if it is new, a final document in any case: a restored ledger may count from before."""
        if isinstance(news, LedgerUnavailable):
            now = time.monotonic()
            since = self._outage[0] if self._outage else now
            self._outage = since, news
            refused = not news.retryable and self._revision < 0  # who was let in before may be again
            if now - since < OUTAGE_S and not refused:
                return
        else:
            self._outage = None
        if isinstance(news, StatusDocument):
            if news.revision <= self._revision and not news.final:
                return
            self._revision = news.revision
        self.end(news)

    def end(self, news: StatusUpdate) -> None:
        """Keep it, whatever it is, and wake who waits for it."""
        self._news.append(news)
        self._wake()

    def take(self) -> StatusDocument | None:
        """The latest that was not taken yet. Raises what went wrong."""
        try:
            news = self._news.popleft()
        except IndexError:
            return None
        if isinstance(news, StatusDocument):
            return news
        if self._outage:
            raise self._out_of_reach() from news
        raise news

    def left_s(self) -> float:
        """Seconds left to wait, at most LONGEST_SLEEP_S."""
        if self._timeout_s is None:
            return LONGEST_SLEEP_S
        left_s = self._timeout_s - (time.monotonic() - self._begun)
        return min(max(left_s, 0), LONGEST_SLEEP_S)

    def late(self, document: StatusDocument | None) -> WaitTimeout | LedgerUnavailable:
        """Why there is no final document, though time is up; this one was the last that came."""
        if self._outage:
            return self._out_of_reach()
        status = document.status if document else "unheard of"
        return WaitTimeout(f"Job {self.job_id} is still {status} after {self._timeout_s:g} s.")

    def _out_of_reach(self) -> LedgerUnavailable:
        waited_s = time.monotonic() - self._begun
        why = self._outage[1] if self._outage else ""
        what = f"Job {self.job_id} was waited for in vain, for {waited_s:.1f} s: it may have ended."
        return LedgerUnavailable(f"{what} {why}")


class JobWaiter:
    """All waiting of one client. May be shared between threads; a forked process begins anew."""

    def __init__(self, ledger: Ledger) -> None:
        """Nothing is started before the first wait that has to wait."""
        self._ledger = ledger
        self._lookouts: dict[
            int, StatusPoller
        ] = {}  # by process: threads do not survive a fork, nor may sockets

    def stream(self, job_id: str, timeout_s: float | None = None) -> Iterator[StatusDocument]:
        """See `gradcam_worker.client.client.GradcamClient.stream`."""
        woken = threading.Event()
        listener = Subscription(job_id, woken.set, timeout_s)
        listener.tell(self.look(listener.job_id))
        try:
            with closing(self.follow(listener)) as steps:
                for step in steps:
                    if isinstance(step, StatusDocument):
                        yield step
                    else:
                        woken.wait(step)
                        woken.clear()
        except WaitTimeout as late:
            raise self.explained(late) from None

    def explained(self, late: WaitTimeout) -> WaitTimeout:
        """The same, with what the ledger knows of workers and queues; asked for in this thread."""
        try:
            return with_sentence(late, _at_work(self._ledger.find_workers(), *self._ledger.count_jobs()))
        except LedgerUnavailable:  # its user may not look, or it is away just now
            return late

    def look(self, job_id: str) -> StatusUpdate:
        """One look at a job, in this thread: its document, or why there is none."""
        return self._lookout.look(job_id)

    def follow(self, listener: Subscription) -> Generator[StatusDocument | float, None, None]:
        """Each new document, the final one last; and in between, for how many seconds to sleep unless woken.

        Somebody has to have told the listener how the job is now. Raises WaitTimeout, UnknownJob,
        LedgerUnavailable.
        """
        document, enrolled = None, False
        try:
            while True:
                news = listener.take()
                if news:
                    document = news
                    yield news
                    if news.final:
                        return
                elif not (left_s := listener.left_s()):
                    raise listener.late(document)
                elif enrolled:
                    yield left_s
                else:
                    self._lookout.add(listener)
                    enrolled = True
        finally:
            if enrolled:
                self._lookout.remove(listener)

    def close(self) -> None:
        """End the thread and its connection; whoever still waits gets LedgerUnavailable."""
        self._lookout.close()

    @property
    def _lookout(self) -> StatusPoller:
        mine = os.getpid()
        if mine not in self._lookouts:
            for process in [*self._lookouts]:
                abandoned = self._lookouts.pop(process, None)
                if abandoned:
                    abandoned.abandon()
            self._lookouts.setdefault(mine, StatusPoller(self._ledger))  # one, whichever thread comes first
        return self._lookouts[mine]


def _at_work(workers: Mapping[str, str], queued: int, running: int) -> str:
    """Whether anybody is there to take a job, and how much there is to do."""
    troubles = [str(json.loads(health).get("trouble") or "") for health in workers.values()]
    told = next((one for one in troubles if one), "")
    if not workers:
        who = "No worker lives that would take it"
    elif all(troubles):
        who = f"{counted(len(workers), 'worker')} alive, but taking no jobs just now: {told.rstrip('.')}"
    else:
        who = f"{counted(troubles.count(''), 'worker')} alive and taking jobs"
    return f"{who}. {counted(queued, 'job')} queued, {running:,} running."
