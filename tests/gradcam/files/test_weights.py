import contextlib
import hashlib
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.errors import WeightsChecksumMismatch, WeightsUnavailable
from gradcam_worker.gradcam.catalog import CATALOG, ModelFile
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.files.file_cache import FileCache
from gradcam_worker.gradcam.files.weights import (
    Sink,
    WeightsFile,
    download,
    fetch_cached,
    file_sha256,
    find_weights,
    weights_path,
)

SHIPPED, FETCHED = CATALOG["efficientnet_lite0"], CATALOG["vgg16"]
KERAS_FILE = FETCHED.keras_files[0]


class TestWeightsPath:
    def test_the_shipped_file_is_used_where_the_operator_has_no_folder(self) -> None:
        assert weights_path(SHIPPED, None) == DATA / "efficientnet_lite0.weights.h5"

    def test_the_shipped_file_is_used_where_the_operators_folder_has_none(self, tmp_path: Path) -> None:
        assert weights_path(SHIPPED, tmp_path) == DATA / "efficientnet_lite0.weights.h5"

    @pytest.mark.parametrize("name", ["efficientnet_lite0.weights.h5", "efficientnet_lite0.h5"])
    def test_the_operators_file_goes_before_the_shipped_one(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).touch()
        assert weights_path(SHIPPED, tmp_path) == tmp_path / name

    def test_a_file_with_our_name_goes_before_one_with_the_name_of_keras(self, tmp_path: Path) -> None:
        for name in (KERAS_FILE, "vgg16.h5", "vgg16.weights.h5"):  # each goes before the one before
            (tmp_path / name).touch()
            assert weights_path(FETCHED, tmp_path) == tmp_path / name

    def test_a_folder_with_the_name_of_the_file_is_ignored(self, tmp_path: Path) -> None:
        (tmp_path / "vgg16.weights.h5").mkdir()
        assert weights_path(FETCHED, tmp_path) is None

    def test_the_file_of_another_network_is_ignored(self, tmp_path: Path) -> None:
        (tmp_path / "xception.weights.h5").touch()
        assert weights_path(FETCHED, tmp_path) is None

    def test_nothing_is_found_if_only_a_download_remains(self) -> None:
        assert weights_path(FETCHED, None) is None


class TestFindWeights:
    def test_the_shipped_file_is_the_one_that_was_shipped(self) -> None:
        assert find_weights(SHIPPED, None) == WeightsFile(DATA / str(SHIPPED.shipped), str(SHIPPED.sha256))

    def test_a_shipped_file_that_was_changed_is_refused_with_both_checksums(self) -> None:
        with pytest.raises(WeightsChecksumMismatch, match=f"sha256 {'0' * 64} but has {SHIPPED.sha256}"):
            find_weights(replace(SHIPPED, sha256="0" * 64), None)

    def test_a_shipped_file_that_is_gone_is_refused(self) -> None:
        with pytest.raises(WeightsChecksumMismatch, match=r"lost\.h5 should have .* but has no file"):
            find_weights(replace(SHIPPED, shipped="lost.h5"), None)

    def test_the_operators_file_may_have_any_checksum(self, tmp_path: Path) -> None:
        path = tmp_path / "efficientnet_lite0.weights.h5"
        path.write_bytes(b"finetuned")
        assert find_weights(SHIPPED, tmp_path) == WeightsFile(path, hashlib.sha256(b"finetuned").hexdigest())

    @pytest.mark.parametrize("target", ["nowhere", "efficientnet_lite0.weights.h5"])
    def test_a_broken_link_is_refused_and_not_replaced_by_the_shipped_file(
        self, target: str, tmp_path: Path
    ) -> None:
        (tmp_path / "efficientnet_lite0.weights.h5").symlink_to(tmp_path / target)
        with pytest.raises(WeightsUnavailable, match=r"lite0\.weights\.h5 is a link that leads nowhere"):
            find_weights(SHIPPED, tmp_path)

    def test_no_file_is_verified_if_only_a_download_remains(self, tmp_path: Path) -> None:
        assert find_weights(FETCHED, tmp_path) is None


