"""The client for asyncio: the same names, awaitable. Waiting for a job holds no thread.

>>> async with AsyncGradcamClient("redis://127.0.0.1:6379/0") as client:
...     job_id = await client.submit(image="s3://in/pier.jpg", network="vgg16", target={"top_n": 5})
...     async for document in client.stream(job_id):
...         print(document.status, document.stage)

A short call runs in a thread of the event loop's executor. Cancelling the task that awaits it does not take
it back: a job whose submission was cancelled may have been accepted.
"""

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, closing, suppress
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from worker.client import GradcamClient
from worker.contract import StatusDocument
from worker.settings import Settings
from worker.watch import Listener

P = ParamSpec("P")
R = TypeVar("R")


def _awaitable(
    method: Callable[Concatenate[GradcamClient, P], R],
) -> Callable[Concatenate["AsyncGradcamClient", P], Coroutine[Any, Any, R]]:
    """A method of the client, called in a thread."""

    @functools.wraps(method)
    async def call(self: "AsyncGradcamClient", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.to_thread(method, self.client, *args, **kwargs)

    return call


class AsyncGradcamClient:
    """A `GradcamClient` for event loops: one may serve several, and threads beside them."""

    def __init__(
        self,
        broker_url: str | None = None,
        status_url: str | None = None,
        *,
        settings: Settings | None = None,
        client: GradcamClient | None = None,
    ) -> None:
        """As `GradcamClient`; or a face of a `client` that is there already."""
        self.client = client or GradcamClient(broker_url, status_url, settings=settings)

    submit = _awaitable(GradcamClient.submit)
    submit_many = _awaitable(GradcamClient.submit_many)
    status = _awaitable(GradcamClient.status)
    statuses = _awaitable(GradcamClient.statuses)
    cancel = _awaitable(GradcamClient.cancel)
    retry = _awaitable(GradcamClient.retry)
    result = _awaitable(GradcamClient.result)
    upload_and_submit = _awaitable(GradcamClient.upload_and_submit)
    close = _awaitable(GradcamClient.close)

    def is_upload(self, uri: str, *others: str) -> bool:
        """See `GradcamClient.is_upload`. It asks nobody."""
        return self.client.is_upload(uri, *others)

    async def wait(self, job_id: str, timeout_s: float = 120) -> StatusDocument:
        """See `GradcamClient.wait`."""
        async with aclosing(self.stream(job_id, timeout_s)) as documents:
            return [document async for document in documents][-1]

    async def stream(
        self, job_id: str, timeout_s: float | None = None
    ) -> AsyncGenerator[StatusDocument, None]:
        """See `GradcamClient.stream`. Whoever may leave it early closes it: `contextlib.aclosing`."""
        loop, woken, watcher = asyncio.get_running_loop(), asyncio.Event(), self.client.watcher
        wake = functools.partial(loop.call_soon_threadsafe, woken.set)
        listener = Listener(job_id, wake, timeout_s)
        listener.tell(await asyncio.to_thread(watcher.look, listener.job_id))
        with closing(watcher.follow(listener)) as steps:
            for step in steps:
                if isinstance(step, StatusDocument):
                    yield step
                else:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(step):
                            await woken.wait()
                    woken.clear()

    async def __aenter__(self) -> Self:
        """Nothing is connected yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """See `close`."""
        await self.close()
