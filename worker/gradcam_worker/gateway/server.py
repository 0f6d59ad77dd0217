"""Runs the app with uvicorn."""

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Coroutine
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import InvalidSettings
from gradcam_worker.gateway.access.caller import Access, is_this_machine
from gradcam_worker.gateway.app import create_app
from gradcam_worker.gateway.context import Gateway
from gradcam_worker.gateway.http.limited_protocol import TOO_LARGE, LimitedHttpProtocol
from gradcam_worker.gateway.routes.health import READY_TIMEOUT_S, find_ledger_problem
from gradcam_worker.net import listening
from gradcam_worker.observability import health
from gradcam_worker.observability.prometheus import CONTENT_TYPE
from gradcam_worker.redis_server.server_checks import ServerMonitor
from gradcam_worker.resilience.outages import Outages
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger, RateLimitedCount

log = EventLogger("gradcam")

SHUTDOWN_S = 10  # for open requests, after SIGTERM
IDLE_S = 75  # of a connection without a request: longer than most load balancers keep it
UNREADABLE_INTERVAL_S = 60.0  # between two lines about requests that cannot be read
# What uvicorn's and our own protocol warn of when they answer 400.
UNREADABLE = frozenset({"Invalid HTTP request received.", TOO_LARGE})
# What uvicorn warns of when it answers a request as if it had asked for no other protocol (`curl --http2`).
UPGRADES = ("Unsupported upgrade request.", "No supported WebSocket library detected.")
BACKLOG = 2048  # connections that wait to be accepted
YOUNG_OBJECTS = 10_000  # between two collections: Python's 700 are those of a few requests


class UnreadableRequests(logging.Filter):
    """Replaces warnings of requests that cannot be read: anybody can send any number of these.

    Those of requests for another protocol, which are answered all the same, are dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count = RateLimitedCount(UNREADABLE_INTERVAL_S)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether uvicorn logs this record itself."""
        message = record.getMessage()
        if message not in UNREADABLE:
            return not message.startswith(UPGRADES)
        if count := self._count():
            log.warning("requests_unreadable", requests=count, reason=message)
        return False


class _Server(uvicorn.Server):
    """A server that ends waits and streams when it is to stop: their callers connect again elsewhere."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event) -> None:
        super().__init__(config)
        self._closing = closing
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, in the event loop."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()

    def ask(self, question: Coroutine[Any, Any, str | None]) -> str | None:
        """Run a check in the event loop, from another thread; return what is wrong, or None."""
        if self._loop is None or self._loop.is_closed():
            question.close()
            return "does not serve"
        answer = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return answer.result(READY_TIMEOUT_S + 1)
        except TimeoutError:
            answer.cancel()
            return "does not answer"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after a signal, in the thread of the event loop."""
        self._closing.set()
        super().handle_exit(sig, frame)


def run(settings: Settings, host: str, port: int) -> int:
    """Serve the HTTP API until SIGTERM or Ctrl-C.

    Args:
        settings: Those of a client.
        host: The address to listen at.
        port: The port.

    Returns:
        The exit code.

    Raises:
        InvalidSettings: The address cannot be listened at.
    """
    listener = _listen(host, port)
    client = GradcamClient(settings=settings, outages=Outages())
    access = Access(settings, loopback=is_this_machine(host), outage=client.outages.ledger)
    app = create_app(settings, client=AsyncGradcamClient(client=client), access=access)
    server = _make_server(app)

    def stop(*_: object) -> None:
        """Stop after a signal before uvicorn handles it, or after: it raises the signal again."""
        server.should_exit = True

    signal.signal(signal.SIGTERM, stop)
    logging.getLogger("uvicorn.error").addFilter(UnreadableRequests())
    _serve_metrics(settings, app.state.gateway, server)
    gc.collect()
    gc.set_threshold(YOUNG_OBJECTS)
    gc.freeze()  # a pass over all that was imported takes 50 ms, in which nobody is answered
    checks = ServerMonitor(settings)
    app.state.gateway.metrics.set_redis_checks(checks.is_failing)
    checks.loop.start()
    log.info("gateway_started", host=host, port=port)
    server.run([listener])
    checks.loop.request_stop()
    log.info("gateway_stopped")
    return 0 if server.started else 1


def _make_server(app: FastAPI) -> _Server:
    """The server of an app of `create_app`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
        timeout_keep_alive=IDLE_S,
        http=LimitedHttpProtocol,
        lifespan="on",
        ws="none",
    )
    return _Server(config, app.state.gateway.open_requests.closing)


def _serve_metrics(settings: Settings, gateway: Gateway, server: _Server) -> None:
    """Serve health and metrics where all other processes do, and without a key. Raises InvalidSettings."""
    if not settings.metrics_port:
        return
    checks = health.Health()
    checks.live["event loop"] = checks.startup["event loop"] = lambda: server.ask(asyncio.sleep(0))
    checks.ready["ledger"] = lambda: server.ask(find_ledger_problem(gateway))
    health.serve((settings.metrics_host, settings.metrics_port), checks, gateway.metrics.scrape, CONTENT_TYPE)


def _listen(host: str, port: int) -> socket.socket:
    """Listen at an address. Raises InvalidSettings."""
    family, bound = listening.family_and_host(host)
    both = bound == listening.EVERY_ADDRESS
    try:
        return socket.create_server((bound, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        message = f"--host {host} --port {port}: nothing can be served there ({error})."
        raise InvalidSettings(message) from error
