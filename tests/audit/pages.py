"""Audits with a page, for tests: what an audit would find is counted here, plainly."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradcam_worker.artifacts.dataset import read_batches
from gradcam_worker.audit import run
from gradcam_worker.audit.page import PageOptions, PageSummary, write_page
from gradcam_worker.audit.report import CAUSES, AuditReport, ClassReport, Confusion, RowIndex
from gradcam_worker.audit.row_table import RowTable
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.storage.store import Store
from gradcam_worker.testing import MemoryImageFetcher

Record = dict[str, Any]


def audited(store: Store, output: Path, **changes: Any) -> AuditReport:
    """Write the table of rows of a dataset, and return a report with its causes, examples and confusions."""
    report = run.audit(store)
    table, records, files = RowTable(output), [], []
    for number, file in enumerate(report.files):
        rows: list[int] = []
        for batch in read_batches(store.get(file.name)):
            table.add(batch, number)
            records += batch.other_columns.to_pylist()
            rows += batch.other_columns["row"].to_pylist()
        files.append(
            file.model_copy(update={"first": min(rows, default=None), "last": max(rows, default=None)})
        )
    causes = [_cause(record) for record in records]
    table.finish({"cause": np.array(causes, np.int8)})
    for record, cause in zip(records, causes, strict=True):
        record["cause"] = cause
    first = [record for record in records if record["rank"] == 1]
    update = {
        "files": tuple(files),
        "classes": tuple(_class(one, first) for one in report.classes),
        "confusions": tuple(_confusions(first)),
        **changes,
    }
    return report.model_copy(update=update)


def page_of(
    store: Store,
    output: Path,
    images: Mapping[str, bytes],
    *,
    options: PageOptions | None = None,
    **changes: Any,
) -> PageSummary:
    """Audit a dataset, and write its page."""
    output.mkdir(parents=True, exist_ok=True)
    report = audited(store, output, **changes)
    return write_page(output, report, store, MemoryImageFetcher(images), Limits(), options)


def _cause(record: Record) -> int:
    if record.get("correct") is None:
        return CAUSES.index("unknown")
    is_inside = (record.get("heat_inside") or 0) >= 0.5
    return (0 if record["correct"] else 2) + (0 if is_inside else 1)


def _keys(records: list[Record]) -> tuple[RowIndex, ...]:
    return tuple((record["row"], record["index"]) for record in records)


def _class(one: ClassReport, first: list[Record]) -> ClassReport:
    own = [record for record in first if record["class_id"] == one.id]
    examples = {
        cause: _keys([record for record in own if record["cause"] == number])
        for number, cause in enumerate(CAUSES)
    }
    counts = {cause: len(rows) for cause, rows in examples.items()}
    found = {cause: rows for cause, rows in examples.items() if rows}
    return one.model_copy(update={"causes": counts, "examples": found})


def _confusions(first: list[Record]) -> list[Confusion]:
    pairs = defaultdict(list)
    for record in first:
        for truth in record.get("truth_ids") or ():
            if not record["correct"]:
                pairs[truth, record["class_id"]].append(record)
    return [
        Confusion(
            truth=truth,
            predicted=predicted,
            images=len(own),
            share=0.5,
            causes=dict.fromkeys(CAUSES, 0),
            to_learn=len(own),
            examples=_keys(own)[:4],
        )
        for (truth, predicted), own in sorted(pairs.items(), key=lambda item: -len(item[1]))
    ]
