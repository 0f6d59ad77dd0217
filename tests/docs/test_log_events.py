"""Every log line of the package is an event that can be searched for."""

import re

from devtools.docs.log_events import log_calls


def test_every_log_line_is_the_literal_name_of_an_event_and_its_fields() -> None:
    calls = list(log_calls())
    assert len(calls) > 50
    sentences = [
        f"{call.module}:{call.line}"
        for call in calls
        if call.event is None or not re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", call.event)
    ]
    assert sentences == []


def test_an_event_has_one_meaning() -> None:
    """Where the same event is logged twice it has the same fields."""
    fields: dict[tuple[str, str], set[frozenset[str]]] = {}
    for call in log_calls():
        fields.setdefault((call.event or "", call.level), set()).add(frozenset(call.fields))
    assert [event for event, kinds in fields.items() if len(kinds) > 1] == []
