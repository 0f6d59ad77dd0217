"""A folder of files that are fetched when they are needed: so many bytes of them, and no more.

Processes may share it, also on several machines. Files are named by their checksum; no other is touched.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradcam_worker.errors import WeightsUnavailable

KEPT = re.compile(r"[0-9a-f]{64}(\.[a-z0-9.]+)?")  # what a file is called by its checksum
PART = ".part"  # at the end of the name of a file that is being written
ABANDONED_AFTER_S = 60  # without a byte, if no process holds it; it is locked well before that is over


class FileCache:
    """The folder. It is made when the first file is written."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        """`max_bytes` of all files together; None: as many as there are."""
        self._folder, self._max_bytes = folder, max_bytes

    def touch(self, place: Path) -> bool:
        """Count a file as used just now; False where it has been taken away."""
        try:
            os.utime(place)
        except FileNotFoundError:
            return False
        except PermissionError:
            pass  # somebody else's folder, to be read only: nothing is taken away there either
        return True

    @contextmanager
    def new(self, name: str, source: str) -> Iterator["PartialFile"]:
        """A file to be written, which stands under its name once it is kept, whole. `source` is for messages.

        Raises OSError, WeightsUnavailable.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=PART, buffering=0, delete=False) as file:
            path = Path(file.name)
            try:
                with contextlib.suppress(
                    OSError
                ):  # some network file systems have no locks: time alone tells
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when this process ends
                yield PartialFile(self, file, path, self._folder / name, source)
            finally:
                path.unlink(missing_ok=True)

    def make_room(self, path: Path, size: int, source: str) -> int:
        """Take away what was used least recently, so that a file of `size` bytes finds its place.

        Returns how large it may become before this has to be asked again. Raises WeightsUnavailable.
        """
        if self._max_bytes is None:
            return 2**63
        limit = f"the {self._max_bytes:,} bytes that the cache {self._folder} may hold (GRADCAM_CACHE_BYTES)"
        if size > self._max_bytes:
            message = f"{source} has {size:,} bytes, above {limit}."
            raise WeightsUnavailable(message)
        kept, parts = self._contents()
        others = sum(found for part, found in parts if part != path)
        free = self._max_bytes - others - sum(found for _, found, _ in kept)
        for _, found, one in sorted(kept):
            if free >= size:
                break
            one.unlink(missing_ok=True)
            free += found
        if free < size:
            message = f"{source} finds no room yet: other files are being fetched into {limit}."
            raise WeightsUnavailable(message)
        return free

    def _contents(self) -> tuple[list[tuple[float, int, Path]], list[tuple[Path, int]]]:
        """The files that are whole (last used, bytes, path), and those that are being written."""
        kept, parts = [], []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                facts = path.stat()
                if KEPT.fullmatch(path.name):
                    kept.append((facts.st_mtime, facts.st_size, path))
                elif path.suffix == PART:
                    parts.append((path, facts.st_size))
        return kept, parts

    def _sweep(self) -> None:
        """Take away what processes have left that were killed while they wrote."""
        for path, _ in self._contents()[1]:
            with contextlib.suppress(OSError):  # gone already, or locked: somebody writes it
                if time.time() - path.stat().st_mtime < ABANDONED_AFTER_S:
                    continue
                with path.open("rb+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


class PartialFile:
    """A file that is being written. A sink, see `gradcam_worker.gradcam.models.weights.Sink`."""

    def __init__(self, cache: FileCache, file: Any, path: Path, place: Path, source: str) -> None:
        self._shelf, self._file, self._path, self._place, self._source = cache, file, path, place, source
        self._hash = hashlib.sha256()
        self._size = self._free = 0

    @property
    def sha256(self) -> str:
        """Of all that has been written."""
        return self._hash.hexdigest()

    def expect(self, size: int) -> None:
        """It will have so many bytes: make room now, or say that there is none. Raises WeightsUnavailable."""
        self._free = self._shelf.make_room(self._path, size, self._source)

    def write(self, data: bytes, /) -> int:
        """Take the next bytes. Raises WeightsUnavailable where there is no room, here or on the disk."""
        size = self._size + len(data)
        if size > self._free:
            self.expect(size)
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            message = (
                f"{self._source} could not be written to {self._place.parent} ({error.strerror}, after "
                f"{self._size:,} bytes): make room on that disk, or lower GRADCAM_CACHE_BYTES."
            )
            raise WeightsUnavailable(message) from error
        self._hash.update(data)
        self._size = size
        return len(data)

    def keep(self) -> None:
        """It is whole: let it stand in its place. Raises OSError."""
        self._path.replace(self._place)
