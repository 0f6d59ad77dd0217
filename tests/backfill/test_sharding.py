import itertools
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from gradcam_worker.backfill.sharding import MAX_ROWS_BYTES, cut_shards
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.schemas.work import parse
from gradcam_worker.settings import Settings
from tests.backfill.plans import SHA, plan


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

    def test_inputs_of_rows_and_of_all_rows_are_sent_and_change_the_key(self) -> None:
        plain, aged = rows(2), rows(2, inputs={"age": 61})
        (made,) = cut_shards(aged, plan(inputs={"sex": "f"}))
        assert parse(json.loads(made.to_json())) == made
        assert (made.inputs, made.rows[1].inputs) == ({"sex": "f"}, {"age": 61})
        found = [keys(plain), keys(aged), keys(plain, inputs={"sex": "f"})]
        assert len({*map(tuple, found)}) == 3

    def test_without_inputs_nothing_is_sent_of_them(self) -> None:
        (made,) = cut_shards(rows(1), plan())
        assert "inputs" not in made.to_json()
        assert "inputs" not in plan().to_json(), "which earlier versions read"

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

    def test_a_shard_of_a_plan_with_the_longest_spec_is_read_again(self) -> None:
        longest = plan(target={"classes": ["x" * 128] * 1000, "top_n": None}, network="\U0001f431" * 256)
        (made,) = cut_shards(rows(1), longest)
        assert isinstance(parse(json.loads(made.to_json())), Shard)

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
            {"inputs": {"age": 61}},
        ],
        ids=lambda changed: next(iter(changed)),
    )
    def test_a_changed_row_changes_the_key_of_its_shard_and_of_no_other(self, changed: Any) -> None:
        before, after = keys(rows(8)), keys(rows(8, **changed))
        assert before[0] == after[0]
        assert before[1] != after[1]
        assert before[1][:9] == after[1][:9] == "00000001-"

    def test_a_row_whose_inputs_no_message_takes_is_refused_without_them(self) -> None:
        (shard,) = cut_shards(rows(2, inputs={"scan": [0.123456789] * 60_000}), plan())
        assert len(shard.to_json()) < MAX_ROWS_BYTES
        assert shard.rows[1].inputs is None
        assert shard.rows[1].problem
        assert f"at most {MAX_ROWS_BYTES:,}" in shard.rows[1].problem.detail

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
