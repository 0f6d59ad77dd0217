"""Hugging Face: a dataset card beside the Parquet files, so that `datasets.load_dataset` reads the folder.

    README.md          the card: its front matter names the files
    data/*.parquet     as they are in the dataset

https://huggingface.co/docs/hub/datasets-manual-configuration
"""

from collections.abc import Iterator

from gradcam_worker.audit.dataset.statistics import read_files
from gradcam_worker.audit.exports.source import ExportSource
from gradcam_worker.audit.report import CAUSE_TEXTS, CAUSES, AuditReport
from gradcam_worker.text.visible import counted

SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
LARGEST = "1M<n<10M"
MAX_CLASSES = 50  # that the card lists


def files(source: ExportSource) -> Iterator[tuple[str, bytes]]:
    """The files of the export. The limit does not count: all files are copied.

    Args:
        source: The dataset.

    Yields:
        Name and content of each file.
    """
    yield "README.md", _card(source.report, source.name).encode()
    yield from read_files(source.store, source.report_progress)


def _card(report: AuditReport, name: str) -> str:
    facts = report.dataset
    size = next((text for most, text in SIZES if facts.explanations < most), LARGEST)
    front = [
        "---",
        "task_categories:",
        "- image-classification",
        "tags:",
        "- grad-cam",
        "- explainability",
        "size_categories:",
        f"- {size}",
        "configs:",
        "- config_name: default",
        "  data_files: data/*.parquet",
        "---",
    ]
    causes = {cause: sum(one.causes.get(cause, 0) for one in report.classes) for cause in CAUSES}
    classes = [
        f"| {one.id} | {_cell(one.name)} | {one.predicted:,} | {one.elsewhere:,} |"
        for one in report.classes[:MAX_CLASSES]
    ]
    method, failed = facts.method.get("name", "gradcam"), counted(facts.failed, "image")
    images = f"{counted(facts.explained, 'image')}, {facts.explanations:,} in all"
    text = (
        f"Heatmaps of {images}, at layer {facts.layer}, by {method}; {failed} failed. Exported from {name} "
        f"by {report.generator}. Each row is one explained class of one image; `heatmap` has {facts.grid[0]} "
        f"times {facts.grid[1]} cells, row by row."
    )
    return "\n".join(
        [
            *front,
            f"# Where {facts.network} looks",
            "",
            text,
            "",
            "| predictions | images |",
            "|---|---|",
            *(f"| {CAUSE_TEXTS[cause]} | {count:,} |" for cause, count in causes.items()),
            "",
            "| class | name | predicted | looking elsewhere |",
            "|---|---|---|---|",
            *classes,
            "",
            "## Columns",
            "",
            "| column | type |",
            "|---|---|",
            *(f"| `{_cell(one.name)}` | {_cell(one.type)} |" for one in report.columns),
            "",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
