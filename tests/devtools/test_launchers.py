import re
from pathlib import Path

import pytest

from devtools import ROOT

CHECK = (ROOT / "scripts" / "check").read_text(encoding="utf-8")
INSTALLED = set(re.search(r"scripts/setup (.+)", CHECK)[1].split())  # type: ignore[index]
LAUNCHERS = [path for path in sorted((ROOT / "scripts").iterdir()) if path.is_file()]


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_a_command_that_tests_may_run_installs_nothing(launcher: Path) -> None:
    """The environment would be changed under the tests that run in it."""
    text = launcher.read_text(encoding="utf-8")
    asked = [set(extras.split()) for extras in re.findall(r'devtools/run"? "([^"]+)"', text)]
    if launcher.name == "docs":
        assert asked
        return  # no test runs it
    for extras in asked:
        assert extras <= INSTALLED
