"""Where a worker's keys may come from, as docs/how-to/identity.md has it, over a real HTTP server.

It stands for STS, for the agent of EKS, for the metadata of a machine and for S3. What is signed, and with
which keys, is botocore's and obstore's own.
"""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from pydantic import SecretStr

from gradcam_worker.errors import InvalidSettings
from gradcam_worker.settings import Settings
from gradcam_worker.storage.credentials import REREAD_AFTER_S, Identity
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.s3_errors import IdentityFailed, describe
from gradcam_worker.storage.stores import Stores
from gradcam_worker.text.urls import signed_until

ROLE = "arn:aws:iam::111122223333:role/gradcam"
STS = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIAROLE</AccessKeyId>
<SecretAccessKey>secret</SecretAccessKey><SessionToken>a-token</SessionToken>
<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""
FOUND = {
    "AccessKeyId": "ASIAROLE",
    "SecretAccessKey": "secret",
    "Token": "a-token",
    "Expiration": "2099-01-01T00:00:00Z",
    "Code": "Success",
}
KEYS = "[default]\naws_access_key_id = {0}\naws_secret_access_key = secret\naws_session_token = of-{0}\n"
REFUSED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
METADATA = "/latest/meta-data/iam/security-credentials/"


class Cloud:
    """What tells a pod who it is; each source answers at a path of one server."""

    def __init__(self, server: Any, answer: Any, folder: Path, environment: pytest.MonkeyPatch) -> None:
        self._server, self._answer, self._folder, self._environment = server, answer, folder, environment

    def web_identity(self) -> None:
        """IRSA, or a projected token anywhere: it is exchanged at STS."""
        self._serve("/", STS)
        self._set(AWS_ROLE_ARN=ROLE, AWS_ENDPOINT_URL_STS=f"http://{self._server.host}")
        self._set(AWS_WEB_IDENTITY_TOKEN_FILE=self._file("a projected token"))

    def pod_identity(self) -> None:
        """The agent of EKS on the node."""
        url = self._serve("/v1/credentials", json.dumps(FOUND))
        self._set(AWS_CONTAINER_CREDENTIALS_FULL_URI=url)
        self._set(AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=self._file("a pod's token"))

    def instance_metadata(self) -> None:
        """The role of the machine, by version 2 of its metadata."""
        self._serve("/latest/api/token", "a session")
        self._serve(METADATA, "node-role")
        self._serve(f"{METADATA}node-role", json.dumps(FOUND))
        self._set(AWS_EC2_METADATA_SERVICE_ENDPOINT=f"http://{self._server.host}")

    def credentials_file(self, key: str) -> Path:
        """A file that something else rotates: a sidecar, an agent of the machine, a mounted Secret."""
        path = self._folder / "credentials"
        path.write_text(KEYS.format(key))
        self._set(AWS_SHARED_CREDENTIALS_FILE=str(path))
        return path

    def asked(self, path: str) -> tuple[bytes, dict[str, str]]:
        """The body and the headers of the only request for this path."""
        (place,) = (index for index, (asked, _) in enumerate(self._server.received) if asked == path)
        return self._server.received[place][1], self._server.headers[place]

    def _serve(self, path: str, text: str) -> str:
        url: str = self._server.url(path, self._answer(200, text.encode()))
        return url

    def _set(self, **variables: str) -> None:
        for name, value in variables.items():
            self._environment.setenv(name, value)

    def _file(self, text: str) -> str:
        path = self._folder / "token"
        path.write_text(text)
        return str(path)


