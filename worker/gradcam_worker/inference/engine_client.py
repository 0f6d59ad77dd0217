"""The engine process as a job process sees it: see `gradcam_worker.inference.client.InferenceClient`.

If the engine ends, its successor gets all requests that were not answered. One that was at the device when an
engine ended is suspected: it is sent to run alone. If the engine ends again meanwhile, the request fails.

A job gets the time back for which it waited and no engine answered, up to `MAX_ABSENCE_S` at a time. When it
has no time left and there is still no engine, it fails with `EngineUnavailable`, which another worker may
retry.
"""

import hashlib
import itertools
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker import __version__
from gradcam_worker.errors import (
    EngineUnavailable,
    GradcamError,
    InternalError,
    InvalidSettings,
    JobTimeout,
    NetworkCrashed,
    error_class,
)
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.classes import ClassIndex
from gradcam_worker.gradcam.explain import Explanation, extract_explanation, pad_selections, selections_of
from gradcam_worker.gradcam.faithfulness import measure
from gradcam_worker.gradcam.methods import integrated
from gradcam_worker.gradcam.network import Computed, InputPixels, Method, NetworkFacts, repeat_values
from gradcam_worker.inference import messages
from gradcam_worker.inference.image_in_parts import infer_in_parts
from gradcam_worker.inference.messages import (
    FACTS,
    LABELS,
    ROW,
    Cancel,
    Failed,
    Hello,
    Infer,
    Load,
    Loaded,
    Message,
    Receiver,
    Register,
    Results,
    Score,
    Scored,
    State,
    Welcome,
)
from gradcam_worker.inference.model_cache import choose_shard_batch_size, extract_each
from gradcam_worker.inference.pixel_pool import Block, PixelPool, aligned
from gradcam_worker.inference.request import InferenceResponse, InferenceResult
from gradcam_worker.observability import tracing
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.retry import RetryPolicy
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

RECONNECT = RetryPolicy(first_s=0.05, max_s=0.5)
RECEIVE_BYTES = 1024 * 1024
SEND_BUFFER_BYTES = 1024 * 1024
SEND_TIMEOUT_S = 5  # of one message: a hung engine reads none, and its supervisor replaces it
WAITING_FOR_ENGINE = "waiting for the engine process"
MAX_LOSSES = 10  # of the connection, before a request that never reached the device fails
MAX_ABSENCE_S = 180.0  # of the engine, for which jobs get their time back: it starts in less
SILENT_AFTER_S = 5.0  # an engine that hangs; one that works reports its state every second
READY_POLL_INTERVAL_S = 0.1
CANCEL_POLL_INTERVAL_S = 1.0  # between two checks whether the job of a request was cancelled
NO_BLOCK = -1


@dataclass(frozen=True)
class RemoteNetwork:
    """A network that an engine process has loaded."""

    key: str
    row: NetworkRow = field(repr=False)
    facts: NetworkFacts
    labels: ClassIndex = field(repr=False)


@dataclass(eq=False)
class _Request:
    """A request that the engine has not answered."""

    message: Infer | Score | Load
    block: Block | None = None
    done: threading.Event = field(default_factory=threading.Event)
    answer: Any = None
    error: GradcamError | None = None
    losses: int = 0  # number of connections that ended before it was answered
    is_abandoned: bool = False  # nobody waits for it; its block is released when it is answered

    def complete(self, answer: Any = None, error: GradcamError | None = None) -> None:
        """Set the answer, and wake the thread that waits for it."""
        self.answer, self.error = answer, error
        if self.block:
            self.block.release()
        self.done.set()


@dataclass(eq=False)
class _Wait:
    """The wait of a job, for memory or for an answer."""

    client: "EngineClient"
    deadline: Deadline
    counts: bool  # whether time counts for which an engine was there; loading does not count
    since_s: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        """Seconds that are left to the job: see `EngineClient.give_back`."""
        if left_s := self.deadline.left_s():
            return left_s
        self.client.give_back(self)
        return self.deadline.left_s()

    def check(self, doing: str) -> None:
        """Raise where the job may not wait any longer.

        Args:
            doing: What it waits for.

        Raises:
            EngineUnavailable: No time is left, and there is no engine.
            JobTimeout: No time is left.
            GradcamError: The job was cancelled.
        """
        if self.left_s():
            return
        try:
            self.deadline.check(doing)
        except JobTimeout as error:
            if (absent_s := self.client.absent_s()) is None:
                raise
            message = f"The engine process has not answered for {absent_s:.0f} s."
            raise EngineUnavailable(message) from error


