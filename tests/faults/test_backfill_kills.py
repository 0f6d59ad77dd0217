"""A backfill whose submitter and whose workers are killed at random moments."""

import contextlib
import os
import random
import signal
import subprocess
import time

import pytest

from devtools.bench import backfill_command
from devtools.faults.cluster import IMAGES, Cluster, running_cluster
from devtools.faults.tiny_worker import NETWORK
from devtools.processes import family

pytestmark = [pytest.mark.live, pytest.mark.timeout(400)]
ROWS = 1_200
WORKERS = (2, 1, 1)  # in each run: all but the last one are killed
SHORTEST_S, LONGEST_S = 0.5, 3.0  # between two kills
PATIENCE_S = 300


def kill_workers(cluster: Cluster) -> None:
    while cluster.workers:
        worker = cluster.workers.pop()
        for pid in reversed(family(worker.keeper.pid)):  # the program itself before its keeper
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        worker.stop()


def test_a_backfill_survives_that_everybody_is_killed_with_each_row_exactly_once() -> None:
    draw = random.Random(0)  # noqa: S311  # repeatable, not secret
    with running_cluster("backfill", seed=1) as cluster, contextlib.ExitStack() as stack:
        uris = (f"s3://photos/{number % IMAGES}.jpg" for number in range(ROWS))
        source = backfill_command.write_input(cluster.folder / "input.csv", uris)
        output, log = f"{cluster.settings.output}/kills", cluster.folder / "submitter.log"
        # So slowly that no run is over before the last kill.
        rate = f"{ROWS / ((len(WORKERS) - 1) * LONGEST_S):.0f}"
        words = backfill_command.command(source, output, NETWORK, "--shard-rows", "32", "--rate", rate)
        for run, workers in enumerate(WORKERS):
            for _ in range(workers):
                cluster.work()
            resumed = ["--resume"] if run else []
            with log.open("ab") as file:
                environment = cluster.settings.environment_for_child()
                submitter = subprocess.Popen([*words, *resumed], env=environment, stdout=file, stderr=file)
            stack.callback(submitter.kill)  # where a test fails
            if run == len(WORKERS) - 1:
                assert submitter.wait(PATIENCE_S) == 0, log.read_text()
                break
            time.sleep(draw.uniform(SHORTEST_S, LONGEST_S))
            assert submitter.poll() is None, "it ended before it was killed"
            submitter.kill()
            kill_workers(cluster)
            submitter.wait()
        assert backfill_command.counted(cluster.settings, output, ROWS) == backfill_command.Counted(0, 0)