@pytest.fixture
def cloud(
    http_server: Any, answer: Any, no_keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Cloud:
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    http_server.url("/results/cams/a.txt", answer(200, headers={"ETag": '"0123456789abcdef"'}))
    return Cloud(http_server, answer, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("source", "path", "header", "value"),
    [
        ("web_identity", "/", "", ""),
        ("pod_identity", "/v1/credentials", "authorization", "a pod's token"),
        ("instance_metadata", f"{METADATA}node-role", "x-aws-ec2-metadata-token", "a session"),
    ],
)
def test_a_result_is_stored_with_the_keys_of_the_pod(
    cloud: Cloud, http_server: Any, source: str, path: str, header: str, value: str
) -> None:
    getattr(cloud, source)()
    settings = Settings(output="s3://results/cams", s3_endpoint_url=f"http://{http_server.host}")
    Stores(settings, S3(settings)).open().put("a.txt", b"a", "text/plain")
    body, headers = cloud.asked(path)
    assert not header or headers[header] == value
    assert source != "web_identity" or b"WebIdentityToken=a+projected+token" in body
    assert b"role%2Fgradcam" in body or source != "web_identity"
    _, stored = cloud.asked("/results/cams/a.txt")
    assert "Credential=ASIAROLE/" in stored["authorization"]
    assert stored["x-amz-security-token"] == "a-token"


def test_white_space_around_keys_is_no_part_of_them(
    cloud: Cloud, http_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Secret made by `echo` ends with a line break."""
    for name, value in {
        "ACCESS_KEY_ID": "AKIAKEY",
        "SECRET_ACCESS_KEY": "secret",
        "SESSION_TOKEN": "a",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", f"{value}\n")
    settings = Settings(output="s3://results/cams", s3_endpoint_url=f"http://{http_server.host}")
    Stores(settings, S3(settings)).open().put("a.txt", b"a", "text/plain")
    _, stored = cloud.asked("/results/cams/a.txt")
    assert "Credential=AKIAKEY/" in stored["authorization"]
    assert stored["x-amz-security-token"] == "a"


def test_keys_that_no_header_can_hold_are_a_failure_of_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA\nplanted")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(IdentityFailed) as caught:
        Identity("eu-central-1").get_frozen_credentials()
    assert describe(caught.value).endswith(
        "the access key id has characters that no key has, a line break perhaps"
    )


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("AWS_PROFILE", "gone", "The config profile (gone) could not be found"),
        ("AWS_CONFIG_FILE", __file__, "Unable to parse config file"),
    ],
)
def test_an_environment_that_cannot_be_used_is_told_in_a_sentence(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, why: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidSettings, match=rf"says of S3, cannot be used: {re.escape(why)}"):
        S3(Settings(output="s3://results/cams"))


def test_a_url_is_valid_no_longer_than_the_keys_that_signed_it(
    cloud: Cloud, http_server: Any, answer: Any
) -> None:
    cloud.pod_identity()
    ends = (datetime.now(UTC) + timedelta(hours=1)).replace(microsecond=0)
    found = FOUND | {"Expiration": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
    http_server.url("/v1/credentials", answer(200, json.dumps(found).encode()))
    s3 = S3(Settings(output="s3://results/cams", s3_endpoint_url=f"http://{http_server.host}"))
    for url in (
        s3.presigned_url("results", "a", 86_400),
        s3.presigned_upload("results", "a", "image/png", 9, 86_400),
    ):
        until = signed_until(url)
        assert until
        assert ends - timedelta(minutes=30) < until <= ends
    until = signed_until(s3.presigned_url("results", "a", 600))
    assert until
    assert until < ends - timedelta(minutes=15)
    assert signed_until("https://cdn.example/a?X-Amz-Date=soon&X-Amz-Expires=1") is None


def test_keys_of_the_settings_go_before_those_of_the_pod(cloud: Cloud, http_server: Any) -> None:
    cloud.pod_identity()
    settings = Settings(
        output="s3://results/cams",
        s3_endpoint_url=f"http://{http_server.host}",
        s3_access_key_id="a-static-key",
        s3_secret_access_key=SecretStr("secret"),
    )
    Stores(settings, S3(settings)).open().put("a.txt", b"a", "text/plain")
    _, stored = cloud.asked("/results/cams/a.txt")
    assert "Credential=a-static-key/" in stored["authorization"]
    assert "x-amz-security-token" not in stored


def test_keys_that_were_refused_are_read_again_from_their_file(
    cloud: Cloud, http_server: Any, answer: Any
) -> None:
    for number in (1, 3):
        http_server.url(f"/results/{number}", answer(204))
    path = cloud.credentials_file("ASIAFIRST")
    s3 = S3(Settings(output="s3://results/cams", s3_endpoint_url=f"http://{http_server.host}"))
    s3.remove("results", "1")
    path.write_text(KEYS.format("ASIASECOND"))  # by what rotates it
    http_server.url("/results/2", answer(400, REFUSED))
    with pytest.raises(ClientError, match="ExpiredToken"):
        s3.remove("results", "2")
    s3.remove("results", "3")
    signed = [cloud.asked(f"/results/{number}")[1]["x-amz-security-token"] for number in (1, 2, 3)]
    assert signed == ["of-ASIAFIRST", "of-ASIAFIRST", "of-ASIASECOND"]


def test_keys_that_were_refused_are_asked_for_again(cloud: Cloud, http_server: Any, answer: Any) -> None:
    cloud.pod_identity()
    s3 = S3(Settings(output="s3://results/cams", s3_endpoint_url=f"http://{http_server.host}"))
    http_server.url("/results/1", answer(400, REFUSED))
    with pytest.raises(ClientError, match="ExpiredToken"):
        s3.remove("results", "1")
    http_server.url("/v1/credentials", answer(200, json.dumps(FOUND | {"Token": "another"}).encode()))
    for number in (2, 3):
        http_server.url(f"/results/{number}", answer(204))
        s3.remove("results", str(number))
        assert cloud.asked(f"/results/{number}")[1]["x-amz-security-token"] == "another"


def test_a_file_is_read_again_each_minute_and_for_as_long_as_it_can_be(cloud: Cloud) -> None:
    path, now_s = cloud.credentials_file("FIRST"), 100.0
    identity = Identity("eu-central-1", lambda: now_s)
    assert identity.get_frozen_credentials().access_key == "FIRST"
    path.write_text(KEYS.format("SECOND"))
    assert identity.get_frozen_credentials().access_key == "FIRST"
    now_s += REREAD_AFTER_S
    assert identity.get_frozen_credentials().access_key == "SECOND"
    path.write_text("[default]\naws_access_key_id = HALF")
    now_s += REREAD_AFTER_S
    assert identity.get_frozen_credentials().access_key == "SECOND"
    path.unlink()  # what is found without it has another identity
    cloud.pod_identity()
    now_s += REREAD_AFTER_S
    assert identity.get_frozen_credentials().access_key == "SECOND"


def test_keys_that_another_thread_finds_meanwhile_break_no_request() -> None:
    def found_meanwhile() -> float:
        identity._failure = None
        return 0.5

    identity = Identity("", found_meanwhile)
    identity._failure = (0.0, OSError("no keys"))
    with pytest.raises(IdentityFailed, match="a moment ago"):
        identity.get_frozen_credentials()
