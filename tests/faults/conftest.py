"""What the attacks' tests share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for `devtools`

if TYPE_CHECKING:
    from devtools.faults.verdict import Verdict


@pytest.fixture
def kept() -> Callable[[dict[str, Any]], "Verdict"]:
    """Fail where an attack broke a promise, with all that it found."""
    from devtools.faults.verdict import Verdict

    def check(found: dict[str, Any]) -> Verdict:
        verdict = Verdict.of(found)
        assert verdict.kept, f"{verdict}"
        return verdict

    return check
