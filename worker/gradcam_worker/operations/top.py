"""`gradcam top`: shows queues, workers, throughput and errors, refreshed every second."""

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
from gradcam_worker.observability.queue_depths import QueueDepths, TenantUse
from gradcam_worker.operations.terminal import console
from gradcam_worker.redis_server.server_checks import ServerMonitor
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.schemas.work import ROUTE, ROUTES
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets
from gradcam_worker.text.visible import counted

REFRESH_INTERVAL_S = 1.0
REDIS_INTERVAL_S, REDIS_TIMEOUT_S = 10.0, 1.0  # of the checks of Redis, which must not hold up the screen
MINUTE_MS, HOUR_MS = 60_000, 3_600_000
MAX_DEAD_LETTERS = 500  # of the last hour, read to count their error codes
STATES = ("succeeded", "failed", "canceled", "expired")
DEFAULT_HEALTH = {"device": "", "since": "", "running": 0, "batch": 0.0, "trouble": None, "engine": None}
DEFAULT_ENGINE = {"id": "", "pid": 0, "requests": 0, "networks": 0, "trouble": None}
MAX_CODES, MAX_BACKFILLS, MAX_TENANTS = 6, 4, 5  # shown
COUNTED_OF_TENANTS = ("waiting", "ended today", "device s")
MAX_NOTES = 5  # about workers in trouble, on a screen
NOTE_LINES, WRAP_MARGIN = 4, 10  # lines of one note; columns that may stay empty where it wraps between words
FREE_LINES = 4  # below the workers: the number of workers that are not shown, the hint, the prompt


@dataclass(frozen=True)
class Snapshot:
    """The state at one moment. The jobs of a backfill are its shards.

    The names of the fields are keys of the JSON of `gradcam top --json`.
    """

    at: str  # ISO 8601, by the ledger's clock
    place: str  # URL of the ledger, without its password
    depths: QueueDepths
    redis: tuple[Mapping[str, str], ...] = ()  # failing checks of the servers: check, severity, detail, fix
    parked: int = 0  # recipients with undelivered events that no worker retries
    ended: Mapping[str, int] = field(default_factory=dict)  # jobs of about the last 60 s, by state
    shards_ended: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)  # dead letters of the last hour, by code
    errors_of: int = 0  # all dead letters of the last hour; `errors` counts at most MAX_DEAD_LETTERS
    workers: tuple[Mapping[str, Any], ...] = ()
    backfills: tuple[Mapping[str, Any], ...] = ()


class Dashboard:
    """Reads snapshots from the ledger. It caches the error codes of dead letters, which never change."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is connected yet."""
        self._ledger = RedisLedger(settings, timeout_s=3, retries=1)
        self._backfills = RedisBackfillRegistry(self._ledger.server)
        self._ledger_url, self._lease_s = without_secrets(settings.ledger), settings.lease_s
        self._codes: dict[str, str] = {}  # job id -> error code, of dead letters
        self._monitor = ServerMonitor(settings, timeout_s=REDIS_TIMEOUT_S)
        self._redis: tuple[Mapping[str, str], ...] = ()
        self._redis_due_s = 0.0  # monotonic time

    def snapshot(self) -> Snapshot:
        """Read the present state. Raises LedgerUnavailable."""
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
                    f"{p}dead",
                    "+inf",
                    now_ms - HOUR_MS,
                    desc=True,
                    byscore=True,
                    offset=0,
                    num=MAX_DEAD_LETTERS,
                )
                previous, current, parked, recent, letters = pipe.execute()
        jobs, shards = _last_minute(previous, current, (now_ms % MINUTE_MS) / MINUTE_MS)
        return Snapshot(
            at=datetime.fromtimestamp(now_ms / 1000, UTC).isoformat(timespec="seconds"),
            place=self._ledger_url,
            depths=stats.read_depths(server, self._lease_s),
            redis=self._check_redis(),
            parked=parked,
            ended=jobs,
            shards_ended=shards,
            errors=self._count_codes(letters),
            errors_of=recent,
            workers=tuple(
                {"id": name, **_health(text)} for name, text in sorted(self._ledger.find_workers().items())
            ),
            backfills=tuple(self._backfills.running()),
        )

    def _check_redis(self) -> tuple[Mapping[str, str], ...]:
        """What is wrong with the servers of broker and ledger: see `redis_server.server_checks`."""
        if time.monotonic() >= self._redis_due_s:
            self._redis = tuple(
                {"check": one.name, "severity": one.severity, "detail": one.detail, "fix": one.fix}
                for one in self._monitor.read_checks()
                if not one.well
            )
            self._redis_due_s = time.monotonic() + REDIS_INTERVAL_S
        return self._redis

    def _count_codes(self, letters: Sequence[str]) -> dict[str, int]:
        """Count dead letters by error code, the most frequent first."""
        new = [job_id for job_id in letters if job_id not in self._codes]
        documents = self._ledger.read_many(new)
        new_codes = {job_id: _code(documents.get(job_id)) for job_id in new}
        self._codes = {job_id: self._codes.get(job_id) or new_codes[job_id] for job_id in letters}
        return dict(Counter(self._codes.values()).most_common())


