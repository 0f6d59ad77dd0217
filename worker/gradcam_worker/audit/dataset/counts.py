"""Counts and best rows by key, of more rows than fit into memory: arrays only, no loop over rows."""

import numpy as np
from numpy.typing import NDArray

PENDING = 2**20  # keys that are kept before equal ones are joined

Integers = NDArray[np.int64]


class KeyCounts:
    """How often each key came."""

    def __init__(self) -> None:
        """Nothing came yet."""
        self._keys: list[Integers] = []
        self._counts: list[Integers] = []
        self._pending = 0

    def add(self, keys: Integers) -> None:
        """Count keys."""
        distinct, counts = np.unique(keys, return_counts=True)
        self._keys.append(distinct)
        self._counts.append(counts.astype(np.int64))
        self._pending += len(distinct)
        if self._pending > max(PENDING, len(self._keys[0])):
            self.totals()

    def totals(self) -> tuple[Integers, Integers]:
        """All keys in order, and how often each came."""
        if not self._keys:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        keys, places = np.unique(np.concatenate(self._keys), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, places, np.concatenate(self._counts))
        self._keys, self._counts, self._pending = [keys], [counts], 0
        return keys, counts


class BestRows:
    """The rows with the highest values of each key; of equal ones those that come first in the dataset."""

    def __init__(self, per_key: int) -> None:
        """`per_key`: how many are kept of each key."""
        self._per_key = per_key
        self._keys, self._rows = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._indices, self._values = np.zeros(0, np.int32), np.zeros(0, np.float32)

    def add(
        self, keys: Integers, rows: Integers, indices: NDArray[np.int32], values: NDArray[np.float32]
    ) -> None:
        """Add rows."""
        keys = np.concatenate([self._keys, keys])
        rows, indices = np.concatenate([self._rows, rows]), np.concatenate([self._indices, indices])
        values = np.concatenate([self._values, np.nan_to_num(values)])
        order = np.lexsort((indices, rows, -values, keys))
        sorted_keys = keys[order]
        starts = np.flatnonzero(np.diff(sorted_keys, prepend=sorted_keys[:1] - 1))
        position = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        kept = order[position < self._per_key]
        self._keys, self._rows = keys[kept], rows[kept]
        self._indices, self._values = indices[kept], values[kept]

    def of(self, key: int) -> tuple[tuple[int, int], ...]:
        """The rows of a key, as (row, index), those with the highest values first."""
        first, last = np.searchsorted(self._keys, [key, key + 1])
        rows, indices = self._rows[first:last].tolist(), self._indices[first:last].tolist()
        return tuple(zip(rows, indices, strict=True))
