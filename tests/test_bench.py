import json
import subprocess
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


@pytest.mark.tensorflow
def test_the_engine_bench_prints_its_figures_and_compares_like_with_like() -> None:
    """What the figures are is not tested: they depend on the machine and on what else it does."""
    command = [str(BENCH), "engine", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    figures = json.loads(done.stdout)
    for network in ("vgg16", "xception"):
        assert figures["times_notebook"][network] > 0
        assert figures["share_of_forward"][network]["1"] > 0
        assert figures["agreement"][network]["difference"] < 1e-4
