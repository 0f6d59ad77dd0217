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
from gradcam_worker.inference.batcher import DEFAULT_BATCH_SIZE, Batcher
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline

log = logging.getLogger("gradcam")

WARM_UP_S = 600  # the first passes of a large network on a slow machine take minutes at most
RETRY_LOAD_AFTER_S = 30  # a network that could not be loaded as it is described
GREY = 128  # of a pixel of an image that shows nothing
MAX_BATCH_SIZE = 64  # images: larger batches were not measured to be faster
MIN_SPEED_UP = 1.1  # of a larger batch, in images a second
SIZES_WITHOUT_GAIN = 2  # in a row, before larger ones are not tried: one alone may be chance
PASS_VALUES_ON_CPU = 2_200_000  # height x width x 3 of all images in a pass: at most 1 s on two cores
PASS_VALUES_ON_GPU = 4 * PASS_VALUES_ON_CPU
MAX_PASS_S = 1.0  # urgent requests wait for the pass that runs


@dataclass(frozen=True)
class InferenceResult:
    """An explanation, and how long it took."""

    explanation: Explanation
    waited_s: float  # for the device
    computed_s: float
    batch_size: int


@dataclass(frozen=True)
class _LoadFailure:
    """Why a network could not be loaded, and when."""

    row: NetworkRow
    kind: type[PermanentError]
    why: str  # the text alone: a traceback would hold the model in memory
    failed_s: float


class BatchSlot:
    """A job that will submit one image. Until it has, batches wait for it a little."""

    def __init__(self, batcher: Batcher, submitted: Callable[[], None]) -> None:
        self._batcher, self._submitted = batcher, submitted

    def infer(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        classes: Sequence[int],
        method: Method,
        deadline: Deadline,
        *,
        bulk: bool = False,
    ) -> InferenceResult:
        """Explain one image, in one pass with others.

        Args:
            network: Explains it.
            pixels: A fitted image (height, width, channels).
            classes: Ids of the classes to explain; -1 is the best one, -2 the second, and so on.
            method: How.
            deadline: By when.
            bulk: Whether urgent requests go first.

        Returns:
            The explanation, and how long the image waited and was computed.

        Raises:
            UnknownLayer: The network has no such layer.
            NetworkIncompatible: The network cannot take it, or its scores are no numbers.
            DeviceOutOfMemory: The device has too little memory for this image alone.
            JobTimeout: The deadline passed.
        """
        response = self._batcher.compute(
            network, pixels, classes, method, deadline, bulk=bulk, submitted=self._submitted
        )
        seen = explanation_of(network, response.computed, response.index, tuple(classes), method.normalize)
        return InferenceResult(seen, response.waited_s, response.computed_s, response.batch_size)


