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

from gradcam_worker.errors import (
    AttemptFenced,
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
from gradcam_worker.execution.pipeline import JobContext, JobResult, Stage
from gradcam_worker.gradcam.decoding.decode import Decoded, decode
from gradcam_worker.gradcam.network import GRADCAM, Computed, Method, Network
from gradcam_worker.images.fetch import Fetched, UriFetcher
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.budget import Budgets, ResourceBudget
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.runtime import service_factory
from gradcam_worker.schemas.job import ImageRef, Job
from gradcam_worker.schemas.shard import READERS, Row, Shard, data_key, parse
from gradcam_worker.schemas.status import Problem, RowSearch, RowState
from gradcam_worker.settings import Settings
from gradcam_worker.storage.filesystem import Object
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.s3_errors import IdentityFailed
from gradcam_worker.testing import MemoryImageFetcher, MemoryStore, TinyNetwork, fake_services

GROUP = 4
KEY = "00000003-0123456789abcdef"
DATA, FAILED = f"data/{KEY}.parquet", f"failed/{KEY}.jsonl"
BACKFILL = "01234567-89ab-7def-8123-456789abcdef"
FIRST = 96


def png(color: tuple[int, int, int], size: tuple[int, int] = (20, 24)) -> bytes:
    """A picture (height, width) of one RGB colour with a bright patch: its heatmap has a peak."""
    pixels = np.full((*size, 3), 40, np.uint8)
    pixels[: size[0] // 2, size[1] // 2 :] = color[::-1]
    return cv2.imencode(".png", pixels)[1].tobytes()


def uri(place: int) -> str:
    return f"s3://in/{place}.png"


PICTURES: dict[str, bytes | BaseException] = {
    uri(place): png((25 * place, 255 - 20 * place, 13 * place % 256)) for place in range(11)
}


def shard_of(images: Mapping[str, Any], **changes: Any) -> Shard:
    fields: dict[str, Any] = {
        "schema": "gradcam.shard/v1",
        "backfill": BACKFILL,
        "index": 3,
        "key": KEY,
        "first": FIRST,
        "rows": [{"uri": one} for one in images],
        "network": "efficientnet_lite0",
        "target": {"top_n": 2},
        "output": "s3://out/set",
    }
    shard = parse({**fields, **changes})
    assert isinstance(shard, Shard)
    return shard


@dataclass
class Bench:
    """Everything that a shard touches, in memory."""

    images: dict[str, bytes | BaseException] = field(default_factory=lambda: dict(PICTURES))
    network: Network = field(default_factory=TinyNetwork)
    source: Any = None
    store: MemoryStore = field(default_factory=MemoryStore)
    group: int = GROUP
    checkpoints: list[Stage] = field(default_factory=list)
    reported: list[Stage] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model_cache = ModelCache(lambda _: self.network, max_batch=self.group)
        self.services = fake_services(
            self.images, **{"store": self.store, "model_cache": self.model_cache, **self.others}
        )
        if self.source:
            self.services = replace(self.services, images=self.source)

    def run(
        self, shard: Shard | None = None, *, deadline: Deadline | None = None, **context: Any
    ) -> JobResult:
        way = JobContext(
            deadline or Deadline(60), self.reported.append, checkpoint=self.checkpoints.append, **context
        )
        return shards.run_shard(shard or shard_of(self.images), self.services, way)

    @property
    def table(self) -> pa.Table:
        return pq.read_table(io.BytesIO(self.store.objects[DATA]))

    @property
    def errors(self) -> dict[int, str]:
        """Place -> code, of the rows that failed."""
        found = zip(self.table["row"].to_pylist(), self.table["error"].to_pylist(), strict=True)
        return {row - FIRST: code for row, code in found if code}

    @property
    def good(self) -> set[int]:
        """The places of the rows that were explained."""
        found = zip(self.table["row"].to_pylist(), self.table["error"].to_pylist(), strict=True)
        return {row - FIRST for row, code in found if not code}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "RETRY_ROWS_AFTER_S", 0)


@dataclass
class Flaky:
    """Images of which some fail for a moment so many times before they come."""

    images: Mapping[str, bytes | BaseException]
    failures: Counter[str]
    asked: Counter[str] = field(default_factory=Counter)

    def fetch(self, image: ImageRef, deadline: Deadline, at_most: int | None = None) -> Fetched:
        self.asked[image.uri] += 1
        if self.failures[image.uri]:
            self.failures[image.uri] -= 1
            message = f"{image.uri} could not be read (HTTP 503)."
            raise ImageFetchFailed(message)
        return MemoryImageFetcher(self.images).fetch(image, deadline, at_most)


@contextmanager
def others_at_work(bench: Bench) -> Iterator[None]:
    """Jobs of other people, merged into batches on the same device, for as long as the block takes."""
    stopped, done = threading.Event(), threading.Semaphore(0)
    size = bench.network.facts.input_size
    noise = np.random.default_rng(5).integers(0, 256, (8, *size, 3), np.uint8)

    def work(number: int) -> None:
        while not stopped.is_set():
            with bench.model_cache.reserve() as slot:
                slot.infer(bench.network, noise[number], (-1, -2), GRADCAM, Deadline(60))
            done.release()

    with ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work, number) for number in range(3)]
        for _ in range(3):
            assert done.acquire(timeout=60)
        try:
            yield
        finally:
            stopped.set()
    for one in working:
        one.result()


