"""`gradcam serve`: what it says of itself at the port of the metrics."""

import asyncio
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from gradcam_worker.gateway import server
from gradcam_worker.gateway.app import create_app
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
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, lifespan="on", ws="none")
    serving = server._Server(config, app.state.gateway.open_requests.closing)
    server._serve_metrics(settings, app.state.gateway, serving)
    thread = threading.Thread(target=serving.run, daemon=True)
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


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_every_address_is_those_of_ipv6_and_of_ipv4() -> None:
    with server._listen("::", 0) as listener:
        for host in ("::1", "127.0.0.1"):
            with socket.create_connection((host, listener.getsockname()[1])):
                pass
