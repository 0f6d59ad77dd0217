"""Answers in JSON that nobody keeps: each is for one caller, at one time."""

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
