"""Reading what a job has left, and putting an image into storage, with a real S3 server."""

import hashlib
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlsplit

import cv2
import numpy as np
import pytest
from pydantic import SecretStr

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import (
    GradcamError,
    ImageNotFound,
    ImageTooLarge,
    InvalidJob,
    InvalidSettings,
    NoResult,
    StorageUnavailable,
    UnknownJob,
)
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.images.fetch import UriFetcher
from gradcam_worker.ledger.ledger import Ledger
from gradcam_worker.ledger.state_machine import next_revision
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import ImageRef, Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.status import ManifestRef, Problem, StatusDocument, WorkerRef
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores
from gradcam_worker.testing import MemoryLedger, RecordingPublisher, eager_client, fake_services

FIELDS: dict[str, Any] = {"network": "efficientnet_lite0", "target": {"top_n": 2}}
PHOTO = "s3://in/photo.jpg"
WORKER = WorkerRef(id="w", device="cpu")


@pytest.fixture
def s3(s3_settings: dict[str, Any]) -> Settings:
    """Settings for the real S3 server, with a place of results of their own."""
    return Settings(output=f"s3://results/{new_id()}", uploads="s3://photos/uploads", **s3_settings)


@pytest.fixture(scope="session")
def photo() -> bytes:
    return bytes(cv2.imencode(".jpg", np.full((48, 64, 3), (9, 200, 9), np.uint8))[1].tobytes())


def client_of(
    settings: Settings, ledger: Ledger | None = None
) -> tuple[GradcamClient, Ledger, RecordingPublisher]:
    ledger, published = ledger or MemoryLedger(), RecordingPublisher()
    return GradcamClient(settings=settings, ledger=ledger, publish=published), ledger, published


def done(settings: Settings, photo: bytes, **wishes: Any) -> tuple[GradcamClient, str, Ledger]:
    """A client, and a job that a worker has run: its artifacts are where the settings say."""
    client, ledger, _ = client_of(settings)
    job = Job.parse({**FIELDS, "image": PHOTO, **wishes})
    client.submit(job)
    document = ledger.claim(ledger.read(job.id), WORKER).document
    there = fake_services({PHOTO: photo}, stores=Stores(settings, S3(settings)))
    left = run_job(job, there, JobContext(Deadline(60), lambda _: None))
    ledger.finish(document, status="succeeded", **vars(left))
    return client, job.id, ledger


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url) as answer:  # noqa: S310  # a server of this test's
        return bytes(answer.read())


def test_each_artifact_has_a_url_with_which_a_browser_reads_it_without_keys(
    s3: Settings, photo: bytes
) -> None:
    client, job_id, _ = done(
        s3, photo, artifacts=[{"kind": "overlay"}, {"kind": "heatmap"}, {"kind": "grid"}]
    )
    result = client.result(job_id, expires_s=60)
    assert [one.class_.name for one in result.manifest.explanations] == [
        one.name for one in client.status(job_id).predictions[:2]
    ]
    records = {one.uri: one for seen in result.manifest.explanations for one in seen.artifacts}
    records |= {one.uri: one for one in result.manifest.artifacts}
    assert {one.kind for one in records.values()} == {"overlay", "heatmap", "grid"}
    assert result.urls.keys() == records.keys()
    for uri, url in result.urls.items():
        assert hashlib.sha256(fetched(url)).hexdigest() == records[uri].sha256
        assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["60"]
        with pytest.raises(HTTPError, match="HTTP Error 40"):
            fetched(url.partition("?")[0])
        secret = s3.s3_secret_access_key.get_secret_value()
        assert secret not in url


def test_a_browser_may_be_sent_to_another_address_of_the_same_server(s3: Settings, photo: bytes) -> None:
    port = urlsplit(s3.s3_endpoint_url).port
    public = s3.model_copy(update={"s3_public_url": f"http://localhost:{port}"})
    client, job_id, _ = done(public, photo)
    urls = client.result(job_id).urls.values()
    assert {urlsplit(url).netloc for url in urls} == {f"localhost:{port}"}
    assert all(fetched(url) for url in urls), "the signature is for that address"


