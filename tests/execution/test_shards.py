import hashlib
import io
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError
from numpy.typing import NDArray

from gradcam_worker.artifacts import dataset
from gradcam_worker.errors import (
    AttemptFenced,
    DeviceOccupied,
    DeviceOutOfMemory,
    GradcamError,
    ImageFetchFailed,
    InternalError,
    InvalidRow,
    JobCanceled,
    JobTimeout,
    OutputNotAllowed,
    StorageUnavailable,
    UnknownClass,
    UnknownLayer,
    WeightsChecksumMismatch,
)
from gradcam_worker.execution import pipeline, shards
from gradcam_worker.execution.attempt import JobContext, JobResult, Progress
from gradcam_worker.gradcam.decoding.decode import Decoded, decode
from gradcam_worker.gradcam.methods import integrated
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method, Network
from gradcam_worker.gradcam.sizing import Sizing
from gradcam_worker.images.fetch import FetchedBytes, UriFetcher
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.budget import Budgets, ResourceBudget
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.runtime import service_factory
from gradcam_worker.schemas.job import ImageRef, Job
from gradcam_worker.schemas.shard import READERS, Row, Shard, data_key
from gradcam_worker.schemas.status import Problem, RowSearch, RowState
from gradcam_worker.schemas.work import parse
from gradcam_worker.settings import Settings
from gradcam_worker.storage.filesystem import Object
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.s3_errors import IdentityFailed
from gradcam_worker.testing import MemoryImageFetcher, MemoryStore, TinyNetwork, fake_services
from tests.gradcam.sized_network import SizedNetwork

GROUP = 4
KEY = "00000003-0123456789abcdef"
DATA, FAILED = f"data/{KEY}.parquet", f"failed/{KEY}.jsonl"
BACKFILL = "01234567-89ab-7def-8123-456789abcdef"
FIRST = 96


def png(color: tuple[int, int, int], size: tuple[int, int] = (20, 24)) -> bytes:
    """A PNG of `size` (height, width), dark with a patch of an RGB color: its heatmap has a peak."""
    pixels = np.full((*size, 3), 40, np.uint8)
    pixels[: size[0] // 2, size[1] // 2 :] = color[::-1]
    return cv2.imencode(".png", pixels)[1].tobytes()


def uri(index: int) -> str:
    return f"s3://in/{index}.png"


IMAGES: dict[str, bytes | BaseException] = {
    uri(index): png((25 * index, 255 - 20 * index, 13 * index % 256)) for index in range(11)
}


def shard_of(images: Mapping[str, Any], **changes: Any) -> Shard:
    fields: dict[str, Any] = {
        "schema": "gradcam.shard/v1",
        "backfill": BACKFILL,
        "index": 3,
        "key": KEY,
        "first": FIRST,
        "rows": [{"uri": image_uri} for image_uri in images],
        "network": "efficientnet_lite0",
        "target": {"top_n": 2},
        "output": "s3://out/set",
    }
    shard = parse({**fields, **changes})
    assert isinstance(shard, Shard)
    return shard


@dataclass
class Harness:
    """The services that a shard uses, in memory."""

    images: dict[str, bytes | BaseException] = field(default_factory=lambda: dict(IMAGES))
    network: Network = field(default_factory=TinyNetwork)
    fetcher: Any = None
    store: MemoryStore = field(default_factory=MemoryStore)
    group: int = GROUP
    checkpoints: list[Progress] = field(default_factory=list)
    reported: list[Progress] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model_cache = ModelCache(lambda _: self.network, max_batch=self.group)
        self.services = fake_services(
            self.images, **{"store": self.store, "inference": self.model_cache, **self.others}
        )
        if self.fetcher:
            self.services = replace(self.services, images=self.fetcher)

    def run(
        self, shard: Shard | None = None, *, deadline: Deadline | None = None, **context: Any
    ) -> JobResult:
        job_context = JobContext(
            deadline or Deadline(60), self.reported.append, checkpoint=self.checkpoints.append, **context
        )
        return shards.run_shard(shard or shard_of(self.images), self.services, job_context)

    @property
    def table(self) -> pa.Table:
        return pq.read_table(io.BytesIO(self.store.objects[DATA]))

    @property
    def errors(self) -> dict[int, str]:
        """Index -> error code, of the rows that failed."""
        rows = zip(self.table["row"].to_pylist(), self.table["error"].to_pylist(), strict=True)
        return {row - FIRST: code for row, code in rows if code}

    @property
    def explained(self) -> set[int]:
        """The indexes of the rows that were explained."""
        rows = zip(self.table["row"].to_pylist(), self.table["error"].to_pylist(), strict=True)
        return {row - FIRST for row, code in rows if not code}


@pytest.fixture(autouse=True)
def _no_pause_before_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RETRY_ROWS_AFTER_S", 0)


@dataclass
class FlakyFetcher:
    """Fails with a transient error for a number of times per URI."""

    images: Mapping[str, bytes | BaseException]
    failures: Counter[str]
    fetches: Counter[str] = field(default_factory=Counter)

    def fetch(self, image: ImageRef, deadline: Deadline, max_bytes: int | None = None) -> FetchedBytes:
        self.fetches[image.uri] += 1
        if self.failures[image.uri]:
            self.failures[image.uri] -= 1
            message = f"{image.uri} could not be read (HTTP 503)."
            raise ImageFetchFailed(message)
        return MemoryImageFetcher(self.images).fetch(image, deadline, max_bytes)


@contextmanager
def other_jobs(harness: Harness) -> Iterator[None]:
    """Run jobs on the same device within the block."""
    stopped, done = threading.Event(), threading.Semaphore(0)
    size = harness.network.facts.input_size
    noise = np.random.default_rng(5).integers(0, 256, (8, *size, 3), np.uint8)

    def work(number: int) -> None:
        while not stopped.is_set():
            with harness.model_cache.reserve() as slot:
                slot.infer(harness.network, noise[number], (-1, -2), GRADCAM, Deadline(60))
            done.release()

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work, number) for number in range(3)]
        for _ in range(3):
            assert done.acquire(timeout=60)
        try:
            yield
        finally:
            stopped.set()
    for future in working:
        future.result()


