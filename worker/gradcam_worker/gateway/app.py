"""The app of the HTTP API."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from gradcam_worker import __version__
from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.gateway import health, jobs, problems
from gradcam_worker.gateway.access import Access
from gradcam_worker.gateway.context import Gateway
from gradcam_worker.settings import Settings


def create_app(
    settings: Settings, *, client: AsyncGradcamClient | None = None, access: Access | None = None
) -> FastAPI:
    """Make the app of the HTTP API. Nothing is connected yet.

    Args:
        settings: Those of a client.
        client: Stands in for one of these settings.
        access: Who may do what; default: whoever reaches the app may do everything.

    Returns:
        The app, for an ASGI server.
    """
    used = client or AsyncGradcamClient(settings=settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await used.close()

    app = FastAPI(
        title="gradcam-worker", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.gateway = Gateway(settings, used, access or Access())
    problems.add_handlers(app)
    for module in (health, jobs):
        app.include_router(module.router)
    return app
