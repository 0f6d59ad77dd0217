"""Memory that a job process shares with the engine process, for the pixels of its requests.

    | header: number of announced requests | block: state, pixels | block: state, pixels | free ...

If a network takes more than images, the values of its further inputs follow the pixels of a block.

The job process makes the memory (an anonymous file, `memfd_create`) and is the only one that reserves blocks
in it; it sends the file descriptor to the engine. So no lock is shared, and the memory is freed by the system
when both processes have closed it, however they end. If there is no room, `reserve` waits: that is the
back-pressure.
"""

import errno
import fcntl
import math
import mmap
import os
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import InternalError
from gradcam_worker.gradcam.network import InputPixels
from gradcam_worker.observability.events import NULL_OBSERVER, Observer

HEADER_BYTES = 4096
ALIGNMENT = 64  # of blocks, and size of the state before the pixels
WAITING, AT_DEVICE = 0, 1  # states of a request
MFD_NOEXEC_SEAL = 8  # no program can be in it: others are refused where `vm.memfd_noexec` is 2
WAITING_FOR_MEMORY = "waiting for shared memory"


def aligned(size: int) -> int:
    """Round a number of bytes up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class TimeLimit(Protocol):
    """How long a job may wait: see `gradcam_worker.resilience.deadline.Deadline`."""

    def left_s(self) -> float:
        """Seconds left, never below zero."""
        ...

    def check(self, doing: str) -> None:
        """Raise where the job may not continue."""
        ...


@dataclass(eq=False)
class Block:
    """A part of the pool: the pixels of one request."""

    offset: int  # of its state; the pixels follow after ALIGNMENT bytes
    size: int  # with its state
    pool: "PixelPool" = field(repr=False)

    def pixels(self, shape: tuple[int, ...], pixel_type: str) -> InputPixels:
        """Return its memory as an array of this shape and type."""
        return np.ndarray(shape, pixel_type, self.pool.memory, self.offset + ALIGNMENT)

    def values(self, pixel_bytes: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return its memory after the pixels as an array of this shape."""
        return np.ndarray(shape, np.float32, self.pool.memory, self.offset + ALIGNMENT + aligned(pixel_bytes))

    def write(self, pixels: InputPixels, values: NDArray[np.float32] | None = None) -> None:
        """Copy pixels, and the values of further inputs, of the request into its memory."""
        self.pixels(pixels.shape, pixels.dtype.name)[...] = pixels
        if values is not None:
            self.values(pixels.nbytes, values.shape)[...] = values

    def take_mark(self) -> bool:
        """Whether the engine that ended had started to compute the request. Its successor has not."""
        at_device = self.pool.memory[self.offset] == AT_DEVICE
        self.pool.memory[self.offset] = WAITING
        return at_device

    def release(self) -> None:
        """Make its memory free. The engine must not read it any more."""
        self.pool.release(self)


