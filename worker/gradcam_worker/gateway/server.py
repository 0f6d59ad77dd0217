"""Runs the app with uvicorn."""

import asyncio
import gc
import signal
import socket
from types import FrameType

import uvicorn

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.gateway.access.caller import Access, is_this_machine
from gradcam_worker.gateway.app import create_app
from gradcam_worker.redis_server.server_checks import ServerMonitor
from gradcam_worker.settings import Settings
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

SHUTDOWN_S = 10  # for open requests, after SIGTERM
IDLE_S = 75  # of a connection without a request: longer than most load balancers keep it
MAX_HEADER_BYTES = 32 * 1024
BACKLOG = 2048  # connections that wait to be accepted


class _Server(uvicorn.Server):
    """A server that ends waits and streams when it is to stop: their callers connect again elsewhere."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event) -> None:
        super().__init__(config)
        self._closing = closing

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
    access = Access(settings, loopback=is_this_machine(host))
    app = create_app(settings, access=access)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
        timeout_keep_alive=IDLE_S,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        lifespan="on",
        ws="none",
    )
    server = _Server(config, app.state.gateway.open_requests.closing)

    def stop(*_: object) -> None:
        """Stop after a signal before uvicorn handles it, or after: it raises the signal again."""
        server.should_exit = True

    signal.signal(signal.SIGTERM, stop)
    gc.collect()
    gc.freeze()  # a pass over all that was imported takes 50 ms, in which nobody is answered
    checks = ServerMonitor(settings)
    app.state.gateway.metrics.set_redis_checks(checks.is_failing)
    checks.loop.start()
    log.info("gateway_started", host=host, port=port)
    server.run([listener])
    checks.loop.request_stop()
    log.info("gateway_stopped")
    return 0 if server.started else 1


def _listen(host: str, port: int) -> socket.socket:
    """Listen at an address. Raises InvalidSettings."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        message = f"--host {host} --port {port}: nothing can be served there ({error})."
        raise InvalidSettings(message) from error
