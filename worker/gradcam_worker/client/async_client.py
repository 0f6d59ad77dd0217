"""The client for asyncio: the same names, awaitable. Waiting for a job does not block a thread.

>>> async with AsyncGradcamClient("redis://127.0.0.1:6379/0") as client:
...     job = await client.submit(image="s3://in/pier.jpg", network="vgg16", top_n=5)
...     async for document in job.stream():
...         print(document.status, document.stage)

Other calls run in threads of the client's own, at most `CALLS_AT_ONCE`: an unreachable Redis does not block
the event loop's default executor. The time that a call waits for a thread shortens its retries, see
`client.client.REDIS_RETRIES`. Cancelling the task that awaits a call does not undo the call: a job whose
submission was cancelled may have been accepted.
"""

import asyncio
import builtins
import contextvars
import functools
import os
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, overload

from gradcam_worker.client.client import GradcamClient, call_after_wait
from gradcam_worker.client.job_fields import Classes, Image, ListConditions, TopN, WithTarget
from gradcam_worker.client.job_handle import AsyncJobHandle
from gradcam_worker.client.waiter import Subscription
from gradcam_worker.client.webhooks import Webhooks
from gradcam_worker.errors import WaitTimeout
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.listing import MAX_PAGE, JobQuery
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

CALLS_AT_ONCE = 32
P = ParamSpec("P")
R = TypeVar("R")


def _awaitable(
    method: Callable[Concatenate[GradcamClient, P], R],
) -> Callable[Concatenate["AsyncGradcamClient", P], Coroutine[Any, Any, R]]:
    """A method of the client, called in a thread."""

    @functools.wraps(method)
    async def call(self: "AsyncGradcamClient", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._call(functools.partial(method, self.client, *args, **kwargs))

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
        self._threads: dict[int, ThreadPoolExecutor] = {}  # by process: they do not survive a fork

    status = _awaitable(GradcamClient.status)
    statuses = _awaitable(GradcamClient.statuses)
    cancel = _awaitable(GradcamClient.cancel)
    retry = _awaitable(GradcamClient.retry)
    result = _awaitable(GradcamClient.result)
    networks = _awaitable(GradcamClient.networks)
    workers = _awaitable(GradcamClient.workers)
    list_page = _awaitable(GradcamClient.list_page)
    webhooks = Webhooks()

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

    async def submit(
        self, job: Job | Mapping[str, Any] | None = None, /, *, retry_failed: bool = False, **fields: Any
    ) -> AsyncJobHandle:
        """See `GradcamClient.submit`."""
        submit = functools.partial(self.client.submit, retry_failed=retry_failed, **fields)
        return AsyncJobHandle(await self._call(submit if job is None else lambda: submit(job)), self)

    async def submit_many(
        self, jobs: Iterable[Job | Mapping[str, Any]], *, retry_failed: bool = False
    ) -> builtins.list[AsyncJobHandle]:
        """See `GradcamClient.submit_many`."""
        submit = functools.partial(self.client.submit_many, jobs, retry_failed=retry_failed)
        return [AsyncJobHandle(job_id, self) for job_id in await self._call(submit)]

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
        submit: Callable[..., str] = self.client.upload_and_submit
        call = functools.partial(submit, image, to=to, retry_failed=retry_failed, **fields)
        return AsyncJobHandle(await self._call(call), self)

    def job(self, job_id: str) -> AsyncJobHandle:
        """See `GradcamClient.job`. It needs no server, and so is not awaited."""
        return AsyncJobHandle(job_id, self)

    async def list(self, **conditions: Unpack[ListConditions]) -> AsyncGenerator[StatusDocument, None]:
        """See `GradcamClient.list`."""
        query = JobQuery.parse(**conditions, limit=MAX_PAGE)
        while True:
            page = await self.list_page(query)
            for document in page.jobs:
                yield document
            if page.cursor is None:
                return
            query = query.model_copy(update={"cursor": page.cursor})

    async def close(self) -> None:
        """See `GradcamClient.close`; the threads end after the calls that run."""
        await self._call(self.client.close)
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
        loop, woken, waiter = asyncio.get_running_loop(), asyncio.Event(), self.client.waiter
        wake = functools.partial(loop.call_soon_threadsafe, woken.set)
        subscription = Subscription(job_id, wake, timeout_s)
        subscription.notify(await self._call(functools.partial(waiter.read, subscription.job_id)))
        try:
            with closing(waiter.follow(subscription)) as steps:
                for step in steps:
                    if isinstance(step, StatusDocument):
                        yield step
                    else:
                        with suppress(TimeoutError):
                            async with asyncio.timeout(step):
                                await woken.wait()
                        woken.clear()
        except WaitTimeout as late:
            raise await self._call(functools.partial(waiter.with_cause, late)) from None

    async def _call(self, method: Callable[[], R]) -> R:
        """Call a method in a thread, in the caller's context."""
        pid = os.getpid()
        if pid not in self._threads:
            self._threads = {pid: ThreadPoolExecutor(CALLS_AT_ONCE, "gradcam-client")}
        in_context = contextvars.copy_context().run
        call = functools.partial(in_context, call_after_wait, time.monotonic(), method)
        return await asyncio.get_running_loop().run_in_executor(self._threads[pid], call)

    async def __aenter__(self) -> Self:
        """Nothing is connected yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """See `close`."""
        await self.close()
