"""`gradcam top`: snapshots of a real ledger, and how they are drawn."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.cli.main import main
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import ImageNotFound, StorageUnavailable
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.observability.queue_depths import QueueDepths, TenantUse
from gradcam_worker.operations import top
from gradcam_worker.operations.terminal import console as terminal
from gradcam_worker.redis_server.client import RedisClients
from gradcam_worker.schemas.job import Priority
from gradcam_worker.schemas.status import Problem, WorkerRef
from gradcam_worker.schemas.work import ROUTES
from gradcam_worker.settings import Settings

HEALTH = {"device": "NVIDIA H100 80GB HBM3", "since": "2026-11-01T00:00:00+00:00", "running": 3}
WELL = {**HEALTH, "batch": 12.5, "trouble": None}
ILL = {**WELL, "trouble": "The storage failed 3 times: s3://results/cams/health/probe.txt: HTTP 503."}
FACTS = {
    "backfill": "b",
    "output": "s3://results/cats",
    "before": 0,
    "done": 12_000,
    "partly": 12,
    "planned": 30_000,
    "whole": False,
    "rows_per_s": 412.3,
    "in_flight": 4,
    "failed": 3,
}
WORKER = WorkerRef(id="gpu-1:7", device="cpu")
WIDTH, HEIGHT, TIMEOUT_S = 80, 40, 30
EMPTY = top.Snapshot(
    at="2026-11-01T10:11:12+00:00",
    place="redis://queue/0",
    depths=QueueDepths(dict.fromkeys(ROUTES, 0), dict.fromkeys(ROUTES, 0.0), 0, 0, 0, 0, 0.0, 0),
)


def submit_jobs(settings: Settings, *priorities: Priority) -> list[str]:
    client = GradcamClient(settings=settings)
    return [
        client.submit(image="s3://in/a.jpg", network="vgg16", target={"top_n": 1}, priority=priority)
        for priority in priorities
    ]


def run_job(
    ledger: RedisLedger, job_id: str, error: ImageNotFound | StorageUnavailable | None = None
) -> None:
    """Run a job until it is final."""
    claimed = ledger.claim(ledger.read(job_id), WORKER).document
    if error:
        ledger.finish(claimed, status="failed", error=Problem.of(error, stage="fetch", attempt=1))
    else:
        ledger.finish(claimed, status="succeeded")


def rendered_lines(
    snapshot: top.Snapshot, monkeypatch: pytest.MonkeyPatch, height: int | None = None
) -> list[str]:
    """The lines that a terminal of 80 columns shows."""
    console = Console(width=WIDTH, height=HEIGHT)
    monkeypatch.setattr(terminal, "out", console)
    with console.capture() as shown:
        console.print(top.render(snapshot, height=height))
    return shown.get().splitlines()


def test_a_snapshot_has_queues_workers_throughput_errors_and_backfills(settings: Settings) -> None:
    ledger = RedisLedger(settings)
    high, first, second, canceled, *_ = submit_jobs(
        settings, "high", "normal", "normal", "bulk", "low", "low"
    )
    run_job(ledger, high)
    run_job(ledger, first, ImageNotFound("It is not there."))
    run_job(ledger, second, StorageUnavailable("Not just now."))
    GradcamClient(settings=settings).cancel(canceled)
    ledger.renew_leases("gpu-1:7", json.dumps(WELL), {})
    ledger.renew_leases("gpu-2:8", "from a later version", {})
    RedisBackfillRegistry(ledger.server).renew("s3://results/cats", "me", FACTS, [], "token", enter=True)
    dashboard = top.Dashboard(settings)
    for snapshot in (dashboard.snapshot(), dashboard.snapshot()):  # the second time, codes are cached
        assert snapshot.depths.queued == {"high": 0, "normal": 0, "low": 2, "bulk": 0, "shard": 0}
        assert snapshot.ended == {"succeeded": 1, "failed": 2, "canceled": 1, "expired": 0}
        assert (snapshot.depths.dead, snapshot.errors_of) == (2, 2)
        assert snapshot.errors == {"image_not_found": 1, "storage_unavailable": 1}
        assert snapshot.workers[0] == {"id": "gpu-1:7", "engine": None, **WELL}
        assert "cannot read" in snapshot.workers[1]["trouble"]
        top.render(snapshot)
        assert [facts["output"] for facts in snapshot.backfills] == ["s3://results/cats"]
    kept = ledger.server.redis.keys(f"{settings.key_prefix}ended:*")
    assert {0 < ledger.server.redis.pttl(key) <= 900_000 for key in kept} == {True}, "counts expire"


def test_what_is_wrong_with_redis_is_shown_below_the_head(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = {"maxmemory_policy": "allkeys-lru", "maxmemory": 1000, "used_memory": 900, "aof_enabled": 1}
    monkeypatch.setattr(RedisClients, "read_info", lambda _: info)
    dashboard = top.Dashboard(settings)
    snapshot = dashboard.snapshot()
    assert [(one["check"], one["severity"]) for one in snapshot.redis] == [
        ("eviction", "error"),
        ("memory", "warning"),
    ]
    lines = rendered_lines(replace(EMPTY, redis=snapshot.redis), monkeypatch, HEIGHT)
    shown = " ".join(" ".join(lines[2:8]).split())
    assert "when that is full it evicts accepted jobs. Set maxmemory-policy noeviction" in shown
    assert "uses 90% of maxmemory 1,000: when that is full it accepts no jobs." in shown
    monkeypatch.setattr(RedisClients, "read_info", lambda _: {})
    assert dashboard.snapshot().redis == snapshot.redis, "they are not made for each screen"
    assert not top.Dashboard(settings).snapshot().redis
    assert "maxmemory" not in " ".join(rendered_lines(EMPTY, monkeypatch))


def test_the_previous_minute_counts_in_proportion_to_its_part_of_the_last_60_seconds() -> None:
    before, now = {"high succeeded": "60", "shard failed": "4"}, {"normal succeeded": "5"}
    jobs, shards = top._last_minute(before, now, elapsed=0.25)
    assert (jobs["succeeded"], shards["failed"]) == (45 + 5, 3)


def test_fifty_workers_fit_a_terminal_and_those_in_trouble_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "gradcam-worker-6d5f8c9b7d-x{:02}ab:1"
    workers = tuple({"id": name.format(number), **(ILL if number == 30 else WELL)} for number in range(50))
    errors = {f"code_{number}": 9 for number in range(20)}
    backfills = tuple({**FACTS, "output": "s3://results/" + "x" * 200} for _ in range(9))
    full = replace(EMPTY, workers=workers, errors=errors, errors_of=180, backfills=backfills)
    lines = rendered_lines(full, monkeypatch, HEIGHT)
    assert len(lines) <= HEIGHT - 1
    assert max(map(len, lines)) <= WIDTH
    table = next(at for at, line in enumerate(lines) if line.startswith("worker "))
    assert lines[table + 1].split()[0] == name.format(30)
    assert any("and 4" in line and "more." in line for line in lines)
    assert "HTTP 503" in " ".join(lines)
    whole = rendered_lines(full, monkeypatch)
    assert sum(line.startswith("gradcam-worker-") for line in whole) == 51, (
        "a row for each, and a note about one"
    )
    roomy = rendered_lines(replace(EMPTY, workers=workers[:3]), monkeypatch, HEIGHT)
    assert not any("more." in line for line in roomy)


def test_a_long_url_leaves_the_head_one_line_with_the_time_and_a_note_tells_the_cause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sentinels = "sentinel://" + ",".join(f"sentinel-{number}.redis.svc:26379" for number in (1, 2, 3))
    unreachable = (
        "The storage has failed since 2026-11-30T16:39:51Z: s3://results/cams/health/probe.txt could not be "
        'written: Could not connect to the endpoint URL: "http://minio.storage.svc:9000/results/cams/health/probe.txt"'
    )
    worker = {**WELL, "id": "gradcam-worker-7d9f8b6c5d-x2x7k:c3609848:18248", "trouble": unreachable}
    lines = rendered_lines(replace(EMPTY, place=f"{sentinels}/mymaster/0", workers=(worker,)), monkeypatch)
    assert lines[0].startswith("gradcam top · 10:11:12 UTC · sentinel://sentinel-1")
    assert lines[1] == "" or lines[1].isspace()
    assert "Could not connect to the endpoint URL" in " ".join(" ".join(lines).split())


def test_job_processes_are_below_their_engine_and_what_is_paused_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = {"id": "a/engine-0", "pid": 41, "requests": 3, "networks": 1, "trouble": None}
    gone = {**engine, "id": "b/engine-0", "trouble": "the engine process does not answer"}
    workers = (
        {"id": "gpu-1:aa:51", **WELL, "engine": engine},
        {"id": "gpu-1:bb:51", **WELL, "engine": gone},  # another container of that host
        {"id": "gpu-1:cc:52", **ILL, "engine": engine},
        {"id": "gpu-2:dd:7", **WELL, "engine": None},
    )
    lines = rendered_lines(replace(EMPTY, workers=workers), monkeypatch)
    at = next(at for at, line in enumerate(lines) if line.startswith("4 workers"))
    assert lines[at].strip() == "4 workers, 12 jobs running, 2 processes are paused"
    assert lines[at + 2].startswith("gpu-1 engine 41  ")
    assert [line.split()[0] for line in lines[at + 2 : at + 8]] == [
        *("gpu-1", "cc:52", "aa:51"),
        *("gpu-1", "bb:51", "gpu-2:dd:7"),
    ]
    assert lines[at + 2].split()[-2:] == ["6", "12.5"], "requests of both job processes"
    said = " ".join(" ".join(lines[at + 8 :]).split())
    assert "gpu-1:cc:52 is paused: The storage failed 3 times" in said
    assert "gpu-1 engine 41 is paused: the engine process does not answer" in said
    stopped = {**FACTS, "trouble": "no worker takes work: The storage failed " + "x" * 200}
    shown = rendered_lines(replace(EMPTY, backfills=(stopped, FACTS)), monkeypatch)
    assert [line[:37] for line in shown if "paused" in line] == ["    paused: no worker takes work: The"]


def test_tenants_that_wait_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tenants = {f"t{number}": TenantUse(0, number, 0.5) for number in range(8)} | {
        "waits": TenantUse(1234, 2, 3.25)
    }
    lines = rendered_lines(replace(EMPTY, depths=replace(EMPTY.depths, tenants=tenants)), monkeypatch)
    at = next(at for at, line in enumerate(lines) if line.startswith("tenant"))
    assert lines[at + 1].split() == ["waits", "1,234", "2", "3.2"]
    assert [line.split()[0] for line in lines[at + 2 : at + 6]] == ["t7", "t6", "t5", "t4"]
    assert lines[at + 6].split() == ["...", "and", "4", "more", "0", "6", "2.0"]


def test_names_from_workers_cannot_control_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = {**WELL, "id": "\x1b[2Jgpu[red]", "device": "\x1b]0;x\x07", "trouble": "bad\x1b[31m"}
    snapshot = replace(EMPTY, workers=(hostile,), errors={"\x1b[5m": 1}, errors_of=1)
    shown = "\n".join(rendered_lines(snapshot, monkeypatch))
    assert "\x1b" not in shown
    assert "gpu[red]" in shown
    assert "No worker is alive" in "\n".join(rendered_lines(EMPTY, monkeypatch))


def test_json_is_printed_and_an_unreachable_ledger_is_a_sentence(
    settings: Settings, free_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submit_jobs(settings, "high")
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    assert main(["top", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["depths"]["queued"]["high"] == 1
    assert main(["top", "--once"]) == 0
    assert capsys.readouterr().out.startswith("gradcam top")
    monkeypatch.setenv("GRADCAM_BROKER_URL", f"redis://127.0.0.1:{free_port}/0")
    assert main(["top", "--once"]) == 5
    assert "cannot be reached" in capsys.readouterr().err


def test_a_terminal_is_refreshed_until_q(settings: Settings) -> None:
    keyboard, screen = pty.openpty()
    environment = {**os.environ, **settings.to_environment(), "TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
    command = [sys.executable, "-P", "-m", "gradcam_worker", "top"]
    with subprocess.Popen(
        command, stdin=screen, stdout=screen, stderr=screen, env=environment, start_new_session=True
    ) as program:
        os.close(screen)
        shown, end_s = read(keyboard, b"waiting"), time.monotonic() + TIMEOUT_S
        submit_jobs(settings, "high")
        while b"high          1" not in shown:
            shown += read(keyboard, b"high")
            assert time.monotonic() < end_s, shown
        os.write(keyboard, b"q")
        assert program.wait(TIMEOUT_S) == 0
    os.close(keyboard)


def read(terminal_: int, until: bytes) -> bytes:
    """Read what a program writes, until it has written `until`."""
    shown, end_s = b"", time.monotonic() + TIMEOUT_S
    while until not in shown:
        assert select.select([terminal_], [], [], max(end_s - time.monotonic(), 0))[0], shown
        shown += os.read(terminal_, 65_536)
    return shown
