import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from gradcam_worker.errors import (
    DeviceOutOfMemory,
    JobTimeout,
    NetworkIncompatible,
    WeightsChecksumMismatch,
    WeightsUnavailable,
)
from gradcam_worker.gradcam.catalog import CATALOG, NetworkRow
from gradcam_worker.gradcam.explain import Explanation
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method, NetworkFacts
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.inference.request import InferenceResult
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.runtime.processes.preloading import freeze_loaded_objects
from gradcam_worker.testing import TinyNetwork

PIXELS = np.full((16, 16, 3), (255, 0, 0), np.uint8)
WAIT_S = 60


@dataclass
class GatedNetwork(TinyNetwork):
    """A tiny network that waits for its gate before it computes."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    calls: int = 0

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        self.calls += 1
        self.entered.set()
        self.gate.wait(WAIT_S)
        return super().compute(pixels, wanted, method)


@pytest.fixture
def explain() -> Callable[..., InferenceResult]:
    """Explain the most probable class of the red image."""

    def explain(model_cache: ModelCache, network: TinyNetwork, seconds: float = WAIT_S) -> InferenceResult:
        with model_cache.reserve() as slot:
            return slot.infer(network, PIXELS, (-1,), GRADCAM, Deadline(seconds))

    return explain


VGG16, XCEPTION = CATALOG["vgg16"], CATALOG["xception"]
CHANGED = replace(VGG16, labels=("cat", "dog"))  # another row with the same name


@dataclass
class Loader:
    """Loads a new tiny network for each row, and records the rows."""

    rows: list[NetworkRow] = field(default_factory=list)
    failures: list[Exception | None] = field(default_factory=list)
    slow: NetworkRow | None = None  # the row that waits for the gate
    begun: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def __call__(self, row: NetworkRow) -> TinyNetwork:
        self.rows.append(row)
        if row == self.slow:
            self.begun.set()
            self.gate.wait(WAIT_S)
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        return TinyNetwork()


class TestLoading:
    def test_a_network_is_loaded_when_it_is_first_needed_and_then_kept(self) -> None:
        load = Loader()
        model_cache = ModelCache(load)
        assert load.rows == []
        assert model_cache.load(VGG16) is model_cache.load(VGG16)
        assert model_cache.load(XCEPTION) is not model_cache.load(VGG16)
        assert load.rows == [VGG16, XCEPTION]

    def test_threads_that_load_a_network_at_once_get_the_same_object(self) -> None:
        load = Loader(slow=VGG16)
        model_cache = ModelCache(load)
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(model_cache.load, VGG16) for _ in range(8)]
            load.gate.set()
            assert len({id(future.result()) for future in futures}) == 1
        assert load.rows == [VGG16]

    def test_a_network_that_loads_slowly_does_not_delay_another(self) -> None:
        load = Loader(slow=VGG16)
        model_cache = ModelCache(load)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(model_cache.load, VGG16)
            assert load.begun.wait(WAIT_S)
            assert model_cache.load(XCEPTION)
            assert not slow.done()
            load.gate.set()

    def test_loading_is_retried_after_a_transient_error(self) -> None:
        model_cache = ModelCache(Loader(failures=[WeightsUnavailable("no route")]))
        with pytest.raises(WeightsUnavailable, match="no route"):
            model_cache.load(VGG16)
        assert model_cache.load(VGG16)

    def test_after_a_permanent_error_a_network_is_refused_for_a_while_without_another_load(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load = Loader(failures=[WeightsChecksumMismatch("another file")])
        model_cache = ModelCache(load)
        for _ in range(3):
            with pytest.raises(WeightsChecksumMismatch, match="another file"):
                model_cache.load(VGG16)
        assert load.rows == [VGG16]
        monkeypatch.setattr("gradcam_worker.inference.model_cache.RETRY_LOAD_AFTER_S", 0)
        assert model_cache.load(VGG16), "the file may have been replaced"

    def test_a_changed_row_is_loaded_at_once_after_a_permanent_error(self) -> None:
        model_cache = ModelCache(Loader(failures=[NetworkIncompatible("no such layer")]))
        with pytest.raises(NetworkIncompatible):
            model_cache.load(VGG16)
        assert model_cache.load(CHANGED)

    def test_a_warm_up_loads_a_network_and_runs_it(self) -> None:
        network = GatedNetwork()
        network.gate.set()
        model_cache = ModelCache(lambda _: network)
        assert model_cache.warm_up(VGG16).explanation.layer == "blocks"
        assert network.calls == 1
        assert model_cache.load(VGG16) is network


class TestVersions:
    def test_a_changed_row_is_loaded_and_replaces_the_old_one(self) -> None:
        load = Loader()
        model_cache = ModelCache(load)
        old = model_cache.load(VGG16)
        new = model_cache.load(CHANGED)
        assert new is not old
        assert model_cache.load(replace(CHANGED)) is new, "an equal row is the same version"
        assert load.rows == [VGG16, CHANGED]

    def test_jobs_with_the_old_version_continue_while_the_new_one_loads(
        self, explain: Callable[..., InferenceResult]
    ) -> None:
        load = Loader(slow=CHANGED)
        model_cache = ModelCache(load)
        old = model_cache.load(VGG16)
        with ThreadPoolExecutor(2) as pool:
            new = pool.submit(model_cache.load, CHANGED)
            assert load.begun.wait(WAIT_S)
            assert explain(model_cache, old).explanation.explained
            assert model_cache.load(VGG16) is old, "the cached version is returned without a wait"
            assert not new.done()
            load.gate.set()
            assert new.result() is not old
        assert explain(model_cache, old).explanation.explained

    def test_the_old_version_does_not_replace_a_new_one_that_cannot_be_loaded(self) -> None:
        model_cache = ModelCache(Loader(failures=[None, NetworkIncompatible("no such layer")]))
        old = model_cache.load(VGG16)
        for _ in range(2):
            with pytest.raises(NetworkIncompatible, match="no such layer"):
                model_cache.load(CHANGED)
        assert model_cache.load(VGG16) is old, "the old row needs no other load"


class TestInference:
    def test_a_result_holds_the_explanation_and_its_timings(
        self, tiny: TinyNetwork, explain: Callable[..., InferenceResult]
    ) -> None:
        result = explain(ModelCache(lambda _: tiny), tiny)
        assert [prediction.name for prediction in result.explanation.explained] == ["red"]
        assert_array_equal(result.explanation.heatmaps, np.ones((1, 4, 4)))
        assert result.batch_size == 1
        assert result.waited_s >= 0
        assert result.computed_s >= 0

    def test_simultaneous_jobs_share_a_batch_and_each_gets_its_own_classes(self) -> None:
        network = GatedNetwork()
        model_cache = ModelCache(lambda _: network, max_batch=8, wait_s=WAIT_S)
        model_cache.load(VGG16)

        def job(classes: tuple[int, ...]) -> InferenceResult:
            with model_cache.reserve() as slot:
                all_jobs.wait()
                return slot.infer(network, PIXELS, classes, GRADCAM, Deadline(WAIT_S))

        all_jobs = threading.Barrier(3)
        network.gate.set()
        with ThreadPoolExecutor(3) as pool:
            results = [*pool.map(job, [(2, 1), (-1, -2), (0, 0)])]
        assert [result.batch_size for result in results] == [3, 3, 3]
        assert [[prediction.name for prediction in result.explanation.explained] for result in results] == [
            ["blue", "green"],
            ["red", "green"],
            ["red"],
        ]

    def test_a_measurement_runs_alone_on_the_device_until_the_deadline(self, tiny: TinyNetwork) -> None:
        model_cache = ModelCache(lambda _: tiny)
        with model_cache.reserve() as slot:
            explanation = slot.infer(tiny, PIXELS, (0,), GRADCAM, Deadline(WAIT_S)).explanation
        measured = model_cache.measure(tiny, PIXELS, explanation, ["deletion"], Deadline(WAIT_S))
        assert 0 <= measured.metrics[0]["deletion"] <= 1
        with pytest.raises(JobTimeout):
            model_cache.measure(tiny, PIXELS, explanation, ["deletion"], Deadline(0))


@dataclass
class SimulatedDevice(TinyNetwork):
    """A tiny network on a device with a simulated clock and a limited memory."""

    max_images: int = 1000  # images that fit into its memory
    batch_s: float = 0.0  # duration of each batch
    image_s: float = 0.0  # additional duration of each image
    sizes: list[int] = field(default_factory=list)
    now_s: float = 0.0

    def clock(self) -> float:
        """A clock that advances only while this network computes."""
        return self.now_s

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        self.sizes.append(len(pixels))
        if len(pixels) > self.max_images:
            message = f"No device memory for {len(pixels)} images."
            raise DeviceOutOfMemory(message)
        self.now_s += self.batch_s + self.image_s * len(pixels)
        return super().compute(pixels, wanted, method)


class TestBestBatchSize:
    @staticmethod
    def largest_batch(network: SimulatedDevice, max_batch: int) -> int:
        """The number of images that share a batch when 80 jobs submit one each."""
        model_cache = ModelCache(lambda _: network, wait_s=WAIT_S, clock=network.clock, max_batch=max_batch)
        model_cache.load(VGG16)
        all_jobs = threading.Barrier(80)

        def job(_: int) -> int:
            with model_cache.reserve() as slot:
                all_jobs.wait()
                return slot.infer(network, PIXELS, (0,), GRADCAM, Deadline(WAIT_S)).batch_size

        with ThreadPoolExecutor(80) as pool:
            return max(pool.map(job, range(80)))

    def test_a_device_that_gains_from_every_image_gets_the_maximum(self) -> None:
        assert self.largest_batch(SimulatedDevice(batch_s=0.05), 0) == 64

    def test_the_batch_fits_into_memory(self) -> None:
        network = SimulatedDevice(max_images=10, batch_s=0.05)
        assert self.largest_batch(network, 0) == 8
        assert max(network.sizes) == 16, "it was measured before the first job"

    def test_the_batch_stays_small_if_larger_ones_are_not_faster(self) -> None:
        assert self.largest_batch(SimulatedDevice(image_s=0.03), 0) == 1

    def test_a_single_size_without_gain_does_not_end_the_measurement(self) -> None:
        class DeviceWithSlowPairs(SimulatedDevice):
            def compute(
                self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
            ) -> Computed:
                self.batch_s = {1: 0.1, 2: 0.2, 4: 0.25, 8: 0.3}.get(len(pixels), len(pixels) / 20)
                return super().compute(pixels, wanted, method)

        assert self.largest_batch(DeviceWithSlowPairs(), 0) == 8

    def test_a_batch_takes_no_longer_than_an_urgent_job_may_wait(self) -> None:
        assert self.largest_batch(SimulatedDevice(batch_s=0.6, image_s=0.1), 0) == 4

    def test_a_network_whose_warm_up_failed_is_kept(self) -> None:
        network = SimulatedDevice(max_images=0)
        load = Loader(failures=[None, AssertionError("it was loaded again")])
        model_cache = ModelCache(lambda row: load(row) and network, max_batch=0)
        assert model_cache.load(VGG16) is model_cache.load(VGG16) is network

    def test_a_batch_size_from_the_settings_is_not_measured(self) -> None:
        network = SimulatedDevice()
        assert self.largest_batch(network, 5) == 5
        assert 1 not in network.sizes, "nothing was measured"


class TestMemory:
    @dataclass
    class NetworkWithFacts(TinyNetwork):
        """A tiny network with the facts that it is given."""

        facts: NetworkFacts

    def load(self, row: NetworkRow) -> TinyNetwork:
        return self.NetworkWithFacts(replace(TinyNetwork.facts, parameters=100))

    def test_the_least_recently_used_network_is_dropped_for_a_new_one(self) -> None:
        model_cache = ModelCache(self.load, max_bytes=2 * 400)
        first, second = model_cache.load(VGG16), model_cache.load(XCEPTION)
        assert model_cache.load(VGG16) is first
        model_cache.load(CATALOG["resnet50"])
        assert model_cache.load(VGG16) is first, "it was used more recently"
        assert model_cache.load(XCEPTION) is not second

    def test_a_dropped_network_is_freed_when_no_job_uses_it(
        self, explain: Callable[..., InferenceResult]
    ) -> None:
        model_cache = ModelCache(self.load, max_bytes=400)
        explain(model_cache, model_cache.load(VGG16))
        dropped = weakref.ref(model_cache.load(VGG16))
        assert dropped() is not None
        model_cache.load(XCEPTION)
        assert dropped() is None

    def test_a_dropped_network_is_freed_where_a_process_has_frozen_what_it_had_loaded(self) -> None:
        model_cache = ModelCache(self.load, max_bytes=400)
        network: Any = model_cache.load(VGG16)
        network.itself = network  # as Keras's have
        dropped = weakref.ref(network)
        del network
        try:
            freeze_loaded_objects()
            assert gc.get_freeze_count()
            model_cache.load(XCEPTION)
            assert dropped() is None
            assert gc.get_freeze_count()
        finally:
            gc.unfreeze()

    def test_the_batches_of_a_dropped_network_keep_the_limit_of_the_settings(self) -> None:
        model_cache = ModelCache(self.load, max_bytes=400, max_batch=1)
        network = model_cache.load(VGG16)
        model_cache.load(XCEPTION)
        all_jobs = threading.Barrier(8)

        def job(_: int) -> int:
            with model_cache.reserve() as slot:
                all_jobs.wait()
                return slot.infer(network, PIXELS, (0,), GRADCAM, Deadline(WAIT_S)).batch_size

        with ThreadPoolExecutor(8) as pool:
            assert {*pool.map(job, range(8))} == {1}

    def test_the_latest_network_stays_however_large_it_is(self) -> None:
        model_cache = ModelCache(self.load, max_bytes=1)
        assert model_cache.load(VGG16) is model_cache.load(VGG16)

    def test_a_job_continues_with_a_dropped_network(self, explain: Callable[..., InferenceResult]) -> None:
        model_cache = ModelCache(self.load, max_bytes=1)
        network = model_cache.load(VGG16)
        model_cache.load(XCEPTION)
        assert explain(model_cache, network).explanation.explained


@pytest.mark.parametrize(
    ("max_batch", "on_gpu", "side", "batch_size"),
    [
        (0, False, 224, 8),
        (0, True, 224, 32),
        (0, False, 299, 8),
        (0, True, 32, 64),
        (0, False, 2000, 1),
        (6, True, 224, 6),
    ],
    ids=["cpu", "gpu", "larger", "small", "huge", "as_set"],
)
def test_the_batch_size_of_shards_depends_on_the_device_and_the_network_only(
    max_batch: int, on_gpu: bool, side: int, batch_size: int
) -> None:
    network = TinyNetwork()
    network.facts = replace(network.facts, input_size=(side, side))
    model_cache = ModelCache(lambda _: network, max_batch=max_batch, on_gpu=lambda: on_gpu)
    assert model_cache.shard_batch_size(network) == batch_size


class TestInferMany:
    def test_scores_that_are_not_finite_are_an_error_of_their_image_alone(self) -> None:
        class NetworkWithNan(TinyNetwork):
            def compute(
                self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
            ) -> Computed:
                computed = super().compute(pixels, wanted, method)
                computed.scores[1] = np.nan
                return computed

        network = NetworkWithNan()
        images = np.stack([PIXELS] * 3)
        results = ModelCache(lambda _: network).infer_many(network, images, (0, 1), GRADCAM, Deadline(WAIT_S))
        assert isinstance(results[1], NetworkIncompatible)
        for result in (results[0], results[2]):
            assert isinstance(result, Explanation)
            assert [prediction.id for prediction in result.explained] == [0, 1]

    def test_a_batch_that_does_not_fit_into_memory_is_an_error_of_all_images(self) -> None:
        class NetworkWithoutMemory(TinyNetwork):
            def compute(
                self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
            ) -> Computed:
                raise DeviceOutOfMemory(str(len(pixels)))

        with pytest.raises(DeviceOutOfMemory, match="3"):
            ModelCache(lambda _: NetworkWithoutMemory()).infer_many(
                NetworkWithoutMemory(), np.stack([PIXELS] * 3), (-1,), GRADCAM, Deadline(WAIT_S)
            )
