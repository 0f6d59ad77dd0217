"""HTTP, with the hosts that the operator names and with no others: the only import of httpx."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import httpx

from worker.errors import UriNotAllowed
from worker.settings import without_secrets

MAX_REDIRECTS = 3


class WebFailed(Exception):
    """No answer, half an answer, or one that cannot be used. Says what happened, without the URL."""


@dataclass(frozen=True)
class Answer:
    """What a server said; of its body never more than one byte above the limit."""

    status: int
    body: bytes = b""


class Web:
    """A client behind a list of hosts. Nothing is connected before the first request."""

    def __init__(self, hosts: tuple[str, ...], schemes: tuple[str, ...], setting: str) -> None:
        """`hosts` are exact, `host` or `host:port`; `setting` is named when another one is refused."""
        self._hosts, self._setting = hosts, setting
        self._schemes = {"http", "https"} & set(schemes)
        # No connection is used twice, so that each one is known to the clock that may have to cut it. A
        # proxy or netrc of the machine must not decide where requests go.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(follow_redirects=False, trust_env=False, limits=limits)

    def allowed(self, text: str) -> httpx.URL:
        """The URL to request, parsed once, so that what is checked is what is used. Raises UriNotAllowed."""
        try:
            url = httpx.URL(text)
            host = f"{url.host}:{url.port}" if url.port else url.host
        except (httpx.InvalidURL, UnicodeError) as error:
            message = f"{without_secrets(text[:200])!r} is not a URL: {error}"
            raise UriNotAllowed(message) from error
        if url.scheme not in self._schemes or host not in self._hosts:
            hosts = ", ".join(self._hosts) or "none"
            message = f"{url.scheme}://{host} is not allowed: {self._setting} allows {hosts}."
            raise UriNotAllowed(message)
        if url.userinfo:
            message = f"A user or password in a URL ({host}) is not allowed: it would be kept in the ledger."
            raise UriNotAllowed(message)
        return url

    def get(self, text: str, *, max_bytes: int, seconds: float) -> Answer:
        """Fetch a URL within `seconds`, redirects and all; each hop passes the same door.

        Raises UriNotAllowed, WebFailed.
        """
        with _Clock(seconds) as clock:
            for _ in range(MAX_REDIRECTS + 1):
                url = self.allowed(text)
                with self._answered(clock, "GET", url) as response:
                    if not response.has_redirect_location:
                        return Answer(response.status_code, _body(response, max_bytes))
                    text = str(url.join(response.headers["location"]))
        message = f"it redirects more than {MAX_REDIRECTS} times"
        raise WebFailed(message)

    def post(self, text: str, body: str, *, seconds: float) -> Answer:
        """Post JSON within `seconds`; the answer's body is not read, and no redirect followed.

        Raises UriNotAllowed, WebFailed.
        """
        url = self.allowed(text)
        headers = {"content-type": "application/json"}
        with (
            _Clock(seconds) as clock,
            self._answered(clock, "POST", url, content=body, headers=headers) as answer,
        ):
            return Answer(answer.status_code)

    @contextlib.contextmanager
    def _answered(
        self, clock: "_Clock", method: str, url: httpx.URL, **more: Any
    ) -> Iterator[httpx.Response]:
        """A response under way, every failure of which is WebFailed."""
        # Compressed bodies are neither asked for nor taken: images are compressed as they are.
        headers = {"accept-encoding": "identity", **more.pop("headers", {})}
        watched: dict[str, Any] = {"extensions": {"trace": clock.trace}, "timeout": clock.seconds}
        try:
            with self._client.stream(method, url, headers=headers, **watched, **more) as response:
                yield response
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise WebFailed(clock.verdict() or str(error) or type(error).__name__) from error
        if late := clock.verdict():  # a connection that is cut can look like the end of a body
            raise WebFailed(late)


def _body(response: httpx.Response, max_bytes: int) -> bytes:
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        message = f"its body is encoded ({encoding[:40]}), which was not asked for"
        raise WebFailed(message)
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            break
    return bytes(body[: max_bytes + 1])


class _Clock:
    """Cuts the connections of a request that takes too long: httpx limits each read, not their sum."""

    def __init__(self, seconds: float) -> None:
        self.seconds = max(seconds, 0.01)
        self._expired = threading.Event()
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(self.seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def trace(self, event: str, info: dict[str, Any]) -> None:
        """Called by httpx as a request proceeds; TLS replaces the socket."""
        if event in {"connection.connect_tcp.complete", "connection.start_tls.complete"}:
            self._sockets.append(info["return_value"].get_extra_info("socket"))
            if self._expired.is_set():
                self._cut()

    def verdict(self) -> str | None:
        """What to say where the time is up."""
        return f"timed out after {self.seconds:.3g} s" if self._expired.is_set() else None

    def _cut(self) -> None:
        self._expired.set()
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
