"""A dataset as a page, as far as it can be told without a browser: see tests/live/test_gallery_page.py."""

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
from gradcam_worker.audit import gallery as module
from gradcam_worker.audit.gallery import Gallery, GalleryOptions, gallery
from gradcam_worker.audit.statistics import read_statistics
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
Told = tuple[int, int, float, NDArray[np.float32]]  # class, rank, probability, heatmap (rows, columns)


def photo(seed: int, size: tuple[int, int] = (300, 400)) -> bytes:
    """A photo (height, width) with some detail."""
    rng = np.random.default_rng(seed)
    return encode(
        np.kron(rng.integers(0, 256, (size[0] // 4, size[1] // 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    )


PHOTOS = {f"s3://photos/{one}.jpg": photo(one) for one in range(8)}


def seen(uri: str, told: Sequence[Told], data: bytes | None = None) -> ExplainedRow:
    data = PHOTOS[uri] if data is None else data
    explained = tuple(Prediction(rank, one, f"n{one}", NAMES[one], p) for one, rank, p, _ in told)
    raw = np.zeros(len(told), np.float32)
    heatmaps = np.stack([heatmap for *_, heatmap in told])
    record = InputRecord(
        uri=uri,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        media_type="image/jpeg",
        width=400,
        height=300,
    )
    explanation = Explanation(TinyNetwork.facts, "blocks", explained, explained, heatmaps, raw, raw)
    return ExplainedRow(record, explanation, [None] * len(told), [None] * len(told))


def file(outcomes: Sequence[tuple[str, Outcome]], first: int = 0, grid: tuple[int, int] = (4, 4)) -> bytes:
    """A shard's file with these outcomes of the images at these URIs."""
    rows = tuple(Row(uri=uri, id=f"id-{first + place}") for place, (uri, _) in enumerate(outcomes))
    shard = Shard(
        backfill=new_id(),
        index=first,
        key=f"{first:08d}-{'0' * 16}",
        first=first,
        rows=rows,
        network=NETWORK.name,
        target=Target(top_n=2),
        output="s3://results/cams",
    )
    return to_bytes(shard, NETWORK, grid, [outcome for _, outcome in outcomes])[0]


def cells(value: float) -> NDArray[np.float32]:
    """A heatmap that is `value` in one half, and 1 in one cell."""
    made = np.zeros((4, 4), np.float32)
    made[:2] = value
    made[3, 3] = 1
    return made


@pytest.fixture(scope="module")
def outcomes() -> list[tuple[str, Outcome]]:
    """Eight images: class 1 first in five of them, class 2 in three, class 3 always last."""
    made: list[tuple[str, Outcome]] = []
    for place, uri in enumerate(PHOTOS):
        sure = 0.9 - 0.05 * place
        first, second = (1, 2) if place < 5 else (2, 1)
        told = [(first, 1, sure, cells(sure)), (second, 2, 0.99 - sure, cells(0.5)), (3, 3, 0.001, cells(0))]
        made.append((uri, seen(uri, told)))
    return made


@pytest.fixture
def store(outcomes: list[tuple[str, Outcome]]) -> MemoryStore:
    gone = Problem.of(ImageNotFound("There is nothing."), stage="fetch", attempt=1)
    one, two = file([*outcomes[:5], ("s3://photos/gone.jpg", gone)]), file(outcomes[5:], first=6)
    return MemoryStore(
        {"data/a.parquet": one, "data/b.parquet": two, "data/.x.part": b"", "dataset.json": b"{}"}
    )


def made(store: MemoryStore, images: Any = PHOTOS, **wish: Any) -> Gallery:
    return gallery(store, MemoryImageFetcher(images), Limits(), GalleryOptions(**wish))


def data_of(page: bytes) -> dict[str, Any]:
    block = page.partition(b'id="data">')[2].partition(b"</script>")[0]
    return dict(json.loads(block))


def values(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), "<u2").reshape(4, 4) / 65_535


class TestClasses:
    def test_those_that_came_first_most_often_go_first_with_their_counts(self, store: MemoryStore) -> None:
        told = data_of(made(store).page)
        counts = [(one["id"], one["name"], one["first"], one["count"]) for one in told["classes"]]
        assert counts == [(1, "tabby cat", 5, 8), (2, "lynx", 3, 8), (3, NAMES[3], 0, 8)]
        facts = dict(told["facts"])
        assert (facts["Images"], facts["Failed"]) == ("9", "image_not_found 1")
        assert facts["Network, layer"] == "efficientnet_lite0, blocks"
        assert "Incomplete" not in facts

    def test_the_mean_heatmap_is_the_mean_to_its_own_peak(
        self, store: MemoryStore, outcomes: list[tuple[str, Outcome]]
    ) -> None:
        shown = data_of(made(store).page)["classes"][0]
        maps = [
            outcome.explanation.heatmaps[place]
            for _, outcome in outcomes
            if isinstance(outcome, ExplainedRow)
            for place, one in enumerate(outcome.explanation.explained)
            if one.id == 1
        ]
        mean = np.mean(maps, axis=0)
        assert_allclose(values(shown["mean"]), mean / mean.max(), atol=1e-3)
        assert shown["percent"] == "64.6 %"

    def test_classes_are_named_by_id_wnid_or_name(self, store: MemoryStore) -> None:
        told = data_of(made(store, classes=("Tabby-Cat", "n2", "1")).page)
        assert [one["id"] for one in told["classes"]] == [1, 2]
        assert dict(told["facts"])["Classes"] == "2 of 3"
        assert made(store, max_classes=1).classes == 1

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            (("tabby_bat",), "No image was explained for a class 'tabby_bat'. Near: tabby_cat"),
            (("999",), "class '999'"),
            ((), "The list of classes is empty"),
        ],
    )
    def test_classes_that_are_not_there_are_refused(
        self, store: MemoryStore, names: tuple[str, ...], said: str
    ) -> None:
        with pytest.raises(InvalidInput, match=re.escape(said)):
            made(store, classes=names)


class TestPictures:
    def test_the_most_and_the_least_confident_are_shown_and_none_twice(self, store: MemoryStore) -> None:
        first = data_of(made(store, per_class=2).page)["classes"][0]
        rows = [[(row["row"], row["percent"], row["rank"]) for row in one["rows"]] for one in first["groups"]]
        assert rows == [[(0, "90.0 %", 1), (1, "85.0 %", 1)], [(4, "70.0 %", 1), (3, "75.0 %", 1)]]
        few = data_of(made(store, per_class=100).page)["classes"][0]
        assert [one["title"] for one in few["groups"]] == ["Most confident"]
        assert [row["row"] for row in few["groups"][0]["rows"]] == [0, 1, 2, 3, 4, 8, 7, 6]

    def test_what_is_shown_of_a_row_is_its_own(self, store: MemoryStore) -> None:
        told = data_of(made(store).page)
        row = told["classes"][1]["groups"][0]["rows"][0]
        assert (row["row"], row["id"], row["uri"]) == (6, "id-6", "s3://photos/5.jpg")
        assert_allclose(values(row["heatmap"]), cells(0.65), atol=1e-3)
        shown = told["photos"][row["photo"]]
        pixels = decode(base64.b64decode(shown["jpeg"])).pixels
        assert pixels.shape == (shown["height"], shown["width"], 3) == (192, 256, 3)
        whole = decode(PHOTOS[row["uri"]]).pixels
        assert_allclose(pixels.mean((0, 1)), whole.mean((0, 1)), atol=2)

    def test_an_image_is_embedded_once_for_all_its_classes(self, store: MemoryStore) -> None:
        told = made(store, per_class=100)
        assert told.pictures == 24
        assert len(data_of(told.page)["photos"]) == 8

    def test_an_image_that_is_gone_or_another_now_leaves_its_heatmap_and_the_reason(
        self, store: MemoryStore, settings: Settings, s3_server: S3Server, s3_settings: dict[str, Any]
    ) -> None:
        real = settings.model_copy(update=s3_settings)
        s3 = S3(real)
        for uri, data in PHOTOS.items():
            s3.client.put_object(Bucket="photos", Key=uri.rpartition("/")[2], Body=data)
        s3.client.delete_object(Bucket="photos", Key="0.jpg")
        s3.client.put_object(Bucket="photos", Key="1.jpg", Body=photo(99))
        shown = gallery(store, UriFetcher(real, s3), Limits(), GalleryOptions())
        told = data_of(shown.page)
        one, two = told["classes"][0]["groups"][0]["rows"][:2]
        assert told["photos"][one["photo"]]["code"] == "image_not_found"
        assert "s3://photos/0.jpg" in told["photos"][one["photo"]]["detail"]
        assert told["photos"][two["photo"]]["code"] == "checksum_mismatch"
        assert values(one["heatmap"]).max() == 1
        assert (one["width"], one["height"]) == (256, 192)
        assert shown.missing == {"image_not_found": 1, "checksum_mismatch": 1}

    def test_the_same_dataset_in_other_files_makes_the_same_page(
        self, store: MemoryStore, outcomes: list[tuple[str, Outcome]]
    ) -> None:
        whole = MemoryStore({"data/all.parquet": file(outcomes)})
        split = {f"data/{one}.parquet": file([outcomes[one]], first=one) for one in range(len(outcomes))}
        assert made(whole).page == made(MemoryStore(split)).page

    def test_heatmaps_of_the_chosen_rows_alone_are_kept(self, store: MemoryStore) -> None:
        found = read_statistics(store, 2)
        for one in found.classes.values():
            assert (len(one.most), len(one.least)) == (2, 4)
            assert all(kept.heatmap.base is None for kept in one.most), "not a view of its whole batch"

    def test_a_file_is_read_in_parts(self, outcomes: list[tuple[str, Outcome]]) -> None:
        data = file(outcomes)
        parts = list(read_batches(data, max_rows=5))
        assert [len(part.class_ids) for part in parts] == [5, 5, 5, 5, 4]
        (whole,) = read_batches(data)
        assert_allclose(np.concatenate([part.heatmaps for part in parts]), whole.heatmaps)
        assert whole.record(3)["uri"] == "s3://photos/1.jpg"


class TestSize:
    def test_a_page_stays_below_its_limit_its_photos_become_smaller(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = made(store)
        base = len(whole.page) - sum(len(one["jpeg"]) for one in data_of(whole.page)["photos"])
        for room in (60_000, 24_000):
            monkeypatch.setattr(module, "LIMIT", base + room)
            page = made(store).page
            assert base < len(page) < base + room
            assert {one.get("width", 0) for one in data_of(page)["photos"]} <= {64, 96, 128, 192}
        monkeypatch.setattr(module, "LIMIT", base)
        assert made(store).missing == {"too_many_pictures": 8}

    def test_more_pictures_than_a_page_may_have_are_refused(
        self, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "MOST_PICTURES", 23)
        with pytest.raises(InvalidInput, match="24 pictures, and a page may have 23: show fewer classes"):
            made(store, per_class=8)


class TestSafety:
    def test_no_text_of_a_dataset_means_anything_to_html(self, store: MemoryStore) -> None:
        page = made(store).page
        assert data_of(page)["classes"][2]["name"] == NAMES[3]
        block = page.partition(b'id="data">')[2].partition(b"</script>")[0]
        assert not re.search(rb"[<>&\x80-\xff]", block)
        assert page.replace(block, b"") == made(store, classes=("1",)).page.replace(
            made(store, classes=("1",)).page.partition(b'id="data">')[2].partition(b"</script>")[0], b""
        )

    def test_the_policy_admits_the_own_style_and_script_and_nothing_else(self, store: MemoryStore) -> None:
        page = made(store).page.decode()

        def digest(tag: str) -> str:
            (block,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
            return base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()

        policy = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)
        own = f"style-src 'sha256-{digest('style')}'; script-src 'sha256-{digest('script')}'"
        assert policy == [f"default-src 'none'; img-src data:; {own}; base-uri 'none'; form-action 'none'"]

    def test_the_template_has_no_address_and_builds_no_markup(self) -> None:
        template = "".join(
            (DATA / name).read_text() for name in ("page_head.html", "page.css", "gallery.html", "heatmap.js")
        )
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
    wide = seen("s3://photos/0.jpg", [(1, 1, 0.5, np.ones((2, 8), np.float32))])
    return MemoryStore(
        {
            "data/a": b"",
            "data/a.parquet": file(outcomes),
            "data/b.parquet": file([("s3://x/y", wide)], grid=(2, 8)),
        }
    )


def another_version(outcomes: list[tuple[str, Outcome]]) -> MemoryStore:
    table, new = pq.read_table(io.BytesIO(file(outcomes))), io.BytesIO()
    facts = table.schema.metadata[b"gradcam"].replace(b"dataset/v1", b"dataset/v2")
    pq.write_table(table.replace_schema_metadata({b"gradcam": facts}), new)
    return MemoryStore({"data/a.parquet": new.getvalue()})


def all_failed(_: object) -> MemoryStore:
    gone = Problem.of(ImageNotFound("There is nothing."), stage="fetch", attempt=1)
    return MemoryStore({"data/a.parquet": file([("s3://photos/gone.jpg", gone)] * 3)})


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        (lambda _: MemoryStore(), "There is no dataset at memory://data"),
        (lambda _: MemoryStore({"data/a.csv": b"x", "a.parquet": b"x"}), "There is no dataset"),
        (lambda _: MemoryStore({"data/a.parquet": b""}), "memory://data/a.parquet is no part of a dataset"),
        (lambda _: MemoryStore({"data/a.parquet": b"PAR1 and so on"}), "is no part of a dataset"),
        (lambda some: MemoryStore({"data/a.parquet": file(some)[:-9]}), "is no part of a dataset"),
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
def test_what_is_no_dataset_is_refused_in_a_sentence(
    outcomes: list[tuple[str, Outcome]], dataset: Any, said: str
) -> None:
    with pytest.raises(InvalidInput, match=re.escape(said)):
        made(dataset(outcomes))


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

    def test_a_folder_becomes_a_page_and_what_is_missing_is_told(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["gallery", "cams", "--classes", "1,lynx", "-o", "deep/cats.html"]) == 0
        told = data_of((folder / "deep" / "cats.html").read_bytes())
        assert [one["id"] for one in told["classes"]] == [1, 2]
        assert dict(told["facts"])["Incomplete"] == "the backfill has not ended"
        shown = capsys.readouterr()
        assert shown.out.startswith("deep/cats.html: 2 classes, 16 pictures, 0.")
        assert "no dataset.json: the backfill has not ended" in shown.err
        assert "shown as heatmaps alone: uri_not_allowed 8" in shown.err.replace("\n", " ")

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
        assert all("jpeg" in one for one in data_of(page.read_bytes())["photos"])
        assert capsys.readouterr().err.strip() == ""

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["none"], "There is no dataset at"),
            (["cams/data"], "There is no dataset at"),
            (["cams/data/a.parquet"], "There is no dataset at"),
            (["https://user:secret@host/cams"], "'https://host/cams' is no dataset: name a folder"),
            (["s3:///cams"], "name a folder, or s3://bucket/prefix"),
            (["cams", "--classes", " , "], "The list of classes is empty"),
        ],
    )
    def test_what_cannot_be_shown_ends_with_1_and_a_sentence(
        self, folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["gallery", *arguments]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert "(invalid_input)" in error
        assert "secret" not in error
        assert not (folder / "gallery.html").exists()
