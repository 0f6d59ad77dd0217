"""The routes `/live`, `/ready` and `/metrics`."""

import asyncio
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from gradcam_worker.errors import GradcamError
from gradcam_worker.gateway.access.caller import Caller
from gradcam_worker.gateway.context import CallerWith, Gateway, GatewayOf
from gradcam_worker.gateway.http.answers import NOT_KEPT
from gradcam_worker.observability.prometheus import CONTENT_TYPE

READY_TIMEOUT_S = 3.0  # for an answer of the ledger
NO_JOB = "00000000-0000-0000-0000-000000000000"

router = APIRouter(tags=["service"])


@router.head("/live", include_in_schema=False)
@router.get("/live", operation_id="live")
async def live() -> Response:
    """200 while the process answers."""
    return JSONResponse({"status": "ok"}, headers=NOT_KEPT)


@router.head("/ready", include_in_schema=False)
@router.get("/ready", operation_id="ready")
async def ready(gateway: GatewayOf) -> Response:
    """200 while the ledger answers, else 503."""
    if problem := await find_ledger_problem(gateway):
        body = {"status": "unavailable", "why": {"ledger": problem}}
        return JSONResponse(body, HTTPStatus.SERVICE_UNAVAILABLE, NOT_KEPT)
    return JSONResponse({"status": "ok"}, headers=NOT_KEPT)


async def find_ledger_problem(gateway: Gateway) -> str | None:
    """Return what is wrong with the ledger's server, or None."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await gateway.client.statuses([NO_JOB])
    except (GradcamError, TimeoutError):
        return "has not answered"
    return None


@router.get("/metrics", operation_id="metrics")
async def metrics(gateway: GatewayOf, caller: Annotated[Caller, CallerWith("operate")]) -> Response:
    """Metrics of this process, for Prometheus."""
    del caller
    return Response(gateway.metrics.scrape(), headers=NOT_KEPT, media_type=CONTENT_TYPE)