def check_same_bytes(images: dict[str, bytes | BaseException], network: Network, group: int) -> None:
    """However a shard is run, and whatever runs beside it, its file is the same."""

    def bench(**fields: Any) -> Bench:
        return Bench(dict(images), network, group=group, **fields)

    first = bench()
    first.run()
    expected = first.store.objects[DATA]
    assert not first.errors

    beside = bench()
    with others_at_work(beside):
        beside.run()
    assert beside.store.objects[DATA] == expected, "others at work"

    for search in (None, RowSearch(group=(0, 3)), RowSearch(row=99)):  # group by group, then row by row
        alone = bench()
        alone.run(after_crash=True, row_search=search)
        assert alone.store.objects[DATA] == expected, f"alone after {search}"

    uris = [*images]
    flaky = Flaky(images, Counter({uris[1]: 1, uris[2]: 1, uris[-1]: 2}))
    again = bench(source=flaky)
    again.run()
    assert [*again.errors] == [len(uris) - 1]
    assert again.store.objects[DATA] != expected
    again.run(shard_of(images, keep=True))
    assert again.store.objects[DATA] == expected, "rows that failed for a moment"
    assert flaky.asked[uris[0]] == 1, "what was there already is not computed again"
    assert FAILED not in again.store.objects


def test_a_shard_leaves_the_same_bytes_however_it_is_run() -> None:
    check_same_bytes(PICTURES, TinyNetwork(), GROUP)


@pytest.mark.tensorflow
def test_a_shard_of_a_real_network_leaves_the_same_bytes_and_says_what_a_manifest_says(photos: Path) -> None:
    from gradcam_worker.gradcam.models.loading import load_network

    network = load_network("efficientnet_lite0")
    files = sorted(photos.glob("*.jpg"))
    images: dict[str, bytes | BaseException] = {
        f"s3://in/{one.name}?{turn}": one.read_bytes() for turn in range(2) for one in files
    }
    check_same_bytes(images, network, 4)
    check_against_manifests(Bench(images, network, group=4))


def check_against_manifests(bench: Bench) -> None:
    """What a shard says of its images is what a job says of each, but for the last digits."""
    wish: list[dict[str, Any]] = [{"kind": "overlay", "box": True}, {"kind": "heatmap", "format": "npy"}]
    shard = shard_of(bench.images, target={"top_n": 2})
    bench.run(shard)
    records = bench.table.to_pylist()
    for place, image in enumerate(bench.images):
        job = Job.parse({"image": image, "network": shard.network, "target": {"top_n": 2}, "artifacts": wish})
        pipeline.run_job(job, bench.services, JobContext(Deadline(60), lambda _: None))
        manifest = json.loads(bench.store.objects[f"{job.id}/manifest.json"])
        heatmaps = np.load(io.BytesIO(bench.store.objects[f"{job.id}/heatmaps.npy"]))
        own = [one for one in records if one["row"] == FIRST + place]
        assert len(own) == len(manifest["explanations"]) == 2
        for index, (row, theirs) in enumerate(zip(own, manifest["explanations"], strict=True)):
            given = manifest["input"]
            assert row["index"] == index
            assert [row[name] for name in ("uri", "sha256", "width", "height")] == [
                given[name] for name in ("uri", "sha256", "width", "height")
            ]
            assert {"id": row["class_id"], "wnid": row["wnid"], "name": row["class_name"]} == theirs["class"]
            assert row["rank"] == theirs["rank"]
            assert row["probability"] == pytest.approx(theirs["probability"], rel=1e-4, abs=1e-6)
            assert row["raw_max"] == pytest.approx(theirs["raw_max"], rel=1e-3, abs=1e-5)
            assert row["raw_min"] == pytest.approx(theirs["raw_min"], rel=1e-3, abs=1e-5)
            np.testing.assert_allclose(np.float32(row["heatmap"]), heatmaps[index].ravel(), atol=2e-3)
            assert row["peak_xy"] == theirs["peak_xy"]
            hot = theirs["hot"]
            assert row["box_xyxy"] == (hot and pytest.approx(hot["box_xyxy"], abs=1))


