"""The command that shows a backfill's dataset: gallery."""

from pathlib import Path

import click

from gradcam_worker.operations import console
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
    help="The page.",
)
@click.option(
    "--classes",
    metavar="A,B,...",
    multiple=True,
    callback=console.comma_list,
    help="Ids, wnids or names; as often as wanted. [those that came first most often]",
)
@click.option("--per-class", type=click.IntRange(1, 100), default=4, show_default=True)
@click.option("--max-classes", type=click.IntRange(1, 500), default=50, show_default=True)
def gallery(
    dataset: str, output: Path, classes: tuple[str, ...] | None, per_class: int, max_classes: int
) -> int:
    """Make one HTML page of DATASET, a backfill's output: a folder, or s3://bucket/prefix.

    Of each class it shows how often it came first, its mean heatmap, and the PER_CLASS images of which the
    network was most and least confident. Images are fetched as the settings allow and become part of the
    page, which needs nothing else and has at most 20 MB.

    \b
    Examples:
      gradcam gallery s3://results/cams
      gradcam gallery cams --classes Egyptian_cat,tabby --per-class 12 -o cats.html
    """
    from gradcam_worker.audit.gallery import GalleryOptions, make

    options = GalleryOptions(classes, per_class, max_classes)
    with console.err.status("reading") as status:

        def report(what: str, done: int, of: int) -> None:
            status.update(f"{what}: {done:,} of {of:,}")

        made = make(dataset, output, options, Settings.from_environment(), report)
    if not made.complete:
        console.err.print("There is no dataset.json: the backfill has not ended, and rows are missing.")
    if made.missing:
        why = ", ".join(f"{code} {count:,}" for code, count in sorted(made.missing.items()))
        console.err.print(f"Images that cannot be had any more, shown as heatmaps alone: {why}.")
    size = f"{counted(made.classes, 'class', 'classes')}, {counted(made.pictures, 'picture')}"
    size += f", {len(made.page) / 1e6:.1f} MB"
    console.out.print(console.plain(f"{output}: {size}"), soft_wrap=True)
    return 0
