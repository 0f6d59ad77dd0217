import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

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
from gradcam_worker.inference.model_cache import InferenceResult, ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.testing import TinyNetwork

PIXELS = np.full((16, 16, 3), (255, 0, 0), np.uint8)
PLENTY_S = 60


@dataclass
class Gated(TinyNetwork):
    """A tiny network that computes when it is let, and counts how many computed at once."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    inside: int = 0
    most: int = 0
    calls: int = 0

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        self.inside += 1
        self.calls += 1
        self.most = max(self.most, self.inside)
        self.entered.set()
        self.gate.wait(PLENTY_S)
        self.inside -= 1
        return super().compute(pixels, wanted, method)


@pytest.fixture
def explain() -> Callable[..., InferenceResult]:
    """Explain the red picture's first class."""

    def explain(model_cache: ModelCache, network: TinyNetwork, seconds: float = PLENTY_S) -> InferenceResult:
        with model_cache.reserve() as slot:
            return slot.infer(network, PIXELS, (-1,), GRADCAM, Deadline(seconds))

    return explain


VGG16, XCEPTION = CATALOG["vgg16"], CATALOG["xception"]
CHANGED = replace(VGG16, labels=("cat", "dog"))  # the same name, described in another way


@dataclass
class Loader:
    """Loads tiny networks, each one of its own, and remembers what it was asked for."""

    asked: list[NetworkRow] = field(default_factory=list)
    failures: list[Exception | None] = field(default_factory=list)
    slow: NetworkRow | None = None  # the row that waits for the gate
    begun: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def __call__(self, row: NetworkRow) -> TinyNetwork:
        self.asked.append(row)
        if row == self.slow:
            self.begun.set()
            self.gate.wait(PLENTY_S)
        if self.failures and (failure := self.failures.pop(0)):
            raise failure
        return TinyNetwork()


class TestLoading:
    def test_a_network_is_loaded_when_it_is_first_asked_for_and_then_kept(self) -> None:
        load = Loader()
        model_cache = ModelCache(load)
        assert load.asked == []
        assert model_cache.load(VGG16) is model_cache.load(VGG16)
        assert model_cache.load(XCEPTION) is not model_cache.load(VGG16)
        assert load.asked == [VGG16, XCEPTION]

    def test_threads_that_ask_at_once_get_one_and_the_same(self) -> None:
        load = Loader(slow=VGG16)
        model_cache = ModelCache(load)
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(model_cache.load, VGG16) for _ in range(8)]
            load.gate.set()
            assert len({id(answer.result()) for answer in answers}) == 1
        assert load.asked == [VGG16]

    def test_one_network_that_loads_slowly_does_not_hold_up_another(self) -> None:
        load = Loader(slow=VGG16)
        model_cache = ModelCache(load)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(model_cache.load, VGG16)
            assert load.begun.wait(PLENTY_S)
            assert model_cache.load(XCEPTION)
            assert not slow.done()
            load.gate.set()

    def test_a_network_that_could_not_be_had_is_tried_again(self) -> None:
        model_cache = ModelCache(Loader(failures=[WeightsUnavailable("no route")]))
        with pytest.raises(WeightsUnavailable, match="no route"):
            model_cache.load(VGG16)
        assert model_cache.load(VGG16)

    def test_a_network_that_cannot_be_loaded_is_refused_for_a_while_without_being_fetched_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load = Loader(failures=[WeightsChecksumMismatch("another file")])
        model_cache = ModelCache(load)
        for _ in range(3):
            with pytest.raises(WeightsChecksumMismatch, match="another file"):
                model_cache.load(VGG16)
        assert load.asked == [VGG16]
        monkeypatch.setattr("gradcam_worker.inference.model_cache.RETRY_LOAD_AFTER_S", 0)
        assert model_cache.load(VGG16), "in the meantime the right file may have been put there"

    def test_a_network_that_is_described_anew_is_tried_at_once(self) -> None:
        model_cache = ModelCache(Loader(failures=[NetworkIncompatible("no such layer")]))
        with pytest.raises(NetworkIncompatible):
            model_cache.load(VGG16)
        assert model_cache.load(CHANGED)

    def test_warming_loads_a_network_and_runs_it(self) -> None:
        network = Gated()
        network.gate.set()
        model_cache = ModelCache(lambda _: network)
        assert model_cache.warm_up(VGG16).explanation.layer == "blocks"
        assert network.calls == 1
        assert model_cache.load(VGG16) is network


