"""The page of an audit, as a reader meets it: in a real browser, from a server of files, and from a disk."""

import contextlib
import csv
import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import pytest
from numpy.testing import assert_allclose
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from gradcam_worker.artifacts.dataset import read_batches
from gradcam_worker.audit.pages.page import PageOptions
from gradcam_worker.audit.report import HeatCells, MaskingFacts, ShortcutReport
from gradcam_worker.cli.main import main
from gradcam_worker.gradcam.imaging.overlay import encode, overlay
from gradcam_worker.operations import servers
from gradcam_worker.storage.stores import FolderStore
from tests.audit.datasets import CORNER, MIDDLE_BOX, Image, folder_dataset
from tests.audit.written_pages import page_of

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
DESKTOP, PHONE = (1280, 900), (375, 812)
MARKUP = "</script><b onclick=alert(1)>b</b>"
SHARD_ROWS = 16


CELLS = HeatCells(rows=1, columns=2, cells="/wA=")
SHORTCUT = ShortcutReport(
    class_id=1,
    kind="place",
    basis="boxes",
    place="top left corner",
    images=20,
    share=1 / 3,
    accuracy=1,
    other_accuracy=0.5,
    heat_share=0.6,
    expected_heat_share=0.1,
    heat=CELLS,
    region=CELLS,
    examples=((40, 0), (41, 0)),
    masked=20,
    probability=0.7,
    fall_blurred=0.3,
    fall_filled=0.4,
    fall_elsewhere=0.05,
    effect=0.3,
    confidence_interval=(0.2, 0.4),
    confidence=0.99,
)


class Files(SimpleHTTPRequestHandler):
    """Serves a folder, with ranges."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        site: Site = self.server.site  # type: ignore[attr-defined]  # set below
        path = site.folder / self.path.partition("?")[0].lstrip("/")
        site.asked.append((path.name, self.headers.get("range", "")))
        if site.status or not path.is_file():
            self.send_error(site.status or 404)
            return
        data, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        part = data[int(asked[1]) : int(asked[2]) + 1] if asked and site.knows_ranges else data
        self.send_response(206 if asked and site.knows_ranges else 200)
        self.send_header("content-type", self.guess_type(str(path)))
        self.send_header("content-length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@dataclass
class Site:
    """A server of files, and what it was asked for."""

    folder: Path
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)  # name, range
    knows_ranges: bool = True
    status: int = 0  # instead of any file


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Site]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.site = site = Site(folder, f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=partial(server.serve_forever, 0.05), daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with its audit: 40 images are right, 20 look into a corner, 12 are of another class."""
    known = {MARKUP: "<i>hospital</i>", "tags": [7, 2**60 + 1]}
    pictures = [
        *(
            Image(
                1,
                1,
                box=MIDDLE_BOX,
                probability=0.5 + number / 100,
                second=2,
                carried={"age": number, **known},
            )
            for number in range(40)
        ),
        *Image(1, 1, CORNER, MIDDLE_BOX, probability=0.4, second=2, carried={"age": None, **known}).times(20),
        *Image(2, 3, box=MIDDLE_BOX, probability=0.3, second=3, carried={"age": 7, MARKUP: "B"}).times(12),
        Image(2, error="image_not_found"),
    ]
    folder = folder_dataset(tmp_path_factory.mktemp("audited") / "my cams", pictures, shard_rows=SHARD_ROWS)
    photo = encode(np.full((300, 400, 3), (10, 20, 30), np.uint8))
    (folder / "photo.jpg").write_bytes(photo)
    page_of(
        FolderStore(folder),
        folder / "audit",
        {f"s3://photos/{row}.jpg": photo for row in range(40)},
        options=PageOptions(image_links=32),
        shortcuts=(SHORTCUT,),
        masking=MaskingFacts(suspects=2, named=1, dropped=1),
        sign=lambda uri, seconds: f"../photo.jpg?{uri.rpartition('/')[2]}&{seconds}",
    )
    return folder