@dataclass(frozen=True)
class Answer:
    """The results of one request: `computed` holds its images alone."""

    computed: Computed
    waited_s: float
    computed_s: float
    batch_size: int

    @property
    def device_s(self) -> float:
        """The request's equal share of the time that the device computed."""
        return self.computed_s / self.batch_size


class EngineClient:
    """Sends requests to the engine process, and waits for the answers."""

    def __init__(self, path: Path, *, pool_bytes: int, observer: Observer = NULL_OBSERVER) -> None:
        """Connect to nothing yet.

        Args:
            path: The socket of the engine.
            pool_bytes: Size of the memory for pixels that is shared with the engine.
            observer: Is told of requests that are sent again, and that wait for memory.
        """
        self._path, self._observer = path, observer
        self._pool = PixelPool(pool_bytes, observer)
        self._requests: dict[int, _Request] = {}
        self._waits = set[_Wait]()
        self._numbers = itertools.count(1)
        self._slots = 0  # reserved, and not yet used
        self._networks: dict[str, RemoteNetwork] = {}  # by name: the latest version
        self._rows: dict[str, str] = {}  # JSON by key, of all networks that were registered
        self._stream: socket.socket | None = None
        self._lock = threading.RLock()  # guards all of these
        self._connected = threading.Event()
        self._welcome: Welcome | None = None
        self._state = State(None, 0, 0.0)
        self._fatal: str | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._absent_since_s: float | None = time.monotonic()  # None: there is a connection
        self._heard_s = 0.0  # when the engine last sent something
        self.resent = 0  # number of requests that were sent again to another engine

    def connect(self, timeout_s: float) -> Welcome:
        """Start the thread that reads the answers; wait until the engine has answered.

        Args:
            timeout_s: How long to wait for the engine.

        Returns:
            What the engine says about itself.

        Raises:
            InvalidSettings: The engine is of another version.
            InternalError: It does not answer.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine-client", daemon=True)
                self._thread.start()
        answered = self._connected.wait(timeout_s)
        if self._fatal:
            raise InvalidSettings(self._fatal)
        if not answered or self._welcome is None:
            message = f"The engine process at {self._path} has not answered for {timeout_s:g} s."
            raise InternalError(message)
        return self._welcome

    def close(self) -> None:
        """End the connection. Requests that are not answered fail."""
        self._closed = True
        self._disconnect()
        self._fail_all("the connection to the engine process was closed")

    @property
    def not_ready(self) -> str | None:
        """Why no job should be taken yet; None if the engine is reachable and warm."""
        if self._fatal or not self._connected.is_set() or self.absent_s():
            return self._fatal or "the engine process does not answer"
        return self._state.not_ready

    def wait_until_ready(self) -> None:
        """Wait until the engine has loaded the networks that it is to load first."""
        while self.not_ready:
            time.sleep(READY_POLL_INTERVAL_S)

    @property
    def failure(self) -> str | None:
        """Why this process should be replaced, if so. A hung engine is replaced itself, by its supervisor."""
        return self._fatal

    @property
    def count(self) -> int:
        """See `InferenceClient.count`."""
        return self._state.networks

    @property
    def mean_batch_size(self) -> float:
        """See `InferenceClient.mean_batch_size`."""
        return self._state.mean_batch_size

    @property
    def in_flight(self) -> int:
        """Number of requests that are not answered."""
        return len(self._requests)

    @property
    def free_bytes(self) -> int:
        """Free memory of the pool of pixels."""
        return self._pool.free_bytes

    @property
    def pid(self) -> int:
        """The process id of the engine; 0: it has not answered yet."""
        return self._welcome.pid if self._welcome else 0

    @property
    def device(self) -> str:
        """The name of the engine's device."""
        return self._welcome.device if self._welcome else ""

    def load(self, row: NetworkRow, deadline: Deadline | None = None) -> RemoteNetwork:
        """See `InferenceClient.load`."""
        with self._lock:
            network = self._networks.get(row.name)
        if network and (network.row is row or network.row == row):
            return network
        key, deadline = self._register(row), deadline or Deadline(float("inf"))
        loaded: Loaded = self._ask(lambda number, _: Load(number, key), deadline, counts=False)
        network = RemoteNetwork(
            key, row, FACTS.validate_json(loaded.facts), LABELS.validate_json(loaded.labels)
        )
        with self._lock:
            self._networks[row.name] = network
        return network

    def _register(self, row: NetworkRow) -> str:
        text = ROW.dump_json(row).decode()
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        with self._lock:
            if key not in self._rows:
                self._rows[key] = text
                self._send(Register(key, text))
        return key

    @contextmanager
    def reserve(self) -> Iterator["EngineSlot"]:
        """See `InferenceClient.reserve`."""
        slot = EngineSlot(self)
        with self._lock:
            self._slots += 1
            self._pool.announce(1)
        try:
            yield slot
        finally:
            slot.close()

    def slot_closed(self, *, is_used: bool) -> None:
        """Note that a slot was used for its request, or will not be."""
        with self._lock:
            self._slots -= 1
            if not is_used:
                self._pool.announce(-1)

    def shard_batch_size(self, network: RemoteNetwork) -> int:
        """See `InferenceClient.shard_batch_size`."""
        welcome = self._welcome
        max_batch, on_gpu = (welcome.max_batch, welcome.on_gpu) if welcome else (0, False)
        return choose_shard_batch_size(network.facts, max_batch, on_gpu=on_gpu)

    def compute(
        self,
        network: RemoteNetwork,
        pixels: InputPixels,
        classes: tuple[Any, ...],
        method: Method,
        deadline: Deadline,
        *,
        images: int = 0,
        bulk: bool = False,
        alone: bool = False,
        submitted: Callable[[], None] = lambda: None,
        values: NDArray[np.float32] | None = None,
    ) -> Answer:
        """Compute scores and heatmaps: see `messages.Infer` for `images`, `bulk` and `alone`.

        One image (`images` is 0) has to be announced: see `EngineSlot.compute`.
        """
        traceparent = tracing.propagation_headers().get("traceparent")

        def message(number: int, offset: int) -> Infer:
            return Infer(
                number, network.key, offset, images, classes, _fields(method), bulk, alone, traceparent
            )

        answer: Answer = self._ask(message, deadline, pixels, submitted, values)
        deadline.used_device(answer.device_s)
        return answer

    def infer_many(
        self,
        network: RemoteNetwork,
        pixels: InputPixels,
        classes: Sequence[int] | Sequence[tuple[int, ...]],
        method: Method,
        deadline: Deadline,
        *,
        alone: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> list[Explanation | GradcamError]:
        """See `InferenceClient.infer_many`."""
        wanted, images = tuple(classes), len(pixels)
        of_each = selections_of(classes, images)
        if method.name == integrated.NAME:

            def compute(each: InputPixels, ids: NDArray[np.int32], part: Method) -> Computed:
                rows = tuple(map(tuple, ids.tolist()))
                return self.compute(
                    network, each, rows, part, deadline, images=images, bulk=True, alone=alone, values=values
                ).computed

            score = partial(self._score, network, values=values, deadline=deadline, bulk=True)
            selected = pad_selections(of_each)
            computed = integrated.integrate(compute, score, pixels, selected, method, network.facts.head)
            return extract_each(network, computed, of_each, method)
        answer = self.compute(
            network, pixels, wanted, method, deadline, images=images, bulk=True, alone=alone, values=values
        )
        return extract_each(network, answer.computed, of_each, method)

    def _score(
        self,
        network: RemoteNetwork,
        pixels: InputPixels,
        values: NDArray[np.float32] | None,
        deadline: Deadline,
        *,
        bulk: bool,
    ) -> NDArray[np.float32]:
        """`scores` of images with their own values of further inputs each (n, width)."""
        scores: NDArray[np.float32]
        scores, computed_s = self._ask(
            lambda number, offset: Score(number, network.key, offset, len(pixels), bulk, alone=False),
            deadline,
            pixels,
            values=values,
        )
        deadline.used_device(computed_s)
        return scores

    def scores(
        self,
        network: RemoteNetwork,
        pixels: InputPixels,
        deadline: Deadline,
        *,
        bulk: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """See `InferenceClient.scores`."""
        return self._score(network, pixels, repeat_values(values, len(pixels)), deadline, bulk=bulk)

    def measure(
        self,
        network: RemoteNetwork,
        pixels: InputPixels,
        explanation: Explanation,
        metrics: Sequence[str],
        deadline: Deadline,
        *,
        bulk: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> Explanation:
        """See `InferenceClient.measure`."""
        score = partial(self.scores, network, deadline=deadline, bulk=bulk, values=values)
        return replace(explanation, metrics=tuple(measure(score, pixels, explanation, metrics)))

    def _ask(
        self,
        make: Callable[[int, int], Infer | Score | Load],
        deadline: Deadline,
        pixels: InputPixels | None = None,
        submitted: Callable[[], None] = lambda: None,
        values: NDArray[np.float32] | None = None,
        *,
        counts: bool = True,
    ) -> Any:
        """Send a request and wait for its answer.

        Args:
            make: Makes the message from its number and the offset of its pixels.
            deadline: The job's deadline.
            pixels: Copied into the shared memory.
            submitted: Called when the request is sent, or will be when there is an engine.
            values: Of further inputs, (n, width): copied into the shared memory, after the pixels.
            counts: Whether time counts for which an engine was there.

        Raises:
            JobTimeout: The deadline passed.
            EngineUnavailable: The deadline passed, and there was no engine.
            GradcamError: The engine answered with this error.
        """
        deadline.check(WAITING_FOR_ENGINE)
        wait = _Wait(self, deadline, counts)
        self._waits.add(wait)
        try:
            return self._ask_and_wait(make, wait, pixels, values, submitted)
        finally:
            if not counts:
                self.give_back(wait)
            self._waits.discard(wait)

    def _ask_and_wait(
        self,
        make: Callable[[int, int], Infer | Score | Load],
        wait: _Wait,
        pixels: InputPixels | None,
        values: NDArray[np.float32] | None,
        submitted: Callable[[], None],
    ) -> Any:
        block = None
        if pixels is not None:
            size = pixels.nbytes if values is None else aligned(pixels.nbytes) + values.nbytes
            block = self._pool.reserve(size, wait)
            block.write(pixels, values)
        number = next(self._numbers)
        request = _Request(make(number, block.offset if block else NO_BLOCK), block)
        with self._lock:
            if self._closed:
                request.complete(error=InternalError("The connection to the engine process was closed."))
            else:
                self._requests[number] = request
                self._send(request.message)
                submitted()
        while not request.done.wait(min(wait.left_s(), CANCEL_POLL_INTERVAL_S)):
            try:
                wait.check(WAITING_FOR_ENGINE)
            except GradcamError:
                self._abandon(number)
                raise
        if request.error is not None:
            raise request.error
        return request.answer

    def give_back(self, wait: _Wait) -> None:
        """Give a job the time back for which it waited and no engine answered, or that does not count.

        Args:
            wait: The job's wait.
        """
        with self._lock:
            now_s, absent_s = time.monotonic(), self.absent_s()
            since_s = now_s - (absent_s or 0.0) if wait.counts else wait.since_s
            until_s = now_s - max((absent_s or 0.0) - MAX_ABSENCE_S, 0.0)
            wait.deadline.give_back(max(since_s, wait.since_s), until_s)

    def absent_s(self) -> float | None:
        """For how long there has been no engine, or a silent one. None: there is one."""
        with self._lock:
            now_s, since_s = time.monotonic(), self._absent_since_s
            if since_s is None and now_s - self._heard_s > SILENT_AFTER_S:
                since_s = self._heard_s
            return None if since_s is None else now_s - since_s

    def _abandon(self, number: int) -> None:
        """Give up a request. The engine may read its block until it answers."""
        with self._lock:
            if self._stream is None:  # no engine has the request
                self._complete(number)
            elif request := self._requests.get(number):
                request.is_abandoned = True
                self._send(Cancel(number))

    def _send(self, message: Message) -> None:
        """Send a message if there is a connection. If not, it is sent when there is one."""
        stream = self._stream
        if stream is None:
            return
        try:
            stream.sendall(b"".join(messages.encode(message)))
        except OSError:
            # The engine reads this end, writes no further mark into the pool, and closes the connection. Then
            # the reading thread connects again, and sends all requests again.
            with suppress(OSError):
                stream.shutdown(socket.SHUT_WR)

    def _run(self) -> None:
        """Connect, read until the engine ends, and so on."""
        failures = 0
        while not self._closed:
            try:
                stream = self._open()
            except OSError:
                failures += 1
                time.sleep(RECONNECT.pause_s(failures))
                continue
            failures = 0
            try:
                with stream:
                    self._read(stream)
            except Exception as error:  # noqa: BLE001  # this thread must go on
                log.warning("engine_connection_broken", error=error)
            self._disconnect()
            if self._fatal:
                self._fail_all(self._fatal)
                return
            self._suspect()
            time.sleep(RECONNECT.first_s)

    def _open(self) -> socket.socket:
        """Connect, and send `Hello` with the pool."""
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(str(self._path))
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            timeval = struct.pack("ll", SEND_TIMEOUT_S, 0)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
            hello = b"".join(messages.encode(Hello(__version__, os.getpid(), self._pool.size)))
            socket.send_fds(stream, [hello], [self._pool.fd])
        except BaseException:
            stream.close()
            raise
        return stream

    def _read(self, stream: socket.socket) -> None:
        receiver = Receiver()
        while not self._closed and (data := stream.recv(RECEIVE_BYTES)):
            self._engine_answers()
            for message, body in receiver.feed(data):
                self._handle(stream, message, body)
                if self._fatal:
                    return

    def _engine_answers(self) -> None:
        """Note that the engine has sent something."""
        with self._lock:
            if self._absent_since_s is None and self.absent_s() is not None:  # it was silent
                for wait in [*self._waits]:
                    self.give_back(wait)
            self._heard_s = time.monotonic()

    def _handle(self, stream: socket.socket, message: Message, body: memoryview) -> None:
        if isinstance(message, Results):
            self._distribute(message, body)
        elif isinstance(message, Scored):
            scores = messages.split_body(message.arrays, body)[0]
            self._complete(message.request, (scores, message.computed_s))
        elif isinstance(message, Loaded):
            self._complete(message.request, message)
        elif isinstance(message, Failed):
            self._complete(message.request, error=error_class(message.code)(message.detail))
        elif isinstance(message, State):
            self._state = message
        elif isinstance(message, Welcome):
            self._welcomed(stream, message)
        else:
            text = f"{type(message).__name__} was received from the engine process."
            raise messages.BrokenMessage(text)

    def _welcomed(self, stream: socket.socket, welcome: Welcome) -> None:
        """Send what a new engine does not know: networks, and requests without an answer."""
        if welcome.error:
            self._fatal = welcome.error
            self._connected.set()
            return
        with self._lock:
            self._welcome = welcome
            self._state = replace(self._state, not_ready=welcome.not_ready)
            self._stream = stream
            for wait in [*self._waits]:
                self.give_back(wait)
            self._absent_since_s = None
            waiting = [request.message for request in self._requests.values()]
            announced = [
                message for message in waiting if isinstance(message, Infer) and message.is_announced
            ]
            self._pool.announced = self._slots + len(announced)
            for key, row in self._rows.items():
                self._send(Register(key, row))
            for request in self._requests.values():
                self._send(request.message)
        self._connected.set()
        log.info("engine_connected", pid=welcome.pid, device=welcome.device)

    def _disconnect(self) -> None:
        with self._lock:
            stream, self._stream = self._stream, None
            if self._absent_since_s is None:
                self._absent_since_s = time.monotonic() - (self.absent_s() or 0.0)
            if not self._fatal:  # which `connect` reports
                self._connected.clear()
        if stream:
            with suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)

    def _suspect(self) -> None:
        """After the end of an engine: prepare the requests that it did not answer for its successor."""
        with self._lock:
            waiting, resent_before = [*self._requests.items()], self.resent
            for number, request in waiting:
                message = request.message
                at_device = request.block is not None and request.block.take_mark()
                request.losses += 1
                if request.losses >= MAX_LOSSES:
                    text = f"The connection to the engine process was lost {request.losses} times."
                    self._complete(number, error=EngineUnavailable(text))
                elif request.is_abandoned:
                    self._complete(number, error=InternalError("Nobody waits for this request."))
                elif at_device and not isinstance(message, Load):
                    if message.alone:
                        text = (
                            "The engine process ended while it computed this image with this network, "
                            "and nothing else."
                        )
                        self._complete(number, error=NetworkCrashed(text))
                    else:
                        request.message = replace(message, alone=True)
                        self.resent += 1
                else:
                    self.resent += 1
        if waiting:
            self._observer.engine_requests_resent(self.resent - resent_before)
            log.warning("engine_lost", requests=len(waiting), reason="they are sent to its successor")

    def _fail_all(self, reason: str) -> None:
        with self._lock:
            for number in [*self._requests]:
                self._complete(number, error=InternalError(f"No answer: {reason}."))

    def _distribute(self, results: Results, body: memoryview) -> None:
        """Complete the requests of a batch."""
        arrays = messages.split_body(results.arrays, body)
        scores, class_ids, raw, *others = arrays
        features = others.pop() if results.has_features else None
        outputs = others[0] if others else None
        first = 0
        for number, images, waited_s in zip(results.requests, results.images, results.waited_s, strict=True):
            rows = slice(first, first + images)
            first += images
            computed = Computed(
                results.layer,
                scores[rows],
                class_ids[rows],
                raw[rows],
                None if outputs is None else outputs[rows],
                features=None if features is None else features[rows],
            )
            self._complete(number, Answer(computed, waited_s, results.computed_s, results.batch_size))

    def _complete(self, number: int, answer: Any = None, error: GradcamError | None = None) -> None:
        with self._lock:
            request = self._requests.pop(number, None)
        if request:
            request.complete(answer, error)


class EngineSlot:
    """A job that will submit one image: batches wait for it a short time."""

    def __init__(self, client: EngineClient) -> None:
        self._client, self._is_closed = client, False

    def close(self, *, is_used: bool = False) -> None:
        """Note that no request will be sent, or that it was."""
        if not self._is_closed:
            self._is_closed = True
            self._client.slot_closed(is_used=is_used)

    def compute(
        self,
        network: RemoteNetwork,
        pixels: InputPixels,
        classes: tuple[int, ...],
        method: Method,
        deadline: Deadline,
        *,
        bulk: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> Answer:
        """Compute scores and heatmaps of one image, in a batch with others."""
        used = partial(self.close, is_used=True)
        its_values = repeat_values(values, 1)
        return self._client.compute(
            network, pixels, classes, method, deadline, bulk=bulk, submitted=used, values=its_values
        )

    def infer(
        self,
        network: RemoteNetwork,
        pixels: InputPixels,
        classes: Sequence[int],
        method: Method,
        deadline: Deadline,
        *,
        bulk: bool = False,
        values: NDArray[np.float32] | None = None,
    ) -> InferenceResult:
        """See `ReservedSlot.infer`."""
        wanted = tuple(classes)
        if method.name == integrated.NAME:
            return self._integrate(network, pixels, wanted, method, deadline, bulk=bulk, values=values)
        answer = self.compute(network, pixels, wanted, method, deadline, bulk=bulk, values=values)
        explanation = extract_explanation(network, answer.computed, 0, wanted, method)
        return InferenceResult(explanation, answer.waited_s, answer.computed_s, answer.batch_size)

    def _integrate(
        self,
        network: RemoteNetwork,
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
            with self._client.reserve() if self._is_closed else nullcontext(self) as slot:
                answer = slot.compute(network, image, ids, part, deadline, bulk=bulk, values=values)
            return InferenceResponse(
                answer.computed, 0, answer.waited_s, answer.computed_s, answer.batch_size
            )

        score = partial(self._client.scores, network, deadline=deadline, bulk=bulk, values=values)
        return infer_in_parts(network, pixels, classes, method, infer_part, score)


def _fields(method: Method) -> tuple[Any, ...]:
    plain = method.name, method.layer, method.score, method.normalize, method.flip
    further = method.against, method.baseline, method.steps, method.part
    if method.features:  # of a method that has none of the fields between
        of_masking = (None,) * (len(fields(Method)) - len(plain) - len(further) - 1)
        return (*plain, *further, *of_masking, True)
    return (*plain, *further) if any(further) else plain
