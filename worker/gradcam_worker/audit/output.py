"""The folder of an audit: the report, and what its page reads."""

from pathlib import Path

from gradcam_worker.audit.report import AuditReport
from gradcam_worker.audit.row_table import RowTable
from gradcam_worker.audit.run import AuditOptions, audit
from gradcam_worker.audit.statistics import ReportProgress, file_names, open_dataset
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import FolderStore

REPORT = "report.json"


def write_audit(
    dataset: str,
    output: Path | None,
    options: AuditOptions,
    settings: Settings,
    report_progress: ReportProgress = lambda *_: None,
) -> AuditReport:
    """Audit a dataset, and write what was found.

    Args:
        dataset: A folder, or s3://bucket/prefix.
        output: The folder to write into; None: nothing is written.
        options: What to find.
        settings: How buckets are read.
        report_progress: Is called after each file.

    Returns:
        The report.

    Raises:
        InvalidInput: There is no dataset, a file is damaged, or all rows failed.
        StorageUnavailable: The dataset cannot be read, or the folder cannot be written.
    """
    store = open_dataset(dataset, S3(settings))
    if output is None:
        return audit(store, options, report_progress).report
    file_names(store)  # no folder is made inside what is no dataset
    output.mkdir(parents=True, exist_ok=True)
    table = RowTable(output)
    found = audit(store, options, report_progress, table=table)
    table.finish({"cause": found.causes, "agreement": found.agreement})
    FolderStore(output).put(REPORT, found.report.to_json().encode(), "application/json")
    return found.report
