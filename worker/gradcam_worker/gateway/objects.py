"""Objects of S3 and of folders, for the event loop: every call runs in one of a few threads."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from gradcam_worker.client.results import Objects

THREADS = 8  # calls at a time
R = TypeVar("R")


class UploadObjects(Objects, Protocol):
    """Objects that a browser can write, too. Methods raise StorageUnavailable."""

    def upload_url(self, uri: str, media_type: str, size: int, expires_s: int) -> str:
        """A URL to which one object of this type and size can be put."""
        ...


class GatewayObjects:
    """Reads, writes and presigns objects without blocking the event loop."""

    def __init__(self, objects: UploadObjects) -> None:
        """No thread is started yet."""
        self._objects = objects
        self._threads = ThreadPoolExecutor(THREADS, "gradcam-objects")
        # Held while the image of a form is in memory; until then it waits on disk.
        self.images = asyncio.Semaphore(THREADS)

    async def read(self, uri: str) -> bytes:
        """Read an object. Raises StorageUnavailable."""
        return await self.call(lambda: self._objects.read(uri))

    async def put(self, uri: str, data: bytes, media_type: str) -> None:
        """Write an object. Raises StorageUnavailable."""
        await self.call(lambda: self._objects.put(uri, data, media_type))

    async def url(self, uri: str, expires_s: int) -> str:
        """A URL from which a browser can read an object. Raises StorageUnavailable."""
        return await self.call(lambda: self._objects.url(uri, expires_s))

    async def upload_url(self, uri: str, media_type: str, size: int, expires_s: int) -> str:
        """A URL to which a browser can put one object of this type and size. Raises StorageUnavailable."""
        return await self.call(lambda: self._objects.upload_url(uri, media_type, size, expires_s))

    def close(self) -> None:
        """End the threads after the calls that run."""
        self._threads.shutdown(wait=False)

    async def call(self, method: Callable[[], R]) -> R:
        """Make a call in one of the threads: also one that only computes, for longer than others may wait."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, method)
