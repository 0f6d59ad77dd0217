"""The truth about every job: submit once, claim, advance, finish. A queue message is a notification.

A job is written here before its message is published, and every later change is one atomic
compare-and-set on (attempt, revision), so an attempt that has been overtaken can change nothing.
Whoever runs a job holds a lease on it and renews it: see `gradcam_worker.execution.leases`. Expired leases,
retries that are due and queued jobs without a message are recovered by `gradcam_worker.ledger.reaper`.
`Ledger` holds the rules; a backend, in `redis` or `memory`, holds the atomic steps.
"""

import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Protocol

from gradcam_worker.errors import (
    AttemptFenced,
    GradcamError,
    IdempotencyConflict,
    InvalidJob,
    JobNotFailed,
    LedgerUnavailable,
    UnknownJob,
)
from gradcam_worker.ledger import state_machine
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import ID_PATTERN, Job, Webhook
from gradcam_worker.schemas.shard import Shard, Work, parse, terms_of
from gradcam_worker.schemas.status import Problem, StatusDocument, WorkerRef

ASK_AGAIN_S = 0.5  # between two tries to reach the ledger


@dataclass(frozen=True)
class Entry:
    """What the ledger holds for a job from the start: its fingerprint tells it from any other."""

    fingerprint: str
    job: str  # JSON
    idempotency_key: str | None
    document: StatusDocument
    route: str = "normal"  # its priority: jobs of one route are taken in the order in which they came
    webhooks: tuple[Webhook, ...] = ()


class ClaimOutcome(Enum):
    """How the claim of a job ended."""

    CLAIMED = "claimed"
    """The caller holds the job and has to run it."""

    HELD = "held"
    """Another attempt holds it, or the pause before its next attempt is not over."""

    FINISHED = "finished"
    """It was final already."""

    ENDED = "ended"
    """The claim itself made it final: it had expired, or had used up its attempts."""

    CHANGED = "changed"
    """It has changed since it was read: read it again."""


@dataclass(frozen=True)
class Claim:
    """What a worker learned when it asked for a job."""

    outcome: ClaimOutcome
    document: StatusDocument


@dataclass(frozen=True)
class Renewed:
    """What a worker learned when it renewed its leases."""

    lost: frozenset[str] = frozenset()  # jobs that are somebody else's by now
    canceled: frozenset[str] = frozenset()  # jobs that somebody wants stopped


@dataclass(frozen=True)
class Overdue:
    """Ids of jobs that the reaper has to act on."""

    expired_leases: list[str]  # running, and not renewed in time
    due_retries: list[str]  # the pause before the next attempt is over
    expired_jobs: list[str]  # waiting beyond `expires_at`


class JobUpdates(Protocol):
    """A subscription to changes of jobs, for one thread. It says that a job has changed, and never what.

    Each method raises LedgerUnavailable where the server cannot be reached; it is closed then.
    """

    def subscribe(self, begun: Iterable[str], ended: Iterable[str]) -> None:
        """Subscribe to the jobs in `begun`, end the subscriptions to those in `ended`."""
        ...

    def poll(self) -> tuple[set[str], set[str]]:
        """What has come in since the last time: jobs whose subscription has begun, and jobs that changed."""
        ...

    def fileno(self) -> int | None:
        """The file descriptor to wait on for something to come in; None without a connection."""
        ...

    def close(self) -> None:
        """End all subscriptions. It can be used again."""
        ...

    def abandon(self) -> None:
        """Leave the connection to the parent of a forked process."""
        ...


