import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.errors import NetworkIncompatible
from gradcam_worker.gradcam.catalog import PREPROCESSING, ModelFile, NetworkRow
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.runtime.service_factory import build_services, load
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3


def test_the_limits_on_images_are_those_of_the_settings() -> None:
    chosen = {
        "GRADCAM_MAX_IMAGE_PIXELS": "1000",
        "GRADCAM_MAX_IMAGE_SIDE": "100",
        "GRADCAM_MAX_IMAGE_DAMAGE": "0.5",
        "GRADCAM_CONVERT_COLORS": "false",
    }
    assert build_services(Settings.from_environment({})).limits == Limits()
    services = build_services(Settings.from_environment(chosen))
    assert services.limits == Limits(1000, 100, 0.5, convert_colors=False)


@pytest.mark.parametrize(
    ("package", "extra"), [("onnxruntime", "onnx"), ("ai_edge_litert", "tflite")], ids=["onnx", "tflite"]
)
def test_a_job_of_a_network_whose_extra_is_missing_ends_with_an_error_of_the_network(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, package, missing)
    file = tmp_path / f"plankton.{extra}"
    file.write_bytes(b"no matter")
    row = NetworkRow(
        "plankton",
        (8, 8),
        PREPROCESSING["none"],
        file=ModelFile(str(file), hashlib.sha256(file.read_bytes()).hexdigest()),
        scores_only=True,
    )
    settings = Settings.from_environment({"GRADCAM_CACHE_DIR": str(tmp_path)})
    with pytest.raises(NetworkIncompatible, match=f"plankton cannot be loaded here: .* the extra {extra}"):
        load(settings, S3(settings), row)
