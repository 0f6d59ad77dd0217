"""OpenVINO computes the forward pass where it agrees with TensorFlow; else TensorFlow does."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import DeviceOutOfMemory, InvalidSettings
from gradcam_worker.gradcam.files.file_cache import FileCache
from gradcam_worker.gradcam.models import openvino_forward
from gradcam_worker.gradcam.network import GRADCAM, Method
from gradcam_worker.runtime.service_factory import build_services
from gradcam_worker.settings import Settings

if TYPE_CHECKING:
    from gradcam_worker.gradcam.models.keras_network import KerasNetwork

pytestmark = pytest.mark.tensorflow

SIDE, CLASSES = 16, 3
WANTED = np.array([[-1, 2], [0, 1], [-3, -2]], np.int32)
Noise = Callable[..., NDArray[np.uint8]]
Build = Callable[..., "KerasNetwork"]


@pytest.fixture
def pixels(noise: Noise) -> NDArray[np.uint8]:
    return noise(3, SIDE, SIDE)


@pytest.fixture
def build(wrap: Build) -> Build:
    """A network whose scores read two pooled maps: the tail of its pass skips a layer."""

    def build(weights_sha256: str | None = None, pool: bool = True) -> "KerasNetwork":
        import keras

        keras.utils.set_random_seed(3)
        layers = keras.layers
        inputs = keras.Input((SIDE, SIDE, 3))
        early = layers.Conv2D(4, 3, 2, activation="swish", name="early")(inputs)  # a gradient of its own
        target = layers.Conv2D(5, 3, padding="same", activation="relu", name="target")(early)
        if pool:
            pooled = layers.GlobalAveragePooling2D()(target)
        else:  # a layer with weights between the map and the pooling
            pooled = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, activation="tanh")(target))
        x = layers.Concatenate()([pooled, layers.GlobalMaxPooling2D()(early)])
        network = wrap(keras.Model(inputs, layers.Dense(CLASSES, "softmax")(x)), "target")
        network.facts = replace(network.facts, weights_sha256=weights_sha256)
        return network

    return build


@pytest.fixture
def compile_it() -> Callable[..., None]:
    """Calls `compile_forward`."""
    from gradcam_worker.gradcam.models.compiled_forward import compile_forward

    def compile_it(
        network: "KerasNetwork", forward: str = "openvino", cache: FileCache | None = None
    ) -> None:
        compile_forward(network, network._row, forward, cache)

    return compile_it


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, no network can be converted."""

    def refuse(_: Any) -> Any:
        message = "an operation that OpenVINO does not know"
        raise RuntimeError(message)

    return lambda: monkeypatch.setattr(openvino_forward, "convert", refuse)


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [getattr(record.msg, "event", "") for record in caplog.records]


def is_compiled(network: "KerasNetwork") -> bool:
    return network.facts.backend.endswith(f", {openvino_forward.version()}")


