"""Every route of the HTTP API, tried with every key that should not open it, and with another tenant's ids.

`ROUTES` names every route of the app. A new one without an entry fails the first test.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient
from starlette.responses import Response as StarletteResponse

from gradcam_worker.client.async_client import AsyncGradcamClient
from gradcam_worker.gateway.access.api_keys import ApiKey, ApiKeys, read_prefix
from gradcam_worker.gateway.access.caller import Access
from gradcam_worker.gateway.access.tenants import SCOPES, Scope, TenantPolicy, Tenants
from gradcam_worker.gateway.app import create_app
from gradcam_worker.gateway.routes import page as page_routes
from gradcam_worker.gateway.routes.backfills import backfill_id
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryObjects, eager_client
from tests.gateway.conftest import RED, PresignableObjects

OPEN = None  # whoever reaches the app may ask
ACME_IMAGE, GLOBEX_IMAGE = "s3://acme-photos/red.png", "s3://globex-photos/red.png"


@dataclass(frozen=True)
class Route:
    """How a route is called."""

    method: str
    path: str  # {id}: of a job or backfill
    scope: Scope | None
    body: dict[str, Any] = field(default_factory=dict)


JOB = {"image": ACME_IMAGE, "network": "vgg16", "top_n": 1}
UPLOAD = {"media_type": "image/png", "bytes": 100}
ROUTES = {
    "submit_job": Route("POST", "/v1/jobs", "submit", {"json": JOB}),
    "read_job": Route("GET", "/v1/jobs/{id}", "read"),
    "cancel_job": Route("POST", "/v1/jobs/{id}/cancel", "submit"),
    "retry_job": Route("POST", "/v1/jobs/{id}/retry", "submit"),
    "job_events": Route("GET", "/v1/jobs/{id}/events", "read"),
    "job_result": Route("GET", "/v1/jobs/{id}/result", "read"),
    "create_upload": Route("POST", "/v1/uploads", "submit", {"json": UPLOAD}),
    "list_jobs": Route("GET", "/v1/jobs", "read"),
    "job_viewer": Route("GET", "/v1/jobs/{id}/viewer", "read"),
    "submit_backfill": Route("POST", "/v1/backfills", "backfills", {"json": {}}),
    "list_backfills": Route("GET", "/v1/backfills", "backfills"),
    "read_backfill": Route("GET", "/v1/backfills/{id}", "backfills"),
    "cancel_backfill": Route("POST", "/v1/backfills/{id}/cancel", "backfills"),
    "list_networks": Route("GET", "/v1/networks", "read"),
    "list_workers": Route("GET", "/v1/workers", "operate"),
    "metrics": Route("GET", "/metrics", "operate"),
    "live": Route("GET", "/live", OPEN),
    "ready": Route("GET", "/ready", OPEN),
    "openapi": Route("GET", "/openapi.json", OPEN),
    "page": Route("GET", "/", OPEN),
    **{name: Route("GET", f"/static/{name}", OPEN) for name in page_routes.FILES},
}
GUARDED = {name: route for name, route in ROUTES.items() if route.scope}
OF_A_JOB = {name: route for name, route in ROUTES.items() if route.path.startswith("/v1/jobs/{id}")}
guarded = pytest.mark.parametrize("route", GUARDED.values(), ids=GUARDED)
of_a_job = pytest.mark.parametrize("route", OF_A_JOB.values(), ids=OF_A_JOB)


@dataclass
class Api:
    """The app with two tenants, their keys, and a job of each."""

    http: TestClient
    server: RedisServer
    images: dict[str, Any]
    keys: dict[str, str] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)

    def key(self, tenant: str, **options: Any) -> str:
        """Make a key."""
        key, record = ApiKey.make(tenant, **{"scopes": SCOPES, **options})
        ApiKeys(self.server).store(record)
        return key

    def call(self, route: Route, key: str | None, job_id: str = "", **options: Any) -> Any:
        """Call a route."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers |= options.pop("headers", {})
        path = route.path.format(id=job_id or self.jobs.get("acme"))
        return self.http.request(route.method, path, headers=headers, **{**route.body, **options})


