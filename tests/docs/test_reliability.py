"""docs/explanation/guarantees.md names the test of every promise: each of them has to be there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "guarantees.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", PAGE)


def test_every_test_that_the_page_names_is_there() -> None:
    assert len(NAMED) > 40
    for file, names in NAMED:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in names.split("::")[1:]:
            assert re.search(rf"(?:def|class) {name}\b", text), f"{file} has no {name}"


def test_every_promise_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "| guarantee |" not in line]
    promises = [row for row in rows if len(row.split(" | ")) == 2]
    assert len(promises) > 30
    assert [row for row in promises if "`tests/" not in row] == []
