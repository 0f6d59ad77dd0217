"""The page of a comparison in a real browser, from a file, without a network."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from gradcam_worker.audit.comparison.compare import compare
from gradcam_worker.audit.comparison.page import comparison_page
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.gradcam.imaging.overlay import encode
from gradcam_worker.testing import MemoryImageFetcher
from tests.audit.datasets import CORNER, MIDDLE_BOX, Image, memory_dataset
from tests.live.test_gallery_page import PHONE, Reader

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def page() -> bytes:
    grey = [encode(np.full((300, 400, 3), number, np.uint8)) for number in range(60)]
    photos = {f"s3://photos/{number}.jpg": data for number, data in enumerate(grey)}
    images = [
        Image(number % 3, box=MIDDLE_BOX, uri=uri, sha256=hashlib.sha256(data).hexdigest())
        for number, (uri, data) in enumerate(photos.items())
    ]
    moved = [replace(one, heat=CORNER) if one.predicted == 1 else one for one in images]
    report = compare(memory_dataset(images), memory_dataset(moved))
    del photos["s3://photos/1.jpg"]
    return comparison_page(report, MemoryImageFetcher(photos), Limits()).page


@pytest.fixture
def reader(driver: webdriver.Chrome, tmp_path: Path) -> Iterator[Reader]:
    """A reader, to whom the page may not complain, and for whom it may not ask the network for anything."""
    reader = Reader(driver, tmp_path / "comparison.html")
    yield reader
    assert reader.complaints() == []
    asked = {uri for uri in reader.requests() if not uri.startswith("data:")}
    assert asked == {reader.path.as_uri()}


def test_a_reader_finds_what_moved_and_looks_closely(reader: Reader, page: bytes) -> None:
    reader.open(page)
    assert reader.text("h2") == ["1 class 1"]
    assert reader.text(".chip.moved") == ["heat moved", "heat inside the boxes changed"]
    assert reader.text("#figures dd")[0] == "1 of 3"
    assert reader.text("#others tbody td:first-child") == ["0 class 0", "2 class 2"]
    assert reader.text(".code") == ["image_not_found"]
    a, b = (reader.canvas(f".means figure:nth-child({side}) canvas") for side in (1, 2))
    half = a.shape[0] // 2
    assert a[half, half].tolist() == b[4, 4].tolist(), "the peak has one colour"
    assert a[4, 4].tolist() == b[half, half].tolist()
    reader.driver.find_element(By.CSS_SELECTOR, ".pair .tile").click()
    look = "document.getElementById('viewer').shadowRoot"
    WebDriverWait(reader.driver, 20).until(lambda _: "B: class 1" in str(reader.run(f"{look}.textContent")))
    assert "A: class 1" in str(reader.run(f"{look}.textContent"))
    reader.find("close").click()
    reader.find("search").send_keys("lynx")
    assert reader.text("#found") == ["0 of 1"]


def test_it_fits_a_phone(reader: Reader, page: bytes) -> None:
    reader.open(page, PHONE)
    assert reader.run("document.documentElement.scrollWidth") <= PHONE[0]