class Ledger(ABC):
    """The rules of a job's life. Raises LedgerUnavailable wherever it cannot be reached."""

    observer: Observer = NULL_OBSERVER  # is told of each job that this process has made final

    @abstractmethod
    def _create_many(self, entries: Sequence[Entry]) -> list[Entry]:
        """For each, atomically: the entry that has its idempotency key or id already, else this new one.

        Ends with the first that is there already with another fingerprint: what follows is not entered.
        """

    @abstractmethod
    def _find(self, job_id: str) -> Entry | None:
        """The entry of a job."""

    @abstractmethod
    def _swap(
        self,
        before: StatusDocument,
        after: StatusDocument,
        *,
        delay_s: float = 0,
        due: bool = False,
        fingerprint: str | None = None,
    ) -> bool:
        """Atomically: replace `before` by `after`, if (attempt, revision) are still those of `before`.

        In the same step the job gets or loses its lease, its place among those that wait (for `delay_s`,
        where it is to be tried again), and whoever wants to hear of it is put in the outbox. With `due`,
        only if its lease, or its pause, is over now. With a fingerprint, only if the job has that one, and
        `before` is to the letter what is held.
        """

    @abstractmethod
    def read_many(self, ids: Sequence[str]) -> dict[str, StatusDocument]:
        """Read the documents of those of these jobs that the ledger knows."""

    def open_updates(self) -> JobUpdates | None:
        """Open a subscription to changes of jobs; None where a job has to be read again and again instead."""
        return None

    def close(self) -> None:  # noqa: B027  # not every ledger has connections
        """Close what is connected; used again, it connects again."""

    @abstractmethod
    def count_jobs(self) -> tuple[int, int]:
        """Count the jobs that are queued, those waiting for a retry included, and those that are running."""

    @abstractmethod
    def renew_leases(self, worker: str, health: str, held: Mapping[str, int]) -> Renewed:
        """Renew a worker's leases, in one round trip.

        Args:
            worker: Its id.
            health: What it says of itself, as JSON: see `find_workers`.
            held: The jobs that it runs, id -> attempt.

        Returns:
            Which of them it has lost, and which running jobs are to stop.
        """

    @abstractmethod
    def find_workers(self) -> dict[str, str]:
        """Find the workers that renewed their leases lately: id -> health, as JSON."""

    @abstractmethod
    def try_lead(self, worker: str, seconds: float) -> bool:
        """Become the one worker that reaps, or stay it, for `seconds`; False where another one is."""

    @abstractmethod
    def find_overdue(self, limit: int) -> Overdue:
        """Find jobs that the reaper has to act on, `limit` of each kind at most."""

    @abstractmethod
    def find_unpublished(self, route: str, *, empty: bool, lost_after_s: float, limit: int) -> list[str]:
        """Find queued jobs whose message must have been lost. They are not found again for a while.

        Args:
            route: The priority by which they were published.
            empty: Whether its queue is. If not, only jobs are found whose message is older than one that
                has been received since.
            lost_after_s: How long a message may take to be received.
            limit: How many are found at most.

        Returns:
            Their ids.
        """

    @abstractmethod
    def find_dead_letters(self) -> list[tuple[str, float]]:
        """Find failed jobs that nobody has replayed.

        Returns:
            Their ids, and when they failed in seconds since the epoch; newest first.
        """

    @abstractmethod
    def drop_dead_letter(self, job_id: str) -> None:
        """Remove a job from the dead letters."""

    @abstractmethod
    def prune(self) -> None:
        """Remove dead letters, parked recipients and workers of long ago."""

    def submit(self, job: Work, *, retry_failed: bool = False) -> StatusDocument:
        """Enter a job, once: the same job with the same id or idempotency key finds the first.

        With `retry_failed`, one that has failed is tried again: see `retry`. Raises IdempotencyConflict where
        the id or the key belongs to a different job.
        """
        (entered,) = self.submit_many([job], retry_failed=retry_failed)
        if isinstance(entered, IdempotencyConflict):
            raise entered
        return entered

    def submit_many(
        self, jobs: Sequence[Work], *, retry_failed: bool = False
    ) -> list[StatusDocument | IdempotencyConflict]:
        """Enter jobs in order, in one step: see `submit`. Ends with a conflict: none after it is entered."""
        entries = [_entry(job) for job in jobs]
        found: list[StatusDocument | IdempotencyConflict] = []
        for job, entry, held in zip(jobs, entries, self._create_many(entries), strict=False):
            if held.fingerprint != entry.fingerprint:
                found.append(_conflict(job, held.document.id))
            elif retry_failed and held.document.status == "failed":
                found.append(self._retried(held.document))
            else:
                found.append(held.document)
        return found

    def _retried(self, found: StatusDocument) -> StatusDocument:
        """Try it again. Where that cannot be done, or was done meanwhile, it is as it is: it is accepted."""
        try:
            return self.retry(found.id)
        except JobNotFailed:
            return self.read(found.id)

    def retry(self, job_id: str) -> StatusDocument:
        """Try a failed job again, as the same one, with its id, key and webhooks, and all its attempts.

        One that is not final is left as it is. Raises UnknownJob, and JobNotFailed where there is nothing to
        be tried again.
        """
        while True:
            before = self.read(job_id)
            if not before.final:
                return before
            job = self.job(job_id) if before.status == "failed" else None
            if not isinstance(job, Job):
                raise JobNotFailed(_not_failed(before, job))
            after = state_machine.tried_again(before, job.max_attempts)
            if self._swap(before, after):
                return after

    def get_or_create(
        self, job_id: str, payload: object, read: Callable[[object], Work] = parse
    ) -> tuple[Work | None, StatusDocument]:
        """The job that a message is about: the ledger's own, or the message's, which is entered now.

        None where it has ended and is forgotten. `read` is what makes a job of a message. Raises InvalidJob,
        IdempotencyConflict, and what `read` does.
        """
        held = self._find(job_id)
        if held and held.document.final and held.document.status != "failed":
            return None, held.document
        if held:
            return parse(json.loads(held.job)), held.document
        job = read(payload)
        document = self.submit(job)  # perhaps the first with this idempotency key, which has its own id
        return job.model_copy(update={"id": document.id}), document

    def job(self, job_id: str) -> Work | None:
        """The job itself: until it has ended, or where it failed. None where another version wrote it."""
        held = self._find(job_id)
        try:
            return parse(json.loads(held.job)) if held else None
        except InvalidJob:
            return None

    def route(self, job_id: str) -> str | None:
        """By which priority a job is published, whether or not this version can read it."""
        held = self._find(job_id)
        return held.route if held else None

    def refuse(self, job_id: str, payload: object, error: GradcamError) -> StatusDocument:
        """Write down that a message could not become a job.

        A good job that has this id is left alone; one that this version cannot read is failed.
        """
        text = json.dumps(payload, sort_keys=True, default=repr)
        problem = Problem.of(error, stage="receive", attempt=0)
        document = state_machine.fresh(job_id).model_copy(
            update={"status": "failed", "error": problem, "completed_at": utc_now()}
        )
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        (held,) = self._create_many([Entry(fingerprint, "null", None, document)])
        if held.document is document:
            self._tell(document)
        if held.document.final or self.job(job_id):
            return held.document
        return self.advance(held.document, status="failed", error=problem)

    def read(self, job_id: str) -> StatusDocument:
        """The document of a job. Raises UnknownJob."""
        job_id = str(job_id)  # web frameworks have them as UUIDs
        documents = self.read_many([job_id]) if re.fullmatch(ID_PATTERN, job_id) else {}
        if job_id not in documents:
            message = f"The ledger has no job {job_id}: its id is wrong, or it ended too long ago."
            raise UnknownJob(message)
        return documents[job_id]

    def claim_fresh(self, job: Job, entered_at: datetime, worker: WorkerRef) -> StatusDocument | None:
        """Claim a job that nobody has touched since it was entered, without reading it first.

        None where it was touched, is another one, has expired, or was entered at another moment: see
        `receive` and `claim`, which find out.
        """
        now = utc_now()
        if job.expires_at and job.expires_at <= now:
            return None
        before = state_machine.fresh(job.id, job, entered_at)
        after = state_machine.begun(before, worker, now)
        return after if self._swap(before, after, fingerprint=_fingerprint(job)) else None

    def claim(self, before: StatusDocument, worker: WorkerRef) -> Claim:
        """Take the next attempt at a job, whose last known document is `before`."""
        if before.final:
            return Claim(ClaimOutcome.FINISHED, before)
        if before.status != "queued":
            return Claim(ClaimOutcome.HELD, before)
        after = state_machine.claimed(before, worker)
        if not self._swap(before, after):
            return Claim(ClaimOutcome.CHANGED, self.read(before.id))
        self._tell(after)
        return Claim(ClaimOutcome.ENDED if after.final else ClaimOutcome.CLAIMED, after)

    def advance(
        self, document: StatusDocument, *, patience_s: float = 0, delay_s: float = 0, **changes: Any
    ) -> StatusDocument:
        """Write changes to a job that this attempt holds; final with a final `status`.

        `delay_s` is the pause before its next attempt, with status `retrying`. A ledger out of reach is asked
        again for `patience_s`: writing the same twice is harmless. Raises AttemptFenced where another attempt
        holds the job by now.
        """
        before, after = document, state_machine.advanced(document, **changes)
        patience = Deadline(patience_s)
        while True:
            try:
                if self._swap(before, after, delay_s=delay_s):
                    self._tell(after)
                    return after
                held = self._find(document.id)
            except LedgerUnavailable:
                if not patience.left_s():
                    raise
                time.sleep(ASK_AGAIN_S)
                continue
            now = held.document if held else None
            # A ledger that lost its last second may have given the same number out again.
            ours = (document.attempt, document.status, document.started_at)
            if now is None or (now.attempt, now.status, now.started_at) != ours:
                message = f"Attempt {document.attempt} of job {document.id} was overtaken: it must stop."
                raise AttemptFenced(message)
            before = now  # the same attempt: somebody has asked for it to be cancelled
            after = state_machine.advanced(now, **changes)

    def cancel(self, job_id: str) -> StatusDocument:
        """Stop a job: one that waits is final at once, a running one as soon as its worker sees it.

        A final one is left as it is. Raises UnknownJob.
        """
        while True:
            before = self.read(job_id)
            if before.final or before.cancel_requested_at:
                return before
            after = state_machine.canceled(before)
            if self._swap(before, after):
                return after

    def requeue_unfinished(self, job_id: str, attempt: int) -> bool:
        """Put a job that this attempt holds back into the queue; whether it still held it."""
        return self._changed(job_id, "running", state_machine.handed_back, attempt) is not None

    def expire_lease(self, job_id: str) -> str | None:
        """A lease has run out: queue the job again, or end it. Its route, where it is to be published."""
        return self._changed(job_id, "running", state_machine.lost, due=True, reason="lost")

    def requeue(self, job_id: str) -> str | None:
        """A pause is over. The job's route, where it is to be published."""
        return self._changed(job_id, "retrying", state_machine.requeued, due=True, reason="due")

    def expire(self, job_id: str) -> None:
        """Its time has passed in the queue."""
        self._changed(job_id, "queued", state_machine.expired, reason="expired")
        self._changed(job_id, "retrying", state_machine.expired, reason="expired")

    def _changed(
        self,
        job_id: str,
        status: str,
        change: Any,
        attempt: int | None = None,
        *,
        due: bool = False,
        reason: str = "",
    ) -> str | None:
        """Change a job that is still in this state; its route, where it is queued now."""
        held = self._find(job_id)
        if not held or held.document.status != status or attempt not in {None, held.document.attempt}:
            return None
        after = change(held.document)
        if not self._swap(held.document, after, due=due):
            return None
        if reason:
            self.observer.job_reaped(reason)
        self._tell(after)
        return held.route if after.status == "queued" else None

    def _tell(self, document: StatusDocument) -> None:
        if document.final:
            self.observer.job_finished(document.status, document.error.code if document.error else "")


def _entry(job: Work) -> Entry:
    document, terms = state_machine.fresh(job.id, job), terms_of(job)
    return Entry(
        _fingerprint(job), job.to_json(), terms.idempotency_key, document, terms.route, terms.webhooks
    )


def _conflict(job: Work, theirs: str) -> IdempotencyConflict:
    what = f"id {job.id}" if theirs == job.id else f"idempotency key {terms_of(job).idempotency_key!r}"
    again = "Where that one has failed, retrying it keeps its id and key."
    return IdempotencyConflict(f"The {what} belongs to a different job, {theirs}: use a new one. {again}")


def _not_failed(document: StatusDocument, job: Work | None) -> str:
    if isinstance(job, Shard):
        return f"It is a shard of backfill {job.backfill}: `gradcam backfill --resume` runs it again."
    if document.status == "failed":
        return f"Job {document.id} cannot be tried again: this version can read no job in its message."
    return (
        f"Job {document.id} is {document.status}: only a failed one can be tried again. "
        "Submit the image as a new job, with another id and idempotency key."
    )


def _fingerprint(job: Work) -> str:
    return hashlib.sha256(job.fingerprint().encode()).hexdigest()
