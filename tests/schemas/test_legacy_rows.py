"""A fleet while it is upgraded: documents that an earlier version wrote, and those that one has to read."""

import json
from typing import Any

import pytest
from pydantic import create_model

from gradcam_worker.errors import WorkerLost
from gradcam_worker.ledger import state_machine
from gradcam_worker.schemas import legacy_rows
from gradcam_worker.schemas.legacy_rows import row_state
from gradcam_worker.schemas.model import ResponseModel
from gradcam_worker.schemas.status import PassState, Problem, RowSearch, RowState, StatusDocument, WorkerRef

WRITTEN_BEFORE = (
    '{"schema":"gradcam.status/v1","id":"01a2062b-306e-7164-a139-13398da125f6","status":"running",'
    '"stage":"fetch","revision":2,"attempt":1,"max_attempts":8,"created_at":"2026-11-01T10:00:00Z",'
    '"queued_at":"2026-11-01T10:00:00Z","started_at":"2026-11-01T10:00:00.031200Z",'
    '"updated_at":"2026-11-01T10:00:00.031200Z","completed_at":null,"expires_at":null,'
    '"cancel_requested_at":null,"network":null,"worker":{"id":"w","device":"cpu"},'
    '"metrics":{"queue_s":0.0312},"predictions":[],"result":null,"warnings":[],"error":null,'
    '"metadata":{"shard":"7"},"traceparent":null}'
)


def lost_at(stage: str) -> Problem:
    return Problem.of(WorkerLost("Attempt 2 ended without a word."), stage=stage, attempt=2)


def document(**changes: Any) -> StatusDocument:
    return StatusDocument.model_validate_json(WRITTEN_BEFORE).model_copy(update=changes)


def test_a_document_without_rows_is_written_to_the_letter_as_before() -> None:
    assert document().to_json() == WRITTEN_BEFORE
    assert "rows" not in document().model_dump(mode="json")


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"stage": "fetch"}, RowState()),
        ({"stage": None}, RowState()),
        ({"stage": "explain 24 of 40"}, RowState(done=24)),
        ({"error": lost_at("explain 24 of 40")}, RowState()),
        ({"error": lost_at("rows 16 to 23")}, RowState(search=RowSearch(group=(16, 23)))),
        ({"error": lost_at("row 17")}, RowState(search=RowSearch(row=17))),
        ({"error": lost_at("row 10 but 6,5,0")}, RowState(search=RowSearch(row=10, left_out=(6, 5, 0)))),
        ({"error": lost_at("row 10 but some")}, RowState()),
        (
            {"metrics": {"rows": 9.0, "failed": 3.0, "failed_image_not_found": 2.0, "failed_internal": 1.0}},
            RowState(failed={"image_not_found": 2, "internal": 1}),
        ),
    ],
)
def test_what_an_earlier_version_wrote_is_understood(changes: dict[str, Any], state: RowState) -> None:
    assert row_state(document(**changes)) == state


@pytest.mark.parametrize(
    "search",
    [RowSearch(group=(16, 23)), RowSearch(row=17), RowSearch(row=10, left_out=(6, 5, 0))],
    ids=lambda search: search.stage,
)
def test_an_earlier_version_finds_in_the_stage_what_rows_says(search: RowSearch) -> None:
    rows = RowState(search=search)
    running = document(stage=search.stage, rows=rows)
    lost = state_machine.expire_lease(running)
    assert row_state(lost) == rows
    assert lost.error
    assert row_state(lost.model_copy(update={"rows": None})) == rows
    assert state_machine.begin_attempt(lost, WorkerRef(id="w", device="cpu"), lost.updated_at).rows is None


def test_an_earlier_version_finds_progress_and_failures_where_it_looks() -> None:
    assert row_state(document(stage=legacy_rows.stage_of_progress(24, 40))).done == 24
    failed = {"image_not_found": 2, "internal": 1}
    assert row_state(document(metrics=legacy_rows.metrics_of_failed(failed))).failed == failed


def test_an_earlier_version_reads_a_document_with_rows_and_passes() -> None:
    fields: Any = {
        name: (info.annotation, info)
        for name, info in StatusDocument.model_fields.items()
        if name not in {"rows", "passes", "uncounted_attempts"}
    }
    before = create_model("StatusDocumentOfBefore", __base__=ResponseModel, **fields)
    rows = RowState(done=24, failed={"internal": 1}, search=RowSearch(row=3, left_out=(1,)))
    given = document(rows=rows, passes=PassState(done=3, total=65), uncounted_attempts=2)
    assert json.loads(given.to_json())["rows"] == {
        "done": 24,
        "failed": {"internal": 1},
        "search": {"group": None, "row": 3, "left_out": [1]},
    }
    assert json.loads(given.to_json())["passes"] == {"done": 3, "total": 65}
    assert StatusDocument.model_validate_json(given.to_json()) == given
    assert before.model_validate_json(given.to_json()).model_dump_json() == WRITTEN_BEFORE