def policy(name: str, **changes: Any) -> TenantPolicy:
    fields: dict[str, Any] = {
        "name": name,
        "inputs": [f"s3://{name}-photos"],
        "output": f"s3://results/{name}",
        "uploads": f"s3://uploads/{name}",
        "scopes": SCOPES,
        "rate": 10_000,
        "burst": 10_000,
    }
    return TenantPolicy.make(**{**fields, **changes})


@pytest.fixture(scope="module")
def api(valkey: str) -> Iterator[Api]:
    settings = Settings(broker_url=valkey, key_prefix="routes-access:", uploads="s3://uploads")
    server = RedisServer(settings)
    for name in ("acme", "globex"):
        Tenants(server).store(policy(name))
    client = eager_client({ACME_IMAGE: RED, GLOBEX_IMAGE: RED}, settings=settings)
    objects = cast(MemoryObjects, client.calls._objects)
    app = create_app(
        settings,
        client=AsyncGradcamClient(client=client),
        access=Access(settings, loopback=True),
        objects=PresignableObjects(objects.store, objects.images),
    )
    with TestClient(app, base_url="http://127.0.0.1:8000", follow_redirects=False) as http:
        made = Api(http, server, objects.images)
        made.keys = {name: made.key(name) for name in ("acme", "globex")}
        for name, image in (("acme", ACME_IMAGE), ("globex", GLOBEX_IMAGE)):
            answer = made.call(ROUTES["submit_job"], made.keys[name], json={**JOB, "image": image})
            assert answer.status_code == 202, answer.text
            made.jobs[name] = answer.json()["id"]
        made.jobs["nobody"] = client.submit(image=ACME_IMAGE, network="vgg16", target={"top_n": 1})
        yield made
    server.redis.delete(f"{server.prefix}tenants", f"{server.prefix}api_keys")


def same(answer: Any) -> tuple[int, str, dict[str, str]]:
    """What of an answer a stranger can compare."""
    return answer.status_code, answer.text, {name: answer.headers[name] for name in sorted(answer.headers)}


def routes_of(router: Any) -> Iterator[Any]:
    """Every route below a router."""
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        yield from routes_of(inner) if inner else [route]


def test_every_route_of_the_app_is_in_the_table(api: Api) -> None:
    there = {
        (method, re.sub(r"{\w+}", "{id}", route.path))
        for route in routes_of(api.http.app)
        for method in getattr(route, "methods", None) or {"GET"}
        if method != "HEAD"
    }
    assert there == {(route.method, route.path) for route in ROUTES.values()}


@guarded
def test_no_route_opens_without_a_valid_key(api: Api, route: Route) -> None:
    expired = api.key("acme", expires_at=datetime.now(UTC) - timedelta(seconds=1))
    revoked = api.key("acme")
    record = ApiKeys(api.server).find(read_prefix(revoked) or "")
    assert record
    ApiKeys(api.server).revoke(record)
    strange, _ = ApiKey.make("acme")  # never stored
    orphan = api.key("gone")
    answers = []
    forged = api.keys["acme"][:-1] + "!"
    for key in (expired, revoked, "gck_", "*", "null", strange, orphan, forged, None):
        answer = api.call(route, key)
        assert answer.status_code == 401, (key, answer.text)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["code"] == "invalid_api_key"
        answers.append(same(answer))
    for answer, word in zip(answers[:2], ("expired", "was revoked"), strict=True):
        assert word in answer[1], "told to whoever has the whole key"
    assert all(answer == answers[2] for answer in answers[2:-1]), "nothing is told of which keys exist"
    assert "gradcam keys create" in answers[-1][1]
    assert all(same(api.call(route, None, job_id)) == answers[-1] for job_id in ("0", new_id()))


