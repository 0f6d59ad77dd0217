"""The ledger: the authoritative record of every job. A message in a queue is only a notification.

A job is written here before its message is published. Every later change is one atomic compare-and-set on
(attempt, revision), so an attempt that was overtaken can change nothing. A worker that runs a job holds
a lease on it and renews it: see `gradcam_worker.execution.leases`. `gradcam_worker.ledger.reaper` recovers
expired leases, retries that are due and queued jobs without a message. `Ledger` contains the rules; its
subclasses in `redis` and `memory` contain the atomic steps.
"""

import hashlib
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from enum import Enum
from typing import Any, NamedTuple, Protocol

from gradcam_worker.errors import (
    AttemptFenced,
    GradcamError,
    IdempotencyConflict,
    InvalidJob,
    InvalidSettings,
    JobNotFailed,
    LedgerUnavailable,
    UnknownJob,
)
from gradcam_worker.ledger import state_machine
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.blocking import awaited, blocking
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import ID_PATTERN, Job, Webhook
from gradcam_worker.schemas.listing import JobPage, JobQuery
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import Problem, StatusDocument, WorkerRef
from gradcam_worker.schemas.work import Work, parse, terms_of

RETRY_PAUSE_S = 0.5  # between attempts to reach the ledger
MIN_SHARE, MAX_SHARE = 0.001, 1000
TENANT_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"  # a part of keys in Redis


@dataclass(frozen=True)
class Tenant:
    """Whose jobs are listed, read and changed apart from those of others.

    Attributes:
        name: Its name. Empty: nobody's, as of every job that is not submitted for a tenant.
        share: Its part of the workers where several tenants wait, in relation to the shares of the others.

    Raises:
        InvalidSettings: The name or the share is invalid.

    Examples:
        >>> ledger.submit(job, tenant=Tenant("acme", share=2))
    """

    name: str
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.name and not re.fullmatch(TENANT_PATTERN, self.name):
            message = (
                f"{self.name!r} is not the name of a tenant: use 1 to 63 lower-case letters, digits, dots, "
                "hyphens and underscores, the first a letter or digit."
            )
            raise InvalidSettings(message)
        if not MIN_SHARE <= self.share <= MAX_SHARE:
            message = f"The share of a tenant is {self.share}, not a number from {MIN_SHARE} to {MAX_SHARE}."
            raise InvalidSettings(message)


NOBODY = Tenant("")


class QueuedMessage(NamedTuple):
    """A message for a queue in the ledger's own server."""

    key: str  # of the queue's list in Redis
    text: str


class Entered(NamedTuple):
    """A job that is in the ledger."""

    document: StatusDocument
    published: bool = False  # whether its message was published in the same step


MessageWriter = Callable[[Work, datetime], QueuedMessage]  # of a job that is entered at this time


@dataclass(frozen=True)
class Entry:
    """The ledger's record of a job."""

    fingerprint: str  # a digest of the job's content: equal for equal jobs
    job: str  # JSON
    idempotency_key: str | None
    document: StatusDocument
    route: str = "normal"  # its priority, or "shard": jobs of one route are claimed in order of arrival
    webhooks: tuple[Webhook, ...] = ()
    tenant: Tenant = NOBODY
    network: str = ""  # that a job asks for
    message: QueuedMessage | None = None  # to be published in the step in which the job is entered

    def belongs_to(self, tenant: str | None) -> bool:
        """Whether it is a job of this tenant; None: of any."""
        return tenant in {None, self.tenant.name}


class ClaimOutcome(Enum):
    """How the claim of a job ended."""

    CLAIMED = "claimed"
    """The caller holds the job and must run it."""

    HELD = "held"
    """Another attempt holds the job, or the pause before its next attempt is not over."""

    ALREADY_FINAL = "already final"
    """The job was final already."""

    ENDED_BY_CLAIM = "ended by the claim"
    """The claim made the job final: it had expired, or had used all its attempts."""

    CHANGED = "changed"
    """The job has changed since it was read: read it again."""

    OTHERS_TURN = "another's turn"
    """Several tenants wait, and it is the turn of another job, which is to be claimed instead."""


@dataclass(frozen=True)
class Claim:
    """The result of an attempt to claim a job."""

    outcome: ClaimOutcome
    document: StatusDocument
    other: Entry | None = None  # the job whose turn it is


