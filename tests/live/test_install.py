"""The wheel in environments of its own: the base install, and the command without a worker."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from devtools import release

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
OF_EXTRAS = {"celery", "kombu", "click", "rich", "numpy", "boto3", "obstore", "pillow", "keras", "tensorflow"}
CLIENT = """
import asyncio, sys
from gradcam_worker import AsyncGradcamClient, GradcamClient, Job
from gradcam_worker.broker.publisher import Publisher
from gradcam_worker.errors import BrokerUnavailable
from gradcam_worker.settings import Settings

fields = {"image": "s3://in/a.jpg", "network": "vgg16", "target": {"top_n": 1}}
settings = Settings.from_environment()
with GradcamClient(settings=settings) as client:
    job_id = client.submit(Job.parse(fields))
    assert client.status(job_id).status == "queued"
    assert client.cancel(job_id).status == "canceled"
    client.submit_many([fields, fields])

async def submit():
    async with AsyncGradcamClient(settings=settings) as client:
        return (await client.status(await client.submit(**fields))).status

assert asyncio.run(submit()) == "queued"
publisher = Publisher(settings)
publisher.republish([job_id], "normal")
print(publisher.queue_length("normal"))
try:
    Publisher(settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})).queue_length("normal")
except BrokerUnavailable as error:
    print(error)
"""


def run(command: Sequence[str | Path], broker_url: str = "") -> subprocess.CompletedProcess[str]:
    variables = {"GRADCAM_BROKER_URL": broker_url, "GRADCAM_KEY_PREFIX": "install:", "PATH": os.defpath}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    return release.build(ROOT, tmp_path_factory.mktemp("dist"), only="wheel").wheel


def test_the_base_install_is_a_client_and_with_the_extra_cli_it_has_the_command(
    tmp_path: Path, wheel: Path, valkey: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PIP_NO_COMPILE", "0"
    )  # by which pip is told not to compile; programs do it when they run
    python = release.environment(tmp_path / "env", wheel)
    check_client(python, valkey)
    assert release.environment(tmp_path / "env", wheel, "cli") == python, "more is added to what is there"
    check_command(python, valkey)


def check_client(python: Path, valkey: str) -> None:
    """A client, and nothing else."""
    listed = run([python, "-m", "pip", "list"]).stdout
    assert not {line.split()[0].lower() for line in listed.splitlines()[2:]} & OF_EXTRAS
    submitted = run([python, "-P", "-c", CLIENT], valkey)
    assert submitted.stderr == ""
    assert submitted.stdout.splitlines()[0] == "5", "four jobs, and one published again"
    assert "The broker at redis://127.0.0.1:1/0 cannot be reached" in submitted.stdout
    said = "Error: click is not installed. The command gradcam needs the extra cli: "
    for command in ([python.with_name("gradcam")], [python, "-P", "-m", "gradcam_worker"]):
        refused = run([*command, "submit", "s3://in/a.jpg"], valkey)
        assert (refused.returncode, refused.stderr) == (
            1,
            f"{said}pip install '.[cli]' in a clone of gradcam-worker.\n",
        )


def check_command(python: Path, valkey: str) -> None:
    """The command without a worker submits, and says what the rest of it needs."""
    listed = run([python, "-m", "pip", "list"]).stdout
    installed = {line.split()[0].lower() for line in listed.splitlines()[2:]}
    assert installed & OF_EXTRAS == {"click", "rich"}
    gradcam = python.with_name("gradcam")
    job_id = run([gradcam, "submit", "s3://in/a.jpg"], valkey).stdout.strip()
    assert "queued" in run([gradcam, "status", job_id], valkey).stdout
    assert "canceled" in run([gradcam, "cancel", job_id], valkey).stdout
    assert "this machine can submit jobs but not run them" in run([gradcam, "doctor"], valkey).stdout
    fetch = ["networks", "fetch", "vgg16"]
    for command in (["worker"], ["worker", "--unsupervised"], ["deliver"], ["explain", __file__], fetch):
        refused = run([gradcam, *command], valkey)
        assert refused.returncode == 1, command
        needed = "is not installed. This command needs the extra cpu: pip install '.[cpu]' in a clone"
        assert needed in refused.stderr
    refused = run([gradcam, "backfill", __file__, "--output", "s3://results/a"], valkey)
    assert refused.returncode == 1
    assert "This command needs the extra backfill: pip install '.[backfill]' in a clone" in refused.stderr
