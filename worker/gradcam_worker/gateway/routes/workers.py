"""The routes of what live workers offer: networks, and the workers themselves."""

from typing import Annotated

from fastapi import APIRouter
from starlette.responses import Response

from gradcam_worker.gateway.access.caller import Caller
from gradcam_worker.gateway.context import CallerWith, GatewayOf, Reader
from gradcam_worker.gateway.http.answers import json_answer
from gradcam_worker.schemas.model import ResponseModel
from gradcam_worker.schemas.worker_report import NetworkOffer, WorkerReport

router = APIRouter(prefix="/v1", tags=["workers"])


class NetworkList(ResponseModel):
    """The networks that live workers offer."""

    networks: tuple[NetworkOffer, ...]


class WorkerList(ResponseModel):
    """The live workers."""

    workers: tuple[WorkerReport, ...]


@router.get("/networks", operation_id="list_networks")
async def list_networks(gateway: GatewayOf, caller: Reader) -> Response:
    """List the networks that live workers offer: those of the catalog whose weights they have, and their own.

    A job may name any network of the catalog: a worker with access to the internet fetches its weights.
    """
    del caller  # the networks are the same for all
    return json_answer(NetworkList(networks=await gateway.client.networks()))


@router.get("/workers", operation_id="list_workers")
async def list_workers(gateway: GatewayOf, caller: Annotated[Caller, CallerWith("operate")]) -> Response:
    """List the live workers: their device, what they run, and why they take no jobs just now, if so."""
    del caller
    return json_answer(WorkerList(workers=await gateway.client.workers()))
