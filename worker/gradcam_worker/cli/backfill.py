"""The commands about a backfill: backfill INPUT | backfill status OUTPUT | backfill cancel OUTPUT."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from gradcam_worker.cli import standing
from gradcam_worker.cli.jobs import _wish
from gradcam_worker.errors import InvalidJob, UnknownNetwork
from gradcam_worker.operations import console
from gradcam_worker.schemas.model import describe
from gradcam_worker.schemas.shard import MAX_ROWS, ROUTE
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

if TYPE_CHECKING:  # they are heavy
    from gradcam_worker.backfill.plan import Plan


def _share(_: click.Context, __: click.Parameter, text: str) -> float:
    """`50%` or `0.5` -> 0.5."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1
    if rest or not 0 <= share <= 1:
        message = f"{text!r} is no share: it must look like 50% or 0.5"
        raise click.BadParameter(message)
    return share


class _Context(click.Context):
    """The command that needs not be named is not named."""

    @property
    def command_path(self) -> str:
        """What its help and its errors call it."""
        return self.parent.command_path if self.parent else super().command_path


class _Run(click.Command):
    """Of artifacts a backfill leaves overlays alone."""

    context_class = _Context

    def __init__(self, *given: Any, **named: Any) -> None:
        """Its `--artifact` is `--overlays`."""
        super().__init__(*given, **named)
        overlays = click.Option(
            ["--overlays", "artifacts"], flag_value=("overlay",), default=(), help="A picture of each, too."
        )
        self.params = [overlays if one.name == "artifacts" else one for one in self.params]


class _Backfill(click.Group):
    """Whatever is no command of its own is the input of a backfill."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Group`."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group`."""
        return [name for name in super().list_commands(ctx) if name != "run"]


@click.group(cls=_Backfill)
def backfill() -> None:
    """Explain a long list of images: many to a message, one dataset as the result."""


@backfill.command(cls=_Run)
@click.argument("input_", metavar="INPUT")
@_wish
@click.option("--output", required=True, metavar="s3://...", help="Where the dataset is to be.")
@click.option("--shard-rows", type=click.IntRange(1, MAX_ROWS), default=256, show_default=True)
@click.option("--window", type=click.IntRange(1, 10_000), help="Shards in flight. [as the workers need them]")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Images a second that are handed out.")
@click.option(
    "--max-failed",
    default="50%",
    show_default=True,
    callback=_share,
    help="Stop early where more of the rows fail.",
)
@click.option("--resume", is_flag=True, help="Go on with it: what is done is not done again.")
@click.option("--only-failed", is_flag=True, help="Go on, and run again the rows that failed.")
@click.option("--changed", is_flag=True, help="Go on, and run again what has changed in input or weights.")
@click.option("--format", "form", default="auto", help="Of INPUT, where its name does not say it. [auto]")
@click.option("--column", help="Of the URIs, in INPUT.")
def run(
    input_: str,
    output: str,
    shard_rows: int,
    form: str,
    column: str | None,
    *,
    wish: dict[str, Any],
    resume: bool,
    as_json: bool,
    **pace: Any,
) -> int:
    """Explain every image of INPUT: a list (JSON Lines, CSV, Parquet, a URI a line), a folder,
    s3://bucket/prefix, or - for standard input.

    Progress goes to standard error, the result, or with --json progress too, to standard output. Ctrl-C
    stops at any moment, and --resume goes on. Exit code 1 where the dataset is not complete, or where
    more rows failed than --max-failed.

    `gradcam backfill status OUTPUT` says how far it is, `gradcam backfill cancel OUTPUT` stops it.

    \b
    Examples:
      gradcam backfill photos.csv --network vgg16 --top-n 3 --output s3://results/photos
      gradcam backfill s3://photos/2031/ --classes tabby,282 --overlays --output s3://results/cats
      gradcam backfill photos.csv --network vgg16 --top-n 3 --output s3://results/photos --resume
      gradcam backfill status s3://results/photos
    """
    from gradcam_worker.backfill.inputs.open import open_input
    from gradcam_worker.backfill.plan import shards
    from gradcam_worker.backfill.progress import RunOptions
    from gradcam_worker.backfill.registry import RedisBackfillRegistry
    from gradcam_worker.backfill.runner import BackfillRunner
    from gradcam_worker.ledger.redis.store import RedisLedger
    from gradcam_worker.operations.progress_bar import BackfillProgressBar, Counted, print_line, summary

    resume = resume or pace["only_failed"] or pace["changed"]
    settings = Settings.from_environment()
    place, ledger = standing.opened(output, settings), RedisLedger(settings)
    with open_input(input_, settings, form=form, column=column, output=place.uri) as rows:
        own = {"input": rows.shown, "output": place.uri, "shard_rows": shard_rows}
        asked = _plan(wish | own, settings)
        plan = place.agreed(asked, resume=resume, changed=pace["changed"])
        watched = Counted(rows)
        form = "json" if as_json else "terminal" if console.err.is_terminal else "lines"
        progress = BackfillProgressBar(form, watched.total)
        runs = BackfillRunner(
            plan,
            place,
            ledger,
            _ring(settings),
            RedisBackfillRegistry(ledger.server),
            pace=RunOptions(**pace),
            each=settings.shards,
            show=progress.show,
            say=progress.say,
        )
        try:
            with _stoppable(), runs.lease() as lease, progress:
                cut = shards(watched.rows(), plan, max_bytes=settings.max_message_bytes // 2)
                seal = runs.run(lease, cut)
        except KeyboardInterrupt:
            one = "shard is in flight, and comes to its end by itself; "
            more = "shards are in flight, and come to their end by themselves; "
            left = counted(len(runs.flights), one, more)
            console.err.print(f"Stopped. {left if runs.flights else ''}--resume goes on.", soft_wrap=True)
            return 130
        if skipped := rows.left_out():
            what = counted(skipped, "file there is", "files there are")
            progress.say(f"{what} a backfill's own, and no part of the input.")
    if as_json:
        said = seal or runs.standing.facts()
        print_line("complete" if seal else "incomplete", {"output": plan.output, **said})
    elif seal:
        summary(seal, plan.output)
    if not seal:
        lost = runs.standing.lost
        many = counted(lost, "shard")
        console.err.print(f"[red]Incomplete[/]: {many} failed as a whole; --resume tries again.")
        return 1
    if seal["failed"] == seal["rows"]:
        return 1  # which the summary has said
    if seal["failed"] > pace["max_failed"] * seal["rows"]:
        console.err.print(f"[red]More than {pace['max_failed']:.0%} of the rows have failed.[/]")
        return 1
    return 0


def _plan(wish: dict[str, Any], settings: Settings) -> "Plan":
    """What is asked for. Raises InvalidJob."""
    from gradcam_worker.backfill.plan import Plan
    from gradcam_worker.gradcam.models.registry import Registry

    weights = None
    with contextlib.suppress(UnknownNetwork):  # here; the workers may know it
        file = Registry(settings.networks).find(wish["network"]).file
        weights = file.sha256 if file else None
    try:
        return Plan.model_validate({**wish, "weights_sha256": weights})
    except ValidationError as error:
        message = f"This is no backfill: {describe(error)}."
        raise InvalidJob(message) from error


def _ring(settings: Settings) -> Callable[[str], None]:
    from gradcam_worker.broker.publisher import Publisher

    publisher = Publisher(settings)
    return lambda job_id: publisher.republish([job_id], ROUTE)


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM is as good as Ctrl-C."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


backfill.add_command(standing.status)
backfill.add_command(standing.cancel)
