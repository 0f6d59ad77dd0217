from pathlib import Path

import pytest

from worker.doctor import Finding, examine
from worker.settings import Settings


def by_name(settings: Settings) -> dict[str, Finding]:
    return {finding.what: finding for finding in examine(settings)}


@pytest.mark.tensorflow
def test_a_worker_with_everything_is_well(settings: Settings, tmp_path: Path) -> None:
    findings = by_name(settings.model_copy(update={"output": tmp_path.as_uri()}))
    assert [name for name, finding in findings.items() if not finding.well] == []
    assert findings["ledger"].detail.endswith("0 queued, 0 running")
    assert findings["weights of efficientnet_lite0"].detail.endswith(".weights.h5")
    assert (tmp_path / "doctor" / "probe.txt").exists()


@pytest.mark.tensorflow
def test_everything_that_is_missing_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    findings = by_name(
        Settings(
            broker_url="redis://:planted@127.0.0.1:1/0",
            output=(tmp_path / "file").as_uri(),
            preload=("vgg16",),
            weights_dir=tmp_path,
        )
    )
    ill = {name: finding.fix for name, finding in findings.items() if not finding.well}
    assert ill.keys() == {"broker", "ledger", "storage", "weights of vgg16"}
    assert "GRADCAM_BROKER_URL" in ill["broker"]
    assert "GRADCAM_OUTPUT" in ill["storage"]
    assert "GRADCAM_WEIGHTS_DIR" in ill["weights of vgg16"]
    assert not any("planted" in finding.detail for finding in findings.values())