def _health(text: str) -> dict[str, Any]:
    """Parse the health that a worker has written to the ledger; its version may be another one."""
    try:
        health = {**DEFAULT_HEALTH, **json.loads(text)}
        return {**health, "engine": health["engine"] and {**DEFAULT_ENGINE, **health["engine"]}}
    except (ValueError, TypeError):
        return {**DEFAULT_HEALTH, "trouble": "It reports its health in a form that this version cannot read."}


def _code(document: StatusDocument | None) -> str:
    return document.error.code if document and document.error else "forgotten"


def _last_minute(
    previous: Mapping[str, str], current: Mapping[str, str], elapsed: float
) -> tuple[dict[str, int], dict[str, int]]:
    """Estimate how many jobs, and how many shards, ended in the last 60 s, by state.

    Args:
        previous: Counts of the minute before the current one, by route and state.
        current: Counts of the current minute.
        elapsed: Share of the current minute that has passed: the rest of 60 s lies in the previous one.
    """
    jobs, shards = dict.fromkeys(STATES, 0), dict.fromkeys(STATES, 0)
    for name in previous.keys() | current.keys():
        route, _, state = name.partition(" ")
        count = round(int(previous.get(name, 0)) * (1 - elapsed) + int(current.get(name, 0)))
        counts = shards if route == ROUTE else jobs
        counts[state] = counts.get(state, 0) + count
    return jobs, shards


def run(settings: Settings, *, once: bool, as_json: bool) -> int:
    """Show the state until `q` or Ctrl-C, or only once.

    Args:
        settings: Name the ledger.
        once: Show it once.
        as_json: Print it once, as JSON.

    Returns:
        The exit code, 0.

    Raises:
        LedgerUnavailable: It is to be shown once, and the ledger cannot be reached.
    """
    dashboard = Dashboard(settings)
    if as_json:
        console.print_json(asdict(dashboard.snapshot()))
    elif once or not console.out.is_terminal:
        console.out.print(render(dashboard.snapshot()))
    else:
        _refresh_until_quit(dashboard)
    return 0


def _refresh_until_quit(dashboard: Dashboard) -> None:
    screen: RenderableType = Text("")
    with _key_reader() as read_keys, Live(console=console.out, screen=True, auto_refresh=False) as live:
        while True:
            try:
                screen = render(dashboard.snapshot(), height=console.out.height)
                live.update(screen, refresh=True)
            except LedgerUnavailable as error:  # the previous screen stays below the error
                live.update(Group(console.plain(str(error), "red"), screen), refresh=True)
            if "q" in read_keys(REFRESH_INTERVAL_S):
                return


