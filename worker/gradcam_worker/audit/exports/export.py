"""Exports a dataset into a folder, in the format of another tool."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gradcam_worker.audit.dataset.statistics import ReportProgress, open_dataset
from gradcam_worker.audit.exports import coco, fiftyone, hugging_face, label_studio, mlflow_run, wandb_table
from gradcam_worker.audit.exports.source import ExportSource
from gradcam_worker.errors import InvalidInput
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import FolderStore

FORMATS: Mapping[str, Callable[[ExportSource], Iterator[tuple[str, bytes]]]] = {
    "fiftyone": fiftyone.files,
    "coco": coco.files,
    "labelstudio": label_studio.files,
    "huggingface": hugging_face.files,
    "mlflow": mlflow_run.files,
    "wandb": wandb_table.files,
}
DEFAULT_LIMIT = 50_000  # images whose facts are held in memory: 2 kB each


@dataclass(frozen=True)
class ExportSummary:
    """What an export has written."""

    files: int
    images: int | None  # None: the format takes no single images
    cut: bool  # the dataset has more images than the limit


def export(
    dataset: str,
    to: str,
    output: Path,
    settings: Settings,
    limit: int = DEFAULT_LIMIT,
    report_progress: ReportProgress = lambda *_: None,
) -> ExportSummary:
    """Export a dataset.

    Args:
        dataset: A folder, or s3://bucket/prefix.
        to: One of FORMATS.
        output: An empty folder, or one that is made.
        settings: How buckets are read.
        limit: The most images.
        report_progress: Is called after each file that is read.

    Returns:
        What was written.

    Raises:
        InvalidInput: There is no dataset, or the folder is not empty.
        StorageUnavailable: The dataset cannot be read, or the folder cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        message = f"{output} is there, and is no empty folder: choose another one."
        raise InvalidInput(message)
    source = ExportSource(
        open_dataset(dataset, S3(settings)), dataset, output.absolute(), limit, report_progress
    )
    folder, count = FolderStore(output), 0
    for name, data in FORMATS[to](source):
        folder.put(name, data, "application/octet-stream")
        count += 1
    return ExportSummary(count, source.read, source.cut)