@dataclass(frozen=True)
class LeaseRenewal:
    """The result of renewing a worker's leases."""

    lost: frozenset[str] = frozenset()  # jobs of the worker that it does not hold any more
    canceled: frozenset[str] = frozenset()  # running jobs, of any worker, whose cancellation was requested


@dataclass(frozen=True)
class UsageDay:
    """What the jobs of a tenant that ended on one day have used."""

    day: date  # UTC
    jobs: int
    device_s: float  # see `device_s_of`


@dataclass(frozen=True)
class Overdue:
    """Ids of jobs that the reaper must act on."""

    expired_leases: list[str]  # running jobs whose lease was not renewed in time
    due_retries: list[str]  # retrying jobs whose pause is over
    expired_jobs: list[str]  # waiting jobs whose `expires_at` has passed


class JobUpdates(Protocol):
    """A subscription to changes of jobs, for one thread. It reports which jobs have changed, not how.

    Each method raises LedgerUnavailable if the server cannot be reached; the subscription is closed then.
    """

    def subscribe(self, begun: Iterable[str], ended: Iterable[str]) -> None:
        """Subscribe to the jobs with the ids `begun`; unsubscribe from those with the ids `ended`."""
        ...

    def poll(self) -> tuple[set[str], set[str]]:
        """Read what has arrived since the last call.

        Returns:
            Ids of jobs whose subscription has begun, and ids of jobs that have changed.
        """
        ...

    def fileno(self) -> int | None:
        """The file descriptor on which to wait for data; None without a connection."""
        ...

    def close(self) -> None:
        """End all subscriptions. New ones are possible afterwards."""
        ...

    def abandon(self) -> None:
        """Leave the connection to the parent of a forked process."""
        ...


