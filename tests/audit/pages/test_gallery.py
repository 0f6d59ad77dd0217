"""The gallery page of a dataset, without a browser; with one: see tests/live/test_gallery_page.py."""

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray

from gradcam_worker.artifacts.dataset import ExplainedRow, Outcome, read_batches, to_bytes
from gradcam_worker.audit.dataset.statistics import read_statistics
from gradcam_worker.audit.pages import gallery as module
from gradcam_worker.audit.pages.gallery import Gallery, GalleryOptions, gallery
from gradcam_worker.cli.main import main
from gradcam_worker.errors import ImageNotFound, InvalidInput
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.explain import Explanation, Prediction
from gradcam_worker.gradcam.imaging.overlay import encode
from gradcam_worker.images.fetch import UriFetcher
from gradcam_worker.operations.servers import S3Server
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.manifest import InputRecord
from gradcam_worker.schemas.options import Target
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.schemas.status import NetworkRef, Problem
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.testing import MemoryImageFetcher, MemoryStore, TinyNetwork

NETWORK = NetworkRef(name="efficientnet_lite0", layer="blocks", weights_sha256=None)
NAMES = {1: "tabby_cat", 2: "lynx", 3: "</script><script>alert('\"&')"}
ExplainedClass = tuple[int, int, float, NDArray[np.float32]]  # class, rank, probability, heatmap


