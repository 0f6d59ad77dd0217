"""The page of an audit, without a browser; with one: see tests/live/test_audit_page.py."""

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradcam_worker.audit.dataset.row_table import LINKS_FILE, ROWS_FILE
from gradcam_worker.audit.pages import page as module
from gradcam_worker.audit.pages.page import PAGE, PageOptions, write_page
from gradcam_worker.audit.pages.photos import PARALLEL_READS
from gradcam_worker.audit.report import Confusion
from gradcam_worker.errors import ImageFetchFailed, InvalidInput
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.gradcam.imaging.overlay import encode
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import ImageRef
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import FolderStore, S3Store
from gradcam_worker.testing import MemoryImageFetcher
from tests.audit.datasets import CORNER, MIDDLE_BOX, Image, folder_dataset, memory_dataset
from tests.audit.written_pages import audited, page_of

PHOTO = encode(np.full((30, 40, 3), 100, np.uint8))
PHOTOS = {f"s3://photos/{row}.jpg": PHOTO for row in range(40)}
RIGHT = Image(1, 1, box=MIDDLE_BOX, second=2, carried={"site": "A"})
PICTURES = [
    *(replace(RIGHT, probability=0.5 + row / 100) for row in range(20)),
    *Image(1, 1, CORNER, MIDDLE_BOX, carried={"site": "B"}).times(5),
    *Image(2, 3, box=MIDDLE_BOX, carried={"site": None}).times(5),
]


def data_of(output: Path) -> dict[str, Any]:
    text = (output / PAGE).read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def policy_of(output: Path) -> str:
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', (output / PAGE).read_text())
    assert found
    return found[1]


def made(folder: Path, images: Mapping[str, bytes] = PHOTOS, **options: Any) -> dict[str, Any]:
    folder_dataset(folder, PICTURES, shard_rows=8)
    page_of(FolderStore(folder), folder / "audit", images, options=PageOptions(**options))
    return data_of(folder / "audit")


def test_examples_of_every_cause_and_the_most_and_least_confident_are_embedded(tmp_path: Path) -> None:
    data = made(tmp_path)
    records = {f"{one['row']}:{one['index']}": one for one in data["records"]}
    groups = data["groups"]
    assert groups["causes"]["1"] == {
        "right_reason": ["19:0", "18:0", "17:0", "16:0"],
        "wrong_reason": ["20:0", "21:0", "22:0", "23:0"],
    }
    assert groups["confidence"]["1"] == {
        "Most confident": ["24:0", "23:0", "22:0", "21:0"],
        "Least confident": ["0:0", "1:0", "2:0", "3:0"],
    }
    named = {key for lists in (*groups["causes"].values(), *groups["confidence"].values()) for key in lists}
    assert named
    for lists in (*groups["causes"].values(), *groups["confidence"].values()):
        for keys in lists.values():
            assert set(keys) <= records.keys()
    assert records["0:0"]["site"] == "A"
    assert records["0:0"]["truth_boxes"] == [[100, 75, 300, 225]]
    assert len(base64.b64decode(records["0:0"]["heatmap"])) == 7 * 7 * 2
    assert "0:1" in records, "the other explained class of the same image, for the viewer"
    assert {one["photo"] for one in data["records"]} <= {*range(len(data["photos"]))}
    assert all("jpeg" in photo for photo in data["photos"])


def test_there_are_at_most_as_many_pictures_as_asked_for_and_confusions_go_first(tmp_path: Path) -> None:
    data = made(tmp_path, max_pictures=5)
    assert sorted({one["row"] for one in data["records"]}) == [25, 26, 27, 28, 29]
    assert len(data["photos"]) == 5
    assert made(tmp_path, max_pictures=0)["records"] == []


def test_an_image_that_is_gone_has_its_reason_and_its_heatmap(tmp_path: Path) -> None:
    data = made(tmp_path, {"s3://photos/0.jpg": PHOTO})
    codes = [photo.get("code") for photo in data["photos"]]
    assert codes.count(None) == 1
    assert set(codes) == {None, "image_not_found"}


def test_images_that_cannot_be_reached_are_not_all_tried(tmp_path: Path) -> None:
    tried = []

    class Away(MemoryImageFetcher):
        """A host that does not answer."""

        def fetch(self, image: ImageRef, *_: object) -> Any:
            tried.append(image.uri)
            message = "It does not answer."
            raise ImageFetchFailed(message)

    store = memory_dataset(Image(1).times(300))
    report = audited(store, tmp_path)
    confusion = Confusion(
        truth=1,
        predicted=1,
        images=300,
        share=1,
        causes={},
        to_learn=1,
        examples=tuple((row, 0) for row in range(4)),
    )
    many = [
        confusion.model_copy(update={"examples": tuple((row, 0) for row in range(first, first + 4))})
        for first in range(0, 200, 4)
    ]
    report = report.model_copy(update={"confusions": tuple(many)})
    summary = write_page(tmp_path, report, store, Away({}), Limits())
    assert summary.missing["image_fetch_failed"] == summary.pictures >= 200
    assert len(tried) < 16 + 2 * PARALLEL_READS


