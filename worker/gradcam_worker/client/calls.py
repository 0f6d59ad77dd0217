"""What both clients do, as coroutines: `GradcamClient` runs them over blocking I/O, `AsyncGradcamClient` over
asyncio's. See `resilience.blocking`; `GradcamClient` describes arguments, results and errors.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from gradcam_worker.broker import envelope
from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.client import results
from gradcam_worker.client.job_fields import as_job
from gradcam_worker.client.live_workers import LiveWorkers, read_live_workers
from gradcam_worker.client.results import Objects, Result
from gradcam_worker.client.waiting.loop_yielder import LoopYielder, never_yield
from gradcam_worker.client.waiting.poller import StatusUpdate
from gradcam_worker.client.waiting.waiter import read_update, with_cause
from gradcam_worker.errors import (
    BrokerUnavailable,
    IdempotencyConflict,
    InvalidJob,
    LedgerUnavailable,
    RedisUnavailable,
    WaitTimeout,
    with_sentence,
)
from gradcam_worker.ledger.ledger import Entered, Ledger, Tenant
from gradcam_worker.observability import tracing
from gradcam_worker.resilience.blocking import awaited, block
from gradcam_worker.resilience.retry import HALF_OR_MORE, Retries, RetryPolicy
from gradcam_worker.schemas.job import Job, describe_missing_scheme, describe_wrong_webhook
from gradcam_worker.schemas.listing import JobPage, JobQuery
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

CHUNK, CHUNK_BYTES = 500, 4 * 1024**2  # jobs, and their bytes as JSON, of one round trip of `submit_many`
PUBLISHED_LATER = "The jobs are accepted; a worker publishes them within a minute."
T = TypeVar("T")


def _hopeless(error: Exception) -> bool:
    return isinstance(error, RedisUnavailable) and not error.retryable


# A web request is waiting: an unreachable Redis is asked again for a few seconds, with short pauses.
REDIS_RETRIES = RetryPolicy(
    first_s=0.25,
    max_s=0.5,
    jitter=HALF_OR_MORE,
    total_s=5.0,
    errors=(LedgerUnavailable, BrokerUnavailable),
    hopeless=_hopeless,
)


class Caller(Protocol):
    """Makes a call that blocks: of S3, of a file system, or of a double."""

    async def __call__(self, call: Callable[[], T], /) -> T:
        """Return what the call returns."""


async def call_here(call: Callable[[], T], /) -> T:
    """Make a call in the calling thread."""
    return call()


class ClientCalls:
    """The calls of one client."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        publish: Publisher | Callable[[Job], None],
        objects: Objects,
        *,
        pause: Callable[[float], Awaitable[None]] = block,
        yield_to_loop: Callable[[], Awaitable[None]] = never_yield,
        call_blocking: Caller = call_here,
        tenant: Tenant | None = None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            settings: Of the client.
            ledger: The ledger.
            publish: The queues, or what stands in for them.
            objects: S3, or what stands in for it.
            pause: Sleeps between two tries.
            yield_to_loop: Is awaited before a job is checked, and before each try.
            call_blocking: Makes calls of `objects` and of a `publish` that stands in.
            tenant: Whose jobs are submitted and found; None: nobody's are submitted, and everybody's found.
        """
        self._settings, self._ledger, self._publish, self._objects = settings, ledger, publish, objects
        self._pause, self._yield_to_loop, self._call_blocking = pause, yield_to_loop, call_blocking
        self.tenant, self.owner = tenant, tenant.name if tenant else None
        self._traces = tracing.connect(settings.traces, "gradcam-client")

    def for_asyncio(self, call_blocking: Caller) -> "ClientCalls":
        """The same calls for event loops. What stands in for ledger or queues stays.

        Args:
            call_blocking: Makes calls that block.
        """
        publish = self._publish.for_asyncio() if isinstance(self._publish, Publisher) else self._publish
        return ClientCalls(
            self._settings,
            self._ledger.for_asyncio(),
            publish,
            self._objects,
            pause=asyncio.sleep,
            yield_to_loop=LoopYielder().yield_to_loop,
            call_blocking=call_blocking,
            tenant=self.tenant,
        )

    def as_tenant(self, tenant: Tenant | None) -> Self:
        """The same calls, of one tenant's jobs alone. They share all connections."""
        calls = copy(self)
        calls.tenant, calls.owner = tenant, tenant.name if tenant else None
        return calls

    async def submit(
        self, job: Job | Mapping[str, Any] | None = None, /, *, retry_failed: bool = False, **fields: Any
    ) -> str:
        """See `GradcamClient.submit`."""
        if job is not None and fields:
            names = ", ".join(fields)
            both = f"Give a job or its fields, not both: {names} came with a job."
            uri = f"The image is a field, too: submit(image={job!r}, ...), and {names} as it is."
            message = both if isinstance(job, Job | Mapping) else uri
            raise InvalidJob(message)
        await self._yield_to_loop()
        return (await self.enter(as_job(fields if job is None else job), retry_failed=retry_failed)).id

    async def enter(self, job: Job, *, retry_failed: bool = False) -> StatusDocument:
        """Submit a job, and return its document: that of an earlier one, if it is the same job."""
        with self._traces.start_span("submit", job.traceparent, kind="PRODUCER", job_id=job.id):
            return await self._submit(_with_trace(_in_order(job)), retry_failed=retry_failed)

    async def _submit(self, job: Job, *, retry_failed: bool) -> StatusDocument:
        self._check(job)
        retries = REDIS_RETRIES.start()
        (entered,) = await self._enter([job], retries, retry_failed=retry_failed)
        if isinstance(entered, IdempotencyConflict):
            raise entered
        if entered.document.status == "failed":
            hint = "retry, or retry_failed=True, tries it again"
            log.info("job_failed_before", job_id=entered.document.id, reason=hint)
        await self._publish_entered([(job, entered)], retries)
        return entered.document

    async def submit_many(
        self, jobs: Iterable[Job | Mapping[str, Any]], *, retry_failed: bool = False
    ) -> list[str]:
        """See `GradcamClient.submit_many`."""
        ids: list[str] = []
        published, left = True, iter(jobs)
        while True:
            chunk, problem = self._next_chunk(left)
            if not chunk and not problem:
                return ids
            entered: list[Entered | IdempotencyConflict] = []
            try:
                if chunk:
                    entered = await self._enter(chunk, REDIS_RETRIES.start(), retry_failed=retry_failed)
            except LedgerUnavailable as error:
                error.accepted = tuple(ids)
                raise
            accepted = []
            for job, held in zip(chunk, entered, strict=False):
                if isinstance(held, IdempotencyConflict):
                    problem = held
                else:
                    accepted.append((job, held))
            ids += [held.document.id for _, held in accepted]
            # A broker that has been out of reach for so long is not waited for with every chunk again.
            policy = REDIS_RETRIES if published else replace(REDIS_RETRIES, max_tries=1)
            published = await self._publish_entered(accepted, policy.start())
            if problem:
                raise _with_number(problem, ids) from problem

    def _next_chunk(self, left: Iterator[Job | Mapping[str, Any]]) -> tuple[list[Job], Exception | None]:
        """The next jobs, checked, and the error of the one after them, if any; no jobs at the end."""
        chunk: list[Job] = []
        size = 0
        try:
            for job_or_fields in left:
                job = _with_trace(_in_order(as_job(job_or_fields)))
                size += self._check(job)
                chunk.append(job)
                if len(chunk) >= CHUNK or size >= CHUNK_BYTES:
                    break
        except Exception as error:  # noqa: BLE001  # the caller's generator may raise anything; raised later
            return chunk, error
        return chunk, None

    def _check(self, job: Job) -> int:
        """The size of a job in bytes. Raises InvalidJob where no worker would accept it."""
        text = job.to_json().encode()
        envelope.check_job(text, self._settings.max_message_bytes)
        if why := describe_missing_scheme(job.image.uri):
            message = f"This is not a job: image.uri: {why}; upload_and_submit takes a file of this machine."
            raise InvalidJob(message)
        for index, hook in enumerate(job.webhooks):
            if why := describe_wrong_webhook(hook.url):
                message = f"This is not a job: webhooks.{index}.url: {why}."
                raise InvalidJob(message)
        return len(text)

    async def _enter(
        self, jobs: Sequence[Job], retries: Retries, *, retry_failed: bool
    ) -> list[Entered | IdempotencyConflict]:
        """Enter jobs in the ledger: see `Ledger.enter_many`. It is idempotent."""
        queues = self._publish
        write_message = (
            queues.write_message if isinstance(queues, Publisher) and self._settings.has_one_server else None
        )
        submit = _TrackingDoubt(
            lambda: awaited(
                self._ledger.enter_many,
                jobs,
                retry_failed=retry_failed,
                tenant=self.tenant,
                write_message=write_message,
            )
        )
        try:
            return await self._tried(retries, submit)
        except LedgerUnavailable as error:
            which = f"job {jobs[0].id} was" if len(jobs) == 1 else f"{len(jobs)} jobs were"
            if not submit.in_doubt:
                known = f"{which[0].upper()}{which[1:]} not accepted."
                raise with_sentence(error, known) from error
            again = "submit again with the same id, or idempotency key, and nothing runs twice"
            doubt = with_sentence(error, f"Whether {which} accepted is not known: {again}.")
            doubt.in_doubt = tuple(job.id for job in jobs)
            raise doubt from error

    async def _publish_entered(self, entered: Sequence[tuple[Job, Entered]], retries: Retries) -> bool:
        """Publish jobs that are queued in the ledger; return whether the broker could be reached.

        A job that was entered before is published again: its message may have been lost.
        """
        waiting = [
            (job.model_copy(update={"id": held.document.id}), held.document)
            for job, held in entered
            if held.document.status == "queued" and not held.published
        ]
        if not waiting:
            return True

        async def publish() -> None:
            if isinstance(self._publish, Publisher):
                await awaited(self._publish.publish, [(job, held.created_at) for job, held in waiting])
            else:
                for job, _ in waiting:
                    await self._call_blocking(partial(self._publish, job))

        try:
            await self._tried(retries, publish)
        except BrokerUnavailable as error:
            log.warning(
                "publish_failed",
                job_id=waiting[0][0].id,
                jobs=len(waiting),
                error=error,
                reason=PUBLISHED_LATER,
            )
            return False
        return True

    async def status(self, job_id: str) -> StatusDocument:
        """See `GradcamClient.status`."""
        return await self._retried(lambda: awaited(self._ledger.read, job_id, self.owner))

    async def statuses(self, job_ids: Iterable[str]) -> dict[str, StatusDocument]:
        """See `GradcamClient.statuses`."""
        ids = [str(job_id) for job_id in job_ids]
        return await self._retried(lambda: awaited(self._ledger.read_many, ids, self.owner))

    async def cancel(self, job_id: str) -> StatusDocument:
        """See `GradcamClient.cancel`."""
        return await self._change(
            lambda: awaited(self._ledger.cancel, job_id, self.owner), f"job {job_id} was", "cancelled"
        )

    async def retry(self, job_id: str) -> StatusDocument:
        """See `GradcamClient.retry`."""
        document = await self._change(
            lambda: awaited(self._ledger.retry, job_id, self.owner), f"job {job_id} is", "tried again"
        )
        try:
            job = await self._retried(lambda: awaited(self._ledger.read_job, document.id, self.owner))
        except LedgerUnavailable as error:
            log.warning("publish_failed", job_id=document.id, jobs=1, error=error, reason=PUBLISHED_LATER)
            return document
        if isinstance(job, Job):
            await self._publish_entered([(job, Entered(document))], REDIS_RETRIES.start())
        return document

    async def _change(self, change: Callable[[], Awaitable[T]], which: str, done: str) -> T:
        tracked = _TrackingDoubt(change)
        try:
            return await self._retried(tracked)
        except LedgerUnavailable as error:
            doubt = f"Whether {which} {done} is not known: ask again."
            known = f"{which[0].upper()}{which[1:]} not {done}."
            raise with_sentence(error, doubt if tracked.in_doubt else known) from error

    async def _retried(self, call: Callable[[], Awaitable[T]]) -> T:
        return await self._tried(REDIS_RETRIES.start(), call)

    async def _tried(self, retries: Retries, call: Callable[[], Awaitable[T]]) -> T:
        async def yielding() -> T:
            await self._yield_to_loop()
            return await call()

        return await retries.call_awaited(yielding, self._pause)

    async def result(self, job_id: str, *, manifest_uri: str | None = None, expires_s: int = 3600) -> Result:
        """See `GradcamClient.result`."""
        uri = manifest_uri or results.manifest_uri(await self.status(job_id))
        return await self._call_blocking(partial(results.read, str(job_id), uri, self._objects, expires_s))

    async def upload_and_submit(
        self,
        /,
        image: Path | str | bytes,
        *,
        to: str | None = None,
        retry_failed: bool = False,
        **fields: Any,
    ) -> str:
        """See `GradcamClient.upload_and_submit`."""
        root, max_bytes = to or self._settings.uploads, self._settings.max_image_bytes
        upload = await self._call_blocking(partial(results.prepare_upload, image, root, max_bytes))
        job = as_job({**fields, "image": {"uri": upload.uri, "sha256": upload.sha256}})
        self._check(job)
        await self._call_blocking(partial(self._objects.put, upload.uri, upload.data, upload.media_type))
        return await self.submit(job, retry_failed=retry_failed)

    async def list_page(self, query: JobQuery) -> JobPage:
        """See `GradcamClient.list_page`."""
        return await self._retried(lambda: awaited(self._ledger.list_jobs, query, self.owner))

    async def live_workers(self) -> LiveWorkers:
        """The live workers and their networks: see `GradcamClient.workers`."""
        return read_live_workers(await self._retried(lambda: awaited(self._ledger.find_workers)))

    async def read_update(self, job_id: str) -> StatusUpdate:
        """Read a job once, for `client.waiting.waiter`: its document, or why it could not be read."""
        return await read_update(self._ledger, job_id, self.owner)

    async def with_cause(self, late: WaitTimeout) -> WaitTimeout:
        """The error with a sentence about workers and queues."""
        return await with_cause(self._ledger, late)

    async def close(self) -> None:
        """Close all connections, those of asyncio only where they are of the running event loop."""
        await awaited(self._ledger.close)
        if isinstance(self._publish, Publisher):
            await awaited(self._publish.close)


