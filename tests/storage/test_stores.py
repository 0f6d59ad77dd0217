import errno
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from devtools.faults.proxy import Fault, FaultyProxy
from gradcam_worker.errors import AttemptFenced, JobTimeout, OutputNotAllowed, StorageUnavailable
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.retry import Retries
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3, STORAGE
from gradcam_worker.storage.stores import FolderStore, Object, S3Store, Store, Stores, probe
from gradcam_worker.testing import MemoryStore

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
    uploads: int = 1  # at once, this one included

    def uploading(self) -> AbstractContextManager[int]:
        return nullcontext(self.uploads)

    def put(self, bucket: str, key: str, data: bytes, media_type: str, retries: Retries) -> None:
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


@pytest.mark.parametrize("uploads", [1, 2, 9])
def test_the_last_object_is_put_when_all_others_are(uploads: int) -> None:
    slow: Any = Slow(uploads=uploads)
    uris = S3Store(slow, "b", "").put_many(OBJECTS[:4], Deadline(30), ("m.json", b"", "application/json"))
    assert slow.begun[-1] == "m.json"
    assert sorted(slow.ended[:-1]) == [key for key, _, _ in OBJECTS[:4]]
    assert uris == [f"s3://b/{key}" for key, _, _ in OBJECTS[:4]] + ["s3://b/m.json"]


def test_the_last_object_is_not_put_where_another_failed() -> None:
    slow: Any = Slow(fail={"j/1.jpg"})
    with pytest.raises(StorageUnavailable, match="the disk is full"):
        S3Store(slow, "b", "").put_many(OBJECTS[:2], Deadline(30), ("m.json", b"", "application/json"))
    assert "m.json" not in slow.begun


def test_many_uploads_at_once_share_threads() -> None:
    threads = set[int]()
    slow: Any = Slow(uploads=5)
    slow.put = lambda *_: threads.add(threading.get_ident())
    S3Store(slow, "b", "").put_many(OBJECTS[:4], Deadline(30))
    assert len(threads) == 1


def test_an_upload_begins_before_all_of_its_objects_are_there() -> None:
    slow: Any = Slow()
    begun = queue.Queue[str]()
    slow.put = lambda *args: begun.put(args[1])
    with S3Store(slow, "b", "").upload(Deadline(30)) as upload:
        for item in OBJECTS[:3]:
            upload.add(item)
            slow.begun.append(begun.get(timeout=30))
        upload.finish(("m.json", b"", "application/json"))
    slow.begun.append(begun.get())
    assert slow.begun == [*(key for key, _, _ in OBJECTS[:3]), "m.json"]


@pytest.mark.parametrize("uploads", [1, 2, 9])
def test_the_end_of_an_upload_finds_all_of_it_written(uploads: int) -> None:
    for _ in range(50):  # a thread that ends just now must not leave an object behind
        slow: Any = Slow(uploads=uploads, pool=ThreadPoolExecutor(4))
        slow.put = lambda *args, begun=slow.begun: begun.append(args[1])
        with S3Store(slow, "b", "").upload(Deadline(30)) as upload:
            for item in OBJECTS[:4]:
                upload.add(item)
            upload.finish(("m.json", b"", "application/json"))
        assert sorted(slow.begun[:-1]) == [key for key, _, _ in OBJECTS[:4]]
        assert slow.begun[-1] == "m.json"


def test_an_upload_that_failed_begins_nothing_more_and_says_so_in_the_end() -> None:
    slow: Any = Slow(fail={"j/0.jpg"})
    with S3Store(slow, "b", "").upload(Deadline(30)) as upload:
        upload.add(OBJECTS[0])
        slow.pool.shutdown()  # waits for it
        upload.add(OBJECTS[1])
        with pytest.raises(
            StorageUnavailable, match=r"s3://b/j/0\.jpg could not be written: the disk is full"
        ):
            upload.finish(("m.json", b"", "application/json"))
    assert slow.begun == ["j/0.jpg"]


