"""The app of the HTTP API."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware

from gradcam_worker import __version__
from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.client.results import SettingsObjects
from gradcam_worker.gateway import openapi
from gradcam_worker.gateway.access.caller import Access
from gradcam_worker.gateway.context import Gateway
from gradcam_worker.gateway.http import problems
from gradcam_worker.gateway.http.middleware import Edge
from gradcam_worker.gateway.objects import GatewayObjects, UploadObjects
from gradcam_worker.gateway.open_requests import OpenRequests
from gradcam_worker.gateway.routes import artifacts, backfills, events, health, jobs, uploads, workers
from gradcam_worker.gateway.routes import page as page_routes
from gradcam_worker.settings import Settings

MIN_GZIP_BYTES = 1024
CORS_MAX_AGE_S = 600
REQUEST_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-None-Match",
    "Last-Event-ID",
    "Prefer",
)
RESPONSE_HEADERS = ("ETag", "Location", "Preference-Applied", "Retry-After")


def create_app(
    settings: Settings,
    *,
    client: AsyncGradcamClient | None = None,
    access: Access | None = None,
    objects: UploadObjects | None = None,
) -> FastAPI:
    """Make the app of the HTTP API. Nothing is connected yet.

    Args:
        settings: Those of a client.
        client: Stands in for one of these settings.
        access: Who may do what; default: whoever has an API key.
        objects: Stands in for S3.

    Returns:
        The app, for an ASGI server.
    """
    gateway = Gateway(
        settings,
        client or AsyncGradcamClient(settings=settings),
        access or Access(settings),
        GatewayObjects(objects or SettingsObjects(settings)),
        OpenRequests(settings.serve_open_requests),
    )
    gateway.metrics.set_gauge("http_open_requests", lambda: gateway.open_requests.count)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await gateway.client.close()
        gateway.objects.close()
        gateway.backfills.close()
        await gateway.access.close()

    app = FastAPI(
        title="gradcam-worker",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it names the scheme and host of the request, which a proxy has changed
    )
    app.state.gateway = gateway
    modules = (jobs, events, artifacts, uploads, workers, backfills, health, page_routes)
    routers = [module.router for module in modules]
    problems.add_handlers(app, routers)
    for router in routers:
        app.include_router(router)
    app.openapi = lambda: openapi.build(app)  # type: ignore[method-assign]  # as FastAPI's documentation says
    app.add_middleware(GZipMiddleware, minimum_size=MIN_GZIP_BYTES, compresslevel=artifacts.GZIP_LEVEL)
    if settings.serve_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.serve_origins,
            allow_methods=("GET", "POST"),
            allow_headers=REQUEST_HEADERS,
            expose_headers=RESPONSE_HEADERS,
            max_age=CORS_MAX_AGE_S,
        )
    app.add_middleware(Edge, metrics=gateway.metrics)
    return app