@contextmanager
def _key_reader() -> Iterator[Callable[[float], str]]:
    """Make a function that waits that many seconds for keys and returns them; Ctrl-C still interrupts."""
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def read_keys(seconds: float) -> str:
        ready = select.select([keyboard], [], [], seconds)[0]
        return os.read(keyboard, 64).decode(errors="replace").casefold() if ready else ""

    try:
        tty.setcbreak(keyboard)
        yield read_keys
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def render(snapshot: Snapshot, *, height: int | None = None) -> RenderableType:
    """Draw a snapshot 80 columns wide.

    Args:
        snapshot: What to draw.
        height: Most lines that it may have; workers that do not fit are left out, healthy ones first.
    """
    head = Text.assemble(("gradcam top", "bold"), f" · {snapshot.at[11:19]} UTC · {snapshot.place}")
    head.truncate(console.out.width, overflow="ellipsis")  # a URL of Sentinels is long
    notes = [_redis_note(check) for check in snapshot.redis]
    parts: list[RenderableType] = [head, *notes, "", _counts(snapshot), ""]
    lines = 4 + 1 + len(ROUTES) + NOTE_LINES * len(notes)
    if snapshot.errors:
        parts += [_errors(snapshot), ""]
        lines += 2 + min(len(snapshot.errors), MAX_CODES)
    if snapshot.backfills:
        parts += [*map(_backfill, snapshot.backfills[:MAX_BACKFILLS]), ""]
        shown = snapshot.backfills[:MAX_BACKFILLS]
        lines += 2 * len(shown) + sum(bool(facts.get("trouble")) for facts in shown) + 1
    if snapshot.depths.tenants:
        parts += [_tenants(snapshot.depths.tenants), ""]
        lines += 2 + min(len(snapshot.depths.tenants), MAX_TENANTS + 1)
    max_lines = None if height is None else max(height - lines - FREE_LINES, 2)
    parts.append(_workers(snapshot.workers, max_lines))
    return Group(*parts)


def _redis_note(check: Mapping[str, str]) -> Text:
    style = "red" if check["severity"] == "error" else "yellow"
    return _at_most(NOTE_LINES, console.plain(f"{check['detail']} {check['fix']}", style))


def _at_most(lines: int, note: Text) -> Text:
    """Shorten a note, which wraps between words."""
    note.truncate(lines * (console.out.width - WRAP_MARGIN), overflow="ellipsis")
    return note


def _counts(snapshot: Snapshot) -> Table:
    """The queues on the left; ended jobs by state and present counts on the right."""
    depths = snapshot.depths
    queues = console.table("queue", "waiting", "oldest", numbers=("waiting", "oldest"))
    for route, jobs in depths.queued.items():
        oldest = console.duration_text(depths.oldest_s[route]) if jobs else ""
        queues.add_row(route, f"{jobs:,}", oldest, style="" if jobs else "dim")
    counts = console.table("last 60 s", "jobs", "shards", "now", "", numbers=("jobs", "shards"))
    present = {
        "running": depths.running,
        "retrying": depths.retrying,
        "dead letters": depths.dead,
        "parked": snapshot.parked,
    }
    for state, (name, count) in zip(STATES, present.items(), strict=True):
        jobs, shards = snapshot.ended.get(state, 0), snapshot.shards_ended.get(state, 0)
        style = "red" if state == "failed" and jobs + shards else ""
        number = Text(f"{count:,}", justify="right")
        counts.add_row(Text(state, style), f"{jobs:,}", f"{shards:,}", name, number)
    counts.add_row("", "", "", "undelivered", Text(f"{depths.events:,}", justify="right"))
    both = Table.grid(padding=(0, 5))
    both.add_row(queues, counts)
    return both


def _errors(snapshot: Snapshot) -> RenderableType:
    counted_letters = sum(snapshot.errors.values())
    part = f", of the last {counted_letters:,}" if counted_letters < snapshot.errors_of else ""
    shown = [*snapshot.errors.items()][:MAX_CODES]
    rows = [console.plain(f"{count:>9,}  {code}", "red") for code, count in shown]
    return Group(Text(f"failed in the last hour: {snapshot.errors_of:,}{part}", "bold"), *rows)


def _backfill(facts: Mapping[str, Any]) -> RenderableType:
    done = facts["before"] + facts["done"] + facts["partly"]
    at_least = "" if facts["whole"] else "at least "
    line = f"{done:,} of {at_least}{counted(facts['planned'], 'row')} · {facts['rows_per_s']:,.0f} rows/s"
    line += f" · {counted(facts['in_flight'], 'shard')} in flight · {facts['failed']:,} failed"
    title = console.plain(f"backfill {facts['output']}", "bold")
    title.truncate(console.out.width, overflow="ellipsis")
    paused = [console.plain(f"    paused: {facts['trouble']}", "red")] if facts.get("trouble") else []
    for note in paused:
        note.truncate(console.out.width, overflow="ellipsis")
    return Group(title, console.plain("    " + line), *paused)


