"""Many job threads, one device: their images are merged into batches, and each gets its own answer back.

    job threads --images--> groups --batches--> thread of the device --answers--> a second one --> job threads

Only images for the same network, method and (nearly) the same number of classes share a batch. A batch closes
when it is full, or at once where no other job is on its way, or when it has waited as long as a pass takes,
and never longer than `wait_s`. While the device computes, the next full batch is handed over, so that its
pixels travel meanwhile; one that is not full goes on filling up.

A batch that fails is halved and tried again, unless it never can succeed: so one that was too large for the
memory fits, and one bad image fails alone. No thread waits beyond its deadline, whatever the device does.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import DeviceOutOfMemory, GradcamError, InternalError, PermanentError
from gradcam_worker.gradcam.explain import padded
from gradcam_worker.gradcam.network import Method, Network
from gradcam_worker.inference.request import (
    BatchQueue,
    Finish,
    InferenceRequest,
    InferenceResponse,
    Key,
    is_patient,
)
from gradcam_worker.observability import tracing
from gradcam_worker.observability.events import SILENT, Observer
from gradcam_worker.resilience.deadline import Deadline

UNKNOWN = 8  # images in a batch, where nobody has found out how many are worth it
AHEAD = 2  # batches at the device: one that it computes, one that is there already
NEWEST = 0.2  # weight of the last pass in the mean of how long one takes
NEVER_S = threading.TIMEOUT_MAX  # from now: no reason to look before something changes
TOGETHER = -1  # in the place of how many classes: a pass that nothing joins
ALONE = (0, None, 0)  # the key of all that shares a batch with nothing
WAITING = "waiting for the device"
HUNG_S = 600.0  # that a pass may take: as long as a job may wait, and the first pass of a large network
MAX_GROUPS = 64  # remembered: names of layers are a stranger's input

T = TypeVar("T")


class Batcher:
    """Owns the device: whatever runs there is begun by its one thread."""

    def __init__(self, *, wait_s: float = 0.01, largest: int = UNKNOWN, observer: Observer = SILENT) -> None:
        """`wait_s`: how long a batch waits for jobs that are on their way, at most.

        `largest`: how many images a batch has at most where `limit` says nothing else.
        """
        self._wait_s, self._observer = wait_s, observer
        self._groups: dict[Key, BatchQueue] = {}
        self._again: list[list[InferenceRequest]] = []  # halves of batches that failed
        self._otherwise = largest
        self._largest: dict[int, int] = {}  # images in a batch, by the network's id
        self._coming = 0  # jobs on their way
        self._at_device = 0  # batches
        self._batches = 0  # so far
        self._bulk_last = False  # whether the last of them was of bulk alone
        self._changed = threading.Condition()
        self._begun: SimpleQueue[tuple[list[InferenceRequest], Finish, float]] = SimpleQueue()
        self._broken: str | None = None
        self.mean_batch_size = 0.0  # in a pass, lately; 0 before the first
        self._free_s = 0.0  # when the device had done all that it was given before
        self._since_s: float | None = None  # when the device last answered, or got its first batch
        self._threads: list[threading.Thread] = []

    @contextmanager
    def expecting(self) -> Iterator[Callable[[], None]]:
        """Within it a job is on its way, until it calls what is yielded, as it hands in its image."""
        there = False

        def arrive() -> None:
            nonlocal there
            if not there:
                there = True
                self._coming -= 1

        with self._changed:
            self._coming += 1
        try:
            yield arrive
        finally:
            with self._changed:
                arrive()
                self._changed.notify_all()

    def limit(self, network: Network, largest: int) -> None:
        """From now on, at most so many images of this network in one batch."""
        with self._changed:
            self.forget(network)
            self._largest[id(network)] = largest

    def forget(self, network: Network) -> None:
        """Keep nothing about a network that has been left."""
        with self._changed:
            self._largest.pop(id(network), None)
            for key, group in [*self._groups.items()]:
                if key[0] == id(network) and not group.waiting:
                    del self._groups[key]

    def compute(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        wish: Sequence[int],
        method: Method,
        deadline: Deadline,
        *,
        bulk: bool = False,
        arrive: Callable[[], None] = lambda: None,
    ) -> InferenceResponse:
        """One fitted image (height, width, channels), together with others; waits until the deadline.

        Raises JobTimeout, DeviceOutOfMemory (for this image alone), and what the network raises for it.
        """

        def begin(batch: list[InferenceRequest]) -> Finish:
            images = np.stack([one.pixels for one in batch if one.pixels is not None])
            return network.begin(images, padded([one.wish for one in batch]), method)

        # Wishes of about the same length go together: all of a batch are computed as long as the longest.
        key = (id(network), method, (len(wish) - 1).bit_length())
        request = InferenceRequest(key, begin, deadline, bulk, pixels=pixels, wish=tuple(wish))
        answer: InferenceResponse = self._ask(
            request, self._largest.get(id(network), self._otherwise), arrive
        )
        return answer

    def compute_many(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        wish: Sequence[int],
        method: Method,
        deadline: Deadline,
    ) -> InferenceResponse:
        """Fitted images (n, height, width, channels) in a pass of their own, behind whoever is urgent.

        Who is with whom does not depend on what else is asked for, so neither do the last digits of what
        comes out. Raises JobTimeout, DeviceOutOfMemory, and what the network raises.
        """

        def begin(_: list[InferenceRequest]) -> Finish:
            return network.begin(pixels, padded([tuple(wish)] * len(pixels)), method)

        key = (id(network), method, TOGETHER)
        request = InferenceRequest(key, begin, deadline, bulk=True, images=len(pixels))
        answer: InferenceResponse = self._ask(request, 1, lambda: None)
        return answer

    def run_exclusive(self, run: Callable[[], T], deadline: Deadline, *, bulk: bool = False) -> T:
        """Have the device to oneself while `run` runs. Raises JobTimeout, and what `run` raises."""

        def begin(_: list[InferenceRequest]) -> Finish:
            result = run()
            return lambda: result

        request = InferenceRequest(ALONE, begin, deadline, bulk, images=0)
        result: T = self._ask(request, 1, lambda: None).computed
        return result

    def _ask(self, request: InferenceRequest, largest: int, arrive: Callable[[], None]) -> Any:
        """Hand in a request, wait for its end."""
        request.deadline.check(WAITING)
        with self._changed:
            if self._broken:
                raise InternalError(self._broken)
            if not self._threads:
                serving = (self._hand_over, self._hand_back)
                self._threads = [
                    threading.Thread(target=self._guarded, args=[one], daemon=True) for one in serving
                ]
                for thread in self._threads:
                    thread.start()
            arrive()
            fresh = BatchQueue(largest, served=self._batches)
            self._groups.setdefault(request.key, fresh).waiting.append(request)
            self._changed.notify_all()
        while not request.done.wait(request.deadline.left_s()) and request.deadline.left_s():
            pass  # the deadline was put off
        if not request.done.is_set():
            with self._changed:
                self._drop_expired()
        if not request.done.is_set():
            request.deadline.check(WAITING)  # it is at the device, and its answer will be nobody's
        if request.error is not None:
            raise request.error
        return request.answer

    def _guarded(self, serve: Callable[[], None]) -> None:
        """Whatever ends one of the two threads is told to all who wait, and to all who come."""
        try:
            while True:
                serve()
        except BaseException as error:  # noqa: BLE001  # nobody may be left waiting
            broken = f"The thread of the device ended: {InternalError.of(error)}"
            with self._changed:
                self._broken = broken
                for some in [*self._again, *(group.waiting for group in self._groups.values())]:
                    for request in some:
                        request.end(error=InternalError(broken))

    def _hand_over(self) -> None:
        """A turn of the device's thread: one batch. It keeps nothing: an idle thread holds no network."""
        batch = self._next()
        begun_s = time.monotonic()
        try:
            finish = batch[0].begin(batch)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is these requests' own
            self._fail(batch, error)
        else:
            self._begun.put((batch, finish, begun_s))

    def _hand_back(self) -> None:
        """Wait for the device, so that its thread can hand over the next batch meanwhile."""
        batch, finish, handed_s = self._begun.get()
        begun_s = max(handed_s, self._free_s)  # it computes one after the other
        try:
            computed = finish()
        except BaseException as error:  # noqa: BLE001  # as above
            self._fail(batch, error)
            return
        self._free_s = time.monotonic()
        took_s = self._free_s - begun_s
        with self._changed:
            self._leave()
            if group := self._groups.get(batch[0].key):
                group.pass_s = took_s + (1 - NEWEST) * ((group.pass_s or took_s) - took_s)
        for index, one in enumerate(batch):
            one.end(InferenceResponse(computed, index, begun_s - one.asked_s, took_s, len(batch)))
        tracing.batch([one.asker for one in batch if one.images], begun_s, took_s)
        if images := sum(one.images for one in batch):
            self.mean_batch_size += (images - self.mean_batch_size) * (NEWEST if self.mean_batch_size else 1)
            self._observer.computed(images, took_s)

    @property
    def failure(self) -> str | None:
        """Why nothing will be computed here any more."""
        since_s = self._since_s
        if since_s and time.monotonic() - since_s > HUNG_S:
            return f"the device has not answered for {HUNG_S:g} s"
        return self._broken

    def _leave(self) -> None:
        self._at_device -= 1
        self._since_s = time.monotonic() if self._at_device else None
        if len(self._groups) > MAX_GROUPS:
            self._groups = {key: group for key, group in self._groups.items() if group.waiting}
        self._changed.notify_all()

    def _fail(self, batch: list[InferenceRequest], error: BaseException) -> None:
        """Try both halves again, each by itself; a single request has its error, and what can never be."""
        half = 0 if isinstance(error, PermanentError) else len(batch) // 2
        with self._changed:
            group = self._groups.get(batch[0].key)
            if group and half and isinstance(error, DeviceOutOfMemory):
                group.largest = min(group.largest, (len(batch) + 1) // 2)
            if half:
                self._again += [batch[:half], batch[half:]]
            self._leave()
        if half:
            return
        for one in batch:
            if isinstance(error, PermanentError):
                one.end(error=type(error)(str(error)))  # to each its own: whoever raises it adds to it
            else:
                known = isinstance(error, Exception)
                one.end(error=error if known else InternalError.of(error))

    def _next(self) -> list[InferenceRequest]:
        """Wait for a batch that is to be handed over now: the urgent before bulk, and groups in turn."""
        with self._changed:
            while not (batch := self._choose()):
                pass
            self._at_device += 1
            self._batches += 1
            self._since_s = self._since_s or time.monotonic()
            return batch

    def _choose(self) -> list[InferenceRequest]:
        """The next batch; none where one had to be waited for, and all has to be looked at anew."""
        self._drop_expired()
        if self._again and not self._at_device:
            return self._again.pop(0)
        waiting = [] if self._again else [group for group in self._groups.values() if group.waiting]
        patience_s = {group: self._patience_s(group) for group in waiting}
        ready = [group for group, left_s in patience_s.items() if left_s <= 0]
        if not ready:
            self._changed.wait(min(patience_s.values(), default=None))
            return []
        # Whoever's turn it is goes, full or not: a group that is always full must not overtake for ever. Nor
        # do several groups of bulk, however long they have waited: of two passes one is left to the urgent.
        in_turn = waiting if self._at_device else ready

        def turn(group: BatchQueue) -> tuple[bool, bool, int]:
            bulk = all(one.bulk for one in group.waiting)
            return all(map(is_patient, group.waiting)), bulk and self._bulk_last, group.served

        chosen = min(in_turn, key=turn)
        if self._at_device and chosen is self._groups.get(ALONE):
            self._changed.wait()
            return []
        chosen.served = self._batches + 1
        batch = chosen.take()
        self._bulk_last = all(one.bulk for one in batch)
        return batch

    def _drop_expired(self) -> None:
        """Who is late or no longer wanted leaves before it costs anything."""
        for some in [*self._again, *(group.waiting for group in self._groups.values())]:
            for request in [one for one in some if not one.deadline.left_s()]:
                some.remove(request)
                try:
                    request.deadline.check(WAITING)
                except GradcamError as error:
                    request.end(error=error)
        self._again = [half for half in self._again if half]

    def _patience_s(self, group: BatchQueue) -> float:
        """How long a group's batch waits from now on for others to join it."""
        full = len(group.waiting) >= group.largest
        if self._at_device:  # something else is computed: there is time to fill up
            return 0 if full and self._at_device < AHEAD else NEVER_S
        if full or not self._coming:
            return 0
        worth_s = self._wait_s if group.pass_s is None else min(self._wait_s, group.pass_s)
        return min(one.asked_s for one in group.waiting) + worth_s - time.monotonic()
