"""An audit of a dataset: reads it once, judges each image's prediction, and reports.

`dataset_pass` reads the files, `causes` judges, `typical_heat` has the measure where there are no boxes, and
`report` the format.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker import __version__
from gradcam_worker.audit.advice import advice
from gradcam_worker.audit.causes import (
    BY_NOTHING,
    BY_REGIONS,
    BY_TYPICAL_HEAT,
    CODES,
    ELSEWHERE,
    causes,
    places,
    to_learn,
)
from gradcam_worker.audit.dataset.class_codes import ClassSums
from gradcam_worker.audit.dataset.counts import BestRows, KeyCounts
from gradcam_worker.audit.dataset.dataset_pass import DatasetPass, read_dataset
from gradcam_worker.audit.dataset.predictions import NONE, PredictionFile
from gradcam_worker.audit.dataset.row_table import RowTable
from gradcam_worker.audit.dataset.samples import Samples
from gradcam_worker.audit.dataset.statistics import READ_TIMEOUT_S, ReportProgress
from gradcam_worker.audit.report import (
    CAUSES,
    AuditReport,
    Basis,
    Cause,
    ClassReport,
    Confusion,
    DatasetFacts,
    HeatCells,
    Thresholds,
)
from gradcam_worker.errors import InvalidInput
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.storage.store import Store

PAIR_BITS = 24  # of a class code in a key of a pair; the cause has 3 more
CAUSE_BITS = 3


@dataclass(frozen=True)
class AuditOptions:
    """What an audit is to find.

    Attributes:
        thresholds: When a prediction counts as looking at the object.
        examples: How many rows are named for each cause of a class, and for each confusion.
        max_confusions: How many confusions are listed.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    examples: int = 8
    max_confusions: int = 1000


@dataclass(frozen=True)
class Audit:
    """A report, and what is known of each record.

    Attributes:
        report: The report.
        causes: Of each record of the dataset: an index into `CAUSES`, -1 where it is no prediction.
        agreement: Likewise: agreement with the typical heat of its class, nan where it is not known.
    """

    report: AuditReport
    causes: NDArray[np.int8]
    agreement: NDArray[np.float32]


@dataclass
class _Judged:
    """What is counted of the predictions, once each is judged."""

    examples: int
    records: int
    causes: NDArray[np.int8] = field(init=False)  # of each record
    agreement: NDArray[np.float32] = field(init=False)
    by_class: KeyCounts = field(default_factory=KeyCounts)  # of class and cause
    by_pair: KeyCounts = field(default_factory=KeyCounts)  # of truth, predicted and cause
    right: ClassSums = field(default_factory=ClassSums)
    wrong: ClassSums = field(default_factory=ClassSums)
    true: ClassSums = field(default_factory=ClassSums)  # by the true class
    elsewhere: ClassSums = field(default_factory=ClassSums)
    unlabelled_elsewhere: ClassSums = field(default_factory=ClassSums)
    inside: ClassSums = field(default_factory=ClassSums)
    insides: ClassSums = field(default_factory=ClassSums)  # how many were added to `inside`
    at_border: ClassSums = field(default_factory=ClassSums)
    at_borders: ClassSums = field(default_factory=ClassSums)
    basis: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))
    class_rows: BestRows = field(init=False)
    pair_rows: BestRows = field(init=False)

    def __post_init__(self) -> None:
        self.causes = np.full(self.records, NONE, np.int8)
        self.agreement = np.full(self.records, np.nan, np.float32)
        self.class_rows, self.pair_rows = BestRows(self.examples), BestRows(self.examples)

    def add(self, part: NDArray[Any], agreement: NDArray[np.float32], thresholds: Thresholds) -> None:
        """Judge and count predictions."""
        codes = part["predicted"]
        place, basis = places(
            part["heat_inside"], part["inside_area"], part["at_border"], agreement, thresholds
        )
        found = causes(part["correct"], place)
        self.causes[part["record"]], self.agreement[part["record"]] = found, agreement
        self.basis += np.bincount(basis, minlength=len(self.basis))
        self.right.add(codes[part["correct"] == 1])
        self.wrong.add(codes[part["correct"] == 0])
        self.true.add(part["truth"])
        is_elsewhere = place == ELSEWHERE
        self.elsewhere.add(codes[is_elsewhere])
        self.unlabelled_elsewhere.add(codes[is_elsewhere & (part["correct"] == NONE)])
        for values, sums, counts in (
            (part["heat_inside"], self.inside, self.insides),
            (part["at_border"], self.at_border, self.at_borders),
        ):
            known = np.isfinite(values)
            sums.add(codes[known], values[known])
            counts.add(codes[known])
        keys = class_key(codes, found)
        self.by_class.add(keys)
        rows = part["row"], part["index"], part["probability"]
        self.class_rows.add(keys, *rows)
        is_pair = (part["correct"] == 0) & (part["truth"] != NONE)
        pairs = pair_key(part["truth"], codes)[is_pair]
        self.by_pair.add(pairs << CAUSE_BITS | found[is_pair])
        self.pair_rows.add(pairs, *(column[is_pair] for column in rows))