class PixelPool:
    """The pool of a job process."""

    def __init__(self, size: int, observer: Observer = NULL_OBSERVER) -> None:
        """Make the memory. Pages that were never used take no memory.

        Args:
            size: In bytes.
            observer: Is told how long requests waited for memory.
        """
        self.size, self._observer = size, observer
        self.fd = _make_anonymous_file()
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        # The engine would be killed by a read beyond the end of the file.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.memory = mmap.mmap(self.fd, size)
        self._announced = np.ndarray((1,), np.int64, self.memory)
        self._free = [(HEADER_BYTES, size - HEADER_BYTES)]  # (offset, size), by offset; neighbours are joined
        self._changed = threading.Condition()

    @property
    def announced(self) -> int:
        """Number of requests that were announced on this connection; the engine has received some of them."""
        return int(self._announced[0])

    @announced.setter
    def announced(self, count: int) -> None:
        self._announced[0] = count

    def announce(self, change: int) -> None:
        """Change the number of announced requests. Not thread-safe: the client has a lock."""
        self._announced[0] += change

    def reserve(self, pixel_bytes: int, limit: TimeLimit) -> Block:
        """Reserve memory for the pixels of a request; wait until there is room.

        Args:
            pixel_bytes: Number of bytes.
            limit: How long the job may wait.

        Raises:
            InternalError: The whole pool is smaller.
            GradcamError: The job may not wait any longer.
        """
        size = ALIGNMENT + aligned(pixel_bytes)
        if size > self.size - HEADER_BYTES:
            message = (
                f"A request of {pixel_bytes} bytes of pixels does not fit into the shared memory of "
                f"{self.size} bytes: set GRADCAM_ENGINE_POOL_BYTES."
            )
            raise InternalError(message)
        with self._changed:
            offset = self._take(size)
        if offset is None:
            offset = self._wait_for(size, limit)
        self.memory[offset] = WAITING
        return Block(offset, size, self)

    def _wait_for(self, size: int, limit: TimeLimit) -> int:
        """Wait until there is room, and take it; return its offset."""
        since_s = time.monotonic()
        try:
            while True:
                # Without the lock: whoever completes a request may hold another one, and wait for this.
                limit.check(WAITING_FOR_MEMORY)
                pause_s = min(limit.left_s(), 1.0)  # the job may be cancelled meanwhile
                with self._changed:
                    if (offset := self._take(size)) is None:
                        self._changed.wait(pause_s)
                        offset = self._take(size)
                if offset is not None:
                    return offset
        finally:
            self._observer.pixel_pool_waited(time.monotonic() - since_s)

    def _take(self, size: int) -> int | None:
        """Take memory from the first free part that is large enough; return its offset."""
        for index, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [(offset + size, free - size)] if free > size else []
                return offset
        return None

    def release(self, block: Block) -> None:
        """See `Block.release`."""
        with self._changed:
            merged: list[tuple[int, int]] = []
            for offset, size in sorted([*self._free, (block.offset, block.size)]):
                if merged and sum(merged[-1]) == offset:
                    merged[-1] = merged[-1][0], merged[-1][1] + size
                else:
                    merged.append((offset, size))
            self._free = merged
            self._changed.notify_all()

    @property
    def free_bytes(self) -> int:
        """Bytes that are not reserved."""
        with self._changed:
            return sum(size for _, size in self._free)


def _make_anonymous_file() -> int:
    """Make a file that no folder has; return its file descriptor."""
    name, flags = "gradcam-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)  # Linux before 6.3


class MappedPool:
    """The pool of a job process, in the engine process."""

    def __init__(self, fd: int, size: int) -> None:
        """Map the memory, and close the file descriptor.

        Raises:
            InternalError: The file has another size, or could shrink.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if os.fstat(fd).st_size != size or size < HEADER_BYTES or not seals & fcntl.F_SEAL_SHRINK:
                message = f"The file of a pool of {size} bytes has {os.fstat(fd).st_size}, or can shrink."
                raise InternalError(message)
            self.memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self.size = size
        self._announced = np.ndarray((1,), np.int64, self.memory)

    @property
    def announced(self) -> int:
        """See `PixelPool.announced`."""
        return int(self._announced[0])

    def pixels(self, offset: int, shape: tuple[int, ...], pixel_type: str) -> InputPixels:
        """Return the pixels of a block.

        Args:
            offset: Of the block.
            shape: Of the pixels.
            pixel_type: Of the pixels, see `NetworkFacts`.

        Raises:
            InternalError: They are not inside the pool.
        """
        end = offset + ALIGNMENT + math.prod(shape) * np.dtype(pixel_type).itemsize
        if not HEADER_BYTES <= offset < end <= self.size:
            message = f"Pixels {shape} at {offset} are not inside a pool of {self.size} bytes."
            raise InternalError(message)
        return np.ndarray(shape, pixel_type, self.memory, offset + ALIGNMENT)

    def values(self, offset: int, pixel_bytes: int, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Return the values of further inputs in a block.

        Args:
            offset: Of the block.
            pixel_bytes: Number of bytes of its pixels, which the values follow.
            shape: Of the values.

        Raises:
            InternalError: They are not inside the pool.
        """
        start = offset + ALIGNMENT + aligned(pixel_bytes)
        if not HEADER_BYTES <= offset < start + 4 * shape[0] * shape[1] <= self.size:
            message = f"Values {shape} at {start} are not inside a pool of {self.size} bytes."
            raise InternalError(message)
        return np.ndarray(shape, np.float32, self.memory, start)

    def mark(self, offset: int, state: int) -> None:
        """Note in the block at `offset` whether its request is at the device: it outlives the engine."""
        self.memory[offset] = state