class TestDownload:
    def test_a_failed_download_is_refused_with_all_alternatives(self) -> None:
        def build() -> object:
            message = "URL fetch failure: no route to host"
            raise RuntimeError(message)

        with pytest.raises(WeightsUnavailable) as refused:
            download(FETCHED, build, Path)
        assert f"put Keras's {KERAS_FILE}, under that name, or vgg16.weights.h5 of your own" in str(
            refused.value
        )
        for hint in ("vgg16", "no route to host", "GRADCAM_WEIGHTS_DIR", "vgg16.weights.h5", KERAS_FILE):
            assert hint in str(refused.value)
        assert refused.value.retryable
        assert isinstance(refused.value.__cause__, RuntimeError)

    def test_a_downloaded_file_is_named_by_its_checksum(self, tmp_path: Path) -> None:
        fetch_cached = tmp_path / KERAS_FILE

        def build() -> str:
            fetch_cached.write_bytes(b"imagenet")
            return "model"

        file = WeightsFile(fetch_cached, hashlib.sha256(b"imagenet").hexdigest())
        assert download(FETCHED, build, lambda: fetch_cached) == ("model", file)

    @pytest.mark.parametrize("failure", [None, TimeoutError()])
    def test_the_timeout_of_the_download_is_reset_afterwards(self, failure: Exception | None) -> None:
        limits = []

        def build() -> None:
            limits.append(socket.getdefaulttimeout())
            if failure:
                raise failure

        with contextlib.suppress(WeightsUnavailable):
            download(FETCHED, build, lambda: DATA / "NOTICE")
        assert limits == [30]
        assert socket.getdefaulttimeout() is None


class FakeSource:
    """Writes the same data for any address, and remembers the addresses."""

    def __init__(self, data: bytes | Exception, *, declares_size: bool = False) -> None:
        self.data, self.declares_size = data, declares_size
        self.fetched: list[str] = []

    def __call__(self, uri: str, sink: Sink) -> None:
        self.fetched.append(uri)
        if isinstance(self.data, Exception):
            raise self.data
        if self.declares_size:
            sink.expect(len(self.data))
        for start in range(0, len(self.data), 4):  # in more than one piece
            sink.write(self.data[start : start + 4])


