"""What the routes share: the client, the settings, and who calls."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Path, Request

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.errors import UnknownJob
from gradcam_worker.gateway.access.caller import Access, Caller
from gradcam_worker.gateway.access.tenants import Scope
from gradcam_worker.gateway.artifact_lists import ArtifactLists
from gradcam_worker.gateway.backfill_processes import BackfillProcesses
from gradcam_worker.gateway.http.problems import refuse_unknown_parameters
from gradcam_worker.gateway.objects import GatewayObjects
from gradcam_worker.gateway.open_requests import OpenRequests
from gradcam_worker.observability.prometheus import Metrics
from gradcam_worker.schemas.job import ID_PATTERN
from gradcam_worker.settings import Settings

if TYPE_CHECKING:
    from gradcam_worker.storage.s3 import S3


MAX_FORMS = 200  # at a time: each is a connection and a file of up to GRADCAM_MAX_IMAGE_BYTES


@dataclass(frozen=True)
class Gateway:
    """What every route needs; `app.state.gateway`."""

    settings: Settings
    client: AsyncGradcamClient
    access: Access
    objects: GatewayObjects
    open_requests: OpenRequests
    metrics: Metrics = field(default_factory=lambda: Metrics(role="gateway"))
    forms: OpenRequests = field(default_factory=lambda: OpenRequests(MAX_FORMS, "forms are received"))
    artifact_lists: ArtifactLists = field(default_factory=ArtifactLists)
    backfills: BackfillProcesses = field(default_factory=BackfillProcesses)

    @cached_property
    def s3(self) -> "S3":
        """The storage of the datasets of backfills. It is made in a thread: that takes long."""
        from gradcam_worker.storage.s3 import S3  # 30 MB, which a gateway without backfills does not need

        return S3(self.settings)

    def client_of(self, caller: Caller) -> AsyncGradcamClient:
        """The client that sees the caller's jobs alone."""
        return self.client.as_tenant(caller.tenant)


async def gateway_of(request: Request) -> Gateway:
    """The gateway that serves a request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


GatewayOf = Annotated[Gateway, Depends(gateway_of)]


def CallerWith(scope: Scope) -> Any:  # noqa: N802  # it reads as a type where it is used
    """The dependency of a route that needs a scope: who calls.

    Args:
        scope: What the caller's key must allow.

    Returns:
        The dependency, as in `caller: Annotated[Caller, CallerWith("read")]`.
    """

    async def find_caller(request: Request) -> Caller:  # not by Header(), which costs three times as much
        gateway, headers = await gateway_of(request), request.headers
        caller = await gateway.access.authenticate(
            headers.get("authorization"), host=headers.get("host"), origin=headers.get("origin")
        )
        caller.check_scope(scope)
        if request.query_params and request.url.path.startswith("/v1/"):
            refuse_unknown_parameters(request)
        await gateway.access.admit(caller)
        return caller

    return Depends(find_caller)


async def _job_id(
    job_id: Annotated[str, Path(description="A job's id.", json_schema_extra={"pattern": ID_PATTERN})],
) -> str:
    """Check the id of a job in a path, before the ledger is asked. Raises UnknownJob."""
    if not re.fullmatch(ID_PATTERN, job_id):
        message = "There is no job of this id: ids are UUIDs or ULIDs."
        raise UnknownJob(message)
    return job_id


JobIdOf = Annotated[str, Depends(_job_id)]
Reader = Annotated[Caller, CallerWith("read")]
Submitter = Annotated[Caller, CallerWith("submit")]
