import io
import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import moto
import pytest

from worker.errors import OutputNotAllowed, StorageUnavailable, WeightsUnavailable
from worker.settings import Settings
from worker.storage import S3, Stores


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")


@pytest.fixture
def bucket() -> Iterator[None]:
    with moto.mock_aws():
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="results")
        yield


def stores(output: str, *prefixes: str) -> Stores:
    settings = Settings(output=output, output_prefixes=prefixes)
    return Stores(settings, S3(settings))


def test_an_object_comes_back_from_a_bucket(bucket: None) -> None:
    store = stores("s3://results/cams").open()
    assert store.put("j/a.jpg", b"data", "image/jpeg") == "s3://results/cams/j/a.jpg"
    assert store.get("j/a.jpg") == b"data"
    head = boto3.client("s3", region_name="us-east-1").head_object(Bucket="results", Key="cams/j/a.jpg")
    assert head["ContentType"] == "image/jpeg"


def test_a_missing_bucket_is_storage_that_is_unavailable(bucket: None) -> None:
    with pytest.raises(StorageUnavailable, match=r"s3://none/x/j could not be written.*does not exist"):
        stores("s3://none/x").open().put("j", b"", "text/plain")


def test_a_large_object_is_downloaded_whole(bucket: None) -> None:
    data = bytes(range(256)) * 5000
    boto3.client("s3", region_name="us-east-1").put_object(Bucket="results", Key="a/b.keras", Body=data)
    taken = io.BytesIO()
    S3(Settings()).download("s3://results/a/b.keras", taken)
    assert taken.getvalue() == data


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("s3://results/none.keras", "There is no such object: s3://results/none.keras"),
        ("s3://none/a.keras", "There is no such bucket: s3://none/a.keras"),
        ("s3://N O/a.keras", "could not be read"),
    ],
)
def test_an_object_that_is_not_there_is_weights_that_are_unavailable(
    uri: str, why: str, bucket: None
) -> None:
    with pytest.raises(WeightsUnavailable, match=why):
        S3(Settings()).download(uri, io.BytesIO())


def test_a_download_from_a_server_out_of_reach_may_be_tried_again() -> None:
    s3 = S3(Settings(s3_endpoint_url="http://127.0.0.1:1"))
    with pytest.raises(WeightsUnavailable, match=r"s3://models/a\.keras could not be read") as refused:
        s3.download("s3://models/a.keras", io.BytesIO())
    assert refused.value.retryable


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
