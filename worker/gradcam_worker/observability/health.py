"""Whether a process is alive, ready and started, said over HTTP, beside its metrics.

    /live      200 as long as its threads live and its loop turns, however long a batch or a broker takes
    /ready     200 while it can do its work: networks loaded, broker and ledger there, storage well
    /startup   200 from when it has begun, with all its networks loaded, whether or not anybody answers it
    /metrics   what Prometheus reads

503 where not, with what is wrong as JSON. A few threads answer, apart from the work: a slow, hostile or very
busy caller costs others of its kind, and no job.
"""

import json
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from queue import Full, Queue
from typing import Any

from gradcam_worker.errors import GradcamError, InvalidSettings
from gradcam_worker.resilience.background_loop import BackgroundLoop

log = logging.getLogger("gradcam")

ASK_EVERY_S = 2.0  # between two questions whether broker and ledger are there
ANSWERED_S = 10.0  # ago: whoever has not answered since is away
THREADS = 4
WAITING = 16  # callers for whom there is no thread yet; who comes then is sent away
PAUSE_S = 0.1  # where nobody can be let in
CALL_S = 5.0  # that one call may take

Check = Callable[[], str | None]  # what is wrong, if anything


class Contact:
    """Whether somebody answers: asked again and again in a thread of its own, so that no caller waits."""

    def __init__(self, who: Mapping[str, Callable[[], object]]) -> None:
        """`who` is asked, each in turn: a GradcamError is no answer."""
        self._who = who
        self._answered_s: dict[str, float] = {}
        self.loop = BackgroundLoop("contact", self.round, ASK_EVERY_S, immediately=True)

    def round(self) -> None:
        """Ask everybody once."""
        for name, ask in self._who.items():
            try:
                ask()
            except GradcamError as error:
                log.debug("%s: %s", name, error)  # whoever needs it says so aloud
            except BaseException:
                log.exception("%s: nobody foresaw this", name)
            else:
                self._answered_s[name] = time.monotonic()

    def check(self, name: str) -> str | None:
        """What is wrong with one of them."""
        answered_s = self._answered_s.get(name)
        if answered_s is None:
            return "has not answered yet"
        ago_s = time.monotonic() - answered_s
        return f"has not answered for {ago_s:.0f} s" if ago_s > ANSWERED_S else None


class Health:
    """What has to be well for a process to be alive, and to be ready."""

    def __init__(self) -> None:
        """Nothing has, so far: see `live`, `ready` and `startup`, whose values say what is wrong."""
        self.live: dict[str, Check] = {}
        self.ready: dict[str, Check] = {}
        self.startup: dict[str, Check] = {}  # nothing of others: whoever asks ends what does not start

    def found(self, path: str) -> dict[str, str] | None:
        """What is wrong, by what is looked at; None for a path that is none of /live, /ready, /startup."""
        checks = {"/live": self.live, "/ready": self.ready, "/startup": self.startup}.get(path)
        return None if checks is None else _wrong(checks)


def _wrong(checks: Mapping[str, Check]) -> dict[str, str]:
    return {name: said for name, check in [*checks.items()] if (said := check())}


def serve(host: str, port: int, health: Health, scrape: Callable[[], bytes], content_type: str) -> int:
    """Answer from now on, until the process ends; return the port. Raises InvalidSettings."""
    try:
        server = _Server(host, port)
    except OSError as error:
        message = f"GRADCAM_METRICS_PORT: {host}:{port} cannot be listened at ({error.strerror or error})."
        raise InvalidSettings(message) from error
    server.health, server.scrape, server.content_type = health, scrape, content_type
    for serving in (server.serve_forever, *[server.work] * THREADS):
        threading.Thread(target=serving, name="health", daemon=True).start()
    return int(server.server_address[1])


class _Server(socketserver.TCPServer):
    """One thread accepts, and ends what takes too long; a few answer."""

    allow_reuse_address = True
    request_queue_size = WAITING
    health: Health
    scrape: Callable[[], bytes]
    content_type: str

    def __init__(self, host: str, port: int) -> None:
        self._calls = Queue[tuple[Any, Any]](WAITING)
        self._begun_s: dict[socket.socket, float] = {}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # out of files, perhaps: it would be tried again at once, and again
            time.sleep(PAUSE_S)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  # the name is the library's
        log.debug("%s could not be answered", client_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._begun_s[request] = time.monotonic()
        try:
            self._calls.put_nowait((request, client_address))
        except Full:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        self._begun_s.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Between two calls: whoever speaks a letter a second is not listened to for ever."""
        for request, begun_s in [*self._begun_s.items()]:
            if time.monotonic() - begun_s > CALL_S:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def work(self) -> None:
        while True:
            request, client_address = self._calls.get()
            try:
                self.finish_request(request, client_address)
            except BaseException as error:  # noqa: BLE001  # whatever a caller does, the next one is answered
                log.debug("%s: %s: %s", client_address[0], type(error).__name__, error)
            with suppress(OSError):
                self.shutdown_request(request)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = CALL_S
    server_version, sys_version = "gradcam-worker", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            self._answer(path)
        except OSError:  # the caller has gone
            raise
        except BaseException:
            log.exception("%s could not be answered", path)
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, b'{"status": "unknown"}\n', "application/json")

    do_HEAD = do_GET  # noqa: N815  # the name is the library's

    def _answer(self, path: str) -> None:
        if path == "/metrics":
            self._say(HTTPStatus.OK, self.server.scrape(), self.server.content_type)
            return
        wrong = self.server.health.found(path)
        if wrong is None:
            said: dict[str, object] = {"error": "there are /metrics, /live, /ready and /startup"}
            status = HTTPStatus.NOT_FOUND
        else:
            said = {"status": "unavailable", "why": wrong} if wrong else {"status": "ok"}
            status = HTTPStatus.SERVICE_UNAVAILABLE if wrong else HTTPStatus.OK
        self._say(status, json.dumps(said).encode() + b"\n", "application/json")

    def _say(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.send_header("cache-control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Say nothing: it is asked every few seconds."""
