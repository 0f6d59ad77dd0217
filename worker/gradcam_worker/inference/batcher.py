"""The dynamic batcher: the images of many job threads share batches on one device.

    job threads --images--> queues --batches--> starting thread --> device
    job threads <--results-- finishing thread <-------------------- device

Images share a batch if they have the same network, the same method and about the same number of classes. A
batch starts when it is full, at once if no other job is expected, and otherwise after the duration of a
batch, but after `wait_s` at the latest. While the device computes, the next full batch is started already, so
that its pixels are copied in the meantime. A batch that is not full keeps filling up.

A batch that fails is split in half and tried again, unless the error is permanent. So a batch that is too
large for the memory is computed in parts, and an image with an error fails alone. No thread waits beyond its
deadline, even if the device hangs.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import NO_DEVICE_MEMORY, GradcamError, InternalError, PermanentError
from gradcam_worker.gradcam.explain import pad_selections, selections_of
from gradcam_worker.gradcam.network import InputPixels, Method, Network
from gradcam_worker.gradcam.network import begin as begin_network
from gradcam_worker.inference.request import (
    BatchKey,
    BatchQueue,
    Finish,
    InferenceRequest,
    InferenceResponse,
    yields_to_urgent,
)
from gradcam_worker.observability import tracing
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline

DEFAULT_BATCH_SIZE = 8  # for a network without a limit of its own
MAX_BATCHES_AT_DEVICE = 2  # one that it computes, one that follows
LATEST_WEIGHT = 0.2  # of the latest batch in moving averages
NEVER_S = threading.TIMEOUT_MAX  # wait until something changes
SEPARATE_BATCH = -1  # in a `BatchKey`, instead of the number of classes: the request is a batch of its own
ALONE = -2  # as SEPARATE_BATCH, and nothing else is at the device meanwhile
EXCLUSIVE_KEY = (0, None, ALONE)  # of functions that run alone on the device
WAITING_FOR_DEVICE = "waiting for the device"
DEVICE_HUNG_AFTER_S = 600.0  # longer than a job may wait, and than the first batch of a large network
MAX_QUEUES = 64  # before empty ones are dropped: keys contain layer names, which are untrusted input

T = TypeVar("T")


class Batcher:
    """Owns the device: one thread starts everything that runs on it."""

    def __init__(
        self,
        *,
        wait_s: float = 0.01,
        max_batch_size: int = DEFAULT_BATCH_SIZE,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        """Start no thread before the first request.

        Args:
            wait_s: Maximum time that a batch waits for expected jobs, in seconds.
            max_batch_size: Maximum number of images in a batch of a network without a limit of its own.
            observer: Counts images and seconds.
        """
        self._wait_s, self._observer = wait_s, observer
        self._queues: dict[BatchKey, BatchQueue] = {}
        self._retries: list[list[InferenceRequest]] = []  # halves of failed batches
        self._default_limit = max_batch_size
        self._limits: dict[int, int] = {}  # id of a network -> maximum batch size
        self._expected = 0  # number of jobs of this process that will submit an image
        self.expected_elsewhere: Callable[[], int] = lambda: 0  # in other processes
        self._at_device = 0  # number of batches that were started and have not finished
        self._started = 0  # number of batches that were started so far
        self._latest_is_bulk = False  # whether the latest batch has bulk requests only
        self._changed = threading.Condition()
        self._running: SimpleQueue[tuple[list[InferenceRequest], Finish, float]] = SimpleQueue()
        self._failure: str | None = None
        self._draining = False  # no further batch is started
        self.mean_batch_size = 0.0  # moving average; 0 before the first batch
        self._idle_since_s = 0.0  # when the device finished its latest batch
        self._responded_s: float | None = None  # latest sign of life of a busy device; None: it is idle
        self._threads: list[threading.Thread] = []

    @contextmanager
    def expecting(self) -> Iterator[Callable[[], None]]:
        """Expect a job to submit an image within this block. Yields a function to call when it has."""
        is_submitted = False

        def submitted() -> None:
            nonlocal is_submitted
            if not is_submitted:
                is_submitted = True
                self._expected -= 1

        with self._changed:
            self._expected += 1
        try:
            yield submitted
        finally:
            if not is_submitted:  # else its submission was the change
                with self._changed:
                    submitted()
                    self._wake_starting_thread()

    def limit(self, network: Network, max_batch_size: int) -> None:
        """Limit the size of a network's batches."""
        with self._changed:
            self.forget(network)
            self._limits[id(network)] = max_batch_size

    def forget(self, network: Network) -> None:
        """Drop the limit and the empty queues of a network that was unloaded."""
        with self._changed:
            self._limits.pop(id(network), None)
            for key, queue in [*self._queues.items()]:
                if key[0] == id(network) and not queue.waiting:
                    del self._queues[key]

    def compute(
        self,
        network: Network,
        pixels: InputPixels,
        classes: Sequence[int],
        method: Method,
        deadline: Deadline,
        *,
        bulk: bool = False,
        submitted: Callable[[], None] = lambda: None,
        values: NDArray[np.float32] | None = None,
    ) -> InferenceResponse:
        """Compute one image in a batch with others, and wait for the result.

        Args:
            network: The network.
            pixels: Image of the network's input size (height, width, channels).
            classes: Ids of the classes to explain; -1 is the best one, -2 the second, and so on.
            method: The method.
            deadline: The job's deadline.
            bulk: Whether urgent requests go first.
            submitted: Called when the request is in its queue: the function that `expecting` yields.
            values: Of further inputs (width,); None: the network has none.

        Raises:
            JobTimeout: The deadline passed.
            DeviceOutOfMemory: The device has too little memory even for this image alone.
            Exception: Whatever the network raises for this image.
        """
        request = InferenceRequest(
            image_key(network, method, classes),
            begin_images(network, method),
            deadline,
            bulk,
            pixels=pixels,
            values=values,
            classes=tuple(classes),
        )
        response: InferenceResponse = self._compute(request, submitted)
        return response

    def compute_many(
        self,
        network: Network,
        pixels: InputPixels,
        classes: Sequence[Any],
        method: Method,
        deadline: Deadline,
        values: NDArray[np.float32] | None = None,
    ) -> InferenceResponse:
        """Compute n images in a batch of their own, after urgent requests, and wait for the result.

        The composition of the batch does not depend on other requests. So the results do not either, down to
        their last digits.

        Args:
            network: The network.
            pixels: Images of the network's input size (n, height, width, channels).
            classes: Ids of the classes to explain in each image, or a tuple of these for each; -1 is the best
                one.
            method: The method.
            deadline: The job's deadline.
            values: Of further inputs (n, width); None: the network has none.

        Raises:
            JobTimeout: The deadline passed.
            DeviceOutOfMemory: The device has too little memory for this batch.
            Exception: Whatever the network raises.
        """
        request = InferenceRequest(
            separate_key(network, method),
            begin_batch(network, pixels, classes, method, values),
            deadline,
            bulk=True,
            images=len(pixels),
        )
        response: InferenceResponse = self._compute(request)
        return response

    def run_exclusive(self, run: Callable[[], T], deadline: Deadline, *, bulk: bool = False) -> T:
        """Run a function while nothing else runs on the device.

        Args:
            run: The function.
            deadline: The job's deadline.
            bulk: Whether urgent requests go first.

        Returns:
            What `run` returns.

        Raises:
            JobTimeout: The deadline passed.
            Exception: Whatever `run` raises.
        """
        request = InferenceRequest(EXCLUSIVE_KEY, begin_function(run), deadline, bulk, images=0)
        result: Any = self._compute(request).computed
        return result  # type: ignore[no-any-return]  # what `run` returned

    def _compute(
        self, request: InferenceRequest, submitted: Callable[[], None] = lambda: None
    ) -> InferenceResponse:
        """Queue a request and wait until it is complete."""
        request.deadline.check(WAITING_FOR_DEVICE)
        self.submit([request], submitted)
        while not request.done.wait(request.deadline.left_s()) and request.deadline.left_s():
            pass  # the deadline was extended
        if not request.done.is_set():
            with self._changed:
                self._drop_expired()
        if not request.done.is_set():
            request.deadline.check(WAITING_FOR_DEVICE)  # the device computes it: the result is dropped
        if request.error is not None:
            raise request.error
        response: InferenceResponse = request.response
        request.deadline.used_device(response.device_s)
        return response

    def submit(
        self, requests: Sequence[InferenceRequest], submitted: Callable[[], None] = lambda: None
    ) -> None:
        """Queue requests. Each is completed later, by a thread of this batcher.

        Args:
            requests: The requests.
            submitted: Called when they are in their queues.

        Raises:
            InternalError: A thread of this batcher has ended.
        """
        with self._changed:
            if self._failure:
                raise InternalError(self._failure)
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._repeat, args=[step], daemon=True)
                    for step in (self._start_batch, self._finish_batch)
                ]
                for thread in self._threads:
                    thread.start()
            submitted()
            is_full = False
            for request in requests:
                queue = self._queues.get(request.key)
                if queue is None:
                    queue = self._queues[request.key] = BatchQueue(
                        self._max_batch_size(request.key), last_batch=self._started
                    )
                queue.waiting.append(request)
                is_full = is_full or queue.is_full
            if is_full or not self._at_device:  # else the batch fills up until the device is free
                self._changed.notify_all()

    def _max_batch_size(self, key: BatchKey) -> int:
        return 1 if key[2] in {SEPARATE_BATCH, ALONE} else self._limits.get(key[0], self._default_limit)

    def drain(self, timeout_s: float) -> bool:
        """Start no further batch, and wait for those at the device.

        Args:
            timeout_s: How long to wait.

        Returns:
            Whether all of them are complete.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._at_device, timeout_s)

    def drop_cancelled(self) -> None:
        """Complete the waiting requests whose deadline has passed or was cancelled."""
        with self._changed:
            self._drop_expired()

    def _repeat(self, step: Callable[[], None]) -> None:
        """Run one of the two threads. If the thread itself fails, all requests fail, now and later."""
        try:
            while True:
                step()
        except BaseException as error:  # noqa: BLE001  # or requests would wait for ever
            failure = f"The thread of the device ended: {InternalError.of(error)}"
            with self._changed:
                self._failure = failure
                for requests in [*self._retries, *(queue.waiting for queue in self._queues.values())]:
                    for request in requests:
                        request.complete(error=InternalError(failure))
                        request.after_batch()

    def _start_batch(self) -> None:
        """Start one batch. No reference to it is kept: an idle thread must not keep a network in memory."""
        batch = self._next_batch()
        begun_s = time.monotonic()
        for request in batch:
            request.started()
        try:
            finish = batch[0].begin(batch)
        except BaseException as error:  # noqa: BLE001  # a custom layer may raise anything
            self._fail(batch, error)
        else:
            self._running.put((batch, finish, begun_s))

    def _finish_batch(self) -> None:
        """Wait for the device to finish a batch, while the other thread starts the next."""
        batch, finish, started_s = self._running.get()
        begun_s = max(started_s, self._idle_since_s)  # the device computes one batch after the other
        try:
            computed = finish()
        except BaseException as error:  # noqa: BLE001  # a custom layer may raise anything
            self._fail(batch, error)
            return
        self._idle_since_s = time.monotonic()
        took_s = self._idle_since_s - begun_s
        with self._changed:
            self._batch_left_device()
            if queue := self._queues.get(batch[0].key):
                queue.batch_s = took_s + (1 - LATEST_WEIGHT) * ((queue.batch_s or took_s) - took_s)
        for index, request in enumerate(batch):
            waited_s = begun_s - request.queued_s
            request.complete(InferenceResponse(computed, index, waited_s, took_s, len(batch)))
        for after_batch in {request.after_batch for request in batch}:
            after_batch()
        tracing.record_batch([request.caller for request in batch if request.images], begun_s, took_s)
        if images := sum(request.images for request in batch):
            self.mean_batch_size += (images - self.mean_batch_size) * (
                LATEST_WEIGHT if self.mean_batch_size else 1
            )
            self._observer.batch_computed(images, took_s)

    @property
    def failure(self) -> str | None:
        """Why this device computes nothing any more, or None."""
        responded_s = self._responded_s
        if responded_s and time.monotonic() - responded_s > DEVICE_HUNG_AFTER_S:
            return f"the device has not answered for {DEVICE_HUNG_AFTER_S:g} s"
        return self._failure

    def _batch_left_device(self) -> None:
        self._at_device -= 1
        self._responded_s = time.monotonic() if self._at_device else None
        if len(self._queues) > MAX_QUEUES:
            self._queues = {key: queue for key, queue in self._queues.items() if queue.waiting}
        self._wake_starting_thread()

    def _wake_starting_thread(self) -> None:
        """Wake the thread that starts batches if it may have one to start; and whoever waits in `drain`."""
        if self._draining or self._retries or any(queue.waiting for queue in self._queues.values()):
            self._changed.notify_all()

    def _fail(self, batch: list[InferenceRequest], error: BaseException) -> None:
        """Retry both halves of a failed batch. Single requests fail, and batches with a permanent error."""
        half = 0 if isinstance(error, PermanentError) else len(batch) // 2
        with self._changed:
            queue = self._queues.get(batch[0].key)
            if queue and half and isinstance(error, NO_DEVICE_MEMORY):
                queue.max_batch_size = min(queue.max_batch_size, (len(batch) + 1) // 2)
            if half:
                self._retries += [batch[:half], batch[half:]]
            self._batch_left_device()
        if half:
            return
        for request in batch:
            if isinstance(error, PermanentError):
                # A copy for each request: raising an error adds a traceback to it.
                request.complete(error=type(error)(str(error)))
            else:
                request.complete(error=error if isinstance(error, Exception) else InternalError.of(error))
            request.after_batch()

    def _next_batch(self) -> list[InferenceRequest]:
        """Wait until a batch can start, and return it: urgent before bulk, and queues in turn."""
        with self._changed:
            while not (batch := self._take_batch()):
                pass
            self._at_device += 1
            self._started += 1
            self._responded_s = self._responded_s or time.monotonic()
            return batch

    def _take_batch(self) -> list[InferenceRequest]:
        """Return the next batch; after a wait an empty one, so that the caller tries again."""
        self._drop_expired()
        if self._draining:
            self._changed.wait()
            return []
        if self._retries and not self._at_device:
            return self._retries.pop(0)
        waiting = [] if self._retries else [queue for queue in self._queues.values() if queue.waiting]
        wait_left_s = {queue: self._wait_left_s(queue) for queue in waiting}
        ready = [queue for queue, left_s in wait_left_s.items() if left_s <= 0]
        if not ready:
            self._changed.wait(min(wait_left_s.values(), default=None))
            return []
        # The queue that waited longest is next, full or not: a queue that is always full must not starve
        # others. Bulk requests that waited long must not either: every second batch is left to urgent ones.
        candidates = waiting if self._at_device else ready

        def order(queue: BatchQueue) -> tuple[bool, bool, int]:
            bulk = all(request.bulk for request in queue.waiting)
            return all(map(yields_to_urgent, queue.waiting)), bulk and self._latest_is_bulk, queue.last_batch

        chosen = min(candidates, key=order) if len(candidates) > 1 else candidates[0]
        if self._at_device and chosen.waiting[0].key[2] == ALONE:
            self._changed.wait()
            return []
        chosen.last_batch = self._started + 1
        batch = chosen.take()
        self._latest_is_bulk = all(request.bulk for request in batch)
        return batch

    def _drop_expired(self) -> None:
        """Fail the requests whose deadline has passed or was cancelled."""
        for requests in [*self._retries, *(queue.waiting for queue in self._queues.values())]:
            for request in [request for request in requests if not request.deadline.left_s()]:
                requests.remove(request)
                try:
                    request.deadline.check(WAITING_FOR_DEVICE)
                except GradcamError as error:
                    # The deadline keeps it. With its traceback, which leads to the request, neither of them
                    # and no memory of a job process would be freed before a collection.
                    request.complete(error=error.with_traceback(None))
                    request.after_batch()
        self._retries = [requests for requests in self._retries if requests]

    def _wait_left_s(self, queue: BatchQueue) -> float:
        """Seconds that the next batch of a queue still waits for more images."""
        if self._at_device:  # the device is busy, so the batch may fill up
            return 0 if queue.is_full and self._at_device < MAX_BATCHES_AT_DEVICE else NEVER_S
        if queue.is_full or not self._expected + self.expected_elsewhere():
            return 0
        max_wait_s = self._wait_s if queue.batch_s is None else min(self._wait_s, queue.batch_s)
        return min(request.queued_s for request in queue.waiting) + max_wait_s - time.monotonic()


def image_key(network: Network, method: Method, classes: Sequence[int]) -> BatchKey:
    """The key of requests for one image, which share batches.

    A batch computes as many classes for each image as the image with the most classes needs: so the key has
    about that number.
    """
    return id(network), method, (len(classes) - 1).bit_length()


def separate_key(network: Network, method: Method) -> BatchKey:
    """The key of requests that are a batch of their own."""
    return id(network), method, SEPARATE_BATCH


def begin_images(network: Network, method: Method) -> Callable[[list[InferenceRequest]], Finish]:
    """Return the function that starts a batch of requests for one image each."""

    def begin(batch: list[InferenceRequest]) -> Finish:
        images = np.stack([request.pixels for request in batch if request.pixels is not None])
        further = [request.values for request in batch if request.values is not None]
        values = np.stack(further) if further else None
        wanted = pad_selections([request.classes for request in batch])
        return begin_network(network, images, wanted, method, values)

    return begin


def begin_batch(
    network: Network,
    pixels: InputPixels,
    classes: Sequence[Any],
    method: Method,
    values: NDArray[np.float32] | None = None,
) -> Callable[[list[InferenceRequest]], Finish]:
    """Return the function that starts a batch of its own, of all `pixels`.

    The classes are the same for all images, or a tuple for each.
    """
    of_each = selections_of(classes, len(pixels))

    def begin(_: list[InferenceRequest]) -> Finish:
        return begin_network(network, pixels, pad_selections(of_each), method, values)

    return begin


def begin_function(run: Callable[[], Any]) -> Callable[[list[InferenceRequest]], Finish]:
    """Return the function that runs `run` while nothing else is at the device."""

    def begin(_: list[InferenceRequest]) -> Finish:
        result = run()
        return lambda: result

    return begin


def begin_alone(
    begin: Callable[[list[InferenceRequest]], Finish],
) -> Callable[[list[InferenceRequest]], Finish]:
    """Return a function that starts a batch and waits for it, so that nothing is started meanwhile."""

    def begin_and_wait(batch: list[InferenceRequest]) -> Finish:
        result = begin(batch)()
        return lambda: result

    return begin_and_wait
