"""The routes of jobs: submit, read, cancel, retry."""

import asyncio
import hashlib
import re
from contextlib import suppress
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header, Request
from starlette.responses import Response

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.errors import InvalidJob, InvalidRequest, UnsupportedRequestType, WaitTimeout
from gradcam_worker.gateway.access import Caller
from gradcam_worker.gateway.bodies import read_body
from gradcam_worker.gateway.context import CallerWith, GatewayOf
from gradcam_worker.schemas import strict_json
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument

MAX_WAIT_S = 120.0  # of `Prefer: wait`; proxies often end a request after 60 s
MAX_KEY_LENGTH = 256

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
Reader = Annotated[Caller, CallerWith("read")]
Submitter = Annotated[Caller, CallerWith("submit")]


@router.post("", status_code=HTTPStatus.ACCEPTED)
async def submit(
    request: Request,
    gateway: GatewayOf,
    caller: Submitter,
    prefer: Annotated[str | None, Header()] = None,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """Submit a job."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"The media type is {media_type!r}; it must be application/json."
        raise UnsupportedRequestType(message)
    body = await read_body(request, gateway.settings.max_message_bytes)
    job = caller.check_job(_with_key(_parse(body), idempotency_key))
    await gateway.access.admit(caller, jobs=1)
    client = gateway.client_of(caller)
    job_id = await client.submit(job)
    wait_s = requested_wait_s(prefer)
    document = await _wait(client, request, job_id, wait_s) if wait_s else await client.status(job_id)
    response = job_response(document, HTTPStatus.OK if document.final else HTTPStatus.ACCEPTED)
    response.headers["Location"] = f"/v1/jobs/{job_id}"
    if wait_s:
        response.headers["Preference-Applied"] = f"wait={wait_s:g}"
    return response


@router.get("/{job_id}")
async def read(gateway: GatewayOf, caller: Reader, job_id: str) -> Response:
    """Read the status document of a job."""
    return job_response(await gateway.client_of(caller).status(job_id))


@router.post("/{job_id}/cancel")
async def cancel(gateway: GatewayOf, caller: Submitter, job_id: str) -> Response:
    """Stop a job. A final one stays as it is."""
    return job_response(await gateway.client_of(caller).cancel(job_id))


@router.post("/{job_id}/retry")
async def retry(gateway: GatewayOf, caller: Submitter, job_id: str) -> Response:
    """Try a failed job again, under its id."""
    return job_response(await gateway.client_of(caller).retry(job_id))


def job_response(document: StatusDocument, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """The answer with a status document; one with a final document has an ETag."""
    body = document.model_dump_json().encode()
    headers = {"Cache-Control": "no-store"}
    if document.final:
        etag = hashlib.blake2b(body, digest_size=12).hexdigest()
        headers = {"Cache-Control": "private, no-cache", "ETag": f'W/"{etag}"'}
    return Response(body, status.value, headers, "application/json")


def requested_wait_s(prefer: str | None) -> float:
    """The seconds of `Prefer: wait=20` (RFC 7240); 0 without it. What cannot be read is no preference."""
    found = re.search(r"(?:^|[,;])\s*wait\s*=\s*\"?([0-9]{1,6})\"?\s*(?:$|[,;])", prefer or "", re.IGNORECASE)
    return min(float(found[1]), MAX_WAIT_S) if found else 0


def _parse(body: bytes) -> Job:
    try:
        return Job.parse(strict_json.loads(body, "the body"))
    except strict_json.Unreadable as error:
        message = f"This is not a job: {error}."
        raise InvalidJob(message) from error


def _with_key(job: Job, header: str | None) -> Job:
    """The job with the idempotency key of the request's header."""
    if header is None:
        return job
    key = header.strip().removeprefix('"').removesuffix('"')
    if not 1 <= len(key) <= MAX_KEY_LENGTH or job.idempotency_key not in {None, key}:
        detail = f"it must have 1 to {MAX_KEY_LENGTH} characters, and be that of the job if it names one"
        message = f"Idempotency-Key: {detail}."
        raise InvalidRequest(message, [{"header": "Idempotency-Key", "detail": detail}])
    return job.model_copy(update={"idempotency_key": key})


async def _wait(client: AsyncGradcamClient, request: Request, job_id: str, wait_s: float) -> StatusDocument:
    """The job's document when it is final, when time is up, or when the caller has gone."""
    waiting = asyncio.ensure_future(client.wait(job_id, wait_s))
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            with suppress(WaitTimeout):
                return waiting.result()
        return await client.status(job_id)
    finally:
        for task in (waiting, gone):
            task.cancel()
        await asyncio.gather(waiting, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
