"""The page of an audit of a million synthetic images of 1000 classes, in Chromium, from a server of files on
this machine: until it is opened and drawn, until the rows of a confusion are filtered, sorted and drawn, and
how much is asked for. The page holds 600 images, as by default. Medians of five openings, nothing is cached.
"""

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np

from devtools.bench.report import Figures, NothingToMeasure, Requirement, at_most, table
from devtools.synthetic_dataset import SyntheticImages, write_folder
from gradcam_worker.audit.dataset.row_table import RowTable
from gradcam_worker.audit.pages.page import write_page
from gradcam_worker.audit.run import audit
from gradcam_worker.gradcam.decoding.decode import Limits
from gradcam_worker.storage.stores import FolderStore
from gradcam_worker.testing import MemoryImageFetcher

TITLE = "The page of an audit"
PACKAGES = ("pyarrow", "selenium")
IMAGES, QUICK_IMAGES = 1_000_000, 20_000
CLASSES = 1000
WRONG = 0.25  # of the predictions
REPEATS = 5
TIMEOUT_S = 120
REQUIRED_OPEN_S = 3.0
REQUIRED_ROWS_S = 10.0
PHOTO = (192, 256, 3)
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
)


class Files(SimpleHTTPRequestHandler):
    """A server of files with ranges."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with the file, or a part of it."""
        path, asked = Path(self.translate_path(self.path)), self.headers.get("range", "")
        if not path.is_file():
            self.send_error(404)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        with path.open("rb") as file:
            size = path.stat().st_size
            begin, end = (int(first), int(last) + 1) if asked else (0, size)
            file.seek(begin)
            data = file.read(end - begin)
        self.send_response(206 if asked else 200)
        self.send_header("content-type", self.guess_type(str(path)))
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _images(count: int) -> SyntheticImages:
    draw = np.random.default_rng(0)
    truth = draw.integers(0, CLASSES, count).astype(np.int32)
    is_wrong = draw.random(count) < WRONG
    predicted = np.where(is_wrong, (truth + draw.integers(1, 4, count)) % CLASSES, truth).astype(np.int32)
    return SyntheticImages(
        predicted,
        truth,
        draw.uniform(0.05, 0.95, (count, 2)).astype(np.float32),
        probability=draw.uniform(0.2, 1, count).astype(np.float32),
        boxes=np.tile(np.array([0.2, 0.2, 0.8, 0.8], np.float32), (count, 1)),
        carried={
            "site": np.array([f"site {name}" for name in "ABCDEFGH"])[draw.integers(0, 8, count)].tolist(),
            "age": draw.integers(18, 90, count),
        },
    )


def _make(folder: Path, count: int) -> int:
    """Write a dataset, its audit and its page; return the page's bytes."""
    write_folder(_images(count), folder, shard_rows=256)
    output = folder / "audit"
    output.mkdir()
    store, rows = FolderStore(folder), RowTable(output)
    found = audit(store, table=rows)
    rows.finish({"cause": found.causes})
    _, photo = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, PHOTO, np.uint8))
    names = (f"s3://photos/{row}.jpg" for row in range(count))
    images = MemoryImageFetcher(dict.fromkeys(names, photo.tobytes()))
    return write_page(output, found.report, store, images, Limits()).size


class _Reader:
    """A browser without anything cached."""

    def __init__(self, folder: Path) -> None:
        from selenium import webdriver

        binary, program = shutil.which("chromium"), shutil.which("chromedriver")
        if not binary or not program:
            message = "Chromium and its driver are not installed: see scripts/browser."
            raise NothingToMeasure(message)
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for flag in (*FLAGS, f"--user-data-dir={folder}"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(program))
        self.driver.set_window_size(1280, 900)

    def open(self, url: str, tab: str) -> dict[str, float]:
        """Open a page; return when it was drawn, and what was asked for since."""
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Network.clearBrowserCache", {})
        self.driver.get(url)
        end = time.monotonic() + TIMEOUT_S
        while not (drawn := self._marked(tab)):
            if time.monotonic() > end:
                raise TimeoutError(url)
            time.sleep(0.05)
        script = "return performance.getEntriesByType('resource').map((one) => one.transferSize)"
        sizes = self.driver.execute_script(script)
        return {"s": drawn / 1000, "requests": 1 + len(sizes), "read_mb": sum(sizes) / 1e6}

    def _marked(self, tab: str) -> float:
        script = f"return performance.getEntriesByName('audit {tab}')[0]?.startTime || 0"
        return float(self.driver.execute_script(script))


def measure(*, quick: bool) -> dict[str, Any]:
    """Open the page several times."""
    count = QUICK_IMAGES if quick else IMAGES
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home, "cams")
        page_bytes = _make(folder, count)
        pair = [("class_id", 1), ("truth", 0), ("rank", 1)]
        filters = [{"column": name, "operator": "is", "value": value} for name, value in pair]
        older = [{"column": "site", "operator": "is", "value": "site C"}, *filters[-1:]]
        wishes = {
            "opened": ("gallery", ""),
            "a confusion": ("rows", {"filters": filters, "sort": {"column": "probability", "isDown": True}}),
            "a carried column, sorted": (
                "rows",
                {"filters": older, "sort": {"column": "heat_inside", "isDown": False}},
            ),
        }
        reader = _Reader(Path(home, "profile"))
        cases = {}
        with _served(folder) as site:
            for name, (tab, wish) in wishes.items():
                address = f"{site}/audit/index.html#{tab}" + (f"?{quote(json.dumps(wish))}" if wish else "")
                runs = [reader.open(address, tab) for _ in range(REPEATS)]
                cases[name] = {figure: median(run[figure] for run in runs) for figure in runs[0]}
        reader.driver.quit()
        return {"device": "CPU", "images": count, "page_mb": page_bytes / 1e6, "cases": cases}


def requirements(figures: Figures) -> Iterator[Requirement]:
    """The page opens in a moment, and rows come in a few."""
    cases = figures["cases"]
    yield at_most("opened", REQUIRED_OPEN_S, cases["opened"]["s"], " s")
    yield at_most("requests to open it", 1, cases["opened"]["requests"], "")
    for name, case in cases.items():
        if name != "opened":
            yield at_most(name, REQUIRED_ROWS_S, case["s"], " s")


def blocks(figures: Figures) -> Iterator[str]:
    """What was opened, and how long it took."""
    yield f"{figures['images']:,} images; the page has {figures['page_mb']:.1f} MB."
    yield table(
        ("", "s", "requests", "MB read beside the page"),
        [
            (name, f"{case['s']:.2f}", f"{case['requests']:.0f}", f"{case['read_mb']:.1f}")
            for name, case in figures["cases"].items()
        ],
    )
