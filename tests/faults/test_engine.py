import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from pyarrow import parquet

from devtools.bench import backfill_command
from devtools.faults import engine
from devtools.faults.campaign import ATTACKS
from devtools.faults.cluster import running_cluster
from devtools.faults.observer import JobObserver, end_of
from devtools.faults.tiny_worker import NETWORK, POISON
from devtools.faults.verdict import Verdict

pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]
SHORT = ATTACKS["engine"].short
DRAINS_S = 180.0


def test_no_fault_of_an_engine_or_a_job_process_loses_doubles_or_changes_anything(
    kept: Callable[[Verdict], Verdict],
) -> None:
    verdict = kept(engine.attack(SHORT, seed=1))
    for fault in (
        "kill",
        "hang",
        "kill_jobs",
        "suspend_jobs",
        "fill_pools",
        "kill_in_write",
        "suspend_in_write",
    ):
        assert verdict.figures[fault] == SHORT
    assert verdict.figures["objects_compared"] >= verdict.jobs


def test_a_poison_image_ends_two_engines_and_its_own_job_and_no_other_loses_an_attempt() -> None:
    healthy = 30
    changes = {"job_processes": 2, "max_batch": 4, "threads": 8}
    with running_cluster("poison", 1, **changes) as cluster, JobObserver(cluster) as observer:
        poison = cluster.job(healthy, image=cluster.store("poison.jpg", POISON), priority="normal")
        for number in range(healthy):
            cluster.submit(cluster.job(number))
            if number == healthy // 2:
                cluster.submit(poison)
        worker = cluster.work()
        observer.drain(DRAINS_S)
        verdict = observer.verdict(
            faults=2, expected=lambda job_id: {"network_crashed" if job_id == poison.id else "succeeded"}
        )
        assert verdict.kept, verdict
        documents = observer.documents()
        assert end_of(documents[poison.id] or {}) == "network_crashed"
        assert {(document or {})["attempt"] for document in documents.values()} == {1}
        assert [
            line for line in worker.restarts if "engine" in line and "exit_code=-9" in line
        ] == worker.restarts
        assert len(worker.restarts) == 2


def test_a_poison_row_fails_alone_and_the_other_rows_are_as_those_of_a_single_process() -> None:
    rows: list[list[dict[str, Any]]] = []
    for job_processes in (0, 2):
        with running_cluster("rows", 1, job_processes=job_processes, max_batch=4, threads=8) as cluster:
            uris = [f"s3://photos/{number}.jpg" for number in range(12)]
            if job_processes:
                uris[5] = cluster.store("poison.jpg", POISON)
            source = backfill_command.write_input(cluster.folder / "input.csv", uris)
            output = f"{cluster.settings.output}/rows"
            cluster.work()
            done = subprocess.run(
                backfill_command.command(source, output, NETWORK, "--shard-rows", "4"),
                env=cluster.settings.environment_for_child(),
                capture_output=True,
                text=True,
                timeout=DRAINS_S,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            data = sorted((cluster.bucket / "cams" / "rows").rglob("*.parquet"))
            assert len(data) == 3
            rows.append([row for path in data for row in parquet.read_table(path).to_pylist()])
            lists = [path.read_text() for path in (cluster.bucket / "cams" / "rows").rglob("*.jsonl")]
            failed = [line for lines in lists for line in lines.splitlines() if '"error"' in line]
    assert failed
    assert all('"row": 5,' in line and "network_crashed" in line for line in failed)
    here, across = ({row["row"]: row for row in table} for table in rows)
    assert [*here] == [*range(12)]
    del here[5], across[5]
    assert across == here, "to the last digit"
