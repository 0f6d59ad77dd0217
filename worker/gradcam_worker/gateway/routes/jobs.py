"""The routes of jobs: submit, read, cancel, retry."""

import asyncio
import hashlib
import re
from contextlib import AsyncExitStack, suppress
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response

from gradcam_worker.client import results
from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.client.job_fields import without_short_forms
from gradcam_worker.errors import GradcamError, InvalidRequest, UnsupportedMediaType, WaitTimeout
from gradcam_worker.gateway.access.caller import Caller
from gradcam_worker.gateway.context import Gateway, GatewayOf, JobIdOf, Reader, Submitter
from gradcam_worker.gateway.http import bodies
from gradcam_worker.gateway.http.answers import JSON, NOT_KEPT, is_held, json_answer
from gradcam_worker.gateway.http.problems import pointer
from gradcam_worker.gateway.routes.artifacts import artifacts_json
from gradcam_worker.gateway.routes.uploads import check_size, uploads_root
from gradcam_worker.schemas.job import Job, describe_missing_scheme, describe_wrong_webhook
from gradcam_worker.schemas.listing import MAX_PAGE, JobQuery
from gradcam_worker.schemas.model import EXAMPLES
from gradcam_worker.schemas.status import Status, StatusDocument

MAX_WAIT_S = 120.0  # of `Prefer: wait`; proxies often end a request after 60 s
MAX_KEY_LENGTH = 256
FORM = "multipart/form-data"
TEXT_FIELDS = {"network", "priority", "output", "idempotency_key"}  # of a form, as in a job
JSON_FIELDS = {"target", "method", "artifacts", "metrics", "inputs", "annotations", "webhooks", "metadata"}

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.post("", operation_id="submit_job", status_code=HTTPStatus.ACCEPTED)
async def submit(
    request: Request,
    gateway: GatewayOf,
    caller: Submitter,
    prefer: Annotated[
        str | None, Header(description="`wait=20`: answer when the job is final, or after 20 s.")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="Your own name for the job: sent twice, it is one job.", max_length=MAX_KEY_LENGTH + 2
        ),
    ] = None,
) -> Response:
    """Submit a job: as JSON, or as a form with the image itself.

    Answers 202 with the job's place in `Location`; with `Prefer: wait=20` it waits, and answers 200 once the
    job is final, with a URL of each artifact that is valid for an hour. The fields of a form are `image` (the
    file), those of a job, `top_n` and `classes`.
    """
    job = await _receive(request, gateway, caller, idempotency_key)
    client = gateway.client_of(caller)
    wait_s = requested_wait_s(prefer)
    async with AsyncExitStack() as held:
        if wait_s:  # it is counted before the job is accepted
            await held.enter_async_context(gateway.access.stream(caller))
            await held.enter_async_context(gateway.open_requests.hold())
        document = await client.calls.enter(job)
        if wait_s and not document.final:
            request.state.waited = True
            closing = gateway.open_requests.closing
            document = await _wait(client, request, document, wait_s, closing)
    status = HTTPStatus.OK if wait_s and document.final else HTTPStatus.ACCEPTED
    response = await job_response(gateway, caller, document, status, with_urls=bool(wait_s))
    response.headers["Location"] = f"/v1/jobs/{document.id}"
    if wait_s:
        response.headers["Preference-Applied"] = f"wait={wait_s:g}"
    return response


@router.get("", operation_id="list_jobs")
async def list_jobs(
    gateway: GatewayOf,
    caller: Reader,
    status: Annotated[Status | None, Query(description="Only jobs in this state.")] = None,
    network: Annotated[str | None, Query(description="Only jobs for this network.")] = None,
    label: Annotated[
        str | None, Query(description="Only jobs with this entry in their metadata, as `customer=42`.")
    ] = None,
    created_after: Annotated[
        str | None,
        Query(
            description="Only jobs created later, in RFC 3339 with a zone.",
            json_schema_extra={"format": "date-time"},
        ),
    ] = None,
    cursor: Annotated[str | None, Query(description="The cursor of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="The most jobs of one page.")] = 50,
) -> Response:
    """List jobs, newest first, in pages.

    A page may have fewer jobs than asked for, even none, and a cursor: there is more as long as there is one.
    """
    query = JobQuery.parse(
        status=status,
        network=network,
        label=label,
        created_after=created_after,
        cursor=cursor,
        limit=limit,
    )
    page = await gateway.client_of(caller).list_page(query)
    shown = page.model_copy(update={"jobs": tuple(map(caller.visible, page.jobs))})
    return json_answer(shown)


@router.get("/{job_id}", operation_id="read_job")
async def read(
    gateway: GatewayOf,
    caller: Reader,
    job_id: JobIdOf,
    if_none_match: Annotated[str | None, Header(description="The ETag of a final document.")] = None,
) -> Response:
    """Read a job: its status document, and the artifacts of one that succeeded.

    A final document has an ETag; 304 where it is the one of `If-None-Match`.
    """
    document = await gateway.client_of(caller).status(job_id)
    response = await job_response(gateway, caller, document)
    etag = response.headers.get("etag")
    if etag and is_held(etag, if_none_match):
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"ETag": etag, "Cache-Control": CACHED})
    return response


