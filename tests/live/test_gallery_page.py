"""The gallery, as a reader meets it: in a real browser, from a file, without a network."""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from gradcam_worker import testing
from gradcam_worker.audit.dataset.statistics import read_statistics
from gradcam_worker.audit.pages.gallery import GalleryOptions, gallery
from gradcam_worker.execution import shards
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.gradcam.classes import ClassIndex, Label
from gradcam_worker.gradcam.decoding.decode import Limits, decode
from gradcam_worker.gradcam.imaging.overlay import COLORMAPS, encode, overlay
from gradcam_worker.gradcam.sizing import Sizing
from gradcam_worker.inference.model_cache import ModelCache
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.options import Target
from gradcam_worker.schemas.shard import Row, Shard
from tests.gradcam.sized_network import SizedNetwork

pytestmark = pytest.mark.live

DESKTOP, PHONE = (1280, 900), (375, 812)
HOSTILE = ("</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "<!-- " + "x" * 150)
ODD_ID = "'\"><b>bold</b>"
CALL = "javascript:alert(1)//"


class Hostile(testing.TinyNetwork):
    """Its classes have names that want to be markup."""

    labels = ClassIndex(tuple(Label(one, f"n{one}", name) for one, name in enumerate(HOSTILE)))


@pytest.fixture(scope="module")
def images() -> Mapping[str, bytes]:
    """Photos of one colour each, wide and tall, under addresses of every kind."""
    rng = np.random.default_rng(1)
    made = {}
    for number in range(12):
        height, width = ((240, 320), (320, 240), (90, 700))[number % 3]
        pixels = rng.integers(0, 60, (height, width, 3), np.uint8)
        pixels[height // 2 :, :, number % 3] = 200 + number
        long = "x" * 400 if number == 1 else ""
        uri = (f"s3://photos/{number}.jpg", f"https://photos.example/{long}{number}.jpg", f"{CALL}{number}")[
            number % 3
        ]
        made[uri] = encode(pixels)
    return made


@pytest.fixture(scope="module")
def store(images: Mapping[str, bytes]) -> testing.MemoryStore:
    """The dataset, made as a worker makes it."""
    return explained_by(Hostile(), images)


def explained_by(network: testing.TinyNetwork, images: Mapping[str, bytes]) -> testing.MemoryStore:
    store = testing.MemoryStore()
    services = testing.fake_services(images, store=store, inference=ModelCache(lambda _: network))
    shard = Shard(
        backfill=new_id(),
        index=0,
        key=f"{0:08d}-{'0' * 16}",
        first=0,
        rows=tuple(Row(uri=uri, id=f"{ODD_ID}{number}") for number, uri in enumerate(images)),
        network="efficientnet_lite0",
        target=Target(top_n=2),
        output="s3://gradcam/results",
    )
    shards.run_shard(shard, services, JobContext(Deadline(60), lambda _: None))
    return store


@pytest.fixture(scope="module")
def page(store: testing.MemoryStore, images: Mapping[str, bytes]) -> bytes:
    """The gallery; the image of row 0 is gone."""
    there = {uri: data for uri, data in images.items() if uri != "s3://photos/0.jpg"}
    return gallery(store, testing.MemoryImageFetcher(there), Limits(), GalleryOptions(per_class=3)).page


class Reader:
    """Somebody at a browser, with the page open."""

    def __init__(self, driver: Any, path: Path) -> None:
        self.driver, self.path = driver, path

    def open(self, page: bytes, size: tuple[int, int] = DESKTOP) -> None:
        self.path.write_bytes(page)
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.complaints(), self.requests()  # those of earlier pages are theirs
        self.driver.get(self.path.as_uri())
        WebDriverWait(self.driver, 20).until(lambda _: self.run("drawn.size > 0"))

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def find(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def text(self, selector: str) -> list[str]:
        """What is written in the elements, whether it is scrolled to or not."""
        found = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return [str(one.get_property("textContent")) for one in found]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [one["params"] for one in events if one["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]

    def canvas(self, selector: str) -> NDArray[np.int64]:
        """The colours that are drawn on a canvas, (height, width, 3) RGB."""
        url = self.run(
            f"(draw(document.querySelector('{selector}')), document.querySelector('{selector}').toDataURL())"
        )
        return decode(base64.b64decode(url.partition(",")[2])).pixels.astype(int)


@pytest.fixture
def reader(driver: webdriver.Chrome, tmp_path: Path) -> Iterator[Reader]:
    """A reader, to whom no page may complain, and for whom none may ask the network for anything."""
    reader = Reader(driver, tmp_path / "gallery.html")
    yield reader
    assert reader.complaints() == []
    asked = [url for url in reader.requests() if not url.startswith("data:")]
    assert asked == [reader.path.as_uri()]


def test_a_picture_is_the_photo_below_the_colours_of_its_own_heatmap(
    reader: Reader, page: bytes, store: testing.MemoryStore, images: Mapping[str, bytes]
) -> None:
    reader.open(page)
    (first, *_) = read_statistics(store, 3).choose_classes(None, 1)
    for place, kept in enumerate(first.top_rows()[0], 1):
        selector = f".class:first-child .groups > div:first-child figure:nth-child({place})"
        assert f"row {kept.record['row']}, {ODD_ID}" in reader.text(f"{selector} figcaption")[0]
        drawn = reader.canvas(f"{selector} canvas")
        black = np.zeros(drawn.shape, np.uint8)
        for colormap in reversed(COLORMAPS):
            Select(reader.find("colormap")).select_by_visible_text(colormap)
            expected = overlay(black, kept.heatmap.astype(np.float32), alpha=1, colormap=colormap)
            drawn = reader.canvas(f"{selector} canvas")
            assert_allclose(drawn, expected, atol=8, err_msg=colormap)  # a level's
    assert first.top_rows()[0]


def test_outside_what_the_network_saw_a_photo_keeps_its_colours(
    reader: Reader, images: Mapping[str, bytes]
) -> None:
    wide = dict(list(images.items())[:1])
    store = explained_by(SizedNetwork(Sizing(fit="crop")), wide)
    reader.open(gallery(store, testing.MemoryImageFetcher(wide), Limits(), GalleryOptions()).page)
    (first, *_) = read_statistics(store, 3).choose_classes(None, 1)
    (kept, *_) = first.top_rows()[0]
    canvas = ".class:first-child .groups figure canvas"
    transparent = reader.run(
        f"(draw(document.querySelector('{canvas}')), [...document.querySelector('{canvas}').getContext('2d')"
        ".getImageData(0, 90, 256, 1).data].filter((_, place) => place % 4 == 3).map((alpha) => alpha == 0))"
    )
    left, _, right, _ = (side / kept.record["width"] * 256 for side in kept.record["shown_xyxy"])
    assert transparent == [not left <= pixel + 0.5 < right for pixel in range(256)]
    placement = Sizing(fit="crop").placement((240, 320), (16, 16))
    black = np.zeros((192, 256, 3), np.uint8)
    heatmap = kept.heatmap.astype(np.float32)
    expected = overlay(black, heatmap, alpha=1, colormap="viridis", placement=placement)
    shown = ~np.array(transparent)
    assert_allclose(reader.canvas(canvas)[:, shown], expected[:, shown], atol=8)


def test_the_opacity_is_that_of_all_photos_and_of_no_heatmap_alone(reader: Reader, page: bytes) -> None:
    reader.open(page)
    opacity = "getComputedStyle(document.querySelector('{}')).opacity"
    assert reader.run(opacity.format(".stage img + canvas")) == "0.5"
    reader.find("opacity").send_keys(Keys.END)
    assert reader.text("#opacity-value") == ["100 %"]
    assert reader.run(opacity.format(".stage img + canvas")) == "1"
    reader.find("opacity").send_keys(Keys.HOME)
    assert reader.run(opacity.format(".stage img + canvas")) == "0"
    assert reader.run(opacity.format(".mean canvas")) == "1"
    alone = reader.run(
        "[...document.querySelectorAll('figure')].filter((one) => one.querySelector('.code'))"
        ".map((one) => [one.querySelectorAll('img').length,"
        " getComputedStyle(one.querySelector('canvas')).opacity,"
        " one.querySelector('.code').textContent])"
    )
    assert alone
    assert all(one == [0, "1", "image_not_found"] for one in alone)


def test_a_picture_opens_in_the_viewer_with_all_classes_of_its_image(
    reader: Reader, page: bytes, store: testing.MemoryStore
) -> None:
    reader.open(page)
    (first, *_) = read_statistics(store, 3).choose_classes(None, 1)
    kept = first.top_rows()[0][0].record
    Select(reader.find("colormap")).select_by_visible_text("inferno")
    reader.driver.find_element(By.CSS_SELECTOR, ".class:first-child .groups figure:first-child .tile").click()
    viewer = "document.querySelector('gradcam-viewer')"
    WebDriverWait(reader.driver, 20).until(lambda _: reader.run(f"{viewer}.$('tabs').children.length"))
    assert reader.run("find('look').open")
    assert reader.text("#look-title") == [f"Row {kept['row']}, {ODD_ID}{kept['row']}"]
    shown = reader.run(f"{viewer}.$('tabs').children[{viewer}.selected].textContent")
    assert kept["class_name"] in shown
    assert reader.run(f"{viewer}.$('colormap').value") == "inferno"
    assert f"raw {kept['raw_max']:.3g}" in reader.run(f"{viewer}.$('top').textContent")
    reader.find("close").click()
    assert not reader.run("find('look').open")
    reader.driver.find_element(By.CSS_SELECTOR, ".mean .tile").click()
    assert "heatmaps are shown alone" in reader.run(f"{viewer}.$('marks').textContent")


def test_every_picture_has_the_shape_of_its_image(reader: Reader, page: bytes) -> None:
    reader.open(page)
    shapes = reader.run(
        "[...document.querySelectorAll('.tiles .stage')].map((one) => {"
        " const {width, height} = one.getBoundingClientRect();"
        " const canvas = one.querySelector('canvas');"
        " return [width, height, canvas.width, canvas.height]; })"
    )
    assert len(shapes) > 6
    for width, height, *size in shapes:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.05)


def test_addresses_of_the_web_are_links_and_no_others(reader: Reader, page: bytes) -> None:
    reader.open(page)
    links = reader.run("[...document.querySelectorAll('a')].map((one) => [one.href, one.rel, one.title])")
    assert links
    assert all(href == title and href.startswith("https://photos.example/") for href, _, title in links)
    assert {rel for _, rel, _ in links} == {"noopener noreferrer"}
    shown = set(reader.text("span.where"))
    assert any(one.startswith("photos/") for one in shown)
    titles = reader.run("[...document.querySelectorAll('span.where')].map((one) => one.title)")
    assert any(one.startswith("javascript:") for one in titles), "it is told, and no link"


def test_what_looks_like_markup_is_shown_as_it_was_written(reader: Reader, page: bytes) -> None:
    reader.open(page)
    assert sorted(reader.text("h2")) == [f"{one} {name}" for one, name in enumerate(HOSTILE)]
    assert reader.run("document.querySelectorAll('script').length") == 2
    assert (
        reader.run(
            "document.querySelectorAll('b, iframe, object, img:not([src^=\"data:image/jpeg\"])').length"
        )
        == 0
    )


def test_a_class_is_found_by_its_name_or_number(reader: Reader, page: bytes) -> None:
    reader.open(page)
    hidden = "[...document.querySelectorAll('.class')].filter((one) => one.hidden).length"
    for typed, count in (("ONERROR", 1), ("n2", 1), ("nothing like it", 0), ("", 3)):
        reader.find("search").send_keys(Keys.CONTROL, "a")
        reader.find("search").send_keys(Keys.BACKSPACE, typed, Keys.ENTER)
        assert reader.text("#found") == [f"{count} of 3"]
        assert reader.run(hidden) == 3 - count


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_nothing_is_wider_than_the_window_and_a_dark_scheme_is_dark(
    reader: Reader, page: bytes, size: tuple[int, int]
) -> None:
    reader.open(page, size)
    assert reader.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    for scheme, ground in (("light", 246), ("dark", 20)):
        wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
        color = reader.run("getComputedStyle(document.body).backgroundColor")
        assert int(re.findall(r"\d+", color)[0]) == ground


def test_a_script_that_got_in_nevertheless_would_not_run(
    driver: webdriver.Chrome, page: bytes, tmp_path: Path
) -> None:
    intruder = b'<script>document.title = "mine"</script><img src="http://127.0.0.1:9/x"></body>'
    reader = Reader(driver, tmp_path / "gallery.html")
    reader.open(page.replace(b"</body>", intruder))
    assert driver.title == "Gallery · efficientnet_lite0"
    assert len([one for one in reader.complaints() if "Content Security Policy" in one]) == 2
