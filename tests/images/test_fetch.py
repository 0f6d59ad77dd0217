import base64
import contextlib
import gzip
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import pytest

from gradcam_worker.errors import (
    ChecksumMismatch,
    GradcamError,
    ImageDecodeFailed,
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    JobCanceled,
    JobTimeout,
    UriNotAllowed,
)
from gradcam_worker.images.fetch import UriFetcher, open_below, redact_uri
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3

DATA = b"not decoded here"
LOCAL = ("127.0.0.0/8",)  # of the servers of these tests


def fetch(
    uri: str, seconds: float = 10, sha256: str | None = None, *, redirects: bool = True, **settings: Any
) -> bytes:
    chosen, image = Settings(**settings), ImageRef(uri=uri, sha256=sha256, redirects=redirects)
    return fetcher(chosen, uri).fetch(image, Deadline(seconds)).data


def fetcher(settings: Settings, uri: str) -> UriFetcher:
    """One that has a client of S3 where the URI needs one."""
    return UriFetcher(settings, S3(settings) if uri.startswith("s3:") else cast("S3", None))


@pytest.fixture(autouse=True)
def no_keys_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")


class TestSchemes:
    @pytest.mark.parametrize(
        "uri", ["http://a/b", "https://a/b", "file:///etc/passwd", "data:,x", "ftp://a", "xy:z"]
    )
    def test_only_s3_is_allowed_by_default(self, uri: str) -> None:
        with pytest.raises(UriNotAllowed, match=r"its scheme must be s3 \(GRADCAM_IMAGE_SCHEMES\)"):
            fetch(uri)

    @pytest.mark.parametrize("scheme", ["s3", "http", "file"])
    def test_a_uri_that_is_too_long_is_refused_with_its_length_and_not_requested(self, scheme: str) -> None:
        image = ImageRef.model_construct(uri=f"{scheme}://in/{'x' * 66_000}", sha256=None)
        chosen = Settings(image_schemes=(scheme,), image_hosts=("in",), image_roots=("/in",))
        with pytest.raises(UriNotAllowed, match=r"its URI has 66,0\d\d bytes; at most 8,192") as caught:
            fetcher(chosen, image.uri).fetch(image, Deadline(10))
        assert len(str(caught.value)) < 400

    def test_a_checksum_that_differs_names_both(self) -> None:
        expected = "0" * 64
        with pytest.raises(
            ChecksumMismatch, match=f"has sha256 {hashlib.sha256(b'x').hexdigest()}.*{expected}"
        ):
            fetch("data:,x", sha256=expected, image_schemes=("data",))

    def test_an_image_with_the_right_checksum_is_read(self) -> None:
        sha256 = hashlib.sha256(b"x").hexdigest()
        assert fetch("data:,x", sha256=sha256, image_schemes=("data",)) == b"x"

    @pytest.mark.parametrize(
        ("uri", "shown"),
        [
            ("https://user:planted@host/a.jpg?X-Amz-Signature=planted", "https://host/a.jpg"),
            ("data:image/png;base64,cGxhbnRlZA==", "data:image/png;base64,..."),
            ("s3://bucket/what?is#this", "s3://bucket/what?is#this"),
        ],
    )
    def test_a_redacted_uri_holds_no_secret(self, uri: str, shown: str) -> None:
        assert redact_uri(uri) == shown


class TestData:
    def test_base64_and_percent_encoding_are_read(self) -> None:
        encoded = base64.b64encode(DATA).decode()
        assert fetch(f"data:image/jpeg;base64,{encoded}", image_schemes=("data",)) == DATA
        assert fetch("data:,a%20b", image_schemes=("data",)) == b"a b"

    @pytest.mark.parametrize("uri", ["data:image/png;base64,!!!", "data:image/png", "data:;base64,abc"])
    def test_broken_data_is_a_broken_image(self, uri: str) -> None:
        with pytest.raises(ImageDecodeFailed):
            fetch(uri, image_schemes=("data",))

    def test_long_data_is_refused_with_the_limit(self) -> None:
        with pytest.raises(ImageTooLarge, match="at most 100 are allowed"):
            fetch("data:," + "x" * 200, image_schemes=("data",), max_data_uri_bytes=100)


