"""The commands about backfills: backfill INPUT, backfill status OUTPUT, backfill cancel OUTPUT."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from gradcam_worker.cli.options import explanation_options, json_option, parse_named, with_default_target
from gradcam_worker.errors import InvalidJob, UnknownNetwork
from gradcam_worker.operations import console
from gradcam_worker.schemas.model import describe
from gradcam_worker.schemas.shard import MAX_ROWS
from gradcam_worker.schemas.work import ROUTE
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

if TYPE_CHECKING:  # slow to import
    from gradcam_worker.backfill.output import DatasetDir
    from gradcam_worker.backfill.plan import Plan
    from gradcam_worker.backfill.registry import BackfillRecord
    from gradcam_worker.ledger.ledger import Ledger

STATE_COLORS = {"running": "cyan", "complete": "green", "stopped": "yellow", "damaged": "red"}
CANCEL_POLL_INTERVAL_S = 0.2
CANCEL_TIMEOUT_S = 15.0


def _share(_: click.Context, __: click.Parameter, text: str) -> float:
    """`50%` or `0.5` -> 0.5."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1
    if rest or not 0 <= share <= 1:
        message = f"{text!r} is not a share: write 50% or 0.5"
        raise click.BadParameter(message)
    return share


class _RunContext(click.Context):
    """Hides the name `run` in usage and error messages: users write `backfill INPUT`."""

    @property
    def command_path(self) -> str:
        """See `click.Context`."""
        return self.parent.command_path if self.parent else super().command_path


