"""The processes of backfills that a gateway starts."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen
from threading import Barrier, BrokenBarrierError

import pytest
from fastapi.testclient import TestClient

from gradcam_worker.client.datasets import backfills
from gradcam_worker.errors import BackfillConflict, ServerBusy
from gradcam_worker.gateway.backfill_processes import MAX_RUNNING_OF_TENANT, BackfillProcesses
from gradcam_worker.gateway.routes.backfills import backfill_id
from gradcam_worker.runtime import parent_watch
from gradcam_worker.settings import Settings


def test_requests_at_the_same_time_start_no_more_backfills_than_may_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_asked = Barrier(6)

    def spawn(*_: object, **__: object) -> Popen[bytes]:
        with suppress(BrokenBarrierError):
            all_asked.wait(0.2)  # as long as it takes: others ask meanwhile
        return Popen(["sleep", "60"], stdin=PIPE)

    monkeypatch.setattr(parent_watch, "spawn", spawn)
    processes = BackfillProcesses()

    def start(_: int) -> bool:
        try:
            processes.start([], Settings(), tmp_path / "log", "acme")
        except ServerBusy:
            return False
        return True

    with ThreadPoolExecutor(6) as threads:
        started = [*threads.map(start, range(6))]
    processes.close()
    assert started.count(True) == MAX_RUNNING_OF_TENANT


def test_all_requests_for_states_share_one_client_of_the_storage(
    waiting: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def read_status(_: str, __: Settings, s3: object) -> dict[str, object]:
        seen.append(s3)
        raise BackfillConflict

    monkeypatch.setattr(backfills, "read_status", read_status)
    for output in ("s3://out/a", "s3://out/b"):
        assert waiting.get(f"/v1/backfills/{backfill_id(output)}").status_code == 404
    assert seen[0] is seen[1] is not None


def test_the_state_of_a_backfill_names_no_machine_and_no_address(
    waiting: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = "no worker takes work: s3://gradcam at http://minio.internal:9000 does not answer"
    last = {"host": "gpu-1", "pid": 7, "done": 3, "trouble": trouble}
    names = {"backfill": "b", "output": "s3://out/a", "input": "s3://in/", "network": "vgg16"}
    facts = {**names, "state": "running", "shards_done": 0, "dataset": None, "last": last}
    monkeypatch.setattr(backfills, "read_status", lambda *_: facts)
    answer = waiting.get(f"/v1/backfills/{backfill_id('s3://out/a')}").json()
    assert answer["last"] == {"done": 3, "trouble": "Some workers, or all, take no work at present."}
