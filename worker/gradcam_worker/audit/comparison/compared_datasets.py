"""Two datasets that are to be compared: what they are, whether they can be, and their records."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gradcam_worker.artifacts.dataset import Batch, Grid, Summary, read_batches, read_summary
from gradcam_worker.audit.comparison.report import ClassKey, ComparedDataset, Difference
from gradcam_worker.audit.dataset.heat_table import ClassNames, HeatRecords, HeatTable, ImageKey
from gradcam_worker.audit.dataset.statistics import (
    EXPECTED_FORMAT,
    READ_TIMEOUT_S,
    ReportProgress,
    read_files,
)
from gradcam_worker.errors import InvalidInput, StorageUnavailable
from gradcam_worker.gradcam.classes import fold
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.storage.store import Store

MAX_GRID_SIDE = 14  # cells; finer heatmaps are compared on this grid
MIN_CELLS = 4  # of the grid; with fewer a heatmap does not say where
ERRORS_OF_FILES = (StorageUnavailable, KeyError, TypeError, ValueError)  # of a file that is none of ours
CLASS_TEXTS: tuple[Literal["wnid", "name"], ...] = ("wnid", "name")  # that classes are known by anywhere
AGAINST_A_CLASS = "counterfactual"  # the method whose heat counts against the class


@dataclass(frozen=True)
class Side:
    """One dataset, as far as its first records and its end tell.

    Attributes:
        store: Where it is.
        method: That computed the heatmaps.
        against: The classes that each is explained against.
        grid: Rows and columns of the heatmaps.
        complete: Whether its backfill has ended.
    """

    store: Store
    method: MethodSpec
    against: tuple[int | str, ...]
    grid: Grid
    complete: bool


@dataclass(frozen=True)
class ReadDataset:
    """A dataset that was read.

    Attributes:
        facts: For the report.
        records: Its records, or those of a sample of its images.
        classes: The classes, by id.
        files: The names of its files, by number.
        versions: How many different networks, layers and weights its files were explained with.
    """

    facts: ComparedDataset
    records: HeatRecords
    classes: dict[int, ClassNames]
    files: tuple[str, ...]
    versions: int


def open_side(store: Store) -> Side:
    """Look at the first records of a dataset.

    Raises:
        InvalidInput: There is no dataset, or all of its rows failed.
        StorageUnavailable: The dataset cannot be read.
    """
    codes: Counter[str] = Counter()
    for name, data in read_files(store):
        summary, batches = _read_file(store, name, data)
        for batch in batches:
            if len(batch.class_ids):
                rows, columns = batch.heatmaps.shape[1:]
                complete = store.find("dataset.json", Deadline(READ_TIMEOUT_S)) is not None
                return Side(store, batch.method, batch.against, (rows, columns), complete)
        codes.update(summary.codes)
    failed = ", ".join(f"{code} {count:,}" for code, count in codes.most_common(5)) or "it is empty"
    message = f"There is nothing to compare in {store.uri('data')}: no row was explained ({failed})."
    raise InvalidInput(message)


def _read_file(store: Store, name: str, data: bytes) -> tuple[Summary, Iterator[Batch]]:
    """The summary of a file, and its batches as they are read; raises InvalidInput, now or then."""

    def batches() -> Iterator[Batch]:
        try:
            yield from read_batches(data)
        except ERRORS_OF_FILES as error:
            raise _damaged(store, name, error) from error

    try:
        return read_summary(data), batches()
    except ERRORS_OF_FILES as error:
        raise _damaged(store, name, error) from error


def _damaged(store: Store, name: str, error: Exception) -> InvalidInput:
    return InvalidInput(f"{store.uri(name)} is no part of a dataset: {error} {EXPECTED_FORMAT}")


def common_grid(a: Side, b: Side, *, across_methods: bool) -> Grid:
    """Check that two datasets can be compared, and choose the grid.

    Args:
        a: The first.
        b: The second.
        across_methods: Whether the heat of different methods may be compared.

    Returns:
        Rows and columns: those of the coarser heatmaps, at most `MAX_GRID_SIDE`.

    Raises:
        InvalidInput: They cannot be compared.
    """
    if a.against != b.against:
        given = " and ".join(str(list(side.against)) if side.against else "nothing" for side in (a, b))
        message = f"The heatmaps answer different questions: classes are explained against {given}. "
        raise InvalidInput(message + "Explain both datasets against the same classes.")
    names = a.method.name, b.method.name
    if names[0] != names[1]:
        told = f"The heatmaps are of different methods: {names[0]} in A and {names[1]} in B. "
        if AGAINST_A_CLASS in names:
            raise InvalidInput(
                told + f"Those of {AGAINST_A_CLASS} lie on what counts against a class, "
                "so they cannot be compared with others."
            )
        if not across_methods:
            raise InvalidInput(
                told + "What moved would be of the methods as much as of the networks: explain both with the "
                "same method, or ask for it with --across-methods."
            )
    rows, columns = (min(one, other, MAX_GRID_SIDE) for one, other in zip(a.grid, b.grid, strict=True))
    if rows * columns < MIN_CELLS:
        cells = " and ".join(f"{side.grid[0]} x {side.grid[1]}" for side in (a, b))
        message = (
            f"The heatmaps have {cells} cells: with fewer than {MIN_CELLS} they do not say where heat is."
        )
        raise InvalidInput(message)
    return rows, columns


def read_dataset(side: Side, table: HeatTable, report_progress: ReportProgress) -> ReadDataset:
    """Read a dataset in one pass.

    Args:
        side: The dataset.
        table: Collects its records.
        report_progress: Is called after each file.

    Returns:
        The dataset.

    Raises:
        InvalidInput: A file is damaged, or has heatmaps of another size.
        StorageUnavailable: The dataset cannot be read.
    """
    rows, explained, codes = 0, 0, Counter[str]()
    networks: Counter[tuple[str, str, str | None]] = Counter()
    files: list[str] = []
    for name, data in read_files(side.store, report_progress):
        summary, batches = _read_file(side.store, name, data)
        network = summary.network
        rows, codes = rows + summary.rows, codes + Counter(summary.codes)
        networks[network.name, network.layer, network.weights_sha256] += summary.rows
        explained += summary.rows - summary.failed
        for batch in batches:
            if batch.heatmaps.shape[1:] != side.grid:
                grids = f"{side.grid} cells in one file and {batch.heatmaps.shape[1:]} in another"
                message = f"{side.store.uri(name)} is no part of the dataset: its heatmaps have {grids}."
                raise InvalidInput(message)
            table.add(batch, len(files))
        files.append(name)
    (network_name, layer, weights), _ = networks.most_common(1)[0]
    facts = ComparedDataset(
        uri=side.store.uri("data").removesuffix("/data"),
        rows=rows,
        explained=explained,
        failed=codes.total(),
        network=network_name,
        layer=layer,
        weights_sha256=weights,
        method={"name": side.method.name, **side.method.model_dump(mode="json")},
        against=side.against,
        grid=side.grid,
        complete=side.complete,
        share=table.share,
    )
    return ReadDataset(facts, table.records(), table.classes, tuple(files), len(networks))


def read_both(
    sides: tuple[Side, Side], grid: Grid, key: ImageKey, report_progress: ReportProgress
) -> tuple[ReadDataset, ReadDataset]:
    """Read two datasets; of both the same images stay where one is too large.

    Args:
        sides: The datasets.
        grid: Rows and columns of the grid on the image.
        key: What an image is known by where a dataset has to be sampled.
        report_progress: Is called after each file.

    Returns:
        The datasets, in order.

    Raises:
        InvalidInput: A file is damaged.
        StorageUnavailable: A dataset cannot be read.
    """
    tables = HeatTable(grid, key), HeatTable(grid, key)
    first = read_dataset(sides[0], tables[0], report_progress)
    tables[1].limit_to(tables[0].limit)
    second = read_dataset(sides[1], tables[1], report_progress)
    if tables[1].limit < tables[0].limit:
        tables[0].limit_to(tables[1].limit)
        facts = first.facts.model_copy(update={"share": tables[0].share})
        first = ReadDataset(facts, tables[0].records(), first.classes, first.files, first.versions)
    return first, second


def differences(a: ComparedDataset, b: ComparedDataset) -> list[Difference]:
    """What the two backfills differ in."""
    found = []
    for what in ("network", "layer", "weights_sha256", "grid"):
        values = getattr(a, what), getattr(b, what)
        if values[0] != values[1]:
            found.append(Difference(what=what, a=values[0], b=values[1]))
    for name in sorted(a.method.keys() | b.method.keys()):
        options: tuple[Any, Any] = a.method.get(name), b.method.get(name)
        if options[0] != options[1]:
            found.append(Difference(what=f"method.{name}", a=options[0], b=options[1]))
    return found


def remarks(a: ReadDataset, b: ReadDataset) -> list[str]:
    """Sentences about what the comparison cannot say, from the two datasets alone."""
    told = []
    for label, one in (("A", a), ("B", b)):
        if not one.facts.complete:
            told.append(f"{label} is not complete: its backfill has not ended, and rows are missing.")
        if one.versions > 1:
            told.append(
                f"The files of {label} were explained with {one.versions} networks, layers or weights."
            )
    if a.facts.share < 1:
        told.append(
            f"The datasets do not fit into memory: {a.facts.share:.1%} of the images were compared, "
            "chosen by their checksums or addresses."
        )
    if a.facts.grid != b.facts.grid:
        told.append(
            "The heatmaps have different grids. They are compared on the coarser one, and a part of the "
            "distance may be of their resolution."
        )
    return told


class ClassPairs(NamedTuple):
    """The classes of one dataset that were found in the other.

    Attributes:
        by: What they are matched by.
        pairs: The classes in A and in B, in order of their ids in A.
        unclear_a: Ids of classes in A that have the name of another one.
        unclear_b: Likewise in B.
    """

    by: ClassKey
    pairs: list[tuple[ClassNames, ClassNames]]
    unclear_a: frozenset[int] = frozenset()
    unclear_b: frozenset[int] = frozenset()


def match_classes(a: dict[int, ClassNames], b: dict[int, ClassNames], *, same_network: bool) -> ClassPairs:
    """Find the classes of one dataset in the other.

    Args:
        a: Classes by id.
        b: Likewise.
        same_network: Whether the network has the same name in both.

    Returns:
        The pairs of classes.

    Raises:
        InvalidInput: No class is in both.
    """
    common = a.keys() & b.keys()
    agree = all(_same_name(a[one], b[one]) for one in common)
    if same_network and common and agree:
        return ClassPairs("id", [(a[one], b[one]) for one in sorted(common)])
    for by in CLASS_TEXTS:
        in_a, in_b = _by_text(a, by), _by_text(b, by)
        shared = in_a.keys() & in_b.keys()
        clear = {text for text in shared if len(in_a[text]) == len(in_b[text]) == 1}
        if shared:
            pairs = sorted((in_a[text][0], in_b[text][0]) for text in clear)
            unclear = shared - clear
            return ClassPairs(
                by,
                pairs,
                frozenset(one.id for text in unclear for one in in_a[text]),
                frozenset(one.id for text in unclear for one in in_b[text]),
            )
    examples = " and ".join(
        ", ".join(repr(one.name or one.wnid or one.id) for one in sorted(classes.values())[:3])
        for classes in (a, b)
    )
    message = f"No class is in both datasets: they have classes such as {examples}. "
    raise InvalidInput(message + "Classes of different networks are found by their WordNet ids or names.")


def _same_name(a: ClassNames, b: ClassNames) -> bool:
    if a.wnid and b.wnid:
        return a.wnid == b.wnid
    return not a.name or not b.name or fold(a.name) == fold(b.name)


def _by_text(classes: dict[int, ClassNames], by: str) -> dict[str, list[ClassNames]]:
    found: dict[str, list[ClassNames]] = {}
    for one in classes.values():
        if text := fold(getattr(one, by)):
            found.setdefault(text, []).append(one)
    return found
