"""Audits with a page, for tests."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradcam_worker.audit import run
from gradcam_worker.audit.dataset.row_table import RowTable
from gradcam_worker.audit.pages.page import PageOptions, PageSummary, write_page
from gradcam_worker.audit.report import AuditReport
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.storage.store import Store
from gradcam_worker.testing import MemoryImageFetcher


def audited(store: Store, output: Path, **changes: Any) -> AuditReport:
    """Audit a dataset, and write the table of its rows."""
    table = RowTable(output)
    found = run.audit(store, table=table)
    table.finish({"cause": found.causes, "agreement": found.agreement})
    return found.report.model_copy(update=changes)


def page_of(
    store: Store,
    output: Path,
    images: Mapping[str, bytes],
    *,
    options: PageOptions | None = None,
    sign: Callable[[str, int], str | None] = lambda *_: None,
    **changes: Any,
) -> PageSummary:
    """Audit a dataset, and write its page."""
    output.mkdir(parents=True, exist_ok=True)
    report = audited(store, output, **changes)
    return write_page(output, report, store, MemoryImageFetcher(images), Limits(), options, sign=sign)