def test_results_in_a_folder_have_the_files_own_uris(tmp_path: Path, photo: bytes) -> None:
    place = tmp_path / "with space"
    client, job_id, _ = done(Settings(output=place.as_uri()), photo)
    result = client.result(job_id)
    assert result.urls == {uri: uri for uri in result.urls}
    assert all(urlsplit(uri).scheme == "file" for uri in result.urls)
    assert fetched(next(iter(result.urls)))


def test_a_job_that_has_not_succeeded_has_no_result_and_is_said_to_be_what_it_is(photo: bytes) -> None:
    client, ledger, _ = client_of(Settings())
    job_id = client.submit(**FIELDS, image=PHOTO)
    with pytest.raises(NoResult, match=f"Job {job_id} is queued: only a job that succeeded"):
        client.result(job_id)
    document = ledger.claim(ledger.read(job_id), WORKER).document
    gone = Problem.of(ImageNotFound("There is nothing there."), stage="fetch", attempt=1)
    ledger.finish(document, status="failed", error=gone)
    with pytest.raises(NoResult, match=r"is failed \(image_not_found: There is nothing there\.\): only"):
        client.result(job_id)
    with pytest.raises(UnknownJob):
        client.result(new_id())


def replaced(ledger: Ledger, job_id: str, **changes: Any) -> None:
    """Have the ledger say something else of a job that is done."""
    assert isinstance(ledger, MemoryLedger)
    entry = ledger._entries[job_id]
    changed = next_revision(entry.document, **changes)
    ledger._entries[job_id] = type(entry)(**{**vars(entry), "document": changed})


def reference(uri: str) -> dict[str, Any]:
    return {"result": ManifestRef(manifest_uri=uri, manifest_sha256="0" * 64)}


def test_a_manifest_that_is_gone_or_is_none_or_is_anothers_is_no_result(tmp_path: Path, photo: bytes) -> None:
    settings = Settings(output=tmp_path.as_uri())
    client, job_id, ledger = done(settings, photo)
    manifest = tmp_path / job_id / "manifest.json"
    text = manifest.read_text()
    manifest.write_text("{}")
    with pytest.raises(NoResult, match=r"manifest\.json, which is no manifest of one image"):
        client.result(job_id)
    manifest.write_text(text.replace(job_id, new_id()))
    with pytest.raises(NoResult, match=f"is another's than job {job_id}'s"):
        client.result(job_id)
    for elsewhere in (
        "file:///etc/passwd",
        f"{(tmp_path / job_id).as_uri()}/../secret.txt",
        "s3://other/key",
    ):
        first = Manifest.model_validate_json(text).explanations[0].artifacts[0].uri
        manifest.write_text(text.replace(first, elsewhere))
        with pytest.raises(NoResult, match="is another's"):
            client.result(job_id)
    manifest.unlink()
    with pytest.raises(StorageUnavailable, match="could not be read"):
        client.result(job_id)
    replaced(ledger, job_id, **reference("https://example.com/manifest.json"))
    with pytest.raises(StorageUnavailable, match="neither in S3 nor on this machine"):
        client.result(job_id)


def test_a_job_that_the_ledger_has_forgotten_has_a_result_for_who_kept_its_place(
    tmp_path: Path, photo: bytes
) -> None:
    client, job_id, ledger = done(Settings(output=tmp_path.as_uri()), photo)
    known, kept = client.result(job_id), client.status(job_id).result
    assert kept
    assert isinstance(ledger, MemoryLedger)
    del ledger._entries[job_id]
    with pytest.raises(UnknownJob):
        client.result(job_id)
    assert client.result(job_id, manifest_uri=kept.manifest_uri) == known
    with pytest.raises(NoResult, match="is another's"):
        client.result(new_id(), manifest_uri=kept.manifest_uri)
    with pytest.raises(StorageUnavailable, match="neither in S3 nor on this machine"):
        client.result(job_id, manifest_uri="nowhere")


