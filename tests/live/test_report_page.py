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
from gradcam_worker.gradcam.imaging.overlay import COLORMAPS, colors, overlay, to_grey
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.gradcam.report import page
from gradcam_worker.gradcam.sizing import SIZINGS, Sizing, spans
from gradcam_worker.testing import TinyNetwork

pytestmark = pytest.mark.live

Pixels = NDArray[np.uint8]
FACTS = {"Job": "job-1", "Image": "s3://photos/astronaut.jpg", "Image SHA-256": "0123456789abcdef" * 4}
DESKTOP, PHONE = (1280, 900), (375, 812)
VIEWER = "document.querySelector('gradcam-viewer')"
BLEND = f"""
const {{photo, canvas: heat}} = {VIEWER}.panes[arguments[0]], canvas = document.createElement("canvas");
[canvas.width, canvas.height] = [heat.width, heat.height];
const pen = canvas.getContext("2d");
pen.drawImage(photo, 0, 0, heat.width, heat.height);
pen.globalAlpha = getComputedStyle(heat).opacity;
pen.drawImage(heat, 0, 0);
return canvas.toDataURL();
"""
COLORMAP, ALPHA = "viridis", 0.5  # as the page opens
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
        WebDriverWait(self.driver, 20).until(lambda _: self.all(".frame[aria-label*=heatmap]"))

    def find(self, name: str) -> WebElement:
        """The element of the viewer with an id."""
        (found,) = self.all(f"#{name}")
        return found

    def all(self, selector: str) -> list[WebElement]:
        """Elements of the viewer; of the page around it, if it has none."""
        found: list[WebElement] = self.run(f"[...{VIEWER}.shadowRoot.querySelectorAll('{selector}')]")
        return found or self.driver.find_elements(By.CSS_SELECTOR, selector)

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

    def picture(self, pane: int = 0) -> NDArray[np.int64]:
        """What is drawn, (height, width, 3) RGB: the photo, and the colours in their opacity over it."""
        url = self.driver.execute_script(BLEND, pane)
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


