"""Images that come with a request, and those that a browser puts into the bucket."""

import base64
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from gradcam_worker.client import results
from gradcam_worker.client.results import Upload
from gradcam_worker.gateway.context import MAX_FORMS
from gradcam_worker.gateway.routes import artifacts, jobs
from gradcam_worker.schemas.status import StatusDocument

RED = cv2.imencode(".png", np.full((32, 32, 3), (0, 0, 255), np.uint8))[1].tobytes()
FORM = {"network": "vgg16", "top_n": "2"}


def test_a_form_with_an_image_is_a_job(eager: TestClient) -> None:
    answer = eager.post("/v1/jobs", data=FORM, files={"image": ("a.png", RED)}, headers={"Prefer": "wait=20"})
    assert answer.status_code == 200
    document = answer.json()
    assert [one["name"] for one in document["predictions"][:1]] == ["red"]
    assert {one["kind"] for one in document["artifacts"]} == {"overlay", "heatmap"}
    assert next(one["class_name"] for one in document["artifacts"] if one["kind"] == "overlay") == "red"


def test_the_viewer_gets_heatmaps_and_a_result_its_urls(eager: TestClient) -> None:
    answer = eager.post("/v1/jobs", data=FORM, files={"image": RED}, headers={"Prefer": "wait=20"})
    at = f"/v1/jobs/{answer.json()['id']}"
    shown = eager.get(f"{at}/viewer").json()
    assert shown["manifest"]["job_id"] == answer.json()["id"]
    assert base64.b64decode(shown["heatmaps"])
    result = eager.get(f"{at}/result?expires_s=60").json()
    assert {*result["urls"]} == {one["uri"] for one in answer.json()["artifacts"]}
    assert eager.get(f"{at}/result?expires_s=0").json()["errors"][0]["parameter"] == "expires_s"


def test_a_job_that_has_not_ended_has_no_result(waiting: TestClient) -> None:
    job_id = waiting.post("/v1/jobs", data=FORM, files={"image": RED}).json()["id"]
    for name in ("result", "viewer"):
        refused = waiting.get(f"/v1/jobs/{job_id}/{name}")
        assert (refused.status_code, refused.json()["code"]) == (409, "no_result")


def test_the_fields_of_a_form_are_those_of_a_job(waiting: TestClient) -> None:
    form = {"network": "vgg16", "classes": "red,blue", "metadata": '{"patient": "7"}', "timeout_s": "12.5"}
    answer = waiting.post("/v1/jobs", data=form, files={"image": RED})
    assert answer.status_code == 202
    assert answer.json()["metadata"] == {"patient": "7"}


def test_a_form_that_is_cut_off_is_refused_wherever_it_is_cut(waiting: TestClient) -> None:
    request = waiting.build_request(
        "POST", "/v1/jobs", data={**FORM, "priority": "high"}, files={"image": RED}
    )
    body = request.read()
    whole = len(body.rstrip())
    for cut in [*range(0, whole, 7), whole - 1]:
        answer = waiting.post("/v1/jobs", content=body[:cut], headers=request.headers)
        assert answer.json()["code"] == "invalid_request", body[:cut]

    def pieces() -> Iterator[bytes]:
        yield from (body[at : at + 5] for at in range(0, whole, 5))

    assert waiting.post("/v1/jobs", content=pieces(), headers=request.headers).status_code == 202


@pytest.mark.parametrize("classes", ["red,blue", '["red", "blue"]', ["red", "blue"]])
def test_the_classes_of_a_form_are_a_list(eager: TestClient, classes: object) -> None:
    form = {"network": "vgg16", "classes": classes}
    answer = eager.post("/v1/jobs", data=form, files={"image": RED}, headers={"Prefer": "wait=20"})
    overlays = [one["class_name"] for one in answer.json()["artifacts"] if one["kind"] == "overlay"]
    assert overlays == ["red", "blue"]