def check_same_bytes(images: dict[str, bytes | BaseException], network: Network, group: int) -> None:
    """Check that a shard's file is the same in all modes, and whatever else runs on the device."""

    def make_harness(**fields: Any) -> Harness:
        return Harness(dict(images), network, group=group, **fields)

    first = make_harness()
    first.run()
    expected = first.store.objects[DATA]
    assert not first.errors

    concurrent = make_harness()
    with other_jobs(concurrent):
        concurrent.run()
    assert concurrent.store.objects[DATA] == expected, "other jobs on the device"

    for search in (None, RowSearch(group=(0, 3)), RowSearch(row=99)):  # group by group, then row by row
        searching = make_harness()
        searching.run(after_crash=True, row_search=search)
        assert searching.store.objects[DATA] == expected, f"after a crash with {search}"

    uris = [*images]
    flaky = FlakyFetcher(images, Counter({uris[1]: 1, uris[2]: 1, uris[-1]: 2}))
    retried = make_harness(fetcher=flaky)
    retried.run()
    assert [*retried.errors] == [len(uris) - 1]
    assert retried.store.objects[DATA] != expected
    retried.run(shard_of(images, keep=True))
    assert retried.store.objects[DATA] == expected, "rows with a transient error"
    assert flaky.fetches[uris[0]] == 1, "explained rows are not computed again"
    assert FAILED not in retried.store.objects


def test_a_shard_writes_the_same_bytes_in_all_modes() -> None:
    check_same_bytes(IMAGES, TinyNetwork(), GROUP)


@pytest.mark.tensorflow
def test_a_shard_of_a_real_network_writes_the_same_bytes_and_agrees_with_manifests(photos: Path) -> None:
    from gradcam_worker.gradcam.models.loading import load_network

    network = load_network("efficientnet_lite0", forward="tensorflow")
    files = sorted(photos.glob("*.jpg"))
    images: dict[str, bytes | BaseException] = {
        f"s3://in/{file.name}?{copy}": file.read_bytes() for copy in range(2) for file in files
    }
    check_same_bytes(images, network, 4)
    check_against_manifests(Harness(images, network, group=4))


def check_against_manifests(harness: Harness) -> None:
    """Check that the results of a shard are those of single jobs, except for the last digits."""
    specs: list[dict[str, Any]] = [{"kind": "overlay", "box": True}, {"kind": "heatmap", "format": "npy"}]
    shard = shard_of(harness.images, target={"top_n": 2})
    harness.run(shard)
    records = harness.table.to_pylist()
    for index_in_shard, image in enumerate(harness.images):
        job = Job.parse(
            {"image": image, "network": shard.network, "target": {"top_n": 2}, "artifacts": specs}
        )
        pipeline.run_job(job, harness.services, JobContext(Deadline(60), lambda _: None))
        manifest = json.loads(harness.store.objects[f"{job.id}/manifest.json"])
        heatmaps = np.load(io.BytesIO(harness.store.objects[f"{job.id}/heatmaps.npy"]))
        rows = [record for record in records if record["row"] == FIRST + index_in_shard]
        assert len(rows) == len(manifest["explanations"]) == 2
        for index, (row, explained) in enumerate(zip(rows, manifest["explanations"], strict=True)):
            image_record = manifest["input"]
            assert row["index"] == index
            assert [row[name] for name in ("uri", "sha256", "width", "height")] == [
                image_record[name] for name in ("uri", "sha256", "width", "height")
            ]
            assert {"id": row["class_id"], "wnid": row["wnid"], "name": row["class_name"]} == explained[
                "class"
            ]
            assert row["rank"] == explained["rank"]
            assert row["probability"] == pytest.approx(explained["probability"], rel=1e-4, abs=1e-6)
            assert row["raw_max"] == pytest.approx(explained["raw_max"], rel=1e-3, abs=1e-5)
            assert row["raw_min"] == pytest.approx(explained["raw_min"], rel=1e-3, abs=1e-5)
            np.testing.assert_allclose(np.float32(row["heatmap"]), heatmaps[index].ravel(), atol=2e-3)
            assert row["peak_xy"] == explained["peak_xy"]
            region = explained["hot"]
            assert row["box_xyxy"] == (region and pytest.approx(region["box_xyxy"], abs=1))


def test_the_results_of_a_shard_agree_with_the_manifests_of_jobs() -> None:
    check_against_manifests(Harness())


def test_rows_are_explained_against_classes_and_the_file_says_so() -> None:
    harness = Harness({uri(0): png((20, 220, 200))})
    harness.run(shard_of(harness.images, target={"top_n": 1, "against": ["green"]}))
    assert harness.table.column("class_name").to_pylist() == ["blue"]
    assert harness.table.column("rank").to_pylist() == [2]
    metadata = json.loads(harness.table.schema.metadata[dataset.METADATA_KEY])
    assert metadata["against"] == ["green"]