def drawn_by_server(photo: Pixels, heatmap: NDArray[np.float32], **options: Any) -> Pixels:
    """The overlay in the colours with which the page opens."""
    return overlay(photo, heatmap, **{"alpha": ALPHA, "colormap": COLORMAP, **options})


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
        assert_allclose(drawn, drawn_by_server(photo_of(made), seen.heatmaps[0]), atol=ROUNDING)
        assert abs(drawn - drawn_by_server(photo, seen.heatmaps[0])).mean() < 2, "what the JPEG costs"

    @pytest.mark.parametrize("size", [(600, 90), (90, 600), (5, 4), (1, 1)])
    def test_so_it_is_for_wide_tall_and_tiny_photos(
        self, reader: Reader, seen: Explanation, photo: Pixels, size: tuple[int, int]
    ) -> None:
        shaped = fit(photo, size)
        made = page(seen, shaped, name="shaped.png", facts=FACTS)
        reader.open(made)
        assert_allclose(reader.picture(), drawn_by_server(photo_of(made), seen.heatmaps[0]), atol=ROUNDING)
        box = reader.all(".frame")[0].rect
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
        expected = drawn_by_server(shown, seen.heatmaps[0], placement=placement)
        assert_allclose(reader.picture(), expected, atol=ROUNDING)
        rows, columns = spans(placement, (shown.shape[0], shown.shape[1]))
        outside = np.ones(shown.shape[:2], bool)
        outside[rows.slice, columns.slice] = False
        assert outside.any() == ("letterbox" not in name)
        assert_allclose(reader.picture()[outside], shown[outside], atol=ROUNDING)
        assert any("cut off" in one for one in reader.text("#notes p")) == outside.any()

    def test_every_colour_map_can_be_chosen(self, reader: Reader, made: bytes, seen: Explanation) -> None:
        reader.open(made)
        choice = Select(reader.find("colormap"))
        assert choice.first_selected_option.text == COLORMAP
        assert {option.text for option in choice.options} == set(COLORMAPS)
        for colormap in reversed(COLORMAPS):
            choice.select_by_visible_text(colormap)
            expected = drawn_by_server(photo_of(made), seen.heatmaps[0], colormap=colormap)
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
        expected = drawn_by_server(photo_of(made), seen.heatmaps[0], alpha=1)
        assert_allclose(reader.picture(), expected, atol=6)  # a level more or less is up to 4 of colour

    def test_what_lies_below_the_threshold_stays_photo(
        self, reader: Reader, made: bytes, seen: Explanation
    ) -> None:
        reader.open(made)
        reader.find("threshold").send_keys(Keys.ARROW_RIGHT * 60)
        assert reader.text("#threshold-value") == ["60 % of the scale"]
        shown, levels = photo_of(made), to_grey(seen.heatmaps[0], photo_of(made).shape[:2])
        expected = np.where((levels < 0.6 * 255)[..., None], shown, drawn_by_server(shown, seen.heatmaps[0]))
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
            assert reader.run(f"{VIEWER}.shadowRoot.activeElement.id") == f"tab-{index}"
            assert reader.run(f"getComputedStyle({VIEWER}.shadowRoot.activeElement).outlineStyle") == "solid"
            assert reader.find("panel").get_attribute("aria-labelledby") == f"tab-{index}"
            expected = drawn_by_server(photo_of(made), seen.heatmaps[index])
            assert_allclose(reader.picture(), expected, atol=ROUNDING)

    def test_the_keyboard_alone_reaches_every_setting(self, reader: Reader, made: bytes) -> None:
        reader.open(made)
        met = []
        for _ in range(9):
            reader.press(Keys.TAB)
            met.append(reader.run(f"{VIEWER}.shadowRoot.activeElement.id || 'picture'"))
        settings = ["opacity", "threshold", "colormap", "compare", "scale"]
        assert met == ["tab-0", "picture", "zoom-in", "cells", *settings]
        assert all(reader.all(f"label[for={name}]") for name in settings)

    def test_a_click_chooses_a_class_and_all_about_it_is_told(self, reader: Reader, made: bytes) -> None:
        reader.open(made)
        reader.find("tab-1").click()
        assert reader.text("figcaption")[0] == "101 Egyptian cat25.0 %"
        assert reader.text(".notes dd") == ["0 to 1 before negative values were cut off and it was scaled"]
        assert "Nothing" not in reader.text("#marks")[0]
        reader.find("tab-2").click()
        assert reader.text("#marks p")[0] == "Nothing in the image speaks for this class."

    def test_predictions_are_bars_as_long_as_they_are_probable(self, reader: Reader, made: bytes) -> None:
        reader.open(made)
        assert reader.text("#tabs .percent") == ["50.0 %", "25.0 %", "16.7 %"]
        widths = [
            bar.rect["width"] / frame.rect["width"]
            for bar, frame in zip(reader.all(".bar div"), reader.all(".bar"), strict=True)
        ]
        assert widths == pytest.approx([1 / 2, 1 / 4, 1 / 6], abs=0.01)

    def test_predictions_that_are_not_explained_are_listed_apart(
        self, reader: Reader, photo: Pixels, seen: Explanation
    ) -> None:
        first = replace(seen, explained=seen.explained[:1], heatmaps=seen.heatmaps[:1])
        reader.open(page(first, photo, name="one.jpg", facts={}))
        assert reader.text("#others-title") == ["2 more predicted, not explained"]
        assert reader.text("#others-list .name") == ["101 Egyptian cat", "102 nothing"]

    def test_title_facts_and_the_names_of_the_job_are_told(
        self, reader: Reader, seen: Explanation, photo: Pixels
    ) -> None:
        facts = {"Date": "2026-11-30 08:12 UTC", "Method": "gradcam of the logit", **FACTS}
        reader.open(page(seen, photo, name="astronaut.jpg", facts=facts, metadata={"case": "4711"}))
        assert reader.driver.title == "efficientnet_lite0 · astronaut.jpg"
        assert reader.text("h1") == [reader.driver.title]
        assert reader.text("#lead dd") == ["2026-11-30 08:12 UTC", "gradcam of the logit"]
        assert reader.text("#metadata dt, #metadata dd") == ["case", "4711"]
        told = dict(zip(reader.text("#facts dt"), reader.text("#facts dd"), strict=True))
        assert told == {**FACTS, "Heatmap": "9 x 7 cells", "Photo on this page": "512 x 512 pixels"}


