"""For web apps and scripts: submit, wait, stream, results; the same names for asyncio.

Begin at `client.GradcamClient`. Nothing here imports numpy, TensorFlow or Celery.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradcam_worker.client.async_client import AsyncGradcamClient as AsyncGradcamClient
    from gradcam_worker.client.client import GradcamClient as GradcamClient
    from gradcam_worker.client.results import Result as Result

__all__ = ["AsyncGradcamClient", "GradcamClient", "Result"]

_MODULES = {
    "AsyncGradcamClient": "gradcam_worker.client.async_client",
    "GradcamClient": "gradcam_worker.client.client",
    "Result": "gradcam_worker.client.results",
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
