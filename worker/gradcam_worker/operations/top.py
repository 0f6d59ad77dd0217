"""`gradcam top`: queues, workers, throughput and errors at a glance, again every second."""

import json
import os
import select
import sys
import termios
import time
import tty
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.errors import LedgerUnavailable
from gradcam_worker.ledger.redis import stats
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability.queue_depths import QueueDepths
from gradcam_worker.operations import console
from gradcam_worker.schemas.shard import ROUTE, ROUTES
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets
from gradcam_worker.text.visible import counted

EVERY_S = 1.0  # between two looks
MINUTE_MS, HOUR_MS = 60_000, 3_600_000
LETTERS = 500  # of the last hour that are read for their codes
STATES = ("succeeded", "failed", "canceled", "expired")
UNSAID = {"device": "", "since": "", "running": 0, "batch": 0.0, "trouble": None}
MOST_CODES, MOST_BACKFILLS = 6, 4  # that are shown, the most frequent, the first ones
MOST_NOTES = 5  # on a screen, of what is wrong with workers
NOTE, MARGIN = 2, 10  # lines of each, and columns that breaking between words may leave unused
LEFT = 4  # lines below the workers that always stay free: what is left out, the hint, the prompt


@dataclass(frozen=True)
class Snapshot:
    """What was seen at one moment. A job of a backfill is a shard, not an image."""

    at: str
    place: str
    depths: QueueDepths
    parked: int = 0  # recipients that could not be told
    ended: Mapping[str, int] = field(default_factory=dict)  # jobs of about the last 60 s, by state
    shards_ended: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)  # dead letters of the last hour, by code
    errors_of: int = 0  # dead letters of the last hour, where not all were read
    workers: tuple[Mapping[str, Any], ...] = ()
    backfills: tuple[Mapping[str, Any], ...] = ()


class Dashboard:
    """Looks again and again, and reads nothing twice that cannot have changed."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is connected yet."""
        self._ledger = RedisLedger(settings, timeout_s=3, retries=1)
        self._backfills = RedisBackfillRegistry(self._ledger.server)
        self._place, self._lease_s = without_secrets(settings.ledger), settings.lease_s
        self._codes: dict[str, str] = {}  # of dead letters, by job

    def look(self) -> Snapshot:
        """What there is to be seen now. Raises LedgerUnavailable."""
        server, p = self._ledger.server, self._ledger.server.prefix
        with server.translate_errors():
            seconds, micros = server.redis.time()
            now_ms = seconds * 1000 + micros // 1000
            minute = now_ms // MINUTE_MS
            with server.redis.pipeline(transaction=False) as pipe:
                pipe.hgetall(f"{p}ended:{minute - 1}")
                pipe.hgetall(f"{p}ended:{minute}")
                pipe.zcard(f"{p}parked")
                pipe.zcount(f"{p}dead", now_ms - HOUR_MS, "+inf")
                pipe.zrange(
                    f"{p}dead", "+inf", now_ms - HOUR_MS, desc=True, byscore=True, offset=0, num=LETTERS
                )
                before, now, parked, recent, letters = pipe.execute()
        jobs, shards = _last_minute(before, now, (now_ms % MINUTE_MS) / MINUTE_MS)
        return Snapshot(
            at=datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="seconds"),
            place=self._place,
            depths=stats.read_depths(server, self._lease_s),
            parked=parked,
            ended=jobs,
            shards_ended=shards,
            errors=self._count(letters),
            errors_of=recent,
            workers=tuple(
                {"id": name, **_health(said)} for name, said in sorted(self._ledger.find_workers().items())
            ),
            backfills=tuple(self._backfills.running()),
        )

    def _count(self, letters: Sequence[str]) -> dict[str, int]:
        """Dead letters by code, the most frequent first."""
        unread = [one for one in letters if one not in self._codes]
        found = self._ledger.read_many(unread)
        fresh = {one: _code(found.get(one)) for one in unread}
        self._codes = {one: self._codes.get(one) or fresh[one] for one in letters}
        return dict(Counter(self._codes.values()).most_common())


def _health(said: str) -> dict[str, Any]:
    """What a worker, of this version or another, says of itself."""
    try:
        return {**UNSAID, **json.loads(said)}
    except (ValueError, TypeError):
        return {**UNSAID, "trouble": "It says of itself what this version cannot read."}


def _code(document: StatusDocument | None) -> str:
    return document.error.code if document and document.error else "forgotten"


def _last_minute(
    before: Mapping[str, str], now: Mapping[str, str], share: float
) -> tuple[dict[str, int], dict[str, int]]:
    """What ended in about the last 60 s, jobs and shards apart, from the counts of two minutes.

    Of the minute before, as much counts as the one that runs has not reached yet.
    """
    jobs, shards = dict.fromkeys(STATES, 0), dict.fromkeys(STATES, 0)
    for name in before.keys() | now.keys():
        route, _, state = name.partition(" ")
        count = round(int(before.get(name, 0)) * (1 - share) + int(now.get(name, 0)))
        some = shards if route == ROUTE else jobs
        some[state] = some.get(state, 0) + count
    return jobs, shards


def run(settings: Settings, *, once: bool, as_json: bool) -> int:
    """Show it until `q` or Ctrl-C, or just once. Raises LedgerUnavailable, where it is shown once."""
    watch = Dashboard(settings)
    if as_json:
        console.print_json(asdict(watch.look()))
    elif once or not console.out.is_terminal:
        console.out.print(picture(watch.look()))
    else:
        _follow(watch)
    return 0


