"""The Django example, as its first lines say: a project, a worker, and somebody who uses its admin."""

import json
import os
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from devtools.faults import tiny_worker
from gradcam_worker.errors import ImageNotFound, UriNotAllowed
from gradcam_worker.net import webhook_signing
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.status import StatusDocument, StatusEvent
from gradcam_worker.storage.s3 import S3

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

EXAMPLE = Path(__file__).parents[2] / "docs/examples/django_app.py"
SECRET, OTHER = "whsec_" + "bmV3" * 8, "whsec_" + "b2xk" * 8
TIMEOUT_S = 180
TWO_SAVES = """
from django.db import transaction
photo = Photo(image="s3://photos/coffee.jpg")
with transaction.atomic():
    photo.save()
    photo.save()
photo.save()
try:
    with transaction.atomic():
        Photo(image="s3://photos/rocket.jpg").save()
        raise KeyError("what is rolled back is not asked for")
except KeyError:
    print("id", photo.pk)
"""


@dataclass
class Site:
    """The example with a database of its own."""

    stage: Any
    folder: Path
    url: str
    environment: dict[str, str]

    def run(self, *arguments: str) -> str:
        command = tiny_worker.python(str(EXAMPLE), *arguments)
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def row(self, photo: str) -> dict[str, Any]:
        """What the database knows of a photo, by its id or image."""
        with sqlite3.connect(self.folder / "photos.sqlite3") as database:
            database.row_factory = sqlite3.Row
            asked = "SELECT * FROM photos_photo WHERE image = ? OR id = ?"
            found = database.execute(asked, (photo, photo.replace("-", ""))).fetchall()
        (row,) = found
        return dict(row)

    def manifests(self) -> int:
        """How many jobs have left something."""
        return sum(
            one.key.endswith("manifest.json") for one in self.stage.s3.list_objects("results", "cams/")
        )

    def post(self, body: str, headers: dict[str, str]) -> int:
        return httpx.post(f"{self.url}/gradcam/", content=body, headers=headers).status_code


@pytest.fixture(scope="module")
def site(make_stage: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    stage, folder, port = make_stage("django"), tmp_path_factory.mktemp("site"), servers.free_port()
    told = {"webhook_hosts": (f"127.0.0.1:{port}",), "webhook_secrets": SecretStr(f"photos={SECRET}")}
    stage.settings = stage.settings.model_copy(update=told)
    stage.s3 = S3(stage.settings)
    needs = (
        "GRADCAM_BROKER_URL",
        "GRADCAM_S3_ENDPOINT_URL",
        "GRADCAM_S3_ACCESS_KEY_ID",
        "GRADCAM_S3_SECRET_ACCESS_KEY",
    )
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        **{name: stage.settings.to_environment()[name] for name in needs},
        "SECRET_KEY": "the-key-that-signs-sessions",
        "WEBHOOK_SECRET": SECRET,
        "WEBHOOK_URL": f"{url}/gradcam/",
        "GRADCAM_UPLOADS": "s3://photos/uploads",
        "PHOTO_PLACES": "s3://photos",
        "DJANGO_SUPERUSER_PASSWORD": "open-sesame",
    }
    site = Site(stage, folder, url, environment)
    site.run("check", "--fail-level", "WARNING")
    site.run("migrate", "--run-syncdb")
    site.run("createsuperuser", "--noinput", "--username", "ann", "--email", "ann@example.com")
    server = parent_watch.spawn(
        ["env", "-C", str(folder), sys.executable, str(EXAMPLE), "runserver", "--noreload", str(port)],
        log=folder / "django.log",
        environment=environment,
    )
    try:
        with stage.worker("worker"):
            wait_for(lambda: answers(url) and stage.client.workers())
            yield site
    finally:
        parent_watch.stop(server)


def answers(url: str) -> bool:
    try:
        return httpx.get(url, follow_redirects=True).status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture
