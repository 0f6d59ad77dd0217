"""The commands about backfills: backfill INPUT, and backfill status, cancel and compact OUTPUT."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from pydantic import ValidationError

from gradcam_worker.backfill.inputs.options import InputOptions
from gradcam_worker.cli.datasets.input_options import input_options
from gradcam_worker.cli.exit_codes import ExitCode
from gradcam_worker.cli.options import (
    OF_SPEC,
    GroupWithRun,
    RunCommand,
    explanation_options,
    json_option,
    with_default_target,
)
from gradcam_worker.errors import InvalidInput, InvalidJob, NoWorker, UnknownNetwork, UriNotAllowed
from gradcam_worker.operations.signals import interrupted_by_sigterm
from gradcam_worker.operations.terminal import console
from gradcam_worker.schemas.model import describe
from gradcam_worker.schemas.options import is_default_target
from gradcam_worker.schemas.shard import MAX_ROWS
from gradcam_worker.schemas.status import Problem
from gradcam_worker.schemas.work import ROUTE
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

if TYPE_CHECKING:  # slow to import
    from gradcam_worker.backfill.inputs.open import Input
    from gradcam_worker.backfill.output import DatasetDir
    from gradcam_worker.backfill.plan import Plan
    from gradcam_worker.gateway.access.tenants import TenantPolicy
    from gradcam_worker.ledger.redis.store import RedisLedger
    from gradcam_worker.schemas.shard import Row

GIVEN = "gradcam.given"  # in a context's `meta`: what is stored as `Plan.given`
DRY_RUN, PRICE = "gradcam.dry_run", "gradcam.price_per_hour"  # in a context's `meta`
REPEATING = ("only_failed", "changed")  # these options continue a backfill, too
MAY_CHANGE = {"output", "resume", *REPEATING, "as_json", "window", "rate", "max_failed"}
NOT_STORED = {"output", "resume", *REPEATING, "as_json", "ends_with_parent", "dry_run", "price_per_hour"}
LOCAL_PATHS = {"input_", "label_map", "boxes"}  # parameters whose value may be the path of a local file
COLUMN_OR_FILE = {"boxes"}  # of these, those whose value may be the name of a column instead
MEGABYTE = 2**20
STATE_COLORS = {"running": "cyan", "complete": "green", "stopped": "yellow", "damaged": "red"}


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


def _end_with_parent(_: click.Context, __: click.Parameter, ends: bool) -> None:  # click calls it
    """Stop, as at SIGTERM, when the process that has started this one ends."""
    from gradcam_worker.runtime import parent_watch

    if ends:
        parent_watch.on_parent_exit(lambda: os.kill(os.getpid(), signal.SIGTERM))


def _note_dry_run(context: click.Context, _: click.Parameter, is_dry: bool) -> None:  # click calls it
    if is_dry:
        context.meta[DRY_RUN] = True


def _note_price(context: click.Context, _: click.Parameter, price: float | None) -> None:
    context.meta[PRICE] = price


class _BackfillCommand(RunCommand):
    """Replaces `--artifact` by `--overlays`: a backfill writes no other artifacts."""

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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command`. Where it continues a backfill, what is omitted is that of the stored plan."""
        given = _plain_values(self.make_parser(ctx).parse_args([*args])[0])
        continues = "output" in given and any(map(given.get, ("resume", *REPEATING)))
        if continues and "for_api" not in given:
            ctx.default_map = _stored_options(given["output"], has_input="input_" in given)
            if "for_api" in ctx.default_map and (others := given.keys() - MAY_CHANGE):
                names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
                message = f"{names} cannot be changed: another program began this backfill"
                raise click.UsageError(message, ctx)
        if "for_api" in given and (twice := given.keys() & OF_SPEC):
            message = f"{', '.join(sorted(twice))}: named by the program that began this backfill, too"
            raise click.UsageError(message, ctx)
        ctx.meta[GIVEN] = {**(ctx.default_map or {}), **_absolute(given)}
        return super().parse_args(ctx, args)


def _plain_values(parsed: Mapping[str, object]) -> dict[str, Any]:
    """What the words of a command line are, by parameter, as values of JSON; nothing for those not given."""
    lists = {name: [*value] if isinstance(value, tuple) else value for name, value in parsed.items()}
    return {name: value for name, value in lists.items() if isinstance(value, str | bool | list)}