class _RunCommand(click.Command):
    """Replaces `--artifact` by `--overlays`: a backfill writes no other artifacts."""

    context_class = _RunContext

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `click.Command`."""
        super().__init__(*args, **kwargs)
        overlays = click.Option(
            ["--overlays", "artifacts"],
            flag_value=("overlay",),
            default=(),
            help="Also write an overlay image for each explanation.",
        )
        self.params = [overlays if option.name == "artifacts" else option for option in self.params]


class _BackfillGroup(click.Group):
    """Passes an argument that names no subcommand to `run`, as its INPUT."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Group`."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else ["run", *args])

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See `click.Group`."""
        return [name for name in super().list_commands(ctx) if name != "run"]


@click.group(cls=_BackfillGroup)
def backfill() -> None:
    """Explain many images into one dataset."""


@backfill.command(cls=_RunCommand)
@click.argument("input_", metavar="INPUT")
@explanation_options
@click.option("--output", required=True, metavar="s3://...", help="Where the dataset is written.")
@click.option(
    "--shard-rows",
    type=click.IntRange(1, MAX_ROWS),
    default=256,
    show_default=True,
    help="Images in one shard, which is one message to a worker.",
)
@click.option(
    "--window",
    type=click.IntRange(1, 10_000),
    help="Number of shards in flight. [depends on the number of workers]",
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), help="Submit at most this many images per second."
)
@click.option(
    "--max-failed",
    default="50%",
    show_default=True,
    callback=_share,
    help="Stop early if a larger share of the rows fails.",
)
@click.option("--resume", is_flag=True, help="Continue an existing backfill; finished rows are not repeated.")
@click.option("--only-failed", is_flag=True, help="Continue, and run the failed rows again.")
@click.option("--changed", is_flag=True, help="Continue, and run again what changed in the input or weights.")
@click.option(
    "--format", "form", default="auto", help="Format of INPUT, if its name does not show it. [auto]"
)
@click.option("--column", help="Column of INPUT that holds the URIs.")
@click.option(
    "--input-column",
    "input_columns",
    metavar="NAME=COLUMN",
    multiple=True,
    callback=parse_named,
    help="Column of INPUT with what the network takes beside the image, as in age=patient_age; may be "
    "repeated.",
)
def run(
    input_: str,
    output: str,
    shard_rows: int,
    form: str,
    column: str | None,
    input_columns: dict[str, str],
    *,
    spec: dict[str, Any],
    resume: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Explain every image of INPUT: a list (JSON Lines, CSV, Parquet, or one URI per line), a folder,
    s3://bucket/prefix, or - for standard input.

    Progress is printed on standard error, the result on standard output; with --json both are printed on
    standard output. Stop with Ctrl-C at any time, and continue with --resume. Exit code 1 if the dataset is
    not complete, or if more rows failed than --max-failed allows.

    `gradcam backfill status OUTPUT` shows the progress, `gradcam backfill cancel OUTPUT` stops it.

    \b
    Example:
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
        print_line,
        print_summary,
    )

    run_options = RunOptions(**options)
    settings = Settings.from_environment()
    spec = with_default_target(spec, settings.networks)
    dataset, ledger = _open_dataset(output, settings), RedisLedger(settings)
    with open_input(
        input_, settings, form=form, column=column, output=dataset.uri, inputs=input_columns
    ) as opened:
        requested = _plan(
            {**spec, "input": opened.name, "output": dataset.uri, "shard_rows": shard_rows}, settings
        )
        resume = resume or run_options.only_failed or run_options.changed
        plan = dataset.resolve(requested, resume=resume, changed=run_options.changed)
        progress_form = "json" if as_json else "terminal" if console.err.is_terminal else "lines"
        progress = BackfillProgressBar(progress_form, opened.total)
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
                shards = cut_shards(opened.rows(), plan, max_bytes=settings.max_message_bytes // 2)
                summary = runner.run(lease, shards)
        except KeyboardInterrupt:
            in_flight = counted(len(runner.in_flight), "shard is", "shards are")
            left = f" {in_flight} in flight and will still finish." if runner.in_flight else ""
            console.err.print(f"Stopped.{left} Continue with --resume.", soft_wrap=True)
            return 130
        if skipped := opened.own_files():
            files = counted(skipped, "file")
            progress.note(f"Skipped {files} of the input folder that a backfill wrote.")
    if as_json:
        facts = summary or runner.progress.facts()
        print_line("complete" if summary else "incomplete", {"output": plan.output, **facts})
    elif summary:
        print_summary(summary, plan.output, settings)
    if not summary:
        lost = counted(runner.progress.lost, "shard")
        console.err.print(f"[red]Incomplete[/]: {lost} failed as a whole. Run them again with --resume.")
        return 1
    if summary["failed"] == summary["rows"]:
        return 1  # the summary shows it
    if summary["failed"] > run_options.max_failed * summary["rows"]:
        console.err.print(f"[red]More than {run_options.max_failed:.0%} of the rows have failed.[/]")
        return 1
    return 0


def _plan(fields: dict[str, Any], settings: Settings) -> "Plan":
    """Make a plan, with the checksum of the weights that this machine's registry lists. Raises InvalidJob."""
    from gradcam_worker.backfill.plan import Plan
    from gradcam_worker.gradcam.registry.registry import Registry

    weights = None
    with contextlib.suppress(UnknownNetwork):  # unknown on this machine; the workers may know it
        file = Registry(settings.networks).find(fields["network"]).file
        weights = file.sha256 if file else None
    try:
        return Plan.model_validate({**fields, "weights_sha256": weights})
    except ValidationError as error:
        message = f"This backfill is invalid: {describe(error)}."
        raise InvalidJob(message) from error


def _publisher(settings: Settings) -> Callable[[str], None]:
    """Return a function that publishes the message of a shard, given its id."""
    from gradcam_worker.broker.publisher import Publisher

    publisher = Publisher(settings)
    return lambda job_id: publisher.republish([job_id], ROUTE)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@backfill.command()