def test_an_upload_that_is_left_early_begins_nothing_more() -> None:
    slow: Any = Slow(pool=ThreadPoolExecutor(1))
    with S3Store(slow, "b", "").upload(Deadline(30)) as upload:
        for item in OBJECTS:
            upload.add(item)
    slow.pool.shutdown()
    assert len(slow.begun) <= 1


def test_an_upload_may_wait_for_its_objects_longer_than_for_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed_s = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed_s[0])
    monkeypatch.setattr("gradcam_worker.resilience.retry.time", clock)
    slow: Any = Slow()
    begun = queue.Queue[str]()

    def put(_: str, key: str, *others: Any) -> None:
        retries: Retries = others[-1]
        retries.check("storage")  # as S3 does
        begun.put(key)

    slow.put = put
    with S3Store(slow, "b", "").upload(Deadline(30)) as upload:
        passed_s[0] += 2 * STORAGE.total_s
        upload.add(OBJECTS[0])
        assert begun.get(timeout=30) == "j/0.jpg"
        passed_s[0] += 2 * STORAGE.total_s
        upload.finish(("m.json", b"", "application/json"))
    assert begun.get() == "m.json"


def test_what_waits_for_the_lease_when_an_upload_is_left_is_not_written() -> None:
    class Unleased(Deadline):
        asked, renewed = threading.Event(), threading.Event()

        def check(self, doing: str) -> None:
            self.asked.set()
            self.renewed.wait()

    slow, deadline = Slow(), Unleased(30)
    s3: Any = slow
    with S3Store(s3, "b", "").upload(deadline) as upload:
        upload.add(OBJECTS[0])
        deadline.asked.wait()
    deadline.renewed.set()
    slow.pool.shutdown()
    assert not slow.begun


def test_an_upload_of_any_store_ends_with_its_last_object(store: Store) -> None:
    with store.upload(Deadline(30)) as upload:
        for item in OBJECTS:
            upload.add(item)
        upload.finish(("j/m.json", b"{}", "application/json"))
    assert [store.get(key) for key in (*(key for key, _, _ in OBJECTS), "j/m.json")]


def test_what_is_there_is_found_and_what_is_not_is_none(store: Store) -> None:
    store.put("j/found.txt", b"data", "text/plain")
    assert store.find("j/found.txt", Deadline(30)) == b"data"
    assert store.find("j/none.txt", Deadline(30)) is None
    assert store.find("none/none.txt", Deadline(30)) is None


def test_a_part_is_read_from_either_end_with_the_size_of_the_whole(store: Store) -> None:
    store.put("parts/a.bin", b"0123456789", "application/octet-stream")
    assert store.get_part("parts/a.bin", 2, 3) == (b"234", 10)
    assert store.get_part("parts/a.bin", 8, 9) == (b"89", 10)
    assert store.get_part("parts/a.bin", -3, 2) == (b"78", 10)
    assert store.get_part("parts/a.bin", -99, 99) == (b"0123456789", 10)
    with pytest.raises((StorageUnavailable, KeyError)):
        store.get_part("parts/none.bin", 0, 1)


def test_all_objects_below_a_folder_are_named_in_order_and_no_others(store: Store) -> None:
    names = ["data/b.parquet", "data/a.parquet", "data/deep/c", "data/\N{SNOWMAN} +%.parquet"]
    for key in [*names, "database/x", "data2", "failed/a"]:
        store.put(f"set/{key}", b"data", "text/plain")
    assert [*store.names("set/data")] == sorted(f"set/{one}" for one in names)
    assert [*store.names("set/none")] == []
    assert [*store.names("set/data/deep")] == ["set/data/deep/c"]