class Ledger(ABC):
    """The rules of a job's life cycle. Methods raise LedgerUnavailable if the ledger cannot be reached."""

    observer: Observer = NULL_OBSERVER  # is notified of each job that this process has made final

    @abstractmethod
    def _create_many(self, entries: Sequence[Entry]) -> list[Entry]:
        """Enter jobs, each atomically.

        Args:
            entries: New entries.

        Returns:
            For each, the existing entry with its id, or with its idempotency key and tenant, else the new
            one. The list ends with the first existing entry that is of a different job (`is_same_job`): the
            entries after it are not entered.
        """

    @abstractmethod
    def _find(self, job_id: str) -> Entry | None:
        """Find the entry of a job; None for an unknown one."""

    @abstractmethod
    def _compare_and_set(
        self,
        before: StatusDocument,
        after: StatusDocument,
        *,
        delay_s: float = 0,
        only_if_due: bool = False,
    ) -> bool:
        """Replace a document by its next revision, atomically.

        The same step adds or removes the job's lease, moves the job to the queue of its new status, and adds
        its event to the outbox.

        Args:
            before: The expected revision: its attempt and revision are compared with the current ones.
            after: The next revision.
            delay_s: The pause before the next attempt, for status `retrying`.
            only_if_due: Replace only if the job's lease, or its pause, is over.

        Returns:
            Whether it was replaced, by this call or by an identical one before.
        """

    @abstractmethod
    def _claim_in_turn(
        self, before: StatusDocument, after: StatusDocument, fingerprint: str | None = None
    ) -> bool | Entry:
        """Replace a queued document by a running one, for a message of this job, if it is the job's turn.

        Args:
            before: As for `_compare_and_set`.
            after: The running document.
            fingerprint: Replace only if the job has this fingerprint and its document equals `before`.

        Returns:
            As `_compare_and_set`; or, where several tenants wait, the entry of the job whose turn it is: the
            message is to be used for that one, and this job waits for another message.
        """

    @abstractmethod
    def find_turn(self, route: str) -> Entry | None:
        """Find the queued job whose turn it is, for a message whose own job is not queued any more.

        Args:
            route: The priority of the message's job.

        Returns:
            The entry of the job; None where no tenant waits.
        """

    @abstractmethod
    def read_many(self, ids: Sequence[str], tenant: str | None = None) -> dict[str, StatusDocument]:
        """Read the documents of jobs.

        Args:
            ids: The ids of the jobs.
            tenant: The name of the tenant whose jobs are read; None: everybody's.

        Returns:
            The documents by id. Unknown ids, and those of other tenants, are left out.
        """

    def open_updates(self) -> JobUpdates | None:
        """Open a subscription to changes of jobs; None if this ledger has none and jobs must be polled."""
        return None

    def for_asyncio(self) -> "Ledger":
        """The same ledger for event loops: what a client calls must be awaited there (`awaited`)."""
        return self  # without connections nothing blocks

    def close(self) -> None:  # noqa: B027  # not every ledger has connections
        """Close all connections. The next call opens new ones."""

    @abstractmethod
    def count_jobs(self) -> tuple[int, int]:
        """Count the waiting jobs (queued and retrying) and the running jobs."""

    @abstractmethod
    def renew_leases(self, worker: str, health: str, held: Mapping[str, int]) -> LeaseRenewal:
        """Renew a worker's leases, in one round trip.

        Args:
            worker: The worker's id.
            health: Its health report, as JSON: `find_workers` returns it.
            held: The jobs that it runs, id -> attempt.

        Returns:
            Which of these jobs it has lost, and which running jobs are to be canceled.
        """

    @abstractmethod
    def find_workers(self) -> dict[str, str]:
        """Find the workers that have renewed their leases recently: id -> health report, as JSON."""

    @abstractmethod
    def remove_worker(self, worker: str) -> None:
        """Remove a worker that has stopped from `find_workers`; else it stays for some leases."""

    @abstractmethod
    def try_lead(self, worker: str, seconds: float) -> bool:
        """Become or remain the worker that runs the reaper.

        Args:
            worker: The worker's id.
            seconds: For how long.

        Returns:
            False if another worker is the leader.
        """

    @abstractmethod
    def find_overdue(self, limit: int) -> Overdue:
        """Find jobs that the reaper must act on, at most `limit` of each kind."""

    @abstractmethod
    def find_unpublished(
        self, route: str, *, queue_is_empty: bool, lost_after_s: float, limit: int
    ) -> list[str]:
        """Find queued jobs whose message must have been lost. Each is then not found again for a while.

        Args:
            route: The jobs' priority, or "shard".
            queue_is_empty: Whether the queue of this route is empty. If not, only jobs are found that were
                published before a job whose message has been received since.
            lost_after_s: The time within which a message must be received.
            limit: The maximum number of jobs.

        Returns:
            The ids of the jobs.
        """

    @abstractmethod
    def list_jobs(self, query: JobQuery, tenant: str | None = None) -> JobPage:
        """List jobs, newest first. Shards are not listed.

        A page is a bounded amount of work for the ledger: it may have fewer jobs than asked for, even none,
        and a cursor. Jobs that are entered meanwhile do not move what later pages contain.

        Args:
            query: Which jobs, and how many.
            tenant: The name of the tenant whose jobs are listed; None: everybody's.

        Returns:
            The page.
        """

    @abstractmethod
    def read_usage(self, tenant: str, days: int) -> list[UsageDay]:
        """Read what a tenant has used.

        Args:
            tenant: Its name. Nobody's usage is not counted.
            days: The number of days, today's included; a year is kept.

        Returns:
            The days, the latest first.
        """

    @abstractmethod
    def find_dead_letters(self) -> list[tuple[str, float]]:
        """Find failed jobs that have not been replayed.

        Returns:
            For each, its id and when it failed, in seconds since the epoch; newest first.
        """

    @abstractmethod
    def drop_dead_letter(self, job_id: str) -> None:
        """Remove a job from the dead letters."""

    @abstractmethod
    def prune(self) -> None:
        """Remove dead letters, parked recipients and workers whose retention is over."""

    def submit(
        self, job: Work, *, retry_failed: bool = False, tenant: Tenant | None = None
    ) -> StatusDocument:
        """Enter a job, once: the same job with the same id or idempotency key is entered only the first time.

        Args:
            job: The job or shard.
            retry_failed: If the existing job has failed, retry it: see `retry`.
            tenant: Whose job it is; None: nobody's. Tenants do not share idempotency keys.

        Returns:
            The document of the job, or of the existing one.

        Raises:
            IdempotencyConflict: The id or the idempotency key belongs to a different job.
        """
        (entered,) = self.submit_many([job], retry_failed=retry_failed, tenant=tenant)
        if isinstance(entered, IdempotencyConflict):
            raise entered
        return entered

    @blocking
    async def submit_many(
        self, jobs: Sequence[Work], *, retry_failed: bool = False, tenant: Tenant | None = None
    ) -> list[StatusDocument | IdempotencyConflict]:
        """Enter jobs, in order and in one round trip, and publish none.

        Args:
            jobs: Jobs or shards.
            retry_failed: Retry existing jobs that have failed: see `retry`.
            tenant: Whose jobs they are: see `submit`.

        Returns:
            A document for each job. The list ends with the first conflict: no job after it is entered.
        """
        entered = await awaited(self.enter_many, jobs, retry_failed=retry_failed, tenant=tenant)
        return [one.document if isinstance(one, Entered) else one for one in entered]

    @blocking
    async def enter_many(
        self,
        jobs: Sequence[Work],
        *,
        retry_failed: bool = False,
        tenant: Tenant | None = None,
        write_message: MessageWriter | None = None,
    ) -> list[Entered | IdempotencyConflict]:
        """Enter jobs as `submit_many`, and publish each new one in the same atomic step.

        Args:
            jobs: Jobs or shards.
            retry_failed: Retry existing jobs that have failed: see `retry`.
            tenant: Whose jobs they are: see `submit`.
            write_message: Writes the message of a job; None: the queues are in another server, or the
                caller publishes later.

        Returns:
            For each job its document, and whether its message was published. The list ends with the first
            conflict.
        """
        entries = [_make_entry(job, tenant or NOBODY, write_message) for job in jobs]
        results: list[Entered | IdempotencyConflict] = []
        created = await awaited(self._create_many, entries)
        for job, entry, held in zip(jobs, entries, created, strict=False):
            if not is_same_job(entry, held):
                results.append(_make_conflict(job, held.document.id))
            elif retry_failed and held.document.status == "failed":
                results.append(Entered(await self._retry_if_failed(held.document.id)))
            else:
                is_new = held.document is entry.document
                results.append(Entered(held.document, published=is_new and held.message is not None))
        return results

    async def _retry_if_failed(self, job_id: str) -> StatusDocument:
        """Retry a job; one that cannot be retried, or was meanwhile, is left as it is."""
        try:
            return await awaited(self.retry, job_id)
        except JobNotFailed:
            return await awaited(self.read, job_id)

    @blocking
    async def retry(self, job_id: str, tenant: str | None = None) -> StatusDocument:
        """Queue a failed job again, with its id, idempotency key and webhooks, and with all its attempts.

        Args:
            job_id: The id of the job.
            tenant: The name of its tenant; None: anybody's.

        Returns:
            The queued document. A job that is not final is left as it is.

        Raises:
            UnknownJob: The ledger has no such job, or it is another tenant's.
            JobNotFailed: The job is final and has not failed, is a shard, or cannot be read by this version.
        """
        while True:
            before = await awaited(self.read, job_id, tenant)
            if not before.final:
                return before
            job = await awaited(self.read_job, job_id) if before.status == "failed" else None
            if not isinstance(job, Job):
                raise JobNotFailed(_explain_not_failed(before, job))
            after = state_machine.retry(before, job.max_attempts)
            if await awaited(self._compare_and_set, before, after):
                return after

    def get_or_create(
        self, job_id: str, payload: object, read: Callable[[object], Work] = parse
    ) -> tuple[Work | None, StatusDocument]:
        """Find the job of a message; enter it if the ledger does not have it.

        Args:
            job_id: The id of the message.
            payload: The content of the message.
            read: Makes a job of the payload.

        Returns:
            The job and its document. The job is None if it is final and has not failed: the ledger keeps only
            the document then.

        Raises:
            InvalidJob: The payload, or the ledger's record, is not a job that this version can read.
            IdempotencyConflict: The id or the idempotency key belongs to a different job.
        """
        held = self._find(job_id)
        if held and held.document.final and held.document.status != "failed":
            return None, held.document
        if held:
            return parse(json.loads(held.job)), held.document
        job = read(payload)
        document = self.submit(job)  # perhaps the first with this idempotency key, which has its own id
        return job.model_copy(update={"id": document.id}), document

    @blocking
    async def read_job(self, job_id: str, tenant: str | None = None) -> Work | None:
        """Read a job's content, which the ledger keeps while the job is not final and if it has failed.

        Args:
            job_id: The id of the job.
            tenant: The name of its tenant; None: anybody's.

        Returns:
            The job or shard; None if the ledger does not have it, if it is another tenant's, or if this
            version cannot read it.
        """
        held = await awaited(self._find, job_id)
        try:
            return parse(json.loads(held.job)) if held and held.belongs_to(tenant) else None
        except InvalidJob:
            return None

    def read_tenant(self, job_id: str) -> Tenant:
        """Read whose a job is; `NOBODY` also for an unknown job."""
        held = self._find(job_id)
        return held.tenant if held else NOBODY

    def read_route(self, job_id: str) -> str | None:
        """Read a job's route, its priority or "shard"; None for an unknown job."""
        held = self._find(job_id)
        return held.route if held else None

    def refuse(self, job_id: str, payload: object, error: GradcamError) -> StatusDocument:
        """Record that a message contains no valid job.

        Args:
            job_id: The id of the message.
            payload: The content of the message.
            error: Why it is refused.

        Returns:
            The failed document. An existing job with this id is left as it is, unless this version cannot
            read it: then it fails.
        """
        text = json.dumps(payload, sort_keys=True, default=repr)
        problem = Problem.of(error, stage="receive", attempt=0)
        document = state_machine.new_document(job_id).model_copy(
            update={"status": "failed", "error": problem, "completed_at": utc_now()}
        )
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        (held,) = self._create_many([Entry(fingerprint, "null", None, document)])
        if held.document is document:
            self._notify_if_final(document)
        if held.document.final or self.read_job(job_id):
            return held.document
        return self.finish(held.document, status="failed", error=problem)

    @blocking
    async def read(self, job_id: str, tenant: str | None = None) -> StatusDocument:
        """Read the document of a job.

        Args:
            job_id: The id of the job.
            tenant: The name of its tenant; None: anybody's.

        Returns:
            The document.

        Raises:
            UnknownJob: The ledger has no such job, or it is another tenant's: the error is the same.
        """
        job_id = str(job_id)  # web frameworks pass uuid.UUID
        possible = re.fullmatch(ID_PATTERN, job_id)
        documents = await awaited(self.read_many, [job_id], tenant) if possible else {}
        if job_id not in documents:
            message = f"The ledger has no job {job_id}: its id is wrong, or it ended too long ago."
            raise UnknownJob(message)
        return documents[job_id]

    def claim_fresh(self, job: Job, entered_at: datetime, worker: WorkerRef) -> StatusDocument | Entry | None:
        """Claim a job that has not changed since it was entered, without reading it first.

        Args:
            job: The job, as its message contains it.
            entered_at: When it was entered.
            worker: The worker that claims it.

        Returns:
            The running document; the entry of another job if it is that one's turn; None if the job has
            changed, has expired, or is not the one in the ledger: `get_or_create` and `claim` then find out
            which.
        """
        now = utc_now()
        if job.expires_at and job.expires_at <= now:
            return None
        before = state_machine.new_document(job.id, job, entered_at)
        after = state_machine.begin_attempt(before, worker, now)
        claimed = self._claim_in_turn(before, after, _fingerprint(job))
        return claimed if isinstance(claimed, Entry) else after if claimed else None

    def claim(self, before: StatusDocument, worker: WorkerRef, *, in_turn: bool = True) -> Claim:
        """Claim the next attempt at a job.

        Args:
            before: The last known document of the job.
            worker: The worker that claims it.
            in_turn: Whether it is claimed for a message of its own, and so must wait for the turn of its
                tenant. False: the ledger has named it as the one whose turn it is. A job whose last worker
                died has no turns: it is claimed for its own message, when that is received.

        Returns:
            The outcome, and the current document.
        """
        if before.final:
            return Claim(ClaimOutcome.ALREADY_FINAL, before)
        if before.status != "queued":
            return Claim(ClaimOutcome.HELD, before)
        after = state_machine.claim(before, worker)
        has_turn = in_turn and not after.final and not state_machine.is_suspected(before)
        replace = self._claim_in_turn if has_turn else self._compare_and_set
        replaced = replace(before, after)
        if isinstance(replaced, Entry):
            return Claim(ClaimOutcome.OTHERS_TURN, before, replaced)
        if not replaced:
            return Claim(ClaimOutcome.CHANGED, self.read(before.id))
        self._notify_if_final(after)
        return Claim(ClaimOutcome.ENDED_BY_CLAIM if after.final else ClaimOutcome.CLAIMED, after)

    def advance(self, document: StatusDocument, *, patience_s: float = 0, **changes: Any) -> StatusDocument:
        """Write the progress of a job that this attempt holds.

        Args:
            document: The last known document, of this attempt.
            patience_s: How long to retry while the ledger cannot be reached: repeating a write is harmless.
            changes: Fields to replace, but not `status`: see `finish` and `postpone`.

        Returns:
            The new document.

        Raises:
            AttemptFenced: Another attempt holds the job by now.
        """
        return self._replace(document, patience_s=patience_s, **changes)

    def finish(
        self, document: StatusDocument, *, status: str, patience_s: float = 0, **changes: Any
    ) -> StatusDocument:
        """Write the final state of a job that this attempt holds, and the event of its end.

        Args:
            document: The last known document, of this attempt.
            status: `succeeded`, `failed`, `canceled` or `expired`.
            patience_s: As for `advance`.
            changes: Other fields to replace.

        Returns:
            The final document.

        Raises:
            AttemptFenced: Another attempt holds the job by now.
        """
        return self._replace(document, patience_s=patience_s, status=status, **changes)

    def postpone(
        self, document: StatusDocument, *, delay_s: float, patience_s: float = 0, **changes: Any
    ) -> StatusDocument:
        """End this attempt at a job, which is `retrying` until the next one.

        Args:
            document: The last known document, of this attempt.
            delay_s: The pause before the next attempt.
            patience_s: As for `advance`.
            changes: Other fields to replace.

        Returns:
            The new document: a final one if cancellation was requested.

        Raises:
            AttemptFenced: Another attempt holds the job by now.
        """
        return self._replace(document, patience_s=patience_s, delay_s=delay_s, status="retrying", **changes)

    def _replace(
        self, document: StatusDocument, *, patience_s: float, delay_s: float = 0, **changes: Any
    ) -> StatusDocument:
        """Write changes to a job, if it is still held by the attempt of `document`. Raises AttemptFenced."""
        before, after = document, state_machine.advance(document, **changes)
        patience = Deadline(patience_s)
        while True:
            try:
                if self._compare_and_set(before, after, delay_s=delay_s):
                    self._notify_if_final(after)
                    return after
                held = self._find(document.id)
            except LedgerUnavailable:
                if not patience.left_s():
                    raise
                time.sleep(RETRY_PAUSE_S)
                continue
            current = held.document if held else None
            # `started_at` too: a server that lost its last second may have issued the attempt number twice.
            ours = (document.attempt, document.status, document.started_at)
            if current is None or (current.attempt, current.status, current.started_at) != ours:
                message = f"Attempt {document.attempt} of job {document.id} was overtaken: it must stop."
                raise AttemptFenced(message)
            before = current  # of the same attempt: only its cancellation has been requested
            after = state_machine.advance(current, **changes)

    @blocking
    async def cancel(self, job_id: str, tenant: str | None = None) -> StatusDocument:
        """Cancel a job: a waiting one is final at once, a running one as soon as its worker stops it.

        Args:
            job_id: The id of the job.
            tenant: The name of its tenant; None: anybody's.

        Returns:
            The new document. A final job is left as it is.

        Raises:
            UnknownJob: The ledger has no such job, or it is another tenant's.
        """
        while True:
            before = await awaited(self.read, job_id, tenant)
            if before.final or before.cancel_requested_at:
                return before
            after = state_machine.cancel(before)
            if await awaited(self._compare_and_set, before, after):
                return after

    def requeue_unfinished(self, job_id: str, attempt: int) -> bool:
        """Queue a job that an attempt holds, without counting the attempt.

        Args:
            job_id: The id of the job.
            attempt: The attempt.

        Returns:
            Whether the attempt still held the job.
        """
        return self._change_if_status(job_id, "running", state_machine.release, attempt) is not None

    def expire_lease(self, job_id: str) -> str | None:
        """Queue a running job whose lease has expired, or end it.

        Args:
            job_id: The id of the job.

        Returns:
            The route by which to publish it; None if nothing is to be published.
        """
        return self._change_if_status(
            job_id, "running", state_machine.expire_lease, only_if_due=True, reason="lost"
        )

    def requeue(self, job_id: str) -> str | None:
        """Queue a retrying job whose pause is over.

        Args:
            job_id: The id of the job.

        Returns:
            The route by which to publish it; None if nothing is to be published.
        """
        return self._change_if_status(
            job_id, "retrying", state_machine.requeue, only_if_due=True, reason="due"
        )

    def expire(self, job_id: str) -> None:
        """End a waiting job whose `expires_at` has passed."""
        self._change_if_status(job_id, "queued", state_machine.expire, reason="expired")
        self._change_if_status(job_id, "retrying", state_machine.expire, reason="expired")

    def _change_if_status(
        self,
        job_id: str,
        status: str,
        change: Callable[[StatusDocument], StatusDocument],
        attempt: int | None = None,
        *,
        only_if_due: bool = False,
        reason: str = "",
    ) -> str | None:
        """Change a job that still has this status; return its route if it is queued afterwards."""
        held = self._find(job_id)
        if not held or held.document.status != status or attempt not in {None, held.document.attempt}:
            return None
        after = change(held.document)
        if not self._compare_and_set(held.document, after, only_if_due=only_if_due):
            return None
        if reason:
            self.observer.job_reaped(reason)
        self._notify_if_final(after)
        return held.route if after.status == "queued" else None

    def _notify_if_final(self, document: StatusDocument) -> None:
        if document.final:
            self.observer.job_finished(document.status, document.error.code if document.error else "")


