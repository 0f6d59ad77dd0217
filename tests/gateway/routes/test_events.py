"""The events of a job."""

import json
from typing import Any

from fastapi.testclient import TestClient

FIELDS = {"image": "s3://in/red.png", "network": "vgg16", "top_n": 1}


def read_events(text: str) -> list[dict[str, Any]]:
    """The events of a stream; comments are none."""
    blocks = [
        dict(line.split(": ", 1) for line in one.splitlines() if line[0] != ":")
        for one in text.split("\n\n")
        if one
    ]
    return [{**block, "data": json.loads(block["data"])} for block in blocks if "data" in block]


def test_the_final_document_is_the_last_event_and_a_stock_event_source_is_then_told_to_stop(
    eager: TestClient,
) -> None:
    job_id = eager.post("/v1/jobs", json=FIELDS).json()["id"]
    answer = eager.get(f"/v1/jobs/{job_id}/events")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    (event,) = read_events(answer.text)
    assert (event["event"], event["data"]["status"]) == ("status", "succeeded")
    assert event["id"] == str(event["data"]["revision"])
    again = eager.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": event["id"]})
    assert (again.status_code, again.text) == (204, "")
    older = eager.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "1"})
    assert read_events(older.text) == [event]


def test_a_response_can_end_after_one_event(waiting: TestClient) -> None:
    job_id = waiting.post("/v1/jobs", json=FIELDS).json()["id"]
    answer = waiting.get(f"/v1/jobs/{job_id}/events?until=event")
    assert [event["data"]["status"] for event in read_events(answer.text)] == ["queued"]


def test_the_events_of_an_unknown_job_are_not_found(waiting: TestClient) -> None:
    assert waiting.get("/v1/jobs/01890a5d-ac96-774b-bcce-b302099a8057/events").status_code == 404
    assert waiting.get("/v1/jobs/../events").status_code == 404
    assert waiting.get("/v1/jobs/x:y/events").json()["code"] == "unknown_job"


def test_an_event_id_that_is_no_revision_is_none(waiting: TestClient) -> None:
    job_id = waiting.post("/v1/jobs", json=FIELDS).json()["id"]
    for given in ("9" * 5000, "-1", "x"):
        answer = waiting.get(f"/v1/jobs/{job_id}/events?until=event", headers={"Last-Event-ID": given})
        assert [event["data"]["status"] for event in read_events(answer.text)] == ["queued"]