@pytest.mark.parametrize(
    ("form", "code", "status"),
    [
        ({"data": FORM, "files": {"image": b"GARBAGE"}}, "unsupported_media_type", 415),
        ({"data": FORM, "files": {"photo": RED}}, "invalid_request", 400),
        ({"data": {**FORM, "metadata": "{"}, "files": {"image": RED}}, "invalid_request", 400),
        ({"data": {**FORM, "artifacts": "report"}, "files": {"image": RED}}, "invalid_request", 400),
        (
            {"data": {"network": "vgg16", "classes": '["red"'}, "files": {"image": RED}},
            "invalid_request",
            400,
        ),
        ({"data": {**FORM, "colour": "red"}, "files": {"image": RED}}, "invalid_job", 422),
        ({"data": FORM, "files": {"image": RED + bytes(2**25)}}, "image_too_large", 413),
        ({"data": FORM, "files": {"image": RED + bytes(2**26)}}, "request_too_large", 413),
        ({"data": FORM, "files": [("image", RED), ("image", RED)]}, "invalid_request", 400),
        (
            {"data": {str(at): "1" for at in range(99)}, "files": {"image": RED}},
            "invalid_request",
            400,
        ),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}}, "invalid_request", 400),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, "unsupported_request_type", 415),
    ],
)
def test_a_form_that_is_no_job_is_refused(
    waiting: TestClient, form: dict[str, object], code: str, status: int
) -> None:
    refused = waiting.post("/v1/jobs", **form)  # type: ignore[arg-type]  # the arguments of httpx
    assert (refused.json()["code"], refused.status_code) == (code, status)
    assert code == "unsupported_media_type" or refused.json()["errors"], "it says what would be right"
    assert refused.headers["content-type"] == "application/problem+json"


def test_a_browser_gets_a_url_for_exactly_the_image_that_it_names(waiting: TestClient) -> None:
    answer = waiting.post("/v1/uploads", json={"media_type": "image/png", "bytes": 1234})
    assert answer.status_code == 201
    target = answer.json()
    assert target["uri"].startswith("s3://uploads/")
    assert target["uri"].endswith(".png")
    assert target["headers"] == {"Content-Type": "image/png"}
    assert target["url"].endswith("?type=image/png&size=1234&for=900")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"media_type": "text/html", "bytes": 12}, "invalid_request"),
        ({"media_type": "image/png", "bytes": 0}, "invalid_request"),
        ({"media_type": "image/png", "bytes": "12"}, "invalid_request"),
        ({"media_type": "image/png", "bytes": True}, "invalid_request"),
        ({"media_type": "image/png", "bytes": 12, "key": "../x"}, "invalid_request"),
        ({"media_type": "image/png", "bytes": 2**30}, "image_too_large"),
        ([], "invalid_request"),
    ],
)
def test_another_upload_is_refused(waiting: TestClient, body: object, code: str) -> None:
    assert waiting.post("/v1/uploads", json=body).json()["code"] == code


def test_the_bytes_of_an_image_are_not_kept_while_a_request_waits(
    waiting: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []

    async def look(_: object, __: object, document: StatusDocument, *___: object) -> StatusDocument:
        gc.collect()
        kept.append([one for one in gc.get_objects() if isinstance(one, Upload)])
        return document

    monkeypatch.setattr(jobs, "_wait", look)
    waiting.post("/v1/jobs", data=FORM, files={"image": RED}, headers={"Prefer": "wait=20"})
    assert kept == [[]]


@pytest.mark.parametrize("field", ["top_n", "target", "timeout_s"])
def test_a_field_of_a_form_that_is_nested_too_deeply_is_refused(waiting: TestClient, field: str) -> None:
    form = {"network": "vgg16", field: "[" * 60_000}
    answer = waiting.post("/v1/jobs", data=form, files={"image": RED})
    assert answer.status_code in {400, 422}


def test_what_takes_long_for_a_large_image_is_not_computed_in_the_event_loop(
    eager: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def noting(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            threads.append(threading.current_thread().name.rpartition("_")[0])
            return call(*args)

        return noted

    monkeypatch.setattr(results, "prepare_upload", noting(results.prepare_upload))
    monkeypatch.setattr(artifacts, "_encode", noting(artifacts._encode))
    job_id = eager.post("/v1/jobs", data=FORM, files={"image": RED}).json()["id"]
    packed = eager.get(f"/v1/jobs/{job_id}/viewer")
    plain = eager.get(f"/v1/jobs/{job_id}/viewer", headers={"Accept-Encoding": "identity"})
    assert threads == ["gradcam-objects"] * 3
    assert (packed.headers["content-encoding"], packed.json()) == ("gzip", plain.json())
    assert "content-encoding" not in plain.headers


def test_no_more_forms_are_received_at_a_time_than_there_is_room_for(waiting: TestClient) -> None:
    forms = waiting.app.state.gateway.forms  # type: ignore[attr-defined]
    forms.count = MAX_FORMS
    refused = waiting.post("/v1/jobs", data=FORM, files={"image": RED})
    assert (refused.status_code, refused.json()["code"]) == (503, "server_busy")
    assert "Retry-After" in refused.headers
    forms.count = MAX_FORMS - 1
    assert waiting.post("/v1/jobs", data=FORM, files={"image": RED}).status_code == 202
    assert forms.count == MAX_FORMS - 1
