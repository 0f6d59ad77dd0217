"""The routes of jobs."""

import pytest
from fastapi.testclient import TestClient

from gradcam_worker.gateway.routes.jobs import requested_wait_s

FIELDS = {"image": "s3://in/red.png", "network": "vgg16", "target": {"top_n": 1}}


def test_a_job_is_accepted_and_read(waiting: TestClient) -> None:
    accepted = waiting.post("/v1/jobs", json=FIELDS)
    assert accepted.status_code == 202
    assert accepted.json()["status"] == "queued"
    location = accepted.headers["location"]
    assert location == f"/v1/jobs/{accepted.json()['id']}"
    assert waiting.get(location).json() == accepted.json()
    assert "etag" not in accepted.headers


def test_the_same_idempotency_key_is_the_same_job(waiting: TestClient) -> None:
    first, second = (
        waiting.post("/v1/jobs", json=FIELDS, headers={"Idempotency-Key": "upload 7"}) for _ in range(2)
    )
    assert first.json()["id"] == second.json()["id"]
    other = waiting.post(
        "/v1/jobs", json={**FIELDS, "network": "other"}, headers={"Idempotency-Key": "upload 7"}
    )
    assert other.status_code == 409
    assert other.json()["code"] == "idempotency_conflict"


def test_a_job_is_the_same_in_whatever_order_its_metadata_is_written(waiting: TestClient) -> None:
    key = {"Idempotency-Key": "k"}
    tables = ({"b": "2", "a": "1"}, {"a": "1", "b": "2"})
    answers = [waiting.post("/v1/jobs", json={**FIELDS, "metadata": one}, headers=key) for one in tables]
    assert len({answer.json()["id"] for answer in answers}) == 1


def test_two_idempotency_keys_are_refused(waiting: TestClient) -> None:
    refused = waiting.post(
        "/v1/jobs", json=FIELDS, headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    )
    assert refused.status_code == 400
    assert refused.json()["errors"] == [{"header": "Idempotency-Key", "detail": "it is there more than once"}]


def test_who_prefers_to_wait_gets_the_final_document(eager: TestClient) -> None:
    answer = eager.post("/v1/jobs", json=FIELDS, headers={"Prefer": "wait=20"})
    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=20"
    assert answer.json()["status"] == "succeeded"


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, 0),
        ("wait=20", 20),
        ("respond-async, wait=20", 20),
        ("Wait = 5 ; foo", 5),
        ("wait=999999", 120),
        ("wait=soon", 0),
        ("handling=lenient", 0),
    ],
)
def test_the_preference_to_wait_is_read(prefer: str | None, seconds: float) -> None:
    assert requested_wait_s(prefer) == seconds


def test_an_invalid_job_is_refused_with_each_field_that_is_wrong(waiting: TestClient) -> None:
    refused = waiting.post("/v1/jobs", json={**FIELDS, "target": {"top_n": 0}, "colour": "red"})
    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"
    problem = refused.json()
    assert problem["type"] == "urn:gradcam:problem:invalid_job"
    assert [one["pointer"] for one in problem["errors"]] == ["#/target/top_n", "#/colour"]


@pytest.mark.parametrize("url", ["javascript:alert(1)", "ftp://host/path", "https:///path", "host/path", ""])
def test_a_webhook_that_is_no_web_address_is_refused_before_the_job_is_accepted(
    waiting: TestClient, url: str
) -> None:
    webhooks = [{"url": "HTTPS://app.example.com/hook"}, {"url": url}]
    refused = waiting.post("/v1/jobs", json={**FIELDS, "webhooks": webhooks})
    (finding,) = refused.json()["errors"]
    assert (refused.status_code, finding["pointer"]) == (400, "#/webhooks/1/url")
    assert "write https://host/path" in finding["detail"]
    assert waiting.post("/v1/jobs", json={**FIELDS, "webhook": webhooks[0]["url"]}).status_code == 202


@pytest.mark.parametrize("header", ["Content-Encoding", "Content-Type"])
def test_a_body_in_another_form_is_refused_by_its_header(waiting: TestClient, header: str) -> None:
    headers = {"Content-Type": "application/json", header: "gzip"}
    refused = waiting.post("/v1/jobs", content=b"{}", headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (415, "unsupported_request_type")
    (finding,) = refused.json()["errors"]
    assert finding["header"] == header
    assert finding["detail"].endswith("(received 'gzip')")


def test_an_unknown_job_is_not_found(waiting: TestClient) -> None:
    missing = waiting.get("/v1/jobs/01890a5d-ac96-774b-bcce-b302099a8057")
    assert missing.status_code == 404
    assert missing.json()["code"] == "unknown_job"
    assert waiting.get("/v1/nothing").json()["code"] == "not_found"
    refused = waiting.delete("/v1/jobs")
    assert (refused.json()["code"], refused.headers["allow"]) == ("method_not_allowed", "GET, POST")


def test_the_process_is_alive_and_ready(waiting: TestClient) -> None:
    assert waiting.get("/live").json() == waiting.get("/ready").json() == {"status": "ok"}


def test_jobs_are_listed_in_pages(waiting: TestClient) -> None:
    ids = [
        waiting.post("/v1/jobs", json={**FIELDS, "metadata": {"customer": str(number % 2)}}).json()["id"]
        for number in range(5)
    ]
    first = waiting.get("/v1/jobs?limit=3").json()
    second = waiting.get(f"/v1/jobs?limit=3&cursor={first['cursor']}").json()
    assert [one["id"] for one in first["jobs"] + second["jobs"]] == ids[::-1]
    found = waiting.get("/v1/jobs", params={"label": "customer=1", "status": "queued", "network": "vgg16"})
    assert [one["id"] for one in found.json()["jobs"]] == [ids[3], ids[1]]


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=201",
        "status=lost",
        "label=x",
        "cursor=!",
        "created_after=noon",
        "created_after=1",
        "created_after=2026-01-31T12:00:00",
    ],
)
def test_a_list_that_cannot_be_made_is_refused_with_what_was_received(
    waiting: TestClient, query: str
) -> None:
    refused = waiting.get(f"/v1/jobs?{query}")
    assert refused.status_code == 400
    name, _, received = query.partition("=")
    (finding,) = refused.json()["errors"]
    assert finding["parameter"] == name
    assert received in finding["detail"]


@pytest.mark.parametrize("address", ["/v1/jobs?stauts=failed", "/v1/networks?x=1", "/v1/jobs/7/result?a=b"])
def test_a_parameter_that_an_operation_does_not_have_is_refused(waiting: TestClient, address: str) -> None:
    refused = waiting.get(address)
    assert refused.status_code == 400
    assert "unknown parameter" in refused.json()["errors"][0]["detail"]
