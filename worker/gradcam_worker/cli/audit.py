"""The command `audit`: where a network looks in the wrong place, from a backfill's dataset."""

from pathlib import Path

import click

from gradcam_worker.cli.options import json_option
from gradcam_worker.operations import console
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted


@click.command()
@click.argument("dataset")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder to write the report into.",
)
@json_option("Print the report as JSON.")
def audit(dataset: str, output: Path | None, *, as_json: bool) -> int:
    """Find where a network looks in the wrong place.

    DATASET is a folder or s3://bucket/prefix that a backfill has written.

    \b
    Example:
      gradcam audit s3://results/cams -o audit
    """
    from gradcam_worker.audit.run import REPORT, AuditOptions
    from gradcam_worker.audit.run import audit as audit_dataset
    from gradcam_worker.audit.statistics import open_dataset
    from gradcam_worker.storage.s3 import S3
    from gradcam_worker.storage.stores import FolderStore

    with console.err.status("reading") as spinner:

        def report_progress(what: str, done: int, of: int) -> None:
            spinner.update(f"{what}: {done:,} of {of:,}")

        store = open_dataset(dataset, S3(Settings.from_environment()))
        report = audit_dataset(store, AuditOptions(), report_progress)
    if output:
        FolderStore(output).put(REPORT, report.to_json().encode(), "application/json")
    if as_json:
        console.print_json(report.model_dump(mode="json"))
        return 0
    told = f"{counted(report.dataset.explained, 'image')}, {counted(len(report.classes), 'class', 'classes')}"
    console.out.print(console.plain(told), soft_wrap=True)
    return 0
