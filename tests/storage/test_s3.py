import base64
import contextlib
import hashlib
import io
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import boto3
import moto
import pytest

from gradcam_worker.errors import (
    AttemptFenced,
    GradcamError,
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    JobTimeout,
    OutputNotAllowed,
    StorageUnavailable,
    UriNotAllowed,
    WeightsUnavailable,
)
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.retry import Retries
from gradcam_worker.resilience.server_activity import ServerActivity
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import NO_DEADLINE, S3, STORAGE, _try_both
from gradcam_worker.storage.s3_errors import S3_ERRORS, InvalidBucket, InvalidListing
from gradcam_worker.storage.stores import S3Store, Stores

KEYS = {"s3_access_key_id": "testing", "s3_secret_access_key": "testing"}


class Taken(io.BytesIO):
    """A sink in memory, see `gradcam_worker.gradcam.files.weights.Sink`."""

    expected: int | None = None

    def expect(self, size: int) -> None:
        self.expected = size


@pytest.fixture(autouse=True)
def a_machine_without_keys(no_keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_the_embedded_server_lists_files_that_are_put_into_its_folder(
        self, s3_server: Any, s3_settings: Any
    ) -> None:
        s3, folder = S3(Settings(**s3_settings)), s3_server.root / "photos" / "beside"
        s3.put("photos", "beside/a.jpg", b"data", "image/jpeg")
        assert [one.key for one in s3.list_objects("photos", "beside/")] == ["beside/a.jpg"]
        (folder / "b.jpg").write_bytes(b"data")
        end = time.monotonic() + 60  # unless told otherwise, rclone looks again after five minutes
        while len(found := [one.key for one in s3.list_objects("photos", "beside/")]) < 2:
            assert time.monotonic() < end
            time.sleep(0.2)
        assert found == ["beside/a.jpg", "beside/b.jpg"]

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
        with pytest.raises(StorageUnavailable, match="Unable to locate credentials"):
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

    def test_a_key_that_obstore_could_not_ask_for_is_left_to_boto3_unasked(
        self, http_server: Any, answer: Any, handed_over: Any
    ) -> None:
        key = "x" * 1025
        http_server.url(f"/photos/{key}", answer(404, b"<Error><Code>NoSuchKey</Code></Error>"))
        with pytest.raises(ImageNotFound):
            local(http_server).read_image("photos", key, 10, Deadline(10))
        assert "has more than 1,024 bytes" in handed_over()[0]

    def test_where_obstore_panics_boto3_takes_over(
        self, http_server: Any, answer: Any, handed_over: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gradcam_worker.storage.s3.MAX_KEY_BYTES", 100_000)
        key = "x" * 65_510  # a line that an HTTP server reads, and an address at which obstore panics
        http_server.url(f"/photos/{key}", answer(200, b"data"))
        assert local(http_server).read_image("photos", key, 10, Deadline(10)) == b"data"
        assert "obstore panicked: request" in handed_over()[0]

    def test_only_a_panic_is_taken_for_one(self) -> None:
        with pytest.raises(SystemExit):
            _try_both("s3://a/b", sys.exit, lambda: None, STORAGE.start(), ServerActivity())

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
        assert asked == [f"{s3._obstore_bucket(bucket).config['endpoint']}/a.jpg"]


class Raw:
    """A server that answers whoever comes in the same way, as it is told to: not at all, slowly, by half."""

    def __init__(self, say: Callable[[socket.socket], object]) -> None:
        self._say = say
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked = 0
        self.over = threading.Event()
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        while True:
            caller, _ = self._listener.accept()
            if self.over.is_set():
                caller.close()
                return
            self.asked += 1
            self._threads.append(threading.Thread(target=self._answer, args=[caller]))
            self._threads[-1].start()

    def _answer(self, caller: socket.socket) -> None:
        with caller, contextlib.suppress(OSError):
            caller.settimeout(5)
            caller.recv(65_536)
            self._say(caller)

    def close(self) -> None:
        self.over.set()
        socket.create_connection(self._listener.getsockname()).close()
        for thread in self._threads:
            thread.join()
        self._listener.close()


@pytest.fixture
def raw() -> Iterator[Callable[[Callable[[socket.socket], object]], Raw]]:
    """Start a server that answers by a function of the test."""
    with contextlib.ExitStack() as stack:

        def start(say: Callable[[socket.socket], object]) -> Raw:
            server = Raw(say)
            stack.callback(server.close)
            return server

        yield start


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\nLast-Modified: Mon, 02 Jan 2006 15:04:05 GMT\r\n"
HEAD += b'ETag: "0123456789abcdef"\r\n\r\n'


def retries(seconds: float, deadline: Deadline = NO_DEADLINE) -> Retries:
    return replace(STORAGE, total_s=seconds).start(deadline)


class TestFaults:
    def test_a_put_is_tried_until_the_server_is_well_again(self, http_server: Any, answer: Any) -> None:
        ill = answer(503)

        def recover() -> None:
            ill.status = 503 if len(http_server.received) < 3 else 200

        ill.before = recover
        http_server.url("/results/a", ill)
        local(http_server).put("results", "a", b"data", "text/plain", retries(30))
        assert http_server.received == [("/results/a", b"data")] * 3

    def test_a_read_is_tried_until_the_server_is_well_again(self, http_server: Any, answer: Any) -> None:
        ill = answer(500, b"data")

        def recover() -> None:
            ill.status = 500 if len(http_server.received) < 5 else 200

        ill.before = recover
        http_server.url("/photos/a.jpg", ill)
        assert local(http_server).read_image("photos", "a.jpg", 10, Deadline(30)) == b"data"
        assert len(http_server.received) == 5

    def test_a_server_that_stays_broken_is_given_up_with_its_own_words(
        self, http_server: Any, answer: Any
    ) -> None:
        http_server.url("/results/a", answer(503, b"<Error><Code>SlowDown</Code></Error>"))
        s3 = local(http_server)
        with pytest.raises(S3_ERRORS, match="SlowDown"):
            s3.read("results", "a", retries(3))
        assert 3 <= len(http_server.received) <= 10, "with pauses that grow"

    def test_a_failure_just_before_the_deadline_is_the_server_s(self, http_server: Any, answer: Any) -> None:
        http_server.url("/photos/a.jpg", answer(500, before=lambda: time.sleep(0.3)))
        s3 = local(http_server)
        with pytest.raises(ImageFetchFailed, match="500"):
            s3.read_image("photos", "a.jpg", 10, Deadline(1))

    @pytest.mark.parametrize("status", [400, 403, 404, 405, 501])
    def test_what_cannot_succeed_is_asked_once_by_each_library(
        self, http_server: Any, answer: Any, status: int
    ) -> None:
        http_server.url("/results/a", answer(status, b"<Error><Code>Wrong</Code></Error>"))
        with pytest.raises(S3_ERRORS, match="Wrong"):
            local(http_server).read("results", "a", retries(30))
        assert len(http_server.received) == 2

    def test_a_cancelled_job_asks_no_more_and_says_why(self, http_server: Any, answer: Any) -> None:
        deadline = Deadline(30)
        fenced = answer(500, before=lambda: deadline.cancel(AttemptFenced("overtaken")))
        http_server.url("/results/a", fenced)
        with pytest.raises(AttemptFenced, match="overtaken"):
            local(http_server).put("results", "a", b"data", "text/plain", retries(30, deadline))
        assert len(http_server.received) == 1

    def test_a_server_that_is_started_again_meanwhile_is_found(self, http_server: Any) -> None:
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        s3 = S3(Settings.model_validate({"s3_endpoint_url": f"http://127.0.0.1:{port}", **KEYS}))
        with ThreadPoolExecutor(1) as pool:
            putting = pool.submit(s3.put, "results", "a", b"data", "text/plain", retries(30))
            time.sleep(0.5)
            assert not putting.done()
            with socket.create_server(("127.0.0.1", port)) as listener:
                caller, _ = listener.accept()
                with caller:
                    caller.recv(65_536)
                    caller.sendall(
                        b'HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: "0123456789abcdef"\r\n\r\n'
                    )
                    putting.result(20)

    @pytest.mark.parametrize("answers", ["silence", "a drip", "half"])
    def test_no_server_holds_a_job_up_for_longer_than_its_deadline(self, raw: Any, answers: str) -> None:
        over = threading.Event()

        def say(caller: socket.socket) -> None:
            if answers == "half":
                caller.sendall(HEAD + b"x" * 500)
            while answers != "half" and not over.wait(0.1):
                caller.sendall(b"" if answers == "silence" else HEAD if not said else b"x")
                said.append(1)

        said: list[int] = []
        server = raw(say)
        s3 = local(server)
        begun = time.monotonic()
        with pytest.raises((JobTimeout, ImageFetchFailed)):
            s3.read_image("photos", "a.jpg", 1_000_000, Deadline(1))
        assert time.monotonic() - begun < 4
        over.set()

    def test_a_server_that_stalls_is_to_blame_before_the_job_is(
        self, silent_port: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gradcam_worker.resilience.retry.UNRESPONSIVE_S", 0.5)
        s3 = S3(Settings.model_validate({"s3_endpoint_url": f"http://127.0.0.1:{silent_port}", **KEYS}))
        with pytest.raises(ImageFetchFailed, match="no answer within"):
            s3.read_image("photos", "a.jpg", 10, Deadline(1))
        with pytest.raises(JobTimeout, match=r"photos/a\.jpg"):
            s3.read_image("photos", "a.jpg", 10, Deadline(0.2))

    def test_an_image_has_no_more_time_than_images_have(self, silent_port: int) -> None:
        where = {"s3_endpoint_url": f"http://127.0.0.1:{silent_port}", "fetch_timeout_s": 0.5}
        with pytest.raises(ImageFetchFailed, match=r"no answer within 0\.\d s"):
            S3(Settings.model_validate(where | KEYS)).read_image("photos", "a.jpg", 10, Deadline(60))

    @pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
    def test_the_worker_s_own_keys_are_no_fault_of_the_job(
        self, http_server: Any, answer: Any, code: str
    ) -> None:
        http_server.url("/photos/a.jpg", answer(403, f"<Error><Code>{code}</Code></Error>".encode()))
        with pytest.raises(StorageUnavailable, match=code):
            local(http_server).read_image("photos", "a.jpg", 10, Deadline(30))

    def test_a_bucket_is_followed_to_its_region(self, http_server: Any, answer: Any) -> None:
        elsewhere = {"x-amz-bucket-region": "eu-west-1"}
        body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>"
        away = answer(400, body, headers=elsewhere)

        def region() -> None:
            if "eu-west-1/s3" in http_server.headers[-1]["authorization"]:
                away.status, away.body = 200, b"data"

        away.before = region
        http_server.url("/photos/a.jpg", away)
        assert local(http_server).read_image("photos", "a.jpg", 10, Deadline(30)) == b"data"


def page(code: str, message: str = "No.") -> bytes:
    """What an S3 server, or STS, says where it refuses."""
    return f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


PROXY = b"<html><head><title>403 Forbidden</title></head><body><h1>Forbidden</h1></body></html>"
STS_REFUSES = b"""<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type>
<Code>%s</Code><Message>Not this time</Message></Error><RequestId>1</RequestId></ErrorResponse>"""
STS_GIVES = b"""<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><SessionToken>t</SessionToken><SecretAccessKey>s</SecretAccessKey>
<Expiration>2999-01-01T00:00:00Z</Expiration><AccessKeyId>AKIDFROMSTS</AccessKeyId></Credentials>
</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


class TestIdentity:
    """The worker's own keys, which no job is to blame for."""

    @pytest.fixture
    def token(self, http_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """A worker that gets its keys for a token, from an STS at the test's own server."""
        token = tmp_path / "token"
        token.write_text("planted-token")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/gradcam")
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://{http_server.host}")
        return token

    @pytest.fixture
    def s3(self, http_server: Any, token: Path) -> S3:
        return S3(Settings(s3_endpoint_url=f"http://{http_server.host}", output="s3://own/x"))

    def test_keys_that_sts_gives_are_used_by_both_libraries(
        self, http_server: Any, answer: Any, s3: S3, handed_over: Any
    ) -> None:
        http_server.url("/", answer(200, STS_GIVES))
        http_server.url(
            "/photos/a.jpg", answer(200, b"data", {"last-modified": "Mon, 02 Jan 2006 15:04:05 GMT"})
        )
        assert s3.read_image("photos", "a.jpg", 10, Deadline(10)) == b"data"
        assert all("AKIDFROMSTS" in one["authorization"] for one in http_server.headers[1:])

    def test_an_sts_that_gives_none_is_storage_that_is_unavailable_and_is_asked_again_later(
        self, http_server: Any, answer: Any, s3: S3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gradcam_worker.storage.credentials.RETRY_AFTER_S", 0)
        stores = Stores(Settings(output="s3://own/x", output_prefixes=("s3://given",)), s3)
        refusals = ["AccessDenied", "ExpiredTokenException", "InvalidIdentityToken", "Throttling"]
        for code, status in zip(refusals, (403, 400, 400, 503), strict=True):
            http_server.url("/", answer(status, STS_REFUSES % code.encode()))
            why = rf"no valid keys.*AssumeRoleWithWebIdentity: HTTP {status} {code} Not this time"
            with pytest.raises(StorageUnavailable, match=why):
                s3.read_image("photos", "a.jpg", 10, Deadline(10))
            for output in (None, "s3://given/y"):
                with pytest.raises(StorageUnavailable, match=why):
                    stores.open(output).put_many([("a", b"data", "text/plain")], Deadline(10))
            with pytest.raises(StorageUnavailable, match=why):
                stores.check_identity()
        assert {path for path, _ in http_server.received} == {"/"}, "S3 is not asked without keys"
        http_server.url("/", answer(200, STS_GIVES))
        http_server.url("/photos/a.jpg", answer(200, b"data"))
        assert s3.read_image("photos", "a.jpg", 10, Deadline(10)) == b"data"
        stores.check_identity()

    def test_whoever_gives_no_keys_is_not_asked_by_each_job(
        self, http_server: Any, answer: Any, s3: S3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("gradcam_worker.storage.credentials.RETRY_AFTER_S", 3600)
        http_server.url("/", answer(403, STS_REFUSES % b"AccessDenied"))
        for _ in range(3):
            with pytest.raises(StorageUnavailable, match="AccessDenied"):
                s3.read_image("photos", "a.jpg", 10, Deadline(10))
        assert len(http_server.received) == 1

    @pytest.mark.parametrize("held", ["", None, "planted\ntoken"], ids=["empty", "no file", "refused"])
    def test_a_token_that_is_none_is_the_workers_own_affair_and_is_never_shown(
        self, http_server: Any, answer: Any, s3: S3, token: Path, held: str | None
    ) -> None:
        token.unlink()
        if held is not None:
            token.write_text(held)
        http_server.url("/", answer(400, STS_REFUSES % b"InvalidIdentityToken"))
        with pytest.raises(StorageUnavailable, match="there are no valid keys for S3") as caught:
            s3.read_image("photos", "a.jpg", 10, Deadline(1))
        assert "planted" not in str(caught.value)
        store = Stores(Settings(output="s3://own/x", output_prefixes=("s3://given",)), s3).open(
            "s3://given/y"
        )
        with pytest.raises(StorageUnavailable):
            store.put_many([("a", b"data", "text/plain")], Deadline(1))

    def test_keys_that_come_later_are_found(self, s3_settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gradcam_worker.storage.credentials.RETRY_AFTER_S", 0)
        key = s3_settings.pop("s3_access_key_id")
        secret = s3_settings.pop("s3_secret_access_key").get_secret_value()
        s3 = S3(Settings(**s3_settings))
        with pytest.raises(StorageUnavailable, match="Unable to locate credentials"):
            s3.read_image("photos", "later", 10, Deadline(5))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        s3.put("photos", "later", b"data", "text/plain")
        assert s3.read_image("photos", "later", 10, Deadline(5)) == b"data"

    def test_a_page_that_is_not_the_servers_own_says_nothing_of_an_object(
        self, http_server: Any, answer: Any
    ) -> None:
        s3 = local(http_server)
        store = Stores(Settings(output="s3://own/x", output_prefixes=("s3://given",)), s3).open(
            "s3://given/y"
        )
        why = "HTTP {} from something that does not answer as S3 does"
        pages = [
            (403, b"blocked"),
            (403, b""),
            (404, PROXY),
            (407, PROXY),
            (400, PROXY),
            (302, b""),
            (403, PROXY),
        ]
        for status, body in pages:
            for path in ("/photos/a.jpg", "/given/y/a"):
                http_server.url(path, answer(status, body))
            with pytest.raises(StorageUnavailable, match=why.format(status)):
                s3.read_image("photos", "a.jpg", 10, Deadline(5))
            with pytest.raises(StorageUnavailable, match=why.format(status)):
                store.find("a", Deadline(5))
        with pytest.raises(StorageUnavailable, match=why.format(403)):
            store.put_many([("a", b"data", "text/plain")], Deadline(5))

    def test_a_refusal_without_a_body_but_with_the_marks_of_s3_is_one(
        self, http_server: Any, answer: Any
    ) -> None:
        http_server.url("/photos/a.jpg", answer(403, b"", {"x-amz-request-id": "1"}))
        with pytest.raises(ImageForbidden, match="403"):
            local(http_server).read_image("photos", "a.jpg", 10, Deadline(5))


class TestRefusals:
    """What an S3 server refuses for good."""

    KINDS: ClassVar[dict[tuple[int, str], type[GradcamError]]] = {
        (400, "XMinioInvalidObjectName"): UriNotAllowed,
        (400, "KeyTooLongError"): UriNotAllowed,
        (400, "InvalidURI"): UriNotAllowed,
        (400, "InvalidRequest"): ImageForbidden,  # an object that is encrypted with its owner's own key, too
        (400, "KMS.DisabledException"): ImageForbidden,
        (400, "InvalidArgument"): ImageForbidden,
        (403, "InvalidObjectState"): ImageForbidden,
        (403, "AllAccessDisabled"): ImageForbidden,
        (405, "MethodNotAllowed"): ImageForbidden,
        (403, "AccessDenied"): ImageForbidden,
        (404, "NoSuchKey"): ImageNotFound,
        (410, "Gone"): ImageNotFound,
        (503, "SlowDown"): ImageFetchFailed,
        (400, "KMS.ThrottlingException"): ImageFetchFailed,
    }

    def test_each_is_an_error_of_its_kind_and_what_is_permanent_is_so_with_the_servers_sentence(
        self, http_server: Any, answer: Any
    ) -> None:
        for (status, code), kind in self.KINDS.items():
            s3 = local(http_server, fetch_timeout_s=2 if kind is ImageFetchFailed else 10)
            http_server.url("/photos/a.jpg", answer(status, page(code, "As I say")))
            with pytest.raises(kind) as caught:
                s3.read_image("photos", "a.jpg", 10, Deadline(10))
            said = "There is no such object" if kind is ImageNotFound else f"{code} As I say"
            assert said in str(caught.value)
            assert caught.value.retryable is (kind is ImageFetchFailed)

    @pytest.mark.parametrize(
        ("said", "advice"),
        [
            (
                "User: x is not authorized to perform: kms:Decrypt on resource: arn:aws:kms:eu:1:key/k",
                "grant it kms:Decrypt, as the server says.",
            ),
            (
                "User: x is not authorized to perform: s3:GetObject with an explicit deny in a VPC policy",
                "denies it, and no grant helps against that.",
            ),
            (
                "User: x is not authorized to perform: s3:GetObject on resource: y",
                "grant it s3:GetObject there. Where it may not list the bucket",
            ),
            ("Access Denied", "grant it s3:GetObject there. Where it may not list the bucket"),
        ],
        ids=["key", "endpoint", "object", "bare"],
    )
    def test_a_denial_quotes_the_server_and_advises_what_it_names(
        self, http_server: Any, answer: Any, said: str, advice: str
    ) -> None:
        http_server.url("/photos/a.jpg", answer(403, page("AccessDenied", said)))
        with pytest.raises(ImageForbidden) as caught:
            local(http_server).read_image("photos", "a.jpg", 10, Deadline(10))
        assert said in str(caught.value)
        assert advice in str(caught.value)

    def test_what_a_server_says_is_made_fit_to_be_shown(self, http_server: Any, answer: Any) -> None:
        http_server.url("/photos/a.jpg", answer(403, page("AccessDenied", "a&#10;b \u202e" + "x" * 5000)))
        with pytest.raises(ImageForbidden) as caught:
            local(http_server).read_image("photos", "a.jpg", 10, Deadline(1))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 1000


LISTING = "<ListBucketResult>{}</ListBucketResult>"
OBJECT = "<Contents><Key>{}</Key><Size>1</Size><ETag>&quot;a&quot;</ETag></Contents>"
TOKEN = "<NextContinuationToken>{}</NextContinuationToken>"
MORE = "<IsTruncated>true</IsTruncated>"


class TestListings:
    DEVIANT: ClassVar[dict[str, str]] = {
        MORE + OBJECT.format("p/a"): "more objects, but sends no NextContinuationToken",
        "<Contents><Key>p/a</Key></Contents>": "it has no Size of 'p/a'",
        "<Contents><Key>p/a</Key><Size>many</Size></Contents>": "cannot be read",
        "<Contents><Size>1</Size></Contents>": "it has no Key of an object",
        OBJECT.format("q/a"): "does not begin with 'p/'",
        MORE + OBJECT.format("p/a") + TOKEN.format("t"): "again and again",
    }

    def test_one_that_cannot_be_gone_through_is_told(self, http_server: Any, answer: Any) -> None:
        s3 = local(http_server)
        path = "/photos?list-type=2&prefix=p%2F{}&encoding-type=url"
        for said, why in self.DEVIANT.items():
            for token in ("", "&continuation-token=t"):
                http_server.url(path.format(token), answer(200, LISTING.format(said).encode()))
            with pytest.raises(InvalidListing, match=why):
                list(s3.list_objects("photos", "p/"))
        assert len(http_server.received) == len(self.DEVIANT) + 1

    @pytest.mark.parametrize("keys", ["the same", "none"])
    def test_one_that_never_ends_though_each_token_is_another_is_given_up(self, raw: Any, keys: str) -> None:
        def say(caller: socket.socket) -> None:
            body = LISTING.format(
                MORE + TOKEN.format(server.asked) + (OBJECT.format("p/a") if keys == "the same" else "")
            ).encode()
            caller.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + body)

        server = raw(say)
        with pytest.raises(InvalidListing, match="again and again"):
            list(local(server).list_objects("photos", "p/"))
        assert server.asked < 120


class TestChecksums:
    """Buckets with Object Lock take no object without a checksum."""

    @pytest.fixture
    def locked(self, http_server: Any, answer: Any) -> Callable[[bytes], None]:
        def lock(refusal: bytes) -> None:
            guarded = answer(400, refusal)

            def look() -> None:
                sent = http_server.headers[-1]
                good = {"content-md5", "x-amz-checksum-sha256"} & sent.keys()
                guarded.status, guarded.body = (200, b"") if good else (400, refusal)
                guarded.headers = {"etag": '"0123456789abcdef"'}

            guarded.before = look
            for number in range(3):
                http_server.url(f"/own/x/{number}", guarded)

        return lock

    @pytest.mark.parametrize(
        "refusal",
        [
            page(
                "InvalidRequest",
                "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object "
                "Lock parameters",
            ),
            page("MissingContentMD5", "Missing required header for this request: Content-Md5."),
        ],
        ids=["Amazon", "MinIO"],
    )
    def test_a_bucket_that_wants_a_checksum_gets_one_from_then_on(
        self, http_server: Any, locked: Any, refusal: bytes
    ) -> None:
        locked(refusal)
        s3 = local(http_server)
        for number in range(3):
            s3.put("own", f"x/{number}", b"data", "text/plain")
        assert len(http_server.received) == 5, "it is learned once, and then obstore sends it at once"
        assert "content-md5" in http_server.headers[2]
        digest = base64.b64encode(hashlib.sha256(b"data").digest()).decode()
        assert [one["x-amz-checksum-sha256"] for one in http_server.headers[3:]] == [digest] * 2

    def test_any_other_bad_request_is_not_tried_again_with_one(self, http_server: Any, answer: Any) -> None:
        http_server.url("/own/x/0", answer(400, page("InvalidRequest", "You may not.")))
        with pytest.raises(S3_ERRORS, match="You may not"):
            local(http_server).put("own", "x/0", b"data", "text/plain", retries(5))
        assert len(http_server.received) == 2


ARN = "arn:aws:s3:us-west-2:123456789012:accesspoint:mine"
OUTPOST = "test-accessp-o0b1d075431d83bebde8xz5w8ijx1qzlbp3i3kuse10--op-s3"


class TestBuckets:
    REFUSED: ClassVar[dict[str, str]] = {
        ARN: "is an ARN, which names a host of Amazon's",
        "arn:aws:s3::123456789012:accesspoint:mfzwi23gnjvgw.mrap": "is an ARN",
        "arn:aws:s3-outposts:us-west-2:123456789012:outpost:op-01:accesspoint:mine": "is an ARN",
        OUTPOST: "is the alias of an outpost",
        "..": "is no name of a bucket",
        "a..b": "is no name of a bucket",
        "a b": "is no name of a bucket",
        "a%2fb": "is no name of a bucket",
        "evil.test#": "is no name of a bucket",
        "b" * 256: "is no name of a bucket",
        "": "is no name of a bucket",
    }

    def test_what_leads_to_another_server_than_the_one_that_is_configured_is_refused(
        self, http_server: Any
    ) -> None:
        s3 = local(http_server)
        for bucket, why in self.REFUSED.items():
            with pytest.raises(UriNotAllowed, match=why):
                s3.read_image(bucket, "a.jpg", 10, Deadline(5))
            with pytest.raises(OutputNotAllowed, match=why):
                S3Store(s3, bucket, "x", by_operator=False).put_many(
                    [("a", b"data", "text/plain")], Deadline(5)
                )
            with pytest.raises(S3_ERRORS, match=why):
                list(s3.list_objects(bucket, ""))
            with pytest.raises(WeightsUnavailable, match=why):
                s3.download(f"s3://{bucket}/a", Taken())
        assert http_server.received == []

    def test_no_request_of_boto3_leaves_for_another_host(self, http_server: Any) -> None:
        s3 = local(http_server)
        with pytest.raises(InvalidBucket, match="which is not the server that is configured"):
            s3.client.get_object(Bucket=ARN, Key="a")

    def test_an_access_point_is_a_bucket_where_amazon_is_asked(self) -> None:
        s3 = S3(Settings.model_validate(KEYS))
        assert f"://{ARN.rpartition(':')[2]}-123456789012.s3-accesspoint." in s3.presigned_url(
            ARN, "a.jpg", 60
        )
        with pytest.raises(InvalidBucket, match="is no ARN of an access point"):
            s3.presigned_url("arn:aws:sns:us-west-2:123456789012:topic", "a.jpg", 60)


class TestRegion:
    @pytest.mark.parametrize(
        ("environment", "own", "region"),
        [
            ({}, "", "us-east-1"),
            ({"AWS_REGION": "eu-west-1"}, "", "eu-west-1"),
            ({"AWS_DEFAULT_REGION": "eu-west-2"}, "", "eu-west-2"),
            ({"AWS_REGION": "eu-west-1", "AWS_DEFAULT_REGION": "eu-west-2"}, "", "eu-west-1"),
            ({"AWS_REGION": "eu-west-1"}, "eu-west-3", "eu-west-3"),
        ],
    )
    def test_the_setting_goes_before_the_environment_for_both_libraries(
        self, environment: dict[str, str], own: str, region: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        s3 = S3(Settings.model_validate({"s3_region": own, **KEYS}))
        assert s3.client.meta.region_name == region
        assert s3._obstore_bucket("photos").config["region"] == region
        assert f"/{region}/s3/" in s3.presigned_url("photos", "a", 60).replace("%2F", "/")


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
        taken = Taken()
        S3(Settings()).download("s3://results/a/b.keras", taken)
        assert taken.getvalue() == data
        assert taken.expected == len(data)

    @pytest.mark.parametrize(
        ("uri", "why"),
        [
            ("s3://results/none.keras", "There is no such object: s3://results/none.keras"),
            ("s3://none/a.keras", "There is no such bucket: s3://none/a.keras"),
            ("s3://N O/a.keras", "'N O' is no name of a bucket"),
        ],
    )
    def test_an_object_that_is_not_there_is_weights_that_are_unavailable(
        self, uri: str, why: str, bucket: Any
    ) -> None:
        with pytest.raises(WeightsUnavailable, match=why):
            S3(Settings()).download(uri, Taken())

    def test_a_download_from_a_server_out_of_reach_may_be_tried_again(self) -> None:
        s3 = S3(Settings.model_validate({"s3_endpoint_url": "http://127.0.0.1:1", **KEYS}))
        with pytest.raises(WeightsUnavailable, match=r"s3://models/a\.keras could not be read") as refused:
            s3.download("s3://models/a.keras", Taken())
        assert refused.value.retryable


class TestActivity:
    """What counts as an answer of the server, and what as its silence."""

    def test_a_refusal_a_missing_or_a_large_object_is_an_answer(self, http_server: Any, answer: Any) -> None:
        s3 = local(http_server)
        dated = {
            "last-modified": "Mon, 02 Jan 2006 15:04:05 GMT",
            "etag": '"0123456789abcdef"',
        }
        http_server.url("/photos/large.jpg", answer(200, b"x" * 20, dated))
        http_server.url("/photos/denied.jpg", answer(403, page("AccessDenied")))
        http_server.url("/photos/none.jpg", answer(404, page("NoSuchKey")))
        for name in ("large", "denied", "none"):
            with pytest.raises(GradcamError):
                s3.read_image("photos", f"{name}.jpg", 10, Deadline(5))
            assert (s3.reads.silent_s, s3.reads.has_failed) == (0, False), name

    def test_an_outage_is_told_once_not_with_each_call(
        self, free_port: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        s3 = S3(Settings(s3_endpoint_url=f"http://127.0.0.1:{free_port}", **KEYS))
        for name in ("a", "b", "c"):
            with caplog.at_level("INFO", "gradcam"), pytest.raises(S3_ERRORS):
                s3.put("own", name, b"data", "text/plain", retries(0.6))
        assert [line.partition(" ")[0] for line in caplog.messages] == ["obstore_failed"]

    def test_a_server_that_fails_or_knows_no_keys_is_silent(self, http_server: Any, answer: Any) -> None:
        s3 = local(http_server)
        for status, code in ((503, "SlowDown"), (403, "InvalidAccessKeyId")):
            http_server.url("/own/a", answer(status, page(code)))
            with pytest.raises(S3_ERRORS):
                s3.put("own", "a", b"data", "text/plain", retries(0.2))
            assert s3.writes.has_failed, code
            assert s3.reads.silent_s == 0
            http_server.url("/own/a", answer(200, b"", {"etag": '"0123456789abcdef"'}))
            s3.put("own", "a", b"data", "text/plain", retries(5))
            assert (s3.writes.silent_s, s3.writes.has_failed) == (0, False)
