import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradcam_worker.artifacts import artifacts
from gradcam_worker.errors import AttemptFenced, JobTimeout, StorageUnavailable
from gradcam_worker.gradcam.catalog import CATALOG, Head, ModelFile, NetworkRow
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import ColorRecord, InputRecord, Manifest, MethodRecord, NetworkRecord
from gradcam_worker.schemas.status import ClassScore, ManifestRef
from gradcam_worker.storage.stores import FolderStore, Store
from gradcam_worker.testing import MemoryStore

DIGEST = hashlib.sha256(b"").hexdigest()
ROW = CATALOG["efficientnet_lite0"]


def find(store: Store, job: Job, row: NetworkRow = ROW) -> tuple[Manifest, ManifestRef] | None:
    return artifacts.find_manifest(store, job.id, job, DIGEST, row, Deadline(30))


def write_manifest(store: Store, folder: str, made: Manifest, deadline: Deadline) -> ManifestRef:
    last, reference = artifacts.encode_manifest(store, folder, made)
    with store.upload(deadline) as upload:
        upload.finish(last)
    return reference


def manifest(job: Job, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {"job_id": job.id, "job_fingerprint": artifacts.job_fingerprint(job), **changes}
    return Manifest(
        **fields,
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


def test_a_manifest_is_found_again_as_it_was_written(job: Job) -> None:
    store = MemoryStore()
    assert find(store, job) is None
    ref = write_manifest(store, job.id, manifest(job), Deadline(30))
    assert find(store, job) == (manifest(job), ref)
    assert ref.manifest_sha256 == hashlib.sha256(store.objects[f"{job.id}/manifest.json"]).hexdigest()


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": "gradcam.manifest/v2"}', b"[" * 100_000]
)
def test_an_object_that_is_not_a_manifest_is_ignored_and_logged(
    job: Job, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    store = MemoryStore({f"{job.id}/manifest.json": damaged})
    assert find(store, job) is None
    assert f'manifest_replaced uri=memory://{job.id}/manifest.json reason="not a manifest"' in caplog.text


def test_a_truncated_manifest_is_ignored(job: Job) -> None:
    text = manifest(job).model_dump_json().encode()
    for length in range(0, len(text), 97):
        store = MemoryStore({f"{job.id}/manifest.json": text[:length]})
        assert find(store, job) is None


def test_the_manifest_of_another_job_is_ignored_and_logged(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    other = "01890a5d-ac96-774b-bcce-b302099a8057"
    store = MemoryStore()
    write_manifest(store, job.id, manifest(job, job_id=other), Deadline(30))
    assert find(store, job) is None
    assert (
        f'manifest_replaced uri=memory://{job.id}/manifest.json reason="it is of job {other}"' in caplog.text
    )


@pytest.mark.parametrize(
    "change",
    [
        {"image": "s3://in/another.jpg"},
        {"network": "vgg16"},
        {"target": {"top_n": 3}},
        {"target": {"classes": ["tabby", "egyptian_cat"]}},
        {"method": {"name": "layercam"}},
        {"metrics": ["deletion"]},
        {"artifacts": [{"kind": "grid"}]},
    ],
    ids=str,
)
def test_the_manifest_of_a_different_job_with_the_same_id_is_ignored_and_logged(
    job: Job, change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    store = MemoryStore()
    earlier_job = Job.parse({**job.model_dump(mode="json"), **change})
    write_manifest(store, job.id, manifest(earlier_job), Deadline(30))
    assert find(store, earlier_job) is not None
    assert find(store, job) is None
    assert 'reason="it is of a different job with this id"' in caplog.text


def test_metadata_timeout_and_idempotency_key_do_not_change_the_fingerprint(job: Job) -> None:
    store = MemoryStore()
    write_manifest(store, job.id, manifest(job), Deadline(30))
    same_work = job.model_copy(update={"metadata": {"user": "7"}, "timeout_s": 7.0, "idempotency_key": "k"})
    assert find(store, same_work) is not None


def test_the_manifest_of_other_bytes_at_the_same_uri_is_ignored_and_logged(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    store, other_sha256 = MemoryStore(), "0" * 64
    write_manifest(store, job.id, manifest(job), Deadline(30))
    assert artifacts.find_manifest(store, job.id, job, other_sha256, ROW, Deadline(30)) is None
    assert f'reason="it is of an image with sha256 {DIGEST}"' in caplog.text


def test_a_manifest_without_a_job_fingerprint_is_ignored(job: Job) -> None:
    store = MemoryStore()
    write_manifest(store, job.id, manifest(job, job_fingerprint=None), Deadline(30))
    assert find(store, job) is None


def test_the_manifest_of_other_weights_of_a_registered_network_is_ignored(job: Job) -> None:
    store = MemoryStore()
    row = replace(ROW, file=ModelFile(uri="file:///a.keras", sha256=DIGEST))
    written = manifest(job)
    for sha256, is_found in ((DIGEST, True), ("0" * 64, False)):
        network = written.network.model_copy(
            update={"weights_sha256": sha256, "preprocessing": row.preprocessing.name}
        )
        write_manifest(store, job.id, written.model_copy(update={"network": network}), Deadline(30))
        assert (find(store, job, row) is not None) is is_found


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (replace(ROW, labels=("cat", "dog")), None),
        (replace(ROW, labels=("dog", "cat")), "with other labels: class 1 was 'dog'"),
        (replace(ROW, labels=("cat",)), "with other labels: class 1 was 'dog'"),
        (replace(ROW, labels=()), None),
        (replace(ROW, head=Head("softmax")), None),
        (replace(ROW, head=Head("probabilities")), "with the head softmax"),
    ],
)
def test_the_manifest_of_other_labels_or_of_another_head_is_ignored_and_logged(
    row: NetworkRow, why: str | None, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    store, written = MemoryStore(), manifest(job)
    dog = ClassScore(rank=1, id=1, wnid="", name="dog", probability=0.5)
    write_manifest(store, job.id, written.model_copy(update={"predictions": (dog,)}), Deadline(30))
    assert (find(store, job, row) is None) == bool(why)
    assert (why or "") in caplog.text


def test_a_manifest_whose_colours_were_converted_is_ignored_by_a_worker_that_converts_none(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    store, written = MemoryStore(), manifest(job)
    image = written.input.model_copy(update={"converted_from": ColorRecord(kind="icc", name="Display P3")})
    write_manifest(store, job.id, written.model_copy(update={"input": image}), Deadline(30))
    for converts in (True, False):
        found = artifacts.find_manifest(
            store, job.id, job, DIGEST, ROW, Deadline(30), convert_colors=converts
        )
        assert (found is not None) == converts
    assert "its colours were converted from Display P3" in caplog.text


def test_a_storage_error_is_not_taken_for_a_missing_manifest(job: Job, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    (tmp_path / job.id).mkdir()
    assert find(store, job) is None
    (tmp_path / job.id / "manifest.json").symlink_to("elsewhere")
    with pytest.raises(StorageUnavailable):
        find(store, job)


def test_no_manifest_is_written_by_an_attempt_that_was_fenced_or_is_out_of_time(job: Job) -> None:
    store, fenced = MemoryStore(), Deadline(30)
    fenced.cancel(AttemptFenced("overtaken"))
    with pytest.raises(AttemptFenced):
        write_manifest(store, job.id, manifest(job), fenced)
    with pytest.raises(JobTimeout):
        write_manifest(store, job.id, manifest(job), Deadline(0))
    assert store.objects == {}
