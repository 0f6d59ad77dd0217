"""The command `compare`: what differs between two datasets of heatmaps."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gradcam_worker.cli.exit_codes import ExitCode
from gradcam_worker.cli.options import json_option
from gradcam_worker.operations.terminal import console
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

if TYPE_CHECKING:
    from gradcam_worker.audit.comparison.report import ComparisonReport

REPORT, PAGE = "comparison.json", "index.html"
SHOWN_CLASSES = 20  # on the terminal
SHOWN_DIGITS = 40  # of what differs


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"The folder to write {REPORT} and the page {PAGE} into.",
)
@json_option("Print the report as JSON.")
@click.option(
    "--pair",
    type=click.Choice(["auto", "sha256", "uri", "none"]),
    default="auto",
    show_default=True,
    help="By what an image of A is found in B. auto: by checksum or address, if half of the images are in "
    "both; none: compare the classes as groups of different images.",
)
@click.option(
    "--rows",
    type=click.Choice(["predicted", "true", "all"]),
    default="predicted",
    show_default=True,
    help="Which images count for a class: those that are predicted as it (in A or B), those whose true class "
    "it is, or all in which it was explained.",
)
@click.option(
    "--min-distance",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Least distance of a class's mean heatmaps that counts as moved: the share of the heat that lies "
    "elsewhere.",
)
@click.option(
    "--min-effect",
    type=click.FloatRange(0),
    default=0.5,
    show_default=True,
    help="Least effect of this distance, in standard deviations of single images.",
)
@click.option(
    "--min-inside",
    type=click.FloatRange(0, 1),
    default=0.15,
    show_default=True,
    help="Least change of the share of the heat inside boxes or masks that counts as moved.",
)
@click.option(
    "--false-discovery-rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Largest adjusted p-value of a class that moved.",
)
@click.option(
    "--min-images",
    type=click.IntRange(2),
    default=10,
    show_default=True,
    help="Images of a class in each dataset, or pairs, below which it is not tested.",
)
@click.option(
    "--sample",
    type=click.IntRange(2, 100_000),
    default=400,
    show_default=True,
    help="Images of a class that are tested, at most; chosen by their checksums.",
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the tests.")
@click.option(
    "--images",
    type=click.IntRange(0, 1000),
    default=48,
    show_default=True,
    help="How many of the images that changed most are listed.",
)
@click.option(
    "--across-methods", is_flag=True, help="Compare the heat of different methods, too. [they are refused]"
)
@click.option(
    "--fail-if",
    "conditions",
    metavar="CONDITION",
    multiple=True,
    help=f"Exit with {ExitCode.CONDITION_MET.value} if this is so, as in 'moved > 3'; may be repeated.",
)
@click.option(
    "--metrics",
    "metrics_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the figures as gauges for the textfile collector of Prometheus's node exporter.",
)
@click.option(
    "--log",
    "log_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Append the figures to this file, as a line of JSON.",
)
@click.option("--name", help="Of this comparison, in the gauges and the log. [the network of B]")
def compare(
    a: str,
    b: str,
    *,
    output: Path | None,
    as_json: bool,
    conditions: tuple[str, ...],
    metrics_file: Path | None,
    log_file: Path | None,
    name: str | None,
    **chosen: object,
) -> int:
    """Compare two datasets of heatmaps: two networks, two weights, or two months.

    A and B are folders or s3://bucket/prefix that backfills have written, over the same images or over
    others. It finds the classes whose heat moved: further than --min-distance, and not by chance, by a
    permutation test that is corrected for the number of classes; and the images that changed most.

    \b
    Example:
      gradcam compare s3://results/may s3://results/june -o drift
      gradcam compare cams/v1 cams/v2 --fail-if 'moved > 3 or heat_inside_change < -0.05'
    """
    from gradcam_worker.audit.comparison.compare import ComparisonOptions
    from gradcam_worker.audit.comparison.compare import compare as compare_datasets
    from gradcam_worker.audit.comparison.conditions import Condition
    from gradcam_worker.audit.comparison.drift import append_line, gauges, log_line, write_gauges
    from gradcam_worker.audit.comparison.page import comparison_page
    from gradcam_worker.audit.comparison.report import FIGURES, CheckedCondition, ComparisonThresholds
    from gradcam_worker.audit.dataset.statistics import open_dataset
    from gradcam_worker.gradcam.decoding.decode import Limits
    from gradcam_worker.images.fetch import UriFetcher
    from gradcam_worker.storage.s3 import S3
    from gradcam_worker.storage.stores import FolderStore

    parsed = [Condition.parse(text, FIGURES) for text in conditions]
    options = ComparisonOptions(
        ComparisonThresholds.model_validate(
            {
                "false_discovery_rate": chosen["false_discovery_rate"],
                "distance": chosen["min_distance"],
                "effect": chosen["min_effect"],
                "inside": chosen["min_inside"],
                **{field: chosen[field] for field in ("min_images", "sample", "rows", "seed")},
            }
        ),
        **{field: chosen[field] for field in ("pair", "across_methods", "images")},  # type: ignore[arg-type]  # click
    )
    with console.err.status("reading") as spinner:

        def report_progress(what: str, done: int, of: int) -> None:
            spinner.update(f"{what}: {done:,} of {of:,}")

        settings = Settings.from_environment()
        s3 = S3(settings)
        report = compare_datasets(open_dataset(a, s3), open_dataset(b, s3), options, report_progress)
    checked = [CheckedCondition(condition=one.text, met=one.is_met(report.figures)) for one in parsed]
    report = report.model_copy(update={"conditions": tuple(checked)})
    at_s, name = time.time(), name or report.b.network
    if output:
        sizes = settings.max_image_pixels, settings.max_image_side
        limits = Limits(*sizes, convert_colors=settings.convert_colors)
        page = comparison_page(report, UriFetcher(settings, s3), limits)
        FolderStore(output).put(REPORT, report.to_json().encode(), "application/json")
        FolderStore(output).put(PAGE, page.page, "text/html")
        if page.missing:
            reasons = ", ".join(f"{code} {count:,}" for code, count in sorted(page.missing.items()))
            told = f"Images that could not be fetched, shown as heatmaps only: {reasons}."
            console.err.print(console.plain(told), soft_wrap=True)
    if metrics_file:
        write_gauges(metrics_file, gauges(report, name, at_s))
    if log_file:
        append_line(log_file, log_line(report, name, console.time_text(at_s)))
    if as_json:
        console.print_json(report.model_dump(mode="json", by_alias=True))
    else:
        _show(report)
    met = [one.condition for one in checked if one.met]
    for text in met:
        console.err.print(console.plain(f"--fail-if is met: {text}", "red"), soft_wrap=True)
    return ExitCode.CONDITION_MET if met else ExitCode.SUCCESS


def _show(report: "ComparisonReport") -> None:
    """Print the figures, and the classes that moved."""
    figures = report.figures
    for difference in report.differences:
        values = [str(value)[:SHOWN_DIGITS] for value in (difference.a, difference.b)]
        told = f"{difference.what}: {values[0]} in A, {values[1]} in B"
        console.out.print(console.plain(told), soft_wrap=True)
    for remark in report.remarks:
        console.out.print(console.plain(remark, "yellow"), soft_wrap=True)
    moved = [one for one in report.classes if one.moved_by]
    compared = counted(len(report.classes), "class", "classes")
    pairs = f"{report.pairing.in_both:,} images in both" if report.pairing.by else "different images"
    told = f"{compared} compared, {len(report.left_out):,} left out, {pairs}: {len(moved):,} moved"
    console.out.print(console.plain(told), soft_wrap=True)
    if figures["predictions_changed"] is not None:
        changed = f"{figures['predictions_changed']:.1%} of the predictions changed"
        console.out.print(console.plain(changed), soft_wrap=True)
    if not moved:
        return
    numbers = ("distance", "by chance", "inside A", "inside B", "images", "q")
    rows = console.table("class", *numbers, numbers=numbers)
    for one in moved[:SHOWN_CLASSES]:
        q = min([one.heat.q, *([one.heat_inside.q] if one.heat_inside else [])])
        inside = ["" if side.heat_inside is None else f"{side.heat_inside:.0%}" for side in (one.a, one.b)]
        cells = (
            f"{one.heat.change:.2f}",
            f"{one.heat.by_chance:.2f}",
            *inside,
            f"{one.tested:,}",
            f"{q:.1g}",
        )
        rows.add_row(console.plain(one.name or one.wnid or str(one.a.id)), *cells)
    console.out.print(rows)
    if len(moved) > SHOWN_CLASSES:
        console.out.print(f"and {counted(len(moved) - SHOWN_CLASSES, 'class', 'classes')} more")
