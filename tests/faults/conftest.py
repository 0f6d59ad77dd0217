"""What the attacks' tests share."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # for `devtools`

if TYPE_CHECKING:
    from devtools.faults.verdict import Verdict


@pytest.fixture(scope="session", autouse=True)
def _forked_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from devtools.faults import tiny_worker

    with tiny_worker.forked(tmp_path_factory.mktemp("forked")):
        yield


@pytest.fixture
def kept() -> Callable[["Verdict"], "Verdict"]:
    """Fail where an attack broke a promise, with all that it found."""

    def check(verdict: "Verdict") -> "Verdict":
        assert verdict.kept, f"{verdict}"
        return verdict

    return check
