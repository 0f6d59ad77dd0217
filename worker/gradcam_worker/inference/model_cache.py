"""The networks a process keeps loaded: each as large as memory allows, the least recently used makes room."""

import gc
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import DeviceOutOfMemory, GradcamError, NetworkIncompatible, PermanentError
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.explain import Explanation, explanation_of
from gradcam_worker.gradcam.faithfulness import measure
from gradcam_worker.gradcam.network import GRADCAM, Method, Network
from gradcam_worker.inference.batcher import UNKNOWN, Batcher
from gradcam_worker.observability.events import SILENT, Observer
from gradcam_worker.resilience.deadline import Deadline

log = logging.getLogger("gradcam")

WARM_UP_S = 600  # the first passes of a large network on a slow machine take minutes at most
REFUSED_S = 30  # before a network that cannot be loaded as it is described is tried again
GREY = 128  # a picture of nothing
MOST = 64  # images in a batch: more have not been seen to be faster
WORTH = 1.1  # times more images a second that a larger batch has to bring
PATIENCE = 2  # sizes in a row that bring no more: one alone may be chance, or an odd step
VALUES = 2_200_000  # height x width x 3 of all images in a pass: about a second on two cores, or less
VALUES_ON_GPU = 4 * VALUES
LONG_S = 1.0  # a pass is not made longer: whoever is urgent waits for the one that runs


@dataclass(frozen=True)
class InferenceResult:
    """An answer and what it took to get it."""

    explanation: Explanation
    waited_s: float  # for the device
    computed_s: float
    batch_size: int


@dataclass(frozen=True)
class _Refused:
    """Why a row could not be loaded, and when that was."""

    row: NetworkRow
    kind: type[PermanentError]
    why: str  # no more of it: a traceback would keep the model
    at_s: float


class BatchSlot:
    """A job's right to hand in one image. As long as it has not, batches wait for it a little."""

    def __init__(self, batcher: Batcher, arrive: Callable[[], None]) -> None:
        self._batcher, self._arrive = batcher, arrive

    def infer(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        wish: Sequence[int],
        method: Method,
        deadline: Deadline,
        *,
        bulk: bool = False,
    ) -> InferenceResult:
        """Explain one fitted image (height, width, channels), in one pass with others; waits for its turn.

        Raises UnknownLayer, NetworkIncompatible, DeviceOutOfMemory, JobTimeout.
        """
        answer = self._batcher.compute(
            network, pixels, wish, method, deadline, bulk=bulk, arrive=self._arrive
        )
        seen = explanation_of(network, answer.computed, answer.index, tuple(wish), method.normalize)
        return InferenceResult(seen, answer.waited_s, answer.computed_s, answer.batch_size)


