import json
import subprocess
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


@pytest.mark.tensorflow
def test_the_engine_bench_prints_its_figures_and_compares_like_with_like() -> None:
    """What the figures are is not tested: they depend on the machine and on what else it does."""
    command = [str(BENCH), "engine", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    figures = json.loads(done.stdout)
    assert figures["times_notebook"]["xception"] > 0
    assert figures["share_of_forward"]["xception"]["1"]["8"] > 0
    assert figures["agreement"]["xception"]["difference"] < 1e-4


def test_the_host_bench_says_how_far_everything_is_from_the_codecs_alone() -> None:
    command = [str(BENCH), "host", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    figures = json.loads(done.stdout)
    for size in ("500x375", "4000x3000"):
        assert set(figures["times_floor"][size]) == {"1", "3", "8"}
        assert all(times > 1 for times in figures["times_floor"][size].values()), "the floor is part of it"
        assert figures["stages"][size]["decode"] > 0
    assert figures["passed"] == (done.returncode == 0)
