import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import polars as pl
import pytest
from pydantic import SecretStr

from gradcam_worker.operations.progress_bar import polars_expression
from gradcam_worker.settings import Settings

FILE = BytesIO()
pl.DataFrame({"row": [0, 1]}).write_parquet(FILE)
LISTED = f"""<?xml version="1.0"?><ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated><Contents>
<Key>a/data/part-0.parquet</Key><LastModified>2031-05-06T07:08:09.000Z</LastModified><ETag>"e"</ETag>
<Size>{len(FILE.getvalue())}</Size></Contents></ListBucketResult>"""


@pytest.fixture
def s3() -> Iterator[str]:
    """An S3 server with one file and one key. The server of other tests does not support ranges."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            signed = "Credential=planted-id/" in self.headers.get("authorization", "")
            body, status = (LISTED.encode(), 200) if "list-type" in self.path else (FILE.getvalue(), 206)
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
            first, last = map(int, span.groups()) if span else (0, len(body) - 1)
            self.send_response(status if signed else 403)
            if status == 206:
                self.send_header("content-range", f"bytes {first}-{last}/{len(body)}")
            self.send_header("last-modified", "Tue, 06 May 2031 07:08:09 GMT")
            self.send_header("etag", '"e"')
            self.send_header("content-length", str(last + 1 - first))
            self.end_headers()
            self.wfile.write(body[first : last + 1])

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_printed_expression_opens_a_dataset_and_contains_no_key(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADCAM_S3_ACCESS_KEY_ID", "planted-id")
    monkeypatch.setenv("GRADCAM_S3_SECRET_ACCESS_KEY", "planted-key")
    settings = Settings(
        s3_endpoint_url=s3,
        s3_region="eu-west-1",
        s3_access_key_id="planted-id",
        s3_secret_access_key=SecretStr("planted-key"),
    )
    line = polars_expression("s3://b/a", settings)
    assert "planted" not in line
    read = eval(line, {"polars": pl, "os": os})  # noqa: S307  # as a user who copies it does
    assert read["row"].to_list() == [0, 1]


def test_a_dataset_in_a_folder_or_in_aws_needs_no_options() -> None:
    assert polars_expression("file:///tmp/a", Settings()) == 'polars.read_parquet("/tmp/a/data/*.parquet")'
    assert polars_expression("s3://b/a", Settings()) == 'polars.read_parquet("s3://b/a/data/*.parquet")'