class ModelCache:
    """Loads each network once, when it is first asked for, finds its best batch, and gives out its turns.

    A name whose row has changed is loaded anew. Who holds the network of before keeps it.
    """

    def __init__(
        self,
        load: Callable[[NetworkRow], Network],
        *,
        max_batch: int = 1,
        max_bytes: int = 8 * 1024**3,
        wait_s: float = 0.01,
        peak_bytes: Callable[[], int | None] = lambda: None,
        on_gpu: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.perf_counter,
        observer: Observer = SILENT,
    ) -> None:
        """`load` turns a row into a live network.

        `max_batch` images at most share a pass; 0: as many as prove worth it. `max_bytes` may the weights
        of all that are kept have together, but for the newest, which stays however large it is.
        `peak_bytes` says how much of the device's memory was in use at most since it was last asked, where
        that can be known.
        """
        self._load = load
        self._max_batch, self._max_bytes = max_batch, max_bytes
        self._peak_bytes, self._clock, self._on_gpu = peak_bytes, clock, on_gpu
        self._observer = observer
        self._batcher = Batcher(wait_s=wait_s, largest=max_batch or UNKNOWN, observer=observer)
        self._networks: OrderedDict[str, tuple[NetworkRow, Network]] = OrderedDict()  # last used last
        self._refused: dict[str, _Refused] = {}
        self._loading: dict[str, threading.Lock] = {}
        self._door = threading.Lock()

    @property
    def failure(self) -> str | None:
        """Why nothing will be computed here any more."""
        return self._batcher.failure

    @property
    def count(self) -> int:
        """How many networks are loaded."""
        return len(self._networks)

    @property
    def mean_batch_size(self) -> float:
        """How many images have shared a pass lately; 0 before the first."""
        return self._batcher.mean_batch_size

    def load(self, row: NetworkRow) -> Network:
        """The live network of this row, and of no other version of it. Raises what `load` raises.

        One that cannot be loaded as it is, so that its file would be fetched in vain for every job, is
        refused for a while without another try.
        """
        if network := self._held(row):
            return network  # who asks for the version that is here does not wait for another one
        with self._door:
            lock = self._loading.setdefault(row.name, threading.Lock())
        with lock:
            if network := self._held(row):
                return network
            refused = self._refused.get(row.name)
            if refused and refused.row == row and time.monotonic() - refused.at_s < REFUSED_S:
                raise refused.kind(refused.why)
            begun_s, well = self._clock(), False
            try:
                network = self._loaded(row)
                well = True
            finally:
                self._observer.loaded(self._clock() - begun_s, well=well)
            self._keep(row, network)
            return network

    def _loaded(self, row: NetworkRow) -> Network:
        """Load a network, and find out how many images are worth a batch."""
        try:
            network = self._load(row)
        except PermanentError as error:
            self._refused[row.name] = _Refused(row, type(error), str(error), time.monotonic())
            raise
        self._refused.pop(row.name, None)
        self._batcher.limit(network, self._max_batch or self._largest_worth_it(network))
        return network

    def _held(self, row: NetworkRow) -> Network | None:
        with self._door:
            held, network = self._networks.get(row.name, (None, None))
            if held != row:
                return None
            self._networks.move_to_end(row.name)
            return network

    def _keep(self, row: NetworkRow, network: Network) -> None:
        """Keep a network; let those go that have been used least recently, until all fit."""
        with self._door:
            left = [self._networks.pop(row.name)] if row.name in self._networks else []
            self._networks[row.name] = row, network
            while len(self._networks) > 1 and self._bytes() > self._max_bytes:
                left.append(self._networks.popitem(last=False)[1])
                log.info("%s makes room for %s", left[-1][0].name, row.name)
        for _, one in left:
            self._batcher.forget(one)
        if left:
            del left, one
            gc.collect()  # a network is a circle of references

    def _bytes(self) -> int:
        return sum(network.facts.weight_bytes for _, network in self._networks.values())

    def _largest_worth_it(self, network: Network) -> int:
        """How many images to compute at once: the fewest that bring about the most images a second.

        Sizes are doubled from one image on, so there is memory for as many in the usual way of explaining;
        where another method needs more, the batcher halves the batch.
        """
        speeds: dict[int, float] = {}  # images in a batch -> images a second
        count, since_best = 1, 0
        self._peak_bytes()
        while count <= MOST and since_best < PATIENCE:
            try:
                took_s = min(self._try(network, count), self._try(network, count))  # the first one traces
            except DeviceOutOfMemory:
                break
            except Exception as error:  # noqa: BLE001  # each job that meets it has it as its own
                log.warning("%s cannot be warmed: %s", network.facts.name, error)
                break
            if took_s > LONG_S and speeds:
                break
            speed, best = count / max(took_s, 1e-6), max(speeds.values(), default=0)
            since_best = 0 if speed > best * WORTH else since_best + 1
            speeds[count], count = speed, 2 * count
        enough = max(speeds.values(), default=0) / WORTH
        largest = next((count for count, speed in speeds.items() if speed >= enough), 1)
        best = speeds.get(largest, 0)
        peak = self._peak_bytes()
        held = f", {peak / 1e9:.1f} GB of the device's memory at most" if peak else ""
        log.info("%s: %.3g images a second in batches of %d%s", network.facts.name, best, largest, held)
        return largest

    def _try(self, network: Network, count: int) -> float:
        """Seconds that a pass over so many grey pictures takes."""
        grey = np.full((count, *network.facts.input_size, network.facts.channels), GREY, np.uint8)
        best = np.full((count, 1), -1, np.int32)

        def run() -> float:
            begun_s = self._clock()
            network.compute(grey, best)
            return self._clock() - begun_s

        return self._batcher.run_exclusive(run, Deadline(WARM_UP_S), bulk=True)

    def warm_up(self, row: NetworkRow) -> InferenceResult:
        """Load a network and run it once on a grey picture, so that the first job waits for neither."""
        network = self.load(row)
        grey = np.full((*network.facts.input_size, network.facts.channels), GREY, np.uint8)
        with self.reserve() as slot:
            return slot.infer(network, grey, network.labels.wanted(top_n=1), GRADCAM, Deadline(WARM_UP_S))

    @contextmanager
    def reserve(self) -> Iterator[BatchSlot]:
        """Say that a job is on its way, so that a batch may wait for it."""
        with self._batcher.expecting() as arrive:
            yield BatchSlot(self._batcher, arrive)

    def shard_batch_size(self, network: Network) -> int:
        """How many images `explain_many` is best given at once.

        The same on every machine with such a device: in a pass of another size the last digits differ.
        """
        if self._max_batch:
            return self._max_batch
        height, width = network.facts.input_size
        many = VALUES_ON_GPU if self._on_gpu() else VALUES
        return int(min(max(2 ** math.floor(math.log2(many / (3 * height * width))), 1), MOST))

    def infer_many(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        wish: Sequence[int],
        method: Method,
        deadline: Deadline,
    ) -> list[Explanation | GradcamError]:
        """Explain n fitted images (n, height, width, channels) in one pass of their own, behind the urgent.

        In place of an explanation stands why there is none. Raises UnknownLayer, DeviceOutOfMemory,
        JobTimeout.
        """
        answer = self._batcher.compute_many(network, pixels, wish, method, deadline)
        found: list[Explanation | GradcamError] = []
        for index in range(len(pixels)):
            try:
                found.append(explanation_of(network, answer.computed, index, tuple(wish), method.normalize))
            except NetworkIncompatible as error:  # scores that are no numbers, of this image
                found.append(error)
        return found

    def measure(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        seen: Explanation,
        metrics: Sequence[str],
        deadline: Deadline,
        *,
        bulk: bool = False,
    ) -> Explanation:
        """An explanation with its metrics. Others get their turns between its batches. Raises JobTimeout."""

        def score(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
            return self._batcher.run_exclusive(lambda: network.scores(pictures), deadline, bulk=bulk)

        return replace(seen, metrics=tuple(measure(score, pixels, seen, metrics)))
