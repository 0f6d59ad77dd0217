"""GPU-backed Celery workers that explain image classifiers with Grad-CAM.

>>> from gradcam_worker import GradcamClient, AsyncGradcamClient, Job  # for web apps and scripts
>>> from gradcam_worker.gradcam import explain_image, load_network  # for notebooks: no queue

Importing the package is fast: each of these three names is imported when it is first used.
"""

from typing import TYPE_CHECKING

from gradcam_worker.lazy_imports import lazy_imports

if TYPE_CHECKING:
    from gradcam_worker.client.async_client import AsyncGradcamClient as AsyncGradcamClient
    from gradcam_worker.client.client import GradcamClient as GradcamClient
    from gradcam_worker.schemas.job import Job as Job

__version__ = "0.1.0"
__all__ = ["AsyncGradcamClient", "GradcamClient", "Job", "__version__"]

if not TYPE_CHECKING:  # otherwise type checkers would accept any misspelt name
    __getattr__, __dir__ = lazy_imports(
        __name__,
        {
            "AsyncGradcamClient": "gradcam_worker.client.async_client",
            "GradcamClient": "gradcam_worker.client.client",
            "Job": "gradcam_worker.schemas.job",
        },
    )
