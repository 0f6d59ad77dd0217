"""What an export is made of."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gradcam_worker.audit.dataset.statistics import ReportProgress
from gradcam_worker.audit.exports.images import ExportedImage, read_images
from gradcam_worker.audit.report import AuditReport
from gradcam_worker.audit.run import AuditOptions, audit
from gradcam_worker.storage.store import Store


@dataclass
class ExportSource:
    """A dataset that is exported."""

    store: Store
    name: str  # of the dataset, as it was asked for
    output: Path  # absolute
    limit: int  # the most images
    report_progress: ReportProgress
    read: int | None = None  # images so far
    cut: bool = False  # there are more than `limit`

    def images(self) -> Iterator[ExportedImage]:
        """Read the images, as `read_images`."""
        self.read = 0
        for image in read_images(self.store, self.limit + 1, self.report_progress):
            if self.read == self.limit:
                self.cut = True
                return
            self.read += 1
            yield image

    @cached_property
    def report(self) -> AuditReport:
        """The audit of the whole dataset."""
        return audit(self.store, AuditOptions(), self.report_progress).report


def as_json(value: Any) -> bytes:
    """Encode JSON. What a column of the input may hold and JSON cannot, such as a date, becomes text.

    Numbers that are not finite become null.
    """
    try:
        return _dumps(value)
    except ValueError:
        return _dumps(_finite(value))


def _dumps(value: Any) -> bytes:
    return json.dumps(value, indent=1, default=str, ensure_ascii=False, allow_nan=False).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
