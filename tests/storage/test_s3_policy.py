"""`deploy/s3/policy.json` against what a full run really calls."""

import contextlib
import fnmatch
import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import cv2
import numpy as np
import pytest

from gradcam_worker.errors import ImageForbidden, StorageUnavailable
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.images.fetch import UriFetcher
from gradcam_worker.operations import doctor
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores
from gradcam_worker.testing import fake_services

POLICY = Path(__file__).parents[2] / "deploy" / "s3" / "policy.json"
PLACES = {
    "IMAGES-BUCKET": "photos",
    "NETWORKS-BUCKET": "networks",
    "RESULTS-BUCKET": "results",
    "PREFIX": "cams",
}
ACTIONS = {"GET": "s3:GetObject", "HEAD": "s3:GetObject", "PUT": "s3:PutObject"}
ARTIFACTS = [{"kind": kind} for kind in ("overlay", "heatmap", "grid", "animation", "report")]
Answer = tuple[int, dict[str, str], bytes]
FORBIDDEN: Answer = (403, {}, b"<Error><Code>AccessDenied</Code></Error>")
Right = tuple[str, str]  # an action and a pattern of resources


def rights() -> set[Right]:
    """What the policy allows, with this test's buckets in it."""
    text = POLICY.read_text()
    for placeholder, place in PLACES.items():
        text = text.replace(placeholder, place)
    found = set()
    for statement in json.loads(text)["Statement"]:
        assert set(statement) == {"Sid", "Effect", "Action", "Resource"}
        assert statement["Effect"] == "Allow"
        named = [
            one if isinstance(one, list) else [one] for one in (statement["Action"], statement["Resource"])
        ]
        found |= {(action, resource) for action in named[0] for resource in named[1]}
    return found


@dataclass
class Guard:
    """Stands before an S3 server, lets through what the policy allows, and remembers by which right."""

    host: str
    rights: set[Right]
    used: set[Right] = field(default_factory=set)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def allows(self, method: str, target: str) -> bool:
        parts = urlsplit(target)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        # Anything with a query is another action than that of its method: listing, tagging, multipart.
        action = ACTIONS.get(method) if key and not parts.query else None
        name = f"arn:aws:s3:::{bucket}/{key}"
        by = {one for one in self.rights if one[0] == action and fnmatch.fnmatchcase(name, one[1])}
        self.used |= by
        if not by:
            self.refused.append((method, target))
        return bool(by)


