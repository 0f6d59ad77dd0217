"""The FastAPI example as a visitor meets it: uvicorn, a real browser, a real worker behind it."""

import importlib.util
import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import redis
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import (
    ImageNotFound,
    InvalidJob,
    JobCanceled,
    UnknownJob,
    UnsupportedMediaType,
    UriNotAllowed,
)
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.gradcam.imaging.resize import fit
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "fastapi_app.py"
STAGES = {"Reading the photo", "Decoding the photo", "Loading the network", "Looking", "Drawing"}
DESKTOP, PHONE = (1280, 800), (390, 844)
WAIT_S = 120  # for a worker that is only just starting
HOSTILE = "s3://photos/public/<img src=x onerror=document.title=1>.jpg"
NO_WORKER = "No worker runs just now. The photo is kept, and explained as soon as one does."
JOB: dict[str, Any] = {"network": "efficientnet_lite0", "target": {"top_n": 1}}


@pytest.fixture(scope="module")
def place(make_stage: Callable[..., Any]) -> Any:
    """Servers, and no worker yet. A job without a message stays where it is."""
    return make_stage("fastapi", uploads="s3://photos/uploads", lost_after_s=3600)


@pytest.fixture(scope="module")
def site(place: Any) -> Iterator[str]:
    """The example, started as its docstring says; its address."""
    port = servers.free_port()
    [command] = re.findall(r"^    (uvicorn .*)$", EXAMPLE.read_text(), re.MULTILINE)
    command = command.replace("docs/examples", str(EXAMPLE.parent))
    process = parent_watch.spawn(
        [sys.executable, "-W", "error", "-m", *shlex.split(command), "--port", str(port)],
        log=place.logs / "site.log",
        environment={**place.settings.to_environment(), "PAGE_IMAGES": "s3://photos/public"},
    )
    try:
        until(lambda: servers.accepts_connections(port) or process.poll() is not None, 30)
        assert process.poll() is None, place.log("site")
        yield f"http://127.0.0.1:{port}/"
    finally:
        parent_watch.stop(process)
    assert "Traceback" not in place.log("site")


@pytest.fixture
def keys(place: Any) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(place.settings.broker_url) as connection:
        yield connection


@pytest.fixture
def visitor(driver: Any, site: str) -> "Visitor":
    return Visitor(driver, site)


