"""The report, as a reader meets it: in a real browser, from a file, without a network."""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.explain import Explanation, Prediction, explain_image
from gradcam_worker.gradcam.imaging.overlay import COLORMAPS, overlay, to_grey
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.report import page
from gradcam_worker.gradcam.sizing import SIZINGS, Sizing, spans
from gradcam_worker.testing import TinyNetwork

pytestmark = pytest.mark.live

Pixels = NDArray[np.uint8]
FACTS = {"Job": "job-1", "Image": "s3://photos/astronaut.jpg", "Image SHA-256": "0123456789abcdef" * 4}
DESKTOP, PHONE = (1280, 900), (375, 812)
ROUNDING = 4  # levels of 255: the browser decodes the JPEG and blends in ways of its own
HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "<!-- <script>alert(1)",
    "&lt;b&gt;javascript:alert(1)&amp;",
    "x" * 400,
]


@dataclass
class Reader:
    """Somebody at a browser."""

    driver: Any  # selenium.webdriver.Chrome, whose get_log has no types
    folder: Path

    def open(self, made: bytes, size: tuple[int, int] = DESKTOP) -> None:
        """Open a report from a file, in a window of `size` (width, height), and wait for its picture."""
        path = self.folder / "report.html"
        path.write_bytes(made)
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.complaints(), self.requests()  # those of earlier pages are theirs
        self.driver.get(path.as_uri())
        WebDriverWait(self.driver, 20).until(lambda _: self.find("picture").get_attribute("aria-label"))

    def find(self, name: str) -> WebElement:
        found: WebElement = self.driver.find_element(By.ID, name)
        return found

    def all(self, selector: str) -> list[WebElement]:
        found: list[WebElement] = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return found

    def text(self, selector: str) -> list[str]:
        """What is written in the elements, whether it is scrolled to or not."""
        return [str(one.get_property("textContent")) for one in self.all(selector)]

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def complaints(self) -> list[str]:
        """What the browser had to say since it was last asked."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses that it asked for since then."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [one["params"] for one in events if one["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]

    def picture(self) -> NDArray[np.int64]:
        """What is drawn, (height, width, 3) RGB."""
        url = self.run("document.getElementById('picture').toDataURL()")
        return decode(base64.b64decode(url.partition(",")[2])).pixels.astype(int)


@pytest.fixture
def reader(driver: webdriver.Chrome, tmp_path: Path) -> Iterator[Reader]:
    """A reader, to whom no page may complain, and for whom none may ask the network for anything."""
    reader = Reader(driver, tmp_path)
    yield reader
    assert reader.complaints() == []
    asked = [url for url in reader.requests() if not url.startswith("data:")]
    assert asked == [(tmp_path / "report.html").as_uri()]


@pytest.fixture(scope="module")
def photo(photos: Path) -> Pixels:
    return decode((photos / "astronaut.jpg").read_bytes()).pixels


@pytest.fixture(scope="module")
def seen(photo: Pixels) -> Explanation:
    """Three classes on a grid of 7 x 9; nothing speaks for the last."""
    heatmaps = np.random.default_rng(1).random((3, 7, 9), dtype=np.float32)
    heatmaps /= heatmaps.max(axis=(1, 2), keepdims=True)
    heatmaps[2] = 0
    return explained(photo, heatmaps, ["suit", "Egyptian_cat", "nothing"])


def explained(photo: Pixels, heatmaps: NDArray[np.float32], names: list[str]) -> Explanation:
    raw = np.linspace(-1, 1, len(heatmaps), dtype=np.float32)
    classes = tuple(
        Prediction(one + 1, 100 + one, f"n{one}", name, 0.5 / (one + 1)) for one, name in enumerate(names)
    )
    seen = explain_image(TinyNetwork(), photo, top_n=1)
    return replace(
        seen, explained=classes, predictions=classes, heatmaps=heatmaps, raw_min=raw, raw_max=raw + 1
    )


@pytest.fixture(scope="module")
def made(seen: Explanation, photo: Pixels) -> bytes:
    return page(seen, photo, name="astronaut.jpg", facts=FACTS)


def photo_of(made: bytes) -> Pixels:
    """The photo on the page, (height, width, 3) RGB."""
    found = re.search(rb"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", made)
    assert found
    return decode(base64.b64decode(found[1])).pixels


class TestPicture:
    def test_it_is_the_overlay_that_the_server_draws(
        self, reader: Reader, made: bytes, seen: Explanation, photo: Pixels
    ) -> None:
        reader.open(made)
        drawn = reader.picture()
        assert_allclose(drawn, overlay(photo_of(made), seen.heatmaps[0]), atol=ROUNDING)
        assert abs(drawn - overlay(photo, seen.heatmaps[0])).mean() < 2, "what the JPEG costs"

    @pytest.mark.parametrize("size", [(600, 90), (90, 600), (5, 4), (1, 1)])
    def test_so_it_is_for_wide_tall_and_tiny_photos(
        self, reader: Reader, seen: Explanation, photo: Pixels, size: tuple[int, int]
    ) -> None:
        shaped = fit(photo, size)
        made = page(seen, shaped, name="shaped.png", facts=FACTS)
        reader.open(made)
        assert_allclose(reader.picture(), overlay(photo_of(made), seen.heatmaps[0]), atol=ROUNDING)
        box = reader.find("picture").rect
        assert box["width"] / box["height"] == pytest.approx(size[1] / size[0], rel=0.05)
        assert box["height"] <= DESKTOP[1] * 0.6, "the settings are in sight, too"

    @pytest.mark.parametrize("name", ["torchvision", "timm", "letterbox", "letterbox of a tall photo"])
    def test_so_it_is_where_the_network_saw_only_a_part_of_the_photo_or_more(
        self, reader: Reader, seen: Explanation, photo: Pixels, name: str
    ) -> None:
        shaped = fit(photo, (600, 220) if "tall" in name else (300, 520))
        sizing = SIZINGS.get(name, Sizing("bilinear", "letterbox"))
        placement = sizing.placement((shaped.shape[0], shaped.shape[1]), (224, 224))
        assert placement
        made = page(replace(seen, placement=placement), shaped, name="part.png", facts=FACTS)
        reader.open(made)
        shown = photo_of(made)
        expected = overlay(shown, seen.heatmaps[0], placement=placement)
        assert_allclose(reader.picture(), expected, atol=ROUNDING)
        rows, columns = spans(placement, (shown.shape[0], shown.shape[1]))
        outside = np.ones(shown.shape[:2], bool)
        outside[rows.slice, columns.slice] = False
        assert outside.any() == ("letterbox" not in name)
        assert_allclose(reader.picture()[outside], shown[outside], atol=ROUNDING)

    def test_every_colour_map_can_be_chosen(self, reader: Reader, made: bytes, seen: Explanation) -> None:
        reader.open(made)
        choice = Select(reader.find("colormap"))
        assert [option.text for option in choice.options] == list(COLORMAPS)
        for colormap in reversed(COLORMAPS):
            choice.select_by_visible_text(colormap)
            expected = overlay(photo_of(made), seen.heatmaps[0], colormap=colormap)
            assert_allclose(reader.picture(), expected, atol=ROUNDING, err_msg=colormap)

    def test_opacity_goes_from_the_photo_alone_to_the_colours_alone(
        self, reader: Reader, made: bytes, seen: Explanation
    ) -> None:
        reader.open(made)
        reader.find("opacity").send_keys(Keys.HOME)
        assert reader.text("#opacity-value") == ["0 %"]
        assert_allclose(reader.picture(), photo_of(made), atol=ROUNDING)
        reader.find("opacity").send_keys(Keys.END)
        assert reader.text("#opacity-value") == ["100 %"]
        expected = overlay(photo_of(made), seen.heatmaps[0], alpha=1)
        assert_allclose(reader.picture(), expected, atol=6)  # a level more or less is up to 4 of colour

    def test_what_lies_below_the_threshold_stays_photo(
        self, reader: Reader, made: bytes, seen: Explanation
    ) -> None:
        reader.open(made)
        reader.find("threshold").send_keys(Keys.ARROW_RIGHT * 60)
        assert reader.text("#threshold-value") == ["60 % of the peak"]
        shown, levels = photo_of(made), to_grey(seen.heatmaps[0], photo_of(made).shape[:2])
        expected = np.where((levels < 0.6 * 255)[..., None], shown, overlay(shown, seen.heatmaps[0]))
        clear = abs(levels - 0.6 * 255) > 1  # a level more or less decides at the border
        assert 0.5 < (levels < 0.6 * 255).mean() < 0.99
        assert_allclose(reader.picture()[clear], expected[clear], atol=ROUNDING)


class TestClasses:
    def test_the_keyboard_alone_goes_through_the_classes(
        self, reader: Reader, made: bytes, seen: Explanation
    ) -> None:
        reader.open(made)
        reader.press(Keys.TAB)
        for key, index in (
            (Keys.ARROW_DOWN, 1),
            (Keys.ARROW_RIGHT, 2),
            (Keys.ARROW_RIGHT, 0),
            (Keys.ARROW_LEFT, 2),
            (Keys.ARROW_UP, 1),
            (Keys.HOME, 0),
            (Keys.END, 2),
        ):
            reader.press(key)
            chosen = [one.get_attribute("aria-selected") == "true" for one in reader.all("[role=tab]")]
            assert chosen == [one == index for one in range(3)]
            assert reader.run("document.activeElement.id") == f"tab-{index}"
            assert reader.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
            assert reader.find("panel").get_attribute("aria-labelledby") == f"tab-{index}"
            expected = overlay(photo_of(made), seen.heatmaps[index])
            assert_allclose(reader.picture(), expected, atol=ROUNDING)

    def test_the_keyboard_alone_reaches_every_setting(self, reader: Reader, made: bytes) -> None:
        reader.open(made)
        met = []
        for _ in range(5):
            reader.press(Keys.TAB)
            met.append(reader.run("document.activeElement.id"))
        assert met == ["tab-0", "panel", "opacity", "threshold", "colormap"]
        for name in met[2:]:
            assert reader.all(f"label[for={name}]")

    def test_a_click_chooses_a_class_and_all_about_it_is_told(self, reader: Reader, made: bytes) -> None:
        reader.open(made)
        reader.find("tab-1").click()
        assert reader.find("what").text == "101 Egyptian cat, 25.0 %"
        assert reader.find("more").text == "Rank 2, n1. Raw map from 0 to 1."
        assert not reader.find("zero").is_displayed()
        reader.find("tab-2").click()
        assert reader.find("zero").text == "Nothing in the image speaks for this class."

    def test_predictions_are_bars_as_long_as_they_are_probable(self, reader: Reader, made: bytes) -> None:
        reader.open(made)
        assert reader.text("#predictions .percent") == ["50.0 %", "25.0 %", "16.7 %"]
        widths = [
            bar.rect["width"] / frame.rect["width"]
            for bar, frame in zip(reader.all(".bar div"), reader.all(".bar"), strict=True)
        ]
        assert widths == pytest.approx([1 / 2, 1 / 4, 1 / 6], abs=0.01)

    def test_title_and_facts_are_told(self, reader: Reader, made: bytes) -> None:
        reader.open(made)
        assert reader.driver.title == reader.find("title").text == "efficientnet_lite0 · astronaut.jpg"
        told = dict(zip(reader.text("dt"), reader.text("dd"), strict=True))
        assert told == {**FACTS, "Heatmap": "9 x 7 cells", "Photo on this page": "512 x 512 pixels"}


class TestLayout:
    @pytest.mark.parametrize("size", [PHONE, DESKTOP])
    @pytest.mark.parametrize("count", [1, 50])
    def test_nothing_is_wider_than_the_window(
        self, reader: Reader, photo: Pixels, size: tuple[int, int], count: int
    ) -> None:
        heatmaps = np.random.default_rng(1).random((count, 14, 14), dtype=np.float32)
        names = [HOSTILE[one % len(HOSTILE)] for one in reversed(range(count))]
        facts = {"Image": "s3://photos/" + "long-" * 150}
        reader.open(page(explained(photo, heatmaps, names), photo, name="x" * 300, facts=facts), size)
        assert reader.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert len(reader.all("[role=tab]")) == count
        reader.find("tab-0").send_keys(Keys.END)
        chosen = reader.find(f"tab-{count - 1}").rect
        assert -1 <= chosen["x"] <= chosen["x"] + chosen["width"] <= size[0] + 1

    def test_a_dark_scheme_is_dark(self, reader: Reader, made: bytes) -> None:
        reader.open(made)
        grounds = []
        for scheme in ("light", "dark"):
            wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
            color = reader.run("getComputedStyle(document.body).backgroundColor")
            grounds.append(max(map(int, re.findall(r"\d+", color))))
        light, dark = grounds
        assert light > 200
        assert dark < 60


class TestSafety:
    def test_what_looks_like_markup_is_shown_as_it_was_written(self, reader: Reader, photo: Pixels) -> None:
        heatmaps = np.ones((len(HOSTILE), 2, 2), np.float32)
        facts = {text: text for text in HOSTILE}
        reader.open(page(explained(photo, heatmaps, HOSTILE), photo, name=HOSTILE[0], facts=facts))
        assert reader.driver.title == f"efficientnet_lite0 · {HOSTILE[0]}"
        assert reader.text("[role=tab] .name") == [f"{100 + one} {text}" for one, text in enumerate(HOSTILE)]
        assert reader.text("dd")[: len(HOSTILE)] == reader.text("dt")[: len(HOSTILE)] == HOSTILE
        assert (len(reader.all("script")), len(reader.all("img, iframe, object, b"))) == (2, 0)

    def test_a_script_that_got_in_nevertheless_would_not_run(
        self, driver: webdriver.Chrome, made: bytes, tmp_path: Path
    ) -> None:
        intruder = b'<script>document.title = "mine"</script><img src="http://127.0.0.1:9/x"></body>'
        reader = Reader(driver, tmp_path)
        reader.open(made.replace(b"</body>", intruder))
        assert driver.title == "efficientnet_lite0 · astronaut.jpg"
        refused = [one for one in reader.complaints() if "Content Security Policy" in one]
        assert len(refused) == 2
