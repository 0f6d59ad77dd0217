"""The commands about final failures: replay (jobs), redeliver (webhooks)."""

from dataclasses import asdict
from typing import Any

import click

from gradcam_worker.cli.options import Command, json_option, parse_duration
from gradcam_worker.ledger.dead_letters import DeadLetter, DeadLetters
from gradcam_worker.ledger.outbox import DeadDelivery, Outbox
from gradcam_worker.ledger.redis.outbox import RedisOutbox
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations.terminal import console
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets
from gradcam_worker.text.visible import counted

DEFAULT_ROWS = 50  # of a list without --limit


def _selection_options(command: Command) -> Command:
    """Add the options that select jobs or deliveries."""
    for option in (
        json_option(),
        click.option("--dry-run", is_flag=True, help="Only show what would be done."),
        click.option(
            "--limit", type=click.IntRange(1), help=f"At most this many. [{DEFAULT_ROWS} when listing]"
        ),
        click.option("--all", "everything", is_flag=True, help="Select all."),
        click.option(
            "--since",
            "since_s",
            callback=parse_duration,
            metavar="2h|30m|7d",
            help="Select failures of the last 2 hours, 30 minutes, 7 days.",
        ),
        click.argument("job_ids", nargs=-1, metavar="[JOB_ID]..."),
    ):
        command = option(command)
    return command


@click.command()
@_selection_options
@click.option("--code", help="Select jobs that failed with this error code, as in storage_unavailable.")
@click.option(
    "--rate", type=click.FloatRange(0.1, 1000), default=20, show_default=True, help="Jobs per second."
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
    """Run failed jobs again. Without job ids, a filter or --all: only list them.

    A replay is a new job with the same content. Its id is derived from the old one's, so repeating an
    interrupted replay runs no job twice. Exit code 1 if a job could not be replayed.

    \b
    Example:
      gradcam replay
      gradcam replay --code storage_unavailable --since 2h --dry-run
      gradcam replay --code storage_unavailable --since 2h --rate 50
      gradcam replay 01a2062b-306e-7164-a139-13398da125f6
    """
    from gradcam_worker.client.client import GradcamClient

    settings = Settings.from_environment()
    ledger = RedisLedger(settings)
    client = GradcamClient(settings=settings, ledger=ledger)
    dead_letters = DeadLetters(
        ledger, lambda job, tenant: client.as_tenant(tenant if tenant.name else None).submit(job)
    )
    selected = bool(job_ids or code or everything or since_s is not None)
    letters = dead_letters.find(job_ids, code=code, since_s=since_s, limit=limit if selected else None)
    if dry_run or not selected:
        shown = letters if selected else letters[: limit or DEFAULT_ROWS]
        replayable = _list_letters(dead_letters, shown, len(letters), as_json=as_json, details=bool(job_ids))
        if dry_run and not as_json:
            console.err.print(f"{replayable} of {len(shown)} would be replayed.")
        return 0
    results = []
    for result in dead_letters.replay(letters, rate):
        results.append(result)
        if not as_json:
            console.show_replay_result(result)
    if as_json:
        console.print_json([asdict(result) for result in results])
    else:
        console.err.print(f"{sum(bool(result.new_id) for result in results)} of {len(letters)} replayed.")
    return 0 if all(result.new_id for result in results) else 1


def _list_letters(
    dead_letters: DeadLetters, letters: list[DeadLetter], total: int, *, as_json: bool, details: bool
) -> int:
    """Show dead letters; return how many of them can be replayed."""
    previews = [(letter, dead_letters.prepare_replay(letter)) for letter in letters]
    if as_json:
        console.print_json([_letter_facts(*preview) for preview in previews])
    elif details:
        for letter, job in previews:
            if letter.document:
                console.show_status(letter.document)
            console.show_replay_preview(job)
    else:
        console.show_letters(previews, total)
    return sum(isinstance(job, Job) for _, job in previews)


def _letter_facts(letter: DeadLetter, job: Job | str) -> dict[str, Any]:
    """A dead letter as JSON, with the job that its replay would be, or why it cannot be replayed."""
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
@_selection_options
@click.option("--url", help="Select deliveries to this webhook.")
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
    """Deliver parked webhook events again. Without job ids, a filter or --all: only list them.

    Events are parked when a webhook answers 410 (Gone), or fails for GRADCAM_WEBHOOK_GIVE_UP_S. A worker
    delivers them again, in order, also to a webhook that has answered 410.

    \b
    Example:
      gradcam redeliver
      gradcam redeliver --url https://app.example/hook
      gradcam redeliver 01a2062b-306e-7164-a139-13398da125f6
    """
    settings = Settings.from_environment()
    outbox = RedisOutbox(RedisLedger(settings).server, retention_s=settings.retention_s)
    selected = bool(job_ids or url or everything or since_s is not None)
    matching = [parked for parked in outbox.find_parked() if _matches(parked, job_ids, url, since_s)]
    missing = set(job_ids) - {parked.job_id for parked in matching}
    shown = matching[: limit or (len(matching) if selected else DEFAULT_ROWS)]
    if not dry_run and selected:
        shown = _unpark(outbox, shown, url)
    if as_json:
        console.print_json([_parked_facts(parked) for parked in shown])
    elif shown or not selected:
        disabled = [without_secrets(disabled_url) for disabled_url in outbox.find_disabled()]
        console.show_parked(shown, len(matching), disabled)
    if selected and not as_json:
        outcome = "would be requeued" if dry_run else "requeued: a worker delivers the events"
        console.err.print(f"{counted(len(shown), 'recipient')} {outcome}.")
    for job_id in sorted(missing):
        console.err.print(f"Job {job_id} has no parked events.", markup=False)
    return 1 if missing else 0


def _matches(parked: DeadDelivery, job_ids: tuple[str, ...], url: str | None, since_s: float | None) -> bool:
    return (
        (not job_ids or parked.job_id in job_ids)
        and (url is None or url in _url_spellings(parked.url))
        and (since_s is None or console.age_s(parked.since_s) <= since_s)
    )


def _url_spellings(url: str | None) -> set[str]:
    """A webhook's URL in full, and as it is shown: without its query."""
    return {url, without_secrets(url)} if url else set()


def _unpark(outbox: Outbox, parked: list[DeadDelivery], url: str | None) -> list[DeadDelivery]:
    """Make parked deliveries due, and enable their webhooks and `url`.

    Returns:
        The deliveries that had events left, the oldest first.
    """
    for disabled_url in {url, *(delivery.url for delivery in parked)}:
        if disabled_url:
            outbox.enable(disabled_url)
    return [delivery for delivery in reversed(parked) if outbox.unpark(delivery)]


def _parked_facts(parked: DeadDelivery) -> dict[str, Any]:
    return {
        "job_id": parked.job_id,
        "recipient": console.recipient_text(parked),
        "parked_at": console.time_text(parked.since_s),
        "events": parked.events,
        "first": parked.first.event if parked.first else None,
    }
