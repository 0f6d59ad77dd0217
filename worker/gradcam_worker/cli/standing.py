"""The commands about a backfill that somebody runs, or has run: backfill status | backfill cancel."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from gradcam_worker.operations import console
from gradcam_worker.settings import Settings
from gradcam_worker.text.visible import counted

if TYPE_CHECKING:  # it is heavy
    from gradcam_worker.backfill.output import DatasetDir
    from gradcam_worker.backfill.registry import BackfillRecord
    from gradcam_worker.ledger.ledger import Ledger

STATES = {"running": "cyan", "complete": "green", "stopped": "yellow", "damaged": "red"}
LOOK_S = 0.2  # between two looks whether it has ended
CANCEL_S = 15.0  # for whoever runs a backfill to end it


@click.command()
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
    place = opened(output, settings)
    plan, seal = place.held(), place.is_committed()
    ledger = RedisLedger(settings)
    record = RedisBackfillRegistry(ledger.server).find(place.uri)
    lives, done = record is not None and record.lives, sum(map(len, place.done().values()))
    ended = "stopped" if not seal else "complete" if seal["shards"] == done else "damaged"
    found = {
        "backfill": plan.id,
        "output": place.uri,
        "input": plan.input,
        "network": plan.network,
        "state": "running" if lives else ended,
        "shards_done": done,
        "dataset": seal,
        "last": _last(record, ledger) if record else None,
    }
    console.print_json(found) if as_json else _show(found)
    return 0


def _last(record: "BackfillRecord", ledger: "Ledger") -> dict[str, Any]:
    """What is remembered of whoever ran it last; of one that nobody runs, what of it still is in flight."""
    if record.lives:
        return record.facts
    flying = [one for one in ledger.read_many(sorted(record.shards)).values() if not one.final]
    return {**record.facts, "in_flight": len(flying)}


def _show(found: Mapping[str, Any]) -> None:
    """What is known about a backfill, a line each."""
    facts = console.table("", "")
    facts.show_header = False
    for name in ("backfill", "input", "output", "network"):
        facts.add_row(name, console.plain(found[name]))
    last, seal, state = found["last"] or {}, found["dataset"], found["state"]
    by = f", by process {last['pid']} on {last['host']}" if state == "running" else ""
    facts.add_row("state", console.plain(state + by, STATES[state]))
    if seal:
        facts.add_row("rows", f"{seal['rows']:,}, {seal['failed']:,} of them failed")
    elif last:
        most = "" if last["whole"] else "at least "
        done = last["before"] + last["done"]
        facts.add_row("rows", f"{done:,} of {most}{last['planned']:,}, {last['failed']:,} of them failed")
    flying = f", {last['in_flight']} in flight" if last and state in {"running", "stopped"} else ""
    facts.add_row("shards", f"{found['shards_done']:,} done{flying}")
    if state == "running":
        facts.add_row("rate", f"{last['rows_per_s']:,.0f} rows/s")
    for code, count in sorted((seal or last).get("codes", {}).items()):
        facts.add_row("", console.plain(f"{count:,} {code}", "red"))
    if seal and state == "damaged":
        of = counted(seal["shards"], "shard is", "shards are")
        there = f"{found['shards_done']:,} of the {of} there that its seal speaks of"
        facts.add_row("", f"{there}: --resume, or --changed, puts that right")
    if state == "stopped":
        facts.add_row("", "--resume goes on with it")
    console.out.print(facts)


@click.command()
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
    place, ledger = opened(output, settings), RedisLedger(settings)
    place.held()
    registry = RedisBackfillRegistry(ledger.server)
    record, end = registry.find(place.uri, cancel=True), time.monotonic() + CANCEL_S
    ran = record is not None and record.lives
    while record and record.lives and time.monotonic() < end:
        time.sleep(LOOK_S)
        record = registry.find(place.uri)
    ended = record is None or not record.lives
    left = cancel_shards(ledger, record.shards) if record and ended else []
    ends = {one.id for one in left if not one.final}  # a worker still has them in hand
    while ends and time.monotonic() < end:
        time.sleep(LOOK_S)
        ends = {one.id for one in ledger.read_many(sorted(ends)).values() if not one.final}
    if as_json:
        console.print_json({"output": place.uri, "ran": ran, "ended": ended, "shards_canceled": len(left)})
    elif not ended:
        console.err.print("Whoever runs it has been told, and does not answer yet.")
    else:
        who = "It was run, and is stopped." if ran else "Nobody runs it."
        many = f"{counted(len(left), 'shard was', 'shards were')} left in flight, and cancelled"
        shards = f"{many}{', and not stopped yet' if ends else ''}." if left else "Nothing is in flight."
        console.out.print(f"{who} {shards}")
    return 0 if ended else 1


def opened(output: str, settings: Settings) -> "DatasetDir":
    """What lies at an output. Raises OutputNotAllowed."""
    from gradcam_worker.backfill.output import DatasetDir
    from gradcam_worker.storage.s3 import S3
    from gradcam_worker.storage.stores import Stores

    return DatasetDir(Stores(settings, S3(settings)).open(output))
