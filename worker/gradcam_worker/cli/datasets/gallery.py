"""The command `gallery`: a backfill's dataset as an HTML page."""

from pathlib import Path

import click

from gradcam_worker.cli.options import classes_option
from gradcam_worker.operations.terminal import console
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted


@click.command()
@click.argument("dataset")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default="gallery.html",
    show_default=True,
    help="The HTML file to write.",
)
@classes_option("Classes to show: ids, wnids or names; may be repeated. [the ones predicted most often]")
@click.option(
    "--per-class",
    type=click.IntRange(1, 100),
    default=4,
    show_default=True,
    help="Number of most confident images of each class, and of least confident ones.",
)
@click.option(
    "--max-classes",
    type=click.IntRange(1, 500),
    default=50,
    show_default=True,
    help="Largest number of classes on the page.",
)
def gallery(
    dataset: str, output: Path, classes: tuple[str, ...] | None, per_class: int, max_classes: int
) -> int:
    """Make an HTML page of a backfill's dataset.

    DATASET is a folder or s3://bucket/prefix. For each class the page shows how often it was the top
    prediction, its mean heatmap, and the images with the most and the least confident predictions. Images
    are fetched from where they are, if the settings allow it, and embedded: the page is one file of at most
    20 MB.

    \b
    Example:
      gradcam gallery s3://results/cams
      gradcam gallery cams --classes Egyptian_cat,tabby --per-class 12 -o cats.html
    """
    from gradcam_worker.audit.pages.gallery import GalleryOptions, make

    options = GalleryOptions(classes, per_class, max_classes)
    with console.err.status("reading") as spinner:

        def report(what: str, done: int, of: int) -> None:
            spinner.update(f"{what}: {done:,} of {of:,}")

        page = make(dataset, output, options, Settings.from_environment(), report)
    if not page.complete:
        console.err.print("There is no dataset.json: the backfill is not complete, and rows are missing.")
    if page.missing:
        reasons = ", ".join(f"{code} {count:,}" for code, count in sorted(page.missing.items()))
        console.err.print(f"Images that could not be fetched, shown as heatmaps only: {reasons}.")
    size = f"{counted(page.classes, 'class', 'classes')}, {counted(page.pictures, 'image')}"
    size += f", {len(page.page) / 1e6:.1f} MB"
    console.out.print(console.plain(f"{output}: {size}"), soft_wrap=True)
    return 0
