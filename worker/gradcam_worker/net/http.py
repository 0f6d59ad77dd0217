"""HTTP, with the hosts that the operator names and with no others: the only user of httpx."""

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import httpcore
import httpx

from gradcam_worker.errors import UriNotAllowed
from gradcam_worker.net.allowlist import Hosts
from gradcam_worker.net.dialer import Dialer, Resolve, look_up
from gradcam_worker.net.ip_policy import networks
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.model import describe_excess_length
from gradcam_worker.text.urls import parse, without_secrets

MAX_REDIRECTS = 3
REDIRECTS = {301, 302, 303, 307, 308}
USUAL_PORTS = {"http": 80, "https": 443}
SHORTEST_S = 0.01  # a socket takes 0 for "do not wait at all"
POLL_CANCELLED_S = 0.5  # between two checks whether a job that waits was cancelled
FAILURES = (
    httpcore.ConnectionNotAvailable,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
    UnicodeError,  # from TLS, for a host whose name is longer than names may be
)


class HttpFailed(Exception):
    """No answer, half an answer, or one that cannot be used. Says what happened, without the URL."""


@dataclass(frozen=True)
class HttpResponse:
    """A server's answer; of its body never more than one byte above the limit."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)  # found by their name in any case


class HttpClient:
    """A client behind a list of hosts. Nothing is connected before the first request."""

    def __init__(
        self,
        hosts: tuple[str, ...],
        schemes: tuple[str, ...],
        setting: str,
        private_networks: tuple[str, ...] = (),
        *,
        resolve: Resolve = look_up,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`hosts` as `net.allowlist` reads them; `setting` is named when another one is refused.

        Only public addresses are dialled, and those in `private_networks`; `resolve` finds them. `tls` says
        which certificates are taken: without it, the public ones.
        """
        self._entries, self._hosts, self._setting = hosts, Hosts(hosts), setting
        self._schemes = USUAL_PORTS.keys() & set(schemes)
        # No connection is used twice, so that each one is known to the clock that may have to cut it. A
        # proxy or netrc of the machine must not decide where requests go: httpcore reads neither.
        self._pool = httpcore.ConnectionPool(
            tls or httpx.create_ssl_context(trust_env=False),
            max_connections=None,
            max_keepalive_connections=0,
            network_backend=Dialer(networks(private_networks), resolve),
        )

    def allowed(self, text: str) -> httpx.URL:
        """The URL to request, parsed once, so that what is checked is what is used. Raises UriNotAllowed."""
        if why := describe_excess_length(text):
            message = f"{without_secrets(text)[:200]!r}... is not allowed: {why}."
            raise UriNotAllowed(message)
        try:
            url = httpx.URL(text)
            host = url.raw_host.decode("ascii")
        except (httpx.InvalidURL, UnicodeError):
            raise UriNotAllowed(_no_url(text)) from None
        usual = USUAL_PORTS.get(url.scheme, 0)
        port = usual if url.port is None else url.port
        if url.scheme not in self._schemes or not self._hosts.admit(host, port, usual):
            hosts = ", ".join(self._entries) or "none"
            place = url.netloc.decode("ascii") if parse(text) else "..."  # without user and password
            message = f"{url.scheme}://{place} is not allowed: {self._setting} allows {hosts}."
            raise UriNotAllowed(message)
        if url.userinfo:
            message = f"A user or password in a URL ({host}) is not allowed: it would be kept in the ledger."
            raise UriNotAllowed(message)
        return url

    def get(
        self, text: str, *, max_bytes: int, seconds: float, deadline: Deadline | None = None
    ) -> HttpResponse:
        """Fetch a URL within `seconds`, redirects and all; each hop passes the same door.

        It ends early where the `deadline` is over, because somebody has cancelled the job, say.
        Raises UriNotAllowed, WebFailed.
        """
        with _Clock(seconds, deadline) as clock:
            for _ in range(MAX_REDIRECTS + 1):
                url = self.allowed(text)
                with self._answered(clock, "GET", url) as response:
                    headers = httpx.Headers(response.headers)
                    location = headers.get("location")
                    if response.status not in REDIRECTS or location is None:
                        return HttpResponse(response.status, _body(response, headers, max_bytes), headers)
                    text = _joined(url, location)
        message = f"it redirects more than {MAX_REDIRECTS} times"
        raise HttpFailed(message)

    def post(
        self, text: str, body: str, *, seconds: float, headers: Mapping[str, str] | None = None
    ) -> HttpResponse:
        """Post JSON within `seconds`; the answer's body is not read, and no redirect followed.

        Raises UriNotAllowed, WebFailed.
        """
        url = self.allowed(text)
        more = {"content-type": "application/json", **(headers or {})}
        with (
            _Clock(seconds) as clock,
            self._answered(clock, "POST", url, body.encode(), more) as response,
        ):
            return HttpResponse(response.status, headers=httpx.Headers(response.headers))

    @contextlib.contextmanager
    def _answered(
        self,
        clock: "_Clock",
        method: str,
        url: httpx.URL,
        content: bytes | None = None,
        more: Mapping[str, str] | None = None,
    ) -> Iterator[httpcore.Response]:
        """A response under way, every failure of which is WebFailed."""
        headers = {
            "host": url.netloc.decode("ascii"),
            "accept": "*/*",
            # Compressed bodies are neither asked for nor taken: images are compressed as they are.
            "accept-encoding": "identity",
            "user-agent": "gradcam-worker",  # some hosts refuse who does not say
            **(more or {}),
        }
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        left = clock.left_s()
        watched: dict[str, Any] = {
            "trace": clock.trace,
            "timeout": {"connect": left, "read": left, "write": left, "pool": left},
        }
        try:
            with self._pool.stream(
                method, target, headers=list(headers.items()), content=content, extensions=watched
            ) as response:
                yield response
        except FAILURES as error:
            raise HttpFailed(clock.verdict(error) or str(error) or type(error).__name__) from error
        if late := clock.verdict():  # a connection that is cut can look like the end of a body
            raise HttpFailed(late)


