"""A worker with a Redis as services sell it: TLS, a password, and commands that it does not have."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devtools.faults.cluster import running_cluster
from gradcam_worker.operations import servers
from gradcam_worker.runtime.processes import preflight

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]

# Those that one service or another refuses, and that something of ours might want.
REFUSED = ("ACL", "CLIENT", "CONFIG", "DEBUG", "INFO", "KEYS", "MONITOR", "REPLICAOF", "ROLE", "SAVE", "WAIT")
PASSWORD = "of-the-service"
WAIT_S = 60.0


def test_a_worker_needs_none_of_the_commands_that_managed_servers_refuse(
    tmp_path: Path, encrypted: Callable[[int], Any]
) -> None:
    words = [word for command in REFUSED for word in ("--rename-command", command, "")]
    with (
        servers.valkey(tmp_path, *words, "--requirepass", PASSWORD) as server,
        running_cluster("managed", 0) as cluster,
    ):
        door = encrypted(server.port)
        changes = {"broker_url": f"rediss://:{PASSWORD}@localhost:{door.port}/0", "redis_ca": door.ca}
        cluster.settings = cluster.settings.model_copy(update=changes)
        assert preflight.check_broker(cluster.settings) == f"rediss://localhost:{door.port}/0"
        preflight.check_redis(cluster.settings)
        worker = cluster.work()
        with contextlib.closing(cluster.client) as client:
            job_id = client.submit(cluster.job(0))
            assert client.wait(job_id, WAIT_S).status == "succeeded"
        unwell = [line for line in worker.log_lines if " ERROR " in line or "unknown command" in line]
        assert not unwell
