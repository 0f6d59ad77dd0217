"""The runbook's chapter "Redis has lost its data", rehearsed with its commands on real servers."""

import contextlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devtools.bench import backfill_command
from devtools.faults import webhook_receiver
from devtools.faults.cluster import IMAGES, START_S, Cluster, running_cluster, suspended, wait_for
from devtools.faults.tiny_network import NETWORK
from gradcam_worker.cli.main import main
from gradcam_worker.errors import UnknownJob
from gradcam_worker.schemas.job import Job

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]
RUNBOOK = (Path(__file__).parents[2] / "docs" / "how-to" / "runbook.md").read_text()
CHAPTER = RUNBOOK.partition("## Redis has lost its data\n")[2].partition("\n## ")[0]
[EXPORT, IMPORT] = re.findall(r"^ *```bash\n(.*?)^ *```", CHAPTER, re.MULTILINE | re.DOTALL)
DONE, WAITING, LATE = range(8), range(8, 16), range(16, 20)
DONE_BEFORE, DONE_SINCE = range(20, 28), range(28, 36)
ROWS = 240
PATIENCE_S = 120


Run = Callable[[str, Cluster], str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs commands of the page in this process; what they print."""

    def run(commands: str, cluster: Cluster) -> str:
        for name, value in cluster.settings.to_environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(cluster.folder)
        lines = [line.partition("#")[0].strip() for line in commands.splitlines()]
        capsys.readouterr()
        for line in filter(None, lines):
            command, *words = shlex.split(line)
            assert command == "gradcam", line
            assert main(words) == 0, line
        return capsys.readouterr().out

    return run


def submit(cluster: Cluster, numbers: range) -> list[Job]:
    jobs = [cluster.job(number, priority="normal", webhooks=cluster.hook()) for number in numbers]
    for job in jobs:
        cluster.submit(job)
    return jobs


def ended(cluster: Cluster, jobs: list[Job]) -> bool:
    found = cluster.client.statuses(job.id for job in jobs)
    return len(found) == len(jobs) and all(document.status == "succeeded" for document in found.values())


def delivered(cluster: Cluster, jobs: list[Job]) -> bool:
    events = webhook_receiver.events(cluster.folder / "events.jsonl")
    return {job.id for job in jobs} <= {str(event["data"]["id"]) for event in events}


@contextlib.contextmanager
def backfill(cluster: Cluster) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A slow one, which is under way within the block: its process, and its output."""
    uris = (f"s3://photos/{number % IMAGES}.jpg" for number in range(ROWS))
    source = backfill_command.write_input(cluster.folder / "input.csv", uris)
    output = f"{cluster.settings.output}/set"
    words = backfill_command.command(source, output, NETWORK, "--shard-rows", "16", "--rate", "20")
    with (cluster.folder / "backfill.log").open("wb") as log:
        environment = cluster.settings.environment_for_child()
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    try:
        yield process, output
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """With a worker."""
    with running_cluster("loss", seed=1) as cluster:
        cluster.work()
        yield cluster


def test_a_flushed_ledger_is_imported_and_clients_and_backfills_go_on(cluster: Cluster, run: Run) -> None:
    (worker,) = cluster.workers
    with backfill(cluster) as (process, output):
        done = submit(cluster, DONE)
        wait_for(lambda: ended(cluster, done), START_S, "the first jobs end")
        assert worker.process
        with suspended(worker.process):
            waiting = submit(cluster, WAITING)
            run(EXPORT, cluster)
            late = submit(cluster, LATE)
            cluster.ledger.flushall()
            with pytest.raises(UnknownJob):
                cluster.client.status(waiting[0].id)
            would, did = re.findall(r"^(\d+) jobs (?:would be )?added", run(IMPORT, cluster), re.MULTILINE)
            assert int(would) >= len(DONE) + len(WAITING), "and shards"
            assert int(did) <= int(would), "the backfill has submitted shards again"
        for job in late:  # those who were told that their job is unknown submit it again
            cluster.submit(job)
        everything = [*done, *waiting, *late]
        wait_for(lambda: ended(cluster, everything), PATIENCE_S, "all jobs end")
        assert all(cluster.manifest(job.id).exists() for job in everything)
        wait_for(lambda: delivered(cluster, everything), PATIENCE_S, "everybody is told")
        assert process.wait(PATIENCE_S) == 0, (cluster.folder / "backfill.log").read_text()
        assert backfill_command.counted(cluster.settings, output, ROWS) == backfill_command.Counted(0, 0)


def test_a_ledger_that_was_rolled_back_knows_again_what_had_ended(cluster: Cluster, run: Run) -> None:
    cluster.ledger.flushall()  # of what another test has left
    before = submit(cluster, DONE_BEFORE)
    wait_for(lambda: ended(cluster, before), START_S, "the first jobs end")
    files, copy = cluster.folder / "appendonlydir", cluster.folder / "snapshot"
    shutil.copytree(files, copy)
    since = submit(cluster, DONE_SINCE)
    wait_for(lambda: ended(cluster, since), START_S, "the others end")
    run(EXPORT, cluster)
    with cluster.broker.dead():
        shutil.rmtree(files)
        copy.rename(files)
    wait_for(cluster.ledger.ping, START_S, "it is back")
    assert cluster.client.statuses(job.id for job in since) == {}
    assert f"Not used: {len(before)} that the ledger has" in run(IMPORT, cluster)
    assert ended(cluster, [*before, *since])
    cluster.submit(since[0])
    assert ended(cluster, since), "it is the same job: it does not run again"
