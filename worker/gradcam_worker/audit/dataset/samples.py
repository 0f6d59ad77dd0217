"""A bounded sample of the images of each class, with heat and features, for what looks at single images.

Of each class those rows are taken whose numbers have the least hash: the same rows however the dataset is
split into files, and in whichever order they are read. How many of each class depends on how much memory all
samples take.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.audit.dataset.heat_table import mixed

MAX_ROWS = 512  # of a class
MIN_ROWS = 32  # of a class, however many classes there are
MAX_BYTES = 2**28  # of heat and features of all samples
ALL = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class ClassSample:
    """k images that are predicted as one class, in the dataset's order.

    Attributes:
        class_id: The class.
        name: Its name; "" where it has none.
        predicted: The number of all images that are predicted as the class.
        records: (k,) numbers among all records of the dataset.
        rows: (k,) the column `row`.
        indices: (k,) the column `index`.
        heat: (k, rows, columns) on the image's grid, float32; each map sums to 1, or is 0.
        features: (k, channels) float16, nan where they are not known; None: the dataset has none.
        correct: (k,) 1, 0, or -1 without a label.
        truths: (k,) the id of the true class, -1 without a label.
        probabilities: (k,) of the class.
        heat_inside: (k,) share of the heat within boxes or mask; nan: not known.
        inside_area: (k,) their share of the image.
        at_border: (k,) share of the heat in the outer band of the image.
        uris: Of the images.
        hashes: sha256 of the images.
        boxes: Of each image (b, 4) float32: left, top, right, bottom as shares of its width and height;
            None: none are known.
    """

    class_id: int
    name: str
    predicted: int
    records: NDArray[np.int64]
    rows: NDArray[np.int64]
    indices: NDArray[np.int32]
    heat: NDArray[np.float32]
    features: NDArray[np.float16] | None
    correct: NDArray[np.int8]
    truths: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    heat_inside: NDArray[np.float32]
    inside_area: NDArray[np.float32]
    at_border: NDArray[np.float32]
    uris: Sequence[str]
    hashes: Sequence[str]
    boxes: Sequence[NDArray[np.float32] | None]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.rows)


class Samples:
    """The samples of all classes. Columns are arrays of one length, by their names."""

    def __init__(self, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> None:
        """`max_rows` of each class; `max_bytes` of all together, but for `MIN_ROWS` of each class."""
        self.max_rows, self._max_bytes = max_rows, max_bytes
        self.class_ids: Sequence[int] = ()  # by code
        self.names: Mapping[int, str] = {}  # by code
        self._parts: list[dict[str, NDArray[Any]]] = []
        self._thresholds = np.zeros(0, np.uint64)  # by class: a greater hash is not among the least ones
        self._counts = np.zeros(0, np.int64)  # of all images, by class
        self._rows, self._joined_rows = 0, 0

    def wanted(self, codes: NDArray[np.int32], rows: NDArray[np.int64]) -> NDArray[np.intp]:
        """Count images, and tell which of them belong to the samples so far.

        Args:
            codes: (n,) of the classes, not negative.
            rows: (n,) the column `row`.

        Returns:
            Their places, to be handed to `add`.
        """
        size = int(codes.max(initial=-1)) + 1
        if size > len(self._thresholds):
            missing = size - len(self._thresholds)
            self._thresholds = np.concatenate([self._thresholds, np.full(missing, ALL)])
            self._counts = np.concatenate([self._counts, np.zeros(missing, np.int64)])
        self._counts += np.bincount(codes, minlength=len(self._counts))
        return np.flatnonzero(_hash(rows) <= self._thresholds[codes])

    def add(self, columns: dict[str, NDArray[Any]]) -> None:
        """Add images that are `wanted`; among the columns are `code` and `row`."""
        self._parts.append(columns)
        self._rows += len(columns["row"])
        if self._rows > 2 * max(self._joined_rows, self.max_rows):
            self._join()

    def _join(self) -> None:
        """Keep the rows with the least hashes of each class, fewer of each if they take too much memory."""
        if not self._parts:
            return
        names = self._parts[0]
        columns = {name: np.concatenate([part[name] for part in self._parts]) for name in names}
        codes, hashes = columns["code"], _hash(columns["row"])
        order = np.lexsort([hashes, codes])
        starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
        position = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
        each = sum(column.nbytes for column in columns.values()) / max(len(order), 1)
        while self.max_rows > MIN_ROWS and (position < self.max_rows).sum() * each > self._max_bytes:
            self.max_rows //= 2
        is_last = position == self.max_rows - 1
        self._thresholds[codes[order[is_last]]] = hashes[order[is_last]]
        kept = order[position < self.max_rows]
        self._parts = [{name: column[kept] for name, column in columns.items()}]
        self._rows = self._joined_rows = len(kept)

    def of_each_class(self) -> Iterator[ClassSample]:
        """Yield the sample of each class, classes in the order of their ids."""
        self._join()
        ids = self.class_ids
        if not self._parts:
            return
        (columns,) = self._parts
        order = np.lexsort([columns["row"], columns["code"]])
        codes = columns["code"][order]
        by_id = np.array(ids, np.int64)
        for code in sorted(np.unique(codes).tolist(), key=lambda one: ids[one]):
            first, last = np.searchsorted(codes, [code, code + 1])
            members = order[first:last]
            part = {name: column[members] for name, column in columns.items()}
            truth = part["truth"]
            yield ClassSample(
                class_id=ids[code],
                name=self.names.get(code, ""),
                predicted=int(self._counts[code]),
                records=part["record"],
                rows=part["row"],
                indices=part["index"],
                heat=part["heat"].astype(np.float32),
                features=part.get("features"),
                correct=part["correct"],
                truths=np.where(truth >= 0, by_id[truth], -1).astype(np.int32),
                probabilities=part["probability"],
                heat_inside=part["heat_inside"],
                inside_area=part["inside_area"],
                at_border=part["at_border"],
                uris=part["uri"].tolist(),
                hashes=part["sha256"].tolist(),
                boxes=part["boxes"].tolist(),
            )


def _hash(rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A fixed order of rows that looks like chance."""
    return mixed(rows.astype(np.uint64))
