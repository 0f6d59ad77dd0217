import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from worker.deadline import Deadline
from worker.errors import JobTimeout, UnknownLayer, WeightsUnavailable
from worker.gradcam.network import GRADCAM, Computed, Method
from worker.gradcam.residents import Residents, Turn
from worker.testing import TinyNetwork

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
def explain() -> Callable[..., Turn]:
    """Explain the red picture's first class."""

    def explain(residents: Residents, network: TinyNetwork, seconds: float = PLENTY_S) -> Turn:
        return residents.explain(network, PIXELS, (-1,), GRADCAM, Deadline(seconds))

    return explain


class TestLoading:
    def test_a_network_is_loaded_when_it_is_first_asked_for_and_then_kept(self, tiny: TinyNetwork) -> None:
        loaded: list[str] = []

        def load(name: str) -> TinyNetwork:
            loaded.append(name)
            return tiny

        residents = Residents(load)
        assert loaded == []
        assert residents.get("vgg16") is residents.get("vgg16") is tiny
        assert residents.get("xception") is tiny
        assert loaded == ["vgg16", "xception"]

    def test_threads_that_ask_at_once_get_one_and_the_same(self) -> None:
        gate, loaded = threading.Event(), []

        def load(name: str) -> TinyNetwork:
            loaded.append(name)
            gate.wait(PLENTY_S)
            return TinyNetwork()

        residents = Residents(load)
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(residents.get, "vgg16") for _ in range(8)]
            gate.set()
            assert len({id(answer.result()) for answer in answers}) == 1
        assert loaded == ["vgg16"]

    def test_one_network_that_loads_slowly_does_not_hold_up_another(self, tiny: TinyNetwork) -> None:
        begun, gate = threading.Event(), threading.Event()

        def load(name: str) -> TinyNetwork:
            if name == "slow":
                begun.set()
                gate.wait(PLENTY_S)
            return tiny

        residents = Residents(load)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(residents.get, "slow")
            assert begun.wait(PLENTY_S)
            assert residents.get("fast") is tiny
            assert not slow.done()
            gate.set()

    def test_a_network_that_could_not_be_loaded_is_tried_again(self, tiny: TinyNetwork) -> None:
        attempts = [WeightsUnavailable("no route"), None]

        def load(name: str) -> TinyNetwork:
            if failure := attempts.pop(0):
                raise failure
            return tiny

        residents = Residents(load)
        with pytest.raises(WeightsUnavailable, match="no route"):
            residents.get("vgg16")
        assert residents.get("vgg16") is tiny

    def test_warming_loads_a_network_and_runs_it(self) -> None:
        network = Gated()
        network.gate.set()
        residents = Residents(lambda _: network)
        residents.warm("vgg16")
        assert network.calls == 1
        assert residents.get("vgg16") is network


class TestTurns:
    def test_a_turn_holds_the_explanation(self, tiny: TinyNetwork, explain: Callable[..., Turn]) -> None:
        turn = explain(Residents(lambda _: tiny), tiny)
        assert [one.name for one in turn.explanation.explained] == ["red"]
        assert_array_equal(turn.explanation.heatmaps, np.ones((1, 4, 4)))
        assert turn.batch_size == 1
        assert turn.waited_s >= 0
        assert turn.computed_s >= 0

    def test_only_one_thread_computes_at_a_time(self, explain: Callable[..., Turn]) -> None:
        network = Gated()
        residents = Residents(lambda _: network)
        with ThreadPoolExecutor(8) as pool:
            turns = [pool.submit(explain, residents, network) for _ in range(8)]
            network.gate.set()
            assert {turn.result().explanation.explained[0].name for turn in turns} == {"red"}
        assert (network.calls, network.most) == (8, 1)

    def test_who_waits_past_the_deadline_is_told_so_and_the_others_go_on(
        self, explain: Callable[..., Turn]
    ) -> None:
        network = Gated()
        residents = Residents(lambda _: network)
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(explain, residents, network)
            assert network.entered.wait(PLENTY_S)
            with pytest.raises(JobTimeout, match=r"timeout_s of 0\.01 s \(at: waiting for the device\)"):
                explain(residents, network, 0.01)
            assert not first.done()
            network.gate.set()
            assert first.result().explanation.explained
        assert explain(residents, network).explanation.explained
        assert network.calls == 2

    def test_a_call_that_fails_frees_the_device(
        self, tiny: TinyNetwork, explain: Callable[..., Turn]
    ) -> None:
        residents = Residents(lambda _: tiny)
        with pytest.raises(UnknownLayer):
            residents.explain(tiny, PIXELS, (-1,), Method(layer="stones"), Deadline(PLENTY_S))
        assert explain(residents, tiny, 1).explanation.explained