class TestAgreement:
    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize("count", [1, 3])
    def test_scores_and_maps_are_those_of_tensorflow_for_every_batch_size(
        self,
        build: Build,
        compile_it: Callable[..., None],
        pixels: NDArray[np.uint8],
        count: int,
        flip: bool,
        request: pytest.FixtureRequest,
    ) -> None:
        if not (count == 3 and flip):  # one is traced, too
            request.getfixturevalue("eagerly")
        network, reference = build(), build()
        compile_it(network)
        assert is_compiled(network)
        method = Method(flip=flip)
        ours = network.compute(pixels[:count], WANTED[:count], method)
        theirs = reference.compute(pixels[:count], WANTED[:count], method)
        assert_array_equal(ours.class_ids, theirs.class_ids)
        assert_allclose(ours.scores, theirs.scores, rtol=1e-5, atol=1e-6)
        assert_allclose(ours.raw, theirs.raw, atol=1e-5 * np.abs(theirs.raw).max())
        assert_allclose(network.scores(pixels), reference.scores(pixels), rtol=1e-5, atol=1e-6)
        assert ours.outputs is not None
        assert_allclose(ours.outputs.sum(axis=1), 1, rtol=1e-5)

    @pytest.mark.usefixtures("eagerly")
    def test_the_forward_pass_of_tensorflow_is_not_run(
        self, build: Build, compile_it: Callable[..., None], pixels: NDArray[np.uint8]
    ) -> None:
        """Its trunk is gone from the graph: the pass reads what the compiled one has computed."""
        network = build()
        compile_it(network)
        network._row = replace(network._row, preprocessing=None)  # type: ignore[arg-type]  # the trunk needs it
        assert network.compute(pixels, WANTED).raw.any()

    @pytest.mark.usefixtures("eagerly")
    @pytest.mark.parametrize("method", [Method("gradcam++"), Method(layer="early"), Method("eigencam")])
    def test_what_needs_more_than_the_short_backward_pass_runs_on_tensorflow(
        self, build: Build, compile_it: Callable[..., None], pixels: NDArray[np.uint8], method: Method
    ) -> None:
        network, reference = build(), build()
        compile_it(network)
        ours, theirs = (one.compute(pixels, WANTED, method) for one in (network, reference))
        assert_array_equal(ours.raw, theirs.raw)

    def test_its_copy_of_the_weights_counts_as_memory(
        self, build: Build, compile_it: Callable[..., None]
    ) -> None:
        network = build()
        before = network.facts.weight_bytes
        compile_it(network)
        assert network.facts.weight_bytes == 2 * before

    def test_the_conversion_reports_nothing_to_anybody(
        self, build: Build, compile_it: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import openvino_telemetry

        sent: list[Any] = []
        monkeypatch.setattr(openvino_telemetry.Telemetry, "send_event", lambda *event: sent.append(event))
        network = build()
        compile_it(network)
        assert is_compiled(network)
        assert sent == []

    def test_as_many_threads_compute_as_are_set(self, build: Build) -> None:
        from gradcam_worker.gradcam.methods.gradients import traced_trunk

        parts = build().trunk_and_tail()
        assert parts is not None
        forward = openvino_forward.OpenVinoForward(openvino_forward.convert(traced_trunk(parts)), threads=1)
        assert forward._request.get_compiled_model().get_property("INFERENCE_NUM_THREADS") == 1

    @pytest.mark.large
    @pytest.mark.parametrize("name", ["vgg16", "xception"])
    def test_large_networks_agree(self, name: str, noise: Noise) -> None:
        from gradcam_worker.gradcam.models.loading import load_network

        ours, theirs = (load_network(name, random_seed=1, forward=one) for one in ("auto", "tensorflow"))
        assert is_compiled(ours)
        images, wanted = noise(2, *ours.facts.input_size), np.array([[-1], [-1]], np.int32)
        mine, reference = ours.compute(images, wanted), theirs.compute(images, wanted)
        assert_allclose(mine.raw, reference.raw, atol=1e-4 * np.abs(reference.raw).max())


class TestFallback:
    def test_a_network_without_a_short_backward_pass_stays_on_tensorflow(
        self, build: Build, compile_it: Callable[..., None], caplog: pytest.LogCaptureFixture
    ) -> None:
        network = build(pool=False)
        compile_it(network, "auto")
        assert events(caplog) == []
        compile_it(network, "openvino")
        assert events(caplog) == ["forward_not_compiled"]
        assert not is_compiled(network)

    @pytest.mark.usefixtures("eagerly")
    def test_outputs_that_differ_are_not_used(
        self,
        build: Build,
        compile_it: Callable[..., None],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        pixels: NDArray[np.uint8],
    ) -> None:
        call = openvino_forward.OpenVinoForward.__call__

        def inexact(self: Any, images: NDArray[np.uint8]) -> list[Any]:
            activations, *others = call(self, images)
            return [activations * np.float32(1 + 3e-5), *others]

        monkeypatch.setattr(openvino_forward.OpenVinoForward, "__call__", inexact)
        network = build()
        compile_it(network)
        assert events(caplog) == ["forward_not_compiled"]
        assert "differ from those of TensorFlow by 3" in caplog.text
        assert not is_compiled(network)
        assert_array_equal(network.compute(pixels, WANTED).raw, build().compute(pixels, WANTED).raw)

    def test_a_network_that_cannot_be_converted_stays_on_tensorflow(
        self,
        build: Build,
        compile_it: Callable[..., None],
        no_conversion: Callable[[], None],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        no_conversion()
        network = build()
        compile_it(network, "auto")
        assert not is_compiled(network)
        assert "an operation that OpenVINO does not know" in caplog.text

    def test_in_bfloat16_tensorflow_computes(self, build: Build, compile_it: Callable[..., None]) -> None:
        network = build()
        network.facts = replace(network.facts, dtype="bfloat16")
        compile_it(network)
        assert not is_compiled(network)

    def test_no_memory_is_the_error_that_halves_a_batch(self, build: Build) -> None:
        class Full:
            def infer(self, *_: Any, **__: Any) -> Any:
                message = "Exception from src/inference: std::bad_alloc"
                raise RuntimeError(message)

        forward = object.__new__(openvino_forward.OpenVinoForward)
        forward._request, forward._ports = Full(), []
        with pytest.raises(DeviceOutOfMemory, match=r"\(3, 16, 16, 3\)"):
            forward(np.zeros((3, SIDE, SIDE, 3), np.uint8))


class TestCache:
    SHA256 = "a" * 64

    @pytest.fixture
    def cache(self, tmp_path: Path) -> FileCache:
        return FileCache(tmp_path / "cache", None)

    @pytest.fixture
    def cached(self, build: Build, compile_it: Callable[..., None], cache: FileCache, tmp_path: Path) -> Path:
        """The file of a network that was converted."""
        compile_it(build(self.SHA256), cache=cache)
        [path] = (tmp_path / "cache").iterdir()
        return path

    @pytest.mark.usefixtures("eagerly", "cached")
    def test_it_is_converted_once(
        self,
        build: Build,
        compile_it: Callable[..., None],
        cache: FileCache,
        no_conversion: Callable[[], None],
        pixels: NDArray[np.uint8],
    ) -> None:
        converted = build()
        compile_it(converted)
        no_conversion()
        network = build(self.SHA256)
        compile_it(network, cache=cache)
        assert is_compiled(network)
        assert_array_equal(network.compute(pixels, WANTED).raw, converted.compute(pixels, WANTED).raw)

    @pytest.mark.usefixtures("cached")
    def test_other_weights_are_another_file(
        self, build: Build, compile_it: Callable[..., None], cache: FileCache, tmp_path: Path
    ) -> None:
        compile_it(build("b" * 64), cache=cache)
        assert len([*(tmp_path / "cache").iterdir()]) == 2

    @pytest.mark.parametrize("damage", ["a byte", "the end", "everything"])
    def test_a_damaged_file_is_made_again(
        self, build: Build, compile_it: Callable[..., None], cache: FileCache, cached: Path, damage: str
    ) -> None:
        whole = cached.read_bytes()
        changed = {"a byte": bytes([whole[0] ^ 1]) + whole[1:], "the end": whole[:-7], "everything": b""}
        cached.write_bytes(changed[damage])
        network = build(self.SHA256)
        compile_it(network, cache=cache)
        assert is_compiled(network)
        assert cached.read_bytes() != changed[damage]
        assert openvino_forward.read(cache, cached.stem) is not None

    def test_a_file_of_another_network_is_made_again(
        self, build: Build, compile_it: Callable[..., None], cache: FileCache, cached: Path
    ) -> None:
        """Whole, but its weights are not those of the network: its outputs tell."""
        from gradcam_worker.gradcam.methods.gradients import traced_trunk

        other = build()
        other._model.set_weights([2 * weight for weight in other._model.get_weights()])
        parts = other.trunk_and_tail()
        assert parts is not None
        openvino_forward.write(openvino_forward.convert(traced_trunk(parts)), cache, cached.stem)
        wrong = cached.read_bytes()
        network = build(self.SHA256)
        compile_it(network, cache=cache)
        assert is_compiled(network)
        assert cached.read_bytes() != wrong

    def test_weights_without_a_checksum_are_not_cached(
        self, build: Build, compile_it: Callable[..., None], cache: FileCache, tmp_path: Path
    ) -> None:
        compile_it(build(), cache=cache)
        assert not (tmp_path / "cache").exists()

    def test_a_folder_that_cannot_be_written_costs_the_next_start_a_conversion(
        self,
        build: Build,
        compile_it: Callable[..., None],
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        (tmp_path / "file").touch()
        network = build(self.SHA256)
        compile_it(network, cache=FileCache(tmp_path / "file" / "cache", None))
        assert is_compiled(network)
        assert events(caplog) == ["forward_not_cached"]


class TestChoice:
    @pytest.fixture
    def not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(openvino_forward, "is_installed", lambda: False)

    @pytest.mark.usefixtures("not_installed")
    def test_openvino_that_is_not_installed_is_an_invalid_setting_that_names_the_extra(self) -> None:
        from gradcam_worker.gradcam.models.loading import load_network

        with pytest.raises(InvalidSettings, match=r"\[openvino,cpu\]"):
            build_services(Settings(forward="openvino"))
        with pytest.raises(InvalidSettings, match=r"\[openvino,cpu\]"):
            load_network("efficientnet_lite0", forward="openvino")

    @pytest.mark.usefixtures("not_installed")
    def test_auto_is_tensorflow_where_it_is_not_installed(
        self, build: Build, compile_it: Callable[..., None], caplog: pytest.LogCaptureFixture
    ) -> None:
        network = build()
        compile_it(network, "auto")
        assert not is_compiled(network)
        assert events(caplog) == []

    def test_tensorflow_is_tensorflow(self, build: Build, compile_it: Callable[..., None]) -> None:
        network = build()
        compile_it(network, "tensorflow")
        assert not is_compiled(network)

    def test_another_name_is_refused_with_those_that_exist(self) -> None:
        from gradcam_worker.gradcam.models.loading import load_network

        with pytest.raises(InvalidSettings, match="'onnx'; there are auto, openvino, tensorflow"):
            load_network("efficientnet_lite0", forward="onnx")
        with pytest.raises(InvalidSettings, match="GRADCAM_FORWARD"):
            Settings.from_environment({"GRADCAM_FORWARD": "onnx"})

    def test_a_loaded_network_says_in_its_facts_that_openvino_computes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its outputs differ by 9e-6 to 1.3e-5, by processor: above 1e-5 TensorFlow computes."""
        from gradcam_worker.gradcam.models import compiled_forward
        from gradcam_worker.gradcam.models.loading import load_network

        monkeypatch.setattr(compiled_forward, "LARGEST_DIFFERENCE", 1e-4)
        network = load_network("efficientnet_lite0", forward_cache=FileCache(tmp_path, None))
        assert is_compiled(network)
        assert [path.suffix for path in tmp_path.iterdir()] == [openvino_forward.SUFFIX]
        assert network.compute(
            np.zeros((1, 224, 224, 3), np.uint8), np.array([[-1]], np.int32), GRADCAM
        ).raw.any()


SIGNAL_PROGRAM = """
import gc, os, signal, sys, threading, time

import numpy as np
import openvino
from openvino import opset13

from gradcam_worker.gradcam.models import openvino_forward

parameter = opset13.parameter([-1, 8, 8, 3], np.float32)
model = openvino.Model([opset13.relu(parameter)], [parameter], "relu")
networks = [openvino_forward.OpenVinoForward(openvino_forward.Converted(model, None))]
networks[0](np.zeros((1, 8, 8, 3), np.float32))

def drop():
    networks.clear()
    gc.collect()
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=drop).start()
try:
    time.sleep(30)
except KeyboardInterrupt:
    sys.exit(7)
"""


def test_a_signal_reaches_the_thread_that_compiled_a_network_which_another_thread_dropped() -> None:
    done = subprocess.run([sys.executable, "-c", SIGNAL_PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