class TestFiles:
    def test_a_file_below_a_root_is_read_even_with_special_characters_in_its_name(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "a b%?#ü.jpg"
        path.write_bytes(DATA)
        assert fetch(path.as_uri(), image_schemes=("file",), image_roots=(str(tmp_path),)) == DATA

    @pytest.mark.parametrize(
        "make",
        [
            lambda root: "file:///etc/passwd",
            lambda root: f"file://{root}/../outside.jpg",
            lambda root: f"file://{root}/%2e%2e/outside.jpg",
            lambda root: f"file://{root}/link.jpg",
            lambda root: f"file://elsewhere{root}/in.jpg",
            lambda root: f"file://{root}/%00",
            lambda root: f"file://{root}x/in.jpg",
        ],
    )
    def test_nothing_leads_out_of_the_roots(self, tmp_path: Path, make: Callable[[Path], str]) -> None:
        (tmp_path / "outside.jpg").write_bytes(DATA)
        root = tmp_path / "root"
        root.mkdir()
        (root / "in.jpg").write_bytes(DATA)
        (root / "link.jpg").symlink_to(tmp_path / "outside.jpg")
        with pytest.raises(UriNotAllowed):
            fetch(make(root), image_schemes=("file",), image_roots=(str(root),))

    def test_a_missing_file_a_folder_and_a_pipe_are_not_found(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for name in ("missing.jpg", "", "pipe"):
            with pytest.raises(ImageNotFound):
                fetch((tmp_path / name).as_uri(), image_schemes=("file",), image_roots=(str(tmp_path),))

    def test_a_link_within_the_roots_is_followed_and_names_may_repeat(self, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "a"
        folder.mkdir(parents=True)
        (folder / "a").write_bytes(DATA)
        (tmp_path / "link").symlink_to(folder)
        uri = (tmp_path / "link" / "a").as_uri()
        assert fetch(uri, image_schemes=("file",), image_roots=("/nowhere", str(tmp_path))) == DATA

    def test_links_in_a_circle_are_refused_as_a_path_and_as_a_root(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        (tmp_path / "in.jpg").write_bytes(DATA)
        for name in ("a", "a/in.jpg"):
            with pytest.raises((UriNotAllowed, ImageNotFound)):
                fetch((tmp_path / name).as_uri(), image_schemes=("file",), image_roots=(str(tmp_path),))
        uri = (tmp_path / "in.jpg").as_uri()
        with pytest.raises(UriNotAllowed):
            fetch(uri, image_schemes=("file",), image_roots=(str(tmp_path / "a"),))

    @pytest.mark.parametrize("uri", ["cat.jpg", "/photos/cat.jpg", "C:\\cat.jpg", "//host/cat.jpg", "cat"])
    def test_a_uri_without_a_scheme_is_refused_with_examples_of_valid_ones(self, uri: str) -> None:
        with pytest.raises(UriNotAllowed, match=r"has no scheme: write s3://bucket/key, https://host/path"):
            fetch(uri)

    def test_a_uri_without_a_scheme_is_refused_without_showing_its_password(self) -> None:
        with pytest.raises(UriNotAllowed, match=r"'//host/cat.jpg' has no scheme"):
            fetch("//user:planted@host/cat.jpg?token=planted")

    def test_a_link_or_a_pipe_put_in_place_after_the_check_is_not_opened(self, tmp_path: Path) -> None:
        root, outside = (tmp_path / "root").resolve(), tmp_path / "outside"
        for folder in (root / "real", outside):
            folder.mkdir(parents=True)
            (folder / "a.jpg").write_bytes(DATA)
        (root / "folder").symlink_to(outside)
        (root / "file").symlink_to(outside / "a.jpg")
        os.mkfifo(root / "pipe")
        (root / "socket").symlink_to("/dev/zero")
        for name in ("folder/a.jpg", "file", "pipe", "socket", "real", "", "../outside/a.jpg"):
            with pytest.raises((OSError, ValueError)):
                open_below(root, root / name)
        with open_below(root, root / "real" / "a.jpg") as file:
            assert file.read() == DATA

    def test_a_socket_and_a_device_are_not_found(self, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            with pytest.raises(ImageNotFound):
                fetch((tmp_path / "s").as_uri(), image_schemes=("file",), image_roots=(str(tmp_path),))
        with pytest.raises(ImageNotFound):
            fetch("file:///dev/zero", image_schemes=("file",), image_roots=("/dev",))

    def test_a_large_file_is_refused_with_the_limit(self, tmp_path: Path) -> None:
        (tmp_path / "large").write_bytes(b"x" * 101)
        with pytest.raises(ImageTooLarge, match="more than 100 bytes"):
            fetch(
                (tmp_path / "large").as_uri(),
                image_schemes=("file",),
                image_roots=(str(tmp_path),),
                max_image_bytes=100,
            )


class TestHttp:
    def get(self, server: Any, uri: str, seconds: float = 10, **settings: Any) -> bytes:
        return fetch(
            uri,
            seconds,
            image_schemes=("http",),
            image_hosts=(server.host,),
            private_networks=LOCAL,
            **settings,
        )

    def test_an_image_on_an_allowed_host_is_read(self, http_server: Any, answer: Any) -> None:
        assert self.get(http_server, http_server.url("/a.jpg?size=1", answer(200, DATA))) == DATA

    @pytest.mark.parametrize(
        ("status", "error"),
        [
            (404, ImageNotFound),
            (410, ImageNotFound),
            (403, ImageForbidden),
            (401, ImageForbidden),
            (500, ImageFetchFailed),
            (503, ImageFetchFailed),
            (204, ImageFetchFailed),
        ],
    )
    def test_each_http_status_has_its_own_error(
        self, http_server: Any, answer: Any, status: int, error: type[GradcamError]
    ) -> None:
        with pytest.raises(error, match=str(status)):
            self.get(http_server, http_server.url("/x", answer(status)))

    @pytest.mark.parametrize(
        "uri",
        [
            "http://elsewhere.test/a.jpg",
            "http://127.0.0.1/a.jpg",  # the port belongs to the host
            "http://{host}@elsewhere.test/a.jpg",
            "http://user:pass@{host}/a.jpg",
            "http:///a.jpg",
            "https://{host}/a.jpg",  # a scheme that is not allowed
            "http://[broken/a.jpg",
        ],
    )
    def test_a_host_that_is_not_allowed_is_not_contacted(self, http_server: Any, uri: str) -> None:
        with pytest.raises(UriNotAllowed):
            self.get(http_server, uri.format(host=http_server.host))
        assert not http_server.received

    def test_a_redirect_to_a_host_that_is_not_allowed_is_refused(self, http_server: Any, answer: Any) -> None:
        away = http_server.url("/away", answer(302, headers={"location": "http://169.254.169.254/latest"}))
        with pytest.raises(UriNotAllowed, match=r"169\.254\.169\.254"):
            self.get(http_server, away)

    def test_a_redirect_within_the_host_is_followed(self, http_server: Any, answer: Any) -> None:
        http_server.url("/there", answer(200, DATA))
        assert (
            self.get(http_server, http_server.url("/here", answer(301, headers={"location": "/there"})))
            == DATA
        )

    def test_a_job_may_refuse_redirects_also_those_within_the_host(
        self, http_server: Any, answer: Any
    ) -> None:
        there = http_server.url("/there", answer(200, DATA))
        here = http_server.url("/here", answer(302, headers={"location": "/there"}))
        assert self.get(http_server, there, redirects=False) == DATA
        with pytest.raises(UriNotAllowed, match="redirects, which is not allowed"):
            self.get(http_server, here, redirects=False)

    def test_redirects_in_a_circle_end(self, http_server: Any, answer: Any) -> None:
        circle = http_server.url("/circle", answer(302, headers={"location": "/circle"}))
        with pytest.raises(ImageFetchFailed, match="redirects more than 3 times"):
            self.get(http_server, circle)

    def test_a_large_body_is_refused_while_it_is_read(self, http_server: Any, answer: Any) -> None:
        with pytest.raises(ImageTooLarge, match="more than 1,000 bytes"):
            self.get(http_server, http_server.url("/big", answer(200, b"x" * 5000)), max_image_bytes=1000)

    def test_the_request_to_a_slow_server_times_out(self, http_server: Any, answer: Any) -> None:
        slow = http_server.url("/slow", answer(200, DATA, before=lambda: time.sleep(1)))
        with pytest.raises(ImageFetchFailed, match="timed out"):
            self.get(http_server, slow, fetch_timeout_s=0.2)

    def test_reading_stops_when_the_job_is_out_of_time(self, http_server: Any, answer: Any) -> None:
        with pytest.raises(JobTimeout):
            self.get(
                http_server, http_server.url("/a", answer(200, DATA, before=lambda: time.sleep(0.3))), 0.2
            )

    def test_a_cancelled_job_does_not_wait_for_its_image(self, silent_port: int) -> None:
        deadline, host = Deadline(300), f"127.0.0.1:{silent_port}"
        image = ImageRef(uri=f"http://{host}/a.png")
        chosen = Settings(
            image_schemes=("http",), image_hosts=(host,), private_networks=LOCAL, fetch_timeout_s=300
        )
        threading.Timer(0.2, deadline.cancel, [JobCanceled("Enough.")]).start()
        begun = time.monotonic()
        with pytest.raises(JobCanceled):
            fetcher(chosen, image.uri).fetch(image, deadline)
        assert time.monotonic() - begun < 60

    def test_an_unreachable_host_is_a_retryable_error(self) -> None:
        with pytest.raises(ImageFetchFailed, match="Connection refused"):
            fetch(
                "http://127.0.0.1:1/a",
                image_schemes=("http",),
                image_hosts=("127.0.0.1:1",),
                private_networks=LOCAL,
            )


class TestS3:
    @pytest.fixture
    def get(self, s3_settings: Any) -> Any:
        """Fetch from the real S3 server."""
        return partial(fetch, **s3_settings)

    @pytest.fixture
    def put(self, s3_settings: Any) -> Any:
        """Write to the bucket `photos`."""
        return partial(S3(Settings(**s3_settings)).put, "photos", media_type="image/jpeg")

    @pytest.mark.parametrize("key", ["a b/ü?#.jpg", "a%20b+c.jpg", "a\\b.jpg", "😀", "a&b=c;d,e'f(g)!*.jpg"])
    def test_an_object_is_read_whatever_its_key(self, get: Any, put: Any, key: str) -> None:
        put(key, DATA)
        assert get(f"s3://photos/{key}") == DATA

    @pytest.mark.parametrize(
        ("uri", "what"), [("s3://photos/none.jpg", "object"), ("s3://none/a.jpg", "bucket")]
    )
    def test_a_missing_object_and_a_missing_bucket_are_not_found(self, get: Any, uri: str, what: str) -> None:
        with pytest.raises(ImageNotFound, match=f"no such {what}: {uri}"):
            get(uri)

    @pytest.mark.parametrize("uri", ["s3://photos", "s3://photos/", "s3:///a.jpg", "s3:photos/a.jpg"])
    def test_a_malformed_s3_uri_is_refused(self, get: Any, uri: str) -> None:
        with pytest.raises(UriNotAllowed, match="write s3://bucket/key"):
            get(uri)

    def test_a_bucket_off_the_list_is_refused(self) -> None:
        with pytest.raises(
            UriNotAllowed,
            match=r"Bucket \'photos\' is not allowed: images may come from others \(GRADCAM_IMAGE_BUCKETS\)",
        ):
            fetch("s3://photos/a.jpg", image_buckets=("others",))

    def test_a_large_object_is_refused_before_it_is_read(self, get: Any, put: Any) -> None:
        put("big", b"x" * 101)
        with pytest.raises(ImageTooLarge, match="s3://photos/big has more than 100 bytes"):
            get("s3://photos/big", max_image_bytes=100)

    def test_a_large_object_of_unknown_size_is_refused_while_it_is_read(
        self, http_server: Any, answer: Any
    ) -> None:
        chunked = b"".join(b"32\r\n%b\r\n" % (b"x" * 50) for _ in range(3)) + b"0\r\n\r\n"
        http_server.url("/photos/big", answer(200, chunked, headers={"transfer-encoding": "chunked"}))
        with pytest.raises(ImageTooLarge, match="s3://photos/big has more than 100 bytes"):
            fetch(
                "s3://photos/big",
                max_image_bytes=100,
                s3_endpoint_url=f"http://{http_server.host}",
                s3_access_key_id="a",
                s3_secret_access_key="b",
            )

    def test_an_unreachable_s3_server_is_a_retryable_error(self) -> None:
        with pytest.raises(ImageFetchFailed, match="could not be read"):
            fetch("s3://photos/a.jpg", seconds=2, s3_endpoint_url="http://127.0.0.1:1")

    def test_an_s3_server_that_denies_access_is_an_image_forbidden_error(
        self, http_server: Any, answer: Any
    ) -> None:
        http_server.url("/photos/a.jpg", answer(403, b"<Error><Code>AccessDenied</Code></Error>"))
        with pytest.raises(ImageForbidden, match=r"AccessDenied.*grant it s3:GetObject"):
            fetch("s3://photos/a.jpg", s3_endpoint_url=f"http://{http_server.host}")


class SlowServer:
    """A server that sends `first`, and then `repeated` again and again for 20 s."""

    def __init__(self, first: bytes, repeated: bytes, pause_s: float = 0.05) -> None:
        self._first, self._repeated, self._pause_s = first, repeated, pause_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(self._first)
            end = time.monotonic() + 20
            while time.monotonic() < end:
                connection.sendall(self._repeated)
                time.sleep(self._pause_s)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._thread.join()


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("first", "repeated"),
    [
        (HEAD, b"x"),  # headers, byte by byte
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1;", b"x"),  # an endless chunk extension
        (HEAD + b"content-length: 1000000\r\n\r\n", b"x"),
        (HEAD + b"\r\n", b"x"),  # a truncated body that ends with the connection must not look complete
    ],
)
def test_a_server_that_sends_its_response_slowly_times_out(first: bytes, repeated: bytes) -> None:
    begun = time.monotonic()
    with SlowServer(first, repeated) as server:
        with pytest.raises(ImageFetchFailed, match=r"timed out after 0\.5 s"):
            fetch(
                f"http://{server.host}/",
                image_schemes=("http",),
                image_hosts=(server.host,),
                private_networks=LOCAL,
                fetch_timeout_s=0.5,
            )
        assert time.monotonic() - begun < 15, "the server sends for 20 s"


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "br"])
def test_a_compressed_body_is_refused(http_server: Any, answer: Any, encoding: str) -> None:
    bomb = gzip.compress(gzip.compress(bytes(50_000_000)))
    url = http_server.url("/bomb", answer(200, bomb, headers={"content-encoding": encoding}))
    with pytest.raises(ImageFetchFailed, match="its body is encoded"):
        fetch(url, image_schemes=("http",), image_hosts=(http_server.host,), private_networks=LOCAL)


@pytest.mark.parametrize("host", ["xn--a", "exa\u0000mple", "*.test"])
def test_an_invalid_host_name_is_refused(host: str) -> None:
    with pytest.raises(UriNotAllowed):
        fetch(f"http://{host}/a.jpg", image_schemes=("http",), image_hosts=("example.test",))


def test_an_impossible_bucket_name_is_refused_and_not_retried() -> None:
    with pytest.raises(UriNotAllowed, match="is not the name of an object"):
        fetch("s3://not a bucket/a.jpg")