def visitor(site: Site, driver: Any) -> Any:
    """Somebody who has logged in."""
    metrics = {"width": 1280, "height": 960, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
    driver.get(site.url)
    driver.delete_all_cookies()
    driver.get(site.url)
    driver.find_element(By.NAME, "username").send_keys("ann")
    driver.find_element(By.NAME, "password").send_keys("open-sesame\n")
    WebDriverWait(driver, TIMEOUT_S).until(lambda _: driver.find_elements(By.LINK_TEXT, "Photos"))
    return driver


def row_text(driver: Any, site: Site, name: str) -> str:
    driver.get(f"{site.url}/photos/photo/")
    (row,) = [
        one.text for one in driver.find_elements(By.CSS_SELECTOR, "#result_list tbody tr") if name in one.text
    ]
    return str(row)


def sizes(driver: Any) -> list[int]:
    """The widths in pixels of the pictures that the page has loaded."""
    loaded = "const all = [...document.querySelectorAll('#content-main img')].filter(i => i.alt);"
    WebDriverWait(driver, TIMEOUT_S).until(
        lambda _: driver.execute_script(f"{loaded} return all.length && all.every(i => i.complete)")
    )
    return list(driver.execute_script(f"{loaded} return all.map(i => i.naturalWidth)"))


def test_photos_are_explained_and_seen_in_the_admin(site: Site, visitor: Any, photos: Path) -> None:
    for field, value in (("file", photos / "chelsea.jpg"), ("image", "s3://photos/nothing.jpg\n")):
        visitor.get(f"{site.url}/photos/photo/add/")
        visitor.find_element(By.NAME, field).send_keys(str(value))
        if field == "file":
            visitor.find_element(By.NAME, "_save").click()
        WebDriverWait(visitor, TIMEOUT_S).until(lambda _: visitor.find_elements(By.CLASS_NAME, "success"))
        assert not visitor.find_elements(By.CLASS_NAME, "warning"), "a worker runs"
    # The list asks nobody: what it knows comes by webhook.
    wait_for(lambda: "Egyptian cat, " in row_text(visitor, site, "chelsea.jpg"))
    wait_for(lambda: ImageNotFound.public_message in row_text(visitor, site, "nothing"))
    visitor.get(f"{site.url}/photos/photo/add/")
    visitor.find_element(By.NAME, "image").send_keys("s3://private/cat.jpg\n")
    WebDriverWait(visitor, TIMEOUT_S).until(lambda _: visitor.find_elements(By.CLASS_NAME, "errorlist"))
    assert UriNotAllowed.public_message in visitor.find_element(By.CLASS_NAME, "errorlist").text
    visitor.get(f"{site.url}/photos/photo/")
    server = site.stage.client._ledger.server
    server.redis.delete(*server.redis.keys(f"{server.prefix}job:*"))  # as after a week
    assert min(sizes(visitor)) > 0, "the thumbnail"
    visitor.save_screenshot(str(site.folder / "list.png"))
    visitor.find_element(By.PARTIAL_LINK_TEXT, "chelsea.jpg").click()
    (width,) = sizes(visitor)
    assert width > 3 * 400, "the photo and its overlays, two of them beside it"
    visitor.save_screenshot(str(site.folder / "detail.png"))
    page = visitor.page_source
    secrets = [site.environment[name] for name in site.environment if "SECRET" in name and "GRADCAM" in name]
    assert not [one for one in (*secrets, SECRET) if one in page]


def explain_again(driver: Any, site: Site, photo: str) -> None:
    """Choose the action for one row of the list."""
    driver.get(f"{site.url}/photos/photo/")
    (box,) = [
        one
        for one in driver.find_elements(By.NAME, "_selected_action")
        if one.get_attribute("value").replace("-", "") == photo
    ]
    box.click()
    Select(driver.find_element(By.NAME, "action")).select_by_value("explain_again")
    driver.find_element(By.NAME, "index").click()


def test_the_action_asks_after_a_job_whose_webhook_never_came_and_explains_again_what_is_done(
    site: Site, visitor: Any
) -> None:
    image = "s3://photos/astronaut.jpg"
    site.run("shell", "-c", f"Photo(image='{image}').save()")
    wait_for(lambda: site.row(image)["status"] == "succeeded")
    known = site.row(image)
    with sqlite3.connect(site.folder / "photos.sqlite3") as database:
        never = "UPDATE photos_photo SET status = 'running', revision = 1, classes = '[]', manifest = ''"
        database.execute(f"{never} WHERE image = ?", (image,))
    explain_again(visitor, site, known["id"])
    wait_for(lambda: site.row(image)["status"] == "succeeded")
    assert site.row(image) == known

    explain_again(visitor, site, known["id"])
    wait_for(lambda: (site.row(image)["version"], site.row(image)["status"]) == (2, "succeeded"))
    again = site.row(image)
    assert again["job"] not in {known["job"], ""}
    assert [name for name, _ in json.loads(again["classes"])] == [
        name for name, _ in json.loads(known["classes"])
    ]


def test_two_saves_run_one_job_and_what_is_rolled_back_runs_none(site: Site) -> None:
    before = site.manifests()
    said = site.run("shell", "-c", TWO_SAVES)
    photo = said.split("id ")[1].strip()
    wait_for(lambda: site.row(photo)["status"] == "succeeded")
    assert site.row(photo)["version"] == 1
    counts = site.stage.client._ledger.count_jobs()
    assert (counts, site.manifests()) == ((0, 0), before + 1)


def delivery(document: StatusDocument, secret: str = SECRET, age_s: float = 0) -> tuple[str, dict[str, str]]:
    """A webhook's body and headers."""
    body = StatusEvent(type=f"gradcam.job.{document.status}", timestamp=utc_now(), data=document).to_json()
    sent_at = utc_now() - timedelta(seconds=age_s)
    return body, webhook_signing.signed_headers(
        (secret,), f"msg_{document.id}_{document.revision}", sent_at, body
    )


def test_only_a_signed_fresh_and_later_webhook_changes_a_row(site: Site) -> None:
    site.run("shell", "-c", "Photo(image='s3://photos/camera.jpg').save()")
    image = "s3://photos/camera.jpg"
    wait_for(
        lambda: site.row(image)["status"] != "new" and site.stage.client.status(site.row(image)["job"]).final
    )
    true = site.stage.client.status(site.row(image)["job"])
    wait_for(lambda: site.row(image)["revision"] == true.revision)
    known = site.row(image)
    forged = true.model_copy(update={"status": "canceled", "revision": true.revision + 1})
    body, headers = delivery(forged)
    bad = [
        delivery(forged, OTHER),
        delivery(forged, age_s=600),
        delivery(forged, age_s=-600),
        (body.replace("canceled", "expired"), headers),
        (body, {}),
        (body, {**headers, "webhook-signature": "nonsense"}),
        (body, {**headers, "webhook-signature": "v1,nonsense!"}),
        (body, {**headers, "webhook-timestamp": "yesterday"}),
    ]
    assert [site.post(*one) for one in bad] == [401] * len(bad)
    body = '{"type": "gradcam.job.succeeded"}'
    assert site.post(body, webhook_signing.signed_headers((SECRET,), "msg_1", utc_now(), body)) == 401, (
        "signed, but no event"
    )
    assert httpx.get(f"{site.url}/gradcam/").status_code == 405
    pk = uuid.UUID(known["id"])
    assert httpx.get(f"{site.url}/picture/{pk}/1/").status_code == 403, (
        "pictures are for those who have logged in"
    )
    assert site.row(image) == known

    older = true.model_copy(update={"status": "running", "revision": true.revision - 1, "result": None})
    stranger = true.model_copy(update={"metadata": {**true.metadata, "version": "7"}, "status": "failed"})
    for one in (true, true, older, stranger):
        assert site.post(*delivery(one)) == 204
    assert site.row(image) == known
    assert site.post(*delivery(forged)) == 204
    assert site.post(*delivery(true)) == 204
    assert site.row(image)["status"] == "canceled", "what is later wins"


def test_what_is_missing_in_the_environment_is_said(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "WEBHOOK_SECRET"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "check"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("SECRET_KEY, WEBHOOK_SECRET, WEBHOOK_URL must be set in the environment")
    assert "Traceback" not in done.stderr
