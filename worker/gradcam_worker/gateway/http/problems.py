"""Errors as problem details (RFC 9457): `application/problem+json`.

`detail` is the error's `public_message`: no setting, host, bucket or path of the operator's. What is wrong
with the request itself is in `errors`: a JSON pointer into the body or a parameter's name, with a sentence.
"""

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from gradcam_worker import errors
from gradcam_worker.errors import GradcamError, InternalError
from gradcam_worker.schemas.model import describe_each
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

MEDIA_TYPE = "application/problem+json"
URN = "urn:gradcam:problem:"
STATUS_OF: Mapping[type[GradcamError], HTTPStatus] = {  # of the nearest class
    errors.InvalidRequest: HTTPStatus.BAD_REQUEST,
    errors.InvalidQuery: HTTPStatus.BAD_REQUEST,
    errors.RequestTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.UnsupportedRequestType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.ServerBusy: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.InvalidApiKey: HTTPStatus.UNAUTHORIZED,
    errors.ScopeMissing: HTTPStatus.FORBIDDEN,
    errors.RateLimited: HTTPStatus.TOO_MANY_REQUESTS,
    errors.QuotaExceeded: HTTPStatus.TOO_MANY_REQUESTS,
    errors.UnknownJob: HTTPStatus.NOT_FOUND,
    errors.UnknownBackfill: HTTPStatus.NOT_FOUND,
    errors.NoResult: HTTPStatus.CONFLICT,
    errors.JobNotFailed: HTTPStatus.CONFLICT,
    errors.IdempotencyConflict: HTTPStatus.CONFLICT,
    errors.BackfillConflict: HTTPStatus.CONFLICT,
    errors.BackfillRunning: HTTPStatus.CONFLICT,
    errors.InvalidInput: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.ImageTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.UnsupportedMediaType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    errors.RedisUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StorageUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.WorkerUnfit: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.NoWorker: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.WaitTimeout: HTTPStatus.GATEWAY_TIMEOUT,
    errors.InvalidSettings: HTTPStatus.NOT_IMPLEMENTED,
    errors.MissingExtra: HTTPStatus.NOT_IMPLEMENTED,
    errors.PermanentError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.GradcamError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
RETRY_AFTER_S = 2  # where an error does not say it itself


def status_of(error: GradcamError) -> HTTPStatus:
    """The HTTP status of an error: that of the nearest of its classes."""
    return next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)


def problem_response(error: GradcamError) -> Response:
    """The answer to a request that ended with an error."""
    status = status_of(error)
    told = isinstance(error, errors.RedisUnavailable)  # by the client, as an outage with its length
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and not told:
        log.warning("request_failed", error=error)
    else:
        log.debug("request_refused", error=error)
    body: dict[str, Any] = {
        "type": f"{URN}{error.code}",
        "title": (type(error).__doc__ or error.code).split("\n")[0].rstrip("."),
        "status": status.value,
        "detail": error.public_message,
        "public_message": error.public_message,
        "code": error.code,
        "retryable": error.retryable,
    }
    if findings := _findings(error):
        body["errors"] = findings
    headers = {}
    if status in {HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS}:
        headers["Retry-After"] = str(
            max(1, math.ceil(getattr(error, "retry_after_s", None) or RETRY_AFTER_S))
        )
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body, status.value, headers, MEDIA_TYPE)


def _findings(error: GradcamError) -> list[Mapping[str, str]]:
    """What is wrong with each field of the request."""
    if error.findings:
        return [*error.findings]
    if isinstance(error, errors.InvalidQuery) and isinstance(error.__cause__, ValidationError):
        return [
            {"parameter": str(location[0]), "detail": sentence}
            for location, sentence in describe_each(error.__cause__)
        ]
    if isinstance(error.__cause__, ValidationError):
        return [*findings_of(error.__cause__)]
    if isinstance(error, errors.InvalidJob | errors.UriNotAllowed):  # they name the caller's own policy alone
        return [{"pointer": "#", "detail": str(error)}]
    return []


def findings_of(error: ValidationError) -> list[Mapping[str, str]]:
    """What is wrong with each field of a body."""
    return [{"pointer": pointer(location), "detail": sentence} for location, sentence in describe_each(error)]


def pointer(location: tuple[str | int, ...]) -> str:
    """A JSON pointer (RFC 6901), as a fragment of a URI, to a field of the body."""
    steps = (str(step).replace("~", "~0").replace("/", "~1") for step in location)
    return "#" + "".join(f"/{step}" for step in steps)


def _methods(routers: Sequence[APIRouter], request: Request) -> set[str]:
    """The methods that a path has: FastAPI has a route for each, and answers for the first."""
    routes = (route for router in routers for route in router.routes)
    found = [route for route in routes if route.matches(request.scope)[0] != Match.NONE]
    return {method for route in found for method in getattr(route, "methods", None) or ()}


def refuse_unknown_parameters(request: Request) -> None:
    """Raise InvalidRequest if the address has a parameter that its operation does not, as a misspelt one."""
    dependant = getattr(request.scope["route"], "dependant", None)
    known = [field.alias for field in dependant.query_params] if dependant else []
    if unknown := [name for name in request.query_params if name not in known]:
        would_be = f"there are {', '.join(known)}" if known else "there are none here"
        findings = [
            {"parameter": name[:60], "detail": f"unknown parameter: {would_be}"} for name in unknown[:8]
        ]
        message = "The address has unknown parameters."
        raise errors.InvalidRequest(message, findings)


def add_handlers(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Let an app of these routers answer every error with a problem."""

    async def refuse(_: Request, error: Exception) -> Response:
        return problem_response(error if isinstance(error, GradcamError) else InternalError.of(error))

    async def refuse_parameters(_: Request, error: Exception) -> Response:
        found = error.errors() if isinstance(error, RequestValidationError) else []
        findings = [
            {
                "parameter": str(one["loc"][-1]),
                "detail": f"{one['msg']} (received {str(one['input'])[:60]!r})",
            }
            for one in found
        ]
        return problem_response(errors.InvalidRequest("A parameter is not valid.", findings))

    async def refuse_route(request: Request, error: Exception) -> Response:
        status = HTTPStatus(error.status_code if isinstance(error, HTTPException) else 500)
        code = status.phrase.lower().replace(" ", "_").replace("-", "_")
        body = {
            "type": f"{URN}{code}",
            "title": status.phrase,
            "status": status.value,
            "detail": status.description or status.phrase,
            "public_message": status.description or status.phrase,
            "code": code,
            "retryable": False,
        }
        headers = {}
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            headers["Allow"] = ", ".join(sorted(_methods(routers, request)))
        return JSONResponse(body, status.value, headers, MEDIA_TYPE)

    app.add_exception_handler(GradcamError, refuse)
    app.add_exception_handler(RequestValidationError, refuse_parameters)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(Exception, refuse)