def _follow(watch: Dashboard) -> None:
    shown: RenderableType = Text("")
    with _keys() as pressed, Live(console=console.out, screen=True, auto_refresh=False) as live:
        while True:
            try:
                shown = picture(watch.look(), height=console.out.height)
                live.update(shown, refresh=True)
            except LedgerUnavailable as error:  # the last picture stays, and is said to be old
                live.update(Group(console.plain(str(error), "red"), shown), refresh=True)
            if "q" in pressed(EVERY_S):
                return


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """What is typed within so many seconds, without Return; Ctrl-C still ends the program."""
    if not sys.stdin.isatty():

        def nothing(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield nothing
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def pressed(seconds: float) -> str:
        typed = select.select([keyboard], [], [], seconds)[0]
        return os.read(keyboard, 64).decode(errors="replace").casefold() if typed else ""

    try:
        tty.setcbreak(keyboard)
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def picture(look: Snapshot, *, height: int | None = None) -> RenderableType:
    """All of it, 80 columns wide; no higher than `height` lines, workers in trouble first."""
    head = Text.assemble(("gradcam top", "bold"), f" · {look.place} · {look.at[11:19]} UTC")
    parts: list[RenderableType] = [head, "", _counts(look), ""]
    lines = 4 + 1 + len(ROUTES)
    if look.errors:
        parts += [_errors(look), ""]
        lines += 2 + min(len(look.errors), MOST_CODES)
    if look.backfills:
        parts += [*map(_backfill, look.backfills[:MOST_BACKFILLS]), ""]
        lines += 2 * min(len(look.backfills), MOST_BACKFILLS) + 1
    room = None if height is None else max(height - lines - LEFT, 2)
    parts.append(_workers(look.workers, room))
    return Group(*parts)


def _counts(look: Snapshot) -> Table:
    """The queues on the left; what runs, what ended and how on the right."""
    there = look.depths
    left = console.table("queue", "waiting", "oldest", numbers=("waiting", "oldest"))
    for route, jobs in there.queued.items():
        oldest = console.span(there.oldest_s[route]) if jobs else ""
        left.add_row(route, f"{jobs:,}", oldest, style="" if jobs else "dim")
    right = console.table("last 60 s", "jobs", "shards", "now", "", numbers=("jobs", "shards"))
    now = {
        "running": there.running,
        "retrying": there.retrying,
        "dead letters": there.dead,
        "parked": look.parked,
    }
    for state, (name, count) in zip(STATES, now.items(), strict=True):
        jobs, shards = look.ended.get(state, 0), look.shards_ended.get(state, 0)
        ill = "red" if state == "failed" and jobs + shards else ""
        right.add_row(Text(state, ill), f"{jobs:,}", f"{shards:,}", name, Text(f"{count:,}", justify="right"))
    right.add_row("", "", "", "to be told", Text(f"{there.events:,}", justify="right"))
    both = Table.grid(padding=(0, 5))
    both.add_row(left, right)
    return both


def _errors(look: Snapshot) -> RenderableType:
    read = sum(look.errors.values())
    of = f", of the last {read:,}" if read < look.errors_of else ""
    shown = [*look.errors.items()][:MOST_CODES]
    rows = [console.plain(f"{count:>9,}  {code}", "red") for code, count in shown]
    return Group(Text(f"failed in the last hour: {look.errors_of:,}{of}", "bold"), *rows)


def _backfill(facts: Mapping[str, Any]) -> RenderableType:
    done = facts["before"] + facts["done"] + facts["partly"]
    most = "" if facts["whole"] else "at least "
    line = f"{done:,} of {most}{counted(facts['planned'], 'row')} · {facts['rows_per_s']:,.0f} rows/s"
    line += f" · {counted(facts['in_flight'], 'shard')} in flight · {facts['failed']:,} failed"
    place = console.plain(f"backfill {facts['output']}", "bold")
    place.truncate(console.out.width, overflow="ellipsis")
    return Group(place, console.plain("    " + line))


def _workers(workers: Sequence[Mapping[str, Any]], room: int | None) -> RenderableType:
    """A line each, and one for what is wrong; as many as there is room for, and how many more there are."""
    if not workers:
        return Text("No worker lives: start one with `gradcam worker`.", "yellow")
    running = sum(one["running"] for one in workers)
    title = f"{counted(len(workers), 'worker')}, {counted(running, 'job')} in hand"
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
    made.pad_edge = False
    made.add_column("worker", no_wrap=True, overflow="ellipsis", min_width=20)
    made.add_column("device", no_wrap=True, overflow="ellipsis", max_width=22)
    made.add_column("since", no_wrap=True)
    for numbers in ("in hand", "batch"):
        made.add_column(numbers, no_wrap=True, justify="right")
    if room is not None:
        room = max(room - 2 - NOTE * min(sum(bool(one["trouble"]) for one in workers), MOST_NOTES), 1)
    shown = sorted(workers, key=lambda one: not one["trouble"])[:room]
    for one in shown:
        begun = datetime.fromisoformat(one["since"]) if one["since"] else None
        since = console.span(console.age_s(begun.timestamp())) if begun else ""
        batch = f"{one['batch']:.1f}" if one["batch"] else ""
        name, device = console.plain(one["id"]), console.plain(one["device"])
        made.add_row(name, device, since, str(one["running"]), batch, style="red" if one["trouble"] else "")
    notes = [console.plain(f"{one['id']}: {one['trouble']}", "red") for one in shown if one["trouble"]]
    for note in notes:
        note.truncate(NOTE * (console.out.width - MARGIN), overflow="ellipsis")
    more = [Text(f"... and {len(workers) - len(shown)} more.", "dim")] if len(shown) < len(workers) else []
    return Group(made, *more, *(notes if room is None else notes[:MOST_NOTES]))
