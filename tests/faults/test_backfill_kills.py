"""A backfill whose submitter and whose workers are killed at random moments."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from typing import Any

import pytest

from devtools.bench import backfill_command
from devtools.faults.cluster import IMAGES, START_S, Cluster, running_cluster, wait_for
from devtools.faults.tiny_network import NETWORK
from devtools.processes import family

pytestmark = [pytest.mark.live, pytest.mark.timeout(400)]
ROWS = 600
RUNS = 3  # all but the last one are killed, with their worker
RATE = 100  # rows a second: so slowly that no run is over before its kill
LATER_S = 0.5  # at most, after a worker has begun a shard
PATIENCE_S = 300


def shards(cluster: Cluster) -> list[dict[str, Any]]:
    """The documents of all shards that the ledger knows."""
    with cluster.ledger as server:
        keys = server.scan_iter(f"{cluster.settings.key_prefix}job:*", count=1000, _type="hash")
        return [json.loads(text) for key in keys if (text := server.hget(key, "document"))]


def is_busy(cluster: Cluster) -> bool:
    """Whether a worker that is alive has begun a shard and not ended it."""
    alive = tuple(f":{worker.process}" for worker in cluster.workers)
    return any(one["status"] == "running" and one["worker"]["id"].endswith(alive) for one in shards(cluster))


def kill_workers(cluster: Cluster) -> None:
    for worker in cluster.workers:
        for pid in reversed(family(worker.keeper.pid)):  # the program itself before its keeper
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    while cluster.workers:
        cluster.workers.pop().stop()


def test_a_backfill_survives_that_everybody_is_killed_with_each_row_exactly_once() -> None:
    draw = random.Random(0)  # noqa: S311  # repeatable, not secret
    with running_cluster("backfill", seed=1) as cluster, contextlib.ExitStack() as stack:
        uris = (f"s3://photos/{number % IMAGES}.jpg" for number in range(ROWS))
        source = backfill_command.write_input(cluster.folder / "input.csv", uris)
        output, log = f"{cluster.settings.output}/kills", cluster.folder / "submitter.log"
        words = backfill_command.command(source, output, NETWORK, "--shard-rows", "16", "--rate", str(RATE))
        for run in range(RUNS):
            cluster.work()
            resumed = ["--resume"] if run else []
            with log.open("ab") as file:
                environment = cluster.settings.environment_for_child()
                submitter = subprocess.Popen([*words, *resumed], env=environment, stdout=file, stderr=file)
            stack.callback(submitter.kill)  # where a test fails
            if run == RUNS - 1:
                assert submitter.wait(PATIENCE_S) == 0, log.read_text()
                break
            for pause_s in (draw.uniform(0, LATER_S), 0):
                wait_for(lambda: is_busy(cluster), START_S, "a worker begins a shard")
                time.sleep(pause_s)
            assert submitter.poll() is None, "it ended before it was killed"
            submitter.kill()
            kill_workers(cluster)
            submitter.wait()
        again = sum(one["attempt"] > 1 for one in shards(cluster))
        assert again, "no kill hit anything: nothing was tested"
        assert backfill_command.counted(cluster.settings, output, ROWS) == backfill_command.Counted(0, 0)