def test_what_is_removed_is_there_no_more_and_what_is_not_there_may_be_removed(store: Store) -> None:
    store.put("rm/a.txt", b"data", "text/plain")
    store.put("rm/b.txt", b"data", "text/plain")
    store.remove("rm/a.txt")
    store.remove("rm/a.txt")
    store.remove("nowhere/at/all")
    assert [*store.names("rm")] == ["rm/b.txt"]
    assert store.find("rm/a.txt", Deadline(30)) is None


def test_a_listing_of_many_pages_misses_nothing(s3_settings: Any) -> None:
    s3 = S3(Settings(**s3_settings))
    names = {f"pages/{number:04d}" for number in range(1203)}  # a page has 1000
    with ThreadPoolExecutor(8) as pool:
        [*pool.map(lambda key: s3.put("results", key, b"x", "text/plain"), names)]
    found, end = [*s3.list_objects("results", "pages/")], time.monotonic() + 60
    while not all(one.etag for one in found):  # the embedded server may have none of what it was just given
        assert time.monotonic() < end
        found = [*s3.list_objects("results", "pages/")]
    assert [one.key for one in found] == sorted(names)
    assert {one.size for one in found} == {1}
    assert not any('"' in one.etag for one in found)


def test_a_bucket_that_cannot_be_listed_is_storage_that_is_unavailable(s3_settings: Any) -> None:
    none = stores("s3://none/x", **s3_settings).open()
    with pytest.raises(StorageUnavailable, match=r"s3://none/x/data could not be listed.*does not exist"):
        [*none.names("data")]
    with pytest.raises(StorageUnavailable, match=r"s3://none/x/a could not be removed"):
        none.remove("a")


def test_names_lead_out_of_no_folder(tmp_path: Path) -> None:
    elsewhere, own = tmp_path / "elsewhere", tmp_path / "set"
    for folder in (elsewhere, own):
        folder.mkdir()
    elsewhere.joinpath("secret").write_bytes(b"data")
    own.joinpath("data").symlink_to(elsewhere)
    own.joinpath("more").mkdir()
    own.joinpath("more", "deep").symlink_to(elsewhere)
    store = FolderStore(tmp_path, "set")
    assert [*store.names("data")] == [*store.names("more")] == []
    with pytest.raises(OutputNotAllowed):
        [*store.names("../elsewhere")]


def test_a_file_that_is_not_whole_yet_is_not_named(tmp_path: Path) -> None:
    store = FolderStore(tmp_path, "set")
    store.put("data/a", b"data", "text/plain")
    tmp_path.joinpath("set", "data", ".0123.part").write_bytes(b"da")
    assert [*store.names("data")] == ["data/a"]


def test_a_job_out_of_time_or_overtaken_looks_for_nothing(store: Store) -> None:
    with pytest.raises(JobTimeout):
        store.find("j/a.jpg", Deadline(0))
    overtaken = Deadline(30)
    overtaken.cancel(AttemptFenced("overtaken"))
    with pytest.raises(AttemptFenced):
        store.find("j/a.jpg", overtaken)
    with pytest.raises(AttemptFenced):
        store.put_many([("overtaken/a.jpg", b"data", "image/jpeg")], overtaken)
    assert store.find("overtaken/a.jpg", Deadline(30)) is None


def test_an_attempt_that_is_overtaken_while_it_puts_begins_no_other(store: Store) -> None:
    deadline, objects = Deadline(30), [(f"fenced/{n}.txt", b"data", "text/plain") for n in range(500)]
    threading.Timer(0.02, deadline.cancel, [AttemptFenced("overtaken")]).start()

    def put_for_ever() -> None:
        while True:
            store.put_many(objects, deadline)

    with pytest.raises(AttemptFenced):
        put_for_ever()
    time.sleep(1)  # for those that were under way
    store.put_many([(key, b"another", "text/plain") for key, *_ in objects], Deadline(60))
    assert {store.find(key, Deadline(60)) for key, *_ in objects} == {b"another"}


