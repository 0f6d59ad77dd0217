"""The page of a comparison, without a browser; with one: see tests/live/test_comparison_page.py."""

import base64
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradcam_worker.audit.comparison import page as module
from gradcam_worker.audit.comparison.compare import compare
from gradcam_worker.audit.comparison.page import ComparisonPage, comparison_page
from gradcam_worker.audit.comparison.report import ComparisonReport
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.gradcam.imaging.overlay import encode
from gradcam_worker.testing import MemoryImageFetcher
from tests.audit.datasets import CORNER, MIDDLE_BOX, Image, memory_dataset

PHOTO = encode(np.full((300, 400, 3), 99, np.uint8))
PHOTOS = {f"s3://photos/{number}.jpg": PHOTO for number in range(60) if number != 1}


@pytest.fixture(scope="module")
def report() -> ComparisonReport:
    images = [
        Image(number % 3, box=MIDDLE_BOX, uri=f"s3://photos/{number}.jpg", sha256=f"{number:064x}")
        for number in range(60)
    ]
    moved = [replace(one, heat=CORNER) if one.predicted == 1 else one for one in images]
    return compare(memory_dataset(images), memory_dataset(moved))


def made(report: ComparisonReport) -> ComparisonPage:
    return comparison_page(report, MemoryImageFetcher(PHOTOS), Limits())


def data_of(page: bytes) -> Any:
    return json.loads(page.partition(b'id="data">')[2].partition(b"</script>")[0])


def test_what_moved_is_shown_with_its_images(report: ComparisonReport) -> None:
    data = data_of(made(report).page)
    (card,) = data["classes"]
    assert (card["name"], card["moved_by"]) == ("class 1", ["heat", "heat_inside"])
    heats = [np.frombuffer(base64.b64decode(side["heat"]), "<u2") for side in card["sides"]]
    assert [int(heat.argmax()) for heat in heats] == [24, 0]
    assert [one["id"] for one in data["others"]] == [0, 2]
    assert {one["class_id"] for one in data["images"]} == {1}
    assert len(data["images"]) == len(report.images) == 20
    assert all(len(one["sides"]) == 2 for one in data["images"])


def test_images_are_embedded_and_those_that_are_gone_have_a_reason(report: ComparisonReport) -> None:
    page = made(report)
    assert page.missing == {"image_not_found": 1}
    photos = data_of(page.page)["photos"]
    assert {one["width"] for one in photos if "jpeg" in one} == {256}
    (gone,) = [one for one in photos if "jpeg" not in one]
    assert "s3://photos/1.jpg" in gone["detail"]


def test_a_page_stays_below_its_limit(report: ComparisonReport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAGE_BYTES", 1)
    assert made(report).missing == {"too_many_pictures": 19, "image_not_found": 1}


def test_of_more_classes_that_moved_than_have_a_card_the_images_are_left_out(
    report: ComparisonReport,
) -> None:
    moved = report.classes[0]
    others = tuple(
        moved.model_copy(update={"a": moved.a.model_copy(update={"id": 1000 + number})})
        for number in range(module.MAX_CARDS)
    )
    data = data_of(made(report.model_copy(update={"classes": (*others, moved)})).page)
    assert len(data["classes"]) == module.MAX_CARDS
    assert [one["id"] for one in data["others"]] == [moved.a.id]
    assert data["images"] == data["photos"] == []


def test_nothing_of_a_dataset_becomes_markup(report: ComparisonReport) -> None:
    hostile = "</script><script>alert('\"&')"
    classes = tuple(one.model_copy(update={"name": hostile}) for one in report.classes)
    page = made(report.model_copy(update={"classes": classes, "remarks": (hostile,)})).page
    block = page.partition(b'id="data">')[2].partition(b"</script>")[0]
    assert not re.search(rb"[<>&\x80-\xff]", block)
    assert data_of(page)["remarks"] == [hostile]
    policy = re.findall(rb'http-equiv="Content-Security-Policy" content="(.*?)"', page)[0].decode()
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_the_template_builds_no_markup_and_has_no_address() -> None:
    template = (module.TEMPLATES / "comparison.html").read_text()
    addresses, markup = (
        ("http://", "https://"),
        ("innerHTML", "outerHTML", "insertAdjacent", "document.write"),
    )
    for forbidden in (*addresses, *markup, "eval("):
        assert forbidden not in template
    assert not re.search(r"\son\w+=|\sstyle=", template)


def test_a_comparison_without_anything_that_moved_has_a_page() -> None:
    store = memory_dataset([Image(number % 2) for number in range(40)])
    data = data_of(made(compare(store, store)).page)
    assert [one["moved_by"] for one in data["classes"]] == [[]]
    assert len(data["others"]) == 1
    assert data["images"] == data["photos"] == []
