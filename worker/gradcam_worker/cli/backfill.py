"""The commands about backfills: backfill INPUT | backfill status OUTPUT | backfill cancel OUTPUT."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from gradcam_worker.cli.jobs import explanation_options
from gradcam_worker.errors import InvalidJob, UnknownNetwork
from gradcam_worker.operations import console
from gradcam_worker.schemas.model import describe
from gradcam_worker.schemas.shard import MAX_ROWS, ROUTE
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

if TYPE_CHECKING:  # they are heavy
    from gradcam_worker.backfill.output import DatasetDir
    from gradcam_worker.backfill.plan import Plan
    from gradcam_worker.backfill.registry import BackfillRecord
    from gradcam_worker.ledger.ledger import Ledger

STATE_COLORS = {"running": "cyan", "complete": "green", "stopped": "yellow", "damaged": "red"}
POLL_EVERY_S = 0.2  # whether a cancelled backfill has ended
CANCEL_TIMEOUT_S = 15.0


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


class _RunContext(click.Context):
    """Usage and errors of `run` do not name it: users write `backfill INPUT`."""

    @property
    def command_path(self) -> str:
        """See `click.Context`."""
        return self.parent.command_path if self.parent else super().command_path


class _RunCommand(click.Command):
    """Overlays are the only artifacts of a backfill: `--overlays` replaces `--artifact`."""

    context_class = _RunContext

    def __init__(self, *given: Any, **named: Any) -> None:
        """See `click.Command`."""
        super().__init__(*given, **named)
        overlays = click.Option(
            ["--overlays", "artifacts"], flag_value=("overlay",), default=(), help="A picture of each, too."
        )
        self.params = [overlays if one.name == "artifacts" else one for one in self.params]


class _BackfillGroup(click.Group):
    """An argument that names no subcommand is the INPUT of `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Group`."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group`."""
        return [name for name in super().list_commands(ctx) if name != "run"]


@click.group(cls=_BackfillGroup)
def backfill() -> None:
    """Explain a long list of images: many to a message, one dataset as the result."""


