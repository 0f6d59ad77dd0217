"""The client for asyncio: the same names, awaitable. Waiting for a job does not block a thread.

>>> async with AsyncGradcamClient("redis://127.0.0.1:6379/0") as client:
...     job = await client.submit(image="s3://in/pier.jpg", network="vgg16", top_n=5)
...     async for document in job.stream():
...         print(document.status, document.stage)

Redis is asked by redis.asyncio, on a few connections of each event loop, which are closed with the loop. One
thread of the process reads what waits and streams are about, whatever their number. Only S3 and files are
asked in threads, at most `THREADS` of the client's own: no call waits for the event loop's default executor.
Cancelling the task that awaits a call does not undo the call: a job whose submission was cancelled may have
been accepted.
"""

import asyncio
import builtins
import contextvars
import functools
import os
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from copy import copy
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, overload

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.client.datasets.backfill_handle import AsyncBackfillHandle, BackfillHandle
from gradcam_worker.client.datasets.backfills import BackfillStatus, Cancellation
from gradcam_worker.client.datasets.submitted_backfills import still_running
from gradcam_worker.client.job_fields import Classes, Image, ListConditions, TopN, WithTarget, naming_fields
from gradcam_worker.client.job_handle import AsyncJobHandle
from gradcam_worker.client.waiting.waiter import Subscription
from gradcam_worker.client.webhooks import Webhooks
from gradcam_worker.errors import WaitTimeout
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.listing import JobQuery
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.schemas.worker_report import NetworkOffer, WorkerReport
from gradcam_worker.settings import Settings

THREADS = 8  # for S3 and files
P = ParamSpec("P")
R = TypeVar("R")


def _awaitable(
    method: Callable[Concatenate[GradcamClient, P], R],
) -> Callable[Concatenate["AsyncGradcamClient", P], Coroutine[Any, Any, R]]:
    """The method of this name of `ClientCalls`, with the parameters of the client's."""

    @functools.wraps(method)
    async def call(self: "AsyncGradcamClient", /, *args: P.args, **kwargs: P.kwargs) -> R:
        result: R = await getattr(self.calls, method.__name__)(*args, **kwargs)
        return result

    return call


def _submitting_backfill(
    method: Callable[Concatenate[GradcamClient, P], BackfillHandle],
) -> Callable[Concatenate["AsyncGradcamClient", P], Coroutine[Any, Any, AsyncBackfillHandle]]:
    """The method of the blocking client, in a thread: it starts a process and waits for its first words."""

    @functools.wraps(method)
    async def call(self: "AsyncGradcamClient", /, *args: P.args, **kwargs: P.kwargs) -> AsyncBackfillHandle:
        output = await self._call_blocking(functools.partial(method, self.client, *args, **kwargs))
        return AsyncBackfillHandle(output, self)

    return call


