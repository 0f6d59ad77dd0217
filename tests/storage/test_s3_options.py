"""What the settings make each request tell S3, against moto's checks and as a server receives it."""

import contextlib
import io
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import moto
import pytest
from moto.moto_proxy.proxy3 import MotoRequestHandler
from werkzeug.exceptions import HTTPException

from gradcam_worker.errors import InvalidSettings, StorageUnavailable
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores

KEYS = {"s3_access_key_id": "testing", "s3_secret_access_key": "testing"}
BY_OBSTORE, BY_BOTO3 = "a/b.txt", "a//b.txt"  # obstore would change the second one
ALL = {
    "s3_checksum": "sha256",
    "s3_sse": "aws:kms",
    "s3_sse_kms_key_id": "alias/results",
    "s3_storage_class": "STANDARD_IA",
    "s3_tags": ("team=vision", "cost centre=a+b/4=2"),
    "s3_request_payer": "requester",
}


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """Moto's S3 over HTTP: its own server needs Flask, and obstore is not patched as boto3 is."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            asked = (self.command, "http://s3.amazonaws.com", self.path, self.headers, body)
            try:
                status, headers, answer = moto_s3.parse_request(*asked)
            except HTTPException as error:  # as werkzeug does for moto
                status, headers, answer = error.code, dict(error.get_headers()), error.get_body()
            answer = answer.encode() if isinstance(answer, str) else answer
            size = headers.get("content-length", 0) if self.command == "HEAD" else len(answer)
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() != "content-length":
                    self.send_header(name, str(value))
            self.send_header("content-length", str(size))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        do_PUT = do_HEAD = do_GET  # noqa: N815  # the names are the library's

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with moto.mock_aws(), ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        moto_s3 = MotoRequestHandler(server.server_port)
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def moto_url() -> Iterator[str]:
    with moto_server() as url:
        yield url


def client(url: str, **options: Any) -> S3:
    return S3(Settings.model_validate({"s3_endpoint_url": url, **KEYS, **options}))


def test_both_libraries_write_what_the_settings_say(moto_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="gradcam")
    owner = boto3.client(
        "s3",
        endpoint_url=moto_url,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    owner.create_bucket(Bucket="results", ObjectLockEnabledForBucket=True)
    s3 = client(moto_url, **ALL)
    for key in (BY_OBSTORE, BY_BOTO3):
        s3.put("results", key, b"data", "text/plain")
        head = owner.head_object(Bucket="results", Key=key)
        found = [
            head[name] for name in ("ServerSideEncryption", "SSEKMSKeyId", "StorageClass", "ContentType")
        ]
        assert found == ["aws:kms", "alias/results", "STANDARD_IA", "text/plain"]
        tags = owner.get_object_tagging(Bucket="results", Key=key)["TagSet"]
        assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "vision", "cost centre": "a+b/4=2"}
        assert s3.read_image("results", key, 10, Deadline(10)) == b"data"
    handed_over = [one.getMessage() for one in caplog.records]
    assert len(handed_over) == 2, "one write and one read"
    assert all(BY_BOTO3 in one for one in handed_over)
    assert {one.key for one in s3.list_objects("results", "a/")} == {BY_OBSTORE, BY_BOTO3}
    with pytest.raises(StorageUnavailable, match="InvalidStorageClass The storage class you specified"):
        Stores(Settings(output="s3://results"), client(moto_url, s3_storage_class="NO_SUCH")).open().put(
            "a", b"data", "text/plain"
        )


def test_each_request_carries_what_it_needs_and_without_settings_nothing(
    http_server: Any, answer: Any
) -> None:
    for key in (BY_OBSTORE, BY_BOTO3):
        http_server.url(f"/own/{key}", answer(200, b"", {"etag": '"0123456789abcdef"'}))
    listing = b"<ListBucketResult></ListBucketResult>"
    http_server.url("/own?list-type=2&prefix=&encoding-type=url", answer(200, listing))
    for options in (ALL, {}):
        s3, begun = client(f"http://{http_server.host}", **options), len(http_server.headers)
        for key in (BY_OBSTORE, BY_BOTO3):
            s3.put("own", key, b"data", "text/plain")
            s3.read_image("own", key, 10, Deadline(5))
            s3.read_part("own", key, 0, 2)
        s3.download(f"s3://own/{BY_OBSTORE}", Sink())
        list(s3.list_objects("own", ""))
        sent = http_server.headers[begun:]
        # Obstore's own read is refused by this server's answer without a date: boto3 repeats it.
        assert len(sent) >= 8
        payers = {one.get("x-amz-request-payer") for one in sent}
        assert payers == ({"requester"} if options else {None})
        written = [one for one in sent if one.get("content-type", "").startswith("text/plain")]
        checksums = {one.get("x-amz-checksum-sha256") for one in written}
        assert checksums == ({"Om6weQ85rIfJTzhWst0sXREOaBFgImGpqSPTuyOtyLc="} if options else {None})
        encryption = {one.get("x-amz-server-side-encryption") for one in written}
        assert encryption == ({"aws:kms"} if options else {None})


class Sink(io.BytesIO):
    """See `gradcam_worker.gradcam.files.weights.Sink`."""

    def expect(self, size: int | None) -> None:
        """Any size will do."""


def test_a_signed_url_names_the_payer_and_needs_no_header_of_a_browser() -> None:
    s3 = client("http://127.0.0.1:1", **ALL)
    urls = {
        s3.presigned_url("own", "a", 60): "host",
        s3.presigned_upload("own", "a", "image/png", 4, 60): "content-length;content-type;host",
    }
    for url, headers in urls.items():
        query = parse_qs(urlsplit(url).query)
        assert (query["x-amz-request-payer"], query["X-Amz-SignedHeaders"]) == (["requester"], [headers])


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("CHECKSUM", "md5", "'md5' was received: it should be 'auto' or 'sha256'"),
        ("SSE", "aes", "'aes' was received"),
        ("SSE_KMS_KEY_ID", "alias/a", "it needs GRADCAM_S3_SSE=aws:kms, or aws:kms:dsse"),
        ("REQUEST_PAYER", "me", "'me' was received"),
        ("STORAGE_CLASS", "standard", "'standard' must look like STANDARD_IA"),
        ("STORAGE_CLASS", "DEEP_ARCHIVE", "cannot be read back at once, as a worker must"),
        ("TAGS", "team", "'team' must look like team=vision,cost-centre=42"),
        ("TAGS", "a=1,a=2", "with 10 names at most, each once"),
        ("TAGS", ",".join(f"a{number}=" for number in range(11)), "with 10 names at most"),
        ("TAGS", "a=*", "'a=*' must look like"),
    ],
)
def test_an_impossible_setting_is_refused_with_what_would_be_right(name: str, value: str, why: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({f"GRADCAM_S3_{name}": value})
    assert why in str(caught.value)
    assert str(caught.value).startswith(f"GRADCAM_S3_{name}: ")
