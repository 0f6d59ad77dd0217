"""For web apps and scripts: submit, wait, stream, results; the same names for asyncio.

Begin at `client.GradcamClient`. Nothing here imports TensorFlow or Celery, and numpy only for
`Result.heatmaps`.
"""

from typing import TYPE_CHECKING

from gradcam_worker.lazy_imports import lazy_imports

if TYPE_CHECKING:
    from gradcam_worker.client.async_client import AsyncGradcamClient as AsyncGradcamClient
    from gradcam_worker.client.client import GradcamClient as GradcamClient
    from gradcam_worker.client.datasets.backfill_handle import AsyncBackfillHandle as AsyncBackfillHandle
    from gradcam_worker.client.datasets.backfill_handle import BackfillHandle as BackfillHandle
    from gradcam_worker.client.datasets.backfills import BackfillStatus as BackfillStatus
    from gradcam_worker.client.job_handle import AsyncJobHandle as AsyncJobHandle
    from gradcam_worker.client.job_handle import JobHandle as JobHandle
    from gradcam_worker.client.results import Result as Result
    from gradcam_worker.client.results import ResultFile as ResultFile
    from gradcam_worker.client.webhooks import Webhooks as Webhooks

__all__ = [
    "AsyncBackfillHandle",
    "AsyncGradcamClient",
    "AsyncJobHandle",
    "BackfillHandle",
    "BackfillStatus",
    "GradcamClient",
    "JobHandle",
    "Result",
    "ResultFile",
    "Webhooks",
]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_imports(
        __name__,
        {
            "AsyncBackfillHandle": "gradcam_worker.client.datasets.backfill_handle",
            "AsyncGradcamClient": "gradcam_worker.client.async_client",
            "AsyncJobHandle": "gradcam_worker.client.job_handle",
            "BackfillHandle": "gradcam_worker.client.datasets.backfill_handle",
            "BackfillStatus": "gradcam_worker.client.datasets.backfills",
            "GradcamClient": "gradcam_worker.client.client",
            "JobHandle": "gradcam_worker.client.job_handle",
            "Result": "gradcam_worker.client.results",
            "ResultFile": "gradcam_worker.client.results",
            "Webhooks": "gradcam_worker.client.webhooks",
        },
    )
