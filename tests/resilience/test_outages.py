"""How much is logged while a server is unreachable."""

from typing import Any

import pytest

from gradcam_worker.errors import BrokerUnavailable, LedgerUnavailable
from gradcam_worker.resilience.outages import RECOVERED_AFTER_S, TOLD_EVERY_S, Outage, Outages


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    at = [1000.0]
    monkeypatch.setattr("gradcam_worker.resilience.outages.time.monotonic", lambda: at[0])
    return at


def test_an_outage_is_a_line_at_its_start_one_each_half_minute_and_one_at_its_end(
    now: list[float], caplog: Any
) -> None:
    one = Outage("broker")
    for _ in range(700):
        one.failed("nothing is received")
        now[0] += 0.1
    one.answered()
    assert not [line for line in caplog.messages if "reachable_again" in line], (
        "the last failure was just now"
    )
    now[0] += RECOVERED_AFTER_S
    one.answered()
    one.answered()
    assert [line.partition(" ")[0] for line in caplog.messages] == [
        "server_unreachable",
        "server_still_unreachable",
        "server_still_unreachable",
        "server_reachable_again",
    ]
    assert (
        caplog.messages[1]
        == 'server_still_unreachable server=broker outage_s=30 failures=301 reason="nothing is received"'
    )
    assert caplog.messages[-1] == "server_reachable_again server=broker outage_s=70 failures=700"
    now[0] += TOLD_EVERY_S
    one.failed("nothing is received")
    assert caplog.messages[-1] == 'server_unreachable server=broker reason="nothing is received"'


def test_an_outage_that_callers_hear_of_themselves_is_logged_only_if_it_lasts(
    now: list[float], caplog: Any
) -> None:
    one = Outage("ledger", quiet_s=5)
    for _ in range(50):
        one.failed("nothing is read")
        now[0] += 0.1
    now[0] += RECOVERED_AFTER_S
    one.answered()
    assert not caplog.messages
    for _ in range(60):
        one.failed("nothing is read")
        now[0] += 0.1
    now[0] += RECOVERED_AFTER_S
    one.answered()
    assert caplog.messages == [
        'server_unreachable server=ledger reason="nothing is read"',
        "server_reachable_again server=ledger outage_s=9 failures=60",
    ]


def test_an_outage_lasts_until_the_first_answer_however_seldom_calls_fail(
    now: list[float], caplog: Any
) -> None:
    one = Outage("ledger")
    one.failed("a call has hung until now")
    now[0] += 25
    one.answered()
    now[0] += 60
    one.answered()
    assert caplog.messages[-1] == "server_reachable_again server=ledger outage_s=25 failures=1"


@pytest.mark.parametrize("quiet_s", [0.0, 5.0])
def test_two_short_failures_with_an_answer_between_them_are_no_long_outage(
    now: list[float], caplog: Any, quiet_s: float
) -> None:
    one = Outage("ledger", quiet_s=quiet_s)
    for _ in range(2):  # a call each hour, whose first try fails
        one.failed("nothing is read")
        now[0] += 0.5
        one.answered()
        now[0] += 3600
    lines = [line.partition(" reason")[0] for line in caplog.messages]
    at_once = [
        "server_unreachable server=ledger",
        "server_reachable_again server=ledger outage_s=0 failures=1",
        "server_unreachable server=ledger",
    ]
    assert lines == ([] if quiet_s else at_once)


def test_of_a_server_that_was_always_reachable_nothing_is_logged(caplog: Any) -> None:
    Outage("ledger").answered()
    assert not caplog.messages


def test_an_error_says_whose_outage_it_is() -> None:
    both = Outages()
    assert both.of(BrokerUnavailable("gone")) is both.broker
    assert both.of(LedgerUnavailable("gone")) is both.ledger
