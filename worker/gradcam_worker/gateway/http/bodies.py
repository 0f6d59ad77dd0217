"""The body of a request: up to a limit, in time, as strict JSON or as a form."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn, TypeVar

from fastapi import Request
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import Message

from gradcam_worker.errors import InvalidRequest, RequestTooLarge, UnsupportedRequestType
from gradcam_worker.gateway.http.problems import findings_of
from gradcam_worker.schemas import strict_json
from gradcam_worker.schemas.model import RequestModel, describe

READ_TIMEOUT_S = 60.0  # for a whole body: a phone uploads a photo in that time
FORM_FIELDS, FORM_FIELD_BYTES = 40, 64 * 1024
AS_IT_IS = "identity"  # the Content-Encoding of a body that is not compressed
FORM_OVERHEAD_BYTES = FORM_FIELDS * FORM_FIELD_BYTES  # beside the file
Model = TypeVar("Model", bound=RequestModel)


def media_type_of(request: Request) -> str:
    """The media type of a request's body, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body of a request.

    Args:
        request: The request.
        max_bytes: The largest size.

    Returns:
        The body.

    Raises:
        RequestTooLarge: It has more bytes; no more than these are read.
        InvalidRequest: It did not arrive in time.
    """
    _check_declared(request, max_bytes)
    body = bytearray()
    async with _in_time():
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise _too_large(max_bytes)
    return bytes(body)


async def read_json(request: Request, model: type[Model], max_bytes: int) -> Model:
    """Read a body as JSON.

    Args:
        request: The request.
        model: What it must be.
        max_bytes: The largest size.

    Returns:
        The model.

    Raises:
        UnsupportedRequestType: It is not said to be JSON.
        InvalidRequest: It is no such model; `findings` names each field that is wrong.
        RequestTooLarge: It has more bytes.
    """
    require_media_type(request, "application/json")
    fields = parse_json(await read_body(request, max_bytes))
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        message = f"The body is not as it should be: {describe(error)}."
        raise InvalidRequest(message, findings_of(error)) from error


def parse_json(body: bytes) -> object:
    """Parse a body as strict JSON. Raises InvalidRequest."""
    try:
        return strict_json.loads(body, "the body")
    except strict_json.Unreadable as error:
        raise InvalidRequest.at(str(error), pointer="#") from error


def require_media_type(request: Request, *allowed: str) -> None:
    """Raise UnsupportedRequestType for a body of another media type, or one that is compressed."""
    given, encoding = media_type_of(request), request.headers.get("content-encoding", AS_IT_IS)
    if given not in allowed:
        _refuse("Content-Type", given, " or ".join(allowed))
    if encoding != AS_IT_IS:
        _refuse("Content-Encoding", encoding, f"{AS_IT_IS}, or left out")


def _refuse(header: str, given: str, right: str) -> NoReturn:
    detail = f"it must be {right} (received {given[:80]!r})"
    raise UnsupportedRequestType.at(detail, header=header)


@asynccontextmanager
async def read_form(request: Request, max_file_bytes: int) -> AsyncIterator[FormData]:
    """Read a form with at most one file. Its files are closed at the end of the block.

    Args:
        request: The request.
        max_file_bytes: The largest size of the file.

    Yields:
        The form.

    Raises:
        RequestTooLarge: The form has more bytes than its file may have, and some for the other fields.
        InvalidRequest: It is not a form, or did not arrive in time.
    """
    max_bytes = max_file_bytes + FORM_OVERHEAD_BYTES
    _check_declared(request, max_bytes)
    end = b"--%b--" % parse_options_header(request.headers.get("content-type"))[1].get(b"boundary", b"")
    received, latest, ended = 0, b"", False

    async def receive() -> Message:
        nonlocal received, latest, ended
        message = await request.receive()
        chunk = message.get("body", b"")
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(max_bytes)
        latest = latest[1 - len(end) :] + chunk  # the end may come in two chunks
        ended = ended or end in latest
        if not ended and message["type"] == "http.request" and not message.get("more_body"):
            why = "It is cut off: it has no last boundary."  # the parser leaves out the field that is cut
            raise MultiPartException(why)
        return message

    counted = Request(request.scope, receive)
    try:
        yield await _parse_form(counted)
    finally:
        await counted.close()


async def _parse_form(request: Request) -> FormData:
    try:
        async with _in_time():
            return await request.form(max_files=1, max_fields=FORM_FIELDS, max_part_size=FORM_FIELD_BYTES)
    except HTTPException as error:
        detail = f"the form cannot be read: {error.detail}"
        raise InvalidRequest.at(detail, pointer="#") from error


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            yield
    except TimeoutError as error:
        detail = f"the body did not arrive within {READ_TIMEOUT_S:g} s"
        raise InvalidRequest.at(detail, pointer="#") from error


def _check_declared(request: Request, max_bytes: int) -> None:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge.at(f"the body may have at most {max_bytes:,} bytes", pointer="#")
