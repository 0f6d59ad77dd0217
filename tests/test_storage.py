import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from worker.deadline import Deadline
from worker.errors import JobTimeout, OutputNotAllowed, StorageUnavailable
from worker.s3 import S3
from worker.settings import Settings
from worker.storage import FolderStore, Object, S3Store, Store, Stores
from worker.testing import MemoryStore

OBJECTS: list[Object] = [(f"j/{n}.jpg", bytes([n]) * 1000, "image/jpeg") for n in range(9)]


def stores(output: str, *prefixes: str, **others: Any) -> Stores:
    settings = Settings(output=output, output_prefixes=prefixes, **others)
    return Stores(settings, S3(settings))


def test_an_object_comes_back_from_a_bucket(s3_settings: Any) -> None:
    store = stores("s3://results/cams", **s3_settings).open()
    assert store.put("j/a.jpg", b"data", "image/jpeg") == "s3://results/cams/j/a.jpg"
    assert store.get("j/a.jpg") == b"data"


def test_a_missing_bucket_is_storage_that_is_unavailable(s3_settings: Any) -> None:
    with pytest.raises(StorageUnavailable, match=r"s3://none/x/j could not be written.*does not exist"):
        stores("s3://none/x", **s3_settings).open().put("j", b"", "text/plain")


@pytest.fixture(params=["s3", "folder", "memory"])
def store(request: pytest.FixtureRequest, s3_settings: Any, tmp_path: Path) -> Store:
    """All stores keep the same promises."""
    if request.param == "s3":
        return stores("s3://results/many", **s3_settings).open()
    return FolderStore(tmp_path) if request.param == "folder" else MemoryStore()


def test_many_are_put_and_their_addresses_stand_in_the_order_given(store: Store) -> None:
    uris = store.put_many(OBJECTS, Deadline(30))
    assert [uri.rpartition("/j/")[2] for uri in uris] == [f"{n}.jpg" for n in range(9)]
    assert [store.get(key) for key, _, _ in OBJECTS] == [data for _, data, _ in OBJECTS]
    assert store.put_many([], Deadline(30)) == []


def test_a_job_out_of_time_puts_nothing_more(store: Store) -> None:
    with pytest.raises(JobTimeout, match="upload"):
        store.put_many([("late/a.jpg", b"data", "image/jpeg")], Deadline(0))
    with pytest.raises((StorageUnavailable, KeyError)):
        store.get("late/a.jpg")


@dataclass
class Slow:
    """An S3 that puts two objects at once, slowly, and fails at those that are told to fail."""

    fail: set[str] = field(default_factory=set)
    begun: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2))

    def put(self, bucket: str, key: str, data: bytes, media_type: str, deadline: Deadline) -> None:
        self.begun.append(key)
        if key in self.fail:
            message = "the disk is full"
            raise OSError(message)
        time.sleep(0.2)
        self.ended.append(key)


def test_after_a_failure_no_other_is_begun_and_those_under_way_are_waited_for() -> None:
    slow: Any = Slow(fail={"j/1.jpg"})
    with pytest.raises(StorageUnavailable, match=r"s3://b/j/1\.jpg could not be written: the disk is full"):
        S3Store(slow, "b", "").put_many(OBJECTS, Deadline(30))
    assert sorted(slow.ended) == sorted(set(slow.begun) - slow.fail), "none is still under way"
    assert len(slow.begun) < len(OBJECTS)


def test_many_are_put_at_the_same_time(s3_settings: Any) -> None:
    together = threading.Barrier(4, timeout=10)
    slow: Any = Slow(pool=ThreadPoolExecutor(4))
    slow.put = lambda *_: together.wait()
    assert len(S3Store(slow, "b", "").put_many(OBJECTS[:4], Deadline(30))) == 4


def test_a_server_out_of_reach_is_storage_that_is_unavailable() -> None:
    settings = Settings(output="s3://results/x", s3_endpoint_url="http://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match="could not be written"):
        Stores(settings, S3(settings)).open().put("j", b"", "text/plain")


def test_an_object_comes_back_from_a_folder_and_nothing_else_is_left(tmp_path: Path) -> None:
    store = stores(tmp_path.as_uri()).open()
    uri = store.put("j/a.jpg", b"data", "image/jpeg")
    store.put("j/a.jpg", b"newer", "image/jpeg")
    assert uri == (tmp_path / "j" / "a.jpg").as_uri()
    assert store.get("j/a.jpg") == b"newer"
    assert os.listdir(tmp_path / "j") == ["a.jpg"]  # noqa: PTH208


def test_a_folder_that_cannot_be_written_is_storage_that_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageUnavailable, match="could not be written"):
        stores((tmp_path / "file").as_uri()).open().put("j/a.jpg", b"", "image/jpeg")
    with pytest.raises(StorageUnavailable, match="could not be read"):
        stores(tmp_path.as_uri()).open().get("none")


@pytest.mark.parametrize("uri", ["s3://out/cams", "s3://out/cams/", "s3://out/cams/team/a", "s3://other/x"])
def test_a_job_may_write_below_the_allowed_prefixes(uri: str) -> None:
    stores("s3://out/cams", "s3://other/x").open(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://out",
        "s3://out/camsx",
        "s3://out/cams/../secrets",
        "s3://out/cams/%2e%2e/secrets",
        "s3://out/cams/..\\secrets",
        "s3://out/cams//double",
        "s3://another/cams",
        "file:///etc",
        "nonsense",
        "s3://out/cams/.\t./secrets",
        "s3://out/cams/.\n./.\r./secrets",
        "s3://out/cams/a\0b",
        "s3://out/cams/a%00b",
        "s3://out/cams/a?b",
        "s3://out/cams/a#b",
        "s3://out/cams/a%3fb",
    ],
)
def test_a_job_may_write_nowhere_else(uri: str) -> None:
    with pytest.raises(OutputNotAllowed, match="must be below s3://out/cams"):
        stores("s3://out/cams").open(uri)
