"""What the attacks' tests share."""

from collections.abc import Callable
from typing import Any

import pytest

from faults_verdict import Verdict


@pytest.fixture
def kept() -> Callable[[dict[str, Any]], Verdict]:
    """Fail where an attack broke a promise, with all that it found."""

    def check(found: dict[str, Any]) -> Verdict:
        verdict = Verdict.of(found)
        assert verdict.kept, f"{verdict}"
        return verdict

    return check
