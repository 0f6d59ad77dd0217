"""One pass over the files of a dataset: counts by class, and a record of each image's prediction."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import Batch, Grid, Summary, read_batches, read_summary
from gradcam_worker.audit.dataset.class_codes import ClassCodes, ClassSums
from gradcam_worker.audit.dataset.image_grid import heat_on_images
from gradcam_worker.audit.dataset.predictions import NONE, PredictionFile, record_type
from gradcam_worker.audit.dataset.row_table import RowTable
from gradcam_worker.audit.dataset.samples import Samples
from gradcam_worker.audit.dataset.statistics import EXPECTED_FORMAT, ReportProgress, read_files
from gradcam_worker.audit.dataset.typical_heat import TypicalHeat, heat_at_border
from gradcam_worker.audit.report import ColumnFacts, DataFile
from gradcam_worker.errors import InvalidInput, StorageUnavailable
from gradcam_worker.storage.store import Store

BORDER = 0.1  # width of the outer band, as a share of the shorter side: as the column heat_at_border has it
MAX_CELLS_PER_SIDE = 16  # of the heat that is compared: finer maps are no better for that
PREDICTION = 1  # the rank of the class that came first


@dataclass
class DatasetPass:
    """What is known when the files have been read.

    Attributes:
        predictions: A record of each image whose prediction was explained.
        table: Gets all records, for a page; None: nobody asked for it.
        samples: Some images of each class; None: likewise.
        rows: Of the input.
        records: Heatmaps: one for each image and explained class.
        explained: Images with heatmaps.
        labelled: Of these, with a true class that the network knows.
        right: Of these, with a true class that came first.
        located: Images with heatmaps, with boxes or a mask.
        error_codes: Error code -> number of failed images.
        grid: Rows and columns of the heat in `predictions`.
        classes: The codes of all classes.
        names: WordNet id and name of each class that was explained, by code.
        images: In how many images each class was explained.
        probability: The sum of its probability there.
        truths: Of how many images it is a true class.
        missed: Of these, in how many another class came first.
        typical: The heat of each class's predictions; of the right ones, where labels are known.
        facts: Fields of `DatasetFacts`.
        columns: Of the files.
        files: The files.
    """

    predictions: PredictionFile
    table: RowTable | None = None
    samples: Samples | None = None
    rows: int = 0
    records: int = 0
    explained: int = 0
    labelled: int = 0
    right: int = 0
    located: int = 0
    error_codes: Counter[str] = field(default_factory=Counter)
    grid: Grid = (1, 1)
    classes: ClassCodes = field(default_factory=ClassCodes)
    names: dict[int, tuple[str, str]] = field(default_factory=dict)
    images: ClassSums = field(default_factory=ClassSums)
    probability: ClassSums = field(default_factory=ClassSums)
    truths: ClassSums = field(default_factory=ClassSums)
    missed: ClassSums = field(default_factory=ClassSums)
    typical: TypicalHeat = field(default_factory=TypicalHeat)
    facts: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, ColumnFacts] = field(default_factory=dict)
    files: list[DataFile] = field(default_factory=list)
    _last_row: int = -1

    def add_file(self, name: str, data: bytes) -> None:
        """Add a file. Raises what its readers raise."""
        summary = read_summary(data)
        self.rows += summary.rows
        self.error_codes.update(summary.codes)
        first: int | None = None
        last: int | None = None
        records = 0
        for batch in read_batches(data):
            self._add_facts(summary, batch)
            if not len(batch.class_ids):
                continue
            rows = _integers(batch, "row")
            first = int(rows.min()) if first is None else min(first, int(rows.min()))
            last = int(rows.max()) if last is None else max(last, int(rows.max()))
            self._add_batch(batch, rows)
            records += len(rows)
        self.files.append(DataFile(name=name, rows=records, first=first, last=last, bytes=len(data)))

    def _add_facts(self, summary: Summary, batch: Batch) -> None:
        rows, columns = batch.heatmaps.shape[1:]
        if self.records and self.facts["grid"] != (rows, columns) and len(batch.class_ids):
            message = (
                f"Its heatmaps have {self.facts['grid']} cells in one file and {rows, columns} in another."
            )
            raise InvalidInput(message)
        if not self.records:
            network = summary.network
            self.facts = {
                "network": network.name,
                "layer": network.layer,
                "weights_sha256": network.weights_sha256,
                "method": {"name": batch.method.name, **batch.method.model_dump(mode="json")},
                "against": batch.against,
                "grid": (rows, columns),
                "features": None if batch.heat_features is None else batch.heat_features.shape[1],
            }
            self.grid = min(rows, MAX_CELLS_PER_SIDE), min(columns, MAX_CELLS_PER_SIDE)
        for column in batch.other_columns.schema:
            if column.name not in self.columns:
                is_carried = column.name in batch.carried
                kind = str(column.type)
                self.columns[column.name] = ColumnFacts(name=column.name, type=kind, carried=is_carried)

    def _add_batch(self, batch: Batch, rows: NDArray[np.int64]) -> None:
        codes = self.classes.encode(batch.class_ids)
        self._add_names(batch, codes)
        self.images.add(codes)
        self.probability.add(codes, np.nan_to_num(batch.probabilities))
        is_first = np.diff(rows, prepend=self._last_row) != 0  # the first record of each image
        self._last_row = int(rows[-1])
        self.explained += int(is_first.sum())
        if batch.truth_ids is not None and batch.correct is not None:
            self._add_truths(batch.truth_ids, batch.correct, is_first)
        if batch.inside_area is not None:
            self.located += int((is_first & np.isfinite(batch.inside_area)).sum())
        if self.table:
            self.table.add(batch, len(self.files))
        chosen = np.flatnonzero(batch.ranks == PREDICTION)
        if len(chosen):
            self._add_predictions(batch, codes, rows, chosen)
        self.records += len(rows)

    def _add_names(self, batch: Batch, codes: NDArray[np.int32]) -> None:
        if len(self.names) == len(self.classes):
            return
        for code in np.unique(codes).tolist():
            if code not in self.names:
                record = batch.record(int((codes == code).argmax()))
                self.names[code] = str(record["wnid"] or ""), str(record["class_name"] or "")

    def _add_truths(
        self,
        truth_ids: tuple[NDArray[np.int32], NDArray[np.int32]],
        correct: NDArray[np.int8],
        is_first: NDArray[np.bool_],
    ) -> None:
        offsets, ids = truth_ids
        of = np.repeat(np.arange(len(correct)), np.diff(offsets))
        codes = self.classes.encode(ids)
        self.labelled += int((is_first & (correct != NONE)).sum())
        self.right += int((is_first & (correct == 1)).sum())
        self.truths.add(codes[is_first[of]])
        self.missed.add(codes[is_first[of] & (correct[of] == 0)])

    def _add_predictions(
        self,
        batch: Batch,
        codes: NDArray[np.int32],
        rows: NDArray[np.int64],
        chosen: NDArray[np.intp],
    ) -> None:
        """Keep a record of each prediction.

        Args:
            batch: n records.
            codes: (n,) of their classes.
            rows: (n,) the column `row`.
            chosen: Which of them are of predictions.
        """
        maps = heat_on_images(batch, self.grid)[chosen]
        records = np.zeros(len(chosen), record_type(self.grid))
        records["record"] = self.records + chosen
        records["row"], records["index"] = rows[chosen], _integers(batch, "index")[chosen]
        records["predicted"], records["probability"] = codes[chosen], batch.probabilities[chosen]
        for name, values, unknown in (
            ("correct", batch.correct, NONE),
            ("truth", batch.first_truth, NONE),
            ("heat_inside", batch.heat_inside, np.nan),
            ("inside_area", batch.inside_area, np.nan),
            ("at_border", batch.heat_at_border, np.nan),
        ):
            records[name] = unknown if values is None else values[chosen]
        records["truth"] = self.classes.encode(records["truth"])
        is_right = records["correct"] == 1  # of several true classes, the one that was predicted
        records["truth"] = np.where(is_right, records["predicted"], records["truth"])
        if batch.heat_at_border is None:  # a file of an earlier version
            widths, heights = (_integers(batch, name)[chosen] for name in ("width", "height"))
            records["at_border"] = heat_at_border(maps, widths, heights, BORDER)
        records["heat_inside"][~maps.any((1, 2))] = np.nan
        records["heat"] = maps * (self.grid[0] * self.grid[1])
        self.predictions.append(records)
        self.typical.add(np.where(records["correct"] != 0, records["predicted"], NONE), records["heat"])
        if self.samples:
            wanted = self.samples.wanted(records["predicted"], records["row"])
            self.samples.add(_sampled(batch, chosen[wanted], records[wanted], maps[wanted]))


def read_dataset(
    store: Store,
    predictions: PredictionFile,
    *,
    table: RowTable | None = None,
    samples: Samples | None = None,
    report_progress: ReportProgress = lambda *_: None,
) -> DatasetPass:
    """Read all files of a dataset.

    Args:
        store: Where the dataset is.
        predictions: Gets the records of the predictions.
        table: Gets all records, for a page.
        samples: Gets some images of each class.
        report_progress: Is called after each file.

    Returns:
        What is known then.

    Raises:
        InvalidInput: There is no dataset, or a file is damaged.
        StorageUnavailable: The dataset cannot be read.
    """
    read = DatasetPass(predictions, table, samples)
    for name, data in read_files(store, report_progress):
        try:
            read.add_file(name, data)
        except (StorageUnavailable, InvalidInput, KeyError, TypeError, ValueError) as error:
            message = f"{store.uri(name)} is no part of a dataset: {error} {EXPECTED_FORMAT}"
            raise InvalidInput(message) from error
    if samples:
        samples.class_ids = read.classes.ids
        samples.names = {code: name for code, (_, name) in read.names.items()}
    return read


def _integers(batch: Batch, name: str) -> NDArray[Any]:
    """A column of integers without nulls."""
    values: NDArray[Any] = batch.other_columns[name].to_numpy(zero_copy_only=False)
    return values


def _floats(column: Any) -> NDArray[np.float32]:
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float32)


def _sampled(
    batch: Batch, chosen: NDArray[np.intp], records: NDArray[Any], maps: NDArray[np.float32]
) -> dict[str, NDArray[Any]]:
    """The columns of a sample: see `ClassSample`."""
    taken = batch.other_columns.take(chosen)
    columns = {name: records[name] for name in records.dtype.names or () if name != "heat"}
    columns["code"], columns["heat"] = columns.pop("predicted"), maps
    for name in ("uri", "sha256"):
        columns[name] = np.array(taken[name].to_pylist(), object)
    columns["boxes"] = np.full(len(chosen), None, object)
    if "truth_boxes" in taken.schema.names:
        sides = np.stack([_floats(taken[name]) for name in ("width", "height", "width", "height")], axis=1)
        for number, boxes in enumerate(taken["truth_boxes"].to_pylist()):
            if boxes:
                columns["boxes"][number] = np.array(boxes, np.float32) / sides[number]
    if batch.heat_features is not None:
        columns["features"] = batch.heat_features[chosen]
    return columns