def _tenants(tenants: Mapping[str, TenantUse]) -> RenderableType:
    """The tenants that wait for most, or have used most today; and all others together."""
    table = console.table("tenant", "waiting", "ended today", "device s", numbers=COUNTED_OF_TENANTS)
    names = sorted(tenants, key=lambda name: (-tenants[name].queued, -tenants[name].jobs_today, name))
    rows = [(name, [tenants[name]]) for name in names[:MAX_TENANTS]]
    if others := names[MAX_TENANTS:]:
        rows.append((f"... and {len(others)} more", [tenants[name] for name in others]))
    for name, uses in rows:
        queued, jobs = sum(use.queued for use in uses), sum(use.jobs_today for use in uses)
        device_s = sum(use.device_s_today for use in uses)
        style = "" if queued or jobs else "dim"
        table.add_row(console.plain(name), f"{queued:,}", f"{jobs:,}", f"{device_s:,.1f}", style=style)
    return table


@dataclass(frozen=True)
class _Row:
    """A process in the table of workers."""

    label: str  # in the table
    name: str
    device: str
    since: str
    running: int
    batch: float
    trouble: str | None
    is_worker: bool = True  # else an engine process: its job processes are the workers


def _rows(workers: Sequence[Mapping[str, Any]]) -> list[_Row]:
    """A row for each worker, below its engine process if it has one; those in trouble first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for worker in workers:
        engine = worker.get("engine")
        host = worker["id"].partition(":")[0]
        groups.setdefault((host, str(engine["id"])) if engine else ("", worker["id"]), []).append(worker)
    grouped = []
    for (host, _), members in groups.items():
        rows = []
        engines = [worker["engine"] for worker in members if worker.get("engine")]
        if engines:
            first, trouble = members[0], next(filter(None, (one["trouble"] for one in engines)), None)
            name = f"{host} engine {engines[0]['pid']}"
            requests = sum(one["requests"] for one in engines)
            rows.append(_Row(name, name, first["device"], "", requests, first["batch"], trouble, False))
        for worker in members:
            name, running, trouble = worker["id"], worker["running"], worker["trouble"]
            if engines:
                label = "  " + name.removeprefix(f"{host}:")
                rows.append(_Row(label, name, "", worker["since"], running, 0.0, trouble))
            else:
                device, batch = worker["device"], worker["batch"]
                rows.append(_Row(name, name, device, worker["since"], running, batch, trouble))
        grouped.append(sorted(rows, key=lambda row: row.is_worker and not row.trouble))
    grouped.sort(key=lambda rows: not any(row.trouble for row in rows))
    return [row for rows in grouped for row in rows]


def _workers(workers: Sequence[Mapping[str, Any]], max_lines: int | None) -> RenderableType:
    """A row for each process, those in trouble first, and a note for each trouble, in at most `max_lines`."""
    if not workers:
        return Text("No worker is alive: start one with `gradcam worker`.", "yellow")
    rows = _rows(workers)
    running, paused = sum(worker["running"] for worker in workers), sum(bool(row.trouble) for row in rows)
    title = f"{counted(len(workers), 'worker')}, {counted(running, 'job')} running"
    title += f", {counted(paused, 'process is', 'processes are')} paused" if paused else ""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
    table.pad_edge = False
    table.add_column("worker", no_wrap=True, overflow="ellipsis", min_width=20)
    table.add_column("device", no_wrap=True, overflow="ellipsis", max_width=22)
    table.add_column("uptime", no_wrap=True, min_width=6)
    for numbers in ("running", "batch"):
        table.add_column(numbers, no_wrap=True, justify="right", min_width=len(numbers))
    max_rows = None
    if max_lines is not None:
        max_rows = max(max_lines - 2 - NOTE_LINES * min(paused, MAX_NOTES), 1)
    shown = rows[:max_rows]
    for row in shown:
        started = datetime.fromisoformat(row.since) if row.since else None
        uptime = console.duration_text(console.age_s(started.timestamp())) if started else ""
        batch = f"{row.batch:.1f}" if row.batch else ""
        label, device = console.plain(row.label), console.plain(row.device)
        table.add_row(label, device, uptime, str(row.running), batch, style="red" if row.trouble else "")
    paused_notes = (f"{row.name} is paused: {row.trouble}" for row in shown if row.trouble)
    notes = [_at_most(NOTE_LINES, console.plain(note, "red")) for note in paused_notes]
    hidden = len(workers) - sum(row.is_worker for row in shown)
    rest = [Text(f"... and {hidden} more.", "dim")] if hidden else []
    return Group(table, *rest, *(notes if max_lines is None else notes[:MAX_NOTES]))
