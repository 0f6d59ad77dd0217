"""How much a client logs while Redis is unreachable."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.gateway.access.caller import Access
from gradcam_worker.gateway.app import create_app
from gradcam_worker.operations import servers
from gradcam_worker.resilience import outages
from gradcam_worker.resilience.outages import Outage, Outages
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.settings import Settings

JOB = new_id()


@pytest.mark.parametrize("kind", ["blocking", "asyncio", "gateway"])
def test_an_outage_is_one_line_at_its_start_and_one_at_its_end_whoever_asks(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "RECOVERED_AFTER_S", 0)
    caplog.set_level("INFO", "gradcam")
    port = servers.free_port()
    settings = Settings(broker_url=f"redis://127.0.0.1:{port}/0", key_prefix=f"{new_id()}:")
    client = GradcamClient(settings=settings, outages=Outages(Outage("ledger"), Outage("broker")))
    ask: Callable[[], object]
    if kind == "blocking":
        ask = lambda: client.statuses([JOB])  # noqa: E731
    elif kind == "asyncio":
        ask = lambda: asyncio.run(AsyncGradcamClient(client=client).statuses([JOB]))  # noqa: E731
    else:
        ask = lambda: asyncio.run(list_jobs(settings, client))  # noqa: E731
    with pytest.raises(LedgerUnavailable, match="cannot be reached"):
        ask()  # a dozen times
    with servers.valkey(tmp_path, port=port):
        ask()
        ask()
    lines = [message.split()[0] for message in caplog.messages if message.startswith("server_")]
    assert lines == ["server_unreachable", "server_reachable_again"]
    assert "Error 111" in caplog.text
    client.close()


async def list_jobs(settings: Settings, client: GradcamClient) -> None:
    """By the HTTP API. Raises LedgerUnavailable where it answers 503."""
    access = Access(settings, loopback=True, outage=client.outages.ledger)
    app = create_app(settings, client=AsyncGradcamClient(client=client), access=access)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as browser:
        answer = await browser.get("/v1/jobs")
    await access.close()
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        message = "It cannot be reached."
        raise LedgerUnavailable(message)
    answer.raise_for_status()
