"""Serves the requests of job processes in the engine process: see `messages` for what they send.

One thread (`EngineServer.serve`) reads all connections. The threads of the batcher send the results, one
message for each job process and batch. A job process that does not read its results stops nobody: they wait
in the memory of its connection, at most as many as it has requests.
"""

import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from gradcam_worker import __version__
from gradcam_worker.errors import GradcamError, InternalError, JobCanceled
from gradcam_worker.gradcam.catalog import NetworkRow
from gradcam_worker.gradcam.network import Computed, Method, Network, scores
from gradcam_worker.inference import batcher, messages
from gradcam_worker.inference.messages import (
    FACTS,
    LABELS,
    ROW,
    BrokenMessage,
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
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.inference.pixel_pool import AT_DEVICE, WAITING, MappedPool
from gradcam_worker.inference.request import BatchKey, InferenceRequest, InferenceResponse
from gradcam_worker.net import listening
from gradcam_worker.observability.tracing import NO_TRACES, LinkTarget, Traces
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

RECEIVE_BYTES = 256 * 1024
SEND_BUFFER_BYTES = 4 * 1024 * 1024
STATE_INTERVAL_S = 1.0  # between two reports of the engine's state
KEEP_REPLACED_S = 60.0  # a network whose row has changed, after its latest use: a shard asks often
LOADERS = 4  # networks that are loaded at once
UNUSED_POLL_INTERVAL_S = 0.1
ACCEPT_RETRY_S = 0.1
DRAIN_TIMEOUT_S = 5.0  # for batches at the device, before the engine ends
HUNG_AFTER_S = 30.0  # without a turn of the serving thread, which turns every second
MAX_BUFFERS = 512  # of one call of `sendmsg`; the system allows 1024


@dataclass(frozen=True)
class EngineFacts:
    """What job processes are told about the engine."""

    device: str
    on_gpu: bool
    max_batch: int  # of the settings; 0: measured


@dataclass(eq=False, kw_only=True)
class RemoteRequest(InferenceRequest):
    """A request of a job process."""

    number: int
    connection: "Connection"
    offset: int  # of its block in the pool of its job process

    def started(self) -> None:
        """See `InferenceRequest.started`."""
        self.connection.mark(self.offset, AT_DEVICE)

    def complete(self, response: Any = None, error: BaseException | None = None) -> None:
        """Answer the request: with its batch, or at once with an error."""
        self.connection.mark(self.offset, WAITING)
        self.connection.complete(self, response, error)


class Connection:
    """The connection to one job process."""

    def __init__(self, server: "EngineServer", stream: socket.socket) -> None:
        self.stream, self.pid = stream, 0
        self.receiver = Receiver()
        self.rows: dict[str, NetworkRow] = {}
        self.requests: dict[int, RemoteRequest] = {}  # that are not answered
        self.descriptors: list[int] = []  # received and not yet used
        self.received = 0  # number of announced requests
        self.closed = False
        self.server = server
        self._pool: MappedPool | None = None
        self._completed: list[tuple[RemoteRequest, InferenceResponse]] = []
        self._unsent: deque[memoryview] = deque()
        self._lock = threading.Lock()

    @property
    def is_greeted(self) -> bool:
        """Whether `Hello` was received."""
        return self._pool is not None

    @property
    def pool(self) -> MappedPool:
        """The memory of its pixels. Raises BrokenMessage before `Hello`."""
        if self._pool is None:
            message = "The first message must be Hello."
            raise BrokenMessage(message)
        return self._pool

    def keep_descriptors(self, descriptors: list[int]) -> None:
        """Keep the file descriptor that comes with `Hello`. Raises BrokenMessage where there are more."""
        self.descriptors += descriptors
        if len(self.descriptors) > (not self.is_greeted):
            message = f"{len(self.descriptors)} file descriptors were received: only Hello comes with one."
            raise BrokenMessage(message)

    def greet(self, hello: Hello) -> None:
        """Map the pool that `Hello` came with."""
        if self._pool is not None or len(self.descriptors) != 1:
            message = f"Hello came with {len(self.descriptors)} file descriptors, or twice."
            raise BrokenMessage(message)
        self.pid = hello.pid
        self._pool = MappedPool(self.descriptors.pop(), hello.pool_bytes)

    def mark(self, offset: int, state: int) -> None:
        """See `MappedPool.mark`. After the end of the connection its memory may belong to another request."""
        with self._lock:
            if not self.closed:
                self.pool.mark(offset, state)

    @property
    def expected(self) -> int:
        """Number of requests that this job process has announced, and not sent yet."""
        return max(self._pool.announced - self.received, 0) if self._pool else 0

    def complete(self, request: RemoteRequest, response: Any, error: BaseException | None) -> None:
        """Keep the results of a request until `flush`; send an error at once."""
        with self._lock:
            self.requests.pop(request.number, None)
            if error is None:
                self._completed.append((request, response))
        if error is not None:
            self.send(_failure(request.number, error))

    def flush(self) -> None:
        """Send the results of all requests that were completed."""
        with self._lock:
            completed, self._completed = self._completed, []
        while completed:
            computed = completed[0][1].computed
            together = [pair for pair in completed if pair[1].computed is computed]
            completed = [pair for pair in completed if pair[1].computed is not computed]
            self.send(*_answer(together, computed))

    def send(self, message: Message, arrays: tuple[np.ndarray[Any, Any], ...] = ()) -> None:
        """Send a message, without waiting for the job process."""
        buffers = [memoryview(buffer) for buffer in messages.encode(message, arrays)]
        with self._lock:
            if self.closed:
                return
            waiting = bool(self._unsent)
            self._unsent.extend(buffers)
            if not waiting:
                self._send_now()
                if self._unsent:
                    self.server.watch(self, writes=True)

    def _send_now(self) -> None:
        """Send as much as the system takes."""
        try:
            while self._unsent:
                buffers = [self._unsent[index] for index in range(min(len(self._unsent), MAX_BUFFERS))]
                sent = self.stream.sendmsg(buffers, [], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                while self._unsent and sent >= len(self._unsent[0]):
                    sent -= len(self._unsent.popleft())
                if sent:
                    self._unsent[0] = self._unsent[0][sent:]
        except BlockingIOError:
            return
        except OSError:  # the serving thread reads the end of the connection
            self._unsent.clear()

    def send_rest(self) -> None:
        """Send what waits, now that the job process reads."""
        with self._lock:  # also while the server is told: another thread may have more to send just now
            self._send_now()
            if not self._unsent:
                self.server.watch(self, writes=False)

    @property
    def is_behind(self) -> bool:
        """Whether messages wait, since the job process does not read."""
        return bool(self._unsent)

    def close(self) -> None:
        """Drop its requests. The pool is unmapped when the device has finished with it."""
        with self._lock:
            self.closed = True
            self._unsent.clear()
            requests = [*self.requests.values()]
        for request in requests:
            request.deadline.cancel(JobCanceled("The job process has ended."))
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.stream.close()


class EngineServer:
    """Serves the job processes of one device."""

    def __init__(
        self,
        model_cache: ModelCache,
        path: Path,
        facts: EngineFacts,
        *,
        not_ready: Callable[[], str | None] = lambda: None,
        first_request: Callable[[], object] = lambda: None,
        traces: Traces = NO_TRACES,
    ) -> None:
        """Listen on a Unix domain socket that only this user can open.

        Args:
            model_cache: Loads networks and computes.
            path: The socket, in a folder that only this user can read. A file that is there is replaced.
            facts: What job processes are told about this engine.
            not_ready: Why no job should be taken yet, if so.
            first_request: Called before the first request is handled, which may end this process.
            traces: Gets a span for each batch, with links to those of its jobs.
        """
        self._model_cache, self._facts, self._not_ready = model_cache, facts, not_ready
        self._first_request: Callable[[], object] | None = first_request
        self.traces = traces
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._stopped = False
        self._turned_s = time.monotonic()
        self._awake, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        self._loaders = ThreadPoolExecutor(LOADERS, thread_name_prefix="load")
        self._waiting_for: dict[NetworkRow, list[tuple[Connection, Load | Infer | Score]]] = {}
        self._path, self._listener = path, _listen(path)
        model_cache.set_expected_elsewhere(self._expected)
        model_cache.keep_replaced_s = KEEP_REPLACED_S

    def _expected(self) -> int:
        return sum(connection.expected for connection in [*self._connections])

    def stop(self) -> None:
        """End `serve`. Requests that are not answered get no answer: job processes send them again."""
        self._stopped = True
        self._wake_up()

    def wait_until_unused(self, timeout_s: float) -> None:
        """Wait until no job process is connected.

        Args:
            timeout_s: How long to wait.
        """
        end_s = time.monotonic() + timeout_s
        while self._connections and time.monotonic() < end_s:
            time.sleep(UNUSED_POLL_INTERVAL_S)

    def unhealthy_reason(self) -> str | None:
        """Why this engine should be replaced; None if it should not."""
        if failure := self._model_cache.failure:
            return failure
        idle_s = time.monotonic() - self._turned_s
        return f"nothing has been served for {idle_s:.0f} s" if idle_s > HUNG_AFTER_S else None

    def _wake_up(self) -> None:
        with suppress(BlockingIOError, OSError):
            self._wake.send(b"1")

    def watch(self, connection: Connection, *, writes: bool) -> None:
        """Watch a connection, also for when its job process reads again if messages wait for that."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writes else 0)
        with self._lock, suppress(KeyError, ValueError, RuntimeError):  # or it is closed
            self._selector.modify(connection.stream, events, connection)
        self._wake_up()

    def serve(self) -> None:
        """Serve until `stop`."""
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._awake, selectors.EVENT_READ)
        reported_s = 0.0
        try:
            while not self._stopped:
                self._turned_s = time.monotonic()
                self._serve_events()
                if time.monotonic() - reported_s >= STATE_INTERVAL_S:
                    reported_s = time.monotonic()
                    self._report_state()
                    self._listen_again()
                    self._model_cache.drop_replaced()
        finally:
            self._listener.close()
            self._model_cache.drain(DRAIN_TIMEOUT_S)
            self._awake.close()
            self._wake.close()
            self._selector.close()
            for connection in [*self._connections]:
                self._close(connection)
            self._loaders.shutdown(wait=False, cancel_futures=True)

    def _serve_events(self) -> None:
        """Wait for events. No reference to a connection is kept: an idle thread must not keep its memory."""
        for key, events in self._selector.select(STATE_INTERVAL_S):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._awake:
                self._awake.recv(4096)
            elif key.data in self._connections:
                self._serve_connection(key.data, events)

    def _listen_again(self) -> None:
        """Make the socket again if somebody has removed it, as programs do that tidy up /tmp."""
        if self._path.exists():
            return
        log.warning("engine_socket_removed", socket=self._path, reason="it is made again")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            listener = _listen(self._path)
        except OSError as error:  # the next turn tries again
            log.error("engine_socket_not_made", socket=self._path, error=error)  # noqa: TRY400  # as above
            return
        self._selector.unregister(self._listener)
        self._listener.close()
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        try:
            stream, _ = self._listener.accept()
        except OSError as error:  # too many open files, perhaps
            log.error("job_process_not_accepted", error=error)  # noqa: TRY400  # the sentence is enough
            time.sleep(ACCEPT_RETRY_S)
            return
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        connection = Connection(self, stream)
        self._connections.add(connection)
        with self._lock:
            self._selector.register(stream, selectors.EVENT_READ, connection)

    def _serve_connection(self, connection: Connection, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                connection.send_rest()
            if events & selectors.EVENT_READ:
                data, descriptors, _, _ = socket.recv_fds(
                    connection.stream, RECEIVE_BYTES, 4, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
                connection.keep_descriptors(descriptors)
                if not data:
                    self._close(connection)
                    return
                self._receive(connection, data)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
        except Exception as error:  # noqa: BLE001  # a defect of one job process must not end the others
            log.error("job_process_disconnected", pid=connection.pid, error=error)  # noqa: TRY400
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        self._connections.discard(connection)
        with self._lock, suppress(KeyError, ValueError, RuntimeError):  # or it is closed
            self._selector.unregister(connection.stream)
        connection.close()
        self._wait_no_more(connection)
        self._model_cache.drop_cancelled()

    def _receive(self, connection: Connection, data: bytes) -> None:
        """Handle what a connection received. Requests for loaded networks are queued together."""
        requests: list[RemoteRequest] = []
        networks: dict[str, Network | None] = {}
        announced = 0  # of these messages
        for message, _ in connection.receiver.feed(data):
            if not (connection.is_greeted or isinstance(message, Hello)):
                text = f"{type(message).__name__} was received: the first message must be Hello."
                raise BrokenMessage(text)
            if self._first_request and isinstance(message, Load | Infer | Score):
                self._first_request()
                self._first_request = None
            if isinstance(message, Infer | Score):
                announced += isinstance(message, Infer) and message.is_announced
                if message.key not in networks:
                    row = connection.rows.get(message.key)
                    networks[message.key] = self._model_cache.find_loaded(row) if row else None
                network = networks[message.key]
                if network is None:
                    self._load_for(connection, message)
                else:
                    try:
                        requests.append(_request(connection, message, network))
                    except GradcamError as error:
                        connection.send(_failure(message.request, error))
            else:
                self._handle(connection, message)

        def submitted() -> None:
            connection.received += announced

        if requests:
            self._queue(requests, submitted)
        else:
            submitted()

    def _handle(self, connection: Connection, message: Message) -> None:
        if isinstance(message, Hello):
            self._greet(connection, message)
        elif isinstance(message, Register):
            try:
                connection.rows[message.key] = ROW.validate_json(message.row)
            except ValidationError as error:
                text = f"{message.row[:200]!r} is no row of a network."
                raise BrokenMessage(text) from error
        elif isinstance(message, Load):
            self._load_for(connection, message)
        elif isinstance(message, Cancel):
            given_up = JobCanceled("The job process has given up.")
            if request := connection.requests.get(message.request):
                request.deadline.cancel(given_up)
                self._model_cache.drop_cancelled()
            elif self._wait_no_more(connection, message.request):
                connection.send(_failure(message.request, given_up))
        else:
            text = f"{type(message).__name__} was received from a job process."
            raise BrokenMessage(text)

    def _greet(self, connection: Connection, hello: Hello) -> None:
        problem = None
        if hello.version != __version__:
            problem = f"The engine is version {__version__}, the job process {hello.version}."
        connection.greet(hello)
        facts = self._facts
        connection.send(
            Welcome(
                __version__,
                os.getpid(),
                facts.device,
                facts.on_gpu,
                facts.max_batch,
                self._not_ready(),
                problem,
            )
        )
        log.info("job_process_connected", pid=hello.pid)

    def _report_state(self) -> None:
        cache = self._model_cache
        state = State(self._not_ready(), cache.count, cache.mean_batch_size)
        for connection in [*self._connections]:
            if connection.is_greeted and not connection.is_behind:
                connection.send(state)

    def _load_for(self, connection: Connection, message: Load | Infer | Score) -> None:
        """Load the network of a message, and answer or queue it then.

        One thread loads a network, however many messages wait for it: they would occupy the threads that load
        other networks.
        """
        row = connection.rows.get(message.key)
        if row is None:
            error = InternalError(f"No network was registered as {message.key}.")
            connection.send(_failure(message.request, error))
            return
        if isinstance(message, Load) and (network := self._model_cache.find_loaded(row)):
            connection.send(_loaded(message.request, network))
            return
        with self._lock:
            is_loading = row in self._waiting_for
            self._waiting_for.setdefault(row, []).append((connection, message))
        if not is_loading:
            self._loaders.submit(self._load, row)

    def _wait_no_more(self, connection: Connection, number: int | None = None) -> bool:
        """Forget the message of this number, or all of the connection, that wait for a network."""
        found = False
        with self._lock:
            for waiting in self._waiting_for.values():
                for pair in [*waiting]:
                    if pair[0] is connection and number in {None, pair[1].request}:
                        waiting.remove(pair)
                        found = True
        return found

    def _load(self, row: NetworkRow) -> None:
        """Load a network, which may take minutes; answer or queue the messages that wait for it."""
        with self._lock:
            if not self._waiting_for[row]:  # nobody wants it any more
                del self._waiting_for[row]
                return
        network, failure = None, None
        try:
            network = self._model_cache.load(row)
        except BaseException as error:  # noqa: BLE001  # whatever happens, all are answered
            failure = error
        with self._lock:
            waiting = self._waiting_for.pop(row)
        requests: list[RemoteRequest] = []
        for connection, message in waiting:
            try:
                if network is None:
                    connection.send(_failure(message.request, failure or InternalError()))
                elif isinstance(message, Load):
                    connection.send(_loaded(message.request, network))
                elif not connection.closed:
                    requests.append(_request(connection, message, network))
            except BaseException as error:  # noqa: BLE001  # as above
                connection.send(_failure(message.request, error))
        if requests:
            self._queue(requests)

    def _queue(self, requests: list[RemoteRequest], submitted: Callable[[], None] = lambda: None) -> None:
        """Queue requests. `submitted` is called with that: before, a batch would still wait for them."""
        for request in requests:
            request.connection.requests[request.number] = request
        try:
            self._model_cache.submit(requests, submitted)
        except InternalError as error:  # the device's thread has ended: the engine will be replaced
            for request in requests:
                request.complete(error=error)


def _listen(path: Path) -> socket.socket:
    """Listen on a socket that only this user can open. A file that is there is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind_for_this_user(listener, path)
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _request(connection: Connection, message: Infer | Score, network: Network) -> RemoteRequest:
    """The request for the batcher that a message asks for."""
    facts = network.facts
    shape = (*facts.input_size, facts.channels)
    stacked = connection.pool.pixels(message.offset, (max(message.images, 1), *shape), facts.pixel_type)
    values = None
    if facts.inputs:
        size = (len(stacked), facts.input_width)
        values = connection.pool.values(message.offset, stacked.nbytes, size)
    key: BatchKey = batcher.EXCLUSIVE_KEY
    pixels: Any = None
    classes: tuple[int, ...] = ()
    caller: LinkTarget | None = None
    if isinstance(message, Score):
        begin = batcher.begin_function(lambda: scores(network, stacked, values))
        images = 0
    else:
        method, classes = Method(*message.method), message.classes
        caller = connection.server.traces.link_target(message.traceparent)
        images = message.images or 1
        if message.images:
            key = batcher.separate_key(network, method)
            begin = batcher.begin_batch(network, stacked, classes, method, values)
        else:
            pixels = stacked[0]
            key = batcher.image_key(network, method, classes)
            begin = batcher.begin_images(network, method)
        if message.alone:
            key, begin = (key[0], key[1], batcher.ALONE), batcher.begin_alone(begin)
    return RemoteRequest(
        key,
        begin,
        Deadline(float("inf")),  # the job process watches the job's, and cancels the request
        message.bulk,
        images=images,
        pixels=pixels,
        values=None if values is None or pixels is None else values[0],
        classes=classes,
        after_batch=connection.flush,
        caller=caller,
        number=message.request,
        connection=connection,
        offset=message.offset,
    )


def _answer(
    together: list[tuple[RemoteRequest, InferenceResponse]], computed: Any
) -> tuple[Results | Scored, tuple[np.ndarray[Any, Any], ...]]:
    """The answer to requests of one batch, and its arrays."""
    first_request, first = together[0]
    if not isinstance(computed, Computed):
        arrays: tuple[np.ndarray[Any, Any], ...] = (np.ascontiguousarray(computed, np.float32),)
        return Scored(first_request.number, messages.describe_arrays(arrays), first.computed_s), arrays
    if len(together) == len(computed.scores) or first_request.images > 1:
        rows: Any = slice(None)
    else:
        rows = [response.index for _, response in together]
    floats, ids = np.float32, np.int32  # whatever a custom network returns
    parts: list[tuple[Any, Any]] = [
        (computed.scores, floats),
        (computed.class_ids, ids),
        (computed.raw, floats),
    ]
    if computed.outputs is not None:
        parts.append((computed.outputs, floats))
    if computed.features is not None:
        parts.append((computed.features, floats))
    arrays = tuple(np.ascontiguousarray(part[rows], dtype) for part, dtype in parts)
    results = Results(
        requests=tuple(request.number for request, _ in together),
        images=tuple(request.images for request, _ in together),
        waited_s=tuple(response.waited_s for _, response in together),
        computed_s=first.computed_s,
        batch_size=first.batch_size,
        layer=computed.layer,
        arrays=messages.describe_arrays(arrays),
        has_features=computed.features is not None,
    )
    return results, arrays


def _loaded(number: int, network: Network) -> Loaded:
    facts, labels = FACTS.dump_json(network.facts).decode(), LABELS.dump_json(network.labels).decode()
    return Loaded(number, facts, labels)


def _failure(number: int, error: BaseException) -> Failed:
    known = error if isinstance(error, GradcamError) else InternalError.of(error)
    return Failed(number, known.code, str(known))
