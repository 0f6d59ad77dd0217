import json
from datetime import UTC, datetime
from typing import Any

import pytest

from gradcam_worker.errors import InvalidJob, InvalidRow
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job, Webhook
from gradcam_worker.schemas.shard import MAX_ROWS, Row, Shard
from gradcam_worker.schemas.status import Problem
from gradcam_worker.schemas.work import ROUTE, Terms, parse, terms_of

FIELDS: dict[str, Any] = {
    "schema": "gradcam.shard/v1",
    "backfill": new_id(),
    "index": 7,
    "key": "00000007-0123456789abcdef",
    "first": 1792,
    "rows": [{"uri": "s3://in/a.png", "id": "a"}, {"uri": "s3://in/b.png"}],
    "network": "efficientnet_lite0",
    "target": {"top_n": 3},
    "output": "s3://out/set",
}


def test_a_shard_survives_its_json() -> None:
    bad = Problem.of(InvalidRow("It names no image."), stage="plan", attempt=0)
    rows = [*FIELDS["rows"], {"uri": "\N{SNOWMAN}", "problem": bad.model_dump(mode="json")}]
    wish = {"metrics": ["deletion"], "artifacts": [{"kind": "overlay", "box": True}], "keep": True}
    shard = parse({**FIELDS, "rows": rows, **wish})
    assert isinstance(shard, Shard)
    assert parse(json.loads(shard.to_json())) == shard
    assert shard.rows[2].problem == bad


def test_defaults_are_not_written_for_each_row() -> None:
    said = json.loads(Shard.model_validate(FIELDS).to_json())
    assert said["rows"] == FIELDS["rows"]
    assert "timeout_s" not in said


@pytest.mark.parametrize(
    "method", [{}, {"flip": True}, {"name": "gradcam"}, {"name": "gradcam", "flip": True}]
)
def test_workers_are_told_whether_a_method_was_chosen_by_its_name(method: dict[str, Any]) -> None:
    received = parse(json.loads(Shard.model_validate({**FIELDS, "method": method}).to_json()))
    assert received.method.model_fields_set == {*method}


def test_a_payload_that_is_no_shard_is_parsed_as_a_job() -> None:
    job = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
    assert isinstance(parse(job), Job)
    others: list[object] = [
        None,
        [],
        {"schema": "gradcam.shard/v2"},
        FIELDS | {"schema": ["gradcam.shard/v1"]},
    ]
    for odd in others:
        with pytest.raises(InvalidJob):
            parse(odd)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rows": []}, "rows: "),
        ({"rows": [{"uri": "s3://in/a"}] * (MAX_ROWS + 1)}, "rows: "),
        ({"rows": [{"image": "s3://in/a"}]}, r"rows\.0\.uri: "),
        ({"rows": [{"uri": "s3://in/\ud800"}]}, r"rows\.0\.uri: "),
        ({"rows": [{"uri": "s3://in/a", "sha256": "abc"}]}, r"rows\.0\.sha256: "),
        ({"key": "../../etc/passwd"}, "key: "),
        ({"key": "00000007-0123456789abcdef\n"}, "key: "),
        ({"target": {}}, "target"),
        ({"artifacts": [{"kind": "report"}]}, "artifacts"),
        ({"first": -1}, "first: "),
        ({"webhooks": []}, "webhooks: unknown field"),
    ],
    ids=[
        "none",
        "many",
        "field",
        "half_a_character",
        "sha",
        "path",
        "line",
        "target",
        "kind",
        "minus",
        "more",
    ],
)
def test_an_invalid_shard_is_refused_in_a_sentence(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidJob, match=f"This is not a shard: .*{match}"):
        parse({**FIELDS, **changes})


def test_a_shard_has_its_own_route_and_no_webhooks() -> None:
    terms = terms_of(Shard.model_validate(FIELDS))
    assert terms == Terms(ROUTE, 8, {"backfill": FIELDS["backfill"], "shard": "7"})
    assert (terms.webhooks, terms.idempotency_key, terms.expires_at, terms.traceparent) == (
        (),
        None,
        None,
        None,
    )


def test_the_terms_of_a_job_are_its_fields() -> None:
    said: dict[str, Any] = {
        "priority": "low",
        "max_attempts": 2,
        "metadata": {"batch": "7"},
        "idempotency_key": "k",
        "expires_at": datetime(2999, 1, 1, tzinfo=UTC),
        "traceparent": f"00-{'1' * 32}-{'2' * 16}-01",
        "webhooks": (Webhook(url="https://app.example/hook"),),
    }
    job = Job.parse({"image": "s3://in/a.png", "network": "vgg16", "target": {"top_n": 1}, **said})
    assert vars(terms_of(job)) == {"route": said.pop("priority"), **said}


def test_the_fingerprint_of_a_shard_depends_on_its_key_backfill_and_keep() -> None:
    shard = Shard.model_validate(FIELDS)
    same = shard.model_copy(update={"id": new_id(), "output": "s3://elsewhere"})
    assert same.fingerprint() == shard.fingerprint()
    for update in ({"keep": True}, {"key": "00000007-fedcba9876543210"}, {"backfill": new_id()}):
        assert shard.model_copy(update=update).fingerprint() != shard.fingerprint()


def test_the_uri_of_a_row_may_be_any_text() -> None:
    assert Row(uri="").uri == ""
    assert Row(uri="x" * 2_000_000)
