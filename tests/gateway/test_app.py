"""What holds for every answer."""

import socket
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message

from gradcam_worker import errors
from gradcam_worker.errors import GradcamError, InternalError, InvalidSettings
from gradcam_worker.gateway import server
from gradcam_worker.gateway.app import create_app
from gradcam_worker.gateway.http.problems import status_of
from gradcam_worker.observability.definitions import OPERATIONS, OTHER
from gradcam_worker.settings import Settings

FIELDS = {"image": "s3://in/red.png", "network": "vgg16", "top_n": 1}


def test_every_answer_forbids_scripts_and_guessing(waiting: TestClient) -> None:
    for answer in (waiting.get("/live"), waiting.get("/nothing"), waiting.post("/v1/jobs", json=7)):
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_defect_is_answered_by_a_problem_without_what_it_was(
    waiting: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any) -> None:
        message = "secret s3://hidden"
        raise RuntimeError(message)

    monkeypatch.setattr(type(waiting.app.state.gateway.client), "status", fail)  # type: ignore[attr-defined]
    failed = waiting.get("/v1/jobs/01890a5d-ac96-774b-bcce-b302099a8057")
    assert (failed.status_code, failed.json()["code"]) == (500, "internal")
    assert "hidden" not in failed.text
    assert 'http_requests_total{operation="read_job",status="5xx"} 1.0' in waiting.get("/metrics").text


def test_every_error_has_a_status_and_tells_no_setting() -> None:
    for kind in errors.all_errors():
        assert 400 <= status_of(kind("GRADCAM_X at s3://bucket")) < 600
    assert status_of(InternalError()) == 500
    assert status_of(GradcamError()) == 500


def test_every_operation_is_counted_under_its_name() -> None:
    app = create_app(Settings())
    names = {one["operationId"] for path in app.openapi()["paths"].values() for one in path.values()}
    assert names <= {*OPERATIONS}, "observability/definitions.py lists them"
    assert OTHER in OPERATIONS


def test_long_answers_are_compressed_and_streams_are_not(eager: TestClient) -> None:
    job_id = eager.post("/v1/jobs", json={**FIELDS, "metadata": {"a": "b" * 250}}).json()["id"]
    headers = {"Accept-Encoding": "gzip"}
    with eager.stream("GET", f"/v1/jobs/{job_id}", headers=headers) as answer:
        assert answer.headers["content-encoding"] == "gzip"
    with eager.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as answer:
        assert "content-encoding" not in answer.headers


def test_a_final_document_is_sent_once_to_whoever_has_it(eager: TestClient) -> None:
    job_id = eager.post("/v1/jobs", json=FIELDS).json()["id"]
    first = eager.get(f"/v1/jobs/{job_id}")
    etag = first.headers["etag"]
    again = eager.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": f'W/"other", {etag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert eager.get(f"/v1/jobs/{job_id}", headers={"If-None-Match": 'W/"other"'}).status_code == 200
    strong = {"If-None-Match": etag.removeprefix("W/")}
    assert eager.get(f"/v1/jobs/{job_id}", headers=strong).status_code == 304


def test_a_caller_who_goes_while_the_body_is_read_is_no_failure(
    waiting: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    def sent(content_type: str, start: bytes) -> list[Message]:
        messages: list[Message] = [{"type": "http.request", "body": start, "more_body": True}]
        answered: list[Message] = []

        async def receive() -> Message:
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            answered.append(message)

        headers = [(b"host", b"testserver"), (b"content-type", content_type.encode())]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/jobs",
            "query_string": b"",
            "headers": headers,
        }
        portal = waiting.portal
        assert portal
        portal.call(waiting.app, scope, receive, send)
        return answered

    assert sent("application/json", b'{"image') == []
    assert sent("multipart/form-data; boundary=x", b"--x\r\n") == []
    assert not [one for one in caplog.records if one.levelname in {"WARNING", "ERROR"}]
    metrics = waiting.get("/metrics").text
    assert 'http_requests_total{operation="submit_job",status="5xx"} 0.0' in metrics
    assert 'http_requests_total{operation="submit_job",status="4xx"} 2.0' in metrics


def test_a_slash_too_many_is_not_found_as_a_redirect_would_name_the_scheme_behind_a_proxy(
    waiting: TestClient,
) -> None:
    answer = waiting.post("/v1/jobs/", json=FIELDS, follow_redirects=False)
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", ["/", "/live", "/ready", "/static/page.js", "/openapi.json"])
def test_monitors_may_ask_without_a_body(waiting: TestClient, path: str) -> None:
    head, whole = waiting.head(path), waiting.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_other_origins_may_call_only_where_they_are_listed(waiting: TestClient) -> None:
    origin = {"Origin": "https://app.example.com"}
    assert "access-control-allow-origin" not in waiting.get("/live", headers=origin).headers
    with TestClient(create_app(Settings(serve_origins=("https://app.example.com",)))) as http:
        assert http.get("/live", headers=origin).headers["access-control-allow-origin"] == origin["Origin"]
        other = http.get("/live", headers={"Origin": "https://evil.example.com"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    "origin", ["*", "app.example.com", "https://a.example.com/", "https://u:p@a", "null"]
)
def test_an_origin_is_scheme_host_and_port_alone(origin: str) -> None:
    with pytest.raises(ValueError, match="must be a web origin"):
        Settings(serve_origins=(origin,))


def test_only_so_many_requests_are_held_open(eager: TestClient) -> None:
    open_requests = eager.app.state.gateway.open_requests  # type: ignore[attr-defined]
    open_requests.count = 1000
    job_id = eager.post("/v1/jobs", json=FIELDS).json()["id"]
    for answer in (
        eager.get(f"/v1/jobs/{job_id}/events"),
        eager.post("/v1/jobs", json=FIELDS, headers={"Prefer": "wait=5"}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (503, "server_busy")
        assert answer.headers["retry-after"] == "2"
    open_requests.count = 0
    assert eager.get(f"/v1/jobs/{job_id}/events").status_code == 200
    assert open_requests.count == 0


def test_an_address_where_nothing_can_be_served_is_told_in_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidSettings, match=f"--host 127.0.0.1 --port {port}: nothing can be served"):
            server.run(Settings(), "127.0.0.1", port)
