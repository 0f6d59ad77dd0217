"""Serve a process's health checks and metrics over HTTP, at a port or at a Unix socket; and ask for them.

    /live      200 while its threads are alive and its loop runs, however long a batch or a broker takes
    /ready     200 while it can work: networks loaded, broker and ledger reachable, storage available
    /startup   200 once it has started and loaded all its networks, whether or not servers are reachable
    /metrics   for Prometheus

Otherwise 503, with the failed checks as JSON. A few dedicated threads answer, so that slow, hostile or very
busy callers delay other callers but no job.
"""

import http.client
import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import Full, Queue
from typing import Any

from gradcam_worker.errors import GradcamError, InvalidSettings
from gradcam_worker.net import listening
from gradcam_worker.resilience.background_loop import BackgroundLoop
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

PROBE_INTERVAL_S = 2.0
UNREACHABLE_AFTER_S = 10.0  # without an answer to a probe
THREADS = 4
MAX_WAITING_CALLERS = 16  # without a thread yet; further callers are disconnected
ACCEPT_RETRY_S = 0.1
MAX_CALL_S = 5.0

Check = Callable[[], str | None]  # what is wrong, or None


class ServerProbes:
    """Probes servers periodically in a thread of its own, so that no health check waits for a server."""

    def __init__(self, probes: Mapping[str, Callable[[], object]]) -> None:
        """`probes` are called by turns; one that raises got no answer."""
        self._probes = probes
        self._answered_s: dict[str, float] = {}
        self.loop = BackgroundLoop("probes", self.probe_all, PROBE_INTERVAL_S, immediately=True)

    def probe_all(self) -> None:
        """Probe each server once."""
        for name, probe in self._probes.items():
            try:
                probe()
            except GradcamError as error:
                log.debug("health_probe_failed", server=name, error=error)  # the code that needs it warns
            except BaseException:
                log.exception("health_probe_crashed", server=name)
            else:
                self._answered_s[name] = time.monotonic()

    def check(self, name: str) -> str | None:
        """Return what is wrong with a server, or None."""
        answered_s = self._answered_s.get(name)
        if answered_s is None:
            return "has not answered yet"
        ago_s = time.monotonic() - answered_s
        return f"has not answered for {ago_s:.0f} s" if ago_s > UNREACHABLE_AFTER_S else None


class Health:
    """The checks of a process, by name: `live`, `ready` and `startup`. Whoever owns a check adds it."""

    def __init__(self) -> None:
        """Start without checks."""
        self.live: dict[str, Check] = {}
        self.ready: dict[str, Check] = {}
        # Only of the process itself: Kubernetes kills what does not start, and a server may be down for long.
        self.startup: dict[str, Check] = {}

    def problems(self, path: str) -> dict[str, str] | None:
        """Return what is wrong, by the check's name; None if `path` is not /live, /ready or /startup."""
        checks = {"/live": self.live, "/ready": self.ready, "/startup": self.startup}.get(path)
        if checks is None:
            return None
        return {name: problem for name, check in [*checks.items()] if (problem := check())}


def serve(
    address: tuple[str, int] | Path, health: Health, scrape: Callable[[], bytes], content_type: str
) -> int:
    """Serve health and metrics in background threads until the process ends.

    Args:
        address: Host and port, where port 0 is any; or the path of a Unix socket, which only this user can
            open. A file that is there is replaced.
        health: The checks.
        scrape: Returns the body of /metrics.
        content_type: Of that body.

    Returns:
        The port; 0 for a socket.

    Raises:
        InvalidSettings: The address cannot be listened at.
    """
    try:
        server = _Server(address)
    except OSError as error:
        if isinstance(address, Path):
            setting, place = "GRADCAM_METRICS_SOCKET", str(address)
        else:
            setting, place = "GRADCAM_METRICS_PORT", f"{address[0]}:{address[1]}"
        message = f"{setting}: {place} cannot be listened at ({error.strerror or error})."
        raise InvalidSettings(message) from error
    server.health, server.scrape, server.content_type = health, scrape, content_type
    for target in (server.serve_forever, *[server.work] * THREADS):
        threading.Thread(target=target, name="health", daemon=True).start()
    return 0 if isinstance(address, Path) else int(server.server_address[1])


