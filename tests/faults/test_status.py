import json

import pytest
from standardwebhooks import Webhook

from devtools.faults.status import BAD, KINDS, SENT, attack, count_received
from gradcam_worker.schemas.ids import utc_now

SHORT = 25  # jobs of each kind


def test_bad_receivers_keep_no_event_from_a_good_one_and_lose_none_of_their_own() -> None:
    verdict = attack(SHORT, seed=1)
    assert verdict.kept, f"{verdict}"
    found = verdict.figures
    assert verdict.jobs == SHORT * len(KINDS)
    assert found["events"] == SHORT * 3
    assert found["waiting"] + found["parked"] == SHORT * len(BAD)
    assert found["throughput_ratio"] > 0.25, "no job waits for a receiver"


@pytest.mark.parametrize("wrong", ["nothing", "twice", "signature", "later"])
def test_the_attack_sees_events_that_come_twice_unsigned_or_in_another_order(wrong: str) -> None:
    events = []
    for revision in {"later": (1, 3, 2), "twice": (1, 2, 2, 3)}.get(wrong, (1, 2, 3)):
        data = {"id": "x", "revision": revision, "status": SENT[revision - 1]}
        body, now, name = json.dumps({"data": data}), utc_now(), f"msg_x_{revision}"
        secret = "whsec_" + ("c3RhdHVz" if wrong != "signature" else "b3RoZXIh") * 4
        headers = {
            "webhook-id": name,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": Webhook(secret).sign(name, now, body),
        }
        events.append({"headers": headers, "body": body, "data": data})
    seen, faults = count_received(events)
    assert len(seen) == 3
    count = {"nothing": 0, "signature": 3}.get(wrong, 1)
    assert [number for fault, number in faults.items() if wrong in fault] == [count] * bool(count)
    assert faults.total() == count