def class_key(codes: NDArray[np.int32], found: NDArray[np.int8]) -> NDArray[np.int64]:
    """One number for a class and a cause."""
    return codes.astype(np.int64) << CAUSE_BITS | found


def pair_key(truth: NDArray[np.int32], predicted: NDArray[np.int32]) -> NDArray[np.int64]:
    """One number for a true and a predicted class."""
    return truth.astype(np.int64) << PAIR_BITS | predicted


def audit(
    store: Store,
    options: AuditOptions | None = None,
    report_progress: ReportProgress = lambda *_: None,
    *,
    table: RowTable | None = None,
    samples: Samples | None = None,
) -> Audit:
    """Audit a dataset.

    Args:
        store: Where the dataset is.
        options: What to find.
        report_progress: Is called after each file.
        table: Gets all records, for a page. It is left open.
        samples: Gets some images of each class, for what looks at single images.

    Returns:
        The report, and what is known of each record.

    Raises:
        InvalidInput: There is no dataset, a file is damaged, or all rows failed.
        StorageUnavailable: The dataset cannot be read.
    """
    chosen = options or AuditOptions()
    with PredictionFile() as predictions:
        read = read_dataset(store, predictions, table=table, samples=samples, report_progress=report_progress)
        if not read.explained:
            codes = ", ".join(f"{code} {count:,}" for code, count in read.error_codes.most_common(5))
            message = f"There is nothing to audit: each of the {read.rows:,} rows failed ({codes})."
            raise InvalidInput(message)
        judged = _Judged(chosen.examples, read.records)
        least = chosen.thresholds.typical_images - 1  # the image itself is left out
        for part in predictions.chunks():
            agreement = read.typical.agreement(part["predicted"], part["heat"], part["correct"] != 0, least)
            judged.add(part, agreement, chosen.thresholds)
    report = _report(store, read, judged, chosen)
    return Audit(report, judged.causes, judged.agreement)


def _report(store: Store, read: DatasetPass, judged: _Judged, options: AuditOptions) -> AuditReport:
    facts = DatasetFacts(
        uri=store.uri("data").removesuffix("/data"),
        rows=read.rows,
        explained=read.explained,
        unpredicted=read.explained - read.predictions.count,
        failed=read.error_codes.total(),
        codes=dict(sorted(read.error_codes.items())),
        explanations=read.records,
        labelled=read.labelled,
        accuracy=_share(read.right, read.labelled),
        located=read.located,
        complete=store.find("dataset.json", Deadline(READ_TIMEOUT_S)) is not None,
        **read.facts,
    )
    basis = Basis(
        regions=judged.basis[BY_REGIONS],
        typical_heat=judged.basis[BY_TYPICAL_HEAT],
        nothing=judged.basis[BY_NOTHING],
    )
    confusions = _confusions(read, judged)
    return AuditReport(
        generator=f"gradcam-worker {__version__}",
        dataset=facts,
        basis=basis,
        advice=tuple(advice(facts, basis, options.thresholds, read.columns.values())),
        thresholds=options.thresholds,
        columns=tuple(read.columns.values()),
        classes=tuple(_classes(read, judged)),
        confusions=tuple(confusions[: options.max_confusions]),
        confusions_left_out=max(len(confusions) - options.max_confusions, 0),
        files=tuple(read.files),
    )


