"""Hostile messages, short: `scripts/faults --full` sends many more of the same."""

import json

import pytest

from devtools.faults.messages import (
    FORGED,
    HOSTILE,
    REFUSED,
    SCHEMA,
    TEXTS,
    attack,
    forbidden_messages,
    judge,
    message,
)
from gradcam_worker.broker import publisher
from gradcam_worker.schemas.ids import new_id

GOOD = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
FIELDS = sorted(json.loads(SCHEMA.read_text())["properties"])


def test_every_message_comes_to_an_end_that_has_a_name() -> None:
    found = attack(200, 1)
    assert found.jobs == 200 + len([*forbidden_messages()])
    assert not found.broken
    assert (found.untyped, found.without_final_state) == (0, 0), found.figures
    outcomes = found.figures["outcomes"]
    assert outcomes["succeeded"] > 15, "among them are good jobs"
    assert outcomes["failed: invalid_job"] > 30, "and bad ones"
    assert len(outcomes) > 6, "and jobs that fail later"


def test_the_same_seed_makes_the_same_messages() -> None:
    first, again = (attack(20, 2).figures for _ in range(2))
    assert first == again


def test_what_nobody_but_us_may_ask_for_is_refused_in_each_queue() -> None:
    asked = [*forbidden_messages()]
    assert {queue for _, queue, _ in asked} == {*publisher.QUEUES}
    wrong = [what for what, queue, item in asked if judge(item, queue)[1] not in REFUSED]
    assert not wrong
    known = json.dumps([[{**FORGED, "id": new_id(), "rows": FORGED["rows"][:2], "token": "known"}], {}, {}])
    assert judge(message(known.encode(), publisher.EXPLAIN_SHARD), publisher.SHARDS) == ("typed", "succeeded")


@pytest.mark.parametrize("field", FIELDS)
def test_whatever_stands_in_a_field_has_an_end_that_has_a_name(field: str) -> None:
    bodies = [json.dumps([[{**GOOD, field: value}], {}, {}]).encode() for value in HOSTILE]
    plain = json.dumps([[{**GOOD, field: "here"}], {}, {}]).encode()
    bodies += [plain.replace(b'"here"', text) for text in TEXTS]
    wrong = [ends for body in bodies if (ends := judge(message(body)))[0] != "typed"]
    assert not wrong
