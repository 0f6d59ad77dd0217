"""Objects as files below a folder of this machine: complete or absent, even after a power cut.

Neither a key nor a symbolic link below the folder can lead out of it: each folder on the path is opened
relative to its parent, and links are not followed.
"""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from gradcam_worker.errors import OutputNotAllowed, StorageUnavailable
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline

Object = tuple[str, bytes, str]  # key, data, media type

MISSING_ERRORS = {errno.ENOENT, errno.ENOTDIR}
# The fault is the location's, not the disk's: a retry will fail in the same way.
LOCATION_ERRORS = {
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EROFS,
    errno.EISDIR,
}
# Opens a file without a name. Without O_TMPFILE (not Linux), opening fails, as a folder cannot be written.
UNNAMED_FILE = getattr(os, "O_TMPFILE", os.O_DIRECTORY)
NO_UNNAMED_FILES_ERRORS = {
    errno.EISDIR,
    errno.EINVAL,
    errno.ENOENT,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EXDEV,
}
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_MODE = 0o644  # the folder's permissions decide who can read


class FolderStore:
    """A folder on this machine: see `gradcam_worker.storage.stores.Store`."""

    def __init__(
        self, root: Path, below: str = "", *, by_operator: bool = True, observer: Observer = NULL_OBSERVER
    ) -> None:
        """Folders are created as they are needed.

        Args:
            root: May be a symbolic link, unlike everything below it.
            below: The path below the root, with slashes.
            by_operator: Whether the operator chose the location, not a job.
            observer: Is told of each object that is written.
        """
        self._root, self._below = root.absolute(), tuple(filter(None, below.split("/")))
        self._by_operator = by_operator
        self._observer = observer

    def uri(self, key: str) -> str:
        """See `Store.uri`."""
        return self._path(key).as_uri()

    def put(self, key: str, data: bytes, media_type: str) -> str:  # noqa: ARG002  # files have no type
        """See `Store.put`; the file appears atomically and is on the disk when this returns."""
        *folders, name = self._path_parts(key)
        try:
            with _open_folder(self._root, folders, create=True) as folder:
                _write(folder, name, data)
                os.fsync(folder)  # the name, besides the contents
        except OSError as error:
            message = f"{self._path(key)} could not be written: {error}"
            jobs_fault = error.errno in LOCATION_ERRORS and not self._by_operator
            raise (OutputNotAllowed if jobs_fault else StorageUnavailable)(message) from error
        self._observer.artifact_written(len(data))
        return self.uri(key)

    def put_many(
        self, objects: Sequence[Object], deadline: Deadline, last: Object | None = None
    ) -> list[str]:
        """See `Store.put_many`: one after the other, which is fast enough for a disk."""
        return put_each(self.put, objects, deadline, last)

    def upload(self, deadline: Deadline) -> AbstractContextManager["CollectedUpload"]:
        """See `Store.upload`: everything is written in the end."""
        return nullcontext(CollectedUpload(self.put_many, deadline))

    def find(self, key: str, deadline: Deadline) -> bytes | None:
        """See `Store.find`."""
        deadline.check("looking for what is stored")
        try:
            return self._read(key)
        except OSError as error:
            if error.errno in MISSING_ERRORS:
                return None
            raise self._unreadable(key, error) from error

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        try:
            return self._read(key)
        except OSError as error:
            raise self._unreadable(key, error) from error

    def get_part(self, key: str, start: int, size: int) -> tuple[bytes, int]:
        """See `Store.get_part`."""
        try:
            with self._open(key) as file:
                whole = os.fstat(file.fileno()).st_size
                file.seek(max(whole + start, 0) if start < 0 else start)
                return file.read(size), whole
        except OSError as error:
            raise self._unreadable(key, error) from error

    def names(self, folder: str) -> Iterator[str]:
        """See `Store.names`; files that are being written are left out."""
        try:
            with _open_folder(self._root, self._path_parts(folder)) as descriptor:
                walked = [(path, files) for path, _, files, _ in os.fwalk(".", dir_fd=descriptor)]
        except OSError as error:
            if error.errno in MISSING_ERRORS:
                return
            raise self._unreadable(folder, error) from error
        paths = [f"{path}/{name}" for path, files in walked for name in files if not name.endswith(".part")]
        yield from sorted(folder + path.removeprefix(".") for path in paths)

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        *folders, name = self._path_parts(key)
        try:
            with _open_folder(self._root, folders) as folder:
                os.unlink(name, dir_fd=folder)
                os.fsync(folder)
        except OSError as error:
            if error.errno not in MISSING_ERRORS:
                message = f"{self._path(key)} could not be removed: {error}"
                raise StorageUnavailable(message) from error

    def _read(self, key: str) -> bytes:
        with self._open(key) as file:
            return file.read()

    @contextmanager
    def _open(self, key: str) -> Iterator[BinaryIO]:
        *folders, name = self._path_parts(key)
        with _open_folder(self._root, folders) as folder:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(file, "rb") as opened:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise FileNotFoundError(errno.ENOENT, "Not a file")
            yield opened

    def _unreadable(self, key: str, error: OSError) -> StorageUnavailable:
        return StorageUnavailable(f"{self._path(key)} could not be read: {error}")

    def _path(self, key: str) -> Path:
        return self._root.joinpath(*self._path_parts(key))

    def _path_parts(self, key: str) -> tuple[str, ...]:
        """The folders and the name of a key. Raises OutputNotAllowed if they would lead out of the root."""
        parts = (*self._below, *key.split("/"))
        encodable = key.encode(errors="ignore").decode().replace("\0", "") == key  # no lone surrogate, no NUL
        if {"", ".", ".."} & set(parts) or not encodable:
            message = f"{key[:200]!r} is no key: it must be names with a slash between two of them."
            raise OutputNotAllowed(message)
        return parts


