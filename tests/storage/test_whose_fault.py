"""What is the worker's own fault ends no job and no shard: real clients, a real S3 server, faults between."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pydantic import SecretStr

from devtools.faults.proxy import Fault, FaultyProxy
from gradcam_worker.errors import WorkerUnfit
from gradcam_worker.execution.handler import Disposition, JobHandler
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.images.fetch import UriFetcher
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.runtime.processes import bootstrap
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.shard import Shard
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.schemas.work import Work
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores
from gradcam_worker.testing import MemoryLedger, fake_services

IMAGE = cv2.imencode(".png", np.full((20, 20, 3), (0, 0, 255), np.uint8))[1].tobytes()
PAGE = b"<html><title>Sign in</title></html>"


def http_answer(status: int, body: bytes, content_type: str = "application/xml") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def refused(code: str, status: int = 403) -> bytes:
    return http_answer(
        status, f"<Error><Code>{code}</Code><Message>As the server says</Message></Error>".encode()
    )


S3_ANSWERS = {
    "expired": (refused("ExpiredToken", 400), "ExpiredToken As the server says"),
    "clock": (refused("RequestTimeTooSkewed"), "RequestTimeTooSkewed As the server says"),
    "unknown-key": (refused("InvalidAccessKeyId"), "InvalidAccessKeyId"),
    "signature": (refused("SignatureDoesNotMatch"), "SignatureDoesNotMatch"),
    "token": (refused("InvalidToken", 400), "InvalidToken"),
    "proxy-403": (http_answer(403, PAGE, "text/html"), "HTTP 403 from something that does not answer as S3"),
    "proxy-407": (http_answer(407, PAGE, "text/html"), "HTTP 407 from something that does not answer as S3"),
    "proxy-404": (http_answer(404, PAGE, "text/html"), "HTTP 404 from something that does not answer as S3"),
    **{
        f"login-page{name}": (
            http_answer(200, PAGE, f"text/html{headers}"),
            "HTTP 200 from something that does not answer as S3",
        )
        for name, headers in {
            "": "",
            "-of-a-file": '\r\nETag: "2d-432a5e4a73a80"\r\nLast-Modified: Mon, 02 Jan 2006 15:04:05 GMT',
            "-of-an-app": '\r\nETag: W/"d41d8cd98f00b204e9800998ecf8427e"',
        }.items()
    },
}
STS_REFUSAL = b"<ErrorResponse><Error><Code>%s</Code><Message>Not this time</Message></Error></ErrorResponse>"
SOURCES: dict[str, tuple[str, int, bytes, str]] = {
    "sts-denies": ("web", 403, STS_REFUSAL % b"AccessDenied", "AssumeRoleWithWebIdentity: HTTP 403"),
    "sts-expired": ("web", 400, STS_REFUSAL % b"ExpiredTokenException", "ExpiredTokenException Not this"),
    "sts-page": ("web", 200, PAGE, "no valid keys for S3"),
    "empty-token": ("empty web", 400, STS_REFUSAL % b"InvalidIdentityToken", "no valid keys for S3"),
    "container-fails": ("container", 500, b"", "no valid keys for S3"),
    "container-page": ("container", 200, PAGE, "no valid keys for S3"),
    "container-empty": ("container", 200, b"{}", "no valid keys for S3"),
    "machine-has-no-role": ("machine", 404, b"", "no valid keys for S3"),
}


@dataclass
class Worker:
    """A handler over a real S3 client, with three pieces of work."""

    settings: Settings

    def __post_init__(self) -> None:
        self.ledger, self.s3 = MemoryLedger(), S3(self.settings)
        stores = Stores(self.settings, self.s3)
        services = replace(fake_services({}), images=UriFetcher(self.settings, self.s3), stores=stores)
        self.breaker = CircuitBreaker(partial(bootstrap.use_storage, stores), activities=stores.activities)
        leases, me = LeaseManager(self.ledger, "w", 15), WorkerRef(id="w", device="cpu")
        self.handler = JobHandler(
            self.settings, self.ledger, services, me, leases, self.breaker, admits=lambda _: True
        )
        inline = "data:,"
        asked = {"network": "efficientnet_lite0", "target": {"top_n": 1}}
        shard = {
            "backfill": new_id(),
            "index": 0,
            "key": "00000000-0123456789abcdef",
            "first": 0,
            "rows": [{"uri": "s3://photos/fault.png"}] * 3,
            "output": "s3://results/fault",
        }
        self.work: dict[str, Work] = {
            "image": Job.parse({**asked, "image": "s3://photos/fault.png", "max_attempts": 1}),
            "upload": Job.parse({**asked, "image": inline + percent(IMAGE), "max_attempts": 1}),
            "shard": Shard.model_validate({**asked, **shard, "max_attempts": 1}),
        }
        for work in self.work.values():
            self.ledger.submit(work)

    def run(self, name: str) -> Disposition:
        work = self.work[name]
        return self.handler.handle({"id": work.id}, work.id, kind=type(work))

    def check_pauses(self, why: str) -> None:
        """Whichever work comes first, it is handed back, and nothing else is taken."""
        for name, work in self.work.items():
            self.breaker.succeeded()
            with pytest.raises(WorkerUnfit, match=why):
                pytest.fail(f"{name}: {self.run(name)}, {self.ledger.read(work.id).error}")
            document = self.ledger.read(work.id)
            assert (document.status, document.error) == ("queued", None), name
            assert self.breaker.open_reason, name
            with pytest.raises(WorkerUnfit, match="The storage has failed since"):
                self.run(name)

    def check_finishes(self) -> None:
        self.breaker.probe()
        for name, work in self.work.items():
            assert self.run(name) == Disposition.FINISHED
            assert self.ledger.read(work.id).status == "succeeded", name


def percent(data: bytes) -> str:
    return "".join(f"%{byte:02x}" for byte in data)


@pytest.fixture(autouse=True)
def a_machine_without_keys(no_keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradcam_worker.storage.credentials.RETRY_AFTER_S", 0)


@pytest.fixture
def line(s3_server: Any) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_server.port) as line:
        yield line


@pytest.fixture
def settings(s3_settings: Any, line: FaultyProxy) -> Settings:
    S3(Settings(**s3_settings)).put("photos", "fault.png", IMAGE, "image/png")
    return Settings(
        **{**s3_settings, "s3_endpoint_url": f"http://127.0.0.1:{line.port}"},
        output="s3://results/fault",
        image_schemes=("s3", "data"),
        retry_backoff_s=1e-6,
    )


@pytest.mark.parametrize("fault", S3_ANSWERS)
def test_refused_keys_and_foreign_answers_end_no_work(
    fault: str, line: FaultyProxy, settings: Settings
) -> None:
    worker, (answer, why) = Worker(settings), S3_ANSWERS[fault]
    line.fault = Fault(answer=answer)
    worker.check_pauses(why)
    line.fault = Fault()
    worker.check_finishes()


@pytest.fixture
def key_source(
    http_server: Any, answer: Any, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, int, bytes], Settings]:
    """Make a worker depend on a source of keys, which answers like this."""

    def use(kind: str, status: int, body: bytes) -> Settings:
        where = f"http://{http_server.host}"
        paths = ("/",) if "web" in kind else ("/keys", "/latest/api/token")
        for path in paths:
            http_server.url(path, answer(status, body, {"content-type": "application/json"}))
        if "web" in kind:
            token = tmp_path / "token"
            token.write_text("" if "empty" in kind else "planted")
            monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
            monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/gradcam")
            monkeypatch.setenv("AWS_ENDPOINT_URL_STS", where)
        elif kind == "container":
            monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{where}/keys")
            monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)
        else:
            monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
            monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", where)
        none = {"s3_access_key_id": "", "s3_secret_access_key": SecretStr("")}
        return settings.model_copy(update=none)

    return use


@pytest.mark.parametrize("fault", SOURCES)
def test_keys_that_cannot_be_had_end_no_work(
    fault: str,
    key_source: Callable[[str, int, bytes], Settings],
    s3_server: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kind, status, body, why = SOURCES[fault]
    worker = Worker(key_source(kind, status, body))
    worker.check_pauses(why)
    # Whoever operates the worker repairs it, here with keys in the environment, which are found first.
    for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret_access_key)
    worker.s3._session.get_credentials()._source = None
    worker.check_finishes()


def test_keys_of_a_container_are_used_and_expire(
    key_source: Callable[[str, int, bytes], Settings], s3_server: Any, http_server: Any, answer: Any
) -> None:
    keys = {
        "AccessKeyId": s3_server.access_key_id,
        "SecretAccessKey": s3_server.secret_access_key,
        "Token": "t",
        "Expiration": "2999-01-01T00:00:00Z",
    }
    worker = Worker(
        key_source("container", 200, json.dumps(keys | {"Expiration": "2001-01-01T00:00:00Z"}).encode())
    )
    worker.check_pauses("no valid keys for S3")
    http_server.url("/keys", answer(200, json.dumps(keys).encode()))
    worker.check_finishes()
