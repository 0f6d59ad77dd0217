"""Statistics of a backfill's dataset by class: counts, the mean heatmap, the most and least confident rows.

The dataset is read once, file by file. Only the sum of the heatmaps of each class and its few most and least
confident rows are kept, so that memory does not grow with the number of images.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import Batch, read_batches, read_summary
from gradcam_worker.errors import InvalidInput, StorageUnavailable
from gradcam_worker.gradcam.classes import fold
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.store import Store
from gradcam_worker.storage.stores import FolderStore, S3Store
from gradcam_worker.text.similar_names import nearest
from gradcam_worker.text.urls import without_secrets

READ_AHEAD_FILES = 4
READ_TIMEOUT_S = 120.0  # for each file
MAX_FLOAT16 = 65_504.0  # the type of stored heatmaps
EXPECTED_FORMAT = (
    "Its folder must hold data/*.parquet as `gradcam backfill` leaves them, see docs/reference/dataset.md."
)

ReportProgress = Callable[[str, int, int], None]  # what is read, number done, number in all


@dataclass(frozen=True, order=True)
class TopRow:
    """A row that the page may show; greater ones go first."""

    key: tuple[bool, float, int, int]  # first class of its image, confidence, earlier row, earlier class
    record: Mapping[str, Any] = field(compare=False)
    heatmap: NDArray[np.float16] = field(compare=False)


@dataclass
class ClassSummary:
    """The statistics of a class."""

    id: int
    wnid: str
    name: str
    total: NDArray[np.float64]  # (rows, columns): the sum of its heatmaps
    count: int = 0  # heatmaps
    first: int = 0  # images in which it had the highest score
    probability: float = 0  # sum
    most_confident: list[TopRow] = field(default_factory=list)  # heaps: the least row is at index 0
    least_confident: list[TopRow] = field(default_factory=list)  # twice as many: some may be in the other

    def top_rows(self) -> tuple[list[TopRow], list[TopRow]]:
        """The most confident rows, and as many least confident ones of the rest, in order."""
        most = sorted(self.most_confident, reverse=True)
        shown = {(row.record["row"], row.record["index"]) for row in most}
        least = sorted(self.least_confident, reverse=True)
        rest = [row for row in least if (row.record["row"], row.record["index"]) not in shown]
        return most, rest[: len(most)]


@dataclass
class ClassStatistics:
    """The statistics of the files of a dataset that have been read."""

    per_class: int
    classes: dict[int, ClassSummary] = field(default_factory=dict)
    networks: dict[str, None] = field(default_factory=dict)
    method: MethodSpec = field(default_factory=MethodSpec)
    against: tuple[int | str, ...] = ()  # the classes that each is explained against
    rows: int = 0
    codes: Counter[str] = field(default_factory=Counter)

    def add(self, batch: Batch) -> None:
        """Add a batch of rows.

        Args:
            batch: The rows.

        Raises:
            InvalidInput: Its heatmaps have another size than those before.
        """
        ids, maps = batch.class_ids, batch.heatmaps
        self.method, self.against = batch.method, batch.against
        if not len(ids):
            return
        order = np.argsort(ids, kind="stable")
        starts = np.flatnonzero(np.diff(ids[order], prepend=ids[order[0]] - 1))
        finite = np.nan_to_num(maps[order].astype(np.float64), posinf=MAX_FLOAT16)
        sums = np.add.reduceat(finite, starts, axis=0)
        for index, total in zip(order[starts].tolist(), sums, strict=True):
            self._class(batch, index, total.shape).total += total
        are_first = (batch.ranks == 1).tolist()
        probabilities = np.nan_to_num(batch.probabilities).tolist()
        for index, class_id in enumerate(ids.tolist()):
            is_first, probability = are_first[index], probabilities[index]
            summary = self.classes[class_id]
            summary.count, summary.first = summary.count + 1, summary.first + is_first
            summary.probability += probability
            self._push(summary.most_confident, self.per_class, (is_first, probability), batch, index)
            self._push(summary.least_confident, 2 * self.per_class, (is_first, -probability), batch, index)

    def _class(self, batch: Batch, index: int, grid: tuple[int, ...]) -> ClassSummary:
        class_id = int(batch.class_ids[index])
        if class_id not in self.classes:
            record = batch.record(index)
            names = str(record["wnid"] or ""), str(record["class_name"] or "")
            self.classes[class_id] = ClassSummary(class_id, *names, np.zeros(grid))
        summary = self.classes[class_id]
        if summary.total.shape != grid:
            message = f"Its heatmaps have {summary.total.shape} cells in one file and {grid} in another."
            raise InvalidInput(message)
        return summary

    def _push(
        self, heap: list[TopRow], max_rows: int, key: tuple[bool, float], batch: Batch, index: int
    ) -> None:
        """Add a row to a heap of the `max_rows` greatest; of equal rows the earlier ones stay."""
        if len(heap) == max_rows and key <= heap[0].key[:2]:
            return
        record = batch.record(index)
        row = TopRow((*key, -record["row"], -record["index"]), record, batch.heatmaps[index].copy())
        (heapq.heappush if len(heap) < max_rows else heapq.heapreplace)(heap, row)

    def choose_classes(self, names: Sequence[str] | None, max_classes: int) -> list[ClassSummary]:
        """Choose the classes to show, those with the most images in which they came first at the front.

        Args:
            names: Ids, wnids or names; None: the first `max_classes`.
            max_classes: How many, if none are named.

        Returns:
            The classes.

        Raises:
            InvalidInput: All rows failed, the list of names is empty, or no image was explained for a name.
        """
        ranked = sorted(
            self.classes.values(), key=lambda summary: (-summary.first, -summary.count, summary.id)
        )
        if not ranked:
            codes = ", ".join(f"{code} {count:,}" for code, count in self.codes.most_common(5))
            message = f"There is nothing to show: each of the {self.rows:,} rows failed ({codes})."
            raise InvalidInput(message)
        if names is None:
            return ranked[:max_classes]
        if not names:
            message = "The list of classes is empty: name ids, wnids or names, or leave it out."
            raise InvalidInput(message)
        ids_by_spelling: dict[str, set[int]] = {}
        for summary in ranked:
            for spelling in {str(summary.id), fold(summary.wnid), fold(summary.name)} - {""}:
                ids_by_spelling.setdefault(spelling, set()).add(summary.id)
        chosen: set[int] = set()
        for name in names:
            if fold(name) not in ids_by_spelling:
                similar = nearest(fold(name), ids_by_spelling)
                hint = f" Near: {', '.join(similar)}." if similar else ""
                message = f"No image was explained for a class {name!r}.{hint}"
                raise InvalidInput(message)
            chosen |= ids_by_spelling[fold(name)]
        return [summary for summary in ranked if summary.id in chosen]


def read_statistics(
    store: Store, per_class: int, report_progress: ReportProgress = lambda *_: None
) -> ClassStatistics:
    """Read the statistics of a dataset.

    Args:
        store: Where the dataset is.
        per_class: The number of most confident rows that are kept of each class, and of least confident ones.
        report_progress: Is called after each file.

    Returns:
        The statistics.

    Raises:
        InvalidInput: There is no dataset, or a file is damaged.
        StorageUnavailable: The store cannot be listed.
    """
    statistics = ClassStatistics(per_class)
    for name, data in read_files(store, report_progress):
        try:
            summary = read_summary(data)
            statistics.rows += summary.rows
            statistics.codes.update(summary.codes)
            statistics.networks[f"{summary.network.name}, {summary.network.layer}"] = None
            for batch in read_batches(data):
                statistics.add(batch)
        except (StorageUnavailable, InvalidInput, KeyError, TypeError, ValueError) as error:
            message = f"{store.uri(name)} is no part of a dataset: {error} {EXPECTED_FORMAT}"
            raise InvalidInput(message) from error
    return statistics


def open_dataset(dataset: str, s3: S3) -> Store:
    """Open a dataset.

    Args:
        dataset: A folder, or s3://bucket/prefix.
        s3: Reads buckets.

    Returns:
        Where its files are.

    Raises:
        InvalidInput: It is neither.
    """
    scheme, colon, rest = dataset.partition("://")
    if not colon:
        return FolderStore(Path(dataset))
    bucket, _, prefix = rest.partition("/")
    if scheme != "s3" or not bucket:
        message = f"{without_secrets(dataset)[:200]!r} is no dataset: name a folder, or s3://bucket/prefix."
        raise InvalidInput(message)
    return S3Store(s3, bucket, prefix.strip("/"))


def file_names(store: Store) -> list[str]:
    """List the Parquet files of a dataset, in order.

    Args:
        store: Where the dataset is.

    Returns:
        Their names, as in data/<key>.parquet.

    Raises:
        InvalidInput: There is no dataset.
        StorageUnavailable: The store cannot be listed.
    """
    names = [name for name in store.names("data") if name.endswith(".parquet")]
    if not names:
        message = f"There is no dataset at {store.uri('data')}. {EXPECTED_FORMAT}"
        raise InvalidInput(message)
    return names


def read_files(
    store: Store, report_progress: ReportProgress = lambda *_: None
) -> Iterator[tuple[str, bytes]]:
    """Read the Parquet files of a dataset, in order, a few of them ahead.

    Args:
        store: Where the dataset is.
        report_progress: Is called after each file, when the next one is asked for.

    Yields:
        Name and content of each file.

    Raises:
        InvalidInput: There is no dataset.
        StorageUnavailable: The store cannot be listed.
    """
    names = file_names(store)
    for done, file in enumerate(_files(store, names)):
        yield file
        report_progress("files", done + 1, len(names))


def _files(store: Store, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """The names and contents of all files in order; `READ_AHEAD_FILES` of them are read ahead."""
    pending: deque[tuple[str, Future[bytes | None]]] = deque()
    with ThreadPoolExecutor(READ_AHEAD_FILES, thread_name_prefix="dataset") as readers:
        for name in [*names, *[""] * READ_AHEAD_FILES]:
            if name:
                pending.append((name, readers.submit(store.find, name, Deadline(READ_TIMEOUT_S))))
            if pending and (len(pending) > READ_AHEAD_FILES or not name):
                first, read = pending.popleft()
                data = read.result()
                if data is None:
                    message = f"{store.uri(first)} was there a moment ago: is the backfill still running?"
                    raise InvalidInput(message)
                yield first, data