class ModelCache:
    """Loads each network once, when it is first asked for, and measures its best batch size.

    A network whose row has changed is loaded anew. Jobs that hold the old one go on with it.
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
        observer: Observer = NULL_OBSERVER,
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
        self._batcher = Batcher(wait_s=wait_s, largest=max_batch or DEFAULT_BATCH_SIZE, observer=observer)
        self._networks: OrderedDict[str, tuple[NetworkRow, Network]] = OrderedDict()  # last used last
        self._failed_loads: dict[str, _LoadFailure] = {}
        self._loading: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def failure(self) -> str | None:
        """Why nothing is computed here any more, or None."""
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
        """The live network of this row, and of no other version of it.

        One that cannot be loaded as it is described is refused for `RETRY_LOAD_AFTER_S` without another try:
        its file would be fetched in vain for every job.

        Raises:
            GradcamError: Whatever the `load` of the constructor raises.
        """
        if network := self._cached(row):
            return network  # no wait while another version is loaded
        with self._lock:
            lock = self._loading.setdefault(row.name, threading.Lock())
        with lock:
            if network := self._cached(row):
                return network
            failed = self._failed_loads.get(row.name)
            if failed and failed.row == row and time.monotonic() - failed.failed_s < RETRY_LOAD_AFTER_S:
                raise failed.kind(failed.why)
            begun_s, well = self._clock(), False
            try:
                network = self._load_and_measure(row)
                well = True
            finally:
                self._observer.network_loaded(self._clock() - begun_s, succeeded=well)
            self._store(row, network)
            return network

    def _load_and_measure(self, row: NetworkRow) -> Network:
        """Load a network, and measure its best batch size."""
        try:
            network = self._load(row)
        except PermanentError as error:
            self._failed_loads[row.name] = _LoadFailure(row, type(error), str(error), time.monotonic())
            raise
        self._failed_loads.pop(row.name, None)
        self._batcher.limit(network, self._max_batch or self._best_batch_size(network))
        return network

    def _cached(self, row: NetworkRow) -> Network | None:
        with self._lock:
            cached, network = self._networks.get(row.name, (None, None))
            if cached != row:
                return None
            self._networks.move_to_end(row.name)
            return network

    def _store(self, row: NetworkRow, network: Network) -> None:
        """Store a network; drop the least recently used ones until all fit."""
        with self._lock:
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

    def _best_batch_size(self, network: Network) -> int:
        """The smallest batch with about the most images a second.

        Sizes are doubled from one image on, until the device has too little memory or nothing is gained.
        Where another method needs more memory, the batcher halves the batch.
        """
        speeds: dict[int, float] = {}  # images in a batch -> images a second
        count, since_best = 1, 0
        self._peak_bytes()
        while count <= MAX_BATCH_SIZE and since_best < SIZES_WITHOUT_GAIN:
            try:
                # Twice: the first pass traces.
                took_s = min(self._time_pass(network, count), self._time_pass(network, count))
            except DeviceOutOfMemory:
                break
            except Exception as error:  # noqa: BLE001  # each job that meets it fails by itself
                log.warning("%s cannot be warmed: %s", network.facts.name, error)
                break
            if took_s > MAX_PASS_S and speeds:
                break
            speed, best = count / max(took_s, 1e-6), max(speeds.values(), default=0)
            since_best = 0 if speed > best * MIN_SPEED_UP else since_best + 1
            speeds[count], count = speed, 2 * count
        enough = max(speeds.values(), default=0) / MIN_SPEED_UP
        largest = next((count for count, speed in speeds.items() if speed >= enough), 1)
        best = speeds.get(largest, 0)
        peak = self._peak_bytes()
        memory = f", {peak / 1e9:.1f} GB of the device's memory at most" if peak else ""
        log.info("%s: %.3g images a second in batches of %d%s", network.facts.name, best, largest, memory)
        return largest

    def _time_pass(self, network: Network, count: int) -> float:
        """Seconds that a pass over so many grey images takes."""
        grey = np.full((count, *network.facts.input_size, network.facts.channels), GREY, np.uint8)
        best = np.full((count, 1), -1, np.int32)

        def run() -> float:
            begun_s = self._clock()
            network.compute(grey, best)
            return self._clock() - begun_s

        return self._batcher.run_exclusive(run, Deadline(WARM_UP_S), bulk=True)

    def warm_up(self, row: NetworkRow) -> InferenceResult:
        """Load a network and run it once on a grey image, so that the first job does not wait for that."""
        network = self.load(row)
        grey = np.full((*network.facts.input_size, network.facts.channels), GREY, np.uint8)
        with self.reserve() as slot:
            return slot.infer(network, grey, network.labels.wanted(top_n=1), GRADCAM, Deadline(WARM_UP_S))

    @contextmanager
    def reserve(self) -> Iterator[BatchSlot]:
        """Announce a job, so that a batch may wait for its image."""
        with self._batcher.expecting() as submitted:
            yield BatchSlot(self._batcher, submitted)

    def shard_batch_size(self, network: Network) -> int:
        """How many images `infer_many` is given at once.

        The same on every machine with such a device: in passes of another size the last digits differ.
        """
        if self._max_batch:
            return self._max_batch
        height, width = network.facts.input_size
        many = PASS_VALUES_ON_GPU if self._on_gpu() else PASS_VALUES_ON_CPU
        return int(min(max(2 ** math.floor(math.log2(many / (3 * height * width))), 1), MAX_BATCH_SIZE))

    def infer_many(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        classes: Sequence[int],
        method: Method,
        deadline: Deadline,
    ) -> list[Explanation | GradcamError]:
        """Explain n fitted images (n, height, width, channels) in one pass of their own, behind the urgent.

        In place of an explanation stands why there is none. Raises UnknownLayer, DeviceOutOfMemory,
        JobTimeout.
        """
        response = self._batcher.compute_many(network, pixels, classes, method, deadline)
        found: list[Explanation | GradcamError] = []
        for index in range(len(pixels)):
            try:
                found.append(
                    explanation_of(network, response.computed, index, tuple(classes), method.normalize)
                )
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
        """An explanation with its metrics. Passes of others run between its own. Raises JobTimeout."""

        def score(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
            return self._batcher.run_exclusive(lambda: network.scores(pictures), deadline, bulk=bulk)

        return replace(seen, metrics=tuple(measure(score, pixels, seen, metrics)))
