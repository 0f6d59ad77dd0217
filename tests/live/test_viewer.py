"""The element <gradcam-viewer> in a page of somebody else's: from a server, under a strict policy."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from numpy.typing import NDArray
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from gradcam_worker import testing
from gradcam_worker.artifacts.npz import to_npz
from gradcam_worker.artifacts.viewer import heatmaps_record, viewer_document
from gradcam_worker.execution.attempt import JobContext
from gradcam_worker.execution.pipeline import run_job
from gradcam_worker.gradcam.classes import DATA
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.overlay import encode, overlay
from gradcam_worker.gradcam.methods.integrated import to_draw
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest

pytestmark = pytest.mark.live

VIEWER = "document.querySelector('gradcam-viewer')"
POLICY = "default-src 'none'; script-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'"
PAGE = """<!doctype html><meta charset="utf-8"><script src="/viewer.js" defer></script>
<gradcam-viewer src="{src}" photo="{photo}"></gradcam-viewer>"""
ROUNDING = 4  # levels of 255
URI = "s3://photos/flag.png"


@dataclass
class Site:
    """Files by path, and the page that shows one of them."""

    address: str
    driver: Any
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    def put(self, path: str, data: Any) -> None:
        is_bytes = isinstance(data, bytes)
        media_type = "application/octet-stream" if is_bytes else "application/json"
        self.files[path] = (media_type, data if is_bytes else json.dumps(data).encode())

    def open(self, src: str, photo: str = "") -> None:
        """Open a page with the element, and wait until it shows something."""
        self.files["/page"] = ("text/html", PAGE.format(src=src, photo=photo).encode())
        self.driver.get_log("browser")
        self.driver.get(f"{self.address}/page")
        done = f"!{VIEWER}.$('viewer').hidden || !{VIEWER}.$('problem').hidden"
        WebDriverWait(self.driver, 20).until(lambda _: self.run(done))

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def text(self, name: str) -> str:
        return str(self.run(f"{VIEWER}.$('{name}').textContent"))

    def colors(self) -> NDArray[np.uint8]:
        """The colours alone, (height, width, 3) RGB."""
        url = self.run(f"{VIEWER}.panes[0].canvas.toDataURL()")
        return decode(base64.b64decode(url.partition(",")[2])).pixels


@pytest.fixture
def site(driver: webdriver.Chrome) -> Iterator[Site]:
    """A server, whose pages the browser must have nothing to say against."""
    script = (DATA / "gradcam-viewer.js").read_bytes()
    files: dict[str, tuple[str, bytes]] = {"/viewer.js": ("text/javascript", script)}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            media_type, data = files.get(self.path, ("", b""))
            self.send_response(200 if media_type else 404)
            self.send_header("Content-Type", media_type or "text/plain")
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name of the base class
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Site(f"http://127.0.0.1:{server.server_port}", driver, files)
        server.shutdown()
    browser: Any = driver  # whose get_log has no types
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert [message for message in said if "404" not in message] == []


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    pixels = np.random.default_rng(2).integers(0, 60, (100, 128, 3), np.uint8)
    pixels[:, :64, 0] = 230
    pixels[:, 64:, 2] = 200
    return pixels


def explained(photo: NDArray[np.uint8], **fields: Any) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest of a job, and its objects by name."""
    store = testing.MemoryStore()
    services = testing.fake_services({URI: encode(photo, "png")}, store=store)
    job = Job.parse({"image": URI, "network": "efficientnet_lite0", "target": {"top_n": 2}, **fields})
    run_job(job, services, JobContext(Deadline(60), lambda _: None))
    objects = {key.rpartition("/")[2]: data for key, data in store.objects.items()}
    return Manifest.model_validate_json(objects["manifest.json"]), objects


def heatmaps_of(objects: dict[str, bytes]) -> NDArray[np.float32]:
    with np.load(io.BytesIO(objects["heatmaps.npz"])) as arrays:
        return np.asarray(arrays["heatmaps"], np.float32)


