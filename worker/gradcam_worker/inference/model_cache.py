"""Keeps networks loaded, as many as the memory allows, and computes explanations with them in batches."""

import gc
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import NO_DEVICE_MEMORY, GradcamError, NetworkIncompatible, PermanentError
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.explain import (
    Explanation,
    choose_method,
    explain_by_scores,
    extract_explanation,
    pad_selections,
    selections_of,
)
from gradcam_worker.gradcam.faithfulness import measure
from gradcam_worker.gradcam.methods import integrated
from gradcam_worker.gradcam.network import (
    GRADCAM,
    Classifier,
    Computed,
    InputPixels,
    Method,
    Network,
    NetworkFacts,
    compute,
    repeat_values,
    sample_values,
    scores,
)
from gradcam_worker.inference.batcher import DEFAULT_BATCH_SIZE, Batcher
from gradcam_worker.inference.image_in_parts import infer_in_parts
from gradcam_worker.inference.request import InferenceRequest, InferenceResponse, InferenceResult
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

WARM_UP_TIMEOUT_S = 600  # the first batches of a large network take minutes on a slow machine
WARM_UP_MASKS = 15  # with the image itself one pass of 224 x 224 pixels
RETRY_LOAD_AFTER_S = 30  # pause before another try to load a network that failed with a permanent error
GREY = 128  # pixel value of an image without content
MAX_BATCH_SIZE = 64  # larger batches were not faster in measurements
MIN_SPEED_UP = 1.1  # factor in images per second that makes a larger batch worthwhile
SIZES_WITHOUT_GAIN = 2  # in a row, before larger sizes are not tried: a single one may be a measuring error
MAX_BATCH_VALUES_CPU = 2_200_000  # height x width x 3 of all images of a batch: at most 1 s on two cores
MAX_BATCH_VALUES_GPU = 4 * MAX_BATCH_VALUES_CPU
MAX_BATCH_S = 1.0  # urgent requests wait for the batch on the device


@dataclass(frozen=True)
class _LoadFailure:
    """Why a network could not be loaded, and when."""

    row: NetworkRow
    error_type: type[PermanentError]
    message: str  # not the error itself: its traceback would keep the model in memory
    failed_s: float  # monotonic time


