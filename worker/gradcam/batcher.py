"""Many job threads, one device: their images are merged into batches, and each gets its own answer back.

    job threads --images--> groups --batches--> thread of the device --answers--> a second one --> job threads

Only images for the same network, method and (nearly) the same number of classes share a batch. A batch closes
when it is full, or at once where no other job is on its way, or when it has waited as long as a pass takes,
and never longer than `wait_s`. While the device computes, the next full batch is handed over, so that its
pixels travel meanwhile; one that is not full goes on filling up.

A batch that fails is halved and tried again, whatever the reason: so one that was too large for the memory
fits, and one bad image fails alone. No thread waits beyond its deadline, whatever becomes of the device.
"""

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from worker.deadline import Deadline
from worker.errors import DeviceOutOfMemory, GradcamError, InternalError
from worker.gradcam.explain import padded
from worker.gradcam.network import Computed, Method, Network

UNKNOWN = 8  # images in a batch, where nobody has found out how many are worth it
AHEAD = 2  # batches at the device: one that it computes, one that is there already
AGED_S = 5.0  # bulk that waited so long goes with the others: it holds threads that they may need
NEWEST = 0.2  # weight of the last pass in the mean of how long one takes
NEVER_S = 1e9  # from now: no reason to look before something changes
MAX_GROUPS = 64  # remembered: names of layers are a stranger's input

T = TypeVar("T")
Finish = Callable[[], Any]  # waits for the device


@dataclass(frozen=True)
class Answer:
    """One image's place in a pass over many, and what it took to get it."""

    computed: Computed
    index: int
    waited_s: float  # for the device
    computed_s: float
    batch_size: int


@dataclass(eq=False)
class _Request:
    """What a thread wants to be done, and waits for."""

    key: Hashable  # what may share a batch with it has the same
    begin: Callable[["list[_Request]"], Finish]  # a batch of such requests
    deadline: Deadline
    bulk: bool = False
    pixels: NDArray[np.uint8] | None = None
    wish: tuple[int, ...] = ()
    asked_s: float = field(default_factory=time.monotonic)
    done: threading.Event = field(default_factory=threading.Event)
    answer: Any = None
    error: BaseException | None = None

    def end(self, answer: Any = None, error: BaseException | None = None) -> None:
        self.answer, self.error = answer, error
        self.done.set()


@dataclass(eq=False)
class _Group:
    """Requests that may share a batch."""

    largest: int  # images in a batch
    waiting: list[_Request] = field(default_factory=list)
    served: int = 0  # the number of its last batch among all batches
    pass_s: float | None = None  # how long one takes, about

    def take(self) -> list[_Request]:
        """The next batch: who waits longest, but bulk last."""
        self.waiting.sort(key=_is_patient)
        batch, self.waiting = self.waiting[: self.largest], self.waiting[self.largest :]
        return batch


def _is_patient(request: _Request) -> bool:
    return request.bulk and time.monotonic() - request.asked_s < AGED_S


