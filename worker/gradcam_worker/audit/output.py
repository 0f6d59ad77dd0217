"""The folder of an audit: the report, its page, and what the page reads."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradcam_worker.audit.dataset.row_table import MORE_FILE, RowTable
from gradcam_worker.audit.dataset.samples import Samples
from gradcam_worker.audit.dataset.statistics import ReportProgress, file_names, open_dataset
from gradcam_worker.audit.pages.page import PageOptions, PageSummary, write_page
from gradcam_worker.audit.report import AuditReport
from gradcam_worker.audit.run import AuditOptions, audit
from gradcam_worker.audit.shortcuts.clusters import GazeMap
from gradcam_worker.audit.shortcuts.gaze import GazeOptions, add_gaze
from gradcam_worker.extras import required
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.images.fetch import UriFetcher
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import FolderStore

REPORT = "report.json"


@dataclass(frozen=True)
class WrittenAudit:
    """A report, and the page beside it, if one was asked for."""

    report: AuditReport
    page: PageSummary | None


def write_audit(
    dataset: str,
    output: Path,
    options: AuditOptions,
    settings: Settings,
    report_progress: ReportProgress = lambda *_: None,
    page: PageOptions | None = None,
    gaze: GazeOptions | None = None,
) -> WrittenAudit:
    """Audit a dataset, and write what was found.

    Args:
        dataset: A folder, or s3://bucket/prefix.
        output: The folder to write into.
        options: What to find.
        settings: How buckets are read, and which images may be fetched.
        report_progress: Is called after each file, and each image of the page.
        page: What the page holds; None: there is none.
        gaze: How to look for clusters and shortcuts; None: not at all.

    Returns:
        The report, and what the page holds.

    Raises:
        MissingExtra: scikit-learn is not installed, and shortcuts are looked for.
        InvalidInput: There is no dataset, a file is damaged, or all rows failed; links of the page would be
            valid for too long.
        StorageUnavailable: The dataset cannot be read, or the folder cannot be written.
    """
    s3 = S3(settings)
    store = open_dataset(dataset, s3)
    if gaze:
        with required("Looking for shortcuts", "audit"):
            import_module("sklearn")  # known at once, not after all files are read
    file_names(store)  # no folder is made inside what is no dataset
    output.mkdir(parents=True, exist_ok=True)
    table, samples = RowTable(output), Samples() if gaze else None
    found = audit(store, options, report_progress, table=table, samples=samples)
    report = found.report
    columns: dict[str, NDArray[Any]] = {"cause": found.causes, "agreement": found.agreement}
    if gaze and samples:
        report, placed = add_gaze(report, [*samples.of_each_class()], gaze, report_progress)
        report = report.model_copy(update={"map": MORE_FILE})
        columns |= _map_columns(placed, len(found.causes))
    table.finish(columns)
    FolderStore(output).put(REPORT, report.to_json().encode(), "application/json")
    summary = None
    if page:
        images = UriFetcher(settings, s3)
        limits = Limits(
            settings.max_image_pixels, settings.max_image_side, convert_colors=settings.convert_colors
        )
        summary = write_page(
            output, report, store, images, limits, page, report_progress, sign=images.presigned_url
        )
    return WrittenAudit(report, summary)


def _map_columns(placed: GazeMap, records: int) -> dict[str, NDArray[Any]]:
    """Place and cluster of each record: nan and -1 where it is not in the samples."""
    x, y = np.full((2, records), np.nan, np.float32)
    x[placed.records], y[placed.records] = placed.xy.T
    cluster = np.full(records, -1, np.int32)
    cluster[placed.records] = placed.clusters
    return {"x": x, "y": y, "cluster": cluster}