@pytest.mark.parametrize(
    ("sizing", "shown"),
    [
        (Sizing(fit="crop"), [2.526, 0, 22.737, 20]),  # of 19 x 16 pixels those from 2 to 18
        (Sizing("nearest", "letterbox"), [0, -3.077, 24, 21.538]),  # of 16 x 13 those from -2 to 14
    ],
)
def test_the_results_of_a_network_that_crops_or_pads_agree_with_those_of_jobs(
    sizing: Sizing, shown: list[float]
) -> None:
    harness = Harness(network=SizedNetwork(sizing))
    check_against_manifests(harness)
    assert harness.table["shown_xyxy"][0].as_py() == pytest.approx(shown)
    before = harness.store.objects[DATA]
    harness.run(shard_of(IMAGES, keep=True))
    assert harness.store.objects[DATA] == before, "its rows are kept"


def test_only_a_network_that_crops_or_pads_has_the_column_that_says_what_it_saw() -> None:
    harness = Harness()
    harness.run()
    assert "shown_xyxy" not in harness.table.column_names
    harness = Harness(harness.images, SizedNetwork(Sizing(fit="crop")), store=harness.store)
    harness.store.objects[DATA] = _encode(harness.table.slice(0, 4))
    harness.run(shard_of(IMAGES, keep=True))
    shown = harness.table["shown_xyxy"].to_pylist()
    assert shown[:4] == [None] * 4, "rows of before are kept"
    assert None not in shown[4:]


def test_changes_of_confidence_have_columns_where_they_are_measured() -> None:
    harness = Harness({uri(0): png((20, 220, 200))})
    harness.run(shard_of(harness.images, target={"top_n": 2}, metrics=["confidence_drop", "deletion"]))
    assert harness.table.column_names[-3:] == ["confidence_drop", "row_digest", "heat_at_border"]
    assert "confidence_increase" not in harness.table.column_names
    assert all(0 <= value <= 1 for value in harness.table["confidence_drop"].to_pylist())


def test_integrated_gradients_of_a_shard_have_the_size_of_the_input() -> None:
    harness = Harness({uri(0): png((20, 220, 200)), uri(1): png((220, 20, 20))})
    harness.run(shard_of(harness.images, target={"top_n": 1}, method={"name": "integrated_gradients"}))
    assert harness.table.column("class_name").to_pylist() == ["green", "red"]
    assert harness.table.schema.field("heatmap").type.list_size == 16 * 16
    metadata = json.loads(harness.table.schema.metadata[dataset.METADATA_KEY])
    assert metadata["grid"] == [16, 16]
    assert (metadata["method"]["steps"], metadata["method"]["baseline"]) == (64, "black")
    assert metadata["network"]["layer"] == "input"


def test_integrated_gradients_of_many_classes_are_computed_for_fewer_images_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counting(TinyNetwork):
        def begin(self, pixels: Any, *others: Any) -> Any:
            sizes.add(len(pixels))
            return super().begin(pixels, *others)

    sizes: set[int] = set()
    monkeypatch.setattr(integrated, "MAX_VALUES", 2 * 3 * 16 * 16)  # of two images
    harness = Harness(network=Counting())
    harness.run(shard_of(IMAGES, target={"top_n": 3}, method={"name": integrated.NAME, "steps": 8}))
    assert sizes == {2}
    assert not harness.errors


def test_boxes_and_peaks_are_in_pixels_of_the_full_size_of_an_image_decoded_at_a_smaller_scale() -> None:
    large = np.full((960, 1280, 3), 20, np.uint8)
    large[:480, 640:] = (0, 0, 255)
    data = cv2.imencode(".jpg", large)[1].tobytes()
    harness = Harness({"s3://in/large.jpg": data})
    harness.run(shard_of(harness.images, target={"classes": ["red"]}))
    (row,) = harness.table.to_pylist()
    assert (row["width"], row["height"]) == (1280, 960)
    left, top, right, bottom = row["box_xyxy"]
    assert 480 < left <= 640
    assert (top, right) == (0, 1280)
    assert 480 <= bottom < 640
    assert 640 < row["peak_xy"][0] < 1280
    assert 0 < row["peak_xy"][1] < 480


def problem(code: type[GradcamError] = InvalidRow) -> dict[str, Any]:
    return Problem.of(code("It names no image."), stage="plan", attempt=0).model_dump(mode="json")


def test_a_row_that_fails_has_its_error_and_does_not_affect_others() -> None:
    whole = png((9, 99, 199))
    images: dict[str, bytes | BaseException] = {
        uri(0): IMAGES[uri(0)],
        uri(2): IMAGES[uri(2)],
        "s3://in/text.png": b"this is text",
        "s3://in/half.png": whole[:-30],
        "s3://in/large.png": np.random.default_rng(0).bytes(5000),
    }
    small_budgets = Budgets(
        ResourceBudget(2**20, "bytes"), ResourceBudget(2**20, "pixels"), max_image_bytes=4000, threads=1
    )
    harness = Harness(images, others={"budgets": small_budgets})
    rows: list[dict[str, Any]] = [
        {"uri": uri(0), "id": "first"},
        {"uri": "s3://in/none.png", "id": "gone"},
        {"uri": "s3://in/text.png"},
        {"uri": "s3://in/half.png"},
        {"uri": "s3://in/large.png"},
        {"uri": "what,was;received", "problem": problem()},
        {"uri": ""},
        {"uri": uri(2)},
    ]
    done = harness.run(shard_of({}, rows=rows))
    assert harness.errors == {
        1: "image_not_found",
        2: "unsupported_media_type",
        3: "image_decode_failed",
        4: "image_too_large",
        5: "invalid_row",
        6: "invalid_row",
    }
    assert harness.explained == {0, 7}
    failed = [json.loads(line) for line in harness.store.objects[FAILED].splitlines()]
    assert {line["row"] - FIRST: line["error"]["code"] for line in failed} == harness.errors
    assert (failed[0]["image"], failed[0]["id"]) == ("s3://in/none.png", "gone")
    counts = Counter(harness.errors.values())
    assert (done.metrics["rows"], done.metrics["failed"]) == (8, 6)
    assert {code: done.metrics[f"failed_{code}"] for code in counts} == counts
    assert done.rows == RowState(failed=dict(counts))
    healthy = Harness({row["uri"]: IMAGES[uri(0)] for row in rows} | images)
    healthy.run(shard_of({}, rows=[rows[0], *[{"uri": uri(0)}] * 6, rows[7]]))
    for index in (0, 7):
        ours, theirs = (
            [record for record in each.table.to_pylist() if record["row"] == FIRST + index]
            for each in (harness, healthy)
        )
        assert ours == theirs


