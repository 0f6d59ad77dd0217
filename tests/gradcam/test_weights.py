import hashlib
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from worker.errors import WeightsChecksumMismatch, WeightsUnavailable
from worker.gradcam.catalog import CATALOG
from worker.gradcam.classes import DATA
from worker.gradcam.weights import WeightsFile, download, locate, where

SHIPPED, FETCHED = CATALOG["efficientnet_lite0"], CATALOG["vgg16"]
KERAS_FILE = FETCHED.keras_files[0]


class TestWhere:
    def test_the_shipped_file_is_used_where_the_operator_has_no_folder(self) -> None:
        assert where(SHIPPED, None) == DATA / "efficientnet_lite0.weights.h5"

    def test_the_shipped_file_is_used_where_the_operators_folder_has_none(self, tmp_path: Path) -> None:
        assert where(SHIPPED, tmp_path) == DATA / "efficientnet_lite0.weights.h5"

    @pytest.mark.parametrize("name", ["efficientnet_lite0.weights.h5", "efficientnet_lite0.h5"])
    def test_the_operators_file_goes_before_the_shipped_one(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).touch()
        assert where(SHIPPED, tmp_path) == tmp_path / name

    def test_a_file_by_our_name_goes_before_one_by_keras_name(self, tmp_path: Path) -> None:
        for name in (KERAS_FILE, "vgg16.h5", "vgg16.weights.h5"):  # each goes before the one before
            (tmp_path / name).touch()
            assert where(FETCHED, tmp_path) == tmp_path / name

    def test_a_folder_that_is_called_like_the_file_is_passed_over(self, tmp_path: Path) -> None:
        (tmp_path / "vgg16.weights.h5").mkdir()
        assert where(FETCHED, tmp_path) is None

    def test_another_networks_file_is_passed_over(self, tmp_path: Path) -> None:
        (tmp_path / "xception.weights.h5").touch()
        assert where(FETCHED, tmp_path) is None

    def test_nothing_is_found_where_only_a_download_is_left(self) -> None:
        assert where(FETCHED, None) is None


class TestLocate:
    def test_the_shipped_file_is_the_one_that_was_shipped(self) -> None:
        assert locate(SHIPPED, None) == WeightsFile(DATA / str(SHIPPED.shipped), str(SHIPPED.sha256))

    def test_a_shipped_file_that_was_changed_is_refused_with_both_checksums(self) -> None:
        with pytest.raises(WeightsChecksumMismatch, match=f"sha256 {'0' * 64} but has {SHIPPED.sha256}"):
            locate(replace(SHIPPED, sha256="0" * 64), None)

    def test_a_shipped_file_that_is_gone_is_refused(self) -> None:
        with pytest.raises(WeightsChecksumMismatch, match=r"lost\.h5 should have .* but has no file"):
            locate(replace(SHIPPED, shipped="lost.h5"), None)

    def test_the_operators_file_may_differ_and_says_what_it_is(self, tmp_path: Path) -> None:
        path = tmp_path / "efficientnet_lite0.weights.h5"
        path.write_bytes(b"finetuned")
        assert locate(SHIPPED, tmp_path) == WeightsFile(path, hashlib.sha256(b"finetuned").hexdigest())

    def test_nothing_is_located_where_only_a_download_is_left(self, tmp_path: Path) -> None:
        assert locate(FETCHED, tmp_path) is None


class TestDownload:
    def test_a_failed_download_says_every_way_out(self) -> None:
        def build() -> object:
            message = "URL fetch failure: no route to host"
            raise RuntimeError(message)

        with pytest.raises(WeightsUnavailable) as refused:
            download(FETCHED, build, Path)
        for hint in ("vgg16", "no route to host", "GRADCAM_WEIGHTS_DIR", "vgg16.weights.h5", KERAS_FILE):
            assert hint in str(refused.value)
        assert refused.value.retryable
        assert isinstance(refused.value.__cause__, RuntimeError)

    def test_a_downloaded_file_is_named_by_its_checksum(self, tmp_path: Path) -> None:
        cached = tmp_path / KERAS_FILE

        def build() -> str:
            cached.write_bytes(b"imagenet")
            return "model"

        file = WeightsFile(cached, hashlib.sha256(b"imagenet").hexdigest())
        assert download(FETCHED, build, lambda: cached) == ("model", file)

    @pytest.mark.parametrize("failure", [None, TimeoutError()])
    def test_only_the_download_itself_is_ended_when_it_stalls(self, failure: Exception | None) -> None:
        limits = []

        def build() -> None:
            limits.append(socket.getdefaulttimeout())
            if failure:
                raise failure

        with suppress(WeightsUnavailable):
            download(FETCHED, build, lambda: DATA / "NOTICE")
        assert limits == [30]
        assert socket.getdefaulttimeout() is None