def test_a_shard_says_of_each_image_what_its_manifest_says() -> None:
    check_against_manifests(Bench())


def test_a_photo_that_is_decoded_at_less_than_its_size_keeps_its_boxes_and_peaks_in_its_own_pixels() -> None:
    large = np.full((960, 1280, 3), 20, np.uint8)
    large[:480, 640:] = (0, 0, 255)
    photo = cv2.imencode(".jpg", large)[1].tobytes()
    bench = Bench({"s3://in/large.jpg": photo})
    bench.run(shard_of(bench.images, target={"classes": ["red"]}))
    (row,) = bench.table.to_pylist()
    assert (row["width"], row["height"]) == (1280, 960)
    left, top, right, bottom = row["box_xyxy"]
    assert 480 < left <= 640
    assert (top, right) == (0, 1280)
    assert 480 <= bottom < 640
    assert 640 < row["peak_xy"][0] < 1280
    assert 0 < row["peak_xy"][1] < 480


def problem(code: type[GradcamError] = InvalidRow) -> dict[str, Any]:
    return Problem.of(code("It names no image."), stage="plan", attempt=0).model_dump(mode="json")


def test_each_row_that_fails_says_why_and_disturbs_no_other() -> None:
    whole = png((9, 99, 199))
    images: dict[str, bytes | BaseException] = {
        uri(0): PICTURES[uri(0)],
        uri(2): PICTURES[uri(2)],
        "s3://in/text.png": b"this is no picture",
        "s3://in/half.png": whole[:-30],
        "s3://in/large.png": np.random.default_rng(0).bytes(5000),
    }
    few = Budgets(ResourceBudget(2**20, "bytes"), ResourceBudget(2**20, "pixels"), most_bytes=4000, threads=1)
    bench = Bench(images, others={"budgets": few})
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
    done = bench.run(shard_of({}, rows=rows))
    assert bench.errors == {
        1: "image_not_found",
        2: "unsupported_media_type",
        3: "image_decode_failed",
        4: "image_too_large",
        5: "invalid_row",
        6: "invalid_row",
    }
    assert bench.good == {0, 7}
    failed = [json.loads(line) for line in bench.store.objects[FAILED].splitlines()]
    assert {one["row"] - FIRST: one["error"]["code"] for one in failed} == bench.errors
    assert (failed[0]["image"], failed[0]["id"]) == ("s3://in/none.png", "gone")
    counts = Counter(bench.errors.values())
    assert (done.metrics["rows"], done.metrics["failed"]) == (8, 6)
    assert {code: done.metrics[f"failed_{code}"] for code in counts} == counts
    assert done.rows == RowState(failed=dict(counts))
    healthy = Bench({one["uri"]: PICTURES[uri(0)] for one in rows} | images)
    healthy.run(shard_of({}, rows=[rows[0], *[{"uri": uri(0)}] * 6, rows[7]]))
    for place in (0, 7):
        ours, theirs = (
            [one for one in each.table.to_pylist() if one["row"] == FIRST + place]
            for each in (bench, healthy)
        )
        assert ours == theirs


class Panic(BaseException):
    """As a library in Rust panics: no Exception."""


def test_whatever_a_row_raises_and_however_long_its_address_is_it_is_an_error_of_that_row() -> None:
    long = f"s3://in/{'x' * 66_000}"
    errors = (Panic("too long"), SystemExit(1), KeyboardInterrupt())
    odd = {f"s3://in/{type(one).__name__}": one for one in errors}
    bench = Bench({**PICTURES, **odd})
    bench.run(shard_of({}, rows=[{"uri": one} for one in (uri(0), *odd, long, uri(2))]))
    assert bench.errors == {1: "internal", 2: "internal", 3: "internal", 4: "invalid_row"}
    assert bench.good == {0, 5}
    failed = [json.loads(line) for line in bench.store.objects[FAILED].splitlines()]
    assert failed[0]["error"]["detail"] == "Unforeseen Panic: too long."
    assert failed[3]["error"]["detail"] == "Its URI has 66,008 bytes; at most 8,192 are allowed."


def test_a_checksum_that_is_not_the_images_is_an_error_of_its_row(s3_settings: Any) -> None:
    settings = Settings(**s3_settings)
    s3 = S3(settings)
    s3.client.put_object(Bucket="photos", Key="a.png", Body=PICTURES[uri(0)])
    rows = [{"uri": "s3://photos/a.png", "sha256": "0" * 64}, {"uri": "s3://photos/a.png"}]
    bench = Bench(source=UriFetcher(settings, s3))
    bench.run(shard_of({}, rows=rows))
    assert bench.errors == {0: "checksum_mismatch"}


