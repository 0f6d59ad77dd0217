"""An audit of a dataset: one pass over its files, and the report.

`gradcam_worker.audit.report` has the format.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradcam_worker import __version__
from gradcam_worker.artifacts.dataset import read_batches, read_summary
from gradcam_worker.audit.report import (
    CAUSES,
    AuditReport,
    Basis,
    ClassReport,
    DataFile,
    DatasetFacts,
    Thresholds,
)
from gradcam_worker.audit.statistics import EXPECTED_FORMAT, READ_TIMEOUT_S, ReportProgress, read_files
from gradcam_worker.errors import InvalidInput, StorageUnavailable
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.storage.store import Store

REPORT = "report.json"


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


@dataclass
class _Class:
    wnid: str
    name: str
    images: int = 0
    predicted: int = 0
    probability: float = 0


@dataclass
class _Pass:
    """What one pass over the files counts."""

    rows: int = 0
    explained: int = 0
    explanations: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    classes: dict[int, _Class] = field(default_factory=dict)
    files: list[DataFile] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def audit(
    store: Store,
    options: AuditOptions | None = None,
    report_progress: ReportProgress = lambda *_: None,
) -> AuditReport:
    """Audit a dataset.

    Args:
        store: Where the dataset is.
        options: What to find.
        report_progress: Is called after each file.

    Returns:
        The report.

    Raises:
        InvalidInput: There is no dataset, or a file is damaged.
        StorageUnavailable: The dataset cannot be read.
    """
    chosen = options or AuditOptions()
    read = _Pass()
    for name, data in read_files(store, report_progress):
        try:
            _read_file(read, name, data)
        except (StorageUnavailable, KeyError, TypeError, ValueError) as error:
            message = f"{store.uri(name)} is no part of a dataset: {error} {EXPECTED_FORMAT}"
            raise InvalidInput(message) from error
    return AuditReport(
        generator=f"gradcam-worker {__version__}",
        dataset=DatasetFacts(
            uri=store.uri("data").removesuffix("/data"),
            rows=read.rows,
            explained=read.explained,
            failed=read.codes.total(),
            codes=dict(sorted(read.codes.items())),
            explanations=read.explanations,
            labelled=0,
            located=0,
            complete=store.find("dataset.json", Deadline(READ_TIMEOUT_S)) is not None,
            **read.facts,
        ),
        basis=Basis(),
        advice=(),
        thresholds=chosen.thresholds,
        columns=(),
        classes=tuple(_class_report(class_id, one) for class_id, one in sorted(read.classes.items())),
        confusions=(),
        files=tuple(read.files),
    )


def _read_file(read: _Pass, name: str, data: bytes) -> None:
    summary = read_summary(data)
    read.rows += summary.rows
    read.codes.update(summary.codes)
    records = 0
    for batch in read_batches(data):
        records += len(batch.class_ids)
        read.explained += int((batch.ranks == 1).sum())
        read.facts = {
            "network": summary.network.name,
            "layer": summary.network.layer,
            "weights_sha256": summary.network.weights_sha256,
            "method": {"name": batch.method.name, **batch.method.model_dump(mode="json")},
            "grid": batch.heatmaps.shape[1:],
        }
        for class_id in np.unique(batch.class_ids).tolist():
            members = np.flatnonzero(batch.class_ids == class_id)
            if class_id not in read.classes:
                record = batch.record(int(members[0]))
                read.classes[class_id] = _Class(str(record["wnid"] or ""), str(record["class_name"] or ""))
            known = read.classes[class_id]
            known.images += len(members)
            known.predicted += int((batch.ranks[members] == 1).sum())
            known.probability += float(batch.probabilities[members].sum())
    read.explanations += records
    read.files.append(DataFile(name=name, rows=records, first=None, last=None, bytes=len(data)))


def _class_report(class_id: int, known: _Class) -> ClassReport:
    return ClassReport(
        id=class_id,
        wnid=known.wnid,
        name=known.name,
        images=known.images,
        predicted=known.predicted,
        truths=0,
        right=0,
        missed=0,
        accuracy=None,
        precision=None,
        probability=known.probability / max(known.images, 1),
        causes=dict.fromkeys(CAUSES, 0) | {"unknown": known.predicted},
        elsewhere=0,
        typical_heat=None,
        mean_heat_inside=None,
        mean_heat_at_border=None,
        to_learn=0,
    )
