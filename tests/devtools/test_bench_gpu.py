"""The GPU bench, on JAX and the CPU: its parts run, and what they print agrees. No figure is tested."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from devtools import ROOT, SCRIPTS
from devtools.bench import gpu
from devtools.bench.gpu import PaddedNetwork, Part
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method
from gradcam_worker.testing import TinyNetwork

SMALL = "mobilenet"
NOT_THERE = ("tensorflow", "celery", "kombu", "redis", "boto3", "botocore", "httpx", "httpcore", "obstore")


def test_a_padded_network_computes_a_power_of_two_and_answers_for_the_images_alone() -> None:
    sizes: list[int] = []

    class Counted(TinyNetwork):
        def begin(
            self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
        ) -> Callable[[], Computed]:
            sizes.append(len(pixels))
            return super().begin(pixels, wanted, method)

    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    wanted = np.tile(np.array([-1, -2], np.int32), (5, 1))
    padded, alone = PaddedNetwork(Counted()).begin(pixels, wanted)(), TinyNetwork().compute(pixels, wanted)
    assert sizes == [8]
    np.testing.assert_array_equal(padded.class_ids, alone.class_ids)
    np.testing.assert_allclose(padded.raw, alone.raw, rtol=1e-6)
    assert len(padded.scores) == 5


@pytest.fixture
def _quick_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes started now do not find TensorFlow, compile roughly, and share what they have compiled."""
    (tmp_path / "tensorflow.py").write_text("raise ImportError(__name__)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.mark.tensorflow
@pytest.mark.usefixtures("_quick_jax")
def test_engine_and_service_are_measured_on_jax(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Part("engine", "jax", SMALL, ("float32",), (1,), repeats=1)
    service = Part("service", "jax", SMALL, ("float32",), (1,), seconds=1.0)
    figures = gpu.measure_parts([engine, service], lambda: 200.0)
    assert not figures["incomplete"]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [*figures["engine"], *figures["service"]]
    (explained,), (served,) = figures["engine"], figures["service"]
    assert explained["computed_in"] == "float32"
    assert explained["share_of_forward"] == pytest.approx(explained["forward_ms"] / explained["ours_ms"])
    assert 0 <= served["device_idle"] < 1
    assert served["passes"].keys() == {"1"}
    text = "\n".join(gpu.blocks({**figures, "device": "cpu", "backends": {"jax": "jax 0"}}))
    assert text.count(f"| jax     | {SMALL}") == 2


def test_a_part_that_takes_too_long_is_ended_and_named() -> None:
    figures = gpu.measure_parts([Part("engine", "jax", "vgg16")], lambda: 0.1)
    assert not figures["engine"]
    assert "longer than the 0 s" in figures["incomplete"]["engine, vgg16, jax"]
    (requirement,) = gpu.requirements(figures)
    assert not requirement.met


def test_a_part_that_fails_is_named() -> None:
    figures = gpu.measure_parts([Part("service", "jax", "no_such_network", repeats=1)], lambda: 100.0)
    assert figures["incomplete"] == {"service, no_such_network, jax": "exit code 1"}


def test_nothing_is_imported_that_a_gpu_machine_lacks(tmp_path: Path) -> None:
    """In the process of the bench, of the engine and of jobs."""
    for name in NOT_THERE:
        (tmp_path / f"{name}.py").write_text("raise ImportError(__name__)")
    code = "import devtools.bench.__main__, devtools.bench.gpu, devtools.bench.variants\n"
    code += "import gradcam_worker.gradcam.models.loading"
    path = f"{tmp_path}:{SCRIPTS}:{ROOT / 'worker'}"
    environment = {"PYTHONPATH": path, "KERAS_BACKEND": "jax"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