class TestVersions:
    def test_a_row_that_has_changed_is_loaded_anew_and_takes_the_place_of_the_old(self) -> None:
        load = Loader()
        model_cache = ModelCache(load)
        old = model_cache.load(VGG16)
        new = model_cache.load(CHANGED)
        assert new is not old
        assert model_cache.load(replace(CHANGED)) is new, "an equal row is the same version"
        assert load.asked == [VGG16, CHANGED]

    def test_who_holds_the_old_version_runs_on_while_the_new_one_loads(
        self, explain: Callable[..., InferenceResult]
    ) -> None:
        load = Loader(slow=CHANGED)
        model_cache = ModelCache(load)
        old = model_cache.load(VGG16)
        with ThreadPoolExecutor(2) as pool:
            new = pool.submit(model_cache.load, CHANGED)
            assert load.begun.wait(PLENTY_S)
            assert explain(model_cache, old).explanation.explained
            assert model_cache.load(VGG16) is old, "who asks for what is here need not wait either"
            assert not new.done()
            load.gate.set()
            assert new.result() is not old
        assert explain(model_cache, old).explanation.explained

    def test_the_old_version_is_no_answer_where_the_new_one_cannot_be_loaded(self) -> None:
        model_cache = ModelCache(Loader(failures=[None, NetworkIncompatible("no such layer")]))
        old = model_cache.load(VGG16)
        for _ in range(2):
            with pytest.raises(NetworkIncompatible, match="no such layer"):
                model_cache.load(CHANGED)
        assert model_cache.load(VGG16) is old, "taking the change back takes no load"


class TestTurns:
    def test_a_turn_holds_the_explanation(
        self, tiny: TinyNetwork, explain: Callable[..., InferenceResult]
    ) -> None:
        turn = explain(ModelCache(lambda _: tiny), tiny)
        assert [one.name for one in turn.explanation.explained] == ["red"]
        assert_array_equal(turn.explanation.heatmaps, np.ones((1, 4, 4)))
        assert turn.batch_size == 1
        assert turn.waited_s >= 0
        assert turn.computed_s >= 0

    def test_jobs_at_the_same_time_share_a_pass_and_each_has_its_own_wish_answered(self) -> None:
        network = Gated()
        model_cache = ModelCache(lambda _: network, max_batch=8, wait_s=PLENTY_S)
        model_cache.load(VGG16)

        def job(wish: tuple[int, ...]) -> InferenceResult:
            with model_cache.reserve() as slot:
                everyone.wait()
                return slot.infer(network, PIXELS, wish, GRADCAM, Deadline(PLENTY_S))

        everyone = threading.Barrier(3)
        network.gate.set()
        with ThreadPoolExecutor(3) as pool:
            turns = [*pool.map(job, [(2, 1), (-1, -2), (0, 0)])]
        assert [turn.batch_size for turn in turns] == [3, 3, 3]
        assert [[one.name for one in turn.explanation.explained] for turn in turns] == [
            ["blue", "green"],
            ["red", "green"],
            ["red", "red"],
        ]

    def test_a_measurement_has_the_device_to_itself(self, tiny: TinyNetwork) -> None:
        model_cache = ModelCache(lambda _: tiny)
        with model_cache.reserve() as slot:
            seen = slot.infer(tiny, PIXELS, (0,), GRADCAM, Deadline(PLENTY_S)).explanation
        measured = model_cache.measure(tiny, PIXELS, seen, ["deletion"], Deadline(PLENTY_S))
        assert 0 <= measured.metrics[0]["deletion"] <= 1
        with pytest.raises(JobTimeout):
            model_cache.measure(tiny, PIXELS, seen, ["deletion"], Deadline(0))


@dataclass
class Sized(TinyNetwork):
    """A tiny network on a device with room for so many images, that takes so long for each pass and image."""

    room: int = 1000
    pass_s: float = 0.0
    image_s: float = 0.0
    tried: list[int] = field(default_factory=list)
    now_s: float = 0.0

    def clock(self) -> float:
        """A clock that goes on only while this network computes."""
        return self.now_s

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        self.tried.append(len(pixels))
        if len(pixels) > self.room:
            message = f"No device memory for {len(pixels)} images."
            raise DeviceOutOfMemory(message)
        self.now_s += self.pass_s + self.image_s * len(pixels)
        return super().compute(pixels, wanted, method)


class TestTheBestBatch:
    @staticmethod
    def largest(network: Sized, max_batch: int) -> int:
        """How many images share a pass once the network is warm."""
        model_cache = ModelCache(lambda _: network, wait_s=PLENTY_S, clock=network.clock, max_batch=max_batch)
        model_cache.load(VGG16)
        everyone = threading.Barrier(80)

        def job(_: int) -> int:
            with model_cache.reserve() as slot:
                everyone.wait()
                return slot.infer(network, PIXELS, (0,), GRADCAM, Deadline(PLENTY_S)).batch_size

        with ThreadPoolExecutor(80) as pool:
            return max(pool.map(job, range(80)))

    def test_a_device_that_gains_by_every_image_gets_as_many_as_are_ever_worth_it(self) -> None:
        assert self.largest(Sized(pass_s=0.05), 0) == 64

    def test_it_is_not_larger_than_the_memory_allows(self) -> None:
        network = Sized(room=10, pass_s=0.05)
        assert self.largest(network, 0) == 8
        assert max(network.tried) == 16, "it was found out before the first job"

    def test_where_a_larger_batch_brings_nothing_it_stays_small(self) -> None:
        assert self.largest(Sized(image_s=0.03), 0) == 1

    def test_one_size_that_brings_nothing_is_not_taken_for_the_end(self) -> None:
        class Stepped(Sized):
            def compute(
                self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
            ) -> Computed:
                self.pass_s = {1: 0.1, 2: 0.2, 4: 0.25, 8: 0.3}.get(len(pixels), len(pixels) / 20)
                return super().compute(pixels, wanted, method)

        assert self.largest(Stepped(), 0) == 8

    def test_a_pass_is_not_made_so_long_that_whoever_is_urgent_waits_for_seconds(self) -> None:
        assert self.largest(Sized(pass_s=0.6, image_s=0.1), 0) == 4

    def test_a_network_that_cannot_be_warmed_is_kept_and_each_job_has_the_error_as_its_own(self) -> None:
        network = Sized(room=0)
        load = Loader(failures=[None, AssertionError("it was loaded again")])
        model_cache = ModelCache(lambda row: load(row) and network, max_batch=0)
        assert model_cache.load(VGG16) is model_cache.load(VGG16) is network

    def test_it_is_what_the_operator_says(self) -> None:
        network = Sized()
        assert self.largest(network, 5) == 5
        assert 1 not in network.tried, "nothing had to be found out"