class TestScale:
    """A class that the network all but excludes must not look as hot as its first without a word."""

    def test_each_class_has_its_own_scale_and_the_page_says_so(
        self, reader: Reader, made: bytes, seen: Explanation
    ) -> None:
        reader.open(made)
        reader.find("tab-1").click()
        assert "Each class has its own scale" in reader.text("#marks .mark")[0]
        assert reader.text("#top") == ["100 %: strongest region for 101 Egyptian cat, raw 1"]
        expected = drawn_by_server(photo_of(made), seen.heatmaps[1])
        assert_allclose(reader.picture(), expected, atol=ROUNDING)

    def test_one_scale_for_all_is_that_of_the_raw_maps(
        self, reader: Reader, seen: Explanation, photo: Pixels
    ) -> None:
        peaks = np.array([4, 1, 0], np.float32)
        made = page(replace(seen, raw_max=peaks), photo, name="a.jpg", facts={})
        reader.open(made)
        Select(reader.find("scale")).select_by_value("common")
        reader.find("tab-1").click()
        expected = drawn_by_server(photo_of(made), seen.heatmaps[1] / 4)
        assert_allclose(reader.picture(), expected, atol=ROUNDING)
        assert reader.text("#top") == ["100 %: strongest region of all classes (100 suit, raw 4)"]
        assert "101 Egyptian cat reaches 25 % of it" in reader.text("#marks")[0]
        peak, legend = reader.find("peak").rect, reader.find("legend").rect
        assert (peak["x"] + 1 - legend["x"]) / legend["width"] == pytest.approx(0.25, abs=0.01)

    def test_a_job_with_one_scale_opens_with_it(
        self, reader: Reader, seen: Explanation, photo: Pixels
    ) -> None:
        joint = seen.heatmaps * np.array([1, 0.25, 0], np.float32)[:, None, None]
        one_scale = replace(seen, heatmaps=joint, raw_max=np.array([4, 1, 0], np.float32))
        made = page(one_scale, photo, name="a.jpg", facts={}, normalize="joint")
        reader.open(made)
        reader.find("tab-1").click()
        assert_allclose(reader.picture(), drawn_by_server(photo_of(made), joint[1]), atol=ROUNDING)

    def test_two_classes_stand_side_by_side_in_one_scale(
        self, reader: Reader, seen: Explanation, photo: Pixels
    ) -> None:
        made = page(replace(seen, raw_max=np.array([4, 2, 0], np.float32)), photo, name="a.jpg", facts={})
        reader.open(made)
        Select(reader.find("compare")).select_by_value("1")
        for pane, share in ((0, 1), (1, 1 / 2)):
            expected = drawn_by_server(photo_of(made), seen.heatmaps[pane] * share)
            assert_allclose(reader.picture(pane), expected, atol=ROUNDING)
        first, second = (frame.rect for frame in reader.all(".frame"))
        assert (first["y"], first["width"]) == (second["y"], second["width"])
        assert first["x"] + first["width"] < second["x"]
        Select(reader.find("compare")).select_by_value("-1")
        assert not reader.all("figure")[1].is_displayed()
        assert reader.find("scale").get_property("value") == "own"

    def test_a_class_that_the_network_all_but_excludes_says_so(
        self, reader: Reader, seen: Explanation, photo: Pixels
    ) -> None:
        improbable = replace(seen.explained[0], probability=0.001)
        single = replace(seen, explained=(improbable,), heatmaps=seen.heatmaps[:1])
        reader.open(page(single, photo, name="a.jpg", facts={}))
        assert "only 0.1 %" in reader.text("#marks .mark")[0]


