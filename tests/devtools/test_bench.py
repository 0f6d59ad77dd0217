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
    assert figures["times_notebook"]["mobilenetv2"] > 0
    assert figures["share_of_forward"]["mobilenetv2"]["1"]["2"] > 0
    assert figures["agreement"]["mobilenetv2"]["difference"] < 1e-4


@pytest.mark.tensorflow
def test_the_bench_of_a_jobs_cpu_time_compares_a_worker_with_its_floor() -> None:
    command = [str(BENCH), "job_cpu", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    figures = json.loads(done.stdout)
    for kind in ("job", "row"):
        assert figures[f"times_floor_{kind}"] > 1, "the floor is part of it"
        milliseconds, calls = figures["parts"][kind]["decode"]
        assert 0 < milliseconds < figures[f"cpu_ms_per_{kind}"]
        assert calls == pytest.approx(1, abs=0.05)
    assert figures["passed"] == (done.returncode == 0)
