"""What the routes share: the client, the settings, and who calls."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Request

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.gateway.access import Access, Caller, Scope
from gradcam_worker.settings import Settings


@dataclass(frozen=True)
class Gateway:
    """What every route needs; `app.state.gateway`."""

    settings: Settings
    client: AsyncGradcamClient
    access: Access

    def client_of(self, caller: Caller) -> AsyncGradcamClient:
        """The client that sees the caller's jobs alone."""
        del caller
        return self.client


def gateway_of(request: Request) -> Gateway:
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

    async def find_caller(
        gateway: GatewayOf, authorization: Annotated[str | None, Header(include_in_schema=False)] = None
    ) -> Caller:
        caller = await gateway.access.authenticate(authorization)
        caller.check_scope(scope)
        await gateway.access.admit(caller)
        return caller

    return Depends(find_caller)