@contextmanager
def guarded(upstream: int) -> Iterator[Guard]:
    """Refuse as S3 does: a missing object, too, is forbidden to who may not list its bucket."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            found = self.ask(body) if gate.allows(self.command, self.path) else FORBIDDEN
            status, headers, answer = found if found[0] != 404 else FORBIDDEN
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in {
                    "content-length",
                    "transfer-encoding",
                    "connection",
                    "date",
                    "server",
                }:
                    self.send_header(name, value)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        def ask(self, body: bytes) -> Answer:
            connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=20)
            # As it was signed, with the host it was sent to; what is expected has been answered here.
            headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            try:
                return answer.status, dict(answer.getheaders()), answer.read()
            finally:
                connection.close()

        do_PUT = do_POST = do_HEAD = do_DELETE = do_GET  # noqa: N815  # the names are the library's

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        gate = Guard(f"127.0.0.1:{listener.server_port}", rights())
        threading.Thread(target=listener.serve_forever, args=[0.05], daemon=True).start()
        yield gate
        listener.shutdown()


@pytest.fixture
def guard(s3_server: Any) -> Iterator[Guard]:
    with guarded(s3_server.port) as guard:
        yield guard


@pytest.fixture
def settings(s3_settings: Any, guard: Guard) -> Settings:
    where = {"s3_endpoint_url": f"http://{guard.host}", "output": "s3://results/cams"}
    return Settings(**{**s3_settings, **where}, max_image_bytes=1_000_000)


@pytest.fixture
def owner(s3_settings: Any) -> S3:
    """Whoever may do anything."""
    s3 = S3(Settings(**s3_settings))
    with contextlib.suppress(s3.client.exceptions.BucketAlreadyExists):
        s3.client.create_bucket(Bucket="networks")
    photo = cv2.imencode(".png", np.zeros((32, 48, 3), np.uint8))[1].tobytes()
    for bucket, key, data in (("photos", "a b/ü.png", photo), ("networks", "own/v1.keras", b"a network")):
        s3.client.put_object(Bucket=bucket, Key=key, Body=data)
    return s3


class Sink(io.BytesIO):
    """See `gradcam_worker.gradcam.files.weights.Sink`."""

    def expect(self, size: int | None) -> None:
        """Any size will do."""


def test_a_full_run_needs_all_that_the_policy_allows_and_nothing_else(
    settings: Settings, guard: Guard, owner: S3
) -> None:
    s3 = S3(settings)
    everything = replace(fake_services({}), images=UriFetcher(settings, s3), stores=Stores(settings, s3))
    asked = {
        "image": "s3://photos/a b/ü.png",
        "network": "efficientnet_lite0",
        "target": {"top_n": 3},
        "artifacts": ARTIFACTS,
    }
    for output in (None, "s3://results/cams/team/a"):
        job = Job.parse({**asked, "output": output})
        # As by an attempt after one that came to nothing; then as by one after it was sealed.
        done = [
            run_job(job, everything, JobContext(Deadline(60), lambda _: None, attempt=attempt))
            for attempt in (2, 3)
        ]
        assert done[0] == done[1], "found again, not made again"
        bucket, _, key = done[0].result.manifest_uri.removeprefix("s3://").partition("/")
        written = Manifest.model_validate_json(owner.client.get_object(Bucket=bucket, Key=key)["Body"].read())
        kinds = {record.kind for one in written.explanations for record in one.artifacts}
        assert kinds | {record.kind for record in written.artifacts} == {one["kind"] for one in ARTIFACTS}
    taken = Sink()
    s3.download("s3://networks/own/v1.keras", taken)
    assert taken.getvalue() == b"a network"
    storage = next(one for one in doctor.run_checks(settings) if one.what == "storage")
    assert storage.well, storage.detail
    assert guard.refused == [], "the run was refused something"
    assert guard.used == guard.rights, "the policy allows more than a run needs"


def test_what_the_policy_does_not_allow_is_refused_with_a_reason(
    settings: Settings, guard: Guard, owner: S3
) -> None:
    s3 = S3(settings)
    with pytest.raises(ImageForbidden, match="grant it s3:GetObject"):
        s3.read_image("results", "cams/else/a.jpg", 10, Deadline(30))
    with pytest.raises(ImageForbidden, match="a missing object is forbidden, too"):
        s3.read_image("photos", "none.jpg", 10, Deadline(30))
    elsewhere = Stores(settings.model_copy(update={"output": "s3://photos"}), s3).open()
    with pytest.raises(StorageUnavailable, match="AccessDenied"):
        elsewhere.put("a b/ü.png", b"overwritten", "text/plain")
    for forbidden in ("list_objects_v2", "list_multipart_uploads"):
        with pytest.raises(s3.client.exceptions.ClientError, match="AccessDenied"):
            getattr(s3.client, forbidden)(Bucket="results")
    with pytest.raises(s3.client.exceptions.ClientError, match="AccessDenied"):
        s3.client.delete_object(Bucket="results", Key="cams/a")
    assert owner.client.get_object(Bucket="photos", Key="a b/ü.png")["Body"].read() != b"overwritten"


def test_every_placeholder_is_explained() -> None:
    said = (Path(__file__).parents[2] / "docs" / "how-to" / "s3-permissions.md").read_text()
    for placeholder in PLACES:
        assert placeholder in POLICY.read_text()
        assert f"`{placeholder}`" in said