class TestMemory:
    @dataclass
    class Heavy(TinyNetwork):
        """A tiny network that says that it has so many parameters."""

        facts: NetworkFacts

    def load(self, row: NetworkRow) -> TinyNetwork:
        return self.Heavy(replace(TinyNetwork.facts, parameters=100))

    def test_the_least_recently_used_network_makes_room_for_a_new_one(self) -> None:
        model_cache = ModelCache(self.load, max_bytes=2 * 400)
        first, second = model_cache.load(VGG16), model_cache.load(XCEPTION)
        assert model_cache.load(VGG16) is first
        model_cache.load(CATALOG["resnet50"])
        assert model_cache.load(VGG16) is first, "it had been used since"
        assert model_cache.load(XCEPTION) is not second

    def test_what_made_room_is_gone_from_memory_once_nobody_computes_with_it(
        self, explain: Callable[..., InferenceResult]
    ) -> None:
        model_cache = ModelCache(self.load, max_bytes=400)
        explain(model_cache, model_cache.load(VGG16))
        gone = weakref.ref(model_cache.load(VGG16))
        assert gone() is not None
        model_cache.load(XCEPTION)
        assert gone() is None

    def test_a_batch_of_what_made_room_is_no_larger_than_the_operator_says(self) -> None:
        model_cache = ModelCache(self.load, max_bytes=400, max_batch=1)
        held = model_cache.load(VGG16)
        model_cache.load(XCEPTION)
        everyone = threading.Barrier(8)

        def job(_: int) -> int:
            with model_cache.reserve() as slot:
                everyone.wait()
                return slot.infer(held, PIXELS, (0,), GRADCAM, Deadline(PLENTY_S)).batch_size

        with ThreadPoolExecutor(8) as pool:
            assert {*pool.map(job, range(8))} == {1}

    def test_the_newest_stays_however_large_it_is(self) -> None:
        model_cache = ModelCache(self.load, max_bytes=1)
        assert model_cache.load(VGG16) is model_cache.load(VGG16)

    def test_who_computes_with_a_network_that_makes_room_goes_on(
        self, explain: Callable[..., InferenceResult]
    ) -> None:
        model_cache = ModelCache(self.load, max_bytes=1)
        held = model_cache.load(VGG16)
        model_cache.load(XCEPTION)
        assert explain(model_cache, held).explanation.explained


@pytest.mark.parametrize(
    ("max_batch", "on_gpu", "side", "group"),
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
def test_a_shards_groups_depend_on_the_device_and_the_network_alone(
    max_batch: int, on_gpu: bool, side: int, group: int
) -> None:
    network = TinyNetwork()
    network.facts = replace(network.facts, input_size=(side, side))
    model_cache = ModelCache(lambda _: network, max_batch=max_batch, on_gpu=lambda: on_gpu)
    assert model_cache.shard_batch_size(network) == group


class TestExplainMany:
    def test_scores_that_are_no_numbers_are_an_error_of_their_image_alone(self) -> None:
        class Dazzled(TinyNetwork):
            def compute(
                self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
            ) -> Computed:
                found = super().compute(pixels, wanted, method)
                found.scores[1] = np.nan
                return found

        network = Dazzled()
        pictures = np.stack([PIXELS] * 3)
        found = ModelCache(lambda _: network).infer_many(
            network, pictures, (0, 1), GRADCAM, Deadline(PLENTY_S)
        )
        assert isinstance(found[1], NetworkIncompatible)
        for one in (found[0], found[2]):
            assert isinstance(one, Explanation)
            assert [seen.id for seen in one.explained] == [0, 1]

    def test_what_the_device_cannot_do_is_raised(self) -> None:
        class Small(TinyNetwork):
            def compute(
                self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
            ) -> Computed:
                raise DeviceOutOfMemory(str(len(pixels)))

        with pytest.raises(DeviceOutOfMemory, match="3"):
            ModelCache(lambda _: Small()).infer_many(
                Small(), np.stack([PIXELS] * 3), (-1,), GRADCAM, Deadline(PLENTY_S)
            )
