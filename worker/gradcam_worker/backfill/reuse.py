"""Which files of a dataset hold the results of rows: of an earlier run, or of an earlier shard of this one.

A row's result is found by its digest (see `Shard.row_digests`), not by its position. So a new key in front of
a prefix moves all rows, and one image is computed. A place is what a shard names in `reuse`: a file, or a row
group of a merged one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.backfill.inputs.rows import Ids
from gradcam_worker.backfill.output import REQUESTS_AT_ONCE, STORE_TIMEOUT_S, DatasetDir
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.status import NetworkRef

FILES_AT_ONCE = 64

Digests = NDArray[np.uint64]


class DoneRows:
    """The places of the explained rows of a dataset, by digest: 12 bytes a row, 36 while it is made."""

    def __init__(self, places: Iterable[tuple[str, Digests]]) -> None:
        """Collect the rows.

        Args:
            places: Each place, with the digests of its explained rows.
        """
        self._names: list[str] = []
        parts: list[Digests] = []
        for name, digests in places:
            self._names.append(name)
            parts.append(digests)
        numbers = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(part) for part in parts])
        digests = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
        order = np.argsort(digests, kind="stable")
        self._digests, self._numbers = digests[order], numbers[order]

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, digests: Sequence[str | None]) -> list[str | None]:
        """Return the place of each row; None: it is not there, or the row has no digest."""
        if not len(self):
            return [None] * len(digests)
        wanted = np.array([int(digest or "0", 16) for digest in digests], np.uint64)
        positions = np.minimum(np.searchsorted(self._digests, wanted), len(self) - 1)
        found = self._digests[positions] == wanted
        return [
            self._names[self._numbers[position]] if there and digest else None
            for digest, there, position in zip(digests, found.tolist(), positions.tolist(), strict=True)
        ]


def read_done_rows(
    output: DatasetDir, accepts: Callable[[NetworkRef], bool], check: Callable[[], object]
) -> DoneRows:
    """Read which rows a dataset holds, from all of its files; those of earlier versions do not tell.

    Args:
        output: The dataset, complete or not.
        accepts: Whether rows that a network has explained may be taken over.
        check: Called between files. What it raises ends the reading.

    Returns:
        The rows.

    Raises:
        StorageUnavailable: A file cannot be read, or is damaged.
    """
    files = output.files()
    names = sorted({*files.keys, *files.merged})

    def read(name: str) -> list[tuple[str, Digests]]:
        from gradcam_worker.artifacts.earlier_rows import read_digests

        return read_digests(output.store, name, Deadline(STORE_TIMEOUT_S), accepts)

    def places() -> Iterator[tuple[str, Digests]]:
        for start in range(0, len(names), FILES_AT_ONCE):
            check()
            for part in pool.map(read, names[start : start + FILES_AT_ONCE]):
                yield from part

    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="done-rows") as pool:
        return DoneRows(places())


class FirstShards:
    """The shard of the input in which each row was seen first, by digest: 13 bytes a row."""

    def __init__(self) -> None:
        """Start without rows."""
        self._rows = Ids()

    def add(self, shard: int, digests: Sequence[str | None]) -> list[int | None]:
        """Add the rows of a shard.

        Args:
            shard: The position of the shard among all.
            digests: Of its rows; None for rows that have no result.

        Returns:
            For each row the position of an earlier shard with the same row; None: there is none.
        """
        earlier = (None if digest is None else self._rows.add(digest, shard) for digest in digests)
        return [None if place == shard else place for place in earlier]
