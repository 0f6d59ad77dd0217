import io
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import moto
import pytest

from worker.deadline import Deadline
from worker.errors import ImageFetchFailed, JobTimeout, WeightsUnavailable
from worker.s3 import FAILED, S3
from worker.settings import Settings

KEYS = {"s3_access_key_id": "testing", "s3_secret_access_key": "testing"}


@pytest.fixture(autouse=True)
def a_machine_without_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def handed_over(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What boto3 had to do, because obstore could not."""
    caplog.set_level(logging.INFO, logger="gradcam")
    return lambda: [record.getMessage() for record in caplog.records]


def local(http_server: Any, **others: Any) -> S3:
    """An S3 whose server is a plain HTTP server."""
    return S3(Settings.model_validate({"s3_endpoint_url": f"http://{http_server.host}", **KEYS, **others}))


class TestBothLibraries:
    def test_an_object_keeps_its_media_type_and_boto3_is_not_needed(
        self, s3_settings: Any, handed_over: Any
    ) -> None:
        s3 = S3(Settings(**s3_settings))
        s3.put("results", "j/a.jpg", b"data", "image/jpeg")
        assert s3.read_image("results", "j/a.jpg", 10, Deadline(10)) == b"data"
        assert s3.client.head_object(Bucket="results", Key="j/a.jpg")["ContentType"] == "image/jpeg"
        assert handed_over() == []

    @pytest.mark.parametrize("place", ["environment", "file"])
    def test_keys_are_found_in_the_usual_places(
        self,
        s3_settings: Any,
        handed_over: Any,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        place: str,
    ) -> None:
        key = s3_settings.pop("s3_access_key_id")
        secret = s3_settings.pop("s3_secret_access_key").get_secret_value()
        if place == "environment":
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        else:
            file = tmp_path / "credentials"
            file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
            monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
        S3(Settings(**s3_settings)).put("results", "usual", b"data", "text/plain")
        assert handed_over() == []

    def test_no_keys_anywhere_are_named_as_the_reason(self) -> None:
        with pytest.raises(ImageFetchFailed, match="Unable to locate credentials"):
            S3(Settings()).read_image("photos", "a.jpg", 10, Deadline(10))

    def test_what_the_environment_tells_obstore_alone_leads_nowhere_else(
        self, s3_settings: Any, handed_over: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
        monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:1")
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        monkeypatch.setenv("AWS_BUCKET", "another")
        S3(Settings(**s3_settings)).put("results", "here", b"data", "text/plain")
        assert handed_over() == []

    @pytest.mark.parametrize("key", ["/a.jpg", "a.jpg/", "a//b.jpg", "a/./b.jpg", "a/../b.jpg", "a\tb.jpg"])
    def test_a_key_that_obstore_would_change_is_left_to_boto3(
        self, http_server: Any, answer: Any, handed_over: Any, key: str
    ) -> None:
        path = f"/photos/{key}".replace("\t", "%09")
        http_server.url(path, answer(200, b"data"))
        assert local(http_server).read_image("photos", key, 10, Deadline(10)) == b"data"
        assert [one for one, _ in http_server.received] == [path], "asked for once, under its own name"
        assert len(handed_over()) == 1

    def test_a_bucket_of_an_unusual_name_is_left_to_boto3(
        self, http_server: Any, answer: Any, handed_over: Any
    ) -> None:
        http_server.url("/Old_Photos/a.jpg", answer(200, b"data"))
        assert local(http_server).read_image("Old_Photos", "a.jpg", 10, Deadline(10)) == b"data"
        assert "Old_Photos" in handed_over()[0]

    def test_a_server_that_stumbles_once_is_asked_again(self, http_server: Any, answer: Any) -> None:
        stumbling = answer(500)

        def recover() -> None:
            stumbling.status = 500 if len(http_server.received) == 1 else 200

        stumbling.before = recover
        http_server.url("/results/a", stumbling)
        local(http_server).put("results", "a", b"data", "text/plain")
        assert http_server.received == [("/results/a", b"data")] * 2

    def test_a_job_out_of_time_does_not_ask_a_second_time(self, http_server: Any, answer: Any) -> None:
        slow = http_server.url("/results/a", answer(500, before=lambda: time.sleep(0.3)))
        with pytest.raises(JobTimeout, match="upload"):
            local(http_server).put("results", "a", b"data", "text/plain", Deadline(0.1))
        assert [path for path, _ in http_server.received] == ["/results/a"], slow

    def test_a_server_that_stays_broken_is_asked_three_times_in_all(
        self, http_server: Any, answer: Any
    ) -> None:
        http_server.url("/results/a", answer(503))
        s3 = local(http_server)
        with pytest.raises(FAILED, match="503"):
            s3.put("results", "a", b"data", "text/plain")
        assert len(http_server.received) == 3

    @pytest.mark.parametrize(
        ("settings", "bucket"),
        [
            ({}, "photos"),
            ({"s3_region": "eu-west-1"}, "photos"),
            ({"s3_region": "cn-north-1"}, "photos"),
            ({"s3_region": "eu-west-1"}, "with.dots"),
            ({"s3_endpoint_url": "https://minio:9000/"}, "photos"),
        ],
    )
    def test_obstore_looks_for_a_bucket_where_boto3_does(self, settings: dict[str, str], bucket: str) -> None:
        s3 = S3(Settings.model_validate(settings | KEYS))
        asked: list[str] = []

        def refuse(request: Any, **_: Any) -> None:
            asked.append(request.url)
            raise InterruptedError

        s3.client.meta.events.register("before-send.s3", refuse)
        with pytest.raises(InterruptedError):
            s3.client.get_object(Bucket=bucket, Key="a.jpg")
        assert asked == [f"{s3._bucket(bucket).config['endpoint']}/a.jpg"]


class TestDownloads:
    @pytest.fixture
    def bucket(self) -> Iterator[Any]:
        with moto.mock_aws():
            client = boto3.client("s3", region_name="us-east-1")
            client.create_bucket(Bucket="results")
            yield client

    def test_a_large_object_is_downloaded_whole(self, bucket: Any) -> None:
        data = bytes(range(256)) * 5000
        bucket.put_object(Bucket="results", Key="a/b.keras", Body=data)
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
        self, uri: str, why: str, bucket: Any
    ) -> None:
        with pytest.raises(WeightsUnavailable, match=why):
            S3(Settings()).download(uri, io.BytesIO())

    def test_a_download_from_a_server_out_of_reach_may_be_tried_again(self) -> None:
        s3 = S3(Settings.model_validate({"s3_endpoint_url": "http://127.0.0.1:1", **KEYS}))
        with pytest.raises(WeightsUnavailable, match=r"s3://models/a\.keras could not be read") as refused:
            s3.download("s3://models/a.keras", io.BytesIO())
        assert refused.value.retryable