def in_colors(photo: NDArray[np.uint8], heatmap: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The colours alone, as the server draws them."""
    return overlay(photo, heatmap, alpha=1, colormap="viridis")


def test_a_viewer_document_is_all_that_it_needs(site: Site, photo: NDArray[np.uint8]) -> None:
    manifest, objects = explained(photo)
    site.put("/photo", encode(photo, "png"))
    site.put("/viewer.json", viewer_document(manifest, objects["heatmaps.npz"], photo="/photo"))
    site.open("/viewer.json")
    assert_allclose(site.colors().astype(int), in_colors(photo, heatmaps_of(objects)[0]), atol=ROUNDING)
    assert site.run(f"{VIEWER}.panes[0].photo.naturalWidth") == photo.shape[1]
    assert "alone" not in site.text("marks")


def test_a_manifest_is_read_with_what_lies_beside_it(site: Site, photo: NDArray[np.uint8]) -> None:
    manifest, objects = explained(photo, method={"normalize": "joint"})
    record = heatmaps_record(manifest)
    assert record
    assert record.uri.endswith("/heatmaps.npz")
    for name, data in objects.items():
        site.put(f"/results/{name}", data)
    site.open("/results/manifest.json")
    assert "the heatmaps are shown alone" in site.text("marks")
    assert site.run(f"{VIEWER}.$('scale').value") == "common"
    assert_allclose(site.colors().astype(int), in_colors(photo, heatmaps_of(objects)[0]), atol=ROUNDING)


def test_the_photo_of_a_manifest_may_be_named_beside_it(site: Site, photo: NDArray[np.uint8]) -> None:
    _, objects = explained(photo)
    for name, data in objects.items():
        site.put(f"/results/{name}", data)
    site.put("/photo.png", encode(photo, "png"))
    site.open("/results/manifest.json", "/photo.png")
    assert site.run(f"{VIEWER}.panes[0].photo.naturalWidth") == photo.shape[1]
    assert "alone" not in site.text("marks")


def test_a_photo_that_the_browser_does_not_turn_is_not_shown_below_the_heatmaps(
    site: Site, photo: NDArray[np.uint8]
) -> None:
    manifest, objects = explained(photo)
    site.put("/sideways.png", encode(np.rot90(photo), "png"))
    site.put("/viewer.json", viewer_document(manifest, objects["heatmaps.npz"], photo="/sideways.png"))
    site.open("/viewer.json")
    WebDriverWait(site.driver, 20).until(lambda _: "on its side" in site.text("marks"))
    assert site.run(f"{VIEWER}.panes[0].photo.hidden")
    assert_allclose(site.colors().astype(int), in_colors(photo, heatmaps_of(objects)[0]), atol=ROUNDING)


def test_what_is_given_last_is_shown_though_the_photo_before_it_was_not_there_yet(
    site: Site, photo: NDArray[np.uint8]
) -> None:
    manifest, objects = explained(photo)
    for name in ("/first", "/last"):
        site.put(name, encode(photo, "png"))
    first, last = (
        viewer_document(manifest, objects["heatmaps.npz"], photo=name) for name in ("/first", "/last")
    )
    site.put("/viewer.json", last)
    site.open("/viewer.json")
    give = """const [viewer, first, last, done] = [document.querySelector("gradcam-viewer"), ...arguments];
        viewer.addEventListener("gradcam-load", () => setTimeout(done, 100), { once: true });
        viewer.data = first;
        setTimeout(() => { viewer.data = last; });"""
    site.driver.execute_async_script(give, first, last)
    assert not site.run(f"{VIEWER}.panes[0].photo.hidden")
    assert "cannot be shown" not in site.text("marks")


def test_heatmaps_without_scale_and_as_npy_are_drawn_as_the_server_does(
    site: Site, photo: NDArray[np.uint8]
) -> None:
    array = {"kind": "heatmap", "format": "npy"}
    manifest, objects = explained(photo, method={"normalize": "none"}, artifacts=[array])
    site.put("/viewer.json", viewer_document(manifest, objects["heatmaps.npy"]))
    site.open("/viewer.json")
    raw = np.load(io.BytesIO(objects["heatmaps.npy"]))
    assert_allclose(site.colors().astype(int), in_colors(photo, raw[0] / raw.max()), atol=ROUNDING)


def test_integrated_gradients_are_smoothed_as_the_server_does(site: Site, photo: NDArray[np.uint8]) -> None:
    manifest, _ = explained(photo)
    method = manifest.method.model_copy(update={"name": "integrated_gradients"})
    maps = np.random.default_rng(1).random((2, 96, 120), dtype=np.float32) ** 8
    array = to_npz({"heatmaps": maps})
    document = viewer_document(manifest.model_copy(update={"method": method}), array)
    site.put("/viewer.json", document)
    site.open("/viewer.json")
    drawn = to_draw(maps)[0]
    assert_allclose(site.colors().astype(int), in_colors(photo, drawn), atol=16)  # the percentile is rounded


def test_a_job_without_heatmaps_as_numbers_shows_its_overlays(site: Site, photo: NDArray[np.uint8]) -> None:
    manifest, objects = explained(photo, artifacts=[{"kind": "overlay"}])
    assert heatmaps_record(manifest) is None
    urls = {}
    for one in manifest.explanations:
        (record,) = one.artifacts
        name = record.uri.rpartition("/")[2]
        site.put(f"/{name}", objects[name])
        urls[record.uri] = f"/{name}"
    site.put("/viewer.json", viewer_document(manifest, urls=urls))
    site.open("/viewer.json")
    assert '{"kind": "heatmap"}' in site.text("problem")
    assert site.run(f"{VIEWER}.$('overlays').querySelectorAll('img').length") == 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "The data cannot be read (HTTP 404)."),
        ({"status": "queued"}, "This is no manifest of an image."),
        (b"<html>", "not valid JSON"),
    ],
)
def test_what_cannot_be_shown_is_told(site: Site, data: Any, said: str) -> None:
    if data is not None:
        site.put("/viewer.json", data)
    site.open("/viewer.json")
    assert said in site.text("problem")
    assert site.run(f"{VIEWER}.$('viewer').hidden")


def test_a_page_may_set_the_data_itself_and_hears_what_is_chosen(
    site: Site, photo: NDArray[np.uint8]
) -> None:
    manifest, objects = explained(photo)
    site.put("/viewer.json", viewer_document(manifest, objects["heatmaps.npz"]))
    site.open("/viewer.json")
    site.driver.execute_script(
        f"window.heard = []; addEventListener('gradcam-choose', (event) => heard.push(event.detail.index));"
        f"{VIEWER}.selected = 1"
    )
    assert site.run("heard") == [1]
    site.driver.execute_script(f"const {{data}} = {VIEWER}; {VIEWER}.data = arguments[0]", {"manifest": {}})
    WebDriverWait(site.driver, 20).until(lambda _: site.text("problem"))
    assert site.text("problem") == "This is no manifest of an image."
