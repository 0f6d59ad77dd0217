"""A cache of fetched files in a folder, of limited size.

Processes may share it, also from several machines. Files are named by their checksum; other files in the
folder are ignored.
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

CACHED_NAME = re.compile(r"[0-9a-f]{64}(\.[a-z0-9.]+)?")  # a checksum and a suffix
PARTIAL_SUFFIX = ".part"  # of a file that is being written
ABANDONED_AFTER_S = 60  # since the last write, if no process has locked it


class FileCache:
    """A cache folder. It is created when the first file is written."""

    def __init__(self, folder: Path, max_bytes: int | None) -> None:
        """Use a folder.

        Args:
            folder: The folder.
            max_bytes: Of all files together; None: unlimited.
        """
        self._folder, self._max_bytes = folder, max_bytes

    def path(self, name: str) -> Path:
        """The path of the file with this name, whether it exists or not."""
        return self._folder / name

    def touch(self, path: Path) -> bool:
        """Mark a file as just used. Returns False if it no longer exists."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        except PermissionError:
            pass  # a read-only cache: no file is removed there, either
        return True

    @contextmanager
    def create(self, name: str, source: str) -> Iterator["PartialFile"]:
        """Create a file, which appears under its name when it is committed.

        Args:
            name: Its checksum, with a suffix.
            source: Where its bytes come from, for messages.

        Yields:
            The file to write.

        Raises:
            OSError: The folder cannot be written to.
            WeightsUnavailable: There is no room, in the cache or on the disk.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_abandoned()
        with tempfile.NamedTemporaryFile(
            dir=self._folder, suffix=PARTIAL_SUFFIX, buffering=0, delete=False
        ) as file:
            path = Path(file.name)
            try:
                with contextlib.suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when this process ends
                yield PartialFile(self, file, path, self._folder / name, source)
            finally:
                path.unlink(missing_ok=True)

    def make_room(self, path: Path, size: int, source: str) -> int:
        """Remove the least recently used files, so that a file fits.

        Args:
            path: The partial file.
            size: Its size in bytes.
            source: Where its bytes come from, for messages.

        Returns:
            The size that it may reach before this must be called again.

        Raises:
            WeightsUnavailable: It is larger than the cache, or other files are being fetched.
        """
        if self._max_bytes is None:
            return 2**63
        limit = f"the {self._max_bytes:,} bytes that the cache {self._folder} may hold (GRADCAM_CACHE_BYTES)"
        if size > self._max_bytes:
            message = f"{source} has {size:,} bytes, above {limit}."
            raise WeightsUnavailable(message)
        files, partials = self._contents()
        partial_bytes = sum(file_bytes for partial, file_bytes in partials if partial != path)
        free = self._max_bytes - partial_bytes - sum(file_bytes for _, file_bytes, _ in files)
        for _, file_bytes, file_path in sorted(files):
            if free >= size:
                break
            file_path.unlink(missing_ok=True)
            free += file_bytes
        if free < size:
            message = f"{source} finds no room yet: other files are being fetched into {limit}."
            raise WeightsUnavailable(message)
        return free

    def _contents(self) -> tuple[list[tuple[float, int, Path]], list[tuple[Path, int]]]:
        """The complete files (last use, bytes, path) and the partial ones (path, bytes)."""
        files, partials = [], []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                status = path.stat()
                if CACHED_NAME.fullmatch(path.name):
                    files.append((status.st_mtime, status.st_size, path))
                elif path.suffix == PARTIAL_SUFFIX:
                    partials.append((path, status.st_size))
        return files, partials

    def _remove_abandoned(self) -> None:
        """Remove the partial files of processes that were killed."""
        for path, _ in self._contents()[1]:
            with contextlib.suppress(OSError):  # already removed, or locked by the process that writes it
                if time.time() - path.stat().st_mtime < ABANDONED_AFTER_S:
                    continue
                with path.open("rb+") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


class PartialFile:
    """A file that is being written. A sink, see `gradcam_worker.gradcam.files.weights.Sink`."""

    def __init__(self, cache: FileCache, file: Any, path: Path, target: Path, source: str) -> None:
        self._cache, self._file, self._path, self._target, self._source = cache, file, path, target, source
        self._hash = hashlib.sha256()
        self._size = self._free = 0

    @property
    def sha256(self) -> str:
        """The checksum of what has been written, in hexadecimal."""
        return self._hash.hexdigest()

    def expect(self, size: int) -> None:
        """Make room for the whole file, of `size` bytes. Raises WeightsUnavailable."""
        self._free = self._cache.make_room(self._path, size, self._source)

    def write(self, data: bytes, /) -> int:
        """Append bytes. Raises WeightsUnavailable if there is no room, in the cache or on the disk."""
        size = self._size + len(data)
        if size > self._free:
            self.expect(size)
        remaining = memoryview(data)
        try:
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            message = (
                f"{self._source} could not be written to {self._target.parent} ({error.strerror}, after "
                f"{self._size:,} bytes): make room on that disk, or lower GRADCAM_CACHE_BYTES."
            )
            raise WeightsUnavailable(message) from error
        self._hash.update(data)
        self._size = size
        return len(data)

    def commit(self) -> None:
        """Move the complete file to its name. Raises OSError."""
        self._path.replace(self._target)