class AsyncGradcamClient:
    """A `GradcamClient` for asyncio; may be shared between event loops and threads."""

    def __init__(
        self,
        broker_url: str | None = None,
        status_url: str | None = None,
        *,
        settings: Settings | None = None,
        client: GradcamClient | None = None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            broker_url: see `GradcamClient`.
            status_url: see `GradcamClient`.
            settings: see `GradcamClient`.
            client: an existing client to use instead of a new one.

        Raises:
            InvalidSettings: a URL or a setting is not what it should be.
        """
        self.client = client or GradcamClient(broker_url, status_url, settings=settings)
        self.calls = self.client.calls.for_asyncio(self._call_blocking)
        self._threads: dict[int, ThreadPoolExecutor] = {}  # by process: they do not survive a fork

    status = _awaitable(GradcamClient.status)
    statuses = _awaitable(GradcamClient.statuses)
    cancel = _awaitable(GradcamClient.cancel)
    retry = _awaitable(GradcamClient.retry)
    result = _awaitable(GradcamClient.result)
    list_page = _awaitable(GradcamClient.list_page)
    webhooks = Webhooks()

    async def networks(self) -> tuple[NetworkOffer, ...]:
        """See `GradcamClient.networks`."""
        return (await self.calls.live_workers()).networks

    async def workers(self) -> tuple[WorkerReport, ...]:
        """See `GradcamClient.workers`."""
        return (await self.calls.live_workers()).workers

    @overload
    async def submit(
        self, /, *, image: Image, network: str, retry_failed: bool = False, **fields: Unpack[TopN]
    ) -> AsyncJobHandle: ...

    @overload
    async def submit(
        self, /, *, image: Image, network: str, retry_failed: bool = False, **fields: Unpack[Classes]
    ) -> AsyncJobHandle: ...

    @overload
    async def submit(
        self, /, *, image: Image, network: str, retry_failed: bool = False, **fields: Unpack[WithTarget]
    ) -> AsyncJobHandle: ...

    @overload
    async def submit(
        self, job: Job | Mapping[str, Any], /, *, retry_failed: bool = False
    ) -> AsyncJobHandle: ...

    @naming_fields
    async def submit(
        self, job: Job | Mapping[str, Any] | None = None, /, *, retry_failed: bool = False, **fields: Any
    ) -> AsyncJobHandle:
        """See `GradcamClient.submit`."""
        return AsyncJobHandle(await self.calls.submit(job, retry_failed=retry_failed, **fields), self)

    async def submit_many(
        self, jobs: Iterable[Job | Mapping[str, Any]], *, retry_failed: bool = False
    ) -> builtins.list[AsyncJobHandle]:
        """See `GradcamClient.submit_many`."""
        ids = await self.calls.submit_many(jobs, retry_failed=retry_failed)
        return [AsyncJobHandle(job_id, self) for job_id in ids]

    @overload
    async def upload_and_submit(
        self,
        /,
        image: Path | str | bytes,
        *,
        network: str,
        to: str | None = None,
        retry_failed: bool = False,
        **fields: Unpack[TopN],
    ) -> AsyncJobHandle: ...

    @overload
    async def upload_and_submit(
        self,
        /,
        image: Path | str | bytes,
        *,
        network: str,
        to: str | None = None,
        retry_failed: bool = False,
        **fields: Unpack[Classes],
    ) -> AsyncJobHandle: ...

    @overload
    async def upload_and_submit(
        self,
        /,
        image: Path | str | bytes,
        *,
        network: str,
        to: str | None = None,
        retry_failed: bool = False,
        **fields: Unpack[WithTarget],
    ) -> AsyncJobHandle: ...

    @naming_fields
    async def upload_and_submit(
        self,
        /,
        image: Path | str | bytes,
        *,
        to: str | None = None,
        retry_failed: bool = False,
        **fields: Any,
    ) -> AsyncJobHandle:
        """See `GradcamClient.upload_and_submit`."""
        upload = self.calls.upload_and_submit(image, to=to, retry_failed=retry_failed, **fields)
        return AsyncJobHandle(await upload, self)

    def job(self, job_id: str) -> AsyncJobHandle:
        """See `GradcamClient.job`. It needs no server, and so is not awaited."""
        return AsyncJobHandle(job_id, self)

    async def list(self, **conditions: Unpack[ListConditions]) -> AsyncGenerator[StatusDocument, None]:
        """See `GradcamClient.list`."""
        query = JobQuery.of_all(**conditions)
        while True:
            page = await self.list_page(query)
            for document in page.jobs:
                yield document
            if page.cursor is None:
                return
            query = query.model_copy(update={"cursor": page.cursor})

    submit_backfill = _submitting_backfill(GradcamClient.submit_backfill)

    def backfill(self, output: str) -> AsyncBackfillHandle:
        """See `GradcamClient.backfill`. It needs no server, and so is not awaited."""
        return AsyncBackfillHandle(output.rstrip("/"), self)

    async def backfill_status(self, output: str) -> BackfillStatus:
        """See `GradcamClient.backfill_status`."""
        return await self._call_blocking(lambda: self.client.backfill_status(output))

    async def wait_for_backfill(self, output: str, timeout_s: float | None = None) -> BackfillStatus:
        """See `GradcamClient.wait_for_backfill`."""
        find_end = functools.partial(self.client.submitted_backfills.find_end, output)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    found = await self._call_blocking(find_end)
                    if isinstance(found, BackfillStatus):
                        return found
                    await asyncio.sleep(found)
        except TimeoutError:
            raise WaitTimeout(still_running(output, timeout_s)) from None

    async def cancel_backfill(self, output: str) -> Cancellation:
        """See `GradcamClient.cancel_backfill`."""
        return await self._call_blocking(lambda: self.client.cancel_backfill(output))

    async def close(self) -> None:
        """See `GradcamClient.close`. Connections of other event loops are closed with these."""
        await self.calls.close()
        await self._call_blocking(self.client.close)
        if pool := self._threads.pop(os.getpid(), None):
            pool.shutdown(wait=False)

    def is_upload(self, uri: str, *others: str) -> bool:
        """See `GradcamClient.is_upload`. It needs no server, and so is not awaited."""
        return self.client.is_upload(uri, *others)

    async def wait(self, job_id: str, timeout_s: float = 120) -> StatusDocument:
        """See `GradcamClient.wait`."""
        async with aclosing(self.stream(job_id, timeout_s)) as documents:
            return [document async for document in documents][-1]

    async def stream(
        self, job_id: str, timeout_s: float | None = None
    ) -> AsyncGenerator[StatusDocument, None]:
        """See `GradcamClient.stream`. To leave the loop early, use `contextlib.aclosing`."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        wake = functools.partial(loop.call_soon_threadsafe, woken.set)
        subscription = Subscription(job_id, wake, timeout_s, self.calls.owner)
        subscription.notify(await self.calls.read_update(subscription.job_id))
        try:
            with closing(self.client.waiter.follow(subscription)) as steps:
                for step in steps:
                    if isinstance(step, StatusDocument):
                        yield step
                    else:
                        with suppress(TimeoutError):
                            async with asyncio.timeout(step):
                                await woken.wait()
                        woken.clear()
        except WaitTimeout as late:
            raise await self.calls.with_cause(late) from None

    def as_tenant(self, tenant: Tenant | None) -> Self:
        """See `GradcamClient.as_tenant`. It needs no server, and so is not awaited."""
        client = copy(self)
        client.client, client.calls = self.client.as_tenant(tenant), self.calls.as_tenant(tenant)
        return client

    async def _call_blocking(self, call: Callable[[], R], /) -> R:
        """Make a call that blocks in a thread, in the caller's context."""
        pid = os.getpid()
        if pid not in self._threads:
            self._threads = {pid: ThreadPoolExecutor(THREADS, "gradcam-client")}
        in_context = functools.partial(contextvars.copy_context().run, call)
        return await asyncio.get_running_loop().run_in_executor(self._threads[pid], in_context)

    async def __aenter__(self) -> Self:
        """Nothing is connected yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """See `close`."""
        await self.close()
