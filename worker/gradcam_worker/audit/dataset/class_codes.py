"""Small consecutive numbers for the classes of a dataset, so that their statistics are rows of arrays."""

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.errors import InvalidInput

MAX_CLASS_ID = 2**24  # greater than of any network; a damaged dataset must not take the memory


class ClassCodes:
    """Gives each class id a code: 0, 1, ... in the order of their appearance."""

    def __init__(self) -> None:
        """There are no classes yet."""
        self._codes = np.full(0, -1, np.int32)  # by id
        self.ids: list[int] = []  # by code

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.ids)

    def encode(self, ids: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return the code of each id; -1 stays -1.

        Raises:
            InvalidInput: An id is no class of any network.
        """
        if not len(ids):
            return np.zeros(0, np.int32)
        greatest, least = int(ids.max()), int(ids.min())
        if greatest > MAX_CLASS_ID or least < -1:
            wrong = greatest if greatest > MAX_CLASS_ID else least
            message = f"class_id is {wrong}: expected 0 to {MAX_CLASS_ID}."
            raise InvalidInput(message)
        if greatest >= len(self._codes):
            more = np.full(max(greatest + 1, 2 * len(self._codes)) - len(self._codes), -1, np.int32)
            self._codes = np.concatenate([self._codes, more])
        codes = np.where(ids >= 0, self._codes[np.maximum(ids, 0)], 0)
        if (codes < 0).any():
            for new in np.unique(ids[codes < 0]).tolist():
                self._codes[new] = len(self.ids)
                self.ids.append(new)
        encoded: NDArray[np.int32] = np.where(ids >= 0, self._codes[np.maximum(ids, 0)], -1)
        return encoded


class ClassSums:
    """Sums of numbers, or of maps of one size, for each class."""

    def __init__(self) -> None:
        """All sums are 0."""
        self._sums = np.zeros(0)

    def add(self, codes: NDArray[np.int32], values: NDArray[np.generic] | None = None) -> None:
        """Add to each class what belongs to its code.

        Args:
            codes: (n,) of the classes; -1: none.
            values: (n,) or (n, rows, columns); None: ones.
        """
        known = codes >= 0
        codes, values = codes[known], None if values is None else values[known]
        if not len(codes):
            return
        if values is not None and values.ndim > self._sums.ndim:
            self._sums = np.zeros((0, *values.shape[1:]))
        self._sums = _grown(self._sums, int(codes.max()) + 1)
        if values is None or values.ndim == 1:
            self._sums += np.bincount(codes, values, minlength=len(self._sums))
            return
        order = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
        self._sums[codes[order[starts]]] += np.add.reduceat(values[order].astype(np.float64), starts, axis=0)

    def of(self, classes: int) -> NDArray[np.float64]:
        """The sums of the first so many classes."""
        self._sums = _grown(self._sums, classes)
        return self._sums[:classes]


def _grown(array: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """The array with at least this length; zeros at its end."""
    if len(array) >= length:
        return array
    more = np.zeros((max(length, 2 * len(array)) - len(array), *array.shape[1:]), array.dtype)
    return np.concatenate([array, more])