class TestTrouble:
    """A server that refuses, fails or is silent."""

    @pytest.fixture
    def opened(self, http_server: Any) -> Callable[..., Store]:
        def opened(uri: str | None = None) -> Store:
            keys = {"s3_access_key_id": "a", "s3_secret_access_key": "b"}
            where = {"s3_endpoint_url": f"http://{http_server.host}"}
            return stores("s3://own/x", "s3://given/y", **where, **keys).open(uri)

        return opened

    @pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (404, "NoSuchBucket")])
    def test_a_place_that_a_job_has_named_and_that_cannot_be_written_is_not_allowed(
        self, opened: Any, http_server: Any, answer: Any, status: int, code: str
    ) -> None:
        body = f"<Error><Code>{code}</Code></Error>".encode()
        for path in ("/given/y/z/a", "/own/x/a"):
            http_server.url(path, answer(status, body))
        with pytest.raises(OutputNotAllowed, match=rf"s3://given/y/z/a could not be written.*{code}"):
            opened("s3://given/y/z").put_many([("a", b"data", "text/plain")], Deadline(30))
        with pytest.raises(StorageUnavailable, match=code):
            opened().put_many([("a", b"data", "text/plain")], Deadline(30))
        assert len(http_server.received) == 4, "not tried again by either"

    def test_the_worker_s_own_keys_are_no_fault_of_the_job(
        self, opened: Any, http_server: Any, answer: Any
    ) -> None:
        http_server.url("/given/y/a", answer(403, b"<Error><Code>ExpiredToken</Code></Error>"))
        with pytest.raises(StorageUnavailable, match="ExpiredToken"):
            opened("s3://given/y").put_many([("a", b"data", "text/plain")], Deadline(30))

    def test_what_the_worker_may_not_know_of_is_not_there(
        self, opened: Any, http_server: Any, answer: Any
    ) -> None:
        http_server.url("/own/x/a", answer(403, b"<Error><Code>AccessDenied</Code></Error>"))
        assert opened().find("a", Deadline(30)) is None

    def test_nobody_knows_what_is_there_while_the_server_fails(
        self, opened: Any, http_server: Any, answer: Any
    ) -> None:
        http_server.url("/own/x/a", answer(500))
        with pytest.raises(StorageUnavailable, match=r"s3://own/x/a could not be read.*500"):
            opened().find("a", Deadline(2))

    def test_a_stalled_server_holds_nobody_up_for_longer_than_the_deadline(self, silent_port: int) -> None:
        url = f"http://127.0.0.1:{silent_port}"
        store = stores(
            "s3://own/x", s3_endpoint_url=url, s3_access_key_id="a", s3_secret_access_key="b"
        ).open()
        begun = time.monotonic()
        with pytest.raises(JobTimeout):
            store.put_many(OBJECTS, Deadline(1))
        with pytest.raises(JobTimeout):
            store.find("a", Deadline(1))
        assert time.monotonic() - begun < 7

    def test_a_put_is_insisted_on_until_the_server_is_well(
        self, opened: Any, http_server: Any, answer: Any
    ) -> None:
        ill = answer(503)

        def recover() -> None:
            ill.status = 503 if len(http_server.received) < 3 else 200

        ill.before = recover
        http_server.url("/own/x/a", ill)
        assert opened().put_many([("a", b"data", "text/plain")], Deadline(30)) == ["s3://own/x/a"]


