"""The command `audit`: where a network looks in the wrong place, from a backfill's dataset."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gradcam_worker.cli.datasets.export import export
from gradcam_worker.cli.options import (
    GroupWithRun,
    RunCommand,
    json_option,
    parse_duration,
    parse_named,
)
from gradcam_worker.operations.terminal import console
from gradcam_worker.settings import Settings

if TYPE_CHECKING:
    from gradcam_worker.audit.pages.page import PageOptions
    from gradcam_worker.audit.shortcuts.gaze import GazeOptions

SHARE = click.FloatRange(0, 1)
FACTOR = click.FloatRange(0)
URL = re.compile(r"https?://|\.{0,2}/")  # of the web, or relative to the page


def _parse_image_urls(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    urls = parse_named(context, option, values)
    for url in urls.values():
        if not URL.match(url):
            message = f"{url!r} is no URL: write s3://photos/=https://photos.example/"
            raise click.BadParameter(message, param=option)
    return urls


@click.group(cls=GroupWithRun)
def audit() -> None:
    """Find where a network looks in the wrong place."""


@audit.command(cls=RunCommand)
@click.argument("dataset")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="The folder to write the report and its page into.  [audit, inside DATASET if that is a folder]",
)
@json_option("Print the report as JSON.")
@click.option("--lines", type=click.IntRange(1), default=10, show_default=True, help="Of each table.")
@click.option(
    "--inside",
    type=SHARE,
    default=0.5,
    show_default=True,
    help="With boxes or masks: the share of the heat within them that is looking at the object.",
)
@click.option(
    "--over-chance",
    type=FACTOR,
    default=2.0,
    show_default=True,
    help="Or how many times their share of the image it is at least: for small objects.",
)
@click.option(
    "--largest-region",
    type=SHARE,
    default=0.67,
    show_default=True,
    help="Boxes and masks that cover more of the image tell nothing.",
)
@click.option(
    "--at-border",
    type=SHARE,
    default=0.5,
    show_default=True,
    help="Without boxes: the share of the heat at the border of the image that is looking elsewhere.",
)
@click.option(
    "--agreement",
    type=FACTOR,
    default=0.3,
    show_default=True,
    help="Without boxes: less agreement with the typical heat of the class is looking elsewhere; 1 is what "
    "its images have on average.",
)
@click.option(
    "--pictures",
    type=click.IntRange(0, 5000),
    default=600,
    show_default=True,
    help="Number of images to embed in the page, at most.",
)
@click.option(
    "--image-links",
    type=click.IntRange(0, 1_000_000),
    default=0,
    show_default=True,
    help="Number of images on S3 that get a link in the page, those with the most to learn first. Whoever "
    "has the page can see them until the links expire.",
)
@click.option(
    "--links-expire",
    default="24h",
    show_default=True,
    callback=parse_duration,
    help="How long links to images and to a dataset on S3 are valid: 2h, 7d at most.",
)
@click.option(
    "--image-url",
    "image_urls",
    metavar="PREFIX=URL",
    multiple=True,
    callback=_parse_image_urls,
    help="Where browsers find images whose URI begins with PREFIX; may be repeated.",
)
@click.option("--no-page", is_flag=True, help="Write no page.")
@click.option(
    "--shortcuts/--no-shortcuts",
    default=True,
    help="Look for clusters and shortcuts, in a sample of each class.",
)
@click.option(
    "--trial/--no-trial",
    default=True,
    help="Load the network, and mask what may be a shortcut: only what has an effect is named one.",
)
@click.option(
    "--trial-images",
    type=click.IntRange(8, 1000),
    default=40,
    show_default=True,
    help="Images of each suspect that are masked.",
)
@click.option(
    "--min-effect",
    type=SHARE,
    default=0.02,
    show_default=True,
    help="Least fall of the probability, beyond that by masking elsewhere, of what is named a shortcut.",
)
def run(dataset: str, output: Path | None, lines: int, *, as_json: bool, **options: Any) -> int:
    """Find where a network looks in the wrong place.

    DATASET is a folder or s3://bucket/prefix that a backfill has written. For each class, and for each pair
    of classes that are taken for each other, the report says how many images are right for the right reason,
    right for the wrong reason, wrong though looking at the object, and wrong and looking elsewhere. What
    there is most to learn from comes first. Of each class, groups of images that look at the same are found;
    what only one class looks at, apart from the object, is masked in some images, and is named a shortcut if
    the network needs it. That takes the network itself, and the extra cpu or gpu.

    \b
    Example:
      gradcam audit s3://results/cams -o audit
      gradcam audit cams --inside 0.7 --json
    """
    from gradcam_worker.audit.output import write_audit
    from gradcam_worker.audit.report import Thresholds
    from gradcam_worker.audit.run import AuditOptions
    from gradcam_worker.operations.terminal.audit_console import show_audit, show_page

    is_folder = "://" not in dataset
    folder = output or (Path(dataset) / "audit" if is_folder else Path("audit"))
    with console.err.status("reading") as spinner:

        def report_progress(what: str, done: int, of: int) -> None:
            spinner.update(f"{what}: {done:,} of {of:,}")

        settings = Settings.from_environment()
        written = write_audit(
            dataset,
            folder,
            AuditOptions(Thresholds.model_validate(options)),
            settings,
            report_progress,
            None if options["no_page"] else _page_options(options),
            _gaze_options(options, settings) if options["shortcuts"] else None,
        )
    report = written.report
    if as_json:
        console.print_json(report.model_dump(mode="json"))
        return 0
    show_audit(report, lines)
    console.out.print()
    show_page(written.page)
    console.out.print(console.plain(f"Report: {folder}"), soft_wrap=True)
    return 0


def _page_options(options: Mapping[str, Any]) -> "PageOptions":
    from gradcam_worker.audit.pages.page import PageOptions

    expires_s = int(options["links_expire"])
    return PageOptions(options["pictures"], options["image_links"], expires_s, options["image_urls"])


def _gaze_options(options: Mapping[str, Any], settings: Settings) -> "GazeOptions":
    from gradcam_worker.audit.shortcuts.gaze import GazeOptions
    from gradcam_worker.operations.trial_network import open_trial_network

    open_network = partial(open_trial_network, settings) if options["trial"] else None
    return GazeOptions(open_network, images=options["trial_images"], min_effect=options["min_effect"])


audit.add_command(export)