@guarded
def test_a_key_is_taken_from_its_header_alone(api: Api, route: Route) -> None:
    key = api.keys["acme"]
    attempts: list[dict[str, Any]] = [
        {"params": {"key": key, "api_key": key, "access_token": key, "Authorization": f"Bearer {key}"}},
        {"headers": {"Cookie": f"Authorization=Bearer {key}; key={key}"}},
        {"headers": {"X-Api-Key": key, "Proxy-Authorization": f"Bearer {key}"}},
        {"headers": {"X-Forwarded-For": "127.0.0.1", "X-Real-Ip": "127.0.0.1", "Forwarded": "for=127.0.0.1"}},
    ]
    for options in attempts:
        assert api.call(route, None, **options).status_code == 401, options


@guarded
def test_a_key_opens_only_the_routes_of_its_scopes(api: Api, route: Route) -> None:
    others = tuple(scope for scope in SCOPES if scope != route.scope)
    answer = api.call(route, api.key("acme", scopes=others))
    assert (answer.status_code, answer.json()["code"]) == (403, "scope_missing")
    assert f"needs the scope {route.scope}" in answer.json()["errors"][0]["detail"]
    assert api.call(route, api.key("acme", scopes=(route.scope,))).status_code not in {401, 403}


@of_a_job
@pytest.mark.parametrize("owner", ["globex", "nobody"])
def test_another_tenants_job_is_as_one_that_does_not_exist(api: Api, route: Route, owner: str) -> None:
    key = api.keys["acme"]
    before = api.call(ROUTES["read_job"], api.keys["globex"], api.jobs["globex"])
    known = {"If-None-Match": before.headers["etag"], "Last-Event-ID": "1"}
    for options in ({}, {"headers": known}):
        unknown = api.call(route, key, new_id(), **options)
        foreign = api.call(route, key, api.jobs[owner], **options)
        assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_job")
        assert same(foreign) == same(unknown)
    malformed = api.call(route, key, "0")
    assert same(malformed) == same(unknown)
    after = api.call(ROUTES["read_job"], api.keys["globex"], api.jobs["globex"])
    assert same(after) == same(before), "nothing has happened to it"


@guarded
def test_too_many_requests_are_refused_at_every_route(api: Api, route: Route) -> None:
    name = (
        f"slow-{route.method.lower()}{route.path.strip('/').replace('/', '-').replace('{id}', 'id').lower()}"
    )
    Tenants(api.server).store(policy(name, rate=0.001, burst=1))
    key = api.key(name)
    api.call(route, key)
    answer = api.call(route, key)
    assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
    assert 0 < int(answer.headers["retry-after"]) <= 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"image": GLOBEX_IMAGE},
        {"image": "s3://uploads/globex/1.png"},
        {"image": "s3://uploads/acme/../globex/1.png"},
        {"image": "s3://uploads/acme/%2e%2e/globex/1.png"},
        {"image": "s3://acme-photos-2/red.png"},
        {"image": "s3://acme-photos/../globex-photos/red.png"},
        {"image": "file:///etc/passwd"},
        {"image": "http://169.254.169.254/latest/meta-data"},
        {"output": "s3://results/globex"},
        {"output": "s3://results"},
        {"webhooks": [{"url": "https://evil.example/"}]},
        {"priority": "high"},
        {"id": "0" * 26},
    ],
)
def test_no_job_reaches_into_the_places_of_another(api: Api, changes: dict[str, Any]) -> None:
    answer = api.call(ROUTES["submit_job"], api.keys["acme"], json={**JOB, **changes})
    assert answer.status_code == 422, answer.text
    (finding,) = answer.json()["errors"]
    assert finding["pointer"].startswith(f"#/{next(iter(changes))}")
    assert "globex" not in answer.text or "globex" in str(changes), "what it asked for, and no more"
    read = api.call(ROUTES["read_job"], api.keys["globex"], api.jobs["globex"])
    assert read.json()["status"] == "succeeded"


def test_only_a_tenants_own_jobs_are_listed(api: Api) -> None:
    for owner, other in (("acme", "globex"), ("globex", "acme")):
        for query in ({}, {"network": "vgg16"}, {"status": "succeeded"}):
            listed = api.call(ROUTES["list_jobs"], api.keys[owner], params=query)
            ids = {one["id"] for one in listed.json()["jobs"]}
            assert api.jobs[owner] in ids
            assert not {api.jobs[other], api.jobs["nobody"]} & ids
    api.call(ROUTES["submit_job"], api.keys["globex"], json={**JOB, "image": GLOBEX_IMAGE})
    cursor = api.call(ROUTES["list_jobs"], api.keys["globex"], params={"limit": 1}).json()["cursor"]
    assert cursor
    stolen = api.call(ROUTES["list_jobs"], api.keys["acme"], params={"cursor": cursor})
    assert api.jobs["globex"] not in stolen.text