BYTES = b"what a network weighs"
CHECKSUM = hashlib.sha256(BYTES).hexdigest()
S3_FILE = ModelFile("s3://models/birds.keras", CHECKSUM)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestFetchCached:
    def test_a_file_is_fetched_once_and_kept_under_its_checksum(self, tmp_path: Path) -> None:
        source, folder = FakeSource(BYTES), tmp_path / "new" / "cache"
        first, second = fetch_cached(S3_FILE, folder, source), fetch_cached(S3_FILE, folder, source)
        assert first == second == WeightsFile(folder / f"{CHECKSUM}.keras", CHECKSUM)
        assert first.path.read_bytes() == BYTES
        assert source.fetched == ["s3://models/birds.keras"]
        assert contents(folder) == [f"{CHECKSUM}.keras"]

    def test_only_the_owner_can_read_the_folder(self, tmp_path: Path) -> None:
        fetch_cached(S3_FILE, tmp_path / "cache", FakeSource(BYTES))
        assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700

    def test_a_file_on_this_machine_is_copied_so_that_what_was_checked_is_what_is_loaded(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "birds.weights.h5").write_bytes(BYTES)
        file = ModelFile(str(tmp_path / "birds.weights.h5"), CHECKSUM)
        cached = fetch_cached(file, tmp_path / "cache", FakeSource(AssertionError("S3 must not be used")))
        (tmp_path / "birds.weights.h5").write_bytes(b"something else")
        assert cached.path == tmp_path / "cache" / f"{CHECKSUM}.weights.h5"
        assert cached.path.read_bytes() == BYTES
        assert fetch_cached(file, tmp_path / "cache", FakeSource(b"")) == cached

    def test_another_file_than_the_pinned_one_is_refused_with_both_checksums_and_not_kept(
        self, tmp_path: Path
    ) -> None:
        actual = hashlib.sha256(b"evil").hexdigest()
        with pytest.raises(WeightsChecksumMismatch, match=f"should have sha256 {CHECKSUM} but has {actual}"):
            fetch_cached(S3_FILE, tmp_path, FakeSource(b"evil"))
        assert contents(tmp_path) == []

    def test_a_copy_that_was_damaged_is_fetched_again(self, tmp_path: Path) -> None:
        source = FakeSource(BYTES)
        path = fetch_cached(S3_FILE, tmp_path, source).path
        path.write_bytes(BYTES[:-1] + b"!")
        assert fetch_cached(S3_FILE, tmp_path, source).path.read_bytes() == BYTES
        assert len(source.fetched) == 2
        assert contents(tmp_path) == [path.name]

    def test_a_damaged_copy_whose_source_is_wrong_too_is_not_loaded(self, tmp_path: Path) -> None:
        fetch_cached(S3_FILE, tmp_path, FakeSource(BYTES)).path.write_bytes(b"damaged")
        with pytest.raises(WeightsChecksumMismatch):
            fetch_cached(S3_FILE, tmp_path, FakeSource(b"evil"))

    def test_a_fetch_that_fails_leaves_nothing_behind(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsUnavailable, match="no route"):
            fetch_cached(S3_FILE, tmp_path, FakeSource(WeightsUnavailable("no route")))
        assert contents(tmp_path) == []

    def test_a_saved_model_instead_of_a_file_is_refused_with_the_line_that_converts_it(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "own.keras").mkdir()
        (tmp_path / "own.keras" / "saved_model.pb").touch()
        with pytest.raises(
            WeightsUnavailable,
            match=r"own\.keras is a folder, a SavedModel: .*`gradcam convert own\.keras NAME",
        ):
            fetch_cached(
                ModelFile(str(tmp_path / "own.keras"), CHECKSUM), tmp_path / "cache", FakeSource(b"")
            )

    def test_circular_links_are_refused_as_unreadable(self, tmp_path: Path) -> None:
        (tmp_path / "own.keras").symlink_to(tmp_path / "own.keras")
        with pytest.raises(
            WeightsUnavailable, match=r"own\.keras cannot be read \(Too many levels of symbolic"
        ):
            fetch_cached(
                ModelFile(str(tmp_path / "own.keras"), CHECKSUM), tmp_path / "cache", FakeSource(b"")
            )

    @pytest.mark.parametrize("name", ["none.keras", "folder.keras", "file/none.keras"])
    def test_a_missing_file_is_refused_with_advice_and_may_be_retried(
        self, name: str, tmp_path: Path
    ) -> None:
        (tmp_path / "folder.keras").mkdir()
        (tmp_path / "file").touch()
        file = ModelFile(str(tmp_path / name), CHECKSUM)
        with pytest.raises(
            WeightsUnavailable, match=f"{name} cannot be read .*: put the network's file there"
        ):
            fetch_cached(file, tmp_path / "cache", FakeSource(b""))

    def test_a_cache_that_cannot_be_written_names_the_setting(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(WeightsUnavailable, match="GRADCAM_CACHE_DIR must name a folder"):
            fetch_cached(S3_FILE, tmp_path / "file", FakeSource(BYTES))

    def test_processes_that_fetch_concurrently_all_get_the_complete_file(self, tmp_path: Path) -> None:
        data = bytes(range(256)) * 40_000  # 10 MB, so that they do overlap
        (tmp_path / "large.keras").write_bytes(data)
        checksum = hashlib.sha256(data).hexdigest()
        program = (
            "import sys, time; from pathlib import Path\n"
            "from gradcam_worker.gradcam.catalog import ModelFile\n"
            "from gradcam_worker.gradcam.files.weights import fetch_cached, file_sha256\n"
            "source, sha256, folder = sys.argv[1:]\n"
            "print('ready', flush=True); sys.stdin.readline()\n"
            "print(file_sha256(fetch_cached(ModelFile(source, sha256), Path(folder), None).path))\n"
        )
        arguments = [str(tmp_path / "large.keras"), checksum, str(tmp_path / "cache")]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with contextlib.ExitStack() as stack:
            processes: list[Any] = [
                stack.enter_context(
                    subprocess.Popen([sys.executable, "-P", "-c", program, *arguments], **pipes)
                )
                for _ in range(4)
            ]
            for process in processes:
                assert process.stdout.readline() == "ready\n"
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            assert [process.communicate(timeout=60)[0] for process in processes] == [f"{checksum}\n"] * 4
        assert contents(tmp_path / "cache") == [f"{checksum}.keras"]


class TestCacheLimit:
    """The cache never exceeds its limit, and keeps the most recently used files."""

    @staticmethod
    def add(folder: Path, data: bytes, max_bytes: int | None, age_s: float = 0) -> Path:
        """Add a file to the cache that was last used `age_s` seconds ago."""
        file = ModelFile("s3://models/one.keras", hashlib.sha256(data).hexdigest())
        path = fetch_cached(file, folder, FakeSource(data), max_bytes).path
        if age_s:
            used = path.stat().st_mtime - age_s
            os.utime(path, (used, used))
        return path

    def test_the_least_recently_used_file_is_removed(self, tmp_path: Path) -> None:
        oldest = self.add(tmp_path, b"a" * 40, 100, age_s=30)
        old = self.add(tmp_path, b"b" * 40, 100, age_s=20)
        create = self.add(tmp_path, b"c" * 40, 100)
        assert contents(tmp_path) == sorted([old.name, create.name])
        assert not oldest.exists()

    def test_fetching_a_cached_file_counts_as_use(self, tmp_path: Path) -> None:
        first = self.add(tmp_path, b"a" * 40, 100, age_s=30)
        second = self.add(tmp_path, b"b" * 40, 100, age_s=20)
        assert self.add(tmp_path, b"a" * 40, 100) == first
        self.add(tmp_path, b"c" * 40, 100)
        assert first.exists()
        assert not second.exists()

    def test_no_more_files_are_removed_than_necessary(self, tmp_path: Path) -> None:
        paths = [self.add(tmp_path, bytes([number]) * 20, 100, age_s=100 - number) for number in range(5)]
        self.add(tmp_path, b"x" * 30, 100)
        assert [path.exists() for path in paths] == [False, False, True, True, True]

    def test_without_a_limit_all_files_stay(self, tmp_path: Path) -> None:
        for number in range(20):
            self.add(tmp_path, bytes([number]) * 100, None)
        assert len(contents(tmp_path)) == 20

    @pytest.mark.parametrize("weights_path", ["s3", "here"])
    def test_a_file_larger_than_the_limit_is_refused_with_both_sizes_and_nothing_is_removed(
        self, weights_path: str, tmp_path: Path
    ) -> None:
        folder, data = tmp_path / "cache", b"b" * 5001
        kept = self.add(folder, b"a" * 40, 5000)
        source = tmp_path / "large.keras"
        source.write_bytes(data)
        uri = "s3://models/large.keras" if weights_path == "s3" else str(source)
        file = ModelFile(uri, hashlib.sha256(data).hexdigest())
        with pytest.raises(
            WeightsUnavailable, match=r"large\.keras has 5,001 bytes, above the 5,000 .*GRADCAM_CACHE_BYTES"
        ):
            fetch_cached(file, folder, FakeSource(data, declares_size=True), 5000)
        assert contents(folder) == [kept.name]

    def test_a_file_of_undeclared_size_cannot_exceed_the_limit(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsUnavailable, match="above the 5,000 bytes"):
            self.add(tmp_path, b"b" * 6000, 5000)
        assert contents(tmp_path) == []

    def test_other_files_in_the_folder_are_neither_counted_nor_removed(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_bytes(bytes(500))
        (tmp_path / "models").mkdir()
        self.add(tmp_path, b"a" * 90, 100)
        self.add(tmp_path, b"b" * 90, 100)
        assert {"notes.txt", "models"} < set(contents(tmp_path))
        assert len(contents(tmp_path)) == 3

    def test_partial_files_count_and_are_not_removed(self, tmp_path: Path) -> None:
        cache = FileCache(tmp_path, 100)
        with cache.create("one", "s3://models/one.keras") as part:
            part.write(bytes(60))
            with pytest.raises(WeightsUnavailable, match="other files are being fetched"):
                self.add(tmp_path, b"b" * 60, 100)
            self.add(tmp_path, b"c" * 40, 100)

    def test_files_of_killed_processes_are_removed_and_those_being_written_are_not(
        self, tmp_path: Path
    ) -> None:
        program = (
            "import sys, time; from pathlib import Path\n"
            "from gradcam_worker.gradcam.files.file_cache import FileCache\n"
            "with FileCache(Path(sys.argv[1]), None).create('one', 's3://models/one.keras') as part:\n"
            "    part.write(bytes(60)); print('written', flush=True); time.sleep(600)\n"
        )
        command = [sys.executable, "-P", "-c", program, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == "written\n"
            (part,) = tmp_path.iterdir()
            os.utime(part, (1, 1))  # as if nothing had come for very long
            self.add(tmp_path, b"a", None)
            assert part.exists(), "its process is alive"
            process.kill()
            process.wait()
        young = tmp_path / "young.part"
        young.touch()  # it may not be locked yet
        self.add(tmp_path, b"b", None)
        assert not part.exists()
        assert young.exists()

    def test_processes_that_remove_each_others_files_all_get_theirs(self, tmp_path: Path) -> None:
        program = (
            "import hashlib, sys; from pathlib import Path\n"
            "from gradcam_worker.errors import WeightsUnavailable\n"
            "from gradcam_worker.gradcam.catalog import ModelFile\n"
            "from gradcam_worker.gradcam.files.weights import fetch_cached\n"
            "folder, first = Path(sys.argv[1]), int(sys.argv[2])\n"
            "got = 0\n"
            "for turn in range(60):\n"
            "    data = bytes([(first + turn) % 7]) * 1000\n"
            "    file = ModelFile('s3://models/one.keras', hashlib.sha256(data).hexdigest())\n"
            "    try:\n"
            "        fetch_cached(file, folder, lambda uri, sink: sink.write(data), 3000); got += 1\n"
            "    except WeightsUnavailable as error:\n"
            "        assert 'being fetched' in str(error), error\n"
            "print(got)\n"
        )
        processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(tmp_path), str(number)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in (0, 3)
        ]
        outputs = [process.communicate(timeout=60)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
        assert min(map(int, outputs)) > 30
        left = list(tmp_path.iterdir())
        assert 0 < sum(path.stat().st_size for path in left) <= 3000
        assert all(file_sha256(path) == path.stem for path in left)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 1 MB; where none can be mounted, one in which no file can grow beyond that."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, check=False, capture_output=True).returncode == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024**2, before[1]))
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


class TestFullDisk:
    @pytest.mark.parametrize("weights_path", ["s3", "here"])
    def test_it_raises_weights_unavailable_and_leaves_no_file(
        self, weights_path: str, small_disk: Path, tmp_path: Path
    ) -> None:
        data = bytes(4 * 1024 * 1024)
        source = (tmp_path / "large.keras").resolve()
        source.write_bytes(data)
        uri = "s3://models/large.keras" if weights_path == "s3" else str(source)
        file = ModelFile(uri, hashlib.sha256(data).hexdigest())

        def fetch(_: str, sink: Sink) -> None:
            for at in range(0, len(data), 65_536):
                sink.write(data[at : at + 65_536])

        with pytest.raises(
            WeightsUnavailable, match=r"could not be written to .* \(.*, after [0-9,]+ bytes\): make room"
        ) as refused:
            fetch_cached(file, small_disk / "cache", fetch)
        assert refused.value.retryable
        assert contents(small_disk / "cache") == []
