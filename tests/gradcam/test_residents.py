import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray

from worker.deadline import Deadline
from worker.errors import (
    JobTimeout,
    NetworkIncompatible,
    UnknownLayer,
    WeightsChecksumMismatch,
    WeightsUnavailable,
)
from worker.gradcam.catalog import CATALOG, NetworkRow
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
        residents = Residents(load)
        assert load.asked == []
        assert residents.get(VGG16) is residents.get(VGG16)
        assert residents.get(XCEPTION) is not residents.get(VGG16)
        assert load.asked == [VGG16, XCEPTION]

    def test_threads_that_ask_at_once_get_one_and_the_same(self) -> None:
        load = Loader(slow=VGG16)
        residents = Residents(load)
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(residents.get, VGG16) for _ in range(8)]
            load.gate.set()
            assert len({id(answer.result()) for answer in answers}) == 1
        assert load.asked == [VGG16]

    def test_one_network_that_loads_slowly_does_not_hold_up_another(self) -> None:
        load = Loader(slow=VGG16)
        residents = Residents(load)
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(residents.get, VGG16)
            assert load.begun.wait(PLENTY_S)
            assert residents.get(XCEPTION)
            assert not slow.done()
            load.gate.set()

    def test_a_network_that_could_not_be_had_is_tried_again(self) -> None:
        residents = Residents(Loader(failures=[WeightsUnavailable("no route")]))
        with pytest.raises(WeightsUnavailable, match="no route"):
            residents.get(VGG16)
        assert residents.get(VGG16)

    def test_a_network_that_cannot_be_loaded_is_refused_for_a_while_without_being_fetched_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        load = Loader(failures=[WeightsChecksumMismatch("another file")])
        residents = Residents(load)
        for _ in range(3):
            with pytest.raises(WeightsChecksumMismatch, match="another file"):
                residents.get(VGG16)
        assert load.asked == [VGG16]
        monkeypatch.setattr("worker.gradcam.residents.REFUSED_S", 0)
        assert residents.get(VGG16), "in the meantime the right file may have been put there"

    def test_a_network_that_is_described_anew_is_tried_at_once(self) -> None:
        residents = Residents(Loader(failures=[NetworkIncompatible("no such layer")]))
        with pytest.raises(NetworkIncompatible):
            residents.get(VGG16)
        assert residents.get(CHANGED)

    def test_warming_loads_a_network_and_runs_it(self) -> None:
        network = Gated()
        network.gate.set()
        residents = Residents(lambda _: network)
        assert residents.warm(VGG16).explanation.layer == "blocks"
        assert network.calls == 1
        assert residents.get(VGG16) is network


class TestVersions:
    def test_a_row_that_has_changed_is_loaded_anew_and_takes_the_place_of_the_old(self) -> None:
        load = Loader()
        residents = Residents(load)
        old = residents.get(VGG16)
        new = residents.get(CHANGED)
        assert new is not old
        assert residents.get(replace(CHANGED)) is new, "an equal row is the same version"
        assert load.asked == [VGG16, CHANGED]

    def test_who_holds_the_old_version_runs_on_while_the_new_one_loads(
        self, explain: Callable[..., Turn]
    ) -> None:
        load = Loader(slow=CHANGED)
        residents = Residents(load)
        old = residents.get(VGG16)
        with ThreadPoolExecutor(2) as pool:
            new = pool.submit(residents.get, CHANGED)
            assert load.begun.wait(PLENTY_S)
            assert explain(residents, old).explanation.explained
            assert residents.get(VGG16) is old, "who asks for what is here need not wait either"
            assert not new.done()
            load.gate.set()
            assert new.result() is not old
        assert explain(residents, old).explanation.explained

    def test_the_old_version_is_no_answer_where_the_new_one_cannot_be_loaded(self) -> None:
        residents = Residents(Loader(failures=[None, NetworkIncompatible("no such layer")]))
        old = residents.get(VGG16)
        for _ in range(2):
            with pytest.raises(NetworkIncompatible, match="no such layer"):
                residents.get(CHANGED)
        assert residents.get(VGG16) is old, "taking the change back takes no load"


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
