"""Objects as files below a folder of this machine: whole or not there, also after a power cut.

Nothing leads out of the folder: not a key's steps, and no symbolic link that somebody has put below it, for
the way down is walked folder by folder and follows none.
"""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gradcam_worker.errors import OutputNotAllowed, StorageUnavailable
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline

Object = tuple[str, bytes, str]  # key, data, media type

MISSING = {errno.ENOENT, errno.ENOTDIR}
# What is wrong with the place, not with the disk: it will be the same next time.
REFUSED = {
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EROFS,
    errno.EISDIR,
}
NAMELESS = getattr(os, "O_TMPFILE", os.O_DIRECTORY)  # which cannot be written, so where there is no such file
NOT_NAMELESS = {errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE_MODE = 0o644  # whoever may enter the folder may read


class FolderStore:
    """A folder on this machine: see `gradcam_worker.storage.stores.Store`."""

    def __init__(
        self, root: Path, below: str = "", *, own: bool = True, observer: Observer = NULL_OBSERVER
    ) -> None:
        """`below` the root, which alone may be a link, folders are made as they are needed.

        `own`: the operator has chosen this place, not a job.
        """
        self._root, self._below, self._own = root.absolute(), tuple(filter(None, below.split("/"))), own
        self._observer = observer

    def uri(self, key: str) -> str:
        """See `Store.uri`."""
        return self._path(key).as_uri()

    def put(self, key: str, data: bytes, media_type: str) -> str:  # noqa: ARG002  # files have no type
        """See `Store.put`: there in one step, and for good."""
        *folders, name = self._steps(key)
        try:
            with _entered(self._root, folders, make=True) as folder:
                _write(folder, name, data)
                os.fsync(folder)  # the name, as well as the file
        except OSError as error:
            message = f"{self._path(key)} could not be written: {error}"
            refused = error.errno in REFUSED and not self._own
            raise (OutputNotAllowed if refused else StorageUnavailable)(message) from error
        self._observer.artifact_written(len(data))
        return self.uri(key)

    def put_many(self, objects: Sequence[Object], deadline: Deadline) -> list[str]:
        """See `Store.put_many`: one after the other, for a disk is waited for but little."""
        return put_each(self.put, objects, deadline)

    def find(self, key: str, deadline: Deadline) -> bytes | None:
        """See `Store.find`."""
        deadline.check("looking for what is stored")
        try:
            return self._read(key)
        except OSError as error:
            if error.errno in MISSING:
                return None
            raise self._unreadable(key, error) from error

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        try:
            return self._read(key)
        except OSError as error:
            raise self._unreadable(key, error) from error

    def names(self, folder: str) -> Iterator[str]:
        """See `Store.names`: those that are whole."""
        try:
            with _entered(self._root, self._steps(folder)) as place:
                walked = [(where, files) for where, _, files, _ in os.fwalk(".", dir_fd=place)]
        except OSError as error:
            if error.errno in MISSING:
                return
            raise self._unreadable(folder, error) from error
        found = [f"{where}/{name}" for where, files in walked for name in files if not name.endswith(".part")]
        yield from sorted(folder + one.removeprefix(".") for one in found)

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        *folders, name = self._steps(key)
        try:
            with _entered(self._root, folders) as folder:
                os.unlink(name, dir_fd=folder)
                os.fsync(folder)
        except OSError as error:
            if error.errno not in MISSING:
                message = f"{self._path(key)} could not be removed: {error}"
                raise StorageUnavailable(message) from error

    def _read(self, key: str) -> bytes:
        *folders, name = self._steps(key)
        with _entered(self._root, folders) as folder:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        with os.fdopen(file, "rb") as opened:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise FileNotFoundError(errno.ENOENT, "Not a file")
            return opened.read()

    def _unreadable(self, key: str, error: OSError) -> StorageUnavailable:
        return StorageUnavailable(f"{self._path(key)} could not be read: {error}")

    def _path(self, key: str) -> Path:
        return self._root.joinpath(*self._steps(key))

    def _steps(self, key: str) -> tuple[str, ...]:
        """Folders and a name. Raises OutputNotAllowed for what would lead elsewhere."""
        steps = (*self._below, *key.split("/"))
        sound = key.encode(errors="ignore").decode().replace("\0", "") == key  # half a character has no bytes
        if {"", ".", ".."} & set(steps) or not sound:
            message = f"{key[:200]!r} is no key: it must be names with a slash between two of them."
            raise OutputNotAllowed(message)
        return steps


@contextmanager
def _entered(root: Path, folders: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """The last of the folders, each inside the one before, opened. Raises OSError."""
    if make:
        root.mkdir(parents=True, exist_ok=True)
    place = os.open(root, FOLDER & ~os.O_NOFOLLOW)
    try:
        for name in folders:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=place)
                    os.fsync(place)
            inner = os.open(name, FOLDER, dir_fd=place)
            os.close(place)
            place = inner
        yield place
    finally:
        os.close(place)


def _write(folder: int, name: str, data: bytes) -> None:
    """Write a file that has its name only when it is whole and on the disk. Raises OSError."""
    part = f".{uuid.uuid4().hex}.part"
    try:
        if not _nameless(folder, part, data):
            new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(part, new, FILE_MODE, dir_fd=folder), "wb") as file:
                _fill(file, data)
        os.replace(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part, dir_fd=folder)
        raise


def _nameless(folder: int, part: str, data: bytes) -> bool:
    """Write a file that gets a name only when it is whole: a process that is killed before leaves nothing.

    False where the file system knows no such files, or cannot name them. Raises OSError.
    """
    try:
        number = os.open(".", NAMELESS | os.O_WRONLY | os.O_CLOEXEC, FILE_MODE, dir_fd=folder)
        with os.fdopen(number, "wb") as file:
            _fill(file, data)
            # Seen as a link, to be followed: there is no other way to name it without privileges.
            os.link(f"/proc/self/fd/{number}", part, dst_dir_fd=folder, follow_symlinks=True)
    except OSError as error:
        if error.errno in NOT_NAMELESS:
            return False
        raise
    return True


def _fill(file: BinaryIO, data: bytes) -> None:
    """All of it, on the disk itself: a manifest must not outlast, in a power cut, what it names."""
    file.write(data)
    file.flush()
    os.fchmod(file.fileno(), FILE_MODE)  # whatever the umask says
    os.fsync(file.fileno())


def put_each(
    put: Callable[[str, bytes, str], str], objects: Sequence[Object], deadline: Deadline
) -> list[str]:
    """Put one object after the other; return their URIs. Raises as `put` does, and what ended the job."""
    uris = []
    for one in objects:
        deadline.check("upload")
        uris.append(put(*one))
    return uris
