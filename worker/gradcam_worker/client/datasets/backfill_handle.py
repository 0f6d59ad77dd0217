"""A submitted backfill: its output, with the client's calls for it."""

from typing import TYPE_CHECKING

from gradcam_worker.client.datasets.backfills import BackfillStatus, Cancellation
from gradcam_worker.client.job_handle import Handle

if TYPE_CHECKING:
    from gradcam_worker.client.async_client import AsyncGradcamClient
    from gradcam_worker.client.client import GradcamClient


class BackfillHandle(Handle):
    """The output of a backfill, with the calls of `GradcamClient` for it. It is a `str`, as `JobHandle` is.

    Examples:
        >>> backfill = client.submit_backfill("s3://photos/", "s3://results/a", network="vgg16", top_n=3)
        >>> backfill.wait().state
        'complete'
        >>> client.backfill("s3://results/a").status().rows  # in another process, from the output
    """

    __slots__ = ()
    _client: "GradcamClient"

    def status(self) -> BackfillStatus:
        """See `GradcamClient.backfill_status`."""
        return self._client.backfill_status(self)

    def wait(self, timeout_s: float | None = None) -> BackfillStatus:
        """See `GradcamClient.wait_for_backfill`."""
        return self._client.wait_for_backfill(self, timeout_s)

    def cancel(self) -> Cancellation:
        """See `GradcamClient.cancel_backfill`."""
        return self._client.cancel_backfill(self)


class AsyncBackfillHandle(Handle):
    """The output of a backfill, with the calls of `AsyncGradcamClient` for it: see `BackfillHandle`."""

    __slots__ = ()
    _client: "AsyncGradcamClient"

    async def status(self) -> BackfillStatus:
        """See `GradcamClient.backfill_status`."""
        return await self._client.backfill_status(self)

    async def wait(self, timeout_s: float | None = None) -> BackfillStatus:
        """See `GradcamClient.wait_for_backfill`."""
        return await self._client.wait_for_backfill(self, timeout_s)

    async def cancel(self) -> Cancellation:
        """See `GradcamClient.cancel_backfill`."""
        return await self._client.cancel_backfill(self)