def photo(seed: int, size: tuple[int, int] = (300, 400)) -> bytes:
    """A photo (height, width) with some detail."""
    rng = np.random.default_rng(seed)
    return encode(
        np.kron(rng.integers(0, 256, (size[0] // 4, size[1] // 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    )


PHOTOS = {f"s3://photos/{number}.jpg": photo(number) for number in range(8)}


def explained_image(uri: str, classes: Sequence[ExplainedClass], data: bytes | None = None) -> ExplainedRow:
    data = PHOTOS[uri] if data is None else data
    explained = tuple(
        Prediction(rank, class_id, f"n{class_id}", NAMES[class_id], p) for class_id, rank, p, _ in classes
    )
    raw = np.zeros(len(classes), np.float32)
    heatmaps = np.stack([heatmap for *_, heatmap in classes])
    record = InputRecord(
        uri=uri,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        media_type="image/jpeg",
        width=400,
        height=300,
    )
    explanation = Explanation(TinyNetwork.facts, "blocks", explained, explained, heatmaps, raw, raw)
    return ExplainedRow(record, explanation, [None] * len(classes), [None] * len(classes))


def file(
    outcomes: Sequence[tuple[str, Outcome]],
    first: int = 0,
    grid: tuple[int, int] = (4, 4),
    against: tuple[int | str, ...] | None = None,
) -> bytes:
    """A shard's file with these outcomes of the images at these URIs."""
    rows = tuple(Row(uri=uri, id=f"id-{first + index}") for index, (uri, _) in enumerate(outcomes))
    shard = Shard(
        backfill=new_id(),
        index=first,
        key=f"{first:08d}-{'0' * 16}",
        first=first,
        rows=rows,
        network=NETWORK.name,
        target=Target(top_n=2, against=against),
        output="s3://results/cams",
    )
    return to_bytes(shard, NETWORK, grid, [outcome for _, outcome in outcomes])[0]


def cells(value: float) -> NDArray[np.float32]:
    """A heatmap that is `value` in one half, and 1 in one cell."""
    heatmap = np.zeros((4, 4), np.float32)
    heatmap[:2] = value
    heatmap[3, 3] = 1
    return heatmap


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[str, Outcome]]:
    """Eight images: class 1 first in five of them, class 2 in three, class 3 always last."""
    outcomes: list[tuple[str, Outcome]] = []
    for index, uri in enumerate(PHOTOS):
        confidence = 0.9 - 0.05 * index
        first, second = (1, 2) if index < 5 else (2, 1)
        classes = [
            (first, 1, confidence, cells(confidence)),
            (second, 2, 0.99 - confidence, cells(0.5)),
            (3, 3, 0.001, cells(0)),
        ]
        outcomes.append((uri, explained_image(uri, classes)))
    return outcomes


@pytest.fixture
def store(outcomes: list[tuple[str, Outcome]]) -> MemoryStore:
    problem = Problem.of(ImageNotFound("There is nothing."), stage="fetch", attempt=1)
    first, second = file([*outcomes[:5], ("s3://photos/gone.jpg", problem)]), file(outcomes[5:], first=6)
    return MemoryStore(
        {"data/a.parquet": first, "data/b.parquet": second, "data/.x.part": b"", "dataset.json": b"{}"}
    )


def make_gallery(store: MemoryStore, images: Any = PHOTOS, **options: Any) -> Gallery:
    return gallery(store, MemoryImageFetcher(images), Limits(), GalleryOptions(**options))


def data_of(page: bytes) -> dict[str, Any]:
    block = page.partition(b'id="data">')[2].partition(b"</script>")[0]
    return dict(json.loads(block))


def values(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), "<u2").reshape(4, 4) / 65_535


class TestClasses:
    def test_classes_that_came_first_most_often_are_listed_first_with_their_counts(
        self, store: MemoryStore
    ) -> None:
        page_data = data_of(make_gallery(store).page)
        counts = [
            (entry["id"], entry["name"], entry["first"], entry["count"]) for entry in page_data["classes"]
        ]
        assert counts == [(1, "tabby cat", 5, 8), (2, "lynx", 3, 8), (3, NAMES[3], 0, 8)]
        facts = dict(page_data["facts"])
        assert (facts["Images"], facts["Failed"]) == ("9", "image_not_found 1")
        assert facts["Network, layer"] == "efficientnet_lite0, blocks"
        assert "Incomplete" not in facts

    def test_a_page_says_against_which_classes_others_were_explained(
        self, outcomes: list[tuple[str, Outcome]]
    ) -> None:
        store = MemoryStore({"data/a.parquet": file(outcomes, against=("crane, bird", 3))})
        page_data = data_of(make_gallery(store).page)
        assert dict(page_data["facts"])["Against"] == "crane, bird, 3"
        assert (
            "counts for the class, rather than for those that it is explained against" in page_data["about"]
        )

    def test_the_mean_heatmap_is_divided_by_its_peak(
        self, store: MemoryStore, outcomes: list[tuple[str, Outcome]]
    ) -> None:
        class_data = data_of(make_gallery(store).page)["classes"][0]
        maps = [
            outcome.explanation.heatmaps[index]
            for _, outcome in outcomes
            if isinstance(outcome, ExplainedRow)
            for index, prediction in enumerate(outcome.explanation.explained)
            if prediction.id == 1
        ]
        mean = np.mean(maps, axis=0)
        assert_allclose(values(class_data["mean"]), mean / mean.max(), atol=1e-3)
        assert class_data["percent"] == "64.6 %"

    def test_classes_are_named_by_id_wnid_or_name(self, store: MemoryStore) -> None:
        page_data = data_of(make_gallery(store, classes=("Tabby-Cat", "n2", "1")).page)
        assert [entry["id"] for entry in page_data["classes"]] == [1, 2]
        assert dict(page_data["facts"])["Classes"] == "2 of 3"
        assert make_gallery(store, max_classes=1).classes == 1

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (("tabby_bat",), "No image was explained for a class 'tabby_bat'. Near: tabby_cat"),
            (("999",), "class '999'"),
            ((), "The list of classes is empty"),
        ],
    )
    def test_unknown_classes_are_refused(
        self, store: MemoryStore, names: tuple[str, ...], expected: str
    ) -> None:
        with pytest.raises(InvalidInput, match=re.escape(expected)):
            make_gallery(store, classes=names)