class BatchSlot:
    """A job that will submit one image. Batches wait for it a short time."""

    def __init__(self, batcher: Batcher, submitted: Callable[[], None]) -> None:
        self._batcher, self._submitted = batcher, submitted

    def infer(
        self,
        network: Network,
        pixels: InputPixels,
        classes: Sequence[int],
        method: Method,
        deadline: Deadline,
        *,
        bulk: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> InferenceResult:
        """Explain one image, in a batch with others.

        Args:
            network: The network.
            pixels: Image of the network's input size (height, width, channels).
            classes: Ids of the classes to explain; -1 is the best one, -2 the second, and so on.
            method: The method.
            deadline: The job's deadline.
            bulk: Whether urgent requests go first.
            values: Of further inputs (width,); None: the network has none.

        Returns:
            The explanation, and how long the image waited and was computed.

        Raises:
            UnknownLayer: The network has no such layer.
            NetworkIncompatible: The network cannot process the image, or its scores are not finite.
            DeviceOutOfMemory: The device has too little memory even for this image alone.
            JobTimeout: The deadline passed.
        """
        if method.name == integrated.NAME:
            return self._integrate(
                network, pixels, tuple(classes), method, deadline, bulk=bulk, values=values
            )
        response = self._batcher.compute(
            network, pixels, classes, method, deadline, bulk=bulk, submitted=self._submitted, values=values
        )
        explanation = extract_explanation(network, response.computed, response.index, tuple(classes), method)
        return InferenceResult(explanation, response.waited_s, response.computed_s, response.batch_size)

    def _integrate(
        self,
        network: Network,
        pixels: InputPixels,
        classes: tuple[int, ...],
        method: Method,
        deadline: Deadline,
        *,
        bulk: bool,
        values: NDArray[np.float32] | None,
    ) -> InferenceResult:
        """`infer` with Integrated Gradients, part by part."""

        def infer_part(image: InputPixels, ids: tuple[int, ...], part: Method) -> InferenceResponse:
            return self._batcher.compute(
                network, image, ids, part, deadline, bulk=bulk, submitted=self._submitted, values=values
            )

        def score(images: InputPixels) -> NDArray[np.float32]:
            its_values = repeat_values(values, len(images))
            return self._batcher.run_exclusive(
                lambda: scores(network, images, its_values), deadline, bulk=bulk
            )

        return infer_in_parts(network, pixels, classes, method, infer_part, score)


class ModelCache:
    """Loads each network once, when it is first needed, and measures its best batch size.

    A network whose row has changed is loaded again. Jobs that use the old version continue with it. If the
    networks exceed the memory limit, the least recently used ones are dropped.
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
        """Load nothing yet.

        Args:
            load: Loads the network of a row.
            max_batch: Maximum number of images in a batch; 0: measure the best number for each network.
            max_bytes: Maximum size of the weights of all networks together. The latest network stays in any
                case.
            wait_s: Maximum time that a batch waits for expected jobs, in seconds.
            peak_bytes: Returns the peak memory use of the device since the previous call; None: unknown.
            on_gpu: Whether the device is a GPU.
            clock: Measures the duration of loading and of batches, in seconds.
            observer: Counts loads, images and seconds.
        """
        self._load = load
        self._max_batch, self._max_bytes = max_batch, max_bytes
        self._peak_bytes, self._clock, self._on_gpu = peak_bytes, clock, on_gpu
        self._observer = observer
        self._batcher = Batcher(
            wait_s=wait_s, max_batch_size=max_batch or DEFAULT_BATCH_SIZE, observer=observer
        )
        self._networks: OrderedDict[str, tuple[NetworkRow, Network]] = OrderedDict()  # last used last
        self._replaced: dict[NetworkRow, tuple[Network, float]] = {}  # and when they were used
        self.keep_replaced_s = 0.0  # how long after its latest use: jobs of other processes hold no network
        self._failed_loads: dict[str, _LoadFailure] = {}
        self._loading: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def failure(self) -> str | None:
        """Why nothing can be computed any more, or None."""
        return self._batcher.failure

    @property
    def count(self) -> int:
        """Number of loaded networks."""
        return len(self._networks)

    @property
    def mean_batch_size(self) -> float:
        """Moving average of the number of images in a batch; 0 before the first one."""
        return self._batcher.mean_batch_size

    def load(self, row: NetworkRow, deadline: Deadline | None = None) -> Network:
        """Return the network of this row, in exactly this version; load it if necessary.

        After a permanent error the row is refused for `RETRY_LOAD_AFTER_S` without another try, so that not
        every job downloads its file in vain.

        Args:
            row: The row.
            deadline: The job's deadline. Loading does not count: weights may have to be downloaded.

        Raises:
            GradcamError: Whatever the constructor's `load` raises.
        """
        if network := self._cached(row):
            return network  # without a wait for a thread that loads another version
        since_s = time.monotonic()
        try:
            return self._load_once(row)
        finally:
            if deadline:
                deadline.give_back(since_s, time.monotonic())

    def _load_once(self, row: NetworkRow) -> Network:
        """Load a network, or wait for the thread that does."""
        with self._lock:
            lock = self._loading.setdefault(row.name, threading.Lock())
        with lock:
            if network := self._cached(row):
                return network
            failure = self._failed_loads.get(row.name)
            if failure and failure.row == row and time.monotonic() - failure.failed_s < RETRY_LOAD_AFTER_S:
                raise failure.error_type(failure.message)
            begun_s, succeeded = self._clock(), False
            try:
                network = self._load_and_measure(row)
                succeeded = True
            finally:
                self._observer.network_loaded(self._clock() - begun_s, succeeded=succeeded)
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
        measured = self._max_batch == 0 and not network.facts.scores_only  # its passes have one size
        self._batcher.limit(network, self._best_batch_size(network) if measured else self._max_batch or 1)
        return network

    def find_loaded(self, row: NetworkRow) -> Network | None:
        """Return the network of this row if it is loaded; then it counts as used."""
        return self._cached(row)

    def submit(self, requests: Sequence[InferenceRequest], submitted: Callable[[], None]) -> None:
        """Queue requests of other processes: see `Batcher.submit`."""
        self._batcher.submit(requests, submitted)

    def drain(self, timeout_s: float) -> bool:
        """Start no further batch, and wait for those at the device: see `Batcher.drain`."""
        return self._batcher.drain(timeout_s)

    def drop_cancelled(self) -> None:
        """Complete the waiting requests that were cancelled."""
        self._batcher.drop_cancelled()

    def set_expected_elsewhere(self, count: Callable[[], int]) -> None:
        """Let batches wait for the requests that other processes will soon send, too."""
        self._batcher.expected_elsewhere = count

    def _cached(self, row: NetworkRow) -> Network | None:
        with self._lock:
            cached, network = self._networks.get(row.name, (None, None))
            if cached == row:
                self._networks.move_to_end(row.name)
                return network
            network, _ = self._replaced.get(row, (None, 0.0))
            if network:
                self._replaced[row] = network, time.monotonic()
            return network

    def _store(self, row: NetworkRow, network: Network) -> None:
        """Store a network; drop the least recently used ones until all fit."""
        with self._lock:
            dropped = [self._networks.pop(row.name)] if row.name in self._networks else []
            if self.keep_replaced_s and dropped:
                old_row, old_network = dropped.pop()
                self._replaced[old_row] = old_network, time.monotonic()
            self._networks[row.name] = row, network
            while len(self._networks) > 1 and self._weight_bytes() > self._max_bytes:
                dropped.append(self._networks.popitem(last=False)[1])
                log.info("network_evicted", network=dropped[-1][0].name, loaded=row.name)
        networks = [dropped.pop()[1] for _ in range(len(dropped))]
        self._forget(networks)

    def drop_replaced(self) -> None:
        """Drop each network that a newer version has replaced, when it has not been used lately."""
        with self._lock:
            last_s = time.monotonic() - self.keep_replaced_s
            unused = [row for row, (_, used_s) in self._replaced.items() if used_s < last_s]
            networks = [self._replaced.pop(row)[0] for row in unused]
        self._forget(networks)

    def _forget(self, networks: list[Network]) -> None:
        """Free the memory of networks that were dropped; the list is emptied."""
        for network in networks:
            self._batcher.forget(network)
        if networks:
            networks.clear()
            del network
            is_frozen = gc.get_freeze_count() > 0  # as a worker process freezes what it has loaded first
            gc.unfreeze()
            gc.collect()  # a network has reference cycles
            if is_frozen:
                gc.freeze()

    def _weight_bytes(self) -> int:
        return sum(network.facts.weight_bytes for _, network in self._networks.values())

    def _best_batch_size(self, network: Network) -> int:
        """Measure the smallest batch size with nearly the most images per second.

        The size is doubled from one image on, until the device has too little memory or nothing is gained. If
        a method needs more memory than the measured one, the batcher halves the batch.
        """
        speeds: dict[int, float] = {}  # batch size -> images per second
        size, sizes_without_gain = 1, 0
        self._peak_bytes()
        while size <= MAX_BATCH_SIZE and sizes_without_gain < SIZES_WITHOUT_GAIN:
            try:
                # Twice: the first batch of a size includes tracing.
                took_s = min(self._time_batch(network, size), self._time_batch(network, size))
            except NO_DEVICE_MEMORY:
                break
            except Exception as error:  # noqa: BLE001  # jobs of this network will get the error themselves
                log.warning("network_warm_up_failed", network=network.facts.name, error=error)
                break
            if took_s > MAX_BATCH_S and speeds:
                break
            speed, best_speed = size / max(took_s, 1e-6), max(speeds.values(), default=0)
            sizes_without_gain = 0 if speed > best_speed * MIN_SPEED_UP else sizes_without_gain + 1
            speeds[size], size = speed, 2 * size
        good_speed = max(speeds.values(), default=0) / MIN_SPEED_UP
        best_size = next((size for size, speed in speeds.items() if speed >= good_speed), 1)
        log.info(
            "batch_size_measured",
            network=network.facts.name,
            batch_size=best_size,
            images_per_s=float(speeds.get(best_size, 0)),
            peak_bytes=self._peak_bytes() or None,
        )
        return best_size

    def _time_batch(self, network: Network, size: int) -> float:
        """Compute a batch of grey images; return how many seconds it took."""
        facts = network.facts
        images = np.full((size, *facts.input_size, facts.channels), GREY, facts.pixel_type)
        classes = np.full((size, 1), -1, np.int32)
        values = repeat_values(sample_values(network.facts), size)

        def run() -> float:
            begun_s = self._clock()
            compute(network, images, classes, GRADCAM, values)
            return self._clock() - begun_s

        return self._batcher.run_exclusive(run, Deadline(WARM_UP_TIMEOUT_S), bulk=True)

    def warm_up(self, row: NetworkRow) -> InferenceResult:
        """Load a network and explain a grey image with it, so that the first job is not slow.

        Of a network that only gives scores the explanation has few masks.
        """
        network = self.load(row)
        facts = network.facts
        image = np.full((*facts.input_size, facts.channels), GREY, facts.pixel_type)
        if network.facts.scores_only:
            begun_s = self._clock()
            explanation = explain_by_scores(
                network,
                partial(self.scores, network, deadline=Deadline(WARM_UP_TIMEOUT_S)),
                image,
                network.labels.select(top_n=1),
                choose_method(Method("rise", masks=WARM_UP_MASKS), network.facts),
            )
            return InferenceResult(explanation, 0.0, self._clock() - begun_s, 1)
        with self.reserve() as slot:
            return slot.infer(
                network,
                image,
                network.labels.select(top_n=1),
                GRADCAM,
                Deadline(WARM_UP_TIMEOUT_S),
                values=sample_values(network.facts),
            )

    @contextmanager
    def reserve(self) -> Iterator[BatchSlot]:
        """Announce a job, so that batches wait a short time for its image."""
        with self._batcher.expecting() as submitted:
            yield BatchSlot(self._batcher, submitted)

    def shard_batch_size(self, network: Network) -> int:
        """Return the batch size for the images of a shard.

        It does not depend on measurements, so that all machines with the same kind of device compute the same
        results: the last digits depend on the size of the batch.
        """
        return choose_shard_batch_size(network.facts, self._max_batch, on_gpu=self._on_gpu())

    def infer_many(
        self,
        network: Network,
        pixels: InputPixels,
        classes: Sequence[int] | Sequence[tuple[int, ...]],
        method: Method,
        deadline: Deadline,
        *,
        alone: bool = False,  # noqa: ARG002  # in this process, whatever ends it ends the job, too
        values: NDArray[np.float32] | None = None,
    ) -> list[Explanation | GradcamError]:
        """Explain n images in a batch of their own, after urgent requests.

        Args:
            network: The network.
            pixels: Images of the network's input size (n, height, width, channels).
            classes: Ids of the classes to explain in each image; -1 is the best one, -2 the second, and so
                on. They may be a tuple for each image instead.
            method: The method.
            deadline: The job's deadline.
            alone: Whether nothing else may be at the device: they may have ended an engine process.
            values: Of further inputs (n, width); None: the network has none.

        Returns:
            For each image its explanation, or the error of this image.

        Raises:
            UnknownLayer: The network has no such layer.
            DeviceOutOfMemory: The device has too little memory for this batch.
            JobTimeout: The deadline passed.
        """
        of_each = selections_of(classes, len(pixels))
        if method.name == integrated.NAME:

            def compute(images: InputPixels, wanted: NDArray[np.int32], part: Method) -> Computed:
                rows = [*map(tuple, wanted.tolist())]
                computed: Computed = self._batcher.compute_many(
                    network, images, rows, part, deadline, values
                ).computed
                return computed

            def score(images: InputPixels) -> NDArray[np.float32]:
                return self._batcher.run_exclusive(
                    lambda: scores(network, images, values), deadline, bulk=True
                )

            selected = pad_selections(of_each)
            computed = integrated.integrate(compute, score, pixels, selected, method, network.facts.head)
            return extract_each(network, computed, of_each, method)
        response = self._batcher.compute_many(network, pixels, classes, method, deadline, values)
        return extract_each(network, response.computed, of_each, method)

    def scores(
        self,
        network: Network,
        pixels: InputPixels,
        deadline: Deadline,
        *,
        bulk: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Compute the scores of n images alone, in a pass of their own.

        Args:
            network: The network.
            pixels: Images of the network's input size (n, height, width, channels).
            deadline: The job's deadline.
            bulk: Whether urgent requests go first.
            values: Of further inputs (width,), which all images get; None: the network has none.

        Returns:
            (n, classes), before the softmax.

        Raises:
            DeviceOutOfMemory: The device has too little memory for this pass.
            JobTimeout: The deadline passed.
        """
        its_values = repeat_values(values, len(pixels))
        return self._batcher.run_exclusive(lambda: scores(network, pixels, its_values), deadline, bulk=bulk)

    def measure(
        self,
        network: Network,
        pixels: InputPixels,
        explanation: Explanation,
        metrics: Sequence[str],
        deadline: Deadline,
        *,
        bulk: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> Explanation:
        """Measure how faithful an explanation is. Batches of other jobs run between its own.

        Args:
            network: The network that explained the image.
            pixels: The image, at the network's input size (height, width, channels).
            explanation: Its explanation.
            metrics: Names from `faithfulness.METRICS`.
            deadline: The job's deadline.
            bulk: Whether urgent requests go first.
            values: Of further inputs (width,), which all its images get; None: the network has none.

        Returns:
            The explanation with its metrics.

        Raises:
            JobTimeout: The deadline passed.
        """
        score = partial(self.scores, network, deadline=deadline, bulk=bulk, values=values)
        return replace(explanation, metrics=tuple(measure(score, pixels, explanation, metrics)))


def choose_shard_batch_size(facts: NetworkFacts, max_batch: int, *, on_gpu: bool) -> int:
    """Choose the batch size for the images of a shard: see `ModelCache.shard_batch_size`.

    Args:
        facts: Of the network.
        max_batch: The batch size of the settings; 0: none.
        on_gpu: Whether the device is a GPU.
    """
    if max_batch:
        return max_batch
    height, width = facts.input_size
    max_values = MAX_BATCH_VALUES_GPU if on_gpu else MAX_BATCH_VALUES_CPU
    return int(min(max(2 ** math.floor(math.log2(max_values / (3 * height * width))), 1), MAX_BATCH_SIZE))


def extract_each(
    network: Classifier, computed: Computed, classes: Sequence[tuple[int, ...]], method: Method
) -> list[Explanation | GradcamError]:
    """Extract the explanation of each image of a pass; its error where its scores are not finite.

    Args:
        network: The network.
        computed: The results of the pass.
        classes: Of each image, from `ClassIndex.select`.
        method: How they were explained.
    """
    results: list[Explanation | GradcamError] = []
    for index, selection in enumerate(classes):
        try:
            results.append(extract_explanation(network, computed, index, selection, method))
        except NetworkIncompatible as error:
            results.append(error)
    return results
