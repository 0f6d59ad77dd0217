"""Where a worker's keys may come from, as docs/how-to/identity.md has it, over a real HTTP server.

It stands for STS, for the agent of EKS, for the metadata of a machine and for S3. What is signed, and with
which keys, is botocore's and obstore's own.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores

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
def cloud(http_server: Any, answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    http_server.url("/results/cams/a.txt", answer(200, headers={"ETag": '"1"'}))
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
