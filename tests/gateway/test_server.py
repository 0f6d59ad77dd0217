"""`gradcam serve`: what it says of itself at the port of the metrics."""

import asyncio
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from gradcam_worker.gateway import server
from gradcam_worker.gateway.app import create_app
from gradcam_worker.gateway.http.limited_protocol import MAX_HEAD_BYTES, PIECE_BYTES
from gradcam_worker.operations import servers
from gradcam_worker.settings import Settings


@pytest.fixture
def ports() -> tuple[int, int]:
    return servers.free_port(), servers.free_port()


@pytest.fixture
def gateway(ports: tuple[int, int]) -> Iterator[Any]:
    """A server whose ledger does not answer, in a thread; it is stopped at the end."""
    port, metrics_port = ports
    settings = Settings(broker_url=f"redis://127.0.0.1:{servers.free_port()}/0", metrics_port=metrics_port)
    app = create_app(settings)
    serving = server._make_server(app)
    server._serve_metrics(settings, app.state.gateway, serving)
    listener = server._listen("127.0.0.1", port)
    thread = threading.Thread(target=serving.run, args=([listener],), daemon=True)
    thread.start()
    while not serving.started:
        assert thread.is_alive()
    yield serving
    serving.should_exit = True
    thread.join()


def ask(port: int, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["why"]


def test_it_lives_before_the_ledger_answers_and_is_ready_only_then(
    gateway: Any, ports: tuple[int, int]
) -> None:
    assert gateway.started
    assert ask(ports[1], "/live")[0] == ask(ports[1], "/startup")[0] == 200
    assert ask(ports[1], "/ready") == (503, {"ledger": "has not answered"})
    assert ask(ports[0], "/ready")[0] == 503
    status, metrics = ask(ports[1], "/metrics")
    assert status == 200
    assert b"gradcam_http_open_requests 0.0" in metrics


def test_one_whose_event_loop_hangs_does_not_live(
    gateway: Any, ports: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "READY_TIMEOUT_S", -0.9)  # and a second more
    hangs, goes_on = threading.Event(), threading.Event()

    async def hang() -> None:
        hangs.set()
        goes_on.wait()

    asyncio.run_coroutine_threadsafe(hang(), gateway._loop)
    hangs.wait()
    try:
        assert ask(ports[1], "/live") == (503, {"event loop": "does not answer"})
    finally:
        goes_on.set()


LONG = b"a" * (MAX_HEAD_BYTES + 300_000)  # whatever is read at a time
CHUNKED = b"POST /v1/jobs HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /live?" + LONG,
        b"GET /live HTTP/1.1\r\nHost: here\r\nX-Long: " + LONG,
        b"GET /live HTTP/1.1\r\nHost: here\r\n" + b"X-Many: a\r\n" * (MAX_HEAD_BYTES // 6),
        CHUNKED + b"1;extension=" + LONG,
        CHUNKED + b"1\r\n \r\n0\r\nX-Trailer: " + LONG,
        CHUNKED + b"1\r\n \r\n0\r\n" + b"X-Trailer: a\r\n" * (MAX_HEAD_BYTES // 6),
        b"POST /v1/jobs HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n{}GET /live?" + LONG,
    ],
    ids=["address", "header", "many headers", "extension", "trailer", "many trailers", "second request"],
)
def test_a_head_without_end_is_refused(gateway: Any, ports: tuple[int, int], head: bytes) -> None:
    assert gateway.started
    with socket.create_connection(("127.0.0.1", ports[0]), timeout=30) as caller:
        with suppress(ConnectionError):
            caller.sendall(head)  # and it never ends
        answers = b""
        with suppress(ConnectionError):
            while part := caller.recv(65536):
                answers += part
    assert b"HTTP/1.1 400 Bad Request" in answers
    assert ask(ports[1], "/live")[0] == 200


@pytest.mark.parametrize("in_first_packet", [20, 10_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_body_does_not_count_as_head(
    gateway: Any, ports: tuple[int, int], in_first_packet: int, chunked: bool
) -> None:
    assert gateway.started
    body = b" " * (3 * MAX_HEAD_BYTES + PIECE_BYTES)
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: here\r\nConnection: close\r\nX-Token: " + b"a" * 12_000
    if chunked:
        head += b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = b"%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    else:
        head += b"\r\nContent-Length: %d\r\n\r\n" % len(body)
    request = head + body
    with socket.create_connection(("127.0.0.1", ports[0]), timeout=30) as caller:
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        caller.sendall(request[:in_first_packet])
        time.sleep(0.05)  # so that the rest of the head comes together with the body
        with suppress(ConnectionError):
            caller.sendall(request[in_first_packet:])
        with caller.makefile("rb") as answer:
            assert b"401" in answer.readline()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_every_address_is_those_of_ipv6_and_of_ipv4() -> None:
    with server._listen("::", 0) as listener:
        for host in ("::1", "127.0.0.1"):
            with socket.create_connection((host, listener.getsockname()[1])):
                pass


def test_requests_that_cannot_be_read_are_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    uvicorns = logging.getLogger("uvicorn.error")
    counted = server.UnreadableRequests()
    uvicorns.addFilter(counted)
    try:
        for _ in range(100):
            uvicorns.warning("Invalid HTTP request received.")
        uvicorns.error("Exception in ASGI application")
        uvicorns.warning("Exceeded concurrency limit.")
    finally:
        uvicorns.removeFilter(counted)
    assert caplog.messages == [
        'requests_unreadable requests=1 reason="Invalid HTTP request received."',
        "Exception in ASGI application",
        "Exceeded concurrency limit.",
    ]


@pytest.mark.parametrize(
    ("request_", "answer", "reason"),
    [
        (b"GET /live HTTP/1.1\r\nHost: here\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", b"200", None),
        (
            b"GET /live HTTP/1.1\r\nX-Long: " + LONG,
            b"400",
            f"The head of a request has at most {MAX_HEAD_BYTES} bytes.",
        ),
        (b"no request\r\n\r\n", b"400", "Invalid HTTP request received."),
    ],
    ids=["for another protocol", "too large", "no HTTP"],
)
def test_only_a_request_that_cannot_be_read_is_told_as_unreadable(
    gateway: Any,
    ports: tuple[int, int],
    request_: bytes,
    answer: bytes,
    reason: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert gateway.started
    uvicorns, counted = logging.getLogger("uvicorn.error"), server.UnreadableRequests()
    uvicorns.addFilter(counted)
    try:
        with socket.create_connection(("127.0.0.1", ports[0]), timeout=30) as caller:
            with suppress(ConnectionError):
                caller.sendall(request_)
            with caller.makefile("rb") as answered:
                assert answer in answered.readline()
    finally:
        uvicorns.removeFilter(counted)
    told = [one for one in caplog.messages if "equest" in one or "WebSocket" in one]
    assert told == ([f'requests_unreadable requests=1 reason="{reason}"'] if reason else [])
