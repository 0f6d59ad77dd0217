"""Waiting for jobs: one thread of a process (`client.waiting.poller`) reads the ledger for all subscriptions.

Where the ledger can push changes (`Ledger.open_updates`), the poller subscribes first, then reads the job,
and reads it again whenever a change is pushed. A lost push does no harm: every job is also read from time to
time, more often while there is no subscription.

`JobWaiter.follow` follows one job without saying how to sleep: `JobWaiter.stream` sleeps in a thread,
`client.async_client` in an event loop.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing

from gradcam_worker.client.waiting.poller import StatusPoller, StatusUpdate
from gradcam_worker.errors import LedgerUnavailable, WaitTimeout, with_sentence
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.resilience.blocking import awaited, run_blocking
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.text.visible import counted

MAX_OUTAGE_S = 60.0  # an outage of the ledger that is waited through: a failover takes less
MAX_SLEEP_S = 3600.0  # sleeps take no infinity


class Subscription:
    """The updates of one job, from the thread of a `StatusPoller` to the thread or task that waits."""

    def __init__(
        self,
        job_id: str,
        wake: Callable[[], object],
        timeout_s: float | None = None,
        owner: str | None = None,
    ) -> None:
        """The timeout runs from now.

        Args:
            job_id: The job.
            wake: Called, in any thread, when there is something to `pop`.
            timeout_s: Seconds to wait; None: for ever.
            owner: The tenant that may read it; None: everybody. The first document tells that it may.
        """
        self.job_id, self.unchecked_owner = str(job_id), owner
        self._wake, self._timeout_s, self._started_s = wake, timeout_s, time.monotonic()
        self._updates: deque[StatusUpdate] = deque(maxlen=1)  # a later update replaces one not popped yet
        self._revision = -1
        self._outage: tuple[float, LedgerUnavailable] | None = None  # since when, and why

    def notify(self, update: StatusUpdate) -> None:
        """Keep an update if it is new.

        A final document always is: in a ledger restored from a backup revisions start lower.
        """
        if isinstance(update, LedgerUnavailable):
            now = time.monotonic()
            since = self._outage[0] if self._outage else now
            self._outage = since, update
            refused = not update.retryable and self._revision < 0  # not one that has answered before
            if now - since < MAX_OUTAGE_S and not refused:
                return
        else:
            self._outage = None
        if isinstance(update, StatusDocument):
            if update.revision <= self._revision and not update.final:
                return
            self._revision, self.unchecked_owner = update.revision, None
        self._deliver(update)

    def end(self, error: Exception) -> None:
        """End the subscription with an error."""
        self._deliver(error)

    def _deliver(self, update: StatusUpdate) -> None:
        self._updates.append(update)
        self._wake()

    def pop(self) -> StatusDocument | None:
        """The latest document not popped yet, if any. Raises the error that ended the subscription."""
        try:
            update = self._updates.popleft()
        except IndexError:
            return None
        if isinstance(update, StatusDocument):
            return update
        if self._outage:
            raise self._unreachable_error() from update
        raise update

    def left_s(self) -> float:
        """Seconds left to wait, at most MAX_SLEEP_S."""
        if self._timeout_s is None:
            return MAX_SLEEP_S
        left_s = self._timeout_s - (time.monotonic() - self._started_s)
        return min(max(left_s, 0), MAX_SLEEP_S)

    def timeout_error(self, document: StatusDocument | None) -> WaitTimeout | LedgerUnavailable:
        """The error of a wait whose time is up; `document` is the last one received."""
        if self._outage:
            return self._unreachable_error()
        status = document.status if document else "unheard of"
        return WaitTimeout(f"Job {self.job_id} is still {status} after {self._timeout_s:g} s.")

    def _unreachable_error(self) -> LedgerUnavailable:
        waited_s = time.monotonic() - self._started_s
        why = self._outage[1] if self._outage else LedgerUnavailable()
        what = f"Job {self.job_id} was waited for in vain, for {waited_s:.1f} s: it may have ended."
        return LedgerUnavailable(f"{what} {why}", retryable=why.retryable)


class JobWaiter:
    """All waiting of one client. May be shared between threads; a forked process gets its own poller."""

    def __init__(self, ledger: Ledger) -> None:
        """No thread is started before the first wait for a job that is not final."""
        self._ledger = ledger
        self._pollers: dict[int, StatusPoller] = {}  # by process id: threads do not survive a fork

    def stream(
        self, job_id: str, timeout_s: float | None = None, owner: str | None = None
    ) -> Iterator[StatusDocument]:
        """See `gradcam_worker.client.client.GradcamClient.stream`."""
        woken = threading.Event()
        subscription = Subscription(job_id, woken.set, timeout_s, owner)
        subscription.notify(run_blocking(read_update(self._ledger, subscription.job_id, owner)))
        try:
            with closing(self.follow(subscription)) as steps:
                for step in steps:
                    if isinstance(step, StatusDocument):
                        yield step
                    else:
                        woken.wait(step)
                        woken.clear()
        except WaitTimeout as late:
            raise run_blocking(with_cause(self._ledger, late)) from None

    def follow(self, subscription: Subscription) -> Generator[StatusDocument | float, None, None]:
        """Follow a job to its end.

        Args:
            subscription: It has been notified of the job's present state.

        Yields:
            Each new document, the final one last; between them, seconds to sleep unless woken.

        Raises:
            WaitTimeout: The job is not final yet.
            UnknownJob: The ledger has no such job.
            LedgerUnavailable: The ledger stayed unreachable, or the client was closed.
        """
        document, subscribed = None, False
        try:
            while True:
                update = subscription.pop()
                if update:
                    document = update
                    yield update
                    if update.final:
                        return
                elif not (left_s := subscription.left_s()):
                    raise subscription.timeout_error(document)
                elif subscribed:
                    yield left_s
                else:
                    self._poller.add(subscription)
                    subscribed = True
        finally:
            if subscribed:
                self._poller.remove(subscription)

    def close(self) -> None:
        """End the thread and its connection; all waits end with LedgerUnavailable."""
        self._poller.close()

    @property
    def _poller(self) -> StatusPoller:
        pid = os.getpid()
        if pid not in self._pollers:
            for parent in [*self._pollers]:
                poller = self._pollers.pop(parent, None)
                if poller:
                    poller.abandon()
            self._pollers.setdefault(pid, StatusPoller(self._ledger))  # atomic: several threads may get here
        return self._pollers[pid]


async def read_update(ledger: Ledger, job_id: str, owner: str | None = None) -> StatusUpdate:
    """Read a job once: its document, or why it could not be read. `owner`: the tenant that may read it."""
    try:
        return await awaited(ledger.read, job_id, owner)
    except Exception as error:  # noqa: BLE001  # it is raised where the job is waited for
        return error


async def with_cause(ledger: Ledger, late: WaitTimeout) -> WaitTimeout:
    """The error with a sentence about workers and queues."""
    try:
        workers = await awaited(ledger.find_workers)
        return with_sentence(late, _describe_workers(workers, *await awaited(ledger.count_jobs)))
    except LedgerUnavailable:  # unreachable, or this user may not read them
        return late


def _describe_workers(workers: Mapping[str, str], queued: int, running: int) -> str:
    """A sentence about the workers that take jobs, and the number of jobs."""
    troubles = [str(json.loads(health).get("trouble") or "") for health in workers.values()]
    first = next((trouble for trouble in troubles if trouble), "")
    if not workers:
        state = "No worker lives that would take it"
    elif all(troubles):
        state = f"{counted(len(workers), 'worker')} alive, but taking no jobs just now: {first.rstrip('.')}"
    else:
        state = f"{counted(troubles.count(''), 'worker')} alive and taking jobs"
    return f"{state}. {counted(queued, 'job')} queued, {running:,} running."
