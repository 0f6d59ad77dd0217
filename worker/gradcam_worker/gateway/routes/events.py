"""The events of a job as server-sent events: one for each new status document, the final one last.

The id of an event is the document's revision. A browser that connects again sends it as `Last-Event-ID`, and
gets what is newer; after the final document it gets 204, which ends a stock EventSource.
"""

import asyncio
import re
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.errors import GradcamError
from gradcam_worker.gateway.access.caller import Caller
from gradcam_worker.gateway.context import GatewayOf, JobIdOf, Reader
from gradcam_worker.gateway.http.problems import problem_response
from gradcam_worker.schemas.status import StatusDocument

REVISION = re.compile("[0-9]{1,15}")
HEARTBEAT_S = 15.0  # proxies end a response that is silent for 30 to 60 s
MAX_STREAM_S = 1800.0  # then the caller connects again, and its key is checked again
RETRY_MS = 2000  # before an EventSource connects again
PADDING = b":" + b" " * 2048 + b"\n"  # some proxies and browsers hold back the first bytes of a response
HEADERS = {
    "Cache-Control": "no-store, no-transform",  # what compresses must collect
    "X-Accel-Buffering": "no",  # nginx passes each event on at once
}

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
Until = Literal["final", "event"]


class EventStream(StreamingResponse):
    """A response that holds something until its stream has ended, or its caller has gone."""

    def __init__(self, events: AsyncGenerator[bytes, None], held: AsyncExitStack) -> None:
        """`held` is closed at the end."""
        super().__init__(events, headers=HEADERS, media_type="text/event-stream")
        self._events, self._held = events, held

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        async with self._held, aclosing(self._events):
            await super().__call__(scope, receive, send)


@router.get("/{job_id}/events", operation_id="job_events")
async def events(
    gateway: GatewayOf,
    caller: Reader,
    job_id: JobIdOf,
    last_event_id: Annotated[str | None, Header(description="The id of the last event received.")] = None,
    until: Annotated[
        Until,
        Query(
            description="`event`: the response ends after one event, or after 15 s without one, for proxies "
            "that hold back a response until it ends; an EventSource connects again by itself."
        ),
    ] = "final",
) -> Response:
    """Follow a job: a server-sent event `status` for each new status document, the final one last.

    An event's id is the document's revision. With `Last-Event-ID` only newer ones are sent; 204: there will
    be none. A comment is sent every 15 s. If something fails, an event `problem` is the last.
    """
    client = gateway.client_of(caller)
    seen = int(last_event_id) if last_event_id and REVISION.fullmatch(last_event_id) else -1
    document = await client.status(job_id)
    if document.final and document.revision == seen:
        return Response(status_code=HTTPStatus.NO_CONTENT)
    async with AsyncExitStack() as entered:
        await entered.enter_async_context(gateway.access.stream(caller))
        await entered.enter_async_context(gateway.open_requests.hold())
        held = entered.pop_all()
    closing = gateway.open_requests.closing
    return EventStream(_stream(client, caller, job_id, seen, until, closing), held)


async def _stream(
    client: AsyncGradcamClient, caller: Caller, job_id: str, seen: int, until: Until, closing: asyncio.Event
) -> AsyncGenerator[bytes, None]:
    yield PADDING + b"retry: %d\n\n" % (RETRY_MS if until == "final" else RETRY_MS // 10)
    end = time.monotonic() + MAX_STREAM_S
    async with aclosing(client.stream(job_id)) as documents:
        closed = asyncio.ensure_future(closing.wait())
        following = asyncio.ensure_future(anext(documents))
        try:
            while time.monotonic() < end and not closing.is_set():
                await asyncio.wait({following, closed}, timeout=HEARTBEAT_S, return_when=FIRST_COMPLETED)
                if not following.done():
                    yield b": heartbeat\n\n"
                    if until == "event":
                        return
                    continue
                document = following.result()
                if document.revision > seen or (document.final and document.revision != seen):
                    yield _event(caller.visible(document))
                    if until == "event":
                        return
                if document.final:
                    return
                following = asyncio.ensure_future(anext(documents))
        except GradcamError as error:
            yield b"event: problem\ndata: " + bytes(problem_response(error).body) + b"\n\n"
        finally:
            for task in (following, closed):
                task.cancel()
            await asyncio.gather(following, closed, return_exceptions=True)


def _event(document: StatusDocument) -> bytes:
    return f"event: status\nid: {document.revision}\ndata: {document.model_dump_json()}\n\n".encode()
