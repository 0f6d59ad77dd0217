"""The base install, in an environment of its own."""

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]


def test_the_base_install_is_a_client_and_nothing_heavy(tmp_path: Path, valkey: str) -> None:
    subprocess.run([str(ROOT / "scripts" / "setup"), "--venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    installed = {line.split()[0].lower() for line in listed.splitlines()[2:]}
    assert not installed & {"numpy", "tensorflow", "keras", "opencv-python-headless", "boto3", "pillow"}
    gradcam = tmp_path / "env" / "bin" / "gradcam"
    variables = {"GRADCAM_BROKER_URL": valkey, "PATH": "/usr/bin:/bin"}
    submitted = subprocess.run(
        [gradcam, "submit", "s3://in/a.jpg"], env=variables, capture_output=True, text=True, check=True
    )
    status = subprocess.run(
        [gradcam, "status", submitted.stdout.strip()],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "queued" in status.stdout
    refused = subprocess.run(
        [gradcam, "explain", __file__], env=variables, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "This needs a worker: pip install 'gradcam-worker[cpu]'" in refused.stderr
    examined = subprocess.run([gradcam, "doctor"], env=variables, capture_output=True, text=True, check=False)
    assert "from here jobs can be submitted, not run" in examined.stdout