def is_same_job(entry: Entry, held: Entry) -> bool:
    """Whether an existing entry is of the job that is submitted.

    Args:
        entry: The entry of the submitted job.
        held: The existing entry with its id or idempotency key.

    Returns:
        False if the content differs, or if it is another tenant's. Who submits for no tenant finds all jobs.
    """
    return held.fingerprint == entry.fingerprint and held.belongs_to(entry.tenant.name or None)


def latest_days(days: int) -> list[date]:
    """The latest days in UTC, today first."""
    today = utc_now().date()
    return [today - timedelta(days=ago) for ago in range(days)]


def device_s_of(document: StatusDocument) -> float:
    """How long the latest attempt at a job has used the device, however it ended.

    Args:
        document: The final document.

    Returns:
        Seconds: its equal shares of the passes that it was computed in; 0 for a job that was not computed.
    """
    return document.metrics.get("device_s", 0.0)


def _make_entry(work: Work, tenant: Tenant, write_message: MessageWriter | None) -> Entry:
    document, terms = state_machine.new_document(work.id, work), terms_of(work)
    return Entry(
        _fingerprint(work),
        work.to_json(),
        terms.idempotency_key,
        document,
        terms.route,
        terms.webhooks,
        tenant,
        work.network,
        write_message(work, document.created_at) if write_message and document.status == "queued" else None,
    )


def _make_conflict(work: Work, existing_id: str) -> IdempotencyConflict:
    what = (
        f"id {work.id}" if existing_id == work.id else f"idempotency key {terms_of(work).idempotency_key!r}"
    )
    hint = "If that one has failed, it can be retried under its id and key."
    return IdempotencyConflict(f"The {what} belongs to a different job, {existing_id}: use a new one. {hint}")


def _explain_not_failed(document: StatusDocument, work: Work | None) -> str:
    if isinstance(work, Shard):
        return f"It is a shard of backfill {work.backfill}: `gradcam backfill --resume` runs it again."
    if document.status == "failed":
        return f"Job {document.id} cannot be tried again: this version can read no job in its message."
    return (
        f"Job {document.id} is {document.status}: only a failed one can be tried again. "
        "Submit the image as a new job, with another id and idempotency key."
    )


def _fingerprint(work: Work) -> str:
    return hashlib.sha256(work.fingerprint().encode()).hexdigest()