def _absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a command line, with absolute paths where they name files of this machine."""

    def absolute(name: str, value: str) -> str:
        is_path = "://" not in value and value != "-" and Path(value).exists()
        is_column = name in COLUMN_OR_FILE and not Path(value).suffix
        return str(Path(value).absolute()) if is_path and not is_column else value

    paths = {name: absolute(name, given[name]) for name in LOCAL_PATHS & given.keys()}
    return {**given, **paths}


def _stored_options(output: str, *, has_input: bool) -> dict[str, Any]:
    """Input and options of the command that began a backfill; {}: not known, and the command has an input.

    Raises InvalidInput if they are not known, and the command has none.
    """
    from gradcam_worker.client.datasets.backfills import open_dataset

    dataset = open_dataset(output, Settings.from_environment())
    if has_input:
        plan = dataset.read_plan()
        return plan.given if plan and "for_api" not in plan.given else {}
    given = dataset.require_plan().given
    if not given:
        message = (
            f"{output} was begun by an earlier version, which stored no options: name INPUT and options."
        )
        raise InvalidInput(message)
    if given.get("input_") == "-":
        message = "The input of this backfill was standard input, which cannot be read again: name INPUT."
        raise InvalidInput(message)
    return given


@click.group(cls=GroupWithRun)
def backfill() -> None:
    """Explain many images into one dataset."""


@backfill.command(cls=_BackfillCommand)
@click.argument("input_", metavar="INPUT")
@explanation_options
@click.option("--output", required=True, metavar="s3://...", help="Where the dataset is written.")
@click.option(
    "--features",
    is_flag=True,
    help="Also store what the network looks at, as a vector of each explanation: the activations of its "
    "target layer, averaged with the heat as weights.",
)
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
@input_options
@click.option(
    "--dry-run",
    is_flag=True,
    callback=_note_dry_run,
    expose_value=False,
    help="Explain a few rows only, remove them, and say what the whole would take.",
)
@click.option(
    "--price-per-hour",
    type=click.FloatRange(0),
    callback=_note_price,
    expose_value=False,
    help="Of --dry-run: what a device costs in an hour.",
)
@click.option("--ends-with-parent", is_flag=True, hidden=True, callback=_end_with_parent, expose_value=False)
@click.option("--for-api", callback=lambda *parts: json.loads(parts[2] or "{}"), hidden=True)
def run(
    input_: str,
    output: str,
    shard_rows: int,
    *,
    reading: InputOptions,
    spec: dict[str, Any],
    for_api: dict[str, Any],
    resume: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Explain every image of INPUT: a list (JSON Lines, CSV, Parquet, ORC, or one URI per line), the
    manifest.json of an S3 inventory, a folder, s3://bucket/prefix, or - for standard input.

    Further columns of a list become columns of the dataset. --label, --boxes and --mask-column say what is
    known about the images: then the dataset says whether the network is right, and looks at the object.

    With --resume, --only-failed or --changed, INPUT and all options may be omitted: they are those that the
    backfill was begun with, and each that is given replaces one of them.

    Progress is printed on standard error, the result on standard output; with --json both are printed on
    standard output. Stop with Ctrl-C at any time, and continue with --resume. Exit code 4 if the dataset is
    not complete, or if more rows failed than --max-failed allows.

    With --dry-run it reads the list, or as much of it as 20 seconds allow, lets workers explain a few rows,
    removes what they wrote, and says what the whole will take: rows, failures, time, device-hours, objects,
    bytes, and with --price-per-hour the price. It needs at least one worker.

    `gradcam backfill status OUTPUT` shows the progress, `gradcam backfill cancel OUTPUT` stops it.

    \b
    Example:
      gradcam backfill photos.csv --network vgg16 --top-n 3 --output s3://results/photos
      gradcam backfill s3://photos/2031/ --classes tabby,282 --overlays --output s3://results/cats
      gradcam backfill --output s3://results/photos --resume
      gradcam backfill status s3://results/photos
    """
    from gradcam_worker.backfill.inputs.open import open_input
    from gradcam_worker.backfill.options import RunOptions
    from gradcam_worker.backfill.registry import RedisBackfillRegistry
    from gradcam_worker.backfill.runner import BackfillRunner
    from gradcam_worker.backfill.sharding import cut_shards
    from gradcam_worker.client.datasets.backfills import open_dataset
    from gradcam_worker.ledger.redis.store import RedisLedger
    from gradcam_worker.operations.terminal.progress_bar import (
        BackfillProgressBar,
        print_line,
        print_summary,
    )

    features = {"features": options.pop("features")}
    run_options = RunOptions(**options)
    settings = Settings.from_environment()
    dataset, ledger = open_dataset(output, settings), RedisLedger(settings)
    spec = for_api.get("spec") or _with_target(spec, dataset, settings) | features
    resume = resume or run_options.only_failed or run_options.changed
    fixed = dataset.carried_before() if resume else None
    reading = reading if run_options.changed else _as_begun(reading, fixed)
    policy = _policy(for_api.get("tenant"), ledger)
    may_read = policy.allows_list if policy else None
    with (
        interrupted_by_sigterm(),  # also while a stream is waited for
        open_input(input_, settings, reading, output=dataset.uri, fixed=fixed, may_read=may_read) as opened,
    ):
        known = {"carried": opened.carried, "annotated": opened.annotated}
        where = {"input": opened.name, "output": dataset.uri, "shard_rows": shard_rows}
        requested = _plan({**spec, **known, **where}, settings)
        plan = dataset.resolve(requested, resume=resume, changed=run_options.changed)
        if DRY_RUN in click.get_current_context().meta:
            return _estimate(opened, plan, settings, as_json=as_json)
        progress = BackfillProgressBar(_progress_form(as_json=as_json), opened.total)
        runner = BackfillRunner(
            plan,
            dataset,
            ledger,
            _publisher(settings),
            RedisBackfillRegistry(ledger.server),
            options=run_options,
            shards_per_worker=settings.shards,
            tenant=policy.tenant if policy else None,
            on_progress=progress.show,
            warn=progress.note,
        )
        try:
            with runner.lease() as lease, progress:
                if as_json:
                    print_line("started", {"output": plan.output, "backfill": plan.id})
                rows = _allowed(opened.rows(), policy) if policy else opened.rows()
                shards = cut_shards(rows, plan, max_bytes=settings.max_message_bytes // 2)
                summary = runner.run(lease, shards)
        except KeyboardInterrupt:
            in_flight = counted(len(runner.in_flight), "shard is", "shards are")
            left = f" {in_flight} in flight and will still finish." if runner.in_flight else ""
            console.err.print(f"Stopped.{left} Continue with --resume.", soft_wrap=True)
            if as_json:
                print_line("stopped", {"output": plan.output, **runner.progress.facts()})
            return ExitCode.INTERRUPTED
        for note in opened.notes():
            progress.note(note)
    if as_json:
        now = runner.progress
        facts = {**summary, "reused": now.reused} if summary else now.facts()
        print_line("complete" if summary else "incomplete", {"output": plan.output, **facts})
    elif summary:
        print_summary(summary, plan.output, settings)
    return _exit_code(summary, runner.progress.lost, run_options.max_failed)


def _exit_code(summary: dict[str, Any] | None, lost: int, max_failed: float) -> ExitCode:
    """Return the exit code of a run; what is not in its summary is printed."""
    if not summary:
        shards = counted(lost, "shard")
        console.err.print(f"[red]Incomplete[/]: {shards} failed as a whole. Run them again with --resume.")
        return ExitCode.ROWS_FAILED
    if summary["failed"] == summary["rows"]:
        return ExitCode.ROWS_FAILED  # the summary shows it
    if summary["failed"] > max_failed * summary["rows"]:
        console.err.print(f"[red]More than {max_failed:.0%} of the rows have failed.[/]")
        return ExitCode.ROWS_FAILED
    return ExitCode.SUCCESS


def _estimate(opened: "Input", plan: "Plan", settings: Settings, *, as_json: bool) -> int:
    """Print what a backfill would take."""
    from gradcam_worker.ledger.redis.store import RedisLedger
    from gradcam_worker.operations import trial
    from gradcam_worker.operations.terminal.estimate_table import show_estimate
    from gradcam_worker.storage.s3 import S3
    from gradcam_worker.storage.stores import Stores

    def report(sentence: str) -> None:
        console.err.print(console.plain(sentence), soft_wrap=True)

    listing = trial.read_listing(opened)
    measured = estimate = missing = None
    workers = len(RedisLedger(settings).find_workers())
    try:
        stores = Stores(settings, S3(settings))
        measured = trial.Trial(plan, stores, settings, _publisher(settings), report).run(listing.sample)
        price = click.get_current_context().meta[PRICE]
        estimate = trial.extrapolate(listing, measured, plan, workers, price)
    except NoWorker as error:
        missing = error
    if as_json:
        console.print_json_line({"event": "estimate", **trial.facts(listing, measured, estimate)})
    else:
        show_estimate(listing, measured, estimate)
    if missing:
        raise missing
    return ExitCode.SUCCESS


def _progress_form(*, as_json: bool) -> str:
    """The form in which the progress is shown: see `BackfillProgressBar`. A program asks for the status."""
    if click.get_current_context().get_parameter_source("for_api") is ParameterSource.COMMANDLINE:
        return "none"
    return "json" if as_json else "terminal" if console.err.is_terminal else "lines"


def _as_begun(reading: "InputOptions", fixed: dict[str, str] | None) -> "InputOptions":
    """The options of an input; without further columns where finished shards have none."""
    return replace(reading, keep=()) if fixed == {} and reading.keep is None else reading


def _policy(tenant: str | None, ledger: "RedisLedger") -> "TenantPolicy | None":
    """What a tenant may do; None: it is nobody's backfill. Raises UnknownTenant."""
    from gradcam_worker.gateway.access.tenants import Tenants

    return Tenants(ledger.server).get(tenant) if tenant is not None else None


def _allowed(rows: "Iterable[Row]", policy: "TenantPolicy") -> "Iterable[Row]":
    """Yield the rows; those whose image or mask a tenant may not use, with the problem."""
    return (row if all(map(policy.allows_row, row.uris)) else _refused(row) for row in rows)


def _refused(row: "Row") -> "Row":
    """A row with the problem that its image may not be used."""
    error = UriNotAllowed("The tenant may not use this image.")
    problem = row.problem or Problem.of(error, stage=None, attempt=0)
    return row.model_copy(update={"problem": problem})


def _with_target(spec: dict[str, Any], dataset: "DatasetDir", settings: Settings) -> dict[str, Any]:
    """The spec with the classes to explain: where options are repeated, by default those of the plan."""
    if click.get_current_context().default_map and is_default_target(spec["target"]):
        return {**spec, "target": dataset.require_plan().target}  # this machine may have other labels
    return with_default_target(spec, settings.networks)


def _plan(fields: dict[str, Any], settings: Settings) -> "Plan":
    """Make a plan, with the checksum of the weights that this machine's registry lists. Raises InvalidJob."""
    from gradcam_worker.backfill.plan import Plan
    from gradcam_worker.gradcam.registry.registry import Registry

    weights, context = None, click.get_current_context()
    with contextlib.suppress(UnknownNetwork):  # unknown on this machine; the workers may know it
        file = Registry(settings.networks).find(fields["network"]).file
        weights = file.sha256 if file else None
    try:
        given = {name: value for name, value in context.meta[GIVEN].items() if name not in NOT_STORED}
        return Plan.model_validate({**fields, "given": given, "weights_sha256": weights})
    except ValidationError as error:
        message = f"This backfill is invalid: {describe(error)}."
        raise InvalidJob(message) from error


def _publisher(settings: Settings) -> Callable[[str], None]:
    """Return a function that publishes the message of a shard, given its id."""
    from gradcam_worker.broker.publisher import Publisher

    publisher = Publisher(settings)
    return lambda job_id: publisher.republish([job_id], ROUTE)


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
    from gradcam_worker.client.datasets import backfills

    facts = backfills.read_status(output, Settings.from_environment())
    console.print_json(facts) if as_json else _show_status(facts)
    return 0


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
    from gradcam_worker.client.datasets import backfills

    stopped = backfills.cancel(output, Settings.from_environment())
    if as_json:
        facts = {"output": stopped.output, "ran": stopped.was_running, "ended": stopped.ended}
        console.print_json({**facts, "shards_canceled": stopped.canceled})
    elif not stopped.ended:
        console.err.print("The process that runs the backfill was asked to stop, but has not stopped yet.")
    else:
        state = "The backfill was running and is stopped."
        if not stopped.was_running:
            state = "The backfill is not running."
        cancelled = f"{counted(stopped.canceled, 'shard')} in flight cancelled" if stopped.canceled else ""
        not_stopped = f", {stopped.unfinished:,} of them not stopped yet" if stopped.unfinished else ""
        console.out.print(f"{state} {cancelled or 'No shards are in flight'}{not_stopped}.")
    return 0 if stopped.ended else 1


@backfill.command()
@click.argument("output")
@click.option(
    "--target-size",
    type=click.FloatRange(1, 1024),
    default=64,
    show_default=True,
    metavar="MB",
    help="Size of a merged file, about. It is held in memory.",
)
@json_option()
def compact(output: str, *, target_size: float, as_json: bool) -> int:
    """Merge the small files of a complete dataset into larger ones.

    OUTPUT is the dataset. While it runs, dataset.json is missing: who reads data/*.parquet meanwhile may see
    rows twice, and never misses one. If it is stopped or killed, the same command goes on. A backfill goes on
    afterwards as before, with --resume, --only-failed or --changed.

    \b
    Example:
      gradcam backfill compact s3://results/photos
    """
    from gradcam_worker.client.datasets import backfills

    with interrupted_by_sigterm():
        merged = backfills.compact(output, Settings.from_environment(), int(target_size * MEGABYTE))
    if as_json:
        console.print_json({"output": output, **merged.facts()})
    else:
        files = counted(merged.files, "file")
        console.out.print(f"{merged.rows:,} rows are in {files}; there were {merged.files_before:,}.")
    return 0
