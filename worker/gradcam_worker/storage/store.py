"""What a storage for artifacts can do. It imports no client of S3: see `gradcam_worker.storage.stores`."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.storage.filesystem import Object

__all__ = ["Object", "Store", "Upload"]


class Upload(Protocol):
    """Objects that are written while further ones are made."""

    def add(self, item: Object) -> None:
        """Write an object: soon, or when `finish` is called. No error is raised."""
        ...

    def finish(self, last: Object | None = None) -> None:
        """Wait until all objects are written.

        Args:
            last: An object that is written when all others are.

        Raises:
            GradcamError: Whatever `Store.put_many` raises.
        """
        ...


class Store(Protocol):
    """Storage for artifacts, below one prefix.

    Failing storage is StorageUnavailable: the next attempt at the job may succeed. A location that cannot be
    written is OutputNotAllowed if the job chose it, and StorageUnavailable if the operator did, so that jobs
    wait until the operator has corrected it.
    """

    def uri(self, key: str) -> str:
        """Return the URI of an object, whether or not it exists."""
        ...

    def put(self, key: str, data: bytes, media_type: str) -> str:
        """Write an object, completely or not at all, without retries; return its URI.

        Raises StorageUnavailable, OutputNotAllowed.
        """
        ...

    def put_many(
        self, objects: Sequence[Object], deadline: Deadline, last: Object | None = None
    ) -> list[str]:
        """Write objects in any order, with retries as `gradcam_worker.resilience.retry` says.

        After a failure, or once the deadline is over or cancelled, no further write is started. The error is
        raised when the writes that were started have ended, or when the deadline is over. A write that is
        still running then may finish later, with the same bytes up to rounding (see
        `gradcam_worker.artifacts.artifacts`).

        Args:
            objects: Key, data and media type of each.
            deadline: The job's.
            last: An object that is written when all others are.

        Returns:
            Their URIs, in the order of `objects`, and that of `last`.

        Raises:
            StorageUnavailable: The storage failed.
            OutputNotAllowed: The job's location cannot be written.
            JobTimeout: The deadline is over; or the error that it was cancelled with.
        """
        ...

    def upload(self, deadline: Deadline) -> AbstractContextManager[Upload]:
        """`put_many` of objects that are not all there yet.

        The time of its tries begins with `finish`. Where the block ends before that has returned, no further
        write is started.

        Args:
            deadline: The job's.
        """
        ...

    def find(self, key: str, deadline: Deadline) -> bytes | None:
        """Read an object, with retries; None if it does not exist, or if the worker may not know.

        Raises StorageUnavailable, JobTimeout, and the error that the deadline was cancelled with.
        """
        ...

    def get(self, key: str) -> bytes:
        """Read an object, without retries. Raises StorageUnavailable."""
        ...

    def get_part(self, key: str, start: int, size: int) -> tuple[bytes, int]:
        """Read a part of an object, with retries.

        Args:
            key: The object's.
            start: The first byte; if it is negative, it counts from the end.
            size: The number of bytes; fewer are returned where the object ends before.

        Returns:
            The part, and the size of the whole object.

        Raises:
            StorageUnavailable: It cannot be read, or there is no such part.
        """
        ...

    def names(self, folder: str) -> Iterator[str]:
        """Yield the keys of all objects below a folder, in order. Raises StorageUnavailable."""
        ...

    def remove(self, key: str) -> None:
        """Delete an object if it exists. Raises StorageUnavailable."""
        ...
