"""What a backfill's dataset holds, class by class: counts, the mean heatmap, and the rows at either end.

The dataset is read once, file by file. Of each class there are kept a sum of its heatmaps and the few rows of
which it was most and least confident, so that memory does not grow with the number of images.
"""

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import Batch, read_batches, read_summary
from gradcam_worker.errors import InvalidInput, StorageUnavailable
from gradcam_worker.gradcam.classes import fold
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.storage.stores import Store
from gradcam_worker.text.similar_names import nearest

FILES = 4  # read ahead
READ_S = 120.0  # that one of them is waited for
FINITE = 65_504.0  # the largest number of a heatmap
FORMAT = (
    "Its folder must hold data/*.parquet as `gradcam backfill` leaves them, see docs/reference/dataset.md."
)

Report = Callable[[str, int, int], None]  # what is done, how many of them, of how many


@dataclass(frozen=True, order=True)
class TopRow:
    """A row of which the page may show a picture; the greater, the sooner."""

    key: tuple[bool, float, int, int]  # first class of its image, confidence, earlier row, earlier class
    record: Mapping[str, Any] = field(compare=False)
    heatmap: NDArray[np.float16] = field(compare=False)


@dataclass
class ClassSummary:
    """What is known of a class so far."""

    id: int
    wnid: str
    name: str
    total: NDArray[np.float64]  # (rows, columns): the sum of its heatmaps
    count: int = 0  # heatmaps
    first: int = 0  # images in which it had the highest score
    probability: float = 0  # sum
    most: list[TopRow] = field(default_factory=list)  # heaps, the least of each at its beginning
    least: list[TopRow] = field(default_factory=list)  # twice as many: some may be among the most confident

    def pictures(self) -> tuple[list[TopRow], list[TopRow]]:
        """The most confident, and as many least confident of the rest, in order."""
        most = sorted(self.most, reverse=True)
        shown = {(one.record["row"], one.record["index"]) for one in most}
        least = sorted(self.least, reverse=True)
        rest = [one for one in least if (one.record["row"], one.record["index"]) not in shown]
        return most, rest[: len(most)]


@dataclass
class ClassStatistics:
    """What a dataset holds, as far as it has been read."""

    per_class: int
    classes: dict[int, ClassSummary] = field(default_factory=dict)
    networks: dict[str, None] = field(default_factory=dict)
    method: MethodSpec = field(default_factory=MethodSpec)
    rows: int = 0
    codes: Counter[str] = field(default_factory=Counter)

    def add(self, batch: Batch) -> None:
        """Take a batch in. Raises InvalidInput where its heatmaps are of another size."""
        ids, maps = batch.class_ids, batch.heatmaps
        self.method = batch.method
        if not len(ids):
            return
        order = np.argsort(ids, kind="stable")
        starts = np.flatnonzero(np.diff(ids[order], prepend=ids[order[0]] - 1))
        sums = np.add.reduceat(np.nan_to_num(maps[order].astype(np.float64), posinf=FINITE), starts, axis=0)
        for place, total in zip(order[starts].tolist(), sums, strict=True):
            self._class(batch, place, total.shape).total += total
        firsts = (batch.ranks == 1).tolist()
        told = zip(ids.tolist(), firsts, np.nan_to_num(batch.probabilities).tolist(), strict=True)
        for place, (class_id, first, probability) in enumerate(told):
            seen = self.classes[class_id]
            seen.count, seen.first = seen.count + 1, seen.first + first
            seen.probability += probability
            self._offer(seen.most, self.per_class, (first, probability), batch, place)
            self._offer(seen.least, 2 * self.per_class, (first, -probability), batch, place)

    def _class(self, batch: Batch, place: int, grid: tuple[int, ...]) -> ClassSummary:
        class_id = int(batch.class_ids[place])
        if class_id not in self.classes:
            one = batch.record(place)
            names = str(one["wnid"] or ""), str(one["class_name"] or "")
            self.classes[class_id] = ClassSummary(class_id, *names, np.zeros(grid))
        found = self.classes[class_id]
        if found.total.shape != grid:
            message = f"Its heatmaps have {found.total.shape} cells in one file and {grid} in another."
            raise InvalidInput(message)
        return found

    def _offer(
        self, heap: list[TopRow], most: int, key: tuple[bool, float], batch: Batch, place: int
    ) -> None:
        """Keep a row, if it is among the `most` greatest; of equals, those that came before."""
        if len(heap) == most and key <= heap[0].key[:2]:
            return
        one = batch.record(place)
        kept = TopRow((*key, -one["row"], -one["index"]), one, batch.heatmaps[place].copy())
        (heapq.heappush if len(heap) < most else heapq.heapreplace)(heap, kept)

    def chosen(self, names: Sequence[str] | None, most: int) -> list[ClassSummary]:
        """The `names`d classes (by id, wnid or name), or so many: those that came first most often, first.

        Raises InvalidInput.
        """
        known = sorted(self.classes.values(), key=lambda one: (-one.first, -one.count, one.id))
        if not known:
            why = ", ".join(f"{code} {count:,}" for code, count in self.codes.most_common(5))
            message = f"There is nothing to show: each of the {self.rows:,} rows failed ({why})."
            raise InvalidInput(message)
        if names is None:
            return known[:most]
        if not names:
            message = "The list of classes is empty: name ids, wnids or names, or leave it out."
            raise InvalidInput(message)
        spelled: dict[str, dict[int, ClassSummary]] = {}
        for one in known:
            for spelling in {str(one.id), fold(one.wnid), fold(one.name)} - {""}:
                spelled.setdefault(spelling, {})[one.id] = one
        found: dict[int, ClassSummary] = {}
        for name in names:
            if fold(name) not in spelled:
                near = nearest(fold(name), spelled)
                hint = f" Near: {', '.join(near)}." if near else ""
                message = f"No image was explained for a class {name!r}.{hint}"
                raise InvalidInput(message)
            found |= spelled[fold(name)]
        return [one for one in known if one.id in found]


def read_statistics(store: Store, per_class: int, report: Report = lambda *_: None) -> ClassStatistics:
    """Read the dataset in `store`, a few files ahead. Raises InvalidInput, StorageUnavailable."""
    names = [name for name in store.names("data") if name.endswith(".parquet")]
    if not names:
        message = f"There is no dataset at {store.uri('data')}. {FORMAT}"
        raise InvalidInput(message)
    found = ClassStatistics(per_class)
    for done, (name, data) in enumerate(_files(store, names)):
        try:
            said = read_summary(data)
            found.rows += said.rows
            found.codes.update(said.codes)
            found.networks[f"{said.network.name}, {said.network.layer}"] = None
            for batch in read_batches(data):
                found.add(batch)
        except (StorageUnavailable, InvalidInput, KeyError, TypeError, ValueError) as error:
            message = f"{store.uri(name)} is no part of a dataset: {error} {FORMAT}"
            raise InvalidInput(message) from error
        report("files", done + 1, len(names))
    return found


def _files(store: Store, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """All files in order, a few of them read ahead."""
    under_way: deque[tuple[str, Future[bytes | None]]] = deque()
    with ThreadPoolExecutor(FILES, thread_name_prefix="dataset") as readers:
        for name in [*names, *[""] * FILES]:
            if name:
                under_way.append((name, readers.submit(store.find, name, Deadline(READ_S))))
            if under_way and (len(under_way) > FILES or not name):
                first, read = under_way.popleft()
                data = read.result()
                if data is None:
                    message = f"{store.uri(first)} was there a moment ago: is the backfill still running?"
                    raise InvalidInput(message)
                yield first, data