@click.argument("output")
@json_option()
def status(output: str, *, as_json: bool) -> int:
    """Show the progress of a backfill.

    OUTPUT is the dataset that it writes.

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
    final_state = "stopped" if not summary else "complete" if summary["shards"] == done else "damaged"
    facts = {
        "backfill": plan.id,
        "output": dataset.uri,
        "input": plan.input,
        "network": plan.network,
        "state": "running" if running else final_state,
        "shards_done": done,
        "dataset": summary,
        "last": _last_run(record, ledger) if record else None,
    }
    console.print_json(facts) if as_json else _show_status(facts)
    return 0


def _last_run(record: "BackfillRecord", ledger: "Ledger") -> dict[str, Any]:
    """Return the progress of the latest run; once it has stopped, with the shards still in flight."""
    if record.is_running:
        return record.facts
    return {**record.facts, "in_flight": len(_unfinished(ledger, record.shards))}


def _unfinished(ledger: "Ledger", shards: Iterable[str]) -> set[str]:
    """Return the ids of those shards that are not final."""
    return {shard.id for shard in ledger.read_many(sorted(shards)).values() if not shard.final}


def _show_status(status: Mapping[str, Any]) -> None:
    """Print the status of a backfill, a line for each fact."""
    facts = console.table("", "")
    facts.show_header = False
    for name in ("backfill", "input", "output", "network"):
        facts.add_row(name, console.plain(status[name]))
    last, summary, state = status["last"] or {}, status["dataset"], status["state"]
    process = f", by process {last['pid']} on {last['host']}" if state == "running" else ""
    facts.add_row("state", console.plain(state + process, STATE_COLORS[state]))
    if summary:
        facts.add_row("rows", f"{summary['rows']:,}, {summary['failed']:,} of them failed")
    elif last:
        at_least = "" if last["whole"] else "at least "
        done = last["before"] + last["done"]
        facts.add_row("rows", f"{done:,} of {at_least}{last['planned']:,}, {last['failed']:,} of them failed")
    in_flight = f", {last['in_flight']} in flight" if last and state in {"running", "stopped"} else ""
    facts.add_row("shards", f"{status['shards_done']:,} done{in_flight}")
    if state == "running":
        facts.add_row("rate", f"{last['rows_per_s']:,.0f} rows/s")
    for code, count in sorted((summary or last).get("codes", {}).items()):
        facts.add_row("", console.plain(f"{count:,} {code}", "red"))
    if summary and state == "damaged":
        total = counted(summary["shards"], "shard")
        facts.add_row("", f"dataset.json counts {total}, but {status['shards_done']:,} exist")
        facts.add_row("", "repair it with --resume or --changed")
    if state == "stopped":
        facts.add_row("", "continue it with --resume")
    console.out.print(facts)


@backfill.command()
@click.argument("output")
@json_option()
def cancel(output: str, *, as_json: bool) -> int:
    """Stop a backfill, on whichever machine it runs.

    OUTPUT is the dataset that it writes. Its shards in flight are cancelled, finished shards are kept.

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
        time.sleep(CANCEL_POLL_INTERVAL_S)
        record = registry.find(dataset.uri)
    ended = record is None or not record.is_running
    canceled = cancel_shards(ledger, record.shards) if record and ended else []
    unfinished = {shard.id for shard in canceled if not shard.final}  # a worker still runs them
    while unfinished and time.monotonic() < end:
        time.sleep(CANCEL_POLL_INTERVAL_S)
        unfinished = _unfinished(ledger, unfinished)
    if as_json:
        console.print_json(
            {"output": dataset.uri, "ran": was_running, "ended": ended, "shards_canceled": len(canceled)}
        )
    elif not ended:
        console.err.print("The process that runs the backfill was asked to stop, but has not stopped yet.")
    else:
        state = "The backfill was running and is stopped." if was_running else "The backfill is not running."
        cancelled = f"{counted(len(canceled), 'shard')} in flight cancelled" if canceled else ""
        not_stopped = f", {len(unfinished):,} of them not stopped yet" if unfinished else ""
        console.out.print(f"{state} {cancelled or 'No shards are in flight'}{not_stopped}.")
    return 0 if ended else 1


def _open_dataset(output: str, settings: Settings) -> "DatasetDir":
    """Open the folder of a dataset. Raises OutputNotAllowed."""
    from gradcam_worker.backfill.output import DatasetDir
    from gradcam_worker.storage.s3 import S3
    from gradcam_worker.storage.stores import Stores

    return DatasetDir(Stores(settings, S3(settings)).open(output))
