from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pyarrow import parquet

from devtools.bench import backfill_command
from devtools.faults import engine
from devtools.faults.campaign import ATTACKS
from devtools.faults.cluster import Cluster, Worker, running_cluster
from devtools.faults.observer import JobObserver, end_of
from devtools.faults.tiny_network import NETWORK, POISON
from devtools.faults.verdict import Verdict
from gradcam_worker.cli.main import main

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


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Servers, and settings of a worker that has an engine process."""
    with running_cluster("poison", 1, job_processes=2, max_batch=4, threads=8) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def worker(cluster: Cluster) -> Worker:
    return cluster.work()


def test_a_poison_image_ends_two_engines_and_its_own_job_and_no_other_loses_an_attempt(
    cluster: Cluster, worker: Worker
) -> None:
    healthy, before = 30, len(worker.restarts)
    with JobObserver(cluster) as observer:
        poison = cluster.job(healthy, image=cluster.store("poison.jpg", POISON), priority="normal")
        for number in range(healthy):
            cluster.submit(cluster.job(number))
            if number == healthy // 2:
                cluster.submit(poison)
        observer.drain(DRAINS_S)
        verdict = observer.verdict(
            faults=2, expected=lambda job_id: {"network_crashed" if job_id == poison.id else "succeeded"}
        )
        assert verdict.kept, verdict
        documents = observer.documents()
        assert end_of(documents[poison.id] or {}) == "network_crashed"
        assert {(document or {})["attempt"] for document in documents.values()} == {1}
        ended = worker.restarts[before:]
        assert [line for line in ended if "engine" in line and "exit_code=-9" in line] == ended
        assert len(ended) == 2


def explained(cluster: Cluster, name: str, uris: list[str]) -> tuple[dict[int, Any], list[str]]:
    """The rows of a backfill by their number, and the lines of its lists that tell an error."""
    source = backfill_command.write_input(cluster.folder / "input.csv", uris)
    output = f"{cluster.settings.output}/{name}"
    words = backfill_command.command(source, output, NETWORK, "--shard-rows", "4")
    with pytest.MonkeyPatch.context() as environment:
        for variable, value in cluster.settings.to_environment().items():
            environment.setenv(variable, value)
        assert main(words[words.index("backfill") :]) == 0
    folder = cluster.bucket / "cams" / name
    data = sorted(folder.rglob("*.parquet"))
    assert len(data) == 3
    rows = [row for path in data for row in parquet.read_table(path).to_pylist()]
    lines = [line for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines()]
    return {row["row"]: row for row in rows}, [line for line in lines if '"error"' in line]


def test_a_poison_row_fails_alone_and_the_other_rows_are_as_those_of_a_single_process(
    cluster: Cluster, worker: Worker
) -> None:
    good = [f"s3://photos/{number}.jpg" for number in range(12)]
    poisoned = [*good[:5], cluster.store("poison.jpg", POISON), *good[6:]]
    across, failed = explained(cluster, "across", poisoned)
    assert failed
    assert all('"row": 5,' in line and "network_crashed" in line for line in failed)
    cluster.stop_workers()
    cluster.work(cluster.settings.model_copy(update={"job_processes": 0}))
    here, _ = explained(cluster, "here", good)
    assert [*here] == [*range(12)]
    del here[5], across[5]
    assert across == here, "to the last digit"
