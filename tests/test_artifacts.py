import hashlib
import logging
from pathlib import Path

import pytest

from worker import artifacts
from worker.contract import Job
from worker.deadline import Deadline
from worker.errors import AttemptFenced, JobTimeout, StorageUnavailable
from worker.manifest import InputRecord, Manifest, MethodRecord, NetworkRecord
from worker.storage import FolderStore
from worker.testing import MemoryStore

DIGEST = hashlib.sha256(b"").hexdigest()


def manifest(job_id: str) -> Manifest:
    return Manifest(
        job_id=job_id,
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
    assert artifacts.sealed(store, job.id, job, Deadline(30)) is None
    ref = artifacts.seal(store, job.id, manifest(job.id), Deadline(30))
    assert artifacts.sealed(store, job.id, job, Deadline(30)) == (manifest(job.id), ref)
    assert ref.manifest_sha256 == hashlib.sha256(store.objects[f"{job.id}/manifest.json"]).hexdigest()


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": "gradcam.manifest/v2"}', b"[" * 100_000]
)
def test_what_is_no_manifest_counts_for_nothing_and_is_told(
    job: Job, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    store = MemoryStore({f"{job.id}/manifest.json": damaged})
    assert artifacts.sealed(store, job.id, job, Deadline(30)) is None
    assert f"memory://{job.id}/manifest.json is no manifest, and will be replaced" in caplog.text


def test_a_manifest_that_was_cut_short_counts_for_nothing(job: Job) -> None:
    text = manifest(job.id).model_dump_json().encode()
    for length in range(0, len(text), 97):
        store = MemoryStore({f"{job.id}/manifest.json": text[:length]})
        assert artifacts.sealed(store, job.id, job, Deadline(30)) is None


def test_the_manifest_of_another_job_counts_for_nothing_and_is_told(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    other = "01890a5d-ac96-774b-bcce-b302099a8057"
    store = MemoryStore()
    artifacts.seal(store, job.id, manifest(other), Deadline(30))
    assert artifacts.sealed(store, job.id, job, Deadline(30)) is None
    assert f"is the manifest of job {other}, and will be replaced" in caplog.text


def test_storage_that_fails_is_not_a_manifest_that_is_missing(job: Job, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    (tmp_path / job.id).mkdir()
    assert artifacts.sealed(store, job.id, job, Deadline(30)) is None
    (tmp_path / job.id / "manifest.json").symlink_to("elsewhere")
    with pytest.raises(StorageUnavailable):
        artifacts.sealed(store, job.id, job, Deadline(30))


def test_nothing_is_sealed_by_an_attempt_that_was_overtaken_or_is_out_of_time(job: Job) -> None:
    store, overtaken = MemoryStore(), Deadline(30)
    overtaken.cancel(AttemptFenced("overtaken"))
    with pytest.raises(AttemptFenced):
        artifacts.seal(store, job.id, manifest(job.id), overtaken)
    with pytest.raises(JobTimeout):
        artifacts.seal(store, job.id, manifest(job.id), Deadline(0))
    assert store.objects == {}
