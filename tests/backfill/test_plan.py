import uuid
from typing import Any

import pytest
from pydantic import ValidationError

from gradcam_worker.backfill.plan import Plan
from tests.backfill.plans import SHA, plan


def test_the_same_backfill_later_is_the_same() -> None:
    later = plan(id=str(uuid.uuid4()), created_at="2031-01-01T00:00:00Z", output="s3://results/run/")
    assert later.difference_from(plan()) is None


def test_a_backfill_of_an_earlier_version_which_named_the_default_method_is_the_same() -> None:
    assert plan().difference_from(plan(method={"name": "gradcam", "layer": None})) is None


def test_what_tells_two_apart_is_said_in_one_sentence() -> None:
    there = plan(weights_sha256=None)
    assert plan(network="resnet50").difference_from(there) == (
        'Its network is "vgg16", and now "resnet50" is asked for.'
    )
    assert plan(weights_sha256=SHA).difference_from(there) == (
        f'Its weights_sha256 is any, and now "{SHA}" is asked for.'
    )
    assert plan(target={"classes": ["tabby"]}).difference_from(there) == (
        'Its target is {"top_n": 3}, and now {"classes": ["tabby"]} is asked for.'
    )
    assert plan(metrics=["deletion"]).difference_from(there) == (
        'Its metrics is [], and now ["deletion"] is asked for.'
    )
    assert (
        plan(input="b.csv").difference_from(there)
        == 'Its input is "photos.jsonl", and now "b.csv" is asked for.'
    )
    assert plan(shard_rows=5).difference_from(there) == "Its shard_rows is 4, and now 5 is asked for."


def test_it_is_written_down_and_read_again() -> None:
    written = plan(weights_sha256=SHA, artifacts=[{"kind": "overlay"}])
    assert Plan.model_validate_json(written.to_json()) == written


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"method": {"name": "notebook"}, "metrics": ["deletion"]}, "metrics cannot be computed"),
        ({"artifacts": [{"kind": "overlay"}, {"kind": "overlay"}]}, "one kind and format twice"),
        ({"target": {"classes": ["\u00e9" * 128] * 1000}}, "name fewer classes"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"id": "01ARZ3NDEKTSV4RRFFQ69G5FAV"}, "id"),
    ],
    ids=["metrics", "artifacts", "too-long", "rows", "ulid"],
)
def test_what_no_job_may_ask_for_no_backfill_can(fields: Any, why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        plan(**fields)
