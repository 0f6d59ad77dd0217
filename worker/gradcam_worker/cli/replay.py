"""The commands about what failed for good: replay (jobs) | redeliver (webhooks)."""

import functools
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

from gradcam_worker.ledger.dead_letters import DeadLetter, DeadLetters
from gradcam_worker.ledger.outbox import DeadDelivery, Outbox
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import console
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets

Command = TypeVar("Command", bound=Callable[..., Any])
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
SHOWN = 50  # in a list, unless --limit says otherwise


def _duration(_: click.Context, __: click.Parameter, text: str | None) -> float | None:
    """`90s`, `30m`, `2h`, `7d` -> seconds."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])", text.strip())
    if not found:
        message = f"{text!r} is no duration: it must look like 90s, 30m, 2h or 7d"
        raise click.BadParameter(message)
    return float(found[1]) * UNITS_S[found[2]]


def _chosen(command: Command) -> Command:
    """The options that say which, the same for both commands."""

    @functools.wraps(command)
    def made(**given: Any) -> Any:
        return command(**given)

    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines."),
        click.option("--dry-run", is_flag=True, help="Only show what would be done."),
        click.option("--limit", type=click.IntRange(1), help=f"So many at most. [of a list: {SHOWN}]"),
        click.option("--all", "everything", is_flag=True, help="All there are."),
        click.option(
            "--since",
            "since_s",
            callback=_duration,
            metavar="2h|30m|7d",
            help="Those of the last 2 hours, 30 minutes, 7 days.",
        ),
        click.argument("job_ids", nargs=-1, metavar="[JOB_ID]..."),
    ):
        made = option(made)
    return made  # type: ignore[return-value]  # it is called by click alone, by names


@click.command()
@_chosen
@click.option("--code", help="Those with this problem, as in storage_unavailable.")
@click.option(
    "--rate", type=click.FloatRange(0.1, 1000), default=20, show_default=True, help="Jobs a second."
)
def replay(
    job_ids: tuple[str, ...],
    code: str | None,
    since_s: float | None,
    limit: int | None,
    rate: float,
    *,
    everything: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Run failed jobs again, or list them: replays none unless ids, a filter or --all say which.

    A replay is a new job with the same content, whose id follows from the old one's: repeating a replay that
    was interrupted doubles nothing. Exit code 1 where one could not be replayed.

    \b
    Examples:
      gradcam replay
      gradcam replay --code storage_unavailable --since 2h --dry-run
      gradcam replay --code storage_unavailable --since 2h --rate 50
      gradcam replay 01a2062b-306e-7164-a139-13398da125f6
    """
    from gradcam_worker.client.client import GradcamClient

    settings = Settings.from_environment()
    ledger = RedisLedger(settings)
    dead = DeadLetters(ledger, GradcamClient(settings=settings, ledger=ledger).submit)
    told = bool(job_ids or code or everything or since_s is not None)
    found = dead.find(job_ids, code=code, since_s=since_s, limit=limit if told else None)
    if dry_run or not told:
        shown = found if told else found[: limit or SHOWN]
        able = _list_letters(dead, shown, len(found), as_json=as_json, details=bool(job_ids))
        if dry_run and not as_json:
            console.err.print(f"{able} of {len(shown)} would be replayed.")
        return 0
    results = []
    for one in dead.replay(found, rate):
        results.append(one)
        if not as_json:
            console.show_replayed(one)
    if as_json:
        console.print_json([asdict(one) for one in results])
    else:
        console.err.print(f"{sum(bool(one.new_id) for one in results)} of {len(found)} replayed.")
    return 0 if all(one.new_id for one in results) else 1


def _list_letters(
    dead: DeadLetters, letters: list[DeadLetter], total: int, *, as_json: bool, details: bool
) -> int:
    """Show them; return how many can be replayed."""
    found = [(letter, dead.prepare_replay(letter)) for letter in letters]
    if as_json:
        console.print_json([_letter_facts(*one) for one in found])
    elif details:
        for letter, job in found:
            if letter.document:
                console.show(letter.document)
            console.show_prospect(job)
    else:
        console.show_letters(found, total)
    return sum(isinstance(job, Job) for _, job in found)


def _letter_facts(letter: DeadLetter, job: Job | str) -> dict[str, Any]:
    problem = letter.document.error if letter.document else None
    return {
        "id": letter.id,
        "failed_at": console.time_text(letter.failed_s),
        "code": letter.code,
        "problem": problem.model_dump(mode="json") if problem else None,
        "replay": job.model_dump(mode="json") if isinstance(job, Job) else None,
        "why_not": job if isinstance(job, str) else None,
    }


@click.command()
@_chosen
@click.option("--url", help="Those for this webhook.")
def redeliver(
    job_ids: tuple[str, ...],
    url: str | None,
    since_s: float | None,
    limit: int | None,
    *,
    everything: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Tell webhooks again what they could not be told, or list it: tells none unless told which.

    Events are parked when a webhook answered 410 (Gone) or could not be told for GRADCAM_WEBHOOK_GIVE_UP_S.
    They are told in order, by a worker, and one that had answered 410 is asked again.

    \b
    Examples:
      gradcam redeliver
      gradcam redeliver --url https://app.example/hook
      gradcam redeliver 01a2062b-306e-7164-a139-13398da125f6
    """
    settings = Settings.from_environment()
    outbox = RedisOutbox(RedisLedger(settings).server, retention_s=settings.retention_s)
    told = bool(job_ids or url or everything or since_s is not None)
    fitting = [one for one in outbox.find_parked() if _fits(one, job_ids, url, since_s)]
    missing = set(job_ids) - {one.job_id for one in fitting}
    shown = fitting[: limit or (len(fitting) if told else SHOWN)]
    if not dry_run and told:
        shown = _unpark(outbox, shown, url)
    if as_json:
        console.print_json([_parked_facts(one) for one in shown])
    elif shown or not told:
        console.show_parked(shown, len(fitting), [without_secrets(one) for one in outbox.find_disabled()])
    if told and not as_json:
        said = "would be due" if dry_run else "due now: a worker tells them"
        console.err.print(f"{len(shown)} {said}.")
    for job_id in sorted(missing):
        console.err.print(f"Nothing of job {job_id} is parked.", markup=False)
    return 1 if missing else 0


def _fits(one: DeadDelivery, job_ids: tuple[str, ...], url: str | None, since_s: float | None) -> bool:
    return (
        (not job_ids or one.job_id in job_ids)
        and (url is None or url in _names(one.url))
        and (since_s is None or console.age_s(one.since_s) <= since_s)
    )


def _names(url: str | None) -> set[str]:
    """How somebody may call a webhook: as it is, or as it is shown, without its query."""
    return {url, without_secrets(url)} if url else set()


def _unpark(outbox: Outbox, parked: list[DeadDelivery], url: str | None) -> list[DeadDelivery]:
    """Those of whom something was left to tell, the oldest first. A URL that is named is asked again."""
    for one in {url, *(one.url for one in parked)}:
        if one:
            outbox.enable(one)
    return [one for one in reversed(parked) if outbox.unpark(one)]


def _parked_facts(one: DeadDelivery) -> dict[str, Any]:
    return {
        "job_id": one.job_id,
        "recipient": console.recipient_text(one),
        "parked_at": console.time_text(one.since_s),
        "events": one.events,
        "first": one.first.event if one.first else None,
    }