class Reader:
    """Somebody at a browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, size: tuple[int, int] = DESKTOP) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get("about:blank")
        self.complaints()
        self.driver.get(url)
        self.until(lambda: self.all("[role=tab]"))

    def until(self, is_so: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 30).until(lambda _: is_so())

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> list[str]:
        return [str(one.get_property("textContent")) for one in self.all(selector)]

    def tab(self, name: str) -> None:
        self.run(f"document.getElementById('tab-{name}').click()")

    def rows(self, site: str, filters: list[dict[str, Any]], sort: str = "", *, is_down: bool = True) -> str:
        """Open the rows that meet filters; return how many there are, in words."""
        wish = json.dumps({"filters": filters, "sort": {"column": sort, "isDown": is_down}})
        self.open(f"{site}/audit/index.html#rows?{quote(wish)}")
        self.until(lambda: self.text("#found")[:1] not in ([], ["Reading…"]))
        self.until(lambda: self.all(".tiles figure, .empty, #problem"))
        return self.text("#found")[0]

    def asked(self) -> list[str]:
        """What was asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [one["params"] for one in events if one["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def reader(driver: webdriver.Chrome) -> Iterator[Reader]:
    """A reader, to whom no page may complain."""
    reader = Reader(driver)
    reader.complaints()
    yield reader
    assert [one for one in reader.complaints() if "favicon" not in one] == []


@pytest.fixture
def site(folder: Path) -> Iterator[Site]:
    with served(folder) as site:
        yield site


def is_(column: str, value: Any) -> dict[str, Any]:
    return {"column": column, "operator": "is", "value": value}


def test_what_was_found_is_in_the_page_and_asks_for_nothing_more(reader: Reader, site: Site) -> None:
    reader.open(f"{site.url}/audit/index.html")
    assert reader.text("#tabs button")[:2] == ["Gallery3", "Confusions1"]
    heads = [re.sub(r"\s+", " ", one) for one in reader.text("h3")]
    assert "Right for the wrong reason: 20" in heads
    assert reader.all(".card figure canvas")
    reader.tab("confusions")
    assert reader.text(".pair") == ["class 3is taken forclass 2"]
    assert [name for name, _ in site.asked] == ["index.html"]


def test_a_shortcut_is_shown_with_its_effect_and_its_images(reader: Reader, site: Site) -> None:
    reader.open(f"{site.url}/audit/index.html#shortcuts")
    assert reader.text(".card h2") == ["class 1: top left corner"]
    effect = (
        "Masked here, the class loses 30.0 % more of its probability than masked elsewhere (20.0 % to 40.0 %"
    )
    assert reader.text(".falls p")[0].startswith(effect)
    assert reader.text(".fall b") == ["30.0 %", "40.0 %", "5.0 %"]
    assert len(reader.all(".tiles figure")) == 2
    assert "1 with an effect, 1 without" in reader.text("main > p")[0]


def test_a_cell_of_the_confusion_matrix_opens_its_images(reader: Reader, site: Site) -> None:
    reader.open(f"{site.url}/audit/index.html#confusions")
    (cell,) = reader.all(".matrix td button")
    assert cell.get_attribute("aria-label") == "class 3 predicted as class 2: 12 images"
    cell.click()
    reader.until(lambda: len(reader.all(".tiles figure")) == 12)
    assert reader.text("#found") == ["12 of 144 heatmaps"]
    chosen = ".filter [aria-label=Value] option:checked"
    reader.until(lambda: set(reader.text(chosen)) == {"class 3 (24)", "class 2 (72)", "1 (72)"})
    assert set(reader.text("figcaption span:nth-of-type(2)")) == {"is class 3"}


def test_rows_are_filtered_by_carried_columns_and_sorted_by_metrics(reader: Reader, site: Site) -> None:
    older = [is_("rank", 1), {"column": "age", "operator": "at least", "value": 30}]
    assert reader.rows(site.url, older, "age") == "10 of 144 heatmaps"
    named = [re.search(r"row (\d+)", one.get_attribute("aria-label")) for one in reader.all(".tile")]
    assert [int(found[1]) for found in named if found] == list(range(39, 29, -1))
    assert reader.rows(site.url, [is_("rank", 1), is_(MARKUP, "B")]) == "12 of 144 heatmaps"
    missing = [is_("rank", 1), {"column": "age", "operator": "is missing", "value": ""}]
    assert reader.rows(site.url, missing, "heat_inside", is_down=False) == "20 of 144 heatmaps"
    assert reader.rows(site.url, [is_("cause", 1), is_("rank", 1)]) == "20 of 144 heatmaps"
    assert reader.rows(
        site.url, [{"column": MARKUP, "operator": "contains", "value": "HOSP"}, is_("rank", 1)]
    )
    assert reader.text("#found") == ["60 of 144 heatmaps"]
    assert reader.rows(site.url, [is_("class_id", 99)]) == "0 of 144 heatmaps"
    assert reader.text(".empty p") == ["No row meets these filters."]


def test_a_row_is_read_from_the_dataset_as_it_was_computed(reader: Reader, site: Site, folder: Path) -> None:
    reader.rows(site.url, [is_("row", 45)])
    reader.until(lambda: len(reader.all(".tile")) == 2)
    url = reader.until(lambda: _painted(reader, ".tile canvas"))
    drawn = np.array(url, int).reshape(192, 256, 4)[:, :, :3]
    file = sorted((folder / "data").glob("*.parquet"))[45 // SHARD_ROWS]
    (batch,) = read_batches(file.read_bytes())
    place = batch.other_columns["row"].to_pylist().index(45)
    black = np.zeros(drawn.shape, np.uint8)
    expected = overlay(black, batch.heatmaps[place].astype(np.float32), alpha=1, colormap="viridis")
    assert_allclose(drawn, expected, atol=8)  # a level's
    names = [name for name, _ in site.asked]
    assert names.count("rows.parquet") == 1, "a small table is read whole"
    assert sum(name.startswith("0000") for name in names) == 1


def test_whole_numbers_are_shown_in_lists_and_however_large(reader: Reader, site: Site) -> None:
    reader.rows(site.url, [is_("row", 45)])
    reader.until(lambda: len(reader.all(".tile")) == 2)
    reader.all(".tile")[0].click()
    reader.until(lambda: "tags" in reader.text("#look-facts th"))
    assert f'[7,"{2**60 + 1}"]' in reader.text("#look-facts td")


def _painted(reader: Reader, selector: str) -> Any:
    script = "(() => {{ const canvas = document.querySelector('{}'), data = canvas.getContext('2d')"
    script += (
        ".getImageData(0, 0, canvas.width, canvas.height).data; return data[3] ? [...data] : null; }})()"
    )
    return reader.run(script.format(selector))


def test_images_that_are_not_in_the_page_are_read_by_their_links(reader: Reader, site: Site) -> None:
    reader.rows(site.url, [is_("row", 70)])
    reader.until(
        lambda: reader.run("[...document.querySelectorAll('.tile img')].some((one) => one.naturalWidth)")
    )
    assert ("photo.jpg", "") in site.asked
    reader.rows(site.url, [is_("row", 45), is_("rank", 2)])
    reader.until(lambda: reader.all(".tile canvas"))
    assert not reader.all(".tile img"), "of this row the heatmap is shown alone"


def test_images_are_gone_through_by_keys_and_judged(
    reader: Reader, site: Site, tmp_path: Path, driver: webdriver.Chrome
) -> None:
    driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    reader.rows(site.url, [is_("rank", 1)], "row", is_down=False)
    reader.all(".tile")[0].click()
    reader.until(lambda: reader.text("#look-place") == ["1 of 72"])
    body = driver.switch_to.active_element
    body.send_keys("2")
    body.send_keys(Keys.ARROW_RIGHT)
    reader.until(lambda: reader.text("#look-place") == ["2 of 72"])
    driver.switch_to.active_element.send_keys("n")
    reader.one("#note").send_keys('=1+1, "odd"')
    reader.one("#close").click()
    reader.tab("notes")
    reader.until(lambda: reader.all("#export"))
    assert reader.text("tbody td:nth-child(3)") == ["Looks at the wrong thing", ""]
    reader.one("#export").click()
    saved = tmp_path / "audit-notes.csv"
    reader.until(saved.exists)
    rows = list(csv.DictReader(saved.read_text("utf-8-sig").splitlines()))
    assert [(row["row"], row["index"], row["verdict"], row["note"]) for row in rows] == [
        ("0", "0", "wrong", ""),
        ("1", "0", "", '\'=1+1, "odd"'),
    ]
    driver.refresh()
    reader.until(lambda: reader.text("#tab-notes") == ["Notes2"])
    reader.run("localStorage.clear()")


def test_from_a_disk_the_page_shows_what_it_holds_and_rows_of_a_chosen_folder(
    reader: Reader, folder: Path, tmp_path: Path
) -> None:
    reader.open((folder / "audit" / "index.html").as_uri())
    assert reader.all(".card figure canvas")
    reader.all(".card .tile")[-1].click()
    reader.until(lambda: reader.run("document.getElementById('look').open"))
    reader.one("#close").click()
    reader.tab("rows")
    assert "Choose the dataset" in reader.text(".empty")[0]
    reader.run("document.getElementById('folder').hidden = false")
    another = tmp_path / "another"
    another.mkdir()
    (another / "rows.parquet").write_bytes(b"PAR1")
    reader.one("#folder").send_keys(str(another))
    reader.until(lambda: reader.text("#problem"))
    assert "is not that of this page" in reader.text("#problem")[0]
    reader.one("#folder").send_keys(str(folder))
    reader.until(lambda: reader.text("#found") == ["72 of 144 heatmaps"])
    reader.until(lambda: len(reader.all(".tile")) >= 24)


def test_what_looks_like_markup_is_shown_as_it_was_written(reader: Reader, site: Site) -> None:
    reader.rows(site.url, [is_("rank", 1)])
    assert MARKUP in reader.text("[aria-label=Column] option")
    reader.all(".tile")[0].click()
    reader.until(lambda: MARKUP in reader.text("#look-facts th"))
    assert "<i>hospital</i>" in reader.text("#look-facts td")
    assert reader.run("document.querySelectorAll('b[onclick], i, iframe').length") == 0
    page = (site.folder / "audit" / "index.html").read_bytes()
    intruder = b'<script>document.title = "mine"</script></body>'
    (site.folder / "audit" / "other.html").write_bytes(page.replace(b"</body>", intruder))
    reader.open(f"{site.url}/audit/other.html")
    assert reader.driver.title == "Audit · efficientnet_lite0"
    assert len([one for one in reader.complaints() if "Content Security Policy" in one]) == 1


def test_a_server_without_ranges_is_enough_and_one_that_refuses_is_named(reader: Reader, site: Site) -> None:
    site.knows_ranges = False
    assert reader.rows(site.url, [is_("rank", 1)]) == "72 of 144 heatmaps"
    reader.until(lambda: reader.all(".tile"))
    reader.open(f"{site.url}/audit/index.html")
    site.status = 403
    reader.tab("rows")
    reader.until(lambda: reader.text("#problem"))
    assert "expired" in reader.text("#problem")[0]
    assert any("403" in one for one in reader.complaints())


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_no_tab_is_wider_than_the_window_and_a_dark_scheme_is_dark(
    reader: Reader, site: Site, size: tuple[int, int]
) -> None:
    reader.open(f"{site.url}/audit/index.html", size)
    for name in ("gallery", "confusions", "shortcuts", "map", "rows", "notes"):
        reader.tab(name)
        time.sleep(0.2)
        wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert reader.run(wider) == 0, name
    for scheme, ground in (("light", 246), ("dark", 20)):
        wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
        color = reader.run("getComputedStyle(document.body).backgroundColor")
        assert int(re.findall(r"\d+", color)[0]) == ground


def test_the_commands_of_its_docs_page_do_what_they_say(
    reader: Reader, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (ROOT / "docs" / "how-to" / "audit-page.md").read_text()
    serve, audit = re.findall(r"```bash\n(.*?)\n```", text, re.DOTALL)
    (tmp_path / "cams").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(audit)
    assert program == "gradcam"
    assert main([*arguments, "--no-trial"]) == 0  # which test_pages.py has: it loads TensorFlow
    port = servers.free_port()
    python, *arguments = shlex.split(serve.replace("8000", str(port)))
    assert python == "python3"
    server = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/audit/"
        reader.until(lambda: _answers(url))
        reader.open(f"{url}#rows")
        reader.until(lambda: reader.text("#found") == ["72 of 144 heatmaps"])
        reader.until(lambda: "https://photos.example/0.jpg" in reader.asked())
    finally:
        server.terminate()
        server.wait()
    reader.complaints()  # photos.example does not answer


def _answers(url: str) -> bool:
    try:
        with urlopen(url) as answer:  # noqa: S310  # the address is the test's own
            return bool(answer.status == HTTPStatus.OK)
    except OSError:
        return False