@router.post("/{job_id}/cancel", operation_id="cancel_job")
async def cancel(gateway: GatewayOf, caller: Submitter, job_id: JobIdOf) -> Response:
    """Stop a job: one that waits at once, a running one as soon as its worker sees it. A final one stays."""
    return await job_response(gateway, caller, await gateway.client_of(caller).cancel(job_id))


@router.post("/{job_id}/retry", operation_id="retry_job")
async def retry(gateway: GatewayOf, caller: Submitter, job_id: JobIdOf) -> Response:
    """Try a failed job again, under its id. One that waits or runs is left as it is."""
    client = gateway.client_of(caller)
    if (await client.status(job_id)).status == "failed":
        await gateway.access.admit_jobs(caller)
    return await job_response(gateway, caller, await client.retry(job_id))


CACHED = "private, no-cache"  # kept, and asked for again each time


async def job_response(
    gateway: Gateway,
    caller: Caller,
    document: StatusDocument,
    status: HTTPStatus = HTTPStatus.OK,
    *,
    with_urls: bool = False,
) -> Response:
    """The answer with a job's document, and the artifacts of one that succeeded.

    One with a final document has an ETag, unless its artifacts could not be read.
    """
    body = caller.visible(document).model_dump_json().encode()
    artifacts = await artifacts_json(gateway, caller, document, with_urls=with_urls)
    if artifacts is not None:
        body = body[:-1] + b',"artifacts":' + artifacts + b"}"
    headers = dict(NOT_KEPT)
    if document.final and not with_urls and (artifacts is not None or document.status != "succeeded"):
        etag = hashlib.blake2b(body, digest_size=12).hexdigest()
        headers = {"Cache-Control": CACHED, "ETag": f'W/"{etag}"'}
    return Response(body, status.value, headers, JSON)


def requested_wait_s(prefer: str | None) -> float:
    """The seconds of `Prefer: wait=20` (RFC 7240); 0 without it. What cannot be read is no preference."""
    found = re.search(r"(?:^|[,;])\s*wait\s*=\s*\"?([0-9]{1,6})\"?\s*(?:$|[,;])", prefer or "", re.IGNORECASE)
    return min(float(found[1]), MAX_WAIT_S) if found else 0


async def _receive(request: Request, gateway: Gateway, caller: Caller, idempotency_key: str | None) -> Job:
    """Read a job, check and count it, and store its image: none is in memory afterwards."""
    bodies.require_media_type(request, JSON, FORM)
    if len(request.headers.getlist("idempotency-key")) > 1:
        detail = "it is there more than once"
        raise InvalidRequest.at(detail, header="Idempotency-Key")
    async with AsyncExitStack() as received:
        fields: object
        upload = None
        if bodies.media_type_of(request) == FORM:
            await received.enter_async_context(gateway.forms.hold())
            reading = bodies.read_form(request, gateway.settings.max_image_bytes)
            form = await received.enter_async_context(reading)
            await received.enter_async_context(gateway.objects.images)
            fields, upload = await _read_form(form, gateway, caller)
        else:
            fields = bodies.parse_json(await bodies.read_body(request, gateway.settings.max_message_bytes))
        job = caller.check_job(_with_key(_checked(Job.parse(without_short_forms(fields))), idempotency_key))
        await gateway.access.admit_jobs(caller, 1, job.idempotency_key)
        if upload:
            await gateway.objects.put(upload.uri, upload.data, upload.media_type)
    return job