def test_the_files_of_a_folder_are_linked_from_where_the_page_is(tmp_path: Path) -> None:
    data = made(tmp_path / "my cams")
    first = data["files"][0]
    assert first["url"] == "../data/00000000-0000000000000000.parquet"
    assert first["bytes"] == (tmp_path / "my cams" / first["name"]).stat().st_size
    assert (first["first"], first["last"]) == (0, 7)
    assert "connect-src 'self';" in policy_of(tmp_path / "my cams" / "audit")
    elsewhere = tmp_path / "elsewhere"
    page_of(FolderStore(tmp_path / "my cams"), elsewhere, {})
    assert data_of(elsewhere)["files"][0]["url"] == "../my%20cams/data/00000000-0000000000000000.parquet"


def test_the_files_of_a_bucket_have_links_that_expire(tmp_path: Path) -> None:
    store = memory_dataset(PICTURES)
    report = audited(store, tmp_path)
    settings = Settings(
        s3_endpoint_url="http://127.0.0.1:1", s3_access_key_id="id", s3_secret_access_key="secret"
    )

    class Bucket(S3Store):
        """Signs as S3 would, reads from memory."""

        def find(self, key: str, *_: object) -> bytes | None:
            return store.objects.get(key)

    bucket = Bucket(S3(settings), "results", "cams")
    options = PageOptions(expires_s=600, max_pictures=1)
    summary = write_page(tmp_path, report, bucket, MemoryImageFetcher({}), Limits(), options)
    url = data_of(tmp_path)["files"][0]["url"]
    assert url.startswith("http://127.0.0.1:1/results/cams/data/00000000-0000000000000000.parquet?")
    assert "X-Amz-Expires=600" in url
    assert summary.expires_at is not None
    assert timedelta(seconds=500) < summary.expires_at - utc_now() <= timedelta(seconds=600)
    assert "connect-src 'self' http://127.0.0.1:1;" in policy_of(tmp_path)
    with pytest.raises(InvalidInput, match="at most"):
        write_page(
            tmp_path, report, bucket, MemoryImageFetcher({}), Limits(), replace(options, expires_s=10**6)
        )


def test_images_of_which_there_is_most_to_learn_get_links_on_request(tmp_path: Path) -> None:
    store = memory_dataset(PICTURES)
    report = audited(store, tmp_path)

    def sign(uri: str, expires_s: int) -> str | None:
        return None if uri.endswith("/26.jpg") else f"https://signed/{uri[5:]}?{expires_s}"

    images = MemoryImageFetcher({})
    options = PageOptions(max_pictures=0, image_links=9, expires_s=60)
    summary = write_page(tmp_path, report, store, images, Limits(), options, sign=sign)
    assert summary.links == 8
    links = pq.read_table(tmp_path / LINKS_FILE).to_pydict()
    places = pq.read_table(tmp_path / ROWS_FILE)["row"].to_pylist()
    assert [places[place] for place in links["place"]] == [20, 21, 22, 23, 24, 25, 27, 28]
    assert links["url"][0] == "https://signed/photos/20.jpg?60"
    assert LINKS_FILE in data_of(tmp_path)["table"]["files"]
    write_page(tmp_path, report, store, images, Limits(), PageOptions(), sign=sign)
    assert not (tmp_path / LINKS_FILE).exists(), "those of an earlier page are gone"


def test_a_dataset_that_has_changed_since_the_audit_is_refused(tmp_path: Path) -> None:
    store = memory_dataset(PICTURES)
    report = audited(store, tmp_path)
    del store.objects["data/00000000-0000000000000000.parquet"]
    with pytest.raises(InvalidInput, match="has changed"):
        write_page(tmp_path, report, store, MemoryImageFetcher({}), Limits())


def test_longer_beginnings_of_image_addresses_go_first(tmp_path: Path) -> None:
    urls = {"s3://a/": "https://a/", "s3://a/b/": "https://b/"}
    assert made(tmp_path, image_urls=urls)["image_urls"] == [
        ["s3://a/b/", "https://b/"],
        ["s3://a/", "https://a/"],
    ]


def test_the_page_has_room_for_its_photos_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(tmp_path, max_pictures=0)
    monkeypatch.setattr(module, "MAX_PAGE_BYTES", (tmp_path / "audit" / PAGE).stat().st_size + 3000)
    data = made(tmp_path)
    assert {photo.get("code") for photo in data["photos"]} == {"too_many_pictures"}


def test_a_dataset_of_the_previous_version_has_a_page(tmp_path: Path) -> None:
    folder_dataset(tmp_path, PICTURES, previous_version=True)
    page_of(FolderStore(tmp_path), tmp_path / "audit", PHOTOS)
    data = data_of(tmp_path / "audit")
    assert data["report"]["confusions"] == []
    assert "truth" not in {column["name"] for column in data["columns"]}
    assert data["groups"]["confidence"]["1"]["Most confident"]