def test_a_server_out_of_reach_is_storage_that_is_unavailable() -> None:
    settings = Settings(output="s3://results/x", s3_endpoint_url="http://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match="could not be written"):
        Stores(settings, S3(settings)).open().put("j", b"", "text/plain")


BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class TestFaultyLine:
    """The real server, behind a line that misbehaves for a while."""

    @pytest.fixture
    def line(self, s3_server: Any) -> Iterator[FaultyProxy]:
        with FaultyProxy(s3_server.port) as proxy:
            yield proxy

    @pytest.fixture
    def faraway(self, s3_settings: Any, line: FaultyProxy) -> Any:
        return {**s3_settings, "s3_endpoint_url": f"http://127.0.0.1:{line.port}"}

    @pytest.mark.parametrize(
        "fault",
        [
            Fault(answer=BUSY),
            Fault(garbage=True),
            Fault(reset=0.5),
            Fault(latency_s=0.3, bytes_per_s=4000),
        ],
        ids=["busy", "garbage", "resets", "slow"],
    )
    def test_all_is_there_when_the_line_is_well_again(
        self, faraway: Any, line: FaultyProxy, fault: Fault, request: pytest.FixtureRequest
    ) -> None:
        store = stores(f"s3://results/{request.node.callspec.id}", **faraway).open()
        line.fault = fault
        recovery = threading.Timer(1, setattr, [line, "fault", Fault()])
        recovery.start()
        uris = store.put_many(OBJECTS, Deadline(60))
        recovery.join()
        assert [uri.rpartition("/j/")[2] for uri in uris] == [f"{n}.jpg" for n in range(9)]
        assert [store.get(key) for key, _, _ in OBJECTS] == [data for _, data, _ in OBJECTS]

    @pytest.mark.parametrize("fault", [Fault(garbage=True), Fault(half_open=True)], ids=["garbage", "gone"])
    def test_a_line_that_stays_bad_is_storage_that_is_unavailable_or_a_job_out_of_time(
        self, faraway: Any, line: FaultyProxy, fault: Fault
    ) -> None:
        store = stores("s3://results/bad", **faraway).open()
        line.fault = fault
        begun = time.monotonic()
        with pytest.raises(JobTimeout if fault.half_open else StorageUnavailable):
            store.put_many(OBJECTS, Deadline(1 if fault.half_open else 3))
        assert time.monotonic() - begun < 10
        line.cut()

    def test_a_put_that_was_given_up_arrives_later_whole_or_not_at_all(
        self, faraway: Any, line: FaultyProxy, s3_settings: Any
    ) -> None:
        near = stores("s3://results/zombie", **s3_settings).open()
        far = stores("s3://results/zombie", **faraway).open()
        objects = [(f"{n}", bytes([n]) * 300_000, "image/jpeg") for n in range(4)]
        line.fault = Fault(bytes_per_s=100_000)
        with pytest.raises(JobTimeout):
            far.put_many(objects, Deadline(1))
        line.fault = Fault()
        time.sleep(1)  # whatever was under way arrives
        for key, data, _ in objects:
            assert near.find(key, Deadline(30)) in {None, data}


class TestFolder:
    def test_an_object_comes_back_and_nothing_else_is_left(self, tmp_path: Path) -> None:
        store = stores(tmp_path.as_uri()).open()
        uri = store.put("j/a.jpg", b"data", "image/jpeg")
        store.put("j/a.jpg", b"newer", "image/jpeg")
        assert uri == (tmp_path / "j" / "a.jpg").as_uri()
        assert store.get("j/a.jpg") == b"newer"
        assert names(tmp_path / "j") == ["a.jpg"]
        assert (tmp_path / "j" / "a.jpg").stat().st_mode & 0o777 == 0o644

    def test_one_that_cannot_be_written_is_storage_that_is_unavailable(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageUnavailable, match="could not be written"):
            stores((tmp_path / "file").as_uri()).open().put("j/a.jpg", b"", "image/jpeg")
        with pytest.raises(StorageUnavailable, match="could not be read"):
            stores(tmp_path.as_uri()).open().get("none")

    def test_one_that_a_job_has_named_and_that_cannot_be_written_is_not_allowed(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        opened = stores("s3://out/cams", tmp_path.as_uri()).open((tmp_path / "file").as_uri())
        with pytest.raises(OutputNotAllowed, match="could not be written"):
            opened.put("j/a.jpg", b"", "image/jpeg")

    @pytest.mark.parametrize("nameless", [True, False])
    def test_a_disk_that_fills_up_leaves_nothing_behind(
        self, tmp_path: Path, nameless: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not nameless:  # as where the file system knows no files without a name
            monkeypatch.setattr("gradcam_worker.storage.filesystem.UNNAMED_FILE", os.O_DIRECTORY)
        store = FolderStore(tmp_path)
        store.put("j/a.jpg", b"whole", "image/jpeg")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            with pytest.raises(StorageUnavailable, match="File too large"):
                store.put("j/a.jpg", b"x" * 100_000, "image/jpeg")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(tmp_path / "j") == ["a.jpg"]
        assert store.get("j/a.jpg") == b"whole"

    @pytest.mark.parametrize("nameless", [True, False])
    def test_a_disk_that_was_full_all_the_time_leaves_nothing_behind(
        self, tmp_path: Path, nameless: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not nameless:
            monkeypatch.setattr("gradcam_worker.storage.filesystem.UNNAMED_FILE", os.O_DIRECTORY)

        def full(_: int) -> None:  # a file system may find this out no earlier
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        (tmp_path / "j").mkdir()
        monkeypatch.setattr("gradcam_worker.storage.filesystem.os.fsync", full)
        with pytest.raises(StorageUnavailable, match="No space left on device"):
            FolderStore(tmp_path).put("j/a.jpg", b"data", "image/jpeg")
        assert names(tmp_path / "j") == []

    def test_a_process_that_is_killed_leaves_whole_files_or_none(self, tmp_path: Path) -> None:
        program = (
            "import sys; from pathlib import Path\n"
            "from gradcam_worker.storage.filesystem import FolderStore\n"
            "store = FolderStore(Path(sys.argv[1]))\n"
            "for n in range(100_000):\n"
            "    store.put(f'j/{n % 7}.bin', b'%d' % (n % 10) * 2_000_000, 'x')\n"
            "    print(flush=True)\n"
        )
        for kill_after in (1, 3, 8):
            with subprocess.Popen(
                [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE
            ) as writer:
                assert writer.stdout
                for _ in range(kill_after):
                    writer.stdout.readline()
                time.sleep(0.003 * kill_after)
                writer.kill()
        whole = [one for one in (tmp_path / "j").iterdir() if one.suffix == ".bin"]
        assert whole
        for one in whole:
            data = one.read_bytes()
            assert len(data) == 2_000_000
            assert len(set(data)) == 1

    @pytest.mark.parametrize(
        "key", ["../a", "j/../../a", "/etc/passwd", "j//a", "j/./a", "", "j/", "..", "j/a\0b"]
    )
    def test_no_key_leads_out(self, tmp_path: Path, key: str) -> None:
        store = FolderStore(tmp_path / "out")
        for use in (
            lambda: store.put(key, b"data", "text/plain"),
            lambda: store.get(key),
            lambda: store.find(key, Deadline(30)),
        ):
            with pytest.raises(OutputNotAllowed, match="is no key"):
                use()
        assert names(tmp_path) == []

    @pytest.mark.parametrize("where", ["team", "team/job", "team/job/a.jpg"])
    def test_no_symbolic_link_leads_out(self, tmp_path: Path, where: str) -> None:
        out, secret = tmp_path / "out", tmp_path / "secret"
        (secret / "job").mkdir(parents=True)
        (secret / "a.jpg").write_bytes(b"secret")
        (secret / "job" / "a.jpg").write_bytes(b"secret")
        link = out / where
        link.parent.mkdir(parents=True)
        link.symlink_to(secret / "a.jpg" if where.endswith("jpg") else secret)
        store = stores(out.as_uri()).open(f"{out.as_uri()}/team")
        if where.endswith("jpg"):
            store.put("job/a.jpg", b"data", "image/jpeg")
            assert not link.is_symlink(), "the link itself was replaced"
            link.unlink()
            link.symlink_to(secret / "a.jpg")
        else:
            with pytest.raises(StorageUnavailable, match="Not a directory"):
                store.put("job/a.jpg", b"data", "image/jpeg")
        with pytest.raises(StorageUnavailable):
            store.get("job/a.jpg")
        assert {one.read_bytes() for one in secret.rglob("*.jpg")} == {b"secret"}

    def test_the_operator_s_own_folder_may_be_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "out").symlink_to(tmp_path / "disk")
        stores((tmp_path / "out").as_uri()).open().put("j/a.jpg", b"data", "image/jpeg")
        assert (tmp_path / "disk" / "j" / "a.jpg").read_bytes() == b"data"

    def test_what_is_no_file_is_not_read(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert FolderStore(tmp_path).find("pipe", Deadline(30)) is None
        with pytest.raises(StorageUnavailable):
            FolderStore(tmp_path).get("pipe")

    @pytest.mark.parametrize("name", ["ü 😀.jpg", "a" * 255, "%2e%2e", "a\\b", "a\nb"])
    def test_a_name_is_a_name(self, tmp_path: Path, name: str) -> None:
        FolderStore(tmp_path).put(f"j/{name}", b"data", "image/jpeg")
        assert names(tmp_path / "j") == [name]

    @pytest.mark.parametrize("key", ["a" * 256, "\ud800"])
    def test_a_name_that_no_disk_takes_is_refused(self, tmp_path: Path, key: str) -> None:
        with pytest.raises(OutputNotAllowed):
            FolderStore(tmp_path, by_operator=False).put(key, b"data", "image/jpeg")
        assert names(tmp_path) == []


def names(folder: Path) -> list[str]:
    """All that is there, hidden or not."""
    return sorted(one.name for one in folder.iterdir())


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
        "s3://out/cams/\ud800",
        "s3://out/cams/\u202egpj.exe",
        "s3://out/cams/" + "a" * 201,
        "s3://out/cams/" + "ü" * 101,
        "s3://out/cams" + "/abcdefghi" * 80,
        "S3://out/cams/x",
        "s3://user@out/cams/x",
        "",
    ],
)
def test_a_job_may_write_nowhere_else(uri: str) -> None:
    with pytest.raises(OutputNotAllowed, match="must be below s3://out/cams"):
        stores("s3://out/cams").open(uri)


def test_a_folder_is_written_below_the_longest_prefix_that_allows_it(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "team").symlink_to(tmp_path / "disk")
    opened = stores((tmp_path / "out").as_uri(), (tmp_path / "out" / "team").as_uri())
    opened.open((tmp_path / "out" / "team" / "a b%20ü").as_uri()).put("j", b"data", "text/plain")
    assert (tmp_path / "disk" / "a b%20ü" / "j").read_bytes() == b"data"


def test_a_folder_of_another_machine_is_none_of_ours() -> None:
    with pytest.raises(OutputNotAllowed):
        stores("file://server/share").open()


def test_a_probe_writes_reads_and_says_where(s3_settings: Any) -> None:
    opened = stores("s3://results/probed", **s3_settings).open()
    assert probe(opened) == "s3://results/probed/health/probe.txt"


@dataclass
class Shared(MemoryStore):
    """A store in which somebody else has written meanwhile."""

    others: bytes = b""

    def get(self, key: str) -> bytes:
        del key
        return self.others


def test_a_probe_is_not_disturbed_by_another_workers_and_sees_what_is_none() -> None:
    probe(Shared(others=b"0123456789abcdef" * 2))
    with pytest.raises(StorageUnavailable, match="reads back differently"):
        probe(Shared(others=b"<html>"))


def test_a_probe_does_not_insist(http_server: Any, answer: Any) -> None:
    http_server.url("/results/health/probe.txt", answer(503))
    url = f"http://{http_server.host}"
    opened = stores("s3://results", s3_endpoint_url=url, s3_access_key_id="a", s3_secret_access_key="b")
    with pytest.raises(StorageUnavailable, match="503"):
        probe(opened.open())
    assert len(http_server.received) == 2