class TestCloseLook:
    def test_the_cells_of_the_map_can_be_seen_as_they_are(
        self, reader: Reader, made: bytes, seen: Explanation
    ) -> None:
        reader.open(made)
        reader.find("cells").click()
        blocks = np.kron(seen.heatmaps[0], np.ones((128, 128), np.float32))  # 7 x 9 cells of whole pixels
        size = photo_of(made).shape[:2]
        rows, columns = (
            np.minimum((np.arange(side) + 0.5) / side * count, count - 1).astype(int) * 128
            for side, count in zip(size, (7, 9), strict=True)
        )
        levels = np.rint(blocks[rows][:, columns] * 255).astype(int)
        shown = photo_of(made)
        expected = (1 - ALPHA) * shown + ALPHA * colors(COLORMAP)[levels, 0]
        assert_allclose(reader.picture(), expected, atol=ROUNDING)
        assert len(re.findall("M", reader.all("svg path")[0].get_attribute("d") or "")) == 8 + 10

    def test_photo_and_heatmap_are_enlarged_and_moved_together(self, reader: Reader, made: bytes) -> None:
        reader.open(made)
        Select(reader.find("compare")).select_by_value("1")
        for _ in range(3):
            reader.find("zoom-in").click()
        frame = reader.all(".frame")[0]
        ActionChains(reader.driver).move_to_element(frame).click_and_hold().move_by_offset(
            40, 20
        ).release().perform()
        moved = {one.value_of_css_property("transform") for one in reader.all(".stage")}
        (matrix,) = moved
        zoom, *_, right, down = map(float, re.findall(r"-?[\d.]+", matrix))
        width = frame.rect["width"]
        assert zoom == pytest.approx(1.6**3)
        assert right == pytest.approx(-width * (zoom - 1) / 2 + 40, abs=1)
        assert down == pytest.approx(-frame.rect["height"] * (zoom - 1) / 2 + 20, abs=1)
        reader.find("zoom-whole").click()
        assert {one.value_of_css_property("transform") for one in reader.all(".stage")} == {
            "matrix(1, 0, 0, 1, 0, 0)"
        }

    def test_the_value_under_the_pointer_is_told(
        self, reader: Reader, made: bytes, seen: Explanation
    ) -> None:
        reader.open(made)
        reader.find("tab-1").click()
        reader.find("cells").click()
        ActionChains(reader.driver).move_to_element(reader.all(".frame")[0]).perform()
        share = seen.heatmaps[1][3, 4]
        assert reader.text("#value")[0].startswith(f"{round(100 * share)} % · raw {share:.3g}"[:12])
        assert re.search(r"x 25[56], y 25[56], cell 5, 4$", reader.text("#value")[0])

    def test_the_keyboard_reads_the_map_cell_by_cell(
        self, reader: Reader, made: bytes, seen: Explanation
    ) -> None:
        reader.open(made)
        reader.find("cells").click()
        frame = reader.all(".frame")[0]
        frame.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_DOWN)  # the first goes to the centre
        assert reader.text("#told")[0].startswith(f"{round(100 * seen.heatmaps[0][4, 3])} %")
        assert reader.text("#told")[0].endswith("cell 4, 5")
        reader.press(*[Keys.ARROW_DOWN] * 9, "+")
        assert reader.text("#told")[0].endswith("cell 4, 7"), "the map ends here"
        probe, seen_part = reader.all(".probe")[0].rect, frame.rect
        assert 0 <= probe["y"] + probe["height"] / 2 - seen_part["y"] <= seen_part["height"]

    def test_a_map_on_a_part_of_the_photo_has_no_value_elsewhere(
        self, reader: Reader, seen: Explanation, photo: Pixels
    ) -> None:
        placement = SIZINGS["torchvision"].placement((512, 512), (224, 224))
        reader.open(page(replace(seen, placement=placement), photo, name="a.jpg", facts={}))
        frame = reader.all(".frame")[0]
        corner = -frame.rect["width"] / 2 + 4
        ActionChains(reader.driver).move_to_element_with_offset(frame, corner, corner).perform()
        assert reader.text("#value") == ["not seen by the network"]
        assert any("cut off" in one for one in reader.text("#notes p"))


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
        if count == 1:
            assert not reader.find("tabs").is_displayed(), "there is nothing to choose from"
            return
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
            ink = reader.run(f"getComputedStyle({VIEWER}).color")
            assert (max(map(int, re.findall(r"\d+", ink))) > 200) == (scheme == "dark")
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
        assert reader.text("#facts dd")[:-2] == reader.text("#facts dt")[:-2] == HOSTILE
        assert [len(reader.all(tag)) for tag in ("script", "iframe, object, b", "img:not(.stage > *)")] == [
            2,
            0,
            0,
        ]

    def test_a_script_that_got_in_nevertheless_would_not_run(
        self, driver: webdriver.Chrome, made: bytes, tmp_path: Path
    ) -> None:
        intruder = b'<script>document.title = "mine"</script><img src="http://127.0.0.1:9/x"></body>'
        reader = Reader(driver, tmp_path)
        reader.open(made.replace(b"</body>", intruder))
        assert driver.title == "efficientnet_lite0 · astronaut.jpg"
        refused = [one for one in reader.complaints() if "Content Security Policy" in one]
        assert len(refused) == 2
