"""Networks compute the same on JAX, and on PyTorch if it is installed, as on TensorFlow.

`pytest --log-cli-level=info` prints the figures of docs/explanation/agreement.md.
"""

import logging
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.gradcam.methods import cam, integrated

pytestmark = [pytest.mark.tensorflow, pytest.mark.timeout(900)]  # another backend compiles everything anew
log = logging.getLogger(__name__)

PROGRAM = Path(__file__).with_name("every_method.py")
REQUIRED_IN_CI = {"jax"}
METHODS_PROGRAM = """
import runpy, sys

sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RANDOM_LAYER_PROGRAM = """
from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.backend import keras
from gradcam_worker.gradcam.models.loading import wrap_model


class Jitter(keras.Layer):
    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(1)

    def call(self, inputs):
        return inputs + keras.random.normal(keras.ops.shape(inputs), seed=self.seeds)


inputs = keras.Input((8, 8, 3))
jittered = Jitter()(keras.layers.Conv2D(4, 3)(inputs))
outputs = keras.layers.Dense(2, "softmax")(keras.layers.GlobalAveragePooling2D()(jittered))
try:
    wrap_model(keras.Model(inputs, outputs), preprocessing="tf")
except NetworkIncompatible as refused:
    assert "it has a random layer" in str(refused), refused
else:
    raise AssertionError("a random layer was accepted")
"""
WITHOUT_TENSORFLOW = "import sys; sys.modules['tensorflow'] = None"  # Keras tries to import it
NETWORKS = ("efficientnet_lite0", "by_hand", "flattened")
Arrays = dict[str, NDArray[Any]]
# Of JAX: it computes the same, and is compiled in a quarter of the time.
LITTLE_OPTIMIZATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
DEVICE_PROGRAM = """
from gradcam_worker.gradcam import backend

backend.set_intra_op_threads(0)
backend.set_intra_op_threads(1)
backend.reset_peak_memory()
assert backend.peak_memory() is None
if backend.name() == "jax":
    import jax

    def allowed():
        return {"tensorfloat32": True, "highest": False}[jax.config.jax_default_matmul_precision]
else:
    import torch

    assert torch.get_num_threads() == 1

    def allowed():
        return torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
for wanted in (True, False):
    backend.allow_tf32(wanted)
    assert allowed() == wanted
    assert [backend.arithmetic(dtype) for dtype in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    product = backend.keras.ops.matmul([[1.0, 2.0]], [[3.0], [4.0]])
    assert float(product[0, 0]) == 11
"""


@pytest.fixture(scope="module")
def on_tensorflow() -> Arrays:
    computed: Arrays = runpy.run_path(str(PROGRAM))["computed"]()
    return computed


@pytest.fixture(scope="module", params=["jax", "torch"])
def on_other_backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    """The same results, computed in a process with another backend, where TensorFlow is not installed.

    In the same process before: threads, memory and TF32 can be set, and a random layer is refused.
    """
    backend = request.param
    if find_spec(backend) is None:
        if backend in REQUIRED_IN_CI and os.environ.get("CI"):
            pytest.fail(f"{backend} is not installed: CI must test a second backend.")
        pytest.skip(f"{backend} is not installed")
    path = tmp_path_factory.mktemp(backend) / "computed.npz"
    programs = WITHOUT_TENSORFLOW, DEVICE_PROGRAM, RANDOM_LAYER_PROGRAM, METHODS_PROGRAM
    command = [sys.executable, "-c", "\n".join(programs), str(PROGRAM), str(path)]
    variables = {**os.environ, "KERAS_BACKEND": backend}
    if backend == "jax":
        variables["XLA_FLAGS"] = LITTLE_OPTIMIZATION
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(path) as saved:
        return dict(saved)


@pytest.mark.parametrize("network", NETWORKS)
def test_logits_agree(network: str, on_tensorflow: Arrays, on_other_backend: Arrays) -> None:
    assert_allclose(on_other_backend[f"{network} logits"], on_tensorflow[f"{network} logits"], atol=1e-4)


def test_heatmaps_of_all_methods_agree_with_and_without_flip_and_for_the_probability(
    on_tensorflow: Arrays, on_other_backend: Arrays
) -> None:
    assert set(on_other_backend) == set(on_tensorflow)
    cases = [name.removesuffix(" ids") for name in on_tensorflow if name.endswith(" ids")]
    by_hand = {case.split()[1] for case in cases if case.startswith("by_hand")}
    assert by_hand == {*cam.METHODS, integrated.NAME}
    counts = [
        sum(case.startswith(network) for case in cases) for network in ("efficientnet_lite0", "flattened")
    ]
    assert counts == [2, 5]
    apart = {
        name: float(np.abs(on_other_backend[name] - array).max()) for name, array in on_tensorflow.items()
    }
    for kind in ("logits", "heatmaps"):
        worst = max(value for name, value in apart.items() if name.endswith(kind))
        log.info("largest difference of %s: %.1e", kind, worst)
    for case in cases:
        assert_array_equal(on_other_backend[f"{case} ids"], on_tensorflow[f"{case} ids"], case)
        expected = on_tensorflow[f"{case} heatmaps"]
        assert np.all(expected.max((-2, -1)) == 1), case
        assert_allclose(on_other_backend[f"{case} heatmaps"], expected, atol=1e-3, err_msg=case)


def test_threads_memory_and_tf32_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from gradcam_worker.gradcam import backend

    threads: list[int] = []  # TensorFlow takes them only before it has computed anything
    monkeypatch.setattr(tf.config.threading, "set_intra_op_parallelism_threads", threads.append)
    for count in (0, 1):
        backend.set_intra_op_threads(count)
    assert threads == [1]
    backend.reset_peak_memory()
    assert backend.peak_memory() is None
    for wanted in (True, False):
        backend.allow_tf32(wanted)
        assert tf.config.experimental.tensor_float_32_execution_enabled() == wanted
        assert [backend.arithmetic(dtype) for dtype in ("float32", "bfloat16")] == ["float32", "bfloat16"]


def test_gpu_memory_is_allocated_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from gradcam_worker.gradcam import backend

    calls = []

    def set_memory_growth(device: str, grow: bool) -> None:
        calls.append((device, grow))
        if device == "used before":
            message = "Physical devices cannot be modified after being initialized"
            raise RuntimeError(message)

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["used before", f"another {kind}"])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", set_memory_growth)
    backend._allocate_gpu_memory_on_demand()
    assert calls == [("used before", True), ("another GPU", True)]
