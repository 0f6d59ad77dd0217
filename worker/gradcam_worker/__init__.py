"""GPU-backed Celery workers that explain image classifiers with Grad-CAM.

>>> from gradcam_worker import GradcamClient, AsyncGradcamClient, Job  # for web apps and scripts
>>> from gradcam_worker.gradcam import explain_image, load_network  # for notebooks: no queue

Importing this package costs nothing: the three names are imported when they are asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcam_worker.client.async_client import AsyncGradcamClient as AsyncGradcamClient
    from gradcam_worker.client.client import GradcamClient as GradcamClient
    from gradcam_worker.schemas.job import Job as Job

__version__ = "0.1.0"
__all__ = ["AsyncGradcamClient", "GradcamClient", "Job", "__version__"]

_MODULES = {
    "AsyncGradcamClient": "gradcam_worker.client.async_client",
    "GradcamClient": "gradcam_worker.client.client",
    "Job": "gradcam_worker.schemas.job",
}


if not TYPE_CHECKING:  # or a misspelt name would be of any type

    def __getattr__(name: str) -> Any:
        """Import a public name when it is first asked for."""
        from importlib import import_module

        if name not in _MODULES:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """What there is to import, also before it is imported."""
    return sorted({*globals(), *_MODULES})
