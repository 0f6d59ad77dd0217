"""Two tenants of the HTTP API, a real worker, a real bucket: what each gets, and what none gets at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from gradcam_worker.gateway.access.api_keys import ApiKey, ApiKeys
from gradcam_worker.gateway.access.tenants import SCOPES, TenantPolicy, Tenants
from gradcam_worker.ledger.redis.store import RedisLedger
from tests.live.test_gateway import serving, wait_for

pytestmark = [pytest.mark.live]

NETWORK = "efficientnet_lite0"


@dataclass
class Customers:
    """An API with two tenants."""

    address: str
    stage: Any
    ledger: RedisLedger
    keys: dict[str, str]

    def call(self, tenant: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[tenant]}", **options.pop("headers", {})}
        return httpx.request(method, f"{self.address}{path}", headers=headers, timeout=90, **options)

    def submit(self, tenant: str, **job: Any) -> httpx.Response:
        wanted = {"network": NETWORK, "top_n": 1, **job}
        return self.call(tenant, "POST", "/v1/jobs", json=wanted, headers={"Prefer": "wait=60"})


@pytest.fixture(scope="module")
def customers(make_stage: Callable[..., Any], photos: Any, public_server: Any) -> Iterator[Customers]:
    stage = make_stage("tenants", uploads="s3://photos/uploads")
    ledger = RedisLedger(stage.settings)
    keys = {}
    for name in ("acme", "globex"):
        policy = TenantPolicy.make(
            name=name,
            inputs=[f"s3://photos/{name}", f"http://{public_server.host}/{name}"],
            output=f"s3://results/cams/{name}",
            uploads=f"s3://photos/uploads/{name}",
            scopes=SCOPES,
        )
        Tenants(ledger.server).store(policy)
        keys[name], record = ApiKey.make(name, scopes=SCOPES)
        ApiKeys(ledger.server).store(record)
        stage.put(f"{name}/1.jpg", (photos / "coffee.jpg").read_bytes())
    with stage.worker("worker", tiny=True), serving(stage) as (address, _):
        yield Customers(address, stage, ledger, keys)


def test_a_tenants_results_lie_in_its_own_place_and_its_urls_open_nothing_else(customers: Customers) -> None:
    document = customers.submit("acme", image="s3://photos/acme/1.jpg").json()
    assert document["status"] == "succeeded", document
    assert document["result"]["manifest_uri"].startswith("s3://results/cams/acme/")
    foreign = customers.submit("globex", image="s3://photos/globex/1.jpg").json()
    result = customers.call("acme", "GET", f"/v1/jobs/{document['id']}/result").json()
    uri, url = next(iter(result["urls"].items()))
    assert httpx.get(url).status_code == 200
    other = foreign["result"]["manifest_uri"].removeprefix("s3://results/")
    moved = url.replace(uri.removeprefix("s3://results/"), other)
    assert moved != url
    assert httpx.get(moved).status_code == 403
    assert httpx.get(url.partition("?")[0]).is_client_error
    assert httpx.put(url, content=b"planted").status_code == 403


def test_an_upload_goes_nowhere_but_to_the_key_that_was_chosen(customers: Customers) -> None:
    wanted = {"media_type": "image/jpeg", "bytes": 4}
    target = customers.call("acme", "POST", "/v1/uploads", json=wanted).json()
    name = target["uri"].rpartition("/")[2]
    for path in ("uploads/globex/1.jpg", "globex/1.jpg", f"uploads/acme/../globex/{name}"):
        moved = target["url"].replace(f"uploads/acme/{name}", path)
        assert httpx.put(moved, content=b"\xff\xd8\xff1", headers=target["headers"]).status_code == 403, path
    assert httpx.get(target["url"]).status_code == 403
    assert httpx.delete(target["url"]).status_code == 403


def test_no_redirect_leads_a_tenants_job_to_another_place(
    customers: Customers, public_server: Any, answer: Any, photos: Any
) -> None:
    photo = (photos / "coffee.jpg").read_bytes()
    secret = public_server.url("/globex/secret.jpg", answer(200, photo))
    here = public_server.url("/acme/here.jpg", answer(200, photo))
    away = public_server.url("/acme/away.jpg", answer(302, headers={"location": "/globex/secret.jpg"}))
    assert customers.submit("acme", image=here).json()["status"] == "succeeded"
    before = [path for path, _ in public_server.received].count("/globex/secret.jpg")
    assert customers.submit("acme", image=secret).status_code == 422
    refused = customers.submit("acme", image=away).json()
    assert (refused["status"], refused["error"]["code"]) == ("failed", "uri_not_allowed")
    assert public_server.host not in refused["error"]["detail"]
    assert [path for path, _ in public_server.received].count("/globex/secret.jpg") == before


def test_a_backfill_explains_the_images_of_its_tenant_alone_and_counts_for_it(
    customers: Customers, public_server: Any
) -> None:
    rows = ["s3://photos/acme/1.jpg", "s3://photos/globex/1.jpg", "s3://photos/acme/../globex/1.jpg"]
    rows.append(f"http://{public_server.host}/acme/here.jpg")
    customers.stage.put("acme/list.csv", "\n".join(["uri", *rows, ""]).encode())
    wanted = {
        "input": "s3://photos/acme/list.csv",
        "output": "s3://results/cams/acme/list",
        "network": NETWORK,
    }
    before = sum(day.device_s for day in customers.ledger.read_usage("acme", 2))
    started = customers.call(
        "acme", "POST", "/v1/backfills", json={**wanted, "target": {"top_n": 1}, "max_failed": 1}
    )
    assert started.status_code == 202, started.text
    place = started.headers["location"]
    wait_for(lambda: customers.call("acme", "GET", place).json()["state"] == "complete", "the dataset")
    dataset = customers.call("acme", "GET", place).json()["dataset"]
    assert (dataset["rows"], dataset["failed"]) == (4, 3)
    assert customers.call("globex", "GET", place).status_code == 404
    assert customers.call("globex", "POST", f"{place}/cancel").status_code == 404
    stolen = {**wanted, "output": "s3://results/cams/globex/list", "target": {"top_n": 1}}
    assert customers.call("globex", "POST", "/v1/backfills", json=stolen).status_code == 422
    assert sum(day.device_s for day in customers.ledger.read_usage("acme", 2)) > before
