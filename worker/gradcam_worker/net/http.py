"""HTTP requests, to hosts that the operator allows. The only module that uses httpx."""

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
from gradcam_worker.net.allowlist import HostAllowlist
from gradcam_worker.net.dialer import Dialer, Resolve, look_up
from gradcam_worker.net.ip_policy import parse_networks
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.model import describe_excess_length
from gradcam_worker.text.urls import parse, without_secrets

MAX_REDIRECTS = 3
REDIRECTS = {301, 302, 303, 307, 308}
DEFAULT_PORTS = {"http": 80, "https": 443}
MIN_TIMEOUT_S = 0.01  # for a socket, 0 means "non-blocking"
CANCEL_POLL_INTERVAL_S = 0.5
FAILURES = (
    httpcore.ConnectionNotAvailable,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
    UnicodeError,  # from TLS, for a host name that is too long
)


class HttpFailed(Exception):
    """There was no answer, a partial one, or one that cannot be used. The message omits the URL."""


@dataclass(frozen=True)
class HttpResponse:
    """A server's answer; its body is cut off one byte after the limit."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)  # names are case-insensitive


class HttpClient:
    """An HTTP client that is limited to allowed hosts and addresses. Thread-safe."""

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
        """Nothing is connected before the first request.

        Args:
            hosts: The allowed hosts, as `net.allowlist` reads them.
            schemes: The allowed ones of http and https; others are ignored.
            setting: The name of the setting with the hosts, for error messages.
            private_networks: Networks that may be connected to besides public addresses.
            resolve: Looks up the addresses of a host.
            tls: The trusted certificates; None: the public authorities.
        """
        self._entries, self._hosts, self._setting = hosts, HostAllowlist(hosts), setting
        self._schemes = DEFAULT_PORTS.keys() & set(schemes)
        # Connections are not reused, so that the request's timer knows those that it may have to close. The
        # machine's proxy settings and netrc must not decide where requests go: httpcore reads neither.
        self._pool = httpcore.ConnectionPool(
            tls or httpx.create_ssl_context(trust_env=False),
            max_connections=None,
            max_keepalive_connections=0,
            network_backend=Dialer(parse_networks(private_networks), resolve),
        )

    def check_url(self, text: str) -> httpx.URL:
        """Return the URL to request, parsed and checked. Raises UriNotAllowed."""
        if problem := describe_excess_length(text):
            message = f"{without_secrets(text)[:200]!r}... is not allowed: {problem}."
            raise UriNotAllowed(message)
        try:
            url = httpx.URL(text)
            host = url.raw_host.decode("ascii")
        except (httpx.InvalidURL, UnicodeError):
            raise UriNotAllowed(_unreadable(text)) from None
        default_port = DEFAULT_PORTS.get(url.scheme, 0)
        port = default_port if url.port is None else url.port
        if url.scheme not in self._schemes or not self._hosts.allows(host, port, default_port):
            hosts = ", ".join(self._entries) or "none"
            netloc = url.netloc.decode("ascii") if parse(text) else "..."  # without user and password
            message = f"{url.scheme}://{netloc} is not allowed: {self._setting} allows {hosts}."
            raise UriNotAllowed(message)
        if url.userinfo:
            message = f"A user or password in a URL ({host}) is not allowed: it would be kept in the ledger."
            raise UriNotAllowed(message)
        return url

    def get(
        self,
        text: str,
        *,
        max_bytes: int,
        seconds: float,
        deadline: Deadline | None = None,
        redirects: bool = True,
    ) -> HttpResponse:
        """Fetch a URL. Each redirect is checked as the first URL is.

        Args:
            text: The URL.
            max_bytes: Limit of the body: more is cut off, one byte after the limit.
            seconds: Time for everything, redirects included.
            deadline: The job's: when it is over or cancelled, the request ends.
            redirects: Whether redirects are followed.

        Returns:
            The last answer.

        Raises:
            UriNotAllowed: The URL, or one that it redirects to, is not allowed, or redirects are not.
            HttpFailed: There is no usable answer.
        """
        with _Timer(seconds, deadline) as timer:
            for _ in range(MAX_REDIRECTS + 1):
                url = self.check_url(text)
                with self._request(timer, "GET", url) as response:
                    headers = httpx.Headers(response.headers)
                    location = headers.get("location")
                    if response.status not in REDIRECTS or location is None:
                        return HttpResponse(response.status, _body(response, headers, max_bytes), headers)
                    text = _redirect_url(url, location)
                    if not redirects:
                        message = f"{url.host} redirects, which is not allowed: name the address itself."
                        raise UriNotAllowed(message)
        message = f"it redirects more than {MAX_REDIRECTS} times"
        raise HttpFailed(message)

    def post(
        self, text: str, body: str, *, seconds: float, headers: Mapping[str, str] | None = None
    ) -> HttpResponse:
        """Post JSON; the answer's body is not read, and redirects are not followed.

        Args:
            text: The URL.
            body: The JSON.
            seconds: Time for everything.
            headers: Added to the usual ones.

        Returns:
            The answer, without its body.

        Raises:
            UriNotAllowed: The URL is not allowed.
            HttpFailed: There is no usable answer.
        """
        url = self.check_url(text)
        more = {"content-type": "application/json", **(headers or {})}
        with (
            _Timer(seconds) as timer,
            self._request(timer, "POST", url, body.encode(), more) as response,
        ):
            return HttpResponse(response.status, headers=httpx.Headers(response.headers))

    @contextlib.contextmanager
    def _request(
        self,
        timer: "_Timer",
        method: str,
        url: httpx.URL,
        content: bytes | None = None,
        more: Mapping[str, str] | None = None,
    ) -> Iterator[httpcore.Response]:
        """Send a request; yield the response. Raises HttpFailed."""
        headers = {
            "host": url.netloc.decode("ascii"),
            "accept": "*/*",
            # Compressed bodies are neither requested nor accepted: images are compressed already.
            "accept-encoding": "identity",
            "user-agent": "gradcam-worker",  # some hosts refuse requests without it
            **(more or {}),
        }
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        left = timer.left_s()
        extensions: dict[str, Any] = {
            "trace": timer.trace,
            "timeout": {"connect": left, "read": left, "write": left, "pool": left},
        }
        try:
            with self._pool.stream(
                method, target, headers=list(headers.items()), content=content, extensions=extensions
            ) as response:
                yield response
        except FAILURES as error:
            raise HttpFailed(timer.timeout_message(error) or str(error) or type(error).__name__) from error
        if message := timer.timeout_message():  # a closed connection can look like the end of a body
            raise HttpFailed(message)


def _redirect_url(url: httpx.URL, location: str) -> str:
    """The URL that a redirect leads to, not yet checked. Raises UriNotAllowed if it cannot be read."""
    try:
        return str(url.join(location))
    except (httpx.InvalidURL, ValueError):
        message = f"{url.host} redirects: {_unreadable(location)}"
        raise UriNotAllowed(message) from None


def _unreadable(text: str) -> str:
    # Without the parser's message, which may contain half a password.
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


class _Timer:
    """Closes the connections of a request that takes too long: a socket limits each read, not their sum."""

    def __init__(self, seconds: float, deadline: Deadline | None = None) -> None:
        self._seconds = max(seconds, MIN_TIMEOUT_S)
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
        while not self._done.wait(min(self.left_s(), CANCEL_POLL_INTERVAL_S)):
            if time.monotonic() >= self._end or (self._deadline and not self._deadline.left_s()):
                self._close_connections()
                return

    def left_s(self) -> float:
        """The time that is left, in seconds."""
        return max(self._end - time.monotonic(), MIN_TIMEOUT_S)

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Record each new socket; httpcore calls this as a request proceeds. TLS replaces the socket.

        Before there is a socket to close, during the lookup, the connection and the TLS handshake, httpcore's
        timeout limits the whole.
        """
        if event in {"connection.connect_tcp.complete", "connection.start_tls.complete"}:
            self._sockets.append(info["return_value"].get_extra_info("socket"))
            if self._expired.is_set():
                self._close_connections()

    def timeout_message(self, error: Exception | None = None) -> str | None:
        """Return an error message if the time is up, else None."""
        late = f"timed out after {self._seconds:.3g} s"
        if isinstance(error, httpcore.TimeoutException) and str(error) not in {"", "timed out"}:
            return f"{late}: {error}"
        return late if self._expired.is_set() or isinstance(error, httpcore.TimeoutException) else None

    def _close_connections(self) -> None:
        self._expired.set()
        for connection in tuple(self._sockets):
            with contextlib.suppress(OSError):
                # SSLSocket's own `shutdown` would remove the encryption while another thread reads.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