def ask(socket_path: Path, path: str, timeout_s: float) -> tuple[int, bytes]:
    """Ask a process that serves at a Unix socket.

    Args:
        socket_path: The socket.
        path: As `/ready`.
        timeout_s: How long to wait for it, each time that it is waited for.

    Returns:
        The status and the body.

    Raises:
        OSError: It does not answer.
        http.client.HTTPException: It answers something else than HTTP, or in part.
    """
    with closing(_SocketConnection(socket_path, timeout_s)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _Server(socketserver.TCPServer):
    """One thread accepts connections and closes slow ones; a few threads answer."""

    allow_reuse_address = True
    request_queue_size = MAX_WAITING_CALLERS
    health: Health
    scrape: Callable[[], bytes]
    content_type: str

    def __init__(self, address: tuple[str, int] | Path) -> None:
        self._calls = Queue[tuple[Any, Any]](MAX_WAITING_CALLERS)
        self._started_s: dict[socket.socket, float] = {}
        self._path: Path | None = None  # of a Unix socket
        if not isinstance(address, Path):
            self.address_family, host = listening.family_and_host(address[0])
            super().__init__((host, address[1]), _Handler)
            return
        self.address_family, self._path = socket.AF_UNIX, address
        super().__init__(str(address), _Handler)  # type: ignore[arg-type]  # as UnixStreamServer's

    def server_bind(self) -> None:
        if self._path:
            listening.bind_for_this_user(self.socket, self._path)
            return
        if self.address_family == socket.AF_INET6:
            alone = self.server_address[0] != listening.EVERY_ADDRESS
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, alone)
        super().server_bind()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            request, address = super().get_request()
        except OSError:  # out of file descriptors, perhaps: the server would retry in a busy loop
            time.sleep(ACCEPT_RETRY_S)
            raise
        return request, address or ("", 0)  # a Unix socket's callers have none

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  # the name is the library's
        log.debug("health_connection_failed", client=client_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._started_s[request] = time.monotonic()
        try:
            self._calls.put_nowait((request, client_address))
        except Full:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        self._started_s.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close connections that are open for too long, such as those that send a byte a second.

        Make a Unix socket again that somebody has removed, as programs do that tidy up /tmp.
        """
        if self._path and not self._path.exists():
            self._listen_again(self._path)
        for request, started_s in [*self._started_s.items()]:
            if time.monotonic() - started_s > MAX_CALL_S:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def _listen_again(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as again:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                listening.bind_for_this_user(again, path)
                again.listen(self.request_queue_size)
            except OSError as error:  # the next turn tries again
                log.debug("health_socket_not_made", socket=path, error=error)
                return
            os.dup2(again.fileno(), self.fileno(), inheritable=False)  # the serving thread waits for it

    def work(self) -> None:
        while True:
            request, client_address = self._calls.get()
            try:
                self.finish_request(request, client_address)
            except BaseException as error:  # noqa: BLE001  # the thread answers the next caller
                log.debug("health_call_failed", client=client_address[0], error=error)
            with suppress(OSError):
                self.shutdown_request(request)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = MAX_CALL_S
    server_version, sys_version = "gradcam-worker", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            self._answer(path)
        except OSError:  # the caller has disconnected
            raise
        except BaseException:
            log.exception("health_answer_failed", path=path)
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, b'{"status": "unknown"}\n', "application/json")

    do_HEAD = do_GET  # noqa: N815  # the name is the library's

    def _answer(self, path: str) -> None:
        if path == "/metrics":
            self._send(HTTPStatus.OK, self.server.scrape(), self.server.content_type)
            return
        problems = self.server.health.problems(path)
        if problems is None:
            body: dict[str, object] = {"error": "there are /metrics, /live, /ready and /startup"}
            status = HTTPStatus.NOT_FOUND
        else:
            body = {"status": "unavailable", "why": problems} if problems else {"status": "ok"}
            status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
        self._send(status, json.dumps(body).encode() + b"\n", "application/json")

    def _send(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.send_header("cache-control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Log nothing: probes call every few seconds."""
