import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.artifacts import artifacts
from gradcam_worker.errors import AttemptFenced, JobTimeout, StorageUnavailable
from gradcam_worker.gradcam.catalog import CATALOG, ModelFile, NetworkRow
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import InputRecord, Manifest, MethodRecord, NetworkRecord
from gradcam_worker.schemas.status import ManifestRef
from gradcam_worker.storage.stores import FolderStore, Store
from gradcam_worker.testing import MemoryStore

DIGEST = hashlib.sha256(b"").hexdigest()


ROW = CATALOG["efficientnet_lite0"]


def found(store: Store, job: Job, row: NetworkRow = ROW) -> tuple[Manifest, ManifestRef] | None:
    return artifacts.find_manifest(store, job.id, job, DIGEST, row, Deadline(30))


def manifest(job: Job, **changes: Any) -> Manifest:
    own: dict[str, Any] = {"job_id": job.id, "job_fingerprint": artifacts.fingerprint(job), **changes}
    return Manifest(
        **own,
        generator={"name": "gradcam-worker", "version": "1"},
        input=InputRecord(
            uri="s3://in/a.jpg", sha256=DIGEST, bytes=1, media_type="image/jpeg", width=1, height=1
        ),
        network=NetworkRecord(
            name="efficientnet_lite0",
            layer="blocks",
            input_size=(16, 16),
            preprocessing="none",
            weights_sha256=None,
            backend="numpy",
            dtype="float32",
        ),
        method=MethodRecord(),
        predictions=(),
        explanations=(),
    )


def test_a_sealed_manifest_is_found_again_as_it_was_sealed(job: Job) -> None:
    store = MemoryStore()
    assert found(store, job) is None
    ref = artifacts.write_manifest(store, job.id, manifest(job), Deadline(30))
    assert found(store, job) == (manifest(job), ref)
    assert ref.manifest_sha256 == hashlib.sha256(store.objects[f"{job.id}/manifest.json"]).hexdigest()


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": "gradcam.manifest/v2"}', b"[" * 100_000]
)
def test_what_is_no_manifest_counts_for_nothing_and_is_told(
    job: Job, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    store = MemoryStore({f"{job.id}/manifest.json": damaged})
    assert found(store, job) is None
    assert f"memory://{job.id}/manifest.json is no manifest, and will be replaced" in caplog.text


def test_a_manifest_that_was_cut_short_counts_for_nothing(job: Job) -> None:
    text = manifest(job).model_dump_json().encode()
    for length in range(0, len(text), 97):
        store = MemoryStore({f"{job.id}/manifest.json": text[:length]})
        assert found(store, job) is None


def test_the_manifest_of_another_job_counts_for_nothing_and_is_told(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    other = "01890a5d-ac96-774b-bcce-b302099a8057"
    store = MemoryStore()
    artifacts.write_manifest(store, job.id, manifest(job, job_id=other), Deadline(30))
    assert found(store, job) is None
    assert f"is the manifest of job {other}, and will be replaced" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "s3://in/another.jpg"}, "another job of this id"),
        ({"network": "vgg16"}, "another job of this id"),
        ({"target": {"top_n": 3}}, "another job of this id"),
        ({"target": {"classes": ["tabby", "egyptian_cat"]}}, "another job of this id"),
        ({"method": {"name": "layercam"}}, "another job of this id"),
        ({"metrics": ["deletion"]}, "another job of this id"),
        ({"artifacts": [{"kind": "grid"}]}, "another job of this id"),
    ],
)
def test_the_manifest_of_another_job_of_the_same_id_counts_for_nothing_and_is_told(
    job: Job, change: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    store = MemoryStore()
    before = Job.parse({**job.model_dump(mode="json"), **change})
    artifacts.write_manifest(store, job.id, manifest(before), Deadline(30))
    assert found(store, before) is not None
    assert found(store, job) is None
    assert f"is the manifest of {said}, and will be replaced" in caplog.text


def test_whom_it_is_told_makes_no_other_manifest(job: Job) -> None:
    store = MemoryStore()
    artifacts.write_manifest(store, job.id, manifest(job), Deadline(30))
    again = job.model_copy(update={"metadata": {"user": "7"}, "timeout_s": 7.0, "idempotency_key": "k"})
    assert found(store, again) is not None


def test_the_manifest_of_other_bytes_at_the_same_address_counts_for_nothing(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    store, other = MemoryStore(), "0" * 64
    artifacts.write_manifest(store, job.id, manifest(job), Deadline(30))
    assert artifacts.find_manifest(store, job.id, job, other, ROW, Deadline(30)) is None
    assert f"is the manifest of other bytes of its image, with sha256 {DIGEST}" in caplog.text


def test_a_manifest_that_does_not_say_what_it_was_made_for_counts_for_nothing(job: Job) -> None:
    store = MemoryStore()
    artifacts.write_manifest(store, job.id, manifest(job, job_fingerprint=None), Deadline(30))
    assert found(store, job) is None


def test_the_manifest_of_other_weights_of_an_own_network_counts_for_nothing(job: Job) -> None:
    store = MemoryStore()
    own = replace(ROW, file=ModelFile(uri="file:///a.keras", sha256=DIGEST))
    made = manifest(job)
    for sha256, there in ((DIGEST, True), ("0" * 64, False)):
        network = made.network.model_copy(
            update={"weights_sha256": sha256, "preprocessing": own.preprocessing.name}
        )
        artifacts.write_manifest(store, job.id, made.model_copy(update={"network": network}), Deadline(30))
        assert (found(store, job, own) is not None) is there


def test_storage_that_fails_is_not_a_manifest_that_is_missing(job: Job, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    (tmp_path / job.id).mkdir()
    assert found(store, job) is None
    (tmp_path / job.id / "manifest.json").symlink_to("elsewhere")
    with pytest.raises(StorageUnavailable):
        found(store, job)


def test_nothing_is_sealed_by_an_attempt_that_was_overtaken_or_is_out_of_time(job: Job) -> None:
    store, overtaken = MemoryStore(), Deadline(30)
    overtaken.cancel(AttemptFenced("overtaken"))
    with pytest.raises(AttemptFenced):
        artifacts.write_manifest(store, job.id, manifest(job), overtaken)
    with pytest.raises(JobTimeout):
        artifacts.write_manifest(store, job.id, manifest(job), Deadline(0))
    assert store.objects == {}