def _joined(url: httpx.URL, location: str) -> str:
    """Where a redirect leads; the door is still to be passed. Raises UriNotAllowed for what is no URL."""
    try:
        return str(url.join(location))
    except (httpx.InvalidURL, ValueError):
        message = f"{url.host} redirects: {_no_url(location)}"
        raise UriNotAllowed(message) from None


def _no_url(text: str) -> str:
    # Nothing of what the parser says, which may hold half a password.
    return f"{without_secrets(text)[:200]!r} is not a URL: its host or its port cannot be read."


def _body(response: httpcore.Response, headers: httpx.Headers, max_bytes: int) -> bytes:
    encoding = headers.get("content-encoding", "identity")
    if encoding != "identity":
        message = f"its body is encoded ({encoding[:40]}), which was not asked for"
        raise HttpFailed(message)
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        if len(body) > max_bytes:
            break
    return bytes(body[: max_bytes + 1])


class _Clock:
    """Cuts the connections of a request that takes too long: a socket limits each read, not their sum."""

    def __init__(self, seconds: float, deadline: Deadline | None = None) -> None:
        self._seconds = max(seconds, SHORTEST_S)
        self._end = time.monotonic() + self._seconds
        self._deadline = deadline
        self._done, self._expired = threading.Event(), threading.Event()
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self._watch, name="http-timeout", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(self.left_s(), POLL_CANCELLED_S)):
            if time.monotonic() >= self._end or (self._deadline and not self._deadline.left_s()):
                self._cut()
                return

    def left_s(self) -> float:
        """For whatever comes next, in seconds."""
        return max(self._end - time.monotonic(), SHORTEST_S)

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpcore as a request proceeds; TLS replaces the socket.

        What has no connection yet to be cut, a name server's answer, a connection or TLS in the making, is
        bounded as a whole by the time that httpcore is given for it.
        """
        if event in {"connection.connect_tcp.complete", "connection.start_tls.complete"}:
            self._sockets.append(info["return_value"].get_extra_info("socket"))
            if self._expired.is_set():
                self._cut()

    def verdict(self, error: Exception | None = None) -> str | None:
        """What to say where the time is up."""
        late = f"timed out after {self._seconds:.3g} s"
        if isinstance(error, httpcore.TimeoutException) and str(error) not in {"", "timed out"}:
            return f"{late}: {error}"
        return late if self._expired.is_set() or isinstance(error, httpcore.TimeoutException) else None

    def _cut(self) -> None:
        self._expired.set()
        for connection in tuple(self._sockets):
            with contextlib.suppress(OSError):
                # Not an SSLSocket's own shutdown: that takes the encryption off while another thread reads.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