class Panic(BaseException):
    """A panic of a Rust library, which is not an Exception."""


def test_any_exception_and_any_length_of_a_uri_is_an_error_of_its_row_only() -> None:
    long = f"s3://in/{'x' * 66_000}"
    errors = (Panic("too long"), SystemExit(1), KeyboardInterrupt())
    failing = {f"s3://in/{type(error).__name__}": error for error in errors}
    harness = Harness({**IMAGES, **failing})
    harness.run(shard_of({}, rows=[{"uri": row_uri} for row_uri in (uri(0), *failing, long, uri(2))]))
    assert harness.errors == {1: "internal", 2: "internal", 3: "internal", 4: "invalid_row"}
    assert harness.explained == {0, 5}
    failed = [json.loads(line) for line in harness.store.objects[FAILED].splitlines()]
    assert failed[0]["error"]["detail"] == "Unforeseen Panic: too long."
    assert failed[3]["error"]["detail"] == "Its URI has 66,008 bytes; at most 8,192 are allowed."


def test_a_checksum_mismatch_is_an_error_of_its_row(s3_settings: Any) -> None:
    settings = Settings(**s3_settings)
    s3 = S3(settings)
    s3.client.put_object(Bucket="photos", Key="a.png", Body=IMAGES[uri(0)])
    rows = [{"uri": "s3://photos/a.png", "sha256": "0" * 64}, {"uri": "s3://photos/a.png"}]
    harness = Harness(fetcher=UriFetcher(settings, s3))
    harness.run(shard_of({}, rows=rows))
    assert harness.errors == {0: "checksum_mismatch"}


def test_a_row_with_a_transient_error_is_tried_twice() -> None:
    flaky = FlakyFetcher(IMAGES, Counter({uri(1): 1, uri(5): 2}))
    harness = Harness(fetcher=flaky)
    done = harness.run()
    assert harness.errors == {5: "image_fetch_failed"}
    assert (flaky.fetches[uri(1)], flaky.fetches[uri(5)], flaky.fetches[uri(0)]) == (2, 2, 1)
    assert done.metrics["failed_image_fetch_failed"] == 1


@pytest.mark.parametrize("after_crash", [False, True], ids=["pipelined", "after crash"])
def test_if_most_rows_have_a_transient_error_the_attempt_fails_unless_it_is_the_last(
    after_crash: bool,
) -> None:
    flaky = FlakyFetcher(IMAGES, Counter(dict.fromkeys([*IMAGES][:6], 3)))
    harness = Harness(fetcher=flaky)
    with pytest.raises(ImageFetchFailed, match=r"6 of 11 images failed with a transient error, .*HTTP 503"):
        harness.run(after_crash=after_crash)
    assert not harness.store.objects
    harness.run(is_last_attempt=True, after_crash=after_crash)
    assert harness.errors == dict.fromkeys(range(6), "image_fetch_failed")
    assert {flaky.fetches[image_uri] for image_uri in [*IMAGES][:6]} == {3}


@pytest.mark.parametrize("last", [False, True], ids=["more attempts", "the last attempt"])
def test_rows_that_the_storage_is_to_blame_for_are_not_written_as_failed(last: bool) -> None:
    asked: list[int] = []

    def storage_fails() -> bool:
        asked.append(1)
        return len(asked) > 1

    harness = Harness(fetcher=FlakyFetcher(IMAGES, Counter({uri(1): 3})))
    with pytest.raises(StorageUnavailable, match=r"1 of 11 images failed with a transient error, .*HTTP 503"):
        harness.run(is_last_attempt=last, storage_fails=storage_fails)
    assert not harness.store.objects


def test_a_proxy_that_refuses_one_uri_fails_its_row_and_missing_credentials_fail_the_shard() -> None:
    def failed(cause: Exception) -> StorageUnavailable:
        error = StorageUnavailable(f"s3://in/2.png could not be read: {cause}")
        error.__cause__ = cause
        return error

    page = ClientError({"ResponseMetadata": {"HTTPStatusCode": 403}, "Error": {"Code": "403"}}, "GetObject")
    harness = Harness({**IMAGES, uri(2): failed(page)})
    harness.run()
    assert harness.errors == {2: "image_fetch_failed"}
    harness = Harness({**IMAGES, uri(2): failed(IdentityFailed("no keys"))})
    with pytest.raises(StorageUnavailable, match="no keys"):
        harness.run()


def test_invalid_rows_of_the_plan_do_not_count_as_transient_errors() -> None:
    rows = [{"uri": "?", "problem": problem(ImageFetchFailed)}] * 3 + [{"uri": uri(0)}]
    harness = Harness()
    harness.run(shard_of({}, rows=rows))
    assert harness.errors == dict.fromkeys(range(3), "image_fetch_failed")


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1 and nothing", b"no parquet", "another", "damaged", "columns"],
    ids=["empty", "cut", "other", "another_version", "damaged", "other_columns"],
)
def test_a_file_that_is_not_a_shards_file_is_neither_used_nor_overwritten(data: bytes | str) -> None:
    harness = Harness()
    harness.run()
    whole = harness.store.objects[DATA]
    table = harness.table
    if data == "another":
        data = _encode(table.replace_schema_metadata({b"gradcam": b'{"schema": "gradcam.dataset/v9"}'}))
    elif data == "columns":
        data = _encode(table.drop_columns(["overlay"]))
    elif data == "damaged":
        data = whole[:200] + bytes(300) + whole[500:]
    assert isinstance(data, bytes)
    harness.store.objects[DATA] = data
    with pytest.raises(StorageUnavailable, match="The existing file is not a shard's file, or is damaged: "):
        harness.run(shard_of(IMAGES, keep=True))
    assert harness.store.objects[DATA] == data


