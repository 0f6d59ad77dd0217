"""A small TCP proxy whose faults can be changed while it runs.

>>> with FaultyProxy(server.port) as proxy:
...     client = connect(proxy.port)
...     with proxy.suffering(Fault(latency_s=0.2, slice_bytes=3)):
...         client.ask()

Its own port stays; `target` may be another one each time a server behind it has been started again.
"""

import contextlib
import math
import random
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

CHUNK = 64 * 1024  # bytes read at a time
POLL_INTERVAL_S = 0.1  # of whether the proxy is to end
CONNECT_S = 2.0
RESET = struct.pack("ii", 1, 0)  # linger for no time: closing sends RST, not FIN


@dataclass(frozen=True)
class Fault:
    """What is wrong with the line, for all connections, old and new. Each of it may be so by itself."""

    latency_s: float = 0.0  # before each piece, in either direction
    bytes_per_s: float = math.inf
    slice_bytes: int = 0  # at most this many at once; 0: as they arrive
    reset: float = 0.0  # share of pieces in the middle of which the connection is reset
    half_open: bool = False  # connections stand, nothing comes through them: not now, and not later either
    garbage: bool = False  # the server is asked, what it answers is replaced by chance
    answer: bytes = b""  # comes back for whatever is asked; the server hears nothing


WELL = Fault()


class _Line:
    """One connection: from a client to the proxy, and on to the server."""

    def __init__(self, proxy: "FaultyProxy", client: socket.socket, server: socket.socket) -> None:
        self.proxy, self.client, self.server = proxy, client, server
        self.spoilt = False  # bytes were held back or replaced: it can never be a good one again
        self.dead = False  # half-open: nothing comes through
        self.closed = threading.Event()

    def close(self, *, reset: bool = False) -> None:
        self.closed.set()
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                if reset:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                else:
                    end.shutdown(socket.SHUT_RDWR)  # ends a blocking read

    def pump(self, source: socket.socket, sink: socket.socket, *, answers: bool) -> None:
        """Carry bytes one way until either end is closed."""
        with contextlib.suppress(OSError):
            while not self.closed.is_set():
                try:
                    data = source.recv(CHUNK)
                except TimeoutError:
                    continue
                if not data:
                    break
                self._carry(data, sink, answers=answers)
            if not (self.closed.is_set() or self.dead):
                sink.shutdown(socket.SHUT_WR)  # half of it is over; the other half may have more to say
            return
        if not (self.dead and answers):  # the end of a half-open connection stays unknown to its client
            self.close()

    def _carry(self, data: bytes, sink: socket.socket, *, answers: bool) -> None:
        fault = self.proxy.fault
        if fault.half_open or self.dead:
            self.dead = self.spoilt = True
            return
        if fault.answer:
            self.spoilt = True
            if not answers:
                self._send(self.client, fault.answer)
            return
        if fault.garbage and answers:
            self.spoilt = True
            data = self.proxy.random_bytes(len(data))
        size = fault.slice_bytes or len(data)
        for begin in range(0, len(data), size):
            piece = data[begin : begin + size]
            self.closed.wait(fault.latency_s + len(piece) / fault.bytes_per_s)
            if self.proxy.chance() < fault.reset:
                self._send(sink, piece[: len(piece) // 2])
                self.proxy.resets += 1
                self.close(reset=True)
            if self.closed.is_set():
                return
            self._send(sink, piece)

    def _send(self, sink: socket.socket, data: bytes) -> None:
        while data and not self.closed.is_set():
            with contextlib.suppress(TimeoutError):  # its receiver is stopped: the line may be closed yet
                data = data[sink.send(data) :]


class FaultyProxy:
    """Listens on a free port of this machine and forwards connections to `target`, another one."""

    def __init__(self, target: int, *, seed: int = 0) -> None:
        """`seed`: of all that is left to chance."""
        self.target = target
        self.resets = 0
        self._fault = WELL
        self._random = random.Random(seed)  # noqa: S311  # repeatable, not secret
        self._door = threading.Lock()
        self._lines: set[_Line] = set()
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listener.settimeout(POLL_INTERVAL_S)
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        accepting = threading.Thread(target=self._accept, name="faulty proxy", daemon=True)
        self._threads.append(accepting)
        accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._threads[0].join()
        self._listener.close()
        self.cut()
        for one in self._threads:
            one.join()

    @property
    def fault(self) -> Fault:
        """What is wrong just now."""
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        """From now on. Connections whose bytes were replaced are reset: they cannot be good again."""
        self._fault = fault
        with self._door:
            spoilt = [one for one in self._lines if one.spoilt and not one.dead]
        for one in spoilt:
            one.close(reset=True)

    @contextlib.contextmanager
    def suffering(self, fault: Fault) -> Iterator[None]:
        """This is wrong within the block."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = WELL

    @property
    def connections(self) -> int:
        """How many stand just now."""
        with self._door:
            return len(self._lines)

    def cut(self) -> None:
        """Reset all connections that stand."""
        with self._door:
            lines = list(self._lines)
        for one in lines:
            one.close(reset=True)

    def chance(self) -> float:
        """A number from 0 to 1."""
        with self._door:
            return self._random.random()

    def random_bytes(self, count: int) -> bytes:
        """As many bytes."""
        with self._door:
            return self._random.randbytes(count)

    def _accept(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                line = threading.Thread(target=self._serve, args=[client], daemon=True)
                self._threads = [one for one in self._threads if one.is_alive()]
                self._threads.append(line)
                line.start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(("127.0.0.1", self.target), CONNECT_S)
            except OSError:  # as like a closed port as an open one can be
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                return
            with server:
                self._carry_both_ways(_Line(self, client, server))

    def _carry_both_ways(self, line: _Line) -> None:
        for end in (line.client, line.server):
            end.settimeout(POLL_INTERVAL_S)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # slices are to arrive as slices
        with self._door:
            self._lines.add(line)
        back = threading.Thread(
            target=line.pump, args=[line.server, line.client], kwargs={"answers": True}, daemon=True
        )
        back.start()
        line.pump(line.client, line.server, answers=False)
        if line.dead:  # the client has given up; the server never hears of it
            line.close()
        back.join()
        with self._door:
            self._lines.discard(line)