@contextmanager
def _open_folder(root: Path, folders: Sequence[str], *, create: bool = False) -> Iterator[int]:
    """Open the last of the folders, each inside the one before; yield its descriptor. Raises OSError."""
    if create:
        root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, FOLDER_FLAGS & ~os.O_NOFOLLOW)
    try:
        for name in folders:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=descriptor)
                    os.fsync(descriptor)
            inner = os.open(name, FOLDER_FLAGS, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _write(folder: int, name: str, data: bytes) -> None:
    """Write a file that gets its name when it is complete and on the disk. Raises OSError."""
    part = f".{uuid.uuid4().hex}.part"
    try:
        if not _write_unnamed(folder, part, data):
            new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(part, new, FILE_MODE, dir_fd=folder), "wb") as file:
                _write_to_disk(file, data)
        os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part, dir_fd=folder)
        raise


def _write_unnamed(folder: int, part: str, data: bytes) -> bool:
    """Write a file without a name, then name it `part`: a process that is killed before leaves no file.

    Returns False if the file system does not support this. Raises OSError.
    """
    try:
        number = os.open(".", UNNAMED_FILE | os.O_WRONLY | os.O_CLOEXEC, FILE_MODE, dir_fd=folder)
        with os.fdopen(number, "wb") as file:
            _write_to_disk(file, data)
            # The only way to name the file without privileges: follow the link in /proc.
            os.link(f"/proc/self/fd/{number}", part, dst_dir_fd=folder, follow_symlinks=True)
    except OSError as error:
        if error.errno in NO_UNNAMED_FILES_ERRORS:
            return False
        raise
    return True


def _write_to_disk(file: BinaryIO, data: bytes) -> None:
    """Write and sync to the disk: after a power cut, no manifest may exist without the objects it names."""
    file.write(data)
    file.flush()
    os.fchmod(file.fileno(), FILE_MODE)  # regardless of the umask
    os.fsync(file.fileno())


class CollectedUpload:
    """See `gradcam_worker.storage.store.Upload`."""

    def __init__(
        self, put_many: Callable[[Sequence[Object], Deadline, Object | None], object], deadline: Deadline
    ) -> None:
        """`put_many` is a store's method."""
        self._put_many, self._deadline, self._items = put_many, deadline, list[Object]()

    def add(self, item: Object) -> None:
        """See `Upload.add`."""
        self._items.append(item)

    def finish(self, last: Object | None = None) -> None:
        """See `Upload.finish`."""
        self._put_many(self._items, self._deadline, last)


def put_each(
    put: Callable[[str, bytes, str], str],
    objects: Sequence[Object],
    deadline: Deadline,
    last: Object | None = None,
) -> list[str]:
    """Put one object after the other.

    Args:
        put: A store's method.
        objects: Key, data and media type of each.
        deadline: Checked before each.
        last: One more object.

    Returns:
        Their URIs.

    Raises:
        JobTimeout: The deadline is over; or the error that it was cancelled with, or one of `put`.
    """
    uris = []
    for key, data, media_type in (*objects, *([last] if last else [])):
        deadline.check("upload")
        uris.append(put(key, data, media_type))
    return uris
