"""The benches that need a testbed: they run, and what they say hangs together. No figure is tested."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devtools import import_path
from devtools.bench import simulated_network
from devtools.bench.memory import KINDS
from devtools.bench.simulated_network import Passes, SimulatedNetwork
from devtools.faults import tiny_worker
from gradcam_worker.gradcam.catalog import CATALOG
from gradcam_worker.runtime import devices
from gradcam_worker.settings import Settings


def figures(name: str, *, code: int = 0, **variables: str) -> Any:
    """What `scripts/bench NAME --quick --json` prints."""
    bench = ["-P", "-m", "devtools.bench", name, "--quick", "--json"]
    done = subprocess.run(
        [sys.executable, *bench] if variables else tiny_worker.python(*bench),
        env={**os.environ, **import_path(), **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.live
def test_the_service_bench_measures_the_ceiling_of_the_machinery() -> None:
    found = figures("service")
    assert found["jobs_per_s"]["no_time"] > 0
    assert found["share_of_engine"]["no_time"] < 1, "a job is more than its pass"
    assert 0 < found["device_idle"]["no_time"] <= 1
    assert found["stage_seconds"]["no_time"]["upload_s"] > 0
    assert found["cpu_ms_per_job"]["no_time"].keys() == {"worker", "s3", "valkey", "bench", "others"}
    assert found["bottleneck"]["no_time"]
    assert max(map(int, found["passes"]["no_time"])) > 1, "jobs at the same time share a pass"


@pytest.mark.live
def test_the_latency_bench_tells_where_a_jobs_time_goes() -> None:
    found = figures("latency")
    for situation in ("alone", "busy"):
        parts = found["parts_s"][situation]
        assert min(parts["fetch"]["50"], parts["upload"]["50"], parts["wait"]["50"]) > 0
        assert found["overhead_s"][situation]["99"] >= found["overhead_s"][situation]["50"] > 0
    assert found["bulk_jobs_per_s"]["busy"] > 0


@pytest.mark.live
def test_the_fairness_bench_measures_few_jobs_alone_and_behind_a_backlog() -> None:
    found = figures("fairness")
    assert found["backlog"] == 600
    assert found["waiting"] > 300, "they were not waited for"
    assert 0 < found["alone_s"] < found["behind_s"]


@pytest.mark.live
def test_the_memory_bench_runs_every_kind_of_job_and_follows_the_resident_set() -> None:
    found = figures("memory")
    assert sum(found["jobs"].values()) == 100
    assert found["jobs"].keys() == KINDS.keys()
    assert found["resident_peak_mb"] > 100
    assert abs(found["growth"]) < 1


@pytest.mark.tensorflow
def test_without_an_accelerator_the_gpu_bench_says_so() -> None:
    if devices.visible_gpus(os.environ):
        pytest.skip("there is one here, and it takes minutes to measure")
    assert "no accelerator" in figures("gpu", code=2, KERAS_BACKEND="jax")["why"]


@pytest.mark.tensorflow
@pytest.mark.usefixtures("eagerly")
def test_the_passes_of_a_network_of_the_catalog_are_recorded(tmp_path: Path) -> None:
    settings, file = Settings(forward="tensorflow"), tmp_path / "passes"
    network = simulated_network.load(settings, Passes(file), CATALOG["efficientnet_lite0"])
    pixels = np.zeros((2, *network.facts.input_size, 3), np.uint8)
    computed = network.compute(pixels, np.array([[-1], [-1]], np.int32))
    assert computed.raw.shape == (2, 1, 7, 7)
    (one,) = Passes.read(file)
    assert one.images == 2
    assert one.begun < one.ended


def test_a_simulated_network_answers_like_a_network_and_says_what_its_device_did(tmp_path: Path) -> None:
    file = tmp_path / "passes"
    network = SimulatedNetwork("gpu_time", Passes(file))
    pixels = np.zeros((2, *network.facts.input_size, 3), np.uint8)
    first, second = (network.begin(pixels, np.array([[-1, -2], [7, 7]], np.int32)) for _ in range(2))
    computed = first()
    assert computed.raw.shape == (2, 2, *network.facts.map_size)
    assert list(computed.class_ids[0]) == list(np.argsort(-computed.scores[0])[:2])
    assert list(computed.class_ids[1]) == [7, 7]
    assert np.array_equal(second().raw, computed.raw)
    one, two = Passes.read(file)
    assert two.begun == one.ended, "the passes of one device queue"
    assert one.images == two.images == 2
    assert one.ended - one.begun == pytest.approx(simulated_network.SECONDS["gpu_time"](2), abs=1e-5)