@backfill.command(cls=_RunCommand)
@click.argument("input_", metavar="INPUT")
@explanation_options
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
    spec: dict[str, Any],
    resume: bool,
    as_json: bool,
    **options: Any,
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
    from gradcam_worker.backfill.options import RunOptions
    from gradcam_worker.backfill.registry import RedisBackfillRegistry
    from gradcam_worker.backfill.runner import BackfillRunner
    from gradcam_worker.backfill.sharding import cut_shards
    from gradcam_worker.ledger.redis.store import RedisLedger
    from gradcam_worker.operations.progress_bar import (
        BackfillProgressBar,
        CountedInput,
        print_line,
        print_summary,
    )

    run_options = RunOptions(**options)
    settings = Settings.from_environment()
    dataset, ledger = _open_dataset(output, settings), RedisLedger(settings)
    with open_input(input_, settings, form=form, column=column, output=dataset.uri) as opened:
        asked = _plan(
            {**spec, "input": opened.name, "output": dataset.uri, "shard_rows": shard_rows}, settings
        )
        resume = resume or run_options.only_failed or run_options.changed
        plan = dataset.resolve(asked, resume=resume, changed=run_options.changed)
        rows = CountedInput(opened)
        shown_as = "json" if as_json else "terminal" if console.err.is_terminal else "lines"
        progress = BackfillProgressBar(shown_as, rows.total)
        runner = BackfillRunner(
            plan,
            dataset,
            ledger,
            _publisher(settings),
            RedisBackfillRegistry(ledger.server),
            options=run_options,
            shards_per_worker=settings.shards,
            on_progress=progress.show,
            warn=progress.note,
        )
        try:
            with _interrupted_by_sigterm(), runner.lease() as lease, progress:
                shards = cut_shards(rows.rows(), plan, max_bytes=settings.max_message_bytes // 2)
                summary = runner.run(lease, shards)
        except KeyboardInterrupt:
            one = "shard is in flight, and comes to its end by itself; "
            more = "shards are in flight, and come to their end by themselves; "
            left = counted(len(runner.in_flight), one, more) if runner.in_flight else ""
            console.err.print(f"Stopped. {left}--resume goes on.", soft_wrap=True)
            return 130
        if skipped := opened.own_files():
            what = counted(skipped, "file there is", "files there are")
            progress.note(f"{what} a backfill's own, and no part of the input.")
    if as_json:
        facts = summary or runner.progress.facts()
        print_line("complete" if summary else "incomplete", {"output": plan.output, **facts})
    elif summary:
        print_summary(summary, plan.output, settings)
    if not summary:
        lost = counted(runner.progress.lost, "shard")
        console.err.print(f"[red]Incomplete[/]: {lost} failed as a whole; --resume tries again.")
        return 1
    if summary["failed"] == summary["rows"]:
        return 1  # as the summary has said
    if summary["failed"] > run_options.max_failed * summary["rows"]:
        console.err.print(f"[red]More than {run_options.max_failed:.0%} of the rows have failed.[/]")
        return 1
    return 0


def _plan(fields: dict[str, Any], settings: Settings) -> "Plan":
    """A plan with the weights that this machine's registry pins. Raises InvalidJob."""
    from gradcam_worker.backfill.plan import Plan
    from gradcam_worker.gradcam.models.registry import Registry

    weights = None
    with contextlib.suppress(UnknownNetwork):  # here; the workers may know it
        file = Registry(settings.networks).find(fields["network"]).file
        weights = file.sha256 if file else None
    try:
        return Plan.model_validate({**fields, "weights_sha256": weights})
    except ValidationError as error:
        message = f"This is no backfill: {describe(error)}."
        raise InvalidJob(message) from error


def _publisher(settings: Settings) -> Callable[[str], None]:
    """Puts the message of a shard on the queue, by its id."""
    from gradcam_worker.broker.publisher import Publisher

    publisher = Publisher(settings)
    return lambda job_id: publisher.republish([job_id], ROUTE)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM interrupts, as Ctrl-C does."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@backfill.command()
@click.argument("output")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
def status(output: str, *, as_json: bool) -> int:
    """Show how far the backfill of OUTPUT is, and who runs it.

    \b
    Example:
      gradcam backfill status s3://results/photos
    """
    from gradcam_worker.backfill.registry import RedisBackfillRegistry
    from gradcam_worker.ledger.redis.store import RedisLedger

    settings = Settings.from_environment()
    dataset = _open_dataset(output, settings)
    plan, summary = dataset.require_plan(), dataset.read_summary()
    ledger = RedisLedger(settings)
    record = RedisBackfillRegistry(ledger.server).find(dataset.uri)
    running, done = record is not None and record.is_running, sum(map(len, dataset.done_keys().values()))
    ended = "stopped" if not summary else "complete" if summary["shards"] == done else "damaged"
    facts = {
        "backfill": plan.id,
        "output": dataset.uri,
        "input": plan.input,
        "network": plan.network,
        "state": "running" if running else ended,
        "shards_done": done,
        "dataset": summary,
        "last": _last_run(record, ledger) if record else None,
    }
    console.print_json(facts) if as_json else _show(facts)
    return 0


def _last_run(record: "BackfillRecord", ledger: "Ledger") -> dict[str, Any]:
    """How far the last run is, or was, and how many of its shards are in flight now."""
    if record.is_running:
        return record.facts
    in_flight = [one for one in ledger.read_many(sorted(record.shards)).values() if not one.final]
    return {**record.facts, "in_flight": len(in_flight)}


def _show(status: Mapping[str, Any]) -> None:
    """Print the status of a backfill, a line for each fact."""
    facts = console.table("", "")
    facts.show_header = False
    for name in ("backfill", "input", "output", "network"):
        facts.add_row(name, console.plain(status[name]))
    last, summary, state = status["last"] or {}, status["dataset"], status["state"]
    by = f", by process {last['pid']} on {last['host']}" if state == "running" else ""
    facts.add_row("state", console.plain(state + by, STATE_COLORS[state]))
    if summary:
        facts.add_row("rows", f"{summary['rows']:,}, {summary['failed']:,} of them failed")
    elif last:
        most = "" if last["whole"] else "at least "
        done = last["before"] + last["done"]
        facts.add_row("rows", f"{done:,} of {most}{last['planned']:,}, {last['failed']:,} of them failed")
    in_flight = f", {last['in_flight']} in flight" if last and state in {"running", "stopped"} else ""
    facts.add_row("shards", f"{status['shards_done']:,} done{in_flight}")
    if state == "running":
        facts.add_row("rate", f"{last['rows_per_s']:,.0f} rows/s")
    for code, count in sorted((summary or last).get("codes", {}).items()):
        facts.add_row("", console.plain(f"{count:,} {code}", "red"))
    if summary and state == "damaged":
        of = counted(summary["shards"], "shard is", "shards are")
        there = f"{status['shards_done']:,} of the {of} there that dataset.json counts"
        facts.add_row("", f"{there}: --resume, or --changed, repairs it")
    if state == "stopped":
        facts.add_row("", "--resume goes on with it")
    console.out.print(facts)


@backfill.command()
@click.argument("output")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")
def cancel(output: str, *, as_json: bool) -> int:
    """Stop the backfill of OUTPUT, wherever it runs, and what it has in flight. What is done stays.

    \b
    Example:
      gradcam backfill cancel s3://results/photos
    """
    from gradcam_worker.backfill.inflight import cancel as cancel_shards
    from gradcam_worker.backfill.registry import RedisBackfillRegistry
    from gradcam_worker.ledger.redis.store import RedisLedger

    settings = Settings.from_environment()
    dataset, ledger = _open_dataset(output, settings), RedisLedger(settings)
    dataset.require_plan()
    registry = RedisBackfillRegistry(ledger.server)
    record, end = registry.request_cancel(dataset.uri), time.monotonic() + CANCEL_TIMEOUT_S
    was_running = record is not None and record.is_running
    while record and record.is_running and time.monotonic() < end:
        time.sleep(POLL_EVERY_S)
        record = registry.find(dataset.uri)
    ended = record is None or not record.is_running
    canceled = cancel_shards(ledger, record.shards) if record and ended else []
    unfinished = {one.id for one in canceled if not one.final}  # a worker still works on them
    while unfinished and time.monotonic() < end:
        time.sleep(POLL_EVERY_S)
        unfinished = {one.id for one in ledger.read_many(sorted(unfinished)).values() if not one.final}
    if as_json:
        console.print_json(
            {"output": dataset.uri, "ran": was_running, "ended": ended, "shards_canceled": len(canceled)}
        )
    elif not ended:
        console.err.print("Whoever runs it has been told, and does not answer yet.")
    else:
        who = "It was run, and is stopped." if was_running else "Nobody runs it."
        many = f"{counted(len(canceled), 'shard was', 'shards were')} left in flight, and cancelled"
        shards = (
            f"{many}{', and not stopped yet' if unfinished else ''}." if canceled else "Nothing is in flight."
        )
        console.out.print(f"{who} {shards}")
    return 0 if ended else 1


def _open_dataset(output: str, settings: Settings) -> "DatasetDir":
    """The folder of a dataset. Raises OutputNotAllowed."""
    from gradcam_worker.backfill.output import DatasetDir
    from gradcam_worker.storage.s3 import S3
    from gradcam_worker.storage.stores import Stores

    return DatasetDir(Stores(settings, S3(settings)).open(output))
