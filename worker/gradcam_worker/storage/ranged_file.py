"""An object that is read in parts, as a file: for formats with an index at their end, such as Parquet."""

import io

from gradcam_worker.storage.store import Store

TAIL_BYTES = 256 * 1024  # read at once: the index of a merged file fits into it


class RangedFile(io.RawIOBase):
    """A file over an object of a store, which is read as far as it is asked for."""

    def __init__(self, store: Store, key: str) -> None:
        """Read the end of the object.

        Args:
            store: Where it is.
            key: The object's.

        Raises:
            StorageUnavailable: It cannot be read.
        """
        self._store, self._key, self._position = store, key, 0
        self._tail, self.size = store.get_part(key, -TAIL_BYTES, TAIL_BYTES)

    def readable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def tell(self) -> int:
        """See `io.IOBase`."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.IOBase`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """See `io.RawIOBase`. Raises StorageUnavailable."""
        left = max(self.size - self._position, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        in_tail = self._position - (self.size - len(self._tail))
        if in_tail >= 0:
            data = self._tail[in_tail : in_tail + wanted]
        else:
            data = self._store.get_part(self._key, self._position, wanted)[0] if wanted else b""
        self._position += len(data)
        return data
