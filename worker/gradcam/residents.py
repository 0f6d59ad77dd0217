"""The networks a process keeps loaded. One call at a time: a Keras network is not thread-safe."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from worker.deadline import Deadline
from worker.gradcam.explain import Explanation, explain_pixels
from worker.gradcam.network import GRADCAM, Method, Network

WARM_UP_S = 600  # the first pass of a large network on a slow machine takes minutes at most


@dataclass(frozen=True)
class Turn:
    """An answer and what it took to get it."""

    explanation: Explanation
    waited_s: float  # for the device
    computed_s: float
    batch_size: int


class Residents:
    """Loads each network once, when it is first asked for, and lets one thread at a time use the device."""

    def __init__(self, load: Callable[[str], Network]) -> None:
        """`load` turns a name of the catalog into a live network."""
        self._load = load
        self._networks: dict[str, Network] = {}
        self._loading: dict[str, threading.Lock] = {}
        self._door = threading.Lock()
        self._device = threading.Lock()

    def get(self, name: str) -> Network:
        """The live network of this name. Raises what `load` raises."""
        with self._door:
            lock = self._loading.setdefault(name, threading.Lock())
        with lock:
            if name not in self._networks:
                self._networks[name] = self._load(name)
            return self._networks[name]

    def warm(self, name: str) -> None:
        """Load a network and run it once, so that the first job need not wait for either."""
        network = self.get(name)
        black = np.zeros((*network.facts.input_size, 3), np.uint8)
        self.explain(network, black, network.labels.wanted(top_n=1), GRADCAM, Deadline(WARM_UP_S))

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
        if not self._device.acquire(timeout=deadline.left_s()):
            deadline.check("waiting for the device")
        try:
            begun = time.monotonic()
            seen = explain_pixels(network, pixels[np.newaxis], [tuple(wish)], method)[0]
        finally:
            self._device.release()
        return Turn(seen, begun - asked, time.monotonic() - begun, batch_size=1)
