"""What every request passes: security headers, metrics, and an answer where the code fails."""

import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradcam_worker.errors import GradcamError, InternalError
from gradcam_worker.gateway.http.problems import problem_response
from gradcam_worker.observability.prometheus import Metrics
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"  # runs nothing
SECURITY: Mapping[str, str] = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
ABANDONED = 499  # as nginx counts a request whose caller has gone: it is no failure of the server


class Edge:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        """`metrics` counts requests."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s, status = time.perf_counter(), 0
        state: dict[str, Any] = scope.setdefault("state", {})

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
                took_s = None if state.get("waited") else time.perf_counter() - started_s
                self._metrics.request_answered(operation_of(scope), status, took_s)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:  # while its body was read: nobody is there to be answered
            log.debug("request_abandoned", path=scope["path"])
            self._metrics.request_answered(operation_of(scope), ABANDONED, None)
        except Exception as error:
            if status:
                log.exception("response_failed", path=scope["path"])
                raise  # the server ends the connection: the caller sees that the response is not whole
            if not isinstance(error, GradcamError):
                log.exception("request_crashed", path=scope["path"])
                error = InternalError.of(error)
            await problem_response(error)(scope, receive, send_with_headers)


def operation_of(scope: Scope) -> str:
    """The name of the operation that a request was routed to; `other` where there is none."""
    return str(getattr(scope.get("route"), "operation_id", None) or "other")