class TestImages:
    def test_the_most_and_least_confident_images_are_shown_and_none_twice(self, store: MemoryStore) -> None:
        first = data_of(make_gallery(store, per_class=2).page)["classes"][0]
        rows = [
            [(row["row"], row["percent"], row["rank"]) for row in entry["rows"]] for entry in first["groups"]
        ]
        assert rows == [[(0, "90.0 %", 1), (1, "85.0 %", 1)], [(4, "70.0 %", 1), (3, "75.0 %", 1)]]
        all_rows = data_of(make_gallery(store, per_class=100).page)["classes"][0]
        assert [entry["title"] for entry in all_rows["groups"]] == ["Most confident"]
        assert [row["row"] for row in all_rows["groups"][0]["rows"]] == [0, 1, 2, 3, 4, 8, 7, 6]

    def test_a_row_is_shown_with_its_image_and_heatmap(self, store: MemoryStore) -> None:
        page_data = data_of(make_gallery(store).page)
        row = page_data["classes"][1]["groups"][0]["rows"][0]
        assert (row["row"], row["id"], row["uri"]) == (6, "id-6", "s3://photos/5.jpg")
        assert_allclose(values(row["heatmap"]), cells(0.65), atol=1e-3)
        photo_data = page_data["photos"][row["photo"]]
        pixels = decode(base64.b64decode(photo_data["jpeg"])).pixels
        assert pixels.shape == (photo_data["height"], photo_data["width"], 3) == (192, 256, 3)
        original = decode(PHOTOS[row["uri"]]).pixels
        assert_allclose(pixels.mean((0, 1)), original.mean((0, 1)), atol=2)

    def test_an_image_is_embedded_once_for_all_its_classes(self, store: MemoryStore) -> None:
        result = make_gallery(store, per_class=100)
        assert result.pictures == 24
        assert len(data_of(result.page)["photos"]) == 8

    def test_a_deleted_or_changed_image_is_shown_as_a_heatmap_with_the_reason(
        self, store: MemoryStore, settings: Settings, s3_server: S3Server, s3_settings: dict[str, Any]
    ) -> None:
        real = settings.model_copy(update=s3_settings)
        s3 = S3(real)
        for uri, data in PHOTOS.items():
            s3.client.put_object(Bucket="photos", Key=uri.rpartition("/")[2], Body=data)
        s3.client.delete_object(Bucket="photos", Key="0.jpg")
        s3.client.put_object(Bucket="photos", Key="1.jpg", Body=photo(99))
        result = gallery(store, UriFetcher(real, s3), Limits(), GalleryOptions())
        page_data = data_of(result.page)
        deleted, changed = page_data["classes"][0]["groups"][0]["rows"][:2]
        assert page_data["photos"][deleted["photo"]]["code"] == "image_not_found"
        assert "s3://photos/0.jpg" in page_data["photos"][deleted["photo"]]["detail"]
        assert page_data["photos"][changed["photo"]]["code"] == "checksum_mismatch"
        assert values(deleted["heatmap"]).max() == 1
        assert (deleted["width"], deleted["height"]) == (256, 192)
        assert result.missing == {"image_not_found": 1, "checksum_mismatch": 1}

    def test_the_page_does_not_depend_on_how_the_dataset_is_split_into_files(
        self, store: MemoryStore, outcomes: list[tuple[str, Outcome]]
    ) -> None:
        single_file = MemoryStore({"data/all.parquet": file(outcomes)})
        split = {
            f"data/{index}.parquet": file([outcomes[index]], first=index) for index in range(len(outcomes))
        }
        assert make_gallery(single_file).page == make_gallery(MemoryStore(split)).page

    def test_only_heatmaps_of_chosen_rows_are_kept(self, store: MemoryStore) -> None:
        statistics = read_statistics(store, 2)
        for summary in statistics.classes.values():
            assert (len(summary.most_confident), len(summary.least_confident)) == (2, 4)
            assert all(row.heatmap.base is None for row in summary.most_confident), (
                "not a view of its whole batch"
            )

    def test_a_file_is_read_in_parts(self, outcomes: list[tuple[str, Outcome]]) -> None:
        data = file(outcomes)
        parts = list(read_batches(data, max_rows=5))
        assert [len(part.class_ids) for part in parts] == [5, 5, 5, 5, 4]
        (whole,) = read_batches(data)
        assert_allclose(np.concatenate([part.heatmaps for part in parts]), whole.heatmaps)
        assert whole.record(3)["uri"] == "s3://photos/1.jpg"


