"""Hostile messages: whatever lies in the queue has to come to an end that has a name."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from gradcam_worker.broker import publisher
from gradcam_worker.schemas.ids import new_id
from tests.faults.hostile_messages import HOSTILE, KNOWN, SCHEMA, TEXTS, judge, judged, message

GOOD = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 1}}
FIELDS = sorted(json.loads(SCHEMA.read_text())["properties"])
CELERY = "accumulate backend_cleanup chain chord chord_unlock chunks group map starmap"
FOREIGN = (*(f"celery.{name}" for name in CELERY.split()), "gradcam.explain ", "Gradcam.explain")
REFUSED = {"failed: invalid_job", "failed: unknown_backfill"}
FORGED: dict[str, Any] = {
    "schema": "gradcam.shard/v1",
    "backfill": "01a216d4-0523-773f-a799-60224947ae4d",
    "index": 0,
    "key": "00000000-0123456789abcdef",
    "first": 0,
    "rows": [{"uri": "s3://in/a.png"}] * 1500,
    "network": "efficientnet_lite0",
    "target": {"top_n": 1},
    "output": "s3://out",
    "keep": True,
}


def body(payload: object) -> bytes:
    return json.dumps([[payload], {}, {}]).encode()


def forbidden_messages() -> Iterator[tuple[str, str, bytes]]:
    """Yield messages that have to be refused: what each is, its queue, and the item."""
    for queue, ours in publisher.TASKS.items():
        for task in (*FOREIGN, *({*publisher.TASKS.values()} - {ours})):
            yield f"{task} with a job", queue, message(body(GOOD), task)
        for token in ("", "guessed"):
            forged = body({**FORGED, "id": new_id(), "token": token})
            for task in {ours, publisher.EXPLAIN_SHARD}:
                yield f"{task}: a shard with the token {token!r}", queue, message(forged, task)
    yield "a job", publisher.SHARDS, message(body(GOOD), publisher.EXPLAIN_SHARD)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "gradcam")  # a line for each of them would say nothing


def test_every_message_comes_to_an_end_that_has_a_name() -> None:
    ends = judged(200, seed=1)
    assert ends.total() == 200
    assert {end for end, _ in ends} == {"typed"}, ends
    assert ends["typed", "succeeded"] > 15, "among them are good jobs"
    assert ends["typed", "failed: invalid_job"] > 30, "and bad ones"
    assert len(ends) > 6, "and jobs that fail later"


def test_the_same_seed_makes_the_same_messages() -> None:
    assert judged(20, seed=2) == judged(20, seed=2)


def test_what_nobody_but_us_may_ask_for_is_refused_in_each_queue() -> None:
    asked = [*forbidden_messages()]
    assert {queue for _, queue, _ in asked} == {*publisher.QUEUES}
    wrong = [what for what, queue, item in asked if judge(item, queue)[1] not in REFUSED]
    assert not wrong
    known = body({**FORGED, "id": new_id(), "rows": FORGED["rows"][:2], "token": KNOWN})
    assert judge(message(known, publisher.EXPLAIN_SHARD), publisher.SHARDS) == ("typed", "succeeded")


@pytest.mark.parametrize("field", FIELDS)
def test_whatever_stands_in_a_field_has_an_end_that_has_a_name(field: str) -> None:
    bodies = [body({**GOOD, field: value}) for value in HOSTILE]
    plain = body({**GOOD, field: "here"})
    bodies += [plain.replace(b'"here"', text) for text in TEXTS]
    wrong = [end for body in bodies if (end := judge(message(body)))[0] != "typed"]
    assert not wrong
