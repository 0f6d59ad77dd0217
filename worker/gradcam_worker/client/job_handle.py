"""A submitted job: its id, with the client's calls for it."""

from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any, Self

from gradcam_worker.client.results import Result
from gradcam_worker.schemas.status import StatusDocument

if TYPE_CHECKING:
    from gradcam_worker.client.async_client import AsyncGradcamClient
    from gradcam_worker.client.client import GradcamClient


class Handle(str):
    """A text that knows its client. Copied it is itself, pickled it is a plain text."""

    __slots__ = ("_client",)
    _client: Any

    def __new__(cls, job_id: object, client: Any) -> Self:
        """The text of `job_id`, or of an output, which knows `client`."""
        handle = super().__new__(cls, job_id)
        handle._client = client
        return handle

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """A client has connections, which do not travel: `client.job` and `backfill` make a handle again."""
        return str, (str(self),)

    @property
    def id(self) -> str:
        """What it stands for, the id of a job or the output of a backfill, as a plain `str`."""
        return str(self)


class JobHandle(Handle):
    """A job's id, with the calls of `GradcamClient` for this job.

    It is a `str`: it can be stored, compared, put into URLs and JSON, and given to every call that takes an
    id. Pickled, it becomes a plain `str`.

    Examples:
        >>> job = client.submit(image="s3://in/pier.jpg", network="vgg16", top_n=5)
        >>> job.wait().status
        'succeeded'
        >>> job.result().overlays[0].url
        >>> client.job(job.id).status()  # in another process, from the id
    """

    __slots__ = ()
    _client: "GradcamClient"

    def status(self) -> StatusDocument:
        """See `GradcamClient.status`."""
        return self._client.status(self)

    def wait(self, timeout_s: float = 120) -> StatusDocument:
        """See `GradcamClient.wait`."""
        return self._client.wait(self, timeout_s)

    def stream(self, timeout_s: float | None = None) -> Iterator[StatusDocument]:
        """See `GradcamClient.stream`."""
        return self._client.stream(self, timeout_s)

    def cancel(self) -> StatusDocument:
        """See `GradcamClient.cancel`."""
        return self._client.cancel(self)

    def retry(self) -> StatusDocument:
        """See `GradcamClient.retry`."""
        return self._client.retry(self)

    def result(self, *, expires_s: int = 3600) -> Result:
        """See `GradcamClient.result`."""
        return self._client.result(self, expires_s=expires_s)


class AsyncJobHandle(Handle):
    """A job's id, with the calls of `AsyncGradcamClient` for this job: see `JobHandle`.

    Examples:
        >>> job = await client.submit(image="s3://in/pier.jpg", network="vgg16", top_n=5)
        >>> (await job.wait()).status
        'succeeded'
    """

    __slots__ = ()
    _client: "AsyncGradcamClient"

    async def status(self) -> StatusDocument:
        """See `GradcamClient.status`."""
        return await self._client.status(self)

    async def wait(self, timeout_s: float = 120) -> StatusDocument:
        """See `GradcamClient.wait`."""
        return await self._client.wait(self, timeout_s)

    def stream(self, timeout_s: float | None = None) -> AsyncGenerator[StatusDocument, None]:
        """See `GradcamClient.stream`. To leave the loop early, use `contextlib.aclosing`."""
        return self._client.stream(self, timeout_s)

    async def cancel(self) -> StatusDocument:
        """See `GradcamClient.cancel`."""
        return await self._client.cancel(self)

    async def retry(self) -> StatusDocument:
        """See `GradcamClient.retry`."""
        return await self._client.retry(self)

    async def result(self, *, expires_s: int = 3600) -> Result:
        """See `GradcamClient.result`."""
        return await self._client.result(self, expires_s=expires_s)