def test_a_row_that_fails_for_a_moment_is_tried_a_second_time_and_no_more() -> None:
    flaky = Flaky(PICTURES, Counter({uri(1): 1, uri(5): 2}))
    bench = Bench(source=flaky)
    done = bench.run()
    assert bench.errors == {5: "image_fetch_failed"}
    assert (flaky.asked[uri(1)], flaky.asked[uri(5)], flaky.asked[uri(0)]) == (2, 2, 1)
    assert done.metrics["failed_image_fetch_failed"] == 1


@pytest.mark.parametrize("after_crash", [False, True], ids=["together", "alone"])
def test_where_most_rows_fail_for_a_moment_the_shard_is_tried_again_until_its_last_attempt(
    after_crash: bool,
) -> None:
    flaky = Flaky(PICTURES, Counter(dict.fromkeys([*PICTURES][:6], 3)))
    bench = Bench(source=flaky)
    with pytest.raises(ImageFetchFailed, match=r"6 of 11 images cannot be had just now.*HTTP 503"):
        bench.run(after_crash=after_crash)
    assert not bench.store.objects
    bench.run(is_last_attempt=True, after_crash=after_crash)
    assert bench.errors == dict.fromkeys(range(6), "image_fetch_failed")
    assert {flaky.asked[one] for one in [*PICTURES][:6]} == {3}


def test_a_proxy_that_refuses_one_address_fails_its_row_and_missing_keys_end_the_shard() -> None:
    def failed(cause: Exception) -> StorageUnavailable:
        error = StorageUnavailable(f"s3://in/2.png could not be read: {cause}")
        error.__cause__ = cause
        return error

    page = ClientError({"ResponseMetadata": {"HTTPStatusCode": 403}, "Error": {"Code": "403"}}, "GetObject")
    bench = Bench({**PICTURES, uri(2): failed(page)})
    bench.run()
    assert bench.errors == {2: "image_fetch_failed"}
    bench = Bench({**PICTURES, uri(2): failed(IdentityFailed("no keys"))})
    with pytest.raises(StorageUnavailable, match="no keys"):
        bench.run()


def test_bad_rows_of_the_plan_are_never_a_reason_to_try_again() -> None:
    rows = [{"uri": "?", "problem": problem(ImageFetchFailed)}] * 3 + [{"uri": uri(0)}]
    bench = Bench()
    bench.run(shard_of({}, rows=rows))
    assert bench.errors == dict.fromkeys(range(3), "image_fetch_failed")


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1 and nothing", b"no parquet", "another", "damaged", "columns"],
    ids=["empty", "cut", "other", "another_version", "damaged", "other_columns"],
)
def test_a_file_that_is_no_shards_is_neither_taken_over_nor_written_over(data: bytes | str) -> None:
    bench = Bench()
    bench.run()
    whole = bench.store.objects[DATA]
    table = bench.table
    if data == "another":
        data = _written(table.replace_schema_metadata({b"gradcam": b'{"schema": "gradcam.dataset/v9"}'}))
    elif data == "columns":
        data = _written(table.drop_columns(["overlay"]))
    elif data == "damaged":
        data = whole[:200] + bytes(300) + whole[500:]
    assert isinstance(data, bytes)
    bench.store.objects[DATA] = data
    with pytest.raises(StorageUnavailable, match="A shard's file is there, and cannot be read as one: "):
        bench.run(shard_of(PICTURES, keep=True))
    assert bench.store.objects[DATA] == data


def test_the_file_of_a_version_that_did_not_know_of_damage_is_taken_over() -> None:
    bench = Bench()
    bench.run()
    before = bench.table
    bench.store.objects[DATA] = _written(before.drop_columns(["missing"]))
    bench.run(shard_of(PICTURES, keep=True))
    assert bench.table.equals(before)


