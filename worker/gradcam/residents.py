"""The networks a process keeps loaded. One call at a time: a Keras network is not thread-safe."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from worker.deadline import Deadline
from worker.errors import PermanentError
from worker.gradcam.catalog import NetworkRow
from worker.gradcam.explain import Explanation, explain_pixels
from worker.gradcam.faithfulness import measure
from worker.gradcam.network import GRADCAM, Method, Network

WARM_UP_S = 600  # the first pass of a large network on a slow machine takes minutes at most
REFUSED_S = 30  # before a network that cannot be loaded as it is described is tried again
GREY = 128  # a picture of nothing


@dataclass(frozen=True)
class Turn:
    """An answer and what it took to get it."""

    explanation: Explanation
    waited_s: float  # for the device
    computed_s: float
    batch_size: int


@dataclass(frozen=True)
class _Refused:
    """Why a row could not be loaded, and when that was."""

    row: NetworkRow
    error: PermanentError
    at_s: float


class Residents:
    """Loads each network once, when it is first asked for, and lets one thread at a time use the device.

    A name whose row has changed is loaded anew. Who holds the network of before keeps it.
    """

    def __init__(self, load: Callable[[NetworkRow], Network]) -> None:
        """`load` turns a row into a live network."""
        self._load = load
        self._networks: dict[str, tuple[NetworkRow, Network]] = {}
        self._refused: dict[str, _Refused] = {}
        self._loading: dict[str, threading.Lock] = {}
        self._door = threading.Lock()
        self._device = threading.Lock()

    def get(self, row: NetworkRow) -> Network:
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
                raise type(refused.error)(str(refused.error)) from refused.error
            try:
                network = self._load(row)
            except PermanentError as error:
                self._refused[row.name] = _Refused(row, error, time.monotonic())
                raise
            self._networks[row.name] = row, network
            return network

    def _held(self, row: NetworkRow) -> Network | None:
        held, network = self._networks.get(row.name, (None, None))
        return network if held == row else None

    def warm(self, row: NetworkRow) -> Turn:
        """Load a network and run it once on a grey picture, so that the first job waits for neither."""
        network = self.get(row)
        grey = np.full((*network.facts.input_size, network.facts.channels), GREY, np.uint8)
        return self.explain(network, grey, network.labels.wanted(top_n=1), GRADCAM, Deadline(WARM_UP_S))

    def explain(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        wish: Sequence[int],
        method: Method,
        deadline: Deadline,
    ) -> Turn:
        """Explain one fitted image (height, width, 3); waits for its turn until the deadline.

        Raises UnknownLayer, DeviceOutOfMemory, JobTimeout.
        """
        asked = time.monotonic()
        with self._turn(deadline):
            begun = time.monotonic()
            seen = explain_pixels(network, pixels[np.newaxis], [tuple(wish)], method)[0]
        return Turn(seen, begun - asked, time.monotonic() - begun, batch_size=1)

    def measure(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        seen: Explanation,
        metrics: Sequence[str],
        deadline: Deadline,
    ) -> Explanation:
        """An explanation with its metrics. Others get their turns between its batches. Raises JobTimeout."""

        def score(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
            with self._turn(deadline):
                return network.scores(pictures)

        return replace(seen, metrics=tuple(measure(score, pixels, seen, metrics)))

    @contextmanager
    def _turn(self, deadline: Deadline) -> Iterator[None]:
        """Have the device to oneself. Raises JobTimeout."""
        waiting = "waiting for the device"
        deadline.check(waiting)
        if not self._device.acquire(timeout=deadline.left_s()):
            deadline.check(waiting)
        try:
            yield
        finally:
            self._device.release()