async def _read_form(
    form: FormData, gateway: Gateway, caller: Caller
) -> tuple[dict[str, Any], results.Upload]:
    """The fields of a job that a form holds, and its image."""
    image = form.get("image")
    if not isinstance(image, UploadFile):
        detail = "a form needs the field image, with a file; an image with an address is submitted as JSON"
        raise InvalidRequest.at(detail, pointer="#/image")
    check_size(image.size or 0, gateway, "image")
    root = uploads_root(caller)
    data = await image.read()
    if not any(data.startswith(start) for start in results.FORMATS):
        message = "The field image is none of JPEG, PNG, WebP, GIF and BMP."
        raise UnsupportedMediaType(message)
    max_bytes = gateway.settings.max_image_bytes
    upload = await gateway.objects.call(partial(results.prepare_upload, data, root, max_bytes))
    fields: dict[str, Any] = {"image": {"uri": upload.uri, "sha256": upload.sha256}}
    for name in {*form.keys()} - {"image"}:
        values = [str(value) for value in form.getlist(name)]
        if name in {"classes", "against"}:
            fields[name] = _list_value(name, values)
        elif len(values) > 1:
            detail = "a form names this field once"
            raise InvalidRequest.at(detail, pointer=pointer((name,)))
        else:
            fields[name] = values[0] if name in TEXT_FIELDS else _json_value(name, values[0])
    return fields, upload


def _json_value(name: str, text: str) -> Any:
    """The value of a form's field, as JSON; a text that is no JSON stands for itself."""
    try:
        return bodies.parse_json(text.encode())
    except InvalidRequest as error:
        if name not in JSON_FIELDS:
            return text
        example = f", as in {EXAMPLES[name]}" if name in EXAMPLES else ""
        detail = f"this field of a form is JSON{example} (received {text[:60]!r})"
        raise InvalidRequest.at(detail, pointer=pointer((name,))) from error


def _list_value(name: str, values: list[str]) -> list[str | int]:
    """The entries of a form's list: one or several with commas in each field, or JSON."""
    entries: list[str | int] = []
    for value in values:
        if not value.lstrip().startswith("["):
            entries += value.split(",")
            continue
        found = _json_value(name, value)
        if not isinstance(found, list):
            detail = f"a list is written as tabby,285 or as JSON (received {value[:60]!r})"
            raise InvalidRequest.at(detail, pointer=pointer((name,)))
        entries += found
    return entries


def _checked(job: Job) -> Job:
    """Refuse an image without a scheme, and a webhook that is no web address: no worker would find them."""
    if why := describe_missing_scheme(job.image.uri):
        raise InvalidRequest.at(why.partition(";")[0], pointer="#/image")
    for index, hook in enumerate(job.webhooks):
        if why := describe_wrong_webhook(hook.url):
            raise InvalidRequest.at(why, pointer=pointer(("webhooks", index, "url")))
    return job


def _with_key(job: Job, header: str | None) -> Job:
    """The job with the idempotency key of the request's header."""
    if header is None:
        return job
    key = header.strip().removeprefix('"').removesuffix('"')
    if not 1 <= len(key) <= MAX_KEY_LENGTH or job.idempotency_key not in {None, key}:
        detail = f"it must have 1 to {MAX_KEY_LENGTH} characters, and be that of the job if it names one"
        raise InvalidRequest.at(detail, header="Idempotency-Key")
    return job.model_copy(update={"idempotency_key": key})


async def _wait(
    client: AsyncGradcamClient,
    request: Request,
    document: StatusDocument,
    wait_s: float,
    closing: asyncio.Event,
) -> StatusDocument:
    """The job's document when it is final, when time is up, or when the caller goes or the server stops.

    Where the ledger cannot be reached meanwhile, it is the one before: the job is accepted.
    """
    waiting = asyncio.ensure_future(client.wait(document.id, wait_s))
    others = [asyncio.ensure_future(_disconnect(request)), asyncio.ensure_future(closing.wait())]
    try:
        await asyncio.wait({waiting, *others}, return_when=asyncio.FIRST_COMPLETED)
        with suppress(GradcamError):
            if waiting.done():
                with suppress(WaitTimeout):
                    return waiting.result()
            return await client.status(document.id)
        return document
    finally:
        for task in (waiting, *others):
            task.cancel()
        await asyncio.gather(waiting, *others, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
