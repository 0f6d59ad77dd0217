"""Where did the network look? A page for a photo. Copy it, with fastapi_page.html beside it.

    pip install 'gradcam-worker[s3]' 'fastapi>=0.135' uvicorn
    uvicorn --app-dir docs/examples --timeout-graceful-shutdown 5 fastapi_app:app

In its environment: what `gradcam worker` has there, and GRADCAM_UPLOADS=s3://bucket/prefix. Photos are stored
below `page/` of that, and no visitor can have anything else read. PAGE_IMAGES=s3://bucket/public,... lists
what visitors may name by its address; without it the page has no field for addresses. The browser gets the
pictures straight from the bucket, by addresses that are good for an hour. Put your login before it.
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from secrets import token_urlsafe

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.client.results import is_below
from gradcam_worker.errors import GradcamError, PermanentError, UriNotAllowed

LARGEST = 16_000_000  # bytes of a photo; the page says so, too
UPLOADS = os.environ.get("GRADCAM_UPLOADS", "").rstrip("/") + "/page"
IMAGES = [place for place in os.environ.get("PAGE_IMAGES", "").split(",") if place]
PHOTO = {"kind": "overlay", "format": "webp", "alpha": 0.0, "max_edge": 1280}  # as browsers can show it
HEAT = PHOTO | {"format": "jpeg", "alpha": 1.0, "colormap": "viridis"}  # the page lays it over the photo
ASKED = {"network": "efficientnet_lite0", "top_n": 3, "artifacts": [PHOTO, HEAT]}
NO_WORKER = "No worker runs just now. The photo is kept, and explained as soon as one does."
PAGE = Path(__file__).with_name("fastapi_page.html").read_text(encoding="utf-8")
POLICY = "default-src 'none'; connect-src 'self'; img-src http: https: data:"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for all requests, closed with the app."""
    async with AsyncGradcamClient() as app.state.client:
        yield


log = logging.getLogger("uvicorn.error")
app = FastAPI(lifespan=lifespan, openapi_url=None)


@app.put("/jobs/{key}")
async def submit(request: Request, key: str, uri: str = "") -> JSONResponse:
    """The body is the photo, or `uri` says where it is. With the same `key` it is the same job."""
    client, asked = app.state.client, {**ASKED, "idempotency_key": f"page {key}"}
    if uri and not any(is_below(uri, place) for place in IMAGES):
        raise UriNotAllowed(uri)
    if uri:
        return JSONResponse({"id": await client.submit(image=uri, **asked)}, 202)
    if int(request.headers.get("content-length", LARGEST + 1)) > LARGEST:
        return JSONResponse({"detail": "A photo may have 16 MB; this one has more."}, 413)
    photo = await request.body()
    return JSONResponse({"id": await client.upload_and_submit(photo, to=UPLOADS, **asked)}, 202)


@app.get("/jobs/{job_id}", response_class=EventSourceResponse)
async def follow(job_id: str) -> AsyncIterator[ServerSentEvent]:
    """What becomes of a job, as it happens; until it is final, or the browser has gone."""
    client = app.state.client
    try:
        async for document in client.stream(job_id):
            yield ServerSentEvent(event="progress", data=document.stage or document.status)
            if document.status == "queued" and not await client.workers():
                yield ServerSentEvent(event="note", data=NO_WORKER)
        if document.error:
            yield ServerSentEvent(event="problem", data=document.error.public_message)
            return
        seen = await client.result(job_id)
        classes = [
            {"name": one.class_.name, "p": one.probability}
            | {picture.media_type: seen.urls[picture.uri] for picture in one.artifacts}
            for one in seen.manifest.explanations
        ]
        yield ServerSentEvent(event="result", data=classes)
    except GradcamError as error:
        yield ServerSentEvent(event="problem", data=error.public_message)
        log.warning("job %r: %r", job_id, error)


@app.delete("/jobs/{job_id}")
async def cancel(job_id: str) -> JSONResponse:
    """The visitor does not want it any more; the stream tells when it has stopped."""
    return JSONResponse({"status": (await app.state.client.cancel(job_id)).status})


@app.exception_handler(GradcamError)
async def refuse(_: Request, error: GradcamError) -> JSONResponse:
    """A job that was not taken: why is for the log; the visitor hears what he can do."""
    log.warning("%r", error)
    return JSONResponse({"detail": error.public_message}, 422 if isinstance(error, PermanentError) else 503)


@app.get("/")
async def page() -> HTMLResponse:
    """The page, in which nothing runs but what stands in it."""
    nonce = token_urlsafe()
    policy = f"{POLICY}; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'"
    text = PAGE.replace("NONCE", nonce).replace("ADDRESSES", "" if IMAGES else "hidden")
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})
