"""A real worker whose storage goes away and comes back."""

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from devtools.faults import tiny_network, tiny_worker
from devtools.faults.proxy import Fault, FaultyProxy
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch, service_factory
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores

pytestmark = [pytest.mark.live]

WAIT_S = 100
BUSY = Fault(answer=b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.05)


def picture() -> str:
    data = cv2.imencode(".png", np.full((32, 32, 3), 90, np.uint8))[1].tobytes()
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("fault", "why"), [(BUSY, "503"), (Fault(half_open=True), "no answer within")], ids=["busy", "silent"]
)
def test_a_worker_without_storage_says_so_takes_no_jobs_and_finishes_all_when_it_is_back(
    tmp_path: Path, s3_server: Any, s3_settings: Any, fault: Fault, why: str
) -> None:
    """No attempt counts, although each job has a single one, and less time than the storage is away."""
    with servers.valkey(tmp_path) as queue, FaultyProxy(s3_server.port) as line:
        settings = Settings(
            **{**s3_settings, "s3_endpoint_url": f"http://127.0.0.1:{line.port}"},
            broker_url=f"redis://127.0.0.1:{queue.port}/0",
            output="s3://results/faults",
            image_schemes=("data",),
            lease_s=2,
            lost_after_s=3,
            retry_backoff_s=0.1,
            threads=4,
        )
        client, ledger = GradcamClient(settings=settings), service_factory.build_ledger(settings)

        def trouble() -> str | None:
            said = [json.loads(health).get("trouble") for health in ledger.find_workers().values()]
            return next((one for one in said if one), None)

        def submit() -> str:
            job_id: str = client.submit(
                image=picture(),
                network=tiny_network.NETWORK,
                target={"top_n": 1},
                timeout_s=3,
                max_attempts=1,
            )
            return job_id

        worker = parent_watch.spawn(
            tiny_worker.command(),
            log=tmp_path / "worker.log",
            environment=settings.to_environment(),
            grace_s=settings.shutdown_timeout_s + 15,
        )
        try:
            assert client.wait(submit(), WAIT_S).status == "succeeded"
            line.fault = fault
            ids = [submit() for _ in range(12)]
            wait_for(trouble, "a word about the storage")
            said = trouble()
            assert said
            assert said.startswith("The storage has failed since 20")
            assert why in said
            before = [client.status(one) for one in ids]
            time.sleep(3)  # far longer than a job's time
            after = [client.status(one) for one in ids]
            started = [(one.attempt, other.attempt) for one, other in zip(before, after, strict=True)]
            places = settings.threads + settings.shards
            assert sum(b - a for a, b in started) <= places, "none is taken that cannot be finished"
            assert not {one.status for one in after} & {"failed", "succeeded"}
            line.fault = Fault()
            done = [client.wait(one, WAIT_S) for one in ids]
            assert [one.status for one in done] == ["succeeded"] * 12
            wait_for(lambda: not trouble(), "the end of the trouble")
        finally:
            parent_watch.stop(worker)
        store = Stores(settings, S3(settings)).open()
        for one in ids:
            assert store.get(f"{one}/manifest.json")
