"""Environments of the command line."""

from pathlib import Path

import pytest

from gradcam_worker.settings import Settings


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Environment variables that name this test's Valkey."""
    for name, value in settings.to_environment().items():
        monkeypatch.setenv(name, value)
    return settings


NETWORKS_FILE = f"""
[networks.tumours]
model = "s3://models/tumours.keras"
sha256 = "{"ab" * 32}"
preprocessing = "torch"
input_size = [384, 320]
"""


@pytest.fixture
def networks_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry with one network of the operator's own."""
    path = tmp_path / "networks.toml"
    path.write_text(NETWORKS_FILE)
    monkeypatch.setenv("GRADCAM_NETWORKS", str(path))
    return path
