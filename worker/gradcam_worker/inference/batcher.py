"""The dynamic batcher: images of many job threads share passes of one device.

    job threads --images--> queues --batches--> starting thread --passes--> finishing thread --> job threads

Images of the same network, method and (nearly) the same number of classes share a batch. A batch closes
when it is full, or at once if no other job is expected, or after as long as a pass takes, and never later
than `wait_s`. While the device computes, the next full batch is started, so that its pixels are copied
meanwhile; one that is not full goes on filling up.

A batch that fails is halved and tried again, unless its error is permanent: so one that was too large for the
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
    yields_to_urgent,
)
from gradcam_worker.observability import tracing
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline

DEFAULT_BATCH_SIZE = 8  # images, where no limit was measured
BATCHES_AT_DEVICE = 2  # one that it computes, one that is ready
NEWEST_WEIGHT = 0.2  # weight of the last pass in the mean of how long one takes
NEVER_S = threading.TIMEOUT_MAX  # wait until something changes
SHARD_PASS = -1  # in the place of how many classes: a pass of its own
EXCLUSIVE_KEY = (0, None, 0)  # of what shares a batch with nothing
WAITING_FOR_DEVICE = "waiting for the device"
DEVICE_HUNG_AFTER_S = 600.0  # longer than a job may wait, and than the first pass of a large network takes
MAX_QUEUES = 64  # kept: layer names are input from outside

T = TypeVar("T")


class Batcher:
    """Owns the device: one thread starts whatever runs there."""

    def __init__(
        self, *, wait_s: float = 0.01, largest: int = DEFAULT_BATCH_SIZE, observer: Observer = NULL_OBSERVER
    ) -> None:
        """`wait_s`: how long a batch waits for jobs that are on their way, at most.

        `largest`: how many images a batch has at most where `limit` says nothing else.
        """
        self._wait_s, self._observer = wait_s, observer
        self._queues: dict[Key, BatchQueue] = {}
        self._retries: list[list[InferenceRequest]] = []  # halves of failed batches
        self._default_limit = largest
        self._limits: dict[int, int] = {}  # images in a batch, by the network's id
        self._expected = 0  # jobs that will submit an image
        self._at_device = 0  # batches
        self._batches = 0  # so far
        self._bulk_last = False  # whether the last of them was of bulk alone
        self._changed = threading.Condition()
        self._running: SimpleQueue[tuple[list[InferenceRequest], Finish, float]] = SimpleQueue()
        self._failure: str | None = None
        self.mean_batch_size = 0.0  # in a pass, lately; 0 before the first
        self._idle_since_s = 0.0  # when the device had done all that it was given before
        self._answered_s: float | None = None  # when the device last answered, or got its first batch
        self._threads: list[threading.Thread] = []

    @contextmanager
    def expecting(self) -> Iterator[Callable[[], None]]:
        """Within it a job is expected to submit an image; what is yielded says that it has."""
        done = False

        def submitted() -> None:
            nonlocal done
            if not done:
                done = True
                self._expected -= 1

        with self._changed:
            self._expected += 1
        try:
            yield submitted
        finally:
            with self._changed:
                submitted()
                self._changed.notify_all()

    def limit(self, network: Network, largest: int) -> None:
        """Limit the batches of a network to so many images."""
        with self._changed:
            self.forget(network)
            self._limits[id(network)] = largest

    def forget(self, network: Network) -> None:
        """Drop what is kept of a network that was unloaded."""
        with self._changed:
            self._limits.pop(id(network), None)
            for key, queue in [*self._queues.items()]:
                if key[0] == id(network) and not queue.waiting:
                    del self._queues[key]

    def compute(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        classes: Sequence[int],
        method: Method,
        deadline: Deadline,
        *,
        bulk: bool = False,
        submitted: Callable[[], None] = lambda: None,
    ) -> InferenceResponse:
        """One fitted image (height, width, channels), together with others; waits until the deadline.

        Raises JobTimeout, DeviceOutOfMemory (for this image alone), and what the network raises for it.
        """

        def begin(batch: list[InferenceRequest]) -> Finish:
            images = np.stack([one.pixels for one in batch if one.pixels is not None])
            return network.begin(images, padded([one.classes for one in batch]), method)

        # Requests of about as many classes go together: a pass computes as many for each as the longest asks.
        key = (id(network), method, (len(classes) - 1).bit_length())
        request = InferenceRequest(key, begin, deadline, bulk, pixels=pixels, classes=tuple(classes))
        response: InferenceResponse = self._submit(
            request, self._limits.get(id(network), self._default_limit), submitted
        )
        return response

    def compute_many(
        self,
        network: Network,
        pixels: NDArray[np.uint8],
        classes: Sequence[int],
        method: Method,
        deadline: Deadline,
    ) -> InferenceResponse:
        """Fitted images (n, height, width, channels) in a pass of their own, behind whoever is urgent.

        Who is with whom does not depend on what else is asked for, so neither do the last digits of what
        comes out. Raises JobTimeout, DeviceOutOfMemory, and what the network raises.
        """

        def begin(_: list[InferenceRequest]) -> Finish:
            return network.begin(pixels, padded([tuple(classes)] * len(pixels)), method)

        key = (id(network), method, SHARD_PASS)
        request = InferenceRequest(key, begin, deadline, bulk=True, images=len(pixels))
        response: InferenceResponse = self._submit(request, 1, lambda: None)
        return response

    def run_exclusive(self, run: Callable[[], T], deadline: Deadline, *, bulk: bool = False) -> T:
        """Run a function while nothing else runs on the device. Raises JobTimeout, and what `run` raises."""

        def begin(_: list[InferenceRequest]) -> Finish:
            result = run()
            return lambda: result

        request = InferenceRequest(EXCLUSIVE_KEY, begin, deadline, bulk, images=0)
        result: T = self._submit(request, 1, lambda: None).computed
        return result

    def _submit(self, request: InferenceRequest, largest: int, submitted: Callable[[], None]) -> Any:
        """Queue a request and wait until it is complete."""
        request.deadline.check(WAITING_FOR_DEVICE)
        with self._changed:
            if self._failure:
                raise InternalError(self._failure)
            if not self._threads:
                serving = (self._start_batch, self._finish_batch)
                self._threads = [
                    threading.Thread(target=self._serve, args=[one], daemon=True) for one in serving
                ]
                for thread in self._threads:
                    thread.start()
            submitted()
            fresh = BatchQueue(largest, served=self._batches)
            self._queues.setdefault(request.key, fresh).waiting.append(request)
            self._changed.notify_all()
        while not request.done.wait(request.deadline.left_s()) and request.deadline.left_s():
            pass  # the deadline was extended
        if not request.done.is_set():
            with self._changed:
                self._drop_expired()
        if not request.done.is_set():
            request.deadline.check(WAITING_FOR_DEVICE)  # it is at the device: its result is dropped
        if request.error is not None:
            raise request.error
        return request.response

    def _serve(self, serve: Callable[[], None]) -> None:
        """Run one of the two threads. If it fails, all requests fail, now and later."""
        try:
            while True:
                serve()
        except BaseException as error:  # noqa: BLE001  # nobody may be left waiting
            failure = f"The thread of the device ended: {InternalError.of(error)}"
            with self._changed:
                self._failure = failure
                for some in [*self._retries, *(queue.waiting for queue in self._queues.values())]:
                    for request in some:
                        request.complete(error=InternalError(failure))

    def _start_batch(self) -> None:
        """Start one batch. No reference is kept: an idle thread must not hold a network in memory."""
        batch = self._next()
        begun_s = time.monotonic()
        try:
            finish = batch[0].begin(batch)
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is these requests' own
            self._fail(batch, error)
        else:
            self._running.put((batch, finish, begun_s))

    def _finish_batch(self) -> None:
        """Wait for the device to finish a batch, while the other thread starts the next."""
        batch, finish, started_s = self._running.get()
        begun_s = max(started_s, self._idle_since_s)  # it computes one after the other
        try:
            computed = finish()
        except BaseException as error:  # noqa: BLE001  # as above
            self._fail(batch, error)
            return
        self._idle_since_s = time.monotonic()
        took_s = self._idle_since_s - begun_s
        with self._changed:
            self._batch_left_device()
            if queue := self._queues.get(batch[0].key):
                queue.pass_s = took_s + (1 - NEWEST_WEIGHT) * ((queue.pass_s or took_s) - took_s)
        for index, one in enumerate(batch):
            one.complete(InferenceResponse(computed, index, begun_s - one.queued_s, took_s, len(batch)))
        tracing.record_batch([one.caller for one in batch if one.images], begun_s, took_s)
        if images := sum(one.images for one in batch):
            self.mean_batch_size += (images - self.mean_batch_size) * (
                NEWEST_WEIGHT if self.mean_batch_size else 1
            )
            self._observer.batch_computed(images, took_s)

    @property
    def failure(self) -> str | None:
        """Why nothing is computed here any more, or None."""
        since_s = self._answered_s
        if since_s and time.monotonic() - since_s > DEVICE_HUNG_AFTER_S:
            return f"the device has not answered for {DEVICE_HUNG_AFTER_S:g} s"
        return self._failure

    def _batch_left_device(self) -> None:
        self._at_device -= 1
        self._answered_s = time.monotonic() if self._at_device else None
        if len(self._queues) > MAX_QUEUES:
            self._queues = {key: queue for key, queue in self._queues.items() if queue.waiting}
        self._changed.notify_all()

    def _fail(self, batch: list[InferenceRequest], error: BaseException) -> None:
        """Retry both halves of a failed batch; a single request, or a permanent error, fails."""
        half = 0 if isinstance(error, PermanentError) else len(batch) // 2
        with self._changed:
            queue = self._queues.get(batch[0].key)
            if queue and half and isinstance(error, DeviceOutOfMemory):
                queue.largest = min(queue.largest, (len(batch) + 1) // 2)
            if half:
                self._retries += [batch[:half], batch[half:]]
            self._batch_left_device()
        if half:
            return
        for one in batch:
            if isinstance(error, PermanentError):
                one.complete(error=type(error)(str(error)))  # each its own: raising adds a traceback to it
            else:
                known = isinstance(error, Exception)
                one.complete(error=error if known else InternalError.of(error))

    def _next(self) -> list[InferenceRequest]:
        """Wait for a batch that is to start now: urgent before bulk, and queues in turn."""
        with self._changed:
            while not (batch := self._choose()):
                pass
            self._at_device += 1
            self._batches += 1
            self._answered_s = self._answered_s or time.monotonic()
            return batch

    def _choose(self) -> list[InferenceRequest]:
        """The next batch; empty after a wait: then everything may have changed."""
        self._drop_expired()
        if self._retries and not self._at_device:
            return self._retries.pop(0)
        waiting = [] if self._retries else [queue for queue in self._queues.values() if queue.waiting]
        wait_left_s = {queue: self._wait_left_s(queue) for queue in waiting}
        ready = [queue for queue, left_s in wait_left_s.items() if left_s <= 0]
        if not ready:
            self._changed.wait(min(wait_left_s.values(), default=None))
            return []
        # The queue that waits longest is served, full or not: one that is always full must not starve others.
        # Nor may queues of bulk, however long they have waited: every second pass is left to urgent ones.
        in_turn = waiting if self._at_device else ready

        def order(queue: BatchQueue) -> tuple[bool, bool, int]:
            bulk = all(one.bulk for one in queue.waiting)
            return all(map(yields_to_urgent, queue.waiting)), bulk and self._bulk_last, queue.served

        chosen = min(in_turn, key=order)
        if self._at_device and chosen is self._queues.get(EXCLUSIVE_KEY):
            self._changed.wait()
            return []
        chosen.served = self._batches + 1
        batch = chosen.take()
        self._bulk_last = all(one.bulk for one in batch)
        return batch

    def _drop_expired(self) -> None:
        """Fail the requests whose deadline has passed or was cancelled."""
        for some in [*self._retries, *(queue.waiting for queue in self._queues.values())]:
            for request in [one for one in some if not one.deadline.left_s()]:
                some.remove(request)
                try:
                    request.deadline.check(WAITING_FOR_DEVICE)
                except GradcamError as error:
                    request.complete(error=error)
        self._retries = [half for half in self._retries if half]

    def _wait_left_s(self, queue: BatchQueue) -> float:
        """How much longer a queue's batch waits for more images."""
        full = len(queue.waiting) >= queue.largest
        if self._at_device:  # the device is busy: there is time to fill up
            return 0 if full and self._at_device < BATCHES_AT_DEVICE else NEVER_S
        if full or not self._expected:
            return 0
        longest_s = self._wait_s if queue.pass_s is None else min(self._wait_s, queue.pass_s)
        return min(one.queued_s for one in queue.waiting) + longest_s - time.monotonic()
