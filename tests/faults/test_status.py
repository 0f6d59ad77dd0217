import json

import pytest
from standardwebhooks import Webhook

from devtools.faults.status import BAD, HEALTHY, KINDS, Receivers, _count_received, attack, receiving
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


@pytest.mark.parametrize("wrong", ["nothing", "twice", "signature", "order"])
def test_the_attack_sees_events_that_come_twice_unsigned_or_in_another_order(wrong: str) -> None:
    receivers = Receivers()
    for revision in (1, 3, 2) if wrong == "order" else (1, 2, 2, 3) if wrong == "twice" else (1, 2, 3):
        body = json.dumps({"data": {"id": "x", "revision": revision}})
        now, name = utc_now(), f"msg_x_{revision}"
        secret = "whsec_" + ("c3RhdHVz" if wrong != "signature" else "b3RoZXIh") * 4
        signature = Webhook(secret).sign(name, now, body)
        headers = {
            "webhook-id": name,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": signature,
        }
        receivers.received.append((headers, body.encode()))
    seen, twice, unsigned, disordered = _count_received(receivers)
    assert len(seen) == 3
    assert (twice == 1, unsigned == 3, disordered == 1) == (
        wrong == "twice",
        wrong == "signature",
        wrong == "order",
    )


def test_each_receiver_has_an_address_of_its_own() -> None:
    with receiving() as receivers:
        assert len(set(receivers.ports)) == len(receivers.urls) == 4
        assert HEALTHY in receivers.urls
