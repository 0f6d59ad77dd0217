"""Every log line of the package is an event that can be searched for."""

import re

from devtools.docs.log_events import log_calls


def test_every_log_line_is_the_literal_name_of_an_event_and_its_fields() -> None:
    calls = log_calls()
    assert len(calls) > 50
    sentences = [
        f"{call.module}:{call.line}"
        for call in calls
        if call.event is None or not re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", call.event)
    ]
    assert sentences == []


def test_an_event_has_one_level() -> None:
    levels: dict[str | None, set[str]] = {}
    for call in log_calls():
        levels.setdefault(call.event, set()).add(call.level)
    assert [event for event, several in levels.items() if len(several) > 1] == []