def test_the_rows_of_a_file_without_the_column_missing_are_kept() -> None:
    harness = Harness()
    harness.run()
    before = harness.table
    harness.store.objects[DATA] = _encode(before.drop_columns(["missing"]))
    harness.run(shard_of(IMAGES, keep=True))
    assert harness.table.equals(before)


def test_a_row_records_the_missing_share_of_its_image_and_fails_if_that_is_too_large() -> None:
    grain = np.random.default_rng(4).integers(0, 256, (320, 400, 3), dtype=np.uint8)
    whole = cv2.imencode(".jpg", grain)[1].tobytes()
    images = {"a": whole, "b": whole[:-2], "c": whole[: len(whole) * 49 // 50], "d": whole[: len(whole) // 2]}
    harness = Harness({f"s3://in/{name}.jpg": data for name, data in images.items()})
    harness.run(shard_of(harness.images, target={"top_n": 1}))
    whole_one, no_end, cut, refused = harness.table["missing"].to_pylist()
    assert (whole_one, no_end, refused) == (None, 0, None)
    assert cut == pytest.approx(1 / 50, abs=0.02)
    assert harness.errors == {3: "image_decode_failed"}


def test_the_results_of_a_row_do_not_depend_on_its_artifacts_and_are_those_of_a_job() -> None:
    grain = np.random.default_rng(4).choice([0, 255], (700, 900, 3)).astype(np.uint8)
    grain[:, :450, 0] //= 2
    data = cv2.imencode(".jpg", grain, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    noise_uri = "s3://in/noise.jpg"
    harness, drawn = Harness({noise_uri: data}), Harness({noise_uri: data})
    harness.run()
    drawn.run(shard_of({noise_uri: data}, artifacts=[{"kind": "overlay"}]))
    job = Job.parse({"image": noise_uri, "network": "efficientnet_lite0", "target": {"top_n": 2}})
    done = pipeline.run_job(job, harness.services, JobContext(Deadline(60), lambda _: None))
    for table in (harness.table, drawn.table):
        assert table["probability"].to_pylist() == pytest.approx(
            [score.probability for score in done.predictions], rel=1e-6
        )


def _encode(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


@dataclass
class RecordingStore(MemoryStore):
    """Records the order of writes. Writes to the folder `broken` fail."""

    order: list[str] = field(default_factory=list)
    broken: str = ""

    def put_many(self, objects: Any, deadline: Deadline, last: Any = None) -> list[str]:
        files: list[Object] = list(objects)
        for key, _, _ in files:
            if self.broken and key.startswith(self.broken):
                message = f"{key} could not be written: the disk is full."
                raise StorageUnavailable(message)
            self.order.append(key.partition("/")[0])
        return super().put_many(files, deadline)


def test_the_file_is_written_last_and_a_shard_whose_file_exists_is_done() -> None:
    store = RecordingStore(broken="data")
    harness = Harness({**IMAGES, "s3://in/text.png": b"text"}, store=store)
    shard = shard_of(harness.images, artifacts=[{"kind": "overlay"}])
    with pytest.raises(StorageUnavailable):
        harness.run(shard)
    assert DATA not in store.objects
    store.broken, store.order = "", []
    first = harness.run(shard)
    assert store.order[-2:] == ["failed", "data"]
    assert set(store.order[:-2]) == {"overlays"}

    def never(_: object) -> Network:
        message = "nothing is to be computed"
        raise AssertionError(message)

    store.order = []
    idle = Harness({}, store=store, others={"inference": ModelCache(never)})
    again = idle.run(shard)
    assert not store.order
    assert (again.result, again.network) == (first.result, first.network)
    assert {**again.metrics} == {**first.metrics}
    assert again.result.manifest_sha256 == hashlib.sha256(store.objects[DATA]).hexdigest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"backfill": "01234567-89ab-7def-8123-000000000000"}, f"it is of backfill {BACKFILL}"),
        ({"weights_sha256": "0" * 64}, "it was computed with weights None"),
        ({"key": "00000003-fedcba9876543210"}, f"it is of shard {KEY}"),
    ],
    ids=["another backfill", "other weights", "other rows"],
)
@pytest.mark.parametrize("keep", [False, True])
def test_the_file_of_a_different_shard_is_replaced_and_logged(
    change: dict[str, Any], reason: str, keep: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    harness = Harness()
    harness.run()
    stale = harness.store.objects[DATA]
    shard = shard_of({**IMAGES, uri(0): IMAGES[uri(1)]}, **change, keep=keep)
    harness.store.objects[data_key(shard.key)] = stale
    network = TinyNetwork()
    network.facts = replace(network.facts, weights_sha256=shard.weights_sha256)
    second = Harness(network=network, store=harness.store)
    result = second.run(shard)
    assert "shard_file_replaced" in caplog.text
    assert f'reason="{reason}"' in caplog.text
    written = second.store.objects[data_key(shard.key)]
    assert written != stale
    assert result.result.manifest_sha256 == hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize("fixed", [1, 2], ids=["one of two", "both"])
def test_a_worker_that_dies_between_the_two_files_of_a_retried_shard_hides_no_failure(fixed: int) -> None:
    def make_harness(missing: int) -> Harness:
        return Harness({uri(index): IMAGES[uri(index)] for index in range(missing, 6)}, store=store)

    store = RecordingStore()
    shard = shard_of({uri(index): b"" for index in range(6)})
    make_harness(2).run(shard)
    before = store.objects[FAILED]
    assert len(before.splitlines()) == 2
    store.broken = "data"
    with pytest.raises(StorageUnavailable):
        make_harness(2 - fixed).run(shard.model_copy(update={"keep": True}))
    assert store.objects[FAILED] == before, "it still describes the existing file"


def test_a_shard_that_was_fenced_while_it_computed_writes_nothing() -> None:
    def checkpoint(progress: Progress) -> None:
        message = f"overtaken at {progress.stage}"
        raise AttemptFenced(message)

    harness = Harness()
    with pytest.raises(AttemptFenced, match="at upload"):
        shards.run_shard(
            shard_of(IMAGES),
            harness.services,
            JobContext(Deadline(60), lambda _: None, checkpoint=checkpoint),
        )
    assert not harness.store.objects


def test_the_file_of_failed_rows_is_removed_when_no_row_fails_any_more() -> None:
    store = RecordingStore(broken="data")
    flaky = FlakyFetcher(IMAGES, Counter({uri(2): 2}))
    harness = Harness(fetcher=flaky, store=store)
    with pytest.raises(StorageUnavailable):
        harness.run()
    assert FAILED in store.objects
    store.broken = ""
    harness.run()
    assert [*store.objects] == [DATA]


class Died(AttemptFenced):
    """Simulates the death of the process: ends a shard at once, whichever row raises it."""


@dataclass
class KillingFetcher:
    """Fetches images of which some kill the process."""

    deadly: frozenset[str]

    def fetch(self, image: ImageRef, deadline: Deadline, max_bytes: int | None = None) -> FetchedBytes:
        if image.uri in self.deadly:
            raise Died
        return MemoryImageFetcher(IMAGES).fetch(image, deadline, max_bytes)


def run_attempts(harness: Harness) -> list[RowSearch | None]:
    """Run attempts at a shard until it succeeds; return the row search that each started with."""
    searches: list[RowSearch | None] = [None]
    while len(searches) < 20:
        harness.checkpoints.clear()
        try:
            harness.run(after_crash=len(searches) > 1, row_search=searches[-1])
        except Died:
            rows = harness.checkpoints[-1].rows if harness.checkpoints else None
            searches.append(rows.search if rows else None)
        else:
            break
    return searches


def test_a_row_that_kills_its_process_is_found_and_left_out_and_all_others_are_explained() -> None:
    harness = Harness(fetcher=KillingFetcher(frozenset({uri(6)})))
    assert run_attempts(harness) == [None, None, RowSearch(group=(4, 7)), RowSearch(row=6)]
    assert harness.errors == {6: "worker_lost"}
    assert harness.explained == {*range(11)} - {6}
    healthy = Harness()
    healthy.run()
    others = [record for record in healthy.table.to_pylist() if record["row"] != FIRST + 6]
    assert [record for record in harness.table.to_pylist() if not record["error"]] == others


def test_several_rows_that_kill_their_process_are_left_out() -> None:
    harness = Harness(fetcher=KillingFetcher(frozenset(map(uri, (0, 5, 6, 10)))))
    searches = run_attempts(harness)
    assert len(searches) <= shard_of(IMAGES).max_attempts
    assert searches[-1] == RowSearch(row=10, left_out=(6, 5, 0))
    assert harness.errors == dict.fromkeys((0, 5, 6, 10), "worker_lost")


def test_a_shard_whose_only_row_kills_its_process_is_done_too() -> None:
    harness = Harness({uri(6): b""}, fetcher=KillingFetcher(frozenset({uri(6)})))
    assert len(run_attempts(harness)) == 4
    assert (harness.errors, harness.explained) == ({0: "worker_lost"}, set())


@dataclass(eq=False)
class FaultyNetwork(TinyNetwork):
    """A tiny network that fails on white images, may have little memory, and calls `before` in each batch."""

    before: Callable[[int], None] = lambda _: None  # called with the number of batches so far
    max_images: int = 1000  # that fit into its memory
    is_occupied: bool = False  # the rest of its memory is with other processes
    raises: bool = False  # on white images; else their scores are NaN
    batches: int = 0
    sizes: list[int] = field(default_factory=list)

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        self.batches += 1
        self.sizes.append(len(pixels))
        self.before(self.batches)
        if len(pixels) > self.max_images:
            message = f"No memory for {len(pixels)} images."
            raise (DeviceOccupied if self.is_occupied else DeviceOutOfMemory)(message)
        white = pixels.min(axis=(1, 2, 3)) > 250
        if self.raises and white.any():
            message = "white"
            raise ValueError(message)
        computed = super().compute(pixels, wanted, method)
        computed.scores[white] = np.nan
        return computed


WHITE = cv2.imencode(".png", np.full((20, 20, 3), 255, np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("raises", "code"), [(True, "internal"), (False, "network_incompatible")], ids=["raises", "nan"]
)
def test_an_image_that_the_network_cannot_process_fails_alone(raises: bool, code: str) -> None:
    images = {**IMAGES, uri(5): WHITE}
    harness = Harness(images, FaultyNetwork(raises=raises))
    harness.run()
    assert harness.errors == {5: code}
    healthy = Harness()
    healthy.run()
    others = [record for record in healthy.table.to_pylist() if record["row"] != FIRST + 5]
    assert [record for record in harness.table.to_pylist() if not record["error"]] == others


def test_no_row_is_written_as_failed_because_others_have_the_devices_memory() -> None:
    harness = Harness(network=FaultyNetwork(max_images=0, is_occupied=True))
    with pytest.raises(DeviceOccupied, match=r"11 of 11 images failed .*: No memory for 1 images"):
        harness.run()
    assert not harness.store.objects


def test_where_others_have_the_devices_memory_only_one_image_of_a_group_is_tried_alone() -> None:
    network = FaultyNetwork(max_images=0, is_occupied=True)
    harness = Harness({uri(index): IMAGES[uri(index)] for index in range(GROUP)}, network)
    with pytest.raises(DeviceOccupied, match=f"{GROUP} of {GROUP} images"):
        harness.run()
    assert network.sizes == [4, 2, 1]


@dataclass(eq=False)
class CrowdedNetwork(TinyNetwork):
    """Finds the device's memory with other processes in the first passes that hold a white image."""

    refused: int = 0  # passes

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        if self.refused and pixels.min(axis=(1, 2, 3)).max() > 250:
            self.refused -= 1
            message = "23.8 GiB are elsewhere"
            raise DeviceOccupied(message)
        return super().compute(pixels, wanted, method)


def test_a_few_rows_that_meet_an_occupied_device_are_tried_again_before_the_shard_is() -> None:
    images = {**IMAGES, uri(1): ImageFetchFailed("HTTP 503"), uri(5): WHITE}
    harness = Harness(images, CrowdedNetwork(refused=3))
    harness.run()
    assert harness.errors == {1: "image_fetch_failed"}
    crowded = Harness(images, CrowdedNetwork(refused=1000))
    with pytest.raises(DeviceOccupied, match=r"^3 of 11 images failed .*: 23\.8 GiB are elsewhere\.$"):
        crowded.run()
    assert not crowded.store.objects


def test_a_batch_that_does_not_fit_into_memory_is_made_smaller_and_no_row_fails() -> None:
    network = FaultyNetwork(max_images=1)
    harness = Harness(network=network)
    harness.run()
    assert not harness.errors
    assert set(network.sizes) == {1, 2, 4}


def test_a_device_without_memory_for_a_single_image_fails_the_attempt() -> None:
    harness = Harness(network=FaultyNetwork(max_images=0))
    with pytest.raises(
        InternalError, match="11 of 11 images failed with a transient error, the first with: No memory for 1"
    ):
        harness.run()
    assert not harness.store.objects


@pytest.mark.parametrize("after_crash", [False, True], ids=["pipelined", "after crash"])
@pytest.mark.parametrize("error", [JobCanceled, AttemptFenced, None], ids=["canceled", "fenced", "late"])
def test_a_shard_that_has_to_stop_computes_no_further_groups_and_writes_nothing(
    error: type[GradcamError] | None, after_crash: bool
) -> None:
    deadline = Deadline(60)

    def stop(batches: int) -> None:
        if batches == 2:
            if error:
                deadline.cancel(error("to stop"))
            else:
                deadline._end_s -= 120

    network = FaultyNetwork(before=stop)
    images = {f"s3://in/{index}": IMAGES[uri(0)] for index in range(20 * GROUP)}
    harness = Harness(images, network)
    with pytest.raises(error or JobTimeout):
        harness.run(deadline=deadline, after_crash=after_crash)
    assert network.batches <= 2 + shards.GROUPS_COMPUTED_AT_ONCE
    assert not harness.store.objects
    harness.run(after_crash=after_crash)
    assert len(harness.explained) == 20 * GROUP, "the next attempt succeeds"


def test_a_shard_that_is_cancelled_when_it_reports_its_progress_stops() -> None:
    harness = Harness()

    def report(progress: Progress) -> None:
        if progress == Progress(f"explain {GROUP} of 40", RowState(done=GROUP)):
            message = "The job was cancelled on request."
            raise JobCanceled(message)

    shard = shard_of({}, rows=[{"uri": uri(0), "version": str(number)} for number in range(40)])
    with pytest.raises(JobCanceled):
        shards.run_shard(shard, harness.services, JobContext(Deadline(60), report))
    assert not harness.store.objects
    harness.run(shard)
    last = [progress for progress in harness.reported if progress.stage.startswith("explain ")][-1]
    assert last == Progress("explain 24 of 40", RowState(done=24))


@dataclass
class RecordingFetcher:
    """Records the reserved bytes at each fetch."""

    budgets: Budgets
    held_bytes: list[int] = field(default_factory=list)

    def fetch(self, image: ImageRef, deadline: Deadline, max_bytes: int | None = None) -> FetchedBytes:
        self.held_bytes.append(self.budgets.bytes.held)
        time.sleep(0.002)  # so that several readers fetch at once
        return MemoryImageFetcher(IMAGES).fetch(image, deadline, max_bytes)


@pytest.mark.parametrize("artifacts", [(), ({"kind": "overlay"},)], ids=["plain", "overlays"])
def test_readers_stay_within_the_memory_budgets_and_release_them(
    artifacts: tuple[dict[str, Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = 20 * 24
    budgets = Budgets(
        ResourceBudget(3000, "bytes"), ResourceBudget(2 * pixels, "pixels"), max_image_bytes=1000, threads=1
    )
    held: list[int] = []

    def recording_decode(data: bytes, *args: Any, **how: Any) -> Decoded:
        held.append(budgets.pixels.held)
        return decode(data, *args, **how)

    monkeypatch.setattr("gradcam_worker.images.prepare.decode", recording_decode)
    fetcher = RecordingFetcher(budgets)
    harness = Harness(fetcher=fetcher, others={"budgets": budgets})
    harness.run(
        shard_of(
            {}, rows=[{"uri": uri(0), "version": str(number)} for number in range(40)], artifacts=artifacts
        )
    )
    assert not harness.errors
    assert 1000 < max(fetcher.held_bytes) <= 3000
    assert pixels <= min(held) <= max(held) <= 2 * pixels
    assert (budgets.bytes.held, budgets.pixels.held) == (0, 0)
    assert len(fetcher.held_bytes) == 40 * (1 + len(artifacts))


def test_the_budgets_count_the_reader_threads_of_shards() -> None:
    budgets = service_factory.build_services(Settings(threads=4, shards=2)).budgets
    assert budgets.threads == 4 + 2 * READERS


def test_failed_rows_and_stopped_shards_release_their_reservations() -> None:
    budgets = Budgets(
        ResourceBudget(3000, "bytes"), ResourceBudget(10_000, "pixels"), max_image_bytes=1000, threads=1
    )
    deadline = Deadline(60)
    network = FaultyNetwork(before=lambda _: deadline.cancel(JobCanceled("to stop")))
    harness = Harness({**IMAGES, uri(3): b"text"}, network, others={"budgets": budgets})
    with pytest.raises(JobCanceled):
        harness.run(deadline=deadline)
    assert (budgets.bytes.held, budgets.pixels.held, budgets.bytes.waiting) == (0, 0, 0)


def test_overlays_have_the_file_names_of_a_job_and_do_not_change_the_results() -> None:
    plain, drawn = Harness(), Harness()
    plain.run()
    drawn.run(shard_of(IMAGES, artifacts=[{"kind": "overlay", "max_edge": 64}]))
    with_overlays, without = drawn.table, plain.table
    others = ["overlay", "row_digest"]
    assert with_overlays.drop_columns(others).equals(without.drop_columns(others))
    assert without["overlay"].null_count == len(without)
    uris = with_overlays["overlay"].to_pylist()
    assert len(set(uris)) == len(with_overlays) == 2 * len(IMAGES)
    keys = {key for key in drawn.store.objects if key.startswith("overlays/")}
    assert {overlay_uri.removeprefix("memory://") for overlay_uri in uris} == keys
    assert len({key.split("/")[1] for key in keys}) == len(IMAGES), "a folder for each row"
    assert all(key.split("/")[2].startswith("overlay-") for key in keys)
    assert all(cv2.imdecode(np.frombuffer(drawn.store.objects[key], np.uint8), 1) is not None for key in keys)


def test_metrics_are_measured_for_each_class_as_bulk_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness()
    run_exclusive, bulk_flags = harness.model_cache._batcher.run_exclusive, set()

    def recording_run(run: Callable[[], Any], deadline: Deadline, *, bulk: bool = False) -> Any:
        bulk_flags.add(bulk)
        return run_exclusive(run, deadline, bulk=bulk)

    monkeypatch.setattr(harness.model_cache._batcher, "run_exclusive", recording_run)
    harness.run(shard_of(IMAGES, metrics=["deletion", "insertion"]))
    for name in ("deletion", "insertion"):
        assert harness.table[name].null_count == 0
    assert bulk_flags == {True}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"weights_sha256": "0" * 64}, WeightsChecksumMismatch, "planned for weights of efficientnet_lite0"),
        ({"method": {"layer": "none"}}, UnknownLayer, "there is 'blocks'"),
        ({"target": {"classes": ["mauve"]}}, UnknownClass, "mauve"),
    ],
    ids=["weights", "layer", "class"],
)
def test_an_error_that_concerns_all_rows_fails_the_shard(
    changes: dict[str, Any], error: type[GradcamError], match: str
) -> None:
    harness = Harness()
    with pytest.raises(error, match=match):
        harness.run(shard_of(IMAGES, **changes))
    assert not harness.store.objects


def test_an_output_that_is_not_allowed_fails_the_shard_even_if_a_row_raises_it() -> None:
    class ForbiddenStore(MemoryStore):
        def put_many(self, objects: Any, deadline: Deadline, last: Any = None) -> list[str]:
            message = "Not there."
            raise OutputNotAllowed(message)

    harness = Harness(store=ForbiddenStore())
    with pytest.raises(OutputNotAllowed):
        harness.run(shard_of(IMAGES, artifacts=[{"kind": "overlay"}]))


def test_a_file_in_which_all_rows_failed_has_the_same_columns() -> None:
    good, failed, kept = Harness(), Harness({}), Harness()
    good.run()
    failed.run(shard_of({}, rows=[{"uri": "s3://in/none.png"}] * 3))
    assert failed.errors == dict.fromkeys(range(3), "image_not_found")
    assert failed.table.schema.remove_metadata().equals(good.table.schema.remove_metadata())
    metadata = [json.loads(harness.table.schema.metadata[b"gradcam"]) for harness in (good, failed)]
    assert [document["grid"] for document in metadata] == [[4, 4]] * 2
    assert [document["network"] for document in metadata] == [metadata[0]["network"]] * 2
    kept.store.objects[DATA] = failed.store.objects[DATA]
    kept.run(shard_of({}, rows=[{"uri": uri(0)}, {"uri": "s3://in/none.png"}, {"uri": uri(1)}], keep=True))
    assert kept.errors == {1: "image_not_found"}
    assert kept.explained == {0, 2}


def test_the_same_image_may_be_in_several_rows() -> None:
    harness = Harness()
    harness.run(shard_of({}, rows=[Row(uri=uri(0)).model_dump(exclude_none=True)] * 9))
    by_row: dict[int, list[Any]] = {}
    for record in harness.table.to_pylist():
        by_row.setdefault(record.pop("row"), []).append(record)
    assert len(by_row) == 9
    assert all(records == by_row[FIRST] for records in by_row.values())
