import itertools
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from gradcam_worker.backfill.plan import Plan
from gradcam_worker.backfill.sharding import MAX_ROWS_BYTES, cut_shards
from gradcam_worker.schemas.shard import Row, Shard, parse
from gradcam_worker.settings import Settings

SHA = "ab" * 32


def plan(**fields: Any) -> Plan:
    said: dict[str, Any] = {
        "id": "0193b2a0-0000-7000-8000-000000000000",
        "input": "photos.jsonl",
        "output": "s3://results/run",
        "network": "vgg16",
        "target": {"top_n": 3},
        "shard_rows": 4,
    }
    return Plan.model_validate(said | fields)


def rows(count: int, **last: Any) -> list[Row]:
    found = [Row(uri=f"s3://photos/{place}.jpg") for place in range(count)]
    if last:
        found[-1] = Row.model_validate({"uri": found[-1].uri, **last})
    return found


def keys(given: list[Row], **fields: Any) -> list[str]:
    return [one.key for one in cut_shards(given, plan(**fields))]


class TestShards:
    def test_rows_are_cut_in_their_order_and_every_shard_says_what_the_plan_says(self) -> None:
        spec: dict[str, Any] = {
            "method": {"name": "layercam"},
            "metrics": ["deletion"],
            "artifacts": [{"kind": "overlay"}],
            "weights_sha256": SHA,
        }
        made = list(cut_shards(rows(10), plan(**spec)))
        assert [(one.index, one.first, len(one.rows)) for one in made] == [(0, 0, 4), (1, 4, 4), (2, 8, 2)]
        assert [row for one in made for row in one.rows] == rows(10)
        for one in made:
            for name in ("output", "network", "target", *spec):
                assert getattr(one, name) == getattr(plan(**spec), name)
            assert one.backfill == plan().id
            assert one.id == str(uuid.uuid5(uuid.UUID(plan().id), one.key))

    def test_what_is_sent_is_read_as_the_same_shard(self) -> None:
        given = [
            *rows(3),
            Row(uri="s3://photos/\u00fc \U0001f431?#%.jpg", id="7", sha256=SHA, version="1-2"),
        ]
        (made,) = cut_shards(given, plan(target={"classes": ["tabby", 282]}))
        assert parse(json.loads(made.to_json())) == made

    def test_no_row_is_asked_for_before_its_shard_is(self) -> None:
        asked = []

        def endless() -> Iterator[Row]:
            for place in itertools.count():
                asked.append(place)
                yield Row(uri=f"s3://photos/{place}.jpg")

        made = cut_shards(endless(), plan())
        assert not asked
        next(made)
        assert len(asked) == 5  # one more shows that the shard is full
        next(made)
        assert len(asked) == 9

    def test_no_rows_are_no_shards(self) -> None:
        assert not list(cut_shards([], plan()))

    def test_a_shard_of_long_rows_is_cut_short_so_that_a_message_takes_it(self) -> None:
        given = [Row(uri="data:image/png;base64," + "\u00e9" * 30_000) for _ in range(7)]
        made = list(cut_shards(given, plan(shard_rows=256)))
        assert [len(one.rows) for one in made] == [2, 2, 2, 1]
        assert max(len(one.to_json()) for one in made) < Settings().max_message_bytes
        assert sum((one.rows for one in made), ()) == tuple(given)
        assert [one.first for one in made] == [0, 2, 4, 6]

    def test_a_row_that_no_message_takes_becomes_a_bad_one_and_the_others_go_on(self) -> None:
        given = [*rows(1), Row(uri="data:," + "a" * MAX_ROWS_BYTES, id="big"), *rows(1)]
        (made,) = cut_shards(given, plan())
        good, bad, other = made.rows
        assert good == other == given[0]
        assert bad.problem
        assert bad.problem.code == "invalid_row"
        assert bad.problem.stage == "plan"
        assert f"at most {MAX_ROWS_BYTES:,}" in bad.problem.detail
        assert (bad.id, len(bad.uri)) == ("big", 1000)


class TestKeys:
    def test_the_same_rows_and_spec_have_the_same_keys_in_another_run(self) -> None:
        other = plan(id=str(uuid.uuid4()), output="s3://elsewhere/run", input="copy.jsonl")
        assert [one.key for one in cut_shards(rows(10), other)] == keys(rows(10))
        assert len(set(keys(rows(10)))) == 3

    @pytest.mark.parametrize(
        "changed",
        [
            {"uri": "s3://photos/other.jpg"},
            {"id": "7"},
            {"sha256": SHA},
            {"version": "2"},
        ],
        ids=lambda changed: next(iter(changed)),
    )
    def test_a_changed_row_changes_the_key_of_its_shard_and_of_no_other(self, changed: Any) -> None:
        before, after = keys(rows(8)), keys(rows(8, **changed))
        assert before[0] == after[0]
        assert before[1] != after[1]
        assert before[1][:9] == after[1][:9] == "00000001-"

    def test_a_problem_changes_the_key(self) -> None:
        problem = {"type": "t", "title": "t", "detail": "d", "code": "c", "retryable": False, "attempt": 0}
        assert keys(rows(1)) != keys(rows(1, problem=problem))

    @pytest.mark.parametrize(
        "spec",
        [
            {"network": "resnet50"},
            {"weights_sha256": SHA},
            {"target": {"top_n": 4}},
            {"method": {"flip": True}},
            {"metrics": ["insertion"]},
            {"artifacts": [{"kind": "overlay"}]},
        ],
        ids=lambda spec: next(iter(spec)),
    )
    def test_another_spec_changes_every_key_and_is_another_backfill(self, spec: Any) -> None:
        assert not set(keys(rows(8))) & set(keys(rows(8), **spec))
        found = plan(**spec).difference_from(plan())
        assert found is not None
        assert found.startswith(f"Its {next(iter(spec))} is ")


class TestPlan:
    def test_the_same_backfill_later_is_the_same(self) -> None:
        later = plan(id=str(uuid.uuid4()), created_at="2031-01-01T00:00:00Z", output="s3://results/run/")
        assert later.difference_from(plan()) is None

    def test_what_tells_two_apart_is_said_in_one_sentence(self) -> None:
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

    def test_it_is_written_down_and_read_again(self) -> None:
        written = plan(weights_sha256=SHA, artifacts=[{"kind": "overlay"}])
        assert Plan.model_validate_json(written.to_json()) == written

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"method": {"name": "notebook"}, "metrics": ["deletion"]}, "metrics cannot be had"),
            ({"artifacts": [{"kind": "overlay"}, {"kind": "overlay"}]}, "one kind and format twice"),
            ({"target": {"classes": ["x" * 128] * 1000, "top_n": None}, "network": "\U0001f431" * 256}, None),
            ({"target": {"classes": ["\u00e9" * 128] * 1000}}, "name fewer classes"),
            ({"shard_rows": 0}, "shard_rows"),
            ({"id": "01ARZ3NDEKTSV4RRFFQ69G5FAV"}, "id"),
        ],
        ids=["metrics", "artifacts", "long", "too-long", "rows", "ulid"],
    )
    def test_what_no_job_may_ask_for_no_backfill_can(self, fields: Any, why: str | None) -> None:
        if why is None:
            (made,) = cut_shards(rows(1), plan(**fields))
            assert isinstance(parse(json.loads(made.to_json())), Shard)
            return
        with pytest.raises(ValidationError, match=why):
            plan(**fields)