def test_a_url_is_good_for_a_second_to_a_week(tmp_path: Path, photo: bytes) -> None:
    client, job_id, _ = done(Settings(output=tmp_path.as_uri()), photo)
    for expires_s in (0, -5, 604_801):
        with pytest.raises(InvalidSettings, match=f"expires_s {expires_s} must be from 1 to 604,800 seconds"):
            client.result(job_id, expires_s=expires_s)


def test_a_store_that_is_away_is_one_error(s3: Settings, photo: bytes, free_port: int) -> None:
    client, job_id, ledger = done(s3, photo)
    away = s3.model_copy(update={"s3_endpoint_url": f"http://127.0.0.1:{free_port}"})
    client, _, published = client_of(away, ledger)
    with pytest.raises(StorageUnavailable, match=r"manifest\.json could not be read"):
        client.result(job_id)
    with pytest.raises(StorageUnavailable, match="could not be written"):
        client.upload_and_submit(photo, **FIELDS)
    assert not published.jobs


def test_without_boto3_a_sentence_says_what_to_install(
    s3: Settings, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gradcam_worker.storage.s3", "gradcam_worker.storage.stores"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "boto3", None)
    client, _, _ = client_of(s3)
    with pytest.raises(InvalidSettings, match=r"boto3 .* S3 needs the extra s3: pip install '\.\[s3\]'"):
        client.upload_and_submit(photo, **FIELDS)


def test_an_image_is_uploaded_under_its_checksum_and_the_job_is_for_those_bytes(
    s3: Settings, photo: bytes, tmp_path: Path
) -> None:
    client, _, published = client_of(s3)
    path = tmp_path / "Holiday.JPEG"
    path.write_bytes(photo)
    ids = [client.upload_and_submit(image, **FIELDS) for image in (photo, path, str(path))]
    assert [job.id for job in published.jobs] == ids
    digest = hashlib.sha256(photo).hexdigest()
    (image,) = {job.image for job in published.jobs}
    assert image == ImageRef(uri=f"s3://photos/uploads/{digest}.jpg", sha256=digest)
    assert UriFetcher(s3, S3(s3)).fetch(image, Deadline(5)).data == photo
    client.upload_and_submit(photo, to="s3://results/other/", priority="high", **FIELDS)
    assert published.jobs[-1].image.uri == f"s3://results/other/{digest}.jpg"
    assert published.jobs[-1].priority == "high"


def test_the_same_key_uploads_and_runs_once(tmp_path: Path, photo: bytes) -> None:
    client, ledger, _ = client_of(Settings(uploads=(tmp_path / "up").as_uri()))
    ids = {client.upload_and_submit(photo, idempotency_key="k", **FIELDS) for _ in range(2)}
    assert len(ids) == 1
    assert ledger.count_jobs() == (1, 0)
    (kept,) = (tmp_path / "up").iterdir()
    assert kept.read_bytes() == photo


@pytest.mark.parametrize(
    ("begins", "suffix"),
    [
        (b"\x89PNG\r\n", ".png"),
        (b"GIF89a", ".gif"),
        (b"RIFF0000WEBP", ".webp"),
        (b"BM000", ".bmp"),
        (b"what?", ""),
    ],
    ids=["png", "gif", "webp", "bmp", "unknown"],
)
def test_a_key_tells_the_format_by_the_bytes_alone(begins: bytes, suffix: str, tmp_path: Path) -> None:
    client, _, published = client_of(Settings(uploads=tmp_path.as_uri()))
    client.upload_and_submit(begins, **FIELDS)
    assert published.jobs[0].image.uri.endswith(f"{hashlib.sha256(begins).hexdigest()}{suffix}")


WRONG: Mapping[str, tuple[Any, dict[str, Any], type[GradcamError], str]] = {
    "nothing": (b"", {}, InvalidJob, "the image has no bytes"),
    "too large": (
        b"x" * 1001,
        {},
        ImageTooLarge,
        r"has 1,001 bytes; at most 1,000 are allowed \(GRADCAM_MAX_IM",
    ),
    "missing": ("nowhere/cat.jpg", {}, ImageNotFound, "'nowhere/cat.jpg' cannot be read: .*No such file"),
    "folder": ("/", {}, ImageNotFound, "Is a directory"),
    "zero byte": ("a\0b", {}, ImageNotFound, "cannot be read"),
    "uri": ("https://example.com/a.jpg", {}, InvalidJob, r"That is a URI.*submit\(image=...\) takes URIs"),
    "file object": (12, {}, InvalidJob, "must be a path of this machine, or bytes; not int"),
    "odd place": (b"x", {"to": "photos/here"}, InvalidSettings, "`to` 'photos/here' must look like s3://"),
    "wrong job": (b"x", {"top_m": 1}, InvalidJob, "top_m: unknown field"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_uploaded_is_refused_before_anything_happens(name: str, tmp_path: Path) -> None:
    image, fields, error, match = WRONG[name]
    place = tmp_path / "up"
    client, ledger, _ = client_of(Settings(uploads=place.as_uri(), max_image_bytes=1000))
    with pytest.raises(error, match=match):
        client.upload_and_submit(image, **FIELDS, **fields)
    assert not place.exists()
    assert ledger.count_jobs() == (0, 0)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(2**40)  # bytes; it takes no room
    client, _, _ = client_of(Settings(uploads=tmp_path.as_uri()))
    with pytest.raises(ImageTooLarge, match="1,099,511,627,776 bytes"):
        client.upload_and_submit(path, **FIELDS)


def test_a_result_is_shown_without_the_urls_that_let_everybody_in(photo: bytes) -> None:
    client = eager_client()
    result = client.result(client.upload_and_submit(photo, network="vgg16", target={"top_n": 2}))
    job_id = result.manifest.job_id
    assert repr(result) == f"Result(job_id={job_id!r}, explanations=2, urls={len(result.urls)})"


def test_without_a_place_for_uploads_the_setting_is_named(photo: bytes) -> None:
    client, _, _ = client_of(Settings())
    with pytest.raises(InvalidSettings, match="GRADCAM_UPLOADS says where images go, as in s3://"):
        client.upload_and_submit(photo, **FIELDS)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (
            "GRADCAM_UPLOADS",
            "photos",
            "GRADCAM_UPLOADS: 'photos' must look like s3://bucket/prefix or file:///folder",
        ),
        ("GRADCAM_S3_PUBLIC_URL", "files.example.com", "must look like https://s3.example.com:9000"),
    ],
)
def test_a_place_that_is_none_is_an_impossible_setting(name: str, value: str, match: str) -> None:
    with pytest.raises(InvalidSettings, match=match):
        Settings.from_environment({name: value})


def test_a_shards_document_has_no_manifest_of_one_image(tmp_path: Path) -> None:
    client, ledger, _ = client_of(Settings())
    job_id = client.submit(**FIELDS, image=PHOTO)
    (tmp_path / "data.parquet").write_bytes(b"PAR1\xff\xfe")
    document: StatusDocument = ledger.claim(ledger.read(job_id), WORKER).document
    uri = (tmp_path / "data.parquet").as_uri()
    ledger.finish(document, status="succeeded", **reference(uri))
    with pytest.raises(NoResult, match=r"data\.parquet, which is no manifest of one image"):
        client.result(job_id)


def test_a_result_is_used_without_its_manifest(photo: bytes, tmp_path: Path) -> None:
    client = eager_client({PHOTO: photo})
    kinds: Any = ["overlay", "heatmap", "grid", "report", "animation"]
    job = client.submit(image=PHOTO, network="vgg16", top_n=2, artifacts=kinds)
    result = job.result()
    assert [one.class_name for one in result.overlays] == ["green", "red"]
    assert result.overlays[0].url.startswith("data:image/jpeg;base64,")
    assert str(result.report_url).startswith("data:text/html")
    assert str(result.grid_url).startswith("data:image/jpeg")
    assert str(result.animation_url).startswith("data:image/gif")
    assert result.predictions[0].name == "green"
    assert result.heatmaps.shape == (2, 4, 4)
    assert (str(result.heatmaps.dtype), float(result.heatmaps[0].max())) == ("float32", 1.0)
    assert [one.name for one in result.files] == [
        "overlay-1-1001-green.jpg",
        "heatmaps.npz",
        "overlay-2-1000-red.jpg",
        "grid.jpg",
        "report.html",
        "animation.gif",
    ]
    assert [one.class_name for one in result.files if one.kind in {"heatmap", "grid"}] == [None, None]
    paths = result.save(tmp_path / "new" / "folder")
    assert [one.name for one in paths] == [*(one.name for one in result.files), "manifest.json"]
    assert paths[0].read_bytes() == result.overlays[0].read()
    assert Manifest.model_validate_json(paths[-1].read_bytes()) == result.manifest
    assert "base64" not in repr(result)
    assert repr(result.overlays[0]) == (
        "ResultFile('overlay-1-1001-green.jpg', kind='overlay', class_name='green')"
    )


def test_a_result_without_arrays_says_what_was_to_be_asked_for(photo: bytes) -> None:
    client = eager_client({PHOTO: photo})
    plain = client.submit(image=PHOTO, network="vgg16", top_n=1, artifacts=["overlay"]).result()
    assert (plain.report_url, plain.grid_url, plain.animation_url) == (None, None, None)
    with pytest.raises(NoResult, match='its artifacts must contain "heatmap"'):
        plain.heatmaps  # noqa: B018  # asking for it is the test
    npy: Any = [{"kind": "heatmap", "format": "npy"}]
    assert client.submit(image=PHOTO, network="vgg16", top_n=3, artifacts=npy).result().heatmaps.shape == (
        3,
        4,
        4,
    )
    grey: Any = [{"kind": "heatmap", "format": "png"}]
    with pytest.raises(NoResult, match="no heatmaps as numbers"):
        client.submit(image=PHOTO, network="vgg16", top_n=1, artifacts=grey).result().heatmaps  # noqa: B018


@pytest.mark.parametrize("change", ["s3_access_key_id", "s3_secret_access_key"])
def test_wrong_keys_are_a_wrong_setting_and_no_failure_that_passes(
    s3: Settings, photo: bytes, change: str
) -> None:
    _, job_id, ledger = done(s3, photo)
    wrong = {"s3_access_key_id": "wrong" * 4, "s3_secret_access_key": SecretStr("wrong" * 8)}
    client, *_ = client_of(s3.model_copy(update={change: wrong[change]}), ledger)
    fields: Any = FIELDS
    for call in (lambda: client.result(job_id), lambda: client.upload_and_submit(photo, **fields)):
        with pytest.raises(InvalidSettings, match=r"GRADCAM_S3_ACCESS_KEY_ID and .* must belong together"):
            call()


def test_without_any_keys_the_setting_is_named(
    s3: Settings, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    none = {"s3_access_key_id": "", "s3_secret_access_key": SecretStr("")}
    client, *_ = client_of(s3.model_copy(update=none))
    with pytest.raises(InvalidSettings, match="GRADCAM_S3_ACCESS_KEY_ID"):
        client.upload_and_submit(photo, network="vgg16", top_n=1)


def test_a_bucket_that_is_not_there_is_no_failure_that_passes(s3: Settings, photo: bytes) -> None:
    client, *_ = client_of(s3)
    with pytest.raises(StorageUnavailable) as caught:
        client.upload_and_submit(photo, to="s3://no-such-bucket/uploads", network="vgg16", top_n=1)
    assert not caught.value.retryable