def test_a_row_tells_how_much_its_image_lacks_and_is_refused_where_that_is_too_much() -> None:
    grain = np.random.default_rng(4).integers(0, 256, (320, 400, 3), dtype=np.uint8)
    whole = cv2.imencode(".jpg", grain)[1].tobytes()
    images = {"a": whole, "b": whole[:-2], "c": whole[: len(whole) * 49 // 50], "d": whole[: len(whole) // 2]}
    bench = Bench({f"s3://in/{name}.jpg": data for name, data in images.items()})
    bench.run(shard_of(bench.images, target={"top_n": 1}))
    whole_one, no_end, cut, refused = bench.table["missing"].to_pylist()
    assert (whole_one, no_end, refused) == (None, 0, None)
    assert cut == pytest.approx(1 / 50, abs=0.02)
    assert bench.errors == {3: "image_decode_failed"}


def test_a_row_has_the_numbers_of_a_job_whatever_is_drawn_of_either() -> None:
    grain = np.random.default_rng(4).choice([0, 255], (700, 900, 3)).astype(np.uint8)
    grain[:, :450, 0] //= 2
    data = cv2.imencode(".jpg", grain, [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    one = "s3://in/noise.jpg"
    bench, drawn = Bench({one: data}), Bench({one: data})
    bench.run()
    drawn.run(shard_of({one: data}, artifacts=[{"kind": "overlay"}]))
    job = Job.parse({"image": one, "network": "efficientnet_lite0", "target": {"top_n": 2}})
    done = pipeline.run_job(job, bench.services, JobContext(Deadline(60), lambda _: None))
    for table in (bench.table, drawn.table):
        assert table["probability"].to_pylist() == pytest.approx(
            [one.probability for one in done.predictions], rel=1e-6
        )


def _written(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


@dataclass
class Watched(MemoryStore):
    """A store that remembers in which order it was written, and may stop taking anything."""

    order: list[str] = field(default_factory=list)
    broken: str = ""

    def put_many(self, objects: Any, deadline: Deadline) -> list[str]:
        found: list[Object] = list(objects)
        for key, _, _ in found:
            if self.broken and key.startswith(self.broken):
                message = f"{key} could not be written: the disk is full."
                raise StorageUnavailable(message)
            self.order.append(key.partition("/")[0])
        return super().put_many(found, deadline)


def test_the_file_is_written_last_and_a_shard_whose_file_is_there_is_done() -> None:
    store = Watched(broken="data")
    bench = Bench({**PICTURES, "s3://in/text.png": b"text"}, store=store)
    shard = shard_of(bench.images, artifacts=[{"kind": "overlay"}])
    with pytest.raises(StorageUnavailable):
        bench.run(shard)
    assert DATA not in store.objects
    store.broken, store.order = "", []
    first = bench.run(shard)
    assert store.order[-2:] == ["failed", "data"]
    assert set(store.order[:-2]) == {"overlays"}

    def never(_: object) -> Network:
        message = "nothing is to be computed"
        raise AssertionError(message)

    store.order = []
    idle = Bench({}, store=store, others={"model_cache": ModelCache(never)})
    again = idle.run(shard)
    assert not store.order
    assert (again.result, again.network) == (first.result, first.network)
    assert {**again.metrics} == {**first.metrics}
    assert again.result.manifest_sha256 == hashlib.sha256(store.objects[DATA]).hexdigest()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backfill": "01234567-89ab-7def-8123-000000000000"}, f"backfill {BACKFILL}"),
        ({"weights_sha256": "0" * 64}, "weights None"),
        ({"key": "00000003-fedcba9876543210"}, f"the shard {KEY}"),
    ],
    ids=["another backfill", "other weights", "other rows"],
)
@pytest.mark.parametrize("keep", [False, True])
def test_a_file_that_was_made_for_another_shard_is_never_taken_for_this_ones(
    change: dict[str, Any], said: str, keep: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="gradcam")
    bench = Bench()
    bench.run()
    stale = bench.store.objects[DATA]
    asked = shard_of({**PICTURES, uri(0): PICTURES[uri(1)]}, **change, keep=keep)
    bench.store.objects[data_key(asked.key)] = stale
    network = TinyNetwork()
    network.facts = replace(network.facts, weights_sha256=asked.weights_sha256)
    again = Bench(network=network, store=bench.store)
    done = again.run(asked)
    assert f"was made for {said}, and will be replaced" in caplog.text
    written = again.store.objects[data_key(asked.key)]
    assert written != stale
    assert done.result.manifest_sha256 == hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize("mended", [1, 2], ids=["one of two", "both"])
def test_whoever_dies_between_two_files_of_a_shard_that_is_mended_hides_no_failure(mended: int) -> None:
    def bench(missing: int) -> Bench:
        return Bench({uri(place): PICTURES[uri(place)] for place in range(missing, 6)}, store=store)

    store = Watched()
    shard = shard_of({uri(place): b"" for place in range(6)})
    bench(2).run(shard)
    before = store.objects[FAILED]
    assert len(before.splitlines()) == 2
    store.broken = "data"
    with pytest.raises(StorageUnavailable):
        bench(2 - mended).run(shard.model_copy(update={"keep": True}))
    assert store.objects[FAILED] == before, "what it says of the file that is there is true"


def test_a_shard_that_was_overtaken_while_it_computed_writes_nothing() -> None:
    def checkpoint(stage: Stage) -> None:
        message = f"overtaken at {stage.stage}"
        raise AttemptFenced(message)

    bench = Bench()
    with pytest.raises(AttemptFenced, match="at upload"):
        shards.run_shard(
            shard_of(PICTURES),
            bench.services,
            JobContext(Deadline(60), lambda _: None, checkpoint=checkpoint),
        )
    assert not bench.store.objects


def test_failed_rows_of_an_attempt_before_are_forgotten_when_none_fails_any_more() -> None:
    store = Watched(broken="data")
    flaky = Flaky(PICTURES, Counter({uri(2): 2}))
    bench = Bench(source=flaky, store=store)
    with pytest.raises(StorageUnavailable):
        bench.run()
    assert FAILED in store.objects
    store.broken = ""
    bench.run()
    assert [*store.objects] == [DATA]


class Died(AttemptFenced):
    """The end of a process: ends a shard at once, whichever row meets it."""


@dataclass
class Poisoned:
    """Images of which some end the process that decodes them."""

    poison: frozenset[str]

    def fetch(self, image: ImageRef, deadline: Deadline, at_most: int | None = None) -> Fetched:
        if image.uri in self.poison:
            raise Died
        return MemoryImageFetcher(PICTURES).fetch(image, deadline, at_most)


def attempts(bench: Bench) -> list[RowSearch | None]:
    """Run a shard, one process after the other, until it is done; what each knew at its start."""
    searches: list[RowSearch | None] = [None]
    while len(searches) < 20:
        bench.checkpoints.clear()
        try:
            bench.run(after_crash=len(searches) > 1, row_search=searches[-1])
        except Died:
            rows = bench.checkpoints[-1].rows if bench.checkpoints else None
            searches.append(rows.search if rows else None)
        else:
            break
    return searches


def test_a_row_that_kills_its_process_is_found_and_left_out_and_its_neighbours_are_there() -> None:
    bench = Bench(source=Poisoned(frozenset({uri(6)})))
    assert attempts(bench) == [None, None, RowSearch(group=(4, 7)), RowSearch(row=6)]
    assert bench.errors == {6: "worker_lost"}
    assert bench.good == {*range(11)} - {6}
    healthy = Bench()
    healthy.run()
    others = [one for one in healthy.table.to_pylist() if one["row"] != FIRST + 6]
    assert [one for one in bench.table.to_pylist() if not one["error"]] == others


def test_as_many_poisonous_rows_as_attempts_allow_are_left_out() -> None:
    bench = Bench(source=Poisoned(frozenset(map(uri, (0, 5, 6, 10)))))
    searches = attempts(bench)
    assert len(searches) <= shard_of(PICTURES).max_attempts
    assert searches[-1] == RowSearch(row=10, left_out=(6, 5, 0))
    assert bench.errors == dict.fromkeys((0, 5, 6, 10), "worker_lost")


def test_a_shard_of_nothing_but_poison_is_done_too() -> None:
    bench = Bench({uri(6): b""}, source=Poisoned(frozenset({uri(6)})))
    assert len(attempts(bench)) == 4
    assert (bench.errors, bench.good) == ({0: "worker_lost"}, set())


@dataclass(eq=False)
class Odd(TinyNetwork):
    """A tiny network that can be told what to do in a pass, and cannot stand white."""

    before: Callable[[int], None] = lambda _: None  # told how many passes there were
    room: int = 1000
    raises: bool = False
    passes: int = 0
    sizes: list[int] = field(default_factory=list)

    def compute(
        self, pixels: NDArray[np.uint8], wanted: NDArray[np.int32], method: Method = GRADCAM
    ) -> Computed:
        self.passes += 1
        self.sizes.append(len(pixels))
        self.before(self.passes)
        if len(pixels) > self.room:
            message = f"No memory for {len(pixels)} images."
            raise DeviceOutOfMemory(message)
        white = pixels.min(axis=(1, 2, 3)) > 250
        if self.raises and white.any():
            message = "white"
            raise ValueError(message)
        found = super().compute(pixels, wanted, method)
        found.scores[white] = np.nan
        return found


WHITE = cv2.imencode(".png", np.full((20, 20, 3), 255, np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("raises", "code"), [(True, "internal"), (False, "network_incompatible")], ids=["raises", "nan"]
)
def test_what_one_image_does_to_the_network_is_an_error_of_that_image_alone(raises: bool, code: str) -> None:
    images = {**PICTURES, uri(5): WHITE}
    bench = Bench(images, Odd(raises=raises))
    bench.run()
    assert bench.errors == {5: code}
    healthy = Bench()
    healthy.run()
    others = [one for one in healthy.table.to_pylist() if one["row"] != FIRST + 5]
    assert [one for one in bench.table.to_pylist() if not one["error"]] == others


def test_a_pass_that_does_not_fit_into_memory_is_made_smaller_and_no_row_fails_for_it() -> None:
    network = Odd(room=1)
    bench = Bench(network=network)
    bench.run()
    assert not bench.errors
    assert set(network.sizes) == {1, 2, 4}


def test_a_device_without_memory_for_a_single_image_is_a_reason_to_try_the_shard_again() -> None:
    bench = Bench(network=Odd(room=0))
    with pytest.raises(InternalError, match="11 of 11 images cannot be had just now, as: No memory for 1"):
        bench.run()
    assert not bench.store.objects


@pytest.mark.parametrize("after_crash", [False, True], ids=["together", "alone"])
@pytest.mark.parametrize("why", [JobCanceled, AttemptFenced, None], ids=["canceled", "fenced", "late"])
def test_a_shard_that_is_to_stop_stops_within_the_groups_at_hand_and_writes_nothing(
    why: type[GradcamError] | None, after_crash: bool
) -> None:
    deadline = Deadline(60)

    def stop(passes: int) -> None:
        if passes == 2:
            if why:
                deadline.cancel(why("to stop"))
            else:
                deadline.extend(-120)

    network = Odd(before=stop)
    images = {f"s3://in/{place}": PICTURES[uri(0)] for place in range(20 * GROUP)}
    bench = Bench(images, network)
    with pytest.raises(why or JobTimeout):
        bench.run(deadline=deadline, after_crash=after_crash)
    assert network.passes <= 2 + shards.GROUPS_COMPUTED_AT_ONCE
    assert not bench.store.objects
    bench.run(after_crash=after_crash)
    assert len(bench.good) == 20 * GROUP, "handed back, it runs again"


def test_a_report_that_says_stop_stops_the_shard() -> None:
    bench = Bench()

    def report(stage: Stage) -> None:
        if stage == Stage(f"explain {GROUP} of 40", RowState(done=GROUP)):
            message = "The job was cancelled on request."
            raise JobCanceled(message)

    shard = shard_of({}, rows=[{"uri": uri(0)}] * 40)
    with pytest.raises(JobCanceled):
        shards.run_shard(shard, bench.services, JobContext(Deadline(60), report))
    assert not bench.store.objects
    bench.run(shard)
    last = [one for one in bench.reported if one.stage.startswith("explain ")][-1]
    assert last == Stage("explain 24 of 40", RowState(done=24))


@dataclass
class Held:
    """Images that note what is held of the rooms as they are fetched."""

    budgets: Budgets
    bytes: list[int] = field(default_factory=list)

    def fetch(self, image: ImageRef, deadline: Deadline, at_most: int | None = None) -> Fetched:
        self.bytes.append(self.budgets.bytes.held)
        time.sleep(0.002)  # so that readers meet
        return MemoryImageFetcher(PICTURES).fetch(image, deadline, at_most)


@pytest.mark.parametrize("artifacts", [(), ({"kind": "overlay"},)], ids=["plain", "overlays"])
def test_readers_wait_for_room_in_memory_and_leave_it(
    artifacts: tuple[dict[str, Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = 20 * 24
    budgets = Budgets(
        ResourceBudget(3000, "bytes"), ResourceBudget(2 * pixels, "pixels"), most_bytes=1000, threads=1
    )
    held: list[int] = []

    def noted(data: bytes, *args: Any, **how: Any) -> Decoded:
        held.append(budgets.pixels.held)
        return decode(data, *args, **how)

    monkeypatch.setattr("gradcam_worker.images.prepare.decode", noted)
    source = Held(budgets)
    bench = Bench(source=source, others={"budgets": budgets})
    bench.run(shard_of({}, rows=[{"uri": uri(0)}] * 40, artifacts=artifacts))
    assert not bench.errors
    assert 1000 < max(source.bytes) <= 3000
    assert pixels <= min(held) <= max(held) <= 2 * pixels
    assert (budgets.bytes.held, budgets.pixels.held) == (0, 0)
    assert len(source.bytes) == 40 * (1 + len(artifacts))


def test_readers_of_shards_have_their_share_of_room_so_that_no_job_waits_for_them() -> None:
    budgets = service_factory.build_services(Settings(threads=4, shards=2)).budgets
    assert budgets.threads == 4 + 2 * READERS


def test_rooms_are_left_by_rows_that_fail_and_shards_that_stop() -> None:
    budgets = Budgets(
        ResourceBudget(3000, "bytes"), ResourceBudget(10_000, "pixels"), most_bytes=1000, threads=1
    )
    deadline = Deadline(60)
    network = Odd(before=lambda _: deadline.cancel(JobCanceled("to stop")))
    bench = Bench({**PICTURES, uri(3): b"text"}, network, others={"budgets": budgets})
    with pytest.raises(JobCanceled):
        bench.run(deadline=deadline)
    assert (budgets.bytes.held, budgets.pixels.held, budgets.bytes.waiting) == (0, 0, 0)


def test_overlays_lie_under_the_keys_of_a_job_and_change_no_number() -> None:
    plain, drawn = Bench(), Bench()
    plain.run()
    drawn.run(shard_of(PICTURES, artifacts=[{"kind": "overlay", "max_edge": 64}]))
    ours, theirs = drawn.table, plain.table
    assert ours.drop_columns(["overlay"]).equals(theirs.drop_columns(["overlay"]))
    assert theirs["overlay"].null_count == len(theirs)
    found = ours["overlay"].to_pylist()
    assert len(set(found)) == len(ours) == 2 * len(PICTURES)
    keys = {key for key in drawn.store.objects if key.startswith("overlays/")}
    assert {one.removeprefix("memory://") for one in found} == keys
    assert len({key.split("/")[1] for key in keys}) == len(PICTURES), "a folder for each row"
    assert all(key.split("/")[2].startswith("overlay-") for key in keys)
    assert all(cv2.imdecode(np.frombuffer(drawn.store.objects[key], np.uint8), 1) is not None for key in keys)


def test_metrics_stand_beside_each_class_and_wait_behind_the_urgent(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    alone, patient = bench.model_cache._batcher.run_exclusive, set()

    def noted(run: Callable[[], Any], deadline: Deadline, *, bulk: bool = False) -> Any:
        patient.add(bulk)
        return alone(run, deadline, bulk=bulk)

    monkeypatch.setattr(bench.model_cache._batcher, "run_exclusive", noted)
    bench.run(shard_of(PICTURES, metrics=["deletion", "insertion"]))
    for name in ("deletion", "insertion"):
        assert bench.table[name].null_count == 0
    assert patient == {True}


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"weights_sha256": "0" * 64}, WeightsChecksumMismatch, "planned for weights of efficientnet_lite0"),
        ({"method": {"layer": "none"}}, UnknownLayer, "there is 'blocks'"),
        ({"target": {"classes": ["mauve"]}}, UnknownClass, "mauve"),
    ],
    ids=["weights", "layer", "class"],
)
def test_what_no_row_is_to_blame_for_ends_the_shard(
    changes: dict[str, Any], error: type[GradcamError], match: str
) -> None:
    bench = Bench()
    with pytest.raises(error, match=match):
        bench.run(shard_of(PICTURES, **changes))
    assert not bench.store.objects


def test_a_place_that_may_not_be_written_ends_the_shard_though_a_row_meets_it_first() -> None:
    class Refusing(MemoryStore):
        def put_many(self, objects: Any, deadline: Deadline) -> list[str]:
            message = "Not there."
            raise OutputNotAllowed(message)

    bench = Bench(store=Refusing())
    with pytest.raises(OutputNotAllowed):
        bench.run(shard_of(PICTURES, artifacts=[{"kind": "overlay"}]))


def test_a_file_of_which_all_rows_failed_has_the_columns_of_every_other() -> None:
    good, bad, kept = Bench(), Bench({}), Bench()
    good.run()
    bad.run(shard_of({}, rows=[{"uri": "s3://in/none.png"}] * 3))
    assert bad.errors == dict.fromkeys(range(3), "image_not_found")
    assert bad.table.schema.remove_metadata().equals(good.table.schema.remove_metadata())
    facts = [json.loads(one.table.schema.metadata[b"gradcam"]) for one in (good, bad)]
    assert [one["grid"] for one in facts] == [[4, 4]] * 2
    assert [one["network"] for one in facts] == [facts[0]["network"]] * 2
    kept.store.objects[DATA] = bad.store.objects[DATA]
    kept.run(shard_of({}, rows=[{"uri": uri(0)}, {"uri": "s3://in/none.png"}, {"uri": uri(1)}], keep=True))
    assert kept.errors == {1: "image_not_found"}
    assert kept.good == {0, 2}


def test_a_row_of_the_input_may_be_its_own_neighbour() -> None:
    bench = Bench()
    bench.run(shard_of({}, rows=[Row(uri=uri(0)).model_dump(exclude_none=True)] * 9))
    by_row: dict[int, list[Any]] = {}
    for one in bench.table.to_pylist():
        by_row.setdefault(one.pop("row"), []).append(one)
    assert len(by_row) == 9
    assert all(one == by_row[FIRST] for one in by_row.values())
