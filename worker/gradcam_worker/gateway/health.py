"""The routes `/live` and `/ready`."""

import asyncio
from http import HTTPStatus

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from gradcam_worker.errors import GradcamError
from gradcam_worker.gateway.context import GatewayOf

READY_TIMEOUT_S = 3.0  # for an answer of the ledger

router = APIRouter(tags=["service"])


@router.get("/live")
async def live() -> Response:
    """200 while the process answers."""
    return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})


@router.get("/ready")
async def ready(gateway: GatewayOf) -> Response:
    """200 while the ledger answers, else 503."""
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            await gateway.client.statuses(["00000000-0000-0000-0000-000000000000"])
    except (GradcamError, TimeoutError):
        body = {"status": "unavailable", "why": {"ledger": "has not answered"}}
        return JSONResponse(body, HTTPStatus.SERVICE_UNAVAILABLE, {"Cache-Control": "no-store"})
    return JSONResponse({"status": "ok"}, headers={"Cache-Control": "no-store"})