class Visitor:
    """Somebody at a browser, on the page."""

    def __init__(self, driver: Any, site: str) -> None:
        self.driver = driver
        self.size(DESKTOP)
        driver.get_log("browser")  # those of earlier pages are theirs
        driver.get(site)
        self.run(
            """window.heard = []; new MutationObserver(() => heard.push(told.innerText))
            .observe(told, { childList: true })"""
        )

    def size(self, size: tuple[int, int]) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def find(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def shown(self) -> list[str]:
        """The classes, when they and both pictures are there."""
        loaded = "return ['seen', 'heat'].every(id => document.getElementById(id).naturalWidth > 0)"
        self.until(lambda: self.find("view").is_displayed() and self.run(loaded))
        return [one.text for one in self.find("classes").find_elements(By.TAG_NAME, "button")]

    def problem(self) -> str:
        self.until(lambda: self.find("problem").text)
        assert self.find("go").is_enabled(), "it can be tried again"
        return str(self.find("problem").text)

    def until(self, met: Callable[[], object]) -> None:
        said = f"{self.find('told').text!r}, {self.find('problem').text!r}"
        WebDriverWait(self.driver, WAIT_S).until(lambda _: met(), said)

    def picture(self) -> NDArray[np.int64]:
        """What stands in the place of the photo, (height, width, 3) RGB."""
        return decode(self.find("stack").screenshot_as_png).pixels.astype(int)


def until(met: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.05)


def apart(one: NDArray[Any], other: NDArray[Any]) -> float:
    """The mean difference of two pictures, in levels of 255; without the rounded corners."""
    inner = (slice(12, -12), slice(12, -12))
    return float(abs(one.astype(int)[inner] - other.astype(int)[inner]).mean())


def test_it_can_be_read_in_one_go() -> None:
    for file in (EXAMPLE, EXAMPLE.with_name("fastapi_page.html")):
        lines = file.read_text().splitlines()
        assert len(lines) < 180
        assert max(map(len, lines)) <= 120


def test_a_browser_that_leaves_ends_the_stream(place: Any, site: str, keys: redis.Redis) -> None:
    with GradcamClient(settings=place.settings, publish=lambda _: None) as client:
        job_id = client.submit(image="s3://photos/chelsea.jpg", **JOB)

        def listeners() -> list[Any]:
            return list(keys.pubsub_channels(f"*{job_id}"))

        with httpx.stream("GET", f"{site}jobs/{job_id}") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = answer.iter_lines()  # held, or it would end here
            assert next(lines) == "event: progress"
            until(listeners)
        until(lambda: not listeners())
        client.cancel(job_id)
    ended = httpx.get(f"{site}jobs/{job_id}").text  # the stream ends with its job
    assert "event: problem" in ended
    assert "cancel" in ended


def test_a_photo_is_submitted_once_followed_and_shown(
    visitor: Visitor, place: Any, photos: Path, keys: redis.Redis, tmp_path: Path
) -> None:
    jobs = set(keys.keys("gradcam:job:*"))
    a_job_that_waits_for_a_worker_says_so_and_can_be_cancelled(visitor, photos)
    visitor.find("photo").send_keys(str(photos / "chelsea.jpg"))
    ActionChains(visitor.driver).double_click(visitor.find("go")).perform()
    visitor.run("form.requestSubmit()")  # past the button, which is disabled
    visitor.until(lambda: visitor.find("told").text == "Waiting")
    assert not visitor.find("go").is_enabled()
    assert len(set(keys.keys("gradcam:job:*")) - jobs) == 2
    with place.worker("worker"):
        classes = visitor.shown()
        assert classes[0].startswith("Egyptian cat, ")
        assert len(classes) == 3
        assert visitor.find("note").text == ""
        heard = visitor.run("return heard")
        assert heard[0] == "Sending"
        assert heard[-1] == ""
        assert set(heard) & STAGES, "it was told while it ran"
        assert len(set(keys.keys("gradcam:job:*")) - jobs) == 2

        shot = visitor.picture()
        photo = fit(decode((photos / "chelsea.jpg").read_bytes()).pixels, shot.shape[:2])
        slider = visitor.find("mix")
        slider.send_keys(Keys.HOME)
        assert apart(visitor.picture(), photo) < 6, "the photo alone"
        slider.send_keys(Keys.END)
        heat = visitor.picture()
        assert apart(heat, photo) > 30
        assert apart(0.45 * heat + 0.55 * photo, shot) < 6, "the first one was mixed of both"
        visitor.find("classes").find_elements(By.TAG_NAME, "button")[1].click()
        visitor.until(lambda: apart(visitor.picture(), heat) > 1)
        pressed = visitor.run("return [...classes.children].map(one => one.ariaPressed)")
        assert pressed == ["false", "true", "false"]

        visitor.driver.refresh()  # the address names the job
        assert visitor.shown() == classes
        for size in (DESKTOP, PHONE):
            visitor.size(size)
            across = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert visitor.run(f"return {across}") == 0
            (tmp_path / f"{size[0]}.png").write_bytes(visitor.driver.get_screenshot_as_png())
        visitor.size(DESKTOP)
        bottom = visitor.run("return document.getElementById('mix').getBoundingClientRect().bottom")
        assert bottom < DESKTOP[1], "the slider is in view"
        assert visitor.driver.get_log("browser") == [], "no script, style or picture was refused"

        back_and_forward_lead_to_results(visitor, classes, photos)
        problems_are_shown_as_sentences(visitor, tmp_path)
    page = httpx.get(str(visitor.run("return location.origin"))).text + visitor.driver.page_source
    secret = place.settings.s3_secret_access_key.get_secret_value()
    assert not [one for one in (secret, place.settings.broker_url) if one in page]


def a_job_that_waits_for_a_worker_says_so_and_can_be_cancelled(visitor: Visitor, photos: Path) -> None:
    assert not visitor.find("stop").is_displayed()
    visitor.find("photo").send_keys(str(photos / "coffee.jpg"))
    visitor.find("go").click()
    visitor.until(lambda: visitor.find("note").text == NO_WORKER)
    visitor.find("stop").click()
    visitor.until(lambda: visitor.find("problem").text == JobCanceled.public_message)


def back_and_forward_lead_to_results(visitor: Visitor, first: list[str], photos: Path) -> None:
    visitor.find("photo").send_keys(str(photos / "rocket.jpg"))
    visitor.find("go").click()
    visitor.until(lambda: visitor.find("view").is_displayed() and visitor.shown() != first)
    second = visitor.shown()
    visitor.driver.back()
    visitor.until(lambda: visitor.find("view").is_displayed() and visitor.shown() == first)
    visitor.driver.forward()
    visitor.until(lambda: visitor.find("view").is_displayed() and visitor.shown() == second)
    visitor.find("uri").send_keys("s3://private/cat.jpg", Keys.ENTER)
    assert visitor.problem() == UriNotAllowed.public_message
    assert not visitor.find("view").is_displayed(), "what was refused does not stand beside an earlier photo"
    assert visitor.run("return location.hash") == ""
    visitor.driver.back()
    visitor.until(lambda: visitor.find("view").is_displayed() and visitor.shown() == second)
    visitor.find("uri").clear()


def problems_are_shown_as_sentences(visitor: Visitor, folder: Path) -> None:
    """What a visitor can do wrong, one after the other, on one page."""
    address, file = visitor.find("uri"), visitor.find("photo")
    visitor.find("go").click()
    assert visitor.problem() == "Choose a photo."
    for wrong, kind in (
        ("s3://photos/public/nothing.jpg", ImageNotFound),
        ("s3://photos/chelsea.jpg", UriNotAllowed),
        (HOSTILE, ImageNotFound),
        ("cat.jpg", UriNotAllowed),
    ):
        address.clear()
        address.send_keys(wrong, Keys.ENTER)
        visitor.until(lambda: visitor.find("problem").text == kind.public_message)  # noqa: B023  # asked at once
        assert visitor.problem()
    for size in (DESKTOP, PHONE):
        visitor.size(size)
        (folder / f"problem-{size[0]}.png").write_bytes(visitor.driver.get_screenshot_as_png())
    assert visitor.run("return [document.images.length, document.title]") == [2, "Where did it look?"]
    (folder / "broken.jpg").write_bytes(b"no photo")
    file.send_keys(str(folder / "broken.jpg"))
    assert address.get_attribute("value") == "", "one of the two"
    visitor.find("go").click()
    visitor.until(lambda: visitor.find("problem").text == UnsupportedMediaType.public_message)
    with (folder / "large.jpg").open("wb") as large:
        large.truncate(16_000_001)
    file.send_keys(str(folder / "large.jpg"))
    visitor.find("go").click()
    assert visitor.problem() == "A photo may have 16 MB; this one has more."


def test_what_no_browser_sends_gets_a_sentence_too(site: str) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"x"

    for content in (b"x" * 16_000_001, chunks()):
        answer = httpx.put(f"{site}jobs/some-key", content=content)
        assert (answer.status_code, answer.json()["detail"][-18:]) == (413, "this one has more.")
    answer = httpx.put(f"{site}jobs/{'k' * 300}?uri=s3://photos/public/cat.jpg")
    assert (answer.status_code, answer.json()) == (422, {"detail": InvalidJob.public_message})
    told = httpx.get(f"{site}jobs/nobody").text
    assert told.startswith("event: problem")
    assert UnknownJob.public_message in told


@pytest.mark.parametrize(
    "uri",
    [
        "s3://photos/chelsea.jpg",
        "s3://private/cat.jpg",
        "s3://photos/uploads/page/cat.jpg",
        "s3://photos/public",
        "s3://photos/public/",
        "s3://photos/public-of-others/cat.jpg",
        "s3://photos/public/../chelsea.jpg",
        "s3://photos/public/%2e%2e/chelsea.jpg",
        "s3://photos/public/./../chelsea.jpg",
        "s3://photos/public//chelsea.jpg",
        "s3://photos/public/..\\chelsea.jpg",
        "S3://photos/public/cat.jpg",
        " s3://photos/public/cat.jpg",
        "file:///etc/passwd",
        "https://169.254.169.254/latest",
        "data:image/png;base64,AAAA",
    ],
)
def test_a_visitor_can_have_nothing_read_that_lies_elsewhere(
    site: str, place: Any, keys: redis.Redis, uri: str
) -> None:
    before = set(keys.keys("gradcam:job:*"))
    answer = httpx.put(f"{site}jobs/elsewhere", params={"uri": uri})
    assert (answer.status_code, answer.json()) == (422, {"detail": UriNotAllowed.public_message})
    assert set(keys.keys("gradcam:job:*")) == before
    assert repr(UriNotAllowed(uri)) in place.log("site"), "the operator is told"


def test_where_the_broker_is_away_a_visitor_is_asked_to_come_again(
    free_port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRADCAM_BROKER_URL", f"redis://127.0.0.1:{free_port}/0")
    monkeypatch.setenv("PAGE_IMAGES", "s3://other/place,s3://photos")
    for name in (
        "uvicorn",
        "uvicorn.error",
    ):  # set up otherwise where a test has run a server in this process
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
        caplog.set_level(logging.WARNING, name)
    spec = importlib.util.spec_from_file_location("fastapi_app", EXAMPLE)
    assert spec
    assert spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with TestClient(example.app) as client:
        answer = client.put("/jobs/some-key", params={"uri": "s3://photos/cat.jpg"})
    assert answer.status_code == 503
    assert answer.json() == {
        "detail": "The service cannot be reached just now. Please try again in a minute."
    }
    assert f"127.0.0.1:{free_port}" in caplog.text, "the operator is told"
