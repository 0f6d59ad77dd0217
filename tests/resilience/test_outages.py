"""How much is said of a server that is away."""

from typing import Any

import pytest

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.resilience.outages import CALM_S, SAY_EVERY_S, Outage, Outages


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
    assert not [line for line in caplog.messages if "is back" in line], "somebody has failed just now"
    now[0] += CALM_S
    one.answered()
    one.answered()
    assert [line.partition(":")[0] for line in caplog.messages] == [
        "the broker is away",
        "the broker is still away",
        "the broker is still away",
        "the broker is back",
    ]
    assert caplog.messages[1] == "the broker is still away: seconds=30 failures=301: nothing is received"
    assert caplog.messages[-1] == "the broker is back: seconds=70 failures=700"
    now[0] += SAY_EVERY_S
    one.failed("nothing is received")
    assert caplog.messages[-1] == "the broker is away: nothing is received"


def test_a_server_that_was_never_away_is_not_said_to_be_back(caplog: Any) -> None:
    Outage("the ledger").answered()
    assert not caplog.messages


def test_an_error_says_whose_outage_it_is() -> None:
    both = Outages()
    assert both.of(BrokerUnavailable("gone")) is both.broker
    assert both.of(LedgerUnavailable("gone")) is both.ledger
