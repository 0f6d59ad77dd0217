"""Backfills as a user runs them: the command, a real queue, a real object store, real worker processes."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from devtools.faults import tiny_worker
from gradcam_worker.backfill.output import DatasetDir
from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.runtime import parent_watch
from gradcam_worker.storage.stores import Stores

pytestmark = [pytest.mark.live]

WAIT_S = 100
ROWS, SHARD = 600, 20


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.2)


@dataclass
class BackfillSystem:
    """Servers, a worker with a simulated network, and a list of images."""

    stage: Any
    listed: Path
    programs: Path  # commands that are forked

    @contextlib.contextmanager
    def worker(self) -> Iterator[None]:
        process = parent_watch.spawn(
            tiny_worker.command(),
            log=self.stage.logs / "worker.log",
            environment=self.stage.settings.to_environment(),
            grace_s=45,
        )
        try:
            yield
        finally:
            parent_watch.stop(process)

    def start(self, name: str, *more: str, forked: bool = True) -> "subprocess.Popen[str]":
        """`gradcam backfill`, with an output of this name."""
        gradcam = [self.programs / "gradcam"] if forked else [sys.executable, "-P", "-m", "gradcam_worker"]
        given = [str(self.listed), "--top-n", "2", "--shard-rows", str(SHARD)]
        where = ["--output", self.uri(name)]
        return subprocess.Popen(
            [*gradcam, "backfill", *given, *where, *more],
            env=os.environ | self.stage.settings.to_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [self.programs / "gradcam", "backfill", *arguments],
            env=os.environ | self.stage.settings.to_environment(),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    def uri(self, name: str) -> str:
        return f"{self.stage.settings.output}/{name}"

    def output(self, name: str) -> DatasetDir:
        return DatasetDir(Stores(self.stage.settings, self.stage.s3).open(self.uri(name)))

    def shards(self, name: str) -> int:
        return len(self.output(name).done_keys())

    def rows(self, name: str) -> "Counter[int]":
        """How often each row is in the dataset, by its first class or its error."""
        store = Stores(self.stage.settings, self.stage.s3).open(self.uri(name))
        found: Counter[int] = Counter()
        for key in store.names("data"):
            table = pq.read_table(io.BytesIO(store.get(key)), columns=["row", "index"])
            found.update(row for row, index in zip(*table.to_pydict().values(), strict=True) if not index)
        return found


@pytest.fixture(scope="module")
def system(
    make_stage: Callable[..., Any], warm_commands: Path, tmp_path_factory: pytest.TempPathFactory
) -> BackfillSystem:
    stage = make_stage("backfill")
    rng = np.random.default_rng(7)
    uris = [
        stage.put(
            f"{number}.png", cv2.imencode(".png", rng.integers(0, 255, (32, 32, 3), np.uint8))[1].tobytes()
        )
        for number in range(7)
    ]
    uris.append("s3://photos/none.png")
    listed = tmp_path_factory.mktemp("lists") / "photos.csv"
    listed.write_text("id,image\n" + "".join(f"{row},{uris[row % 8]}\n" for row in range(ROWS)))
    return BackfillSystem(stage, listed, warm_commands)


@pytest.fixture(scope="module")
def at_work(system: Any) -> Iterator[BackfillSystem]:
    """With a worker, which stays from the first test that needs one."""
    with system.worker():
        yield system


def test_two_at_once_get_turns_and_one_is_cancelled_and_gone_on_with(
    system: Any, request: pytest.FixtureRequest
) -> None:
    one, other = system.start("one"), system.start("other", "--rate", "60")
    ledger = RedisLedger(system.stage.settings)
    registry = RedisBackfillRegistry(ledger.server)

    def facts(name: str) -> dict[str, Any]:
        record = registry.find(system.uri(name))
        return record.facts if record and record.is_running else {"in_flight": 0, "done": 0}

    wait_for(lambda: facts("one")["in_flight"] and facts("other")["in_flight"], "that both wait for a worker")
    request.getfixturevalue("at_work")
    wait_for(lambda: facts("one")["done"] and facts("other")["done"], "that both get somewhere")
    canceled = system.run("cancel", system.uri("other"))
    assert canceled.returncode == 0, canceled.stderr
    assert "The backfill was running and is stopped." in canceled.stdout
    _, err = other.communicate(timeout=WAIT_S)
    assert other.returncode == 6
    assert "cancelled on request" in err
    stopped = system.run("status", system.uri("other"), "--json")
    assert json.loads(stopped.stdout)["state"] == "stopped"
    again = system.start("other", "--resume")
    for process, name in ((one, "one"), (again, "other")):
        out, err = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, err
        assert out.startswith("Complete: 525 of 600 rows are explained.")
        assert system.rows(name) == dict.fromkeys(range(ROWS), 1)
    names = ledger.server.redis.scan_iter(f"{system.stage.settings.key_prefix}job:*")
    documents = ledger.read_many([str(name).rpartition(":")[2] for name in names]).values()
    begun = sorted((each.started_at, each.metadata["backfill"]) for each in documents if each.started_at)
    ours = {system.output(name).require_plan().id: name for name in ("one", "other")}
    turns = [ours[backfill] for _, backfill in begun if backfill in ours]
    assert "other" in turns[:10], f"it waits for all of the first: {turns}"  # how often, its rate decides


def test_a_backfill_is_stopped_killed_and_resumed_and_has_each_row_once(at_work: Any) -> None:
    system = at_work
    first = system.start("stopped", "--rate", "100", forked=False)
    wait_for(lambda: system.shards("stopped") >= 2, "the first shards")
    second = system.run(
        str(system.listed),
        "--top-n",
        "2",
        "--shard-rows",
        str(SHARD),
        "--output",
        system.uri("stopped"),
        "--resume",
    )
    assert second.returncode == 8
    assert f"is run by process {first.pid} on" in second.stderr
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=WAIT_S)
    assert first.returncode == 130
    assert "Stopped." in err
    assert "Continue with --resume." in err

    killed = system.start("stopped", "--rate", "100", "--resume")
    had = system.shards("stopped")
    wait_for(lambda: system.shards("stopped") > had + 4, "more shards")
    killed.kill()
    killed.communicate(timeout=WAIT_S)
    assert system.output("stopped").read_summary() is None
    registry = RedisBackfillRegistry(RedisLedger(system.stage.settings).server)
    wait_for(
        lambda: (left := registry.find(system.uri("stopped"))) and not left.is_running,
        "that it counts as dead",
    )

    last = system.start("stopped", "--resume", "--json")
    out, err = last.communicate(timeout=WAIT_S)
    assert last.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary.items() >= {"event": "complete", "rows": ROWS, "failed": 75, "shards": 30}.items()
    assert summary["codes"] == {"image_not_found": 75}
    assert system.rows("stopped") == dict.fromkeys(range(ROWS), 1)
    lines = (
        Stores(system.stage.settings, system.stage.s3)
        .open(system.uri("stopped"))
        .get("failed.jsonl")
        .splitlines()
    )
    assert [json.loads(line)["row"] for line in lines] == list(range(7, ROWS, 8))


def test_a_list_that_changes_has_what_is_new_computed_and_nothing_else_also_once_files_are_merged(
    at_work: Any, tmp_path: Path
) -> None:
    system, listed = at_work, tmp_path / "versions.csv"
    lines = [f'"photos","{row % 7}.png","v{row}","true","false"' for row in range(200)]

    def run(*more: str) -> dict[str, Any]:
        listed.write_text("\n".join(lines) + "\n")
        given = [str(listed), "--format", "inventory", "--top-n", "2", "--shard-rows", str(SHARD)]
        done = system.run(*given, "--output", system.uri("grows"), "--json", *more)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def change(name: str) -> None:
        lines[100:102] = [lines[100].replace(',"v', f',"{name}-v')]
        lines.insert(0, f'"photos","0.png","{name}","true","false"')

    assert run().items() >= {"reused": 0, "failed": 0}.items()
    change("once")
    # The last four shards stay as they are; of the six before them two rows are new.
    assert run("--changed").items() >= {"rows": 200, "reused": 118, "shards": 10, "files": 10}.items()
    merged = system.run("compact", system.uri("grows"), "--json")
    assert merged.returncode == 0, merged.stderr
    assert json.loads(merged.stdout).items() >= {"files_before": 10, "files": 1, "rows": 200}.items()
    state = json.loads(system.run("status", system.uri("grows"), "--json").stdout)
    assert (state["state"], state["shards_done"]) == ("complete", 10)
    assert system.rows("grows") == dict.fromkeys(range(200), 1)
    assert run("--resume")["files"] == 1
    change("twice")
    assert run("--changed").items() >= {"rows": 200, "reused": 118, "shards": 10, "files": 7}.items()
    assert system.rows("grows") == dict.fromkeys(range(200), 1)


def test_a_stream_that_says_no_more_keeps_nobody_from_stopping(system: Any) -> None:
    given = ["-", "--format", "text", "--top-n", "1", "--output", system.uri("stream")]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "gradcam_worker", "backfill", *given],
        env=os.environ | system.stage.settings.to_environment(),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    registry = RedisBackfillRegistry(RedisLedger(system.stage.settings).server)
    wait_for(lambda: registry.find(system.uri("stream")), "its start")
    process.send_signal(signal.SIGTERM)
    assert process.wait(WAIT_S) == 130
    assert process.stderr is not None
    assert process.stdin is not None
    said = process.stderr.read()
    assert "Stopped. Continue with --resume." in said
    assert "Fatal" not in said
    process.stderr.close()
    process.stdin.close()


def test_a_dry_run_predicts_what_the_run_finds_and_leaves_nothing(at_work: Any) -> None:
    system = at_work
    command = [str(system.listed), "--top-n", "2", "--shard-rows", str(SHARD), "--output", system.uri("dry")]
    wait_for(RedisLedger(system.stage.settings).find_workers, "a worker")
    done = system.run(*command, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["input"] == {"rows": ROWS, "total": ROWS, "whole": True, "unreadable": {}}
    measured = found["measured"]
    assert measured["failed"].keys() == {"image_not_found"}
    assert found["extrapolated"]["failed"] == pytest.approx(75, abs=50), "of a few dozen rows"
    assert found["extrapolated"]["rows"] == ROWS
    assert [*system.stage.s3.list_objects("results", "cams/dry")] == []


TASK = Path(__file__).parents[2] / "docs" / "examples" / "backfill_task.py"


def test_a_task_of_a_scheduler_survives_that_it_is_killed_and_started_again(at_work: Any) -> None:
    system = at_work

    def start() -> "subprocess.Popen[str]":
        called = f"explain_photos(*sys.argv[1:], shard_rows={SHARD}, rate=200)"
        program = f"import sys; from backfill_task import explain_photos; print({called})"
        return subprocess.Popen(
            [sys.executable, "-P", "-c", program, str(system.listed), system.uri("task")],
            env={**os.environ, **system.stage.settings.to_environment(), "PYTHONPATH": str(TASK.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    killed = start()
    wait_for(lambda: system.shards("task") >= 2, "the first shards")
    killed.kill()
    killed.communicate(timeout=WAIT_S)
    assert system.output("task").read_summary() is None
    once_more = start()
    beside = start()  # as where a scheduler believes that a task is lost
    for task in (once_more, beside):
        out, err = task.communicate(timeout=WAIT_S)
        assert (task.returncode, out) == (0, "75\n"), err
    assert system.rows("task") == dict.fromkeys(range(ROWS), 1)
