"""A disk that is full, for real: a small one that is mounted for the purpose, or the kernel's own limit."""

import contextlib
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from gradcam_worker.errors import LedgerUnavailable, StorageUnavailable
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.redis_server.server_checks import ServerMonitor
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores

SIZE = 1024 * 1024  # bytes of the disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 1 MB; where none can be mounted, one in which no file can grow beyond that."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, before[1]))
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_redis_whose_disk_is_full_is_told_as_that(small_disk: Path) -> None:
    with (
        servers.valkey(small_disk, "--appendonly", "yes") as server,
        redis.Redis(port=server.port, decode_responses=True) as writer,
    ):
        settings, end = Settings(broker_url=f"redis://127.0.0.1:{server.port}/0"), time.monotonic() + 30
        with contextlib.suppress(redis.exceptions.ResponseError):  # MISCONF
            while time.monotonic() < end:
                writer.rpush("list", "x" * SIZE)
                time.sleep(0.05)
        monitor = ServerMonitor(settings)
        monitor.run_round()
        assert monitor.is_failing("persistence")
        assert "cannot write to its disk, and refuses all writes" in str(monitor.last_problem())
        with pytest.raises(LedgerUnavailable, match=r"cannot write to its disk.*(No space|File too large)"):
            RedisLedger(settings, retries=0).count_jobs()


def test_artifacts_that_find_no_room_are_a_typed_error_and_leave_nothing_behind(small_disk: Path) -> None:
    settings = Settings(output=(small_disk / "out").as_uri())
    store = Stores(settings, S3(settings)).open()
    store.put("job/small.bin", b"small", "application/octet-stream")
    with pytest.raises(StorageUnavailable, match=r"large\.bin could not be written") as refused:
        store.put("job/large.bin", bytes(4 * SIZE), "application/octet-stream")
    assert refused.value.retryable
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["small.bin"]
    with pytest.raises(StorageUnavailable):
        store.put_many([("job/large.bin", bytes(4 * SIZE), "application/octet-stream")], Deadline(10))
    store.put("job/after.bin", bytes(SIZE // 2), "application/octet-stream")  # all room is there again