def _counts_by_cause(keys: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[int, dict[Cause, int]]:
    """Counts of keys that end with a cause, for each key without it."""
    found: dict[int, dict[Cause, int]] = {}
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        by_cause = found.setdefault(key >> CAUSE_BITS, dict.fromkeys(CAUSES, 0))
        by_cause[CAUSES[key & (1 << CAUSE_BITS) - 1]] = count
    return found


def _classes(read: DatasetPass, judged: _Judged) -> list[ClassReport]:
    """The report of each class, those with the most to learn first."""
    size = len(read.classes)
    by_cause = _counts_by_cause(*judged.by_class.totals())
    images, truths, missed, right, wrong, elsewhere, unlabelled_elsewhere = (
        sums.of(size).astype(np.int64).tolist()
        for sums in (
            read.images,
            read.truths,
            read.missed,
            judged.right,
            judged.wrong,
            judged.elsewhere,
            judged.unlabelled_elsewhere,
        )
    )
    probability = read.probability.of(size)
    inside, at_border = (
        _means(sums.of(size), counts.of(size))
        for sums, counts in ((judged.inside, judged.insides), (judged.at_border, judged.at_borders))
    )
    classes = []
    for code, class_id in enumerate(read.classes.ids):
        found = by_cause.get(code, dict.fromkeys(CAUSES, 0))
        predicted = sum(found.values())
        wnid, name = read.names.get(code, ("", ""))
        bad = found["wrong_reason"] + wrong[code] + missed[code] + unlabelled_elsewhere[code]
        report = ClassReport(
            id=class_id,
            wnid=wnid,
            name=name,
            images=images[code],
            predicted=predicted,
            truths=truths[code],
            right=right[code],
            missed=missed[code],
            accuracy=_share(truths[code] - missed[code], truths[code]),
            precision=_share(right[code], right[code] + wrong[code]),
            probability=_share(float(probability[code]), images[code]),
            causes=found,
            elsewhere=elsewhere[code],
            typical_heat=None if (typical := read.typical.mean(code)) is None else HeatCells.of(typical),
            mean_heat_inside=inside[code],
            mean_heat_at_border=at_border[code],
            to_learn=to_learn(bad, predicted + missed[code]),
            examples={
                cause: rows
                for cause in CAUSES
                if (rows := judged.class_rows.of(code << CAUSE_BITS | CODES[cause]))
            },
        )
        classes.append(report)
    return sorted(classes, key=lambda one: (-one.to_learn, -one.predicted, -one.images, one.id))


def _confusions(read: DatasetPass, judged: _Judged) -> list[Confusion]:
    """All pairs of a true and another predicted class, those with the most to learn first."""
    ids = read.classes.ids
    true = judged.true.of(len(ids)).tolist()
    confusions = []
    for pair, found in _counts_by_cause(*judged.by_pair.totals()).items():
        truth, predicted = pair >> PAIR_BITS, pair & ((1 << PAIR_BITS) - 1)
        images = sum(found.values())
        confusions.append(
            Confusion(
                truth=ids[truth],
                predicted=ids[predicted],
                images=images,
                share=images / true[truth],
                causes=found,
                to_learn=to_learn(images, true[truth]),
                examples=judged.pair_rows.of(pair),
            )
        )
    return sorted(confusions, key=lambda one: (-one.to_learn, -one.images, one.truth, one.predicted))


def _share(part: float, count: int) -> float | None:
    return round(part / count, 6) if count else None


def _means(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> list[float | None]:
    return [_share(part, int(count)) for part, count in zip(sums.tolist(), counts.tolist(), strict=True)]
