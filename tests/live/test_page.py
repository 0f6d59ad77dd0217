"""The page at `/` as people meet it: `gradcam serve`, a worker, a real browser."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from gradcam_worker.errors import UnknownJob, UnsupportedMediaType
from gradcam_worker.gateway.access.api_keys import ApiKey, ApiKeys
from gradcam_worker.gateway.access.tenants import SCOPES, TenantPolicy, Tenants
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch

pytestmark = pytest.mark.live

DESKTOP, PHONE = (1280, 800), (390, 844)
WAIT_S = 90
NO_WORKER = "No worker runs just now"


@pytest.fixture(scope="module")
def place(make_stage: Callable[..., Any]) -> Any:
    """Servers, and no worker yet."""
    return make_stage("page", uploads="s3://photos/uploads", lost_after_s=3600)


@pytest.fixture(scope="module")
def site(place: Any) -> Iterator[str]:
    port = servers.free_port()
    process = parent_watch.spawn(
        [sys.executable, "-P", "-m", "gradcam_worker", "serve", "--port", str(port)],
        log=place.logs / "serve.log",
        environment=place.settings.to_environment(),
    )
    try:
        end = time.monotonic() + WAIT_S
        while not servers.accepts_connections(port):
            assert process.poll() is None, place.log("serve")
            assert time.monotonic() < end, place.log("serve")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
    finally:
        parent_watch.stop(process)
    assert "Traceback" not in place.log("serve")


class Visitor:
    """Somebody at a browser, on the page."""

    def __init__(self, driver: Any, site: str) -> None:
        self.driver = driver
        self.size(DESKTOP)
        driver.get_log("browser")  # those of earlier pages are theirs
        driver.get(site)

    def size(self, size: tuple[int, int], scheme: str = "light") -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)

    def find(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def until(self, met: Callable[[], object]) -> None:
        end = time.monotonic() + WAIT_S
        while not met():
            assert time.monotonic() < end, self.driver.find_element(By.TAG_NAME, "main").text
            time.sleep(0.1)

    def until_shown(self, name: str) -> None:
        """Wait until the result of a photo is drawn."""
        self.until(lambda: self.find("job-title").text == name and self.find("viewer").is_displayed())
        drawn = "document.getElementById('viewer').shadowRoot?.querySelector('canvas')?.width > 1"
        self.until(lambda: self.run(drawn))

    def history(self) -> list[tuple[str, str]]:
        """The names and the states of the jobs."""
        cell = "link.querySelector"
        found = self.run(
            "[...document.querySelectorAll('#list a')]"
            f".map(link => [{cell}('.name').textContent, {cell}('.state').textContent])"
        )
        return [(name, state) for name, state in found]


@pytest.fixture
def visitor(driver: Any, site: str) -> Visitor:
    return Visitor(driver, site)


def test_photos_are_sent_watched_looked_at_and_found_again(
    visitor: Visitor, site: str, place: Any, photos: Path, tmp_path: Path
) -> None:
    visitor.until(lambda: NO_WORKER in visitor.find("note").text)
    assert not visitor.find("go").is_enabled(), "there is no network to choose"
    with place.worker("worker", tiny=True):
        visitor.until(lambda: visitor.find("go").is_enabled())
        assert visitor.find("note").text == ""

        visitor.find("try").send_keys(Keys.ENTER)  # the keyboard alone
        visitor.until_shown("cat.jpg")
        first = visitor.driver.current_url
        assert re.fullmatch(re.escape(site) + r"#job/[0-9a-f-]{36}", first)
        assert visitor.run("document.activeElement.id") == "job-title", "a screen reader is told"

        files = [str(photos / name) for name in ("coffee.jpg", "rocket.jpg")]
        visitor.find("photos").send_keys("\n".join(files))
        visitor.find("addresses-box").find_element(By.TAG_NAME, "summary").click()
        visitor.find("addresses").send_keys("s3://photos/astronaut.jpg\ncat.jpg\ns3://photos/nothing.jpg")
        visitor.find("go").click()
        visitor.until(lambda: visitor.find("addresses").get_attribute("value") == "cat.jpg")
        assert visitor.run("document.getElementById('photos').files.length") == 0, "they are sent once"
        assert "has no scheme" in visitor.find("sending").text
        visitor.until(lambda: len(visitor.history()) == 5)
        visitor.until(lambda: {state for _, state in visitor.history()} == {"done", "failed"})
        assert [state for name, state in visitor.history() if name == "nothing.jpg"] == ["failed"]
        assert {name for name, _ in visitor.history()} == {
            "cat.jpg",
            "coffee.jpg",
            "rocket.jpg",
            "astronaut.jpg",
            "nothing.jpg",
        }

        visitor.driver.get(first)
        visitor.driver.refresh()  # the link leads to it
        visitor.until_shown("cat.jpg")
        a_refused_photo_is_told_and_may_be_removed(visitor, tmp_path)
        it_fits_every_window(visitor, tmp_path)
        visitor.run(
            "[...document.querySelectorAll('#list a')].find(a => /nothing/.test(a.innerText)).click()"
        )
        visitor.until(lambda: "no such object" in visitor.find("job-problem").text)
        assert "gradcam" not in json.dumps(visitor.driver.get_cookies())
    severe = [
        one["message"]
        for one in visitor.driver.get_log("browser")
        if not re.search("status of 4(00|15)", one["message"])
    ]
    assert severe == [], "nothing was refused by the policy, and nothing failed"


def a_refused_photo_is_told_and_may_be_removed(visitor: Visitor, folder: Path) -> None:
    (folder / "broken.jpg").write_bytes(b"no photo")
    visitor.find("photos").send_keys(str(folder / "broken.jpg"))
    visitor.find("go").click()
    visitor.until(lambda: UnsupportedMediaType.public_message in visitor.find("problem").text)
    assert not visitor.find("viewer").is_displayed(), "no earlier photo stands beside it"
    assert "broken.jpg" in visitor.find("sending").text
    (remove,) = visitor.find("sending").find_elements(By.TAG_NAME, "button")
    assert remove.text == "Remove", "it would be refused again"
    remove.click()
    assert visitor.find("sending").text == ""


def it_fits_every_window(visitor: Visitor, folder: Path) -> None:
    visitor.driver.back()
    visitor.until(lambda: visitor.find("viewer").is_displayed())
    for size in (DESKTOP, PHONE):
        for scheme in ("light", "dark"):
            visitor.size(size, scheme)
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert visitor.run(wide) == 0
            ground = visitor.run("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", ground))) < 60) == (scheme == "dark")
            visitor.driver.save_screenshot(str(folder / f"{size[0]}-{scheme}.png"))
    visitor.size(DESKTOP)


def test_a_job_that_waits_says_that_no_worker_runs_and_can_be_cancelled(visitor: Visitor, place: Any) -> None:
    job_id = place.client.submit(
        image="s3://photos/coffee.jpg", network="efficientnet_lite0", target={"top_n": 1}
    )
    visitor.driver.get(f"{visitor.driver.current_url}#job/{job_id}")
    visitor.until(lambda: NO_WORKER in visitor.find("waiting").text)
    assert visitor.find("told").text == "Waiting for a worker"
    visitor.find("cancel").click()
    visitor.until(lambda: visitor.find("job-problem").text != "")
    assert not visitor.find("cancel").is_displayed()
    visitor.driver.get(f"{visitor.driver.current_url.partition('#')[0]}#job/{'0' * 32}")
    visitor.until(lambda: visitor.find("job-problem").text == UnknownJob.public_message)


def test_where_keys_are_needed_the_page_asks_for_one_and_keeps_it_in_its_tab(
    visitor: Visitor, site: str, place: Any
) -> None:
    with contextlib.closing(RedisLedger(place.settings)) as ledger:
        Tenants(ledger.server).store(TenantPolicy(name="acme", output="s3://results/cams/acme"))
        key, record = ApiKey.make("acme", scopes=SCOPES)
        ApiKeys(ledger.server).store(record)
    try:
        visitor.until(lambda: visitor.driver.refresh() or visitor.find("key-dialog").is_displayed())
        assert visitor.run("document.activeElement.id") == "key"
        visitor.press("gck_wrong", Keys.ENTER)
        visitor.until(lambda: "valid" in visitor.find("key-why").text)
        visitor.press(key, Keys.ENTER)
        visitor.until(lambda: not visitor.find("key-dialog").is_displayed())
        visitor.until(lambda: visitor.find("empty").is_displayed())
        assert visitor.history() == [], "those of others are theirs"
        assert visitor.run("JSON.stringify(sessionStorage)").count(key) == 1
        assert visitor.run("JSON.stringify(localStorage)") == "{}"
        assert key not in visitor.driver.current_url + visitor.driver.page_source
    finally:
        visitor.run("sessionStorage.clear()")
