"""What live workers offer."""

import json

from fastapi.testclient import TestClient


def test_networks_and_workers_are_those_of_live_workers(waiting: TestClient) -> None:
    assert waiting.get("/v1/networks").json() == {"networks": []}
    report = {"device": "cpu", "running": 1, "version": "2", "networks": {"catalog": ["vgg16"]}}
    ledger = waiting.app.state.gateway.client.client._ledger  # type: ignore[attr-defined]
    ledger.renew_leases("gpu-1:7", json.dumps(report), {})
    (network,) = waiting.get("/v1/networks").json()["networks"]
    assert (network["name"], network["input_size"], network["workers"]) == ("vgg16", [224, 224], 1)
    (worker,) = waiting.get("/v1/workers").json()["workers"]
    assert (worker["id"], worker["running"], worker["networks"]) == ("gpu-1:7", 1, ["vgg16"])
