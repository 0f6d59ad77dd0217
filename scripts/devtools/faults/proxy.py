"""A small TCP proxy whose faults can be changed while it runs.

>>> with FaultyProxy(server.port) as proxy:
...     client = connect(proxy.port)
...     with proxy.suffering(Fault(latency_s=0.2, slice_bytes=3)):
...         client.ask()

Its own port stays; `target` may be another one each time a server behind it has been started again.
"""

import asyncio
import contextlib
import math
import random
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Self

CHUNK = 64 * 1024  # bytes read at a time
CONNECT_S = 2.0
NO_LINGER = struct.pack("ii", 1, 0)  # closing sends RST, not FIN


@dataclass(frozen=True)
class Fault:
    """What is wrong with the connections, old and new. Each fault may be set by itself."""

    latency_s: float = 0.0  # before each piece, in either direction
    bytes_per_s: float = math.inf
    slice_bytes: int = 0  # at most this many at once; 0: as they arrive
    reset: float = 0.0  # share of pieces in the middle of which the connection is reset
    half_open: bool = False  # connections stand, nothing comes through them: not now, and not later either
    garbage: bool = False  # the server is asked, its answer is replaced by random bytes
    answer: bytes = b""  # is sent back for whatever is asked; the server hears nothing


WELL = Fault()


class _Connection:
    """From a client to the proxy, and on to the server."""

    def __init__(self, proxy: "FaultyProxy", client: StreamWriter) -> None:
        self.proxy, self.client = proxy, client
        self.server: StreamWriter | None = None
        self.spoilt = False  # bytes were held back or replaced: it can never be a good one again
        self.dead = False  # half-open: nothing comes through

    def close(self, *, reset: bool = False) -> None:
        for writer in filter(None, (self.client, self.server)):
            if not reset:
                writer.close()
                continue
            with contextlib.suppress(OSError):  # it is closed
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            writer.transport.abort()

    async def carry(self, reader: StreamReader, sink: StreamWriter) -> None:
        """Carry bytes one way until either end is closed."""
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                await self._carry(data, sink)
            if not self.dead:
                sink.write_eof()  # half of it is over; the other half may have more to say
                return
        # The end of a half-open connection stays unknown to its client.
        if not (self.dead and sink is self.client):
            self.close(reset=True)

    async def _carry(self, data: bytes, sink: StreamWriter) -> None:
        fault, draw = self.proxy.fault, self.proxy.random
        self.dead = self.dead or fault.half_open
        self.spoilt = self.spoilt or self.dead or bool(fault.answer) or fault.garbage
        if self.dead:
            return
        if fault == WELL:
            sink.write(data)
            await sink.drain()
            return
        if fault.answer:
            if sink is self.server:
                self.client.write(fault.answer)
            return
        if fault.garbage and sink is self.client:
            data = draw.randbytes(len(data))
        size = fault.slice_bytes or len(data)
        for begin in range(0, len(data), size):
            piece = data[begin : begin + size]
            await asyncio.sleep(fault.latency_s + len(piece) / fault.bytes_per_s)
            if draw.random() < fault.reset:
                sink.write(piece[: len(piece) // 2])
                self.proxy.resets += 1
                self.close(reset=True)
                raise ConnectionResetError
            sink.write(piece)
            await sink.drain()


class FaultyProxy:
    """Listens on a free port of this machine and forwards connections to `target`, another one."""

    def __init__(self, target: int, *, seed: int = 0) -> None:
        """`seed`: of all that is left to chance."""
        self.target = target
        self.resets = 0
        self.random = random.Random(seed)  # noqa: S311  # repeatable, not secret
        self._fault = WELL
        self._connections: set[_Connection] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._listener.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, sock=self._listener))
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def fault(self) -> Fault:
        """What is wrong just now."""
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        """From now on. Connections whose bytes were replaced are reset: they cannot be good again."""
        self._fault = fault
        self._run(self._reset(spoilt=True))

    @contextlib.contextmanager
    def suffering(self, fault: Fault) -> Iterator[None]:
        """This is wrong within the block."""
        self.fault = fault
        try:
            yield
        finally:
            self.fault = WELL

    def cut(self) -> None:
        """Reset all connections that stand."""
        self._run(self._reset(spoilt=False))

    def _run(self, step: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(step, self._loop).result()

    async def _reset(self, *, spoilt: bool) -> None:
        for connection in self._connections:
            if not spoilt or (connection.spoilt and not connection.dead):
                connection.close(reset=True)

    async def _end(self) -> None:
        self._server.close()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await self._reset(spoilt=False)
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        for _ in range(3):  # turns of the loop, in which transports close their sockets
            await asyncio.sleep(0)

    async def _serve(self, reader: StreamReader, client: StreamWriter) -> None:
        connection = _Connection(self, client)
        self._connections.add(connection)
        try:
            async with asyncio.timeout(CONNECT_S):
                answers, server = await asyncio.open_connection("127.0.0.1", self.target)
            connection.server = server
            await asyncio.gather(connection.carry(reader, server), connection.carry(answers, client))
        except (OSError, asyncio.CancelledError):  # as like a closed port as an open one can be; or the end
            connection.close(reset=True)
        finally:
            self._connections.discard(connection)
            connection.close()
