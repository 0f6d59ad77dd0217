"""Answers in JSON that nobody keeps, and the ETags of those that callers keep."""

from collections.abc import Mapping
from http import HTTPStatus

from pydantic import BaseModel
from starlette.responses import Response

JSON = "application/json"
NOT_KEPT: Mapping[str, str] = {"Cache-Control": "no-store"}


def json_answer(
    model: BaseModel, status: HTTPStatus = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Response:
    """Answer with a model.

    Args:
        model: What the body is.
        status: Of the answer.
        headers: Further ones.

    Returns:
        The answer.
    """
    return Response(model.model_dump_json(), status.value, {**NOT_KEPT, **(headers or {})}, JSON)


def is_held(etag: str, if_none_match: str | None) -> bool:
    """Whether a caller has the answer with this ETag.

    Args:
        etag: Of the answer.
        if_none_match: The header of the request. Weak and strong ETags are equal here (RFC 9110, 13.1.2).

    Returns:
        Whether it has.
    """
    given = {one.strip().removeprefix("W/") for one in (if_none_match or "").split(",")}
    return not given.isdisjoint({etag.removeprefix("W/"), "*"})