class Batcher:
    """Owns the device: whatever runs there is begun by its one thread."""

    def __init__(self, *, wait_s: float = 0.01) -> None:
        """`wait_s`: how long a batch waits for jobs that are on their way, at most."""
        self._wait_s = wait_s
        self._groups: dict[Hashable, _Group] = {}
        self._again: list[list[_Request]] = []  # halves of batches that failed
        self._largest: dict[int, int] = {}  # images in a batch, by the network's id
        self._coming = 0  # jobs on their way
        self._at_device = 0  # batches
        self._batches = 0  # so far
        self._changed = threading.Condition()
        self._begun: SimpleQueue[tuple[list[_Request], Finish, float]] = SimpleQueue()
        self._broken: GradcamError | None = None
        self._started = False

    @contextmanager
    def coming(self) -> Iterator[Callable[[], None]]:
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
            for key in [one for one in self._groups if isinstance(one, tuple) and one[0] == id(network)]:
                if not self._groups[key].waiting:
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
    ) -> Answer:
        """One fitted image (height, width, channels), together with others; waits until the deadline.

        Raises JobTimeout, DeviceOutOfMemory (for this image alone), and what the network raises for it.
        """

        def begin(batch: list[_Request]) -> Finish:
            images = np.stack([one.pixels for one in batch if one.pixels is not None])
            return network.begin(images, padded([one.wish for one in batch]), method)

        # Wishes of about the same length go together: all of a batch are computed as long as the longest.
        key = (id(network), method, (len(wish) - 1).bit_length())
        request = _Request(key, begin, deadline, bulk, pixels, tuple(wish))
        answer: Answer = self._ask(request, self._largest.get(id(network), UNKNOWN), arrive)
        return answer

    def alone(self, run: Callable[[], T], deadline: Deadline) -> T:
        """Have the device to oneself while `run` runs. Raises JobTimeout, and what `run` raises."""

        def begin(_: list[_Request]) -> Finish:
            result = run()
            return lambda: result

        result: T = self._ask(_Request(object(), begin, deadline), 1, lambda: None).computed
        return result

    def _ask(self, request: _Request, largest: int, arrive: Callable[[], None]) -> Any:
        """Hand in a request, wait for its end."""
        request.deadline.check("waiting for the device")
        with self._changed:
            if self._broken:
                raise self._broken
            self._start()
            arrive()
            self._groups.setdefault(request.key, _Group(largest)).waiting.append(request)
            self._changed.notify_all()
        while not request.done.wait(request.deadline.left_s()) and request.deadline.left_s():
            pass  # the deadline was put off
        if not request.done.is_set():
            self._withdraw(request)
            request.deadline.check("waiting for the device")
        if request.error is not None:
            raise request.error
        return request.answer

    def _withdraw(self, request: _Request) -> None:
        """Whoever asked is gone. In a batch at the device it stays, and its answer is nobody's."""
        with self._changed:
            group = self._groups.get(request.key)
            if group and request in group.waiting:
                group.waiting.remove(request)

    def _start(self) -> None:
        if not self._started:
            self._started = True
            for serve in (self._hand_over, self._hand_back):
                threading.Thread(target=self._guarded, args=[serve], name=serve.__name__, daemon=True).start()

    def _guarded(self, serve: Callable[[], None]) -> None:
        """Whatever ends one of the two threads is told to all who wait, and to all who come."""
        try:
            serve()
        except BaseException as error:  # noqa: BLE001  # nobody may be left waiting
            with self._changed:
                self._broken = InternalError(
                    f"The thread of the device ended: {type(error).__name__}: {error}"
                )
                left = [one for group in self._groups.values() for one in group.waiting]
                for request in [*left, *(one for half in self._again for one in half)]:
                    request.end(error=self._broken)

    def _hand_over(self) -> None:
        """The device's thread: one batch after the other."""
        while True:
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
        while True:
            batch, finish, begun_s = self._begun.get()
            try:
                computed = finish()
            except BaseException as error:  # noqa: BLE001  # as above
                self._fail(batch, error)
                continue
            took_s = time.monotonic() - begun_s
            with self._changed:
                self._leave(batch)
                if group := self._groups.get(batch[0].key):
                    group.pass_s = took_s + (1 - NEWEST) * ((group.pass_s or took_s) - took_s)
            for index, one in enumerate(batch):
                one.end(Answer(computed, index, begun_s - one.asked_s, took_s, len(batch)))

    def _leave(self, batch: list[_Request]) -> None:
        self._at_device -= 1
        if len(self._groups) > MAX_GROUPS or batch[0].pixels is None:
            self._groups = {key: group for key, group in self._groups.items() if group.waiting}
        self._changed.notify_all()

    def _fail(self, batch: list[_Request], error: BaseException) -> None:
        """Try both halves again, each by itself; a single request has its error."""
        half = len(batch) // 2
        with self._changed:
            group = self._groups.get(batch[0].key)
            if group and half and isinstance(error, DeviceOutOfMemory):
                group.largest = min(group.largest, (len(batch) + 1) // 2)
            if half:
                self._again += [batch[:half], batch[half:]]
            self._leave(batch)
        if not half:
            known = isinstance(error, Exception)
            batch[0].end(error=error if known else InternalError(f"{type(error).__name__}: {error}"))

    def _next(self) -> list[_Request]:
        """Wait for a batch that is to be handed over now."""
        with self._changed:
            while True:
                self._drop_expired()
                if batch := self._choose():
                    self._at_device += 1
                    self._batches += 1
                    return batch
                self._changed.wait(self._soonest_s())

    def _drop_expired(self) -> None:
        """Who is late or no longer wanted leaves before it costs anything."""
        for group in self._groups.values():
            for request in [one for one in group.waiting if not one.deadline.left_s()]:
                group.waiting.remove(request)
                try:
                    request.deadline.check("waiting for the device")
                except GradcamError as error:
                    request.end(error=error)

    def _choose(self) -> list[_Request]:
        """The next batch, if there is one: the urgent before bulk, and groups in turn."""
        if self._again and not self._at_device:
            return self._again.pop(0)
        ready = [group for group in self._groups.values() if group.waiting and self._patience_s(group) <= 0]
        if not ready:
            return []
        chosen = min(ready, key=lambda group: (all(map(_is_patient, group.waiting)), group.served))
        chosen.served = self._batches + 1
        return chosen.take()

    def _soonest_s(self) -> float | None:
        """When to look again, though nothing has changed."""
        patience = [self._patience_s(group) for group in self._groups.values() if group.waiting]
        return min((one for one in patience if one < NEVER_S), default=None)

    def _patience_s(self, group: _Group) -> float:
        """How long a group's batch waits from now on for others to join it."""
        full = len(group.waiting) >= group.largest
        if self._at_device:  # something else is computed: there is time to fill up
            alone = group.waiting[0].pixels is None
            return 0 if full and not alone and self._at_device < AHEAD else NEVER_S
        if full or not self._coming:
            return 0
        worth_s = self._wait_s if group.pass_s is None else min(self._wait_s, group.pass_s)
        return min(one.asked_s for one in group.waiting) + worth_s - time.monotonic()