@pytest.mark.parametrize("name", ["read_backfill", "cancel_backfill"])
def test_another_tenants_backfill_is_as_one_that_does_not_exist(api: Api, name: str) -> None:
    outputs = ["s3://results/globex/cams", "s3://results", "s3://results/acme/../globex", "file:///etc"]
    answers = [
        same(api.call(ROUTES[name], api.keys["acme"], backfill_id(output)))
        for output in (*outputs, "no id at all")
    ]
    assert (answers[0][0], "unknown_backfill" in answers[0][1]) == (404, True)
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(
    "changes",
    [
        {"input": "s3://globex-photos/"},
        {"input": "s3://acme-photos/../globex-photos/"},
        {"output": "s3://results/globex/cams"},
        {"output": "s3://results/acme/../globex"},
        {"label_map": "s3://globex-photos/map.json"},
        {"boxes": "s3://globex-photos/instances.json"},
    ],
)
def test_no_backfill_reaches_into_the_places_of_another(api: Api, changes: dict[str, Any]) -> None:
    wanted = {"input": "s3://acme-photos/", "output": "s3://results/acme/cams", "network": "vgg16"}
    body = {**wanted, "target": {"top_n": 1}, **changes}
    answer = api.call(ROUTES["submit_backfill"], api.keys["acme"], json=body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["errors"][0]["pointer"] == f"#/{next(iter(changes))}"


@pytest.mark.parametrize("changes", [{"boxes": "/etc/instances.json"}, {"label_map": "/etc/map.json"}])
def test_no_backfill_reads_a_file_of_the_gateway(api: Api, changes: dict[str, Any]) -> None:
    wanted = {"input": "s3://acme-photos/", "output": "s3://results/acme/cams", "network": "vgg16"}
    body = {**wanted, "target": {"top_n": 1}, **changes}
    assert api.call(ROUTES["submit_backfill"], api.keys["acme"], json=body).status_code == 400


def test_a_tenants_idempotency_keys_are_its_own(api: Api) -> None:
    headers = {"Idempotency-Key": "order-1"}
    acme, globex = (
        api.call(ROUTES["submit_job"], api.keys[name], headers=headers, json={**JOB, "image": image})
        for name, image in (("acme", ACME_IMAGE), ("globex", GLOBEX_IMAGE))
    )
    assert (acme.status_code, globex.status_code) == (202, 202)
    assert acme.json()["id"] != globex.json()["id"]
    again = api.call(ROUTES["submit_job"], api.keys["acme"], headers=headers)
    assert again.json()["id"] == acme.json()["id"]
    other = api.call(
        ROUTES["submit_job"], api.keys["acme"], headers=headers, json={**JOB, "network": "xception"}
    )
    assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")


def test_uploads_go_below_the_tenants_own_prefix(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    target = api.call(ROUTES["create_upload"], api.keys["acme"]).json()
    assert target["uri"].startswith("s3://uploads/acme/")
    assert "/uploads/acme/" in target["url"]
    form: dict[str, Any] = {
        "json": None,
        "data": {"network": "vgg16", "top_n": "1"},
        "files": {"image": ("../../x.png", RED)},
    }
    answer = api.call(ROUTES["submit_job"], api.keys["acme"], **form)
    assert answer.status_code == 202, answer.text
    assert [uri for uri in api.images if uri.startswith("s3://uploads")] == [
        uri for uri in api.images if uri.startswith("s3://uploads/acme/")
    ]
    Tenants(api.server).store(policy("nowhere", uploads=""))
    key = api.key("nowhere")
    assert api.call(ROUTES["create_upload"], key).status_code >= 400
    assert api.call(ROUTES["submit_job"], key, **form).status_code >= 400
    assert "gradcam tenants set nowhere --uploads" in caplog.text


def test_a_result_has_urls_of_its_own_artifacts_alone(api: Api) -> None:
    answer = api.call(ROUTES["job_result"], api.keys["acme"], api.jobs["acme"])
    assert answer.status_code == 200
    assert all(api.jobs["acme"] in uri for uri in answer.json()["urls"])
    assert GLOBEX_IMAGE not in answer.text


def test_a_day_has_so_many_jobs_and_a_refused_one_is_not_counted(api: Api) -> None:
    Tenants(api.server).store(policy("daily", jobs_per_day=1, inputs=["s3://daily-photos"]))
    api.images["s3://daily-photos/1.png"] = RED
    key, job = api.key("daily"), {**JOB, "image": "s3://daily-photos/1.png"}
    refused = [
        api.call(ROUTES["submit_job"], key, json=wrong) for wrong in ({}, JOB, {**job, "output": "s3://x"})
    ]
    assert [answer.status_code for answer in refused] == [422, 422, 422]
    headers = {"Idempotency-Key": "k"}
    first = api.call(ROUTES["submit_job"], key, json=job, headers=headers)
    assert first.status_code == 202
    assert api.call(ROUTES["submit_job"], key, json=job, headers=headers).json()["id"] == first.json()["id"]
    over = api.call(ROUTES["submit_job"], key, json=job)
    assert (over.status_code, over.json()["code"]) == (429, "quota_exceeded")
    assert 0 < int(over.headers["retry-after"]) <= 86_400
    assert api.call(ROUTES["retry_job"], key, first.json()["id"]).status_code == 409, "it has not failed"


def test_a_failed_job_that_is_tried_again_is_one_more_of_the_day(api: Api) -> None:
    Tenants(api.server).store(policy("again", jobs_per_day=1, inputs=["s3://again-photos"]))
    key = api.key("again")
    failed = api.call(ROUTES["submit_job"], key, json={**JOB, "image": "s3://again-photos/lost.png"})
    assert api.call(ROUTES["read_job"], key, failed.json()["id"]).json()["status"] == "failed"
    assert api.call(ROUTES["retry_job"], key, failed.json()["id"]).status_code == 429


def test_what_fails_says_nothing_of_the_operators_places(api: Api) -> None:
    job = {**JOB, "image": "s3://acme-photos/lost.png"}
    answer = api.call(ROUTES["submit_job"], api.keys["acme"], json=job, headers={"Prefer": "wait=5"})
    problem = answer.json()["error"]
    assert (problem["code"], problem["detail"]) == ("image_not_found", problem["public_message"])
    assert answer.json()["worker"] is None
    events = api.call(ROUTES["job_events"], api.keys["acme"], answer.json()["id"])
    assert "s3://acme-photos/lost.png" not in events.text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/{foreign}%2fresult",
        "/v1/jobs/{own}/../{foreign}",
        "/v1/jobs/{own}%2f..%2f{foreign}",
        "/v1/jobs//{foreign}",
        "/V1/jobs/{foreign}",
        "/v1/jobs/{foreign}/",
        "/v1/jobs/{foreign};x",
        "/v1/jobs/{foreign}%00",
        "/v1/jobs/{foreign}%20",
        "//v1/jobs/{foreign}",
        "/v1/jobs/{foreign}/result?job_id={own}",
    ],
)
def test_no_spelling_of_a_path_leads_to_a_foreign_job(api: Api, path: str) -> None:
    asked = path.format(foreign=api.jobs["globex"], own=api.jobs["acme"])
    answer = api.http.get(asked, headers={"Authorization": f"Bearer {api.keys['acme']}"})
    assert answer.status_code in {307, 400, 404}, answer.text
    assert "succeeded" not in answer.text


def test_answers_tell_no_cache_to_keep_them_for_others(api: Api) -> None:
    for name in ("read_job", "job_result"):
        answer: StarletteResponse = api.call(ROUTES[name], api.keys["acme"])
        assert {"private", "no-store"} & set(answer.headers["cache-control"].split(", ")), name
