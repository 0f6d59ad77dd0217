"""An operator's own network: from a file in S3 to a job's result, and its next version without a restart."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.schemas.status import StatusDocument

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

WAIT_S = 90  # the first job also waits for TensorFlow to load
OWN = """
[networks.shapes]
model = "s3://private/{version}.keras"
sha256 = "{sha256}"
labels = {labels}
preprocessing = {{ scale = 0.00392156862745098 }}
input_size = [32, 32]
"""


def test_an_own_network_explains_and_its_next_version_takes_over_while_the_worker_runs(
    make_stage: Callable[..., Any], tmp_path: Path, save_model: Callable[..., str]
) -> None:
    registry = tmp_path / "networks.toml"
    stage = make_stage("registry", networks=registry, cache_dir=tmp_path / "cache")

    def put(version: str, seed: int) -> str:
        """Store a version of the model; return its checksum."""
        sha256 = save_model(tmp_path / "own.keras", seed=seed)
        body = (tmp_path / "own.keras").read_bytes()
        stage.s3.client.put_object(Bucket="private", Key=f"{version}.keras", Body=body)
        return sha256

    def describe(text: str) -> None:
        (tmp_path / "next.toml").write_text(text)
        (tmp_path / "next.toml").replace(registry)

    def run() -> StatusDocument:
        fields = {"image": "s3://photos/coffee.jpg", "network": "shapes", "target": {"top_n": 3}}
        document: StatusDocument = stage.client.wait(stage.client.submit(**fields), WAIT_S)
        return document

    first = put("v1", seed=1)
    describe(OWN.format(version="v1", sha256=first, labels=["circle", "square", "star"]))
    with stage.worker("worker") as process:
        document = run()
        assert document.status == "succeeded", document.error
        assert document.network is not None
        assert document.network.weights_sha256 == first
        assert document.network.layer == "backbone/last"
        assert {seen.name for seen in document.predictions} == {"circle", "square", "star"}
        assert {seen.wnid for seen in document.predictions} == {""}

        second = put("v2", seed=2)
        describe(OWN.format(version="v2", sha256=second, labels=["ring", "box", "asterisk"]))
        document = run()
        assert document.status == "succeeded", document.error
        assert document.network is not None
        assert document.network.weights_sha256 == second != first
        assert {seen.name for seen in document.predictions} == {"ring", "box", "asterisk"}

        describe(OWN.format(version="v1", sha256="0" * 64, labels=[]))
        refused = run()
        assert refused.error is not None
        assert refused.error.code == "weights_checksum_mismatch", "the file in S3 is another one"
        assert first in refused.error.detail

        describe("[networks]")
        removed = run()
        assert removed.error is not None
        assert removed.error.code == "unknown_network"
        assert process.poll() is None
    log = stage.log("worker")
    assert log.count("worker_started ") == 1, "nothing was started again"
    assert f"registry_reloaded path={registry} networks=shapes" in log
    assert {path.name for path in (tmp_path / "cache").glob("*.keras")} == {
        f"{first}.keras",
        f"{second}.keras",
    }