class TestSize:
    def test_photos_are_shrunk_so_that_a_page_stays_below_its_limit(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        result = make_gallery(store)
        base = len(result.page) - sum(
            len(photo_data["jpeg"]) for photo_data in data_of(result.page)["photos"]
        )
        for room in (60_000, 24_000):
            monkeypatch.setattr(module, "MAX_PAGE_BYTES", base + room)
            page = make_gallery(store).page
            assert base < len(page) < base + room
            assert {photo_data.get("width", 0) for photo_data in data_of(page)["photos"]} <= {
                64,
                96,
                128,
                192,
            }
        monkeypatch.setattr(module, "MAX_PAGE_BYTES", base)
        assert make_gallery(store).missing == {"too_many_pictures": 8}

    def test_more_pictures_than_a_page_may_have_are_refused(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MAX_PICTURES", 23)
        with pytest.raises(InvalidInput, match="24 pictures, and a page may have 23: show fewer classes"):
            make_gallery(store, per_class=8)


class TestSafety:
    def test_text_of_a_dataset_is_escaped(self, store: MemoryStore) -> None:
        page = make_gallery(store).page
        assert data_of(page)["classes"][2]["name"] == NAMES[3]
        block = page.partition(b'id="data">')[2].partition(b"</script>")[0]
        assert not re.search(rb"[<>&\x80-\xff]", block)
        assert page.replace(block, b"") == make_gallery(store, classes=("1",)).page.replace(
            make_gallery(store, classes=("1",)).page.partition(b'id="data">')[2].partition(b"</script>")[0],
            b"",
        )

    def test_the_policy_allows_only_the_style_and_script_of_the_page(self, store: MemoryStore) -> None:
        page = make_gallery(store).page.decode()

        def digest(tag: str) -> str:
            (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
            return base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()

        policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
        own = f"style-src 'sha256-{digest('style')}'; script-src 'sha256-{digest('script')}'"
        assert policy == [f"default-src 'none'; img-src data:; {own}; base-uri 'none'; form-action 'none'"]

    def test_the_template_has_no_address_and_builds_no_markup(self) -> None:
        template = "".join(
            (DATA / name).read_text()
            for name in ("page_head.html", "page.css", "gallery.html", "gradcam-viewer.js")
        )
        template = template.replace("http://www.w3.org/2000/svg", "")  # a name, which nobody asks for
        for forbidden in (
            "http://",
            "https://",
            "//cdn",
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "eval(",
        ):
            assert forbidden not in template
        assert not re.search(r"\son\w+=|\sstyle=|document\.write", template)


def other_grid(outcomes: list[tuple[str, Outcome]]) -> MemoryStore:
    other = explained_image("s3://photos/0.jpg", [(1, 1, 0.5, np.ones((2, 8), np.float32))])
    return MemoryStore(
        {
            "data/a": b"",
            "data/a.parquet": file(outcomes),
            "data/b.parquet": file([("s3://x/y", other)], grid=(2, 8)),
        }
    )


def another_version(outcomes: list[tuple[str, Outcome]]) -> MemoryStore:
    table, new = pq.read_table(io.BytesIO(file(outcomes))), io.BytesIO()
    facts = table.schema.metadata[b"gradcam"].replace(b"dataset/v1", b"dataset/v2")
    pq.write_table(table.replace_schema_metadata({b"gradcam": facts}), new)
    return MemoryStore({"data/a.parquet": new.getvalue()})


def all_failed(_: object) -> MemoryStore:
    problem = Problem.of(ImageNotFound("There is nothing."), stage="fetch", attempt=1)
    return MemoryStore({"data/a.parquet": file([("s3://photos/gone.jpg", problem)] * 3)})


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (lambda _: MemoryStore(), "There is no dataset at memory://data"),
        (lambda _: MemoryStore({"data/a.csv": b"x", "a.parquet": b"x"}), "There is no dataset"),
        (lambda _: MemoryStore({"data/a.parquet": b""}), "memory://data/a.parquet is no part of a dataset"),
        (lambda _: MemoryStore({"data/a.parquet": b"PAR1 and so on"}), "is no part of a dataset"),
        (lambda outcomes: MemoryStore({"data/a.parquet": file(outcomes)[:-9]}), "is no part of a dataset"),
        (another_version, "its schema is 'gradcam.dataset/v2'"),
        (other_grid, "(4, 4) cells in one file and (2, 8) in another"),
        (all_failed, "each of the 3 rows failed (image_not_found 3)"),
    ],
    ids=[
        "empty",
        "other files",
        "no bytes",
        "no Parquet",
        "cut off",
        "another version",
        "two grids",
        "all failed",
    ],
)
def test_an_invalid_dataset_is_refused_with_the_reason(
    outcomes: list[tuple[str, Outcome]], dataset: Any, expected: str
) -> None:
    with pytest.raises(InvalidInput, match=re.escape(expected)):
        make_gallery(dataset(outcomes))


class TestCommand:
    @pytest.fixture
    def folder(self, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A dataset in a folder, without its seal; images may come from no bucket."""
        (tmp_path / "cams" / "data").mkdir(parents=True)
        for name, data in store.objects.items():
            if name.endswith(".parquet"):
                (tmp_path / "cams" / name).write_bytes(data)
        monkeypatch.setenv("GRADCAM_IMAGE_BUCKETS", "elsewhere")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def test_a_folder_becomes_a_page_and_missing_images_are_reported(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["gallery", "cams", "--classes", "1,lynx", "-o", "deep/cats.html"]) == 0
        page_data = data_of((folder / "deep" / "cats.html").read_bytes())
        assert [entry["id"] for entry in page_data["classes"]] == [1, 2]
        assert dict(page_data["facts"])["Incomplete"] == "the backfill has not ended"
        captured = capsys.readouterr()
        assert captured.out.startswith("deep/cats.html: 2 classes, 16 images, 0.")
        assert "no dataset.json: the backfill is not complete" in captured.err
        assert "shown as heatmaps only: uri_not_allowed 8" in captured.err.replace("\n", " ")

    def test_a_bucket_becomes_a_page_with_its_images(
        self,
        store: MemoryStore,
        settings: Settings,
        s3_settings: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
    ) -> None:
        real = settings.model_copy(update=s3_settings)
        for name, value in real.to_environment().items():
            monkeypatch.setenv(name, value)
        s3 = S3(real)
        for name, data in store.objects.items():
            s3.client.put_object(Bucket="results", Key=f"gallery/{name}", Body=data)
        for uri, data in PHOTOS.items():
            s3.client.put_object(Bucket="photos", Key=uri.rpartition("/")[2], Body=data)
        page = tmp_path / "page.html"
        assert main(["gallery", "s3://results/gallery/", "-o", str(page)]) == 0
        assert all("jpeg" in entry for entry in data_of(page.read_bytes())["photos"])
        assert capsys.readouterr().err.strip() == ""

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["none"], "There is no dataset at"),
            (["cams/data"], "There is no dataset at"),
            (["cams/data/a.parquet"], "There is no dataset at"),
            (["https://user:secret@host/cams"], "'https://host/cams' is no dataset: name a folder"),
            (["s3:///cams"], "name a folder, or s3://bucket/prefix"),
            (["cams", "--classes", " , "], "The list of classes is empty"),
        ],
    )
    def test_invalid_arguments_end_with_3_and_the_reason(
        self, folder: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["gallery", *arguments]) == 3
        error = capsys.readouterr().err
        assert expected in error
        assert "(invalid_input)" in error
        assert "secret" not in error
        assert not (folder / "gallery.html").exists()
