"""The command `audit export`: a backfill's dataset in the format of another tool."""

from pathlib import Path

import click

from gradcam_worker.cli.options import json_option
from gradcam_worker.operations.terminal import console
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

FORMATS = ("fiftyone", "coco", "labelstudio", "huggingface", "mlflow", "wandb")


@click.command()
@click.argument("dataset")
@click.option("--to", "form", type=click.Choice(FORMATS), required=True, help="The tool that will read it.")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="An empty folder, or one that is made.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=50_000,
    show_default=True,
    help="The most images; huggingface and mlflow take all.",
)
@json_option()
def export(dataset: str, form: str, output: Path, limit: int, *, as_json: bool) -> int:
    """Write a dataset in the format of another tool.

    DATASET is a folder or s3://bucket/prefix that a backfill has written.

    \b
    Example:
      gradcam audit export s3://results/cams --to coco -o coco
      gradcam audit export cams --to fiftyone -o fiftyone --limit 5000
    """
    from gradcam_worker.audit.exports.export import export as export_dataset

    with console.err.status("reading") as spinner:

        def report_progress(what: str, done: int, of: int) -> None:
            spinner.update(f"{what}: {done:,} of {of:,}")

        written = export_dataset(dataset, form, output, Settings.from_environment(), limit, report_progress)
    if written.cut:
        console.err.print(f"The dataset has more than {limit:,} images: --limit takes more.")
    if as_json:
        console.print_json({"output": str(output), "format": form, **vars(written)})
        return 0
    images = f" of {counted(written.images, 'image')}" if written.images is not None else ""
    console.out.print(console.plain(f"{output}: {counted(written.files, 'file')}{images}"), soft_wrap=True)
    return 0