def _in_order(job: Job) -> Job:
    """The job with its metadata and inputs sorted by name: JSON objects that are equal make equal jobs."""
    tables: dict[str, Mapping[str, Any]] = {"metadata": job.metadata, "inputs": job.inputs}
    unsorted = {name: table for name, table in tables.items() if [*table] != sorted(table)}
    ordered = {name: dict(sorted(table.items())) for name, table in unsorted.items()}
    return job.model_copy(update=ordered) if ordered else job


def _with_trace(job: Job) -> Job:
    """The job with the current span as its trace parent, unless it has one."""
    traceparent = job.traceparent or tracing.current_traceparent()
    return job if traceparent == job.traceparent else job.model_copy(update={"traceparent": traceparent})


class _TrackingDoubt(Generic[T]):
    """A change of the ledger that may be tried more than once; `in_doubt`: a failed try may have done it."""

    def __init__(self, change: Callable[[], Awaitable[T]]) -> None:
        self._change, self.in_doubt = change, False

    async def __call__(self) -> T:
        try:
            return await self._change()
        except LedgerUnavailable as error:
            self.in_doubt = self.in_doubt or not error.changed_nothing
            raise


def _with_number(problem: Exception, accepted: Sequence[str]) -> Exception:
    """The error with the number of its job, and the ids of the jobs before it, which are accepted."""
    if not isinstance(problem, InvalidJob | IdempotencyConflict):
        log.warning("submit_many_interrupted", accepted=len(accepted), error=problem)
        return problem
    numbered = type(problem)(f"Job number {len(accepted) + 1} of those given: {problem}")
    numbered.accepted = tuple(accepted)
    return numbered
