"""How much is logged while a server is unreachable."""

from typing import Any

import pytest

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.resilience.outages import ENDED_AFTER_S, LOG_EVERY_S, Outage, Outages


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    at = [1000.0]
    monkeypatch.setattr("gradcam_worker.resilience.outages.time.monotonic", lambda: at[0])
    return at


def test_an_outage_is_a_line_at_its_start_one_each_half_minute_and_one_at_its_end(
    now: list[float], caplog: Any
) -> None:
    one = Outage("the broker")
    for _ in range(700):
        one.failed("nothing is received")
        now[0] += 0.1
    one.answered()
    assert not [line for line in caplog.messages if "reachable again" in line], "somebody has failed just now"
    now[0] += ENDED_AFTER_S
    one.answered()
    one.answered()
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "the broker is unreachable",
        "the broker is still unreachable",
        "the broker is still unreachable",
        "the broker is reachable again",
    ]
    assert (
        caplog.messages[1] == "the broker is still unreachable: seconds=30 failures=301: nothing is received"
    )
    assert caplog.messages[-1] == "the broker is reachable again: seconds=70 failures=700"
    now[0] += LOG_EVERY_S
    one.failed("nothing is received")
    assert caplog.messages[-1] == "the broker is unreachable: nothing is received"


def test_of_a_server_that_was_always_reachable_nothing_is_logged(caplog: Any) -> None:
    Outage("the ledger").answered()
    assert not caplog.messages


def test_an_error_says_whose_outage_it_is() -> None:
    both = Outages()
    assert both.of(BrokerUnavailable("gone")) is both.broker
    assert both.of(LedgerUnavailable("gone")) is both.ledger
