"""The folder of an audit: the report, its page, and what the page reads."""

from dataclasses import dataclass
from pathlib import Path

from gradcam_worker.audit.page import PageOptions, PageSummary, write_page
from gradcam_worker.audit.report import AuditReport
from gradcam_worker.audit.row_table import RowTable
from gradcam_worker.audit.run import AuditOptions, audit
from gradcam_worker.audit.statistics import ReportProgress, file_names, open_dataset
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
    output: Path | None,
    options: AuditOptions,
    settings: Settings,
    report_progress: ReportProgress = lambda *_: None,
    page: PageOptions | None = None,
) -> WrittenAudit:
    """Audit a dataset, and write what was found.

    Args:
        dataset: A folder, or s3://bucket/prefix.
        output: The folder to write into; None: nothing is written.
        options: What to find.
        settings: How buckets are read, and which images may be fetched.
        report_progress: Is called after each file, and each image of the page.
        page: What the page holds; None: there is none.

    Returns:
        The report, and what the page holds.

    Raises:
        InvalidInput: There is no dataset, a file is damaged, or all rows failed; links of the page would be
            valid for too long.
        StorageUnavailable: The dataset cannot be read, or the folder cannot be written.
    """
    s3 = S3(settings)
    store = open_dataset(dataset, s3)
    if output is None:
        return WrittenAudit(audit(store, options, report_progress).report, None)
    file_names(store)  # no folder is made inside what is no dataset
    output.mkdir(parents=True, exist_ok=True)
    table = RowTable(output)
    found = audit(store, options, report_progress, table=table)
    table.finish({"cause": found.causes, "agreement": found.agreement})
    FolderStore(output).put(REPORT, found.report.to_json().encode(), "application/json")
    summary = None
    if page:
        images = UriFetcher(settings, s3)
        limits = Limits(
            settings.max_image_pixels, settings.max_image_side, convert_colors=settings.convert_colors
        )
        summary = write_page(
            output, found.report, store, images, limits, page, report_progress, sign=images.presigned_url
        )
    return WrittenAudit(found.report, summary)
