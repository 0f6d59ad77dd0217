"""The HTTP API as its callers meet it: with real servers and workers; curl, a browser, proxies, kills."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from selenium.webdriver.support.ui import WebDriverWait

from gradcam_worker.operations import servers
from gradcam_worker.schemas.ids import new_id

pytestmark = [pytest.mark.live]

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "http-api.md"
WAIT_S = 120  # for a worker that is only just starting, on a busy machine
BUFFER_BYTES = 16 * 1024  # that the proxy holds back
JOB: dict[str, Any] = {"image": "s3://photos/astronaut.jpg", "network": "efficientnet_lite0", "top_n": 2}


@pytest.fixture(scope="module")
def place(make_stage: Callable[..., Any]) -> Any:
    """Servers, without a worker."""
    return make_stage("gateway", uploads="s3://photos/uploads", lost_after_s=3600)


@pytest.fixture(scope="module")
def fleet(make_stage: Callable[..., Any]) -> Iterator[Any]:
    """Servers with a worker whose network is a small one."""
    stage = make_stage("fleet", uploads="s3://photos/uploads")
    with stage.worker("worker", tiny=True):
        yield stage


@contextlib.contextmanager
def serving(stage: Any, name: str = "gateway") -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`gradcam serve`; its address and its process."""
    port = servers.free_port()
    command = [sys.executable, "-W", "error", "-m", "gradcam_worker", "serve", "--port", str(port)]
    with (stage.logs / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, env=stage.settings.environment_for_child(), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: servers.accepts_connections(port) or process.poll() is not None, "the gateway")
        assert process.poll() is None, stage.log(name)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert "Traceback" not in stage.log(name)


@pytest.fixture(scope="module")
def lone(place: Any) -> Iterator[str]:
    """The address of an API without a worker, for all tests that leave it running."""
    with serving(place) as (address, _):
        yield address


@pytest.fixture(scope="module")
def api(fleet: Any) -> Iterator[str]:
    """The address of an API with a worker behind it."""
    with serving(fleet) as (address, _):
        yield address


def wait_for(condition: Callable[[], object], what: str, seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.05)


def curl(*arguments: str) -> Any:
    done = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_curl_sends_a_photo_and_gets_what_it_shows(api: str, photos: Path) -> None:
    wanted = ["-F", "network=efficientnet_lite0", "-F", "top_n=2", "-F", f"image=@{photos / 'astronaut.jpg'}"]
    document = curl("-H", "Prefer: wait=60", *wanted, f"{api}/v1/jobs")
    assert document["status"] == "succeeded", document
    assert len(document["predictions"]) >= 2
    overlays = [one for one in document["artifacts"] if one["kind"] == "overlay"]
    assert [one["class_id"] for one in overlays] == [one["id"] for one in document["predictions"][:2]]
    assert httpx.get(overlays[0]["url"]).headers["content-type"] == overlays[0]["media_type"]
    result = curl(f"{api}/v1/jobs/{document['id']}/result")
    assert result["manifest"]["job_id"] == document["id"]
    picture = httpx.get(result["urls"][overlays[0]["uri"]])
    assert picture.headers["content-type"] == overlays[0]["media_type"]


def test_a_browser_puts_an_image_straight_into_the_bucket_of_that_type_and_size_alone(
    api: str, photos: Path
) -> None:
    photo = (photos / "astronaut.jpg").read_bytes()
    target = httpx.post(f"{api}/v1/uploads", json={"media_type": "image/jpeg", "bytes": len(photo)}).json()
    assert httpx.put(target["url"], content=photo + b"!", headers=target["headers"]).status_code == 403
    html = {"Content-Type": "text/html"}
    assert httpx.put(target["url"], content=photo, headers=html).status_code == 403
    assert httpx.put(target["url"].replace("uploads", "private"), content=photo).status_code == 403
    assert httpx.put(target["url"], content=photo, headers=target["headers"]).status_code == 200
    job = {**JOB, "image": target["uri"]}
    document = httpx.post(f"{api}/v1/jobs", json=job, headers={"Prefer": "wait=60"}, timeout=90).json()
    assert document["status"] == "succeeded", document


def test_a_backfill_runs_beside_the_gateway_with_the_refusals_of_the_command(api: str, fleet: Any) -> None:
    fleet.put("list.csv", b"uri\ns3://photos/astronaut.jpg\ns3://photos/coffee.jpg\ns3://photos/lost.jpg\n")
    wanted = {"input": "s3://photos/list.csv", "output": "s3://results/cams/dataset", "shard_rows": 2}
    wanted |= {"network": "efficientnet_lite0", "target": {"top_n": 1}}
    started = httpx.post(f"{api}/v1/backfills", json=wanted, timeout=90)
    assert started.status_code == 202, started.text
    place = f"{api}{started.headers['location']}"
    wait_for(lambda: httpx.get(place, timeout=30).json()["state"] == "complete", "the dataset")
    dataset = httpx.get(place).json()["dataset"]
    assert (dataset["rows"], dataset["failed"]) == (3, 1)
    again = httpx.post(f"{api}/v1/backfills", json=wanted, timeout=90)
    assert (again.status_code, again.json()["code"]) == (409, "backfill_conflict")
    lost = httpx.post(
        f"{api}/v1/backfills",
        json={**wanted, "input": "s3://photos/no.csv", "output": "s3://results/cams/no"},
        timeout=90,
    )
    assert lost.json()["code"] == "invalid_input", lost.text
    elsewhere = httpx.post(f"{api}/v1/backfills", json={**wanted, "output": "s3://private/x"}, timeout=90)
    assert elsewhere.json()["code"] == "output_not_allowed", elsewhere.text
    ended = httpx.post(f"{place}/cancel", timeout=30).json()
    assert (ended["was_running"], ended["ended"]) == (False, True)
    assert httpx.get(f"{api}/v1/backfills").json() == {"backfills": []}
    assert httpx.get(f"{api}/v1/backfills/bm9uZQ").status_code == 404


def test_the_commands_of_the_page_do_what_it_says(api: str, fleet: Any, photos: Path, tmp_path: Path) -> None:
    fleet.put("list.csv", b"uri\ns3://photos/astronaut.jpg\n")
    (tmp_path / "photo.jpg").write_bytes((photos / "coffee.jpg").read_bytes())
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks.pop(0) == "gradcam serve --port 8000\n"
    printed = []
    for block in blocks:
        command = block.replace("http://127.0.0.1:8000", api).replace("curl ", "curl -sS --fail-with-body ")
        done = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, (block, done.stdout, done.stderr)
        printed.append(done.stdout)
    sent, submitted, found, upload, backfill = printed
    assert json.loads(sent)["artifacts"][0]["url"].startswith("http")
    assert "HTTP/1.1 202" in submitted
    assert "location: /v1/jobs/" in submitted.lower()
    assert '"jobs":' in found
    assert '"networks":' in found
    assert json.loads(upload)["method"] == "PUT"
    assert '"state":"' in backfill


def test_schemathesis_finds_no_server_error_and_no_answer_beside_the_document(place: Any, lone: str) -> None:
    """Without `positive_data_acceptance`: a schema cannot tell every rule of a job."""
    options = ["--phases=examples,coverage,fuzzing,stateful", "--max-examples=4", "--request-timeout=30"]
    options += ["--exclude-checks=positive_data_acceptance", "--exclude-operation-id=submit_backfill"]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("schemathesis")), "run", f"{lone}/openapi.json", *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=place.logs,  # where it writes what it found
    )
    assert done.returncode == 0, done.stdout[-6000:]


class Buffering(BaseHTTPRequestHandler):
    """A proxy that holds back a response until it has `BUFFER_BYTES` of it, as nginx does unless it is told.

    Below `/whole` it holds back all of it, whatever it is told.
    """

    target: str

    def do_GET(self) -> None:
        if self.path == "/page":
            self._answer(200, {"content-type": "text/html"})
            self.wfile.write(b"<!doctype html><title>page</title>")
            return
        whole, path = self.path.startswith("/whole"), self.path.removeprefix("/whole")
        names = ("last-event-id", "accept")
        headers = {name: self.headers[name] for name in names if name in self.headers}
        with contextlib.closing(HTTPConnection(self.target, timeout=60)) as origin:
            origin.request("GET", path, headers=headers)
            response = origin.getresponse()
            obeys = response.getheader("x-accel-buffering") == "no" and not whole
            kept = {"content-type": response.getheader("content-type") or "text/plain"}
            buffer = b""
            if obeys:
                self._answer(response.status, kept)
            while data := response.read1():
                buffer += data
                if obeys or (len(buffer) > BUFFER_BYTES and not whole):
                    self.wfile.write(buffer)
                    buffer = b""
            if not obeys:
                self._answer(response.status, kept)
                self.wfile.write(buffer)

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("connection", "close")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def proxied(api: str) -> Iterator[str]:
    handler = type("Handler", (Buffering,), {"target": api.removeprefix("http://")})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        threading.Thread(target=proxy.serve_forever, args=[0.05], daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}"
        proxy.shutdown()


FOLLOW = """
const source = new EventSource(arguments[0]); window.seen = []; window.source = source
source.addEventListener('status', event => seen.push([event.lastEventId, JSON.parse(event.data).status]))
"""


@pytest.mark.parametrize("way", ["/v1/jobs/{}/events", "/whole/v1/jobs/{}/events?until=event"])
def test_a_stock_event_source_hears_each_change_through_a_proxy_that_buffers(
    lone: str, driver: Any, way: str
) -> None:
    with proxied(lone) as proxy:
        job_id = httpx.post(f"{lone}/v1/jobs", json=JOB).json()["id"]
        driver.get(f"{proxy}/page")
        driver.execute_script(FOLLOW, proxy + way.format(job_id))

        def seen() -> list[list[str]]:
            found: list[list[str]] = driver.execute_script("return seen")
            return found

        WebDriverWait(driver, 30).until(lambda _: seen() == [["1", "queued"]])
        httpx.post(f"{lone}/v1/jobs/{job_id}/cancel")
        WebDriverWait(driver, 30).until(lambda _: len(seen()) == 2)
        assert seen()[1][1] == "canceled"
        ended = "return source.readyState == 2"
        WebDriverWait(driver, 30).until(lambda _: driver.execute_script(ended))
        assert len(seen()) == 2, "nothing comes twice"


def test_who_goes_away_leaves_nothing_open(lone: str) -> None:
    def open_requests() -> float:
        lines = httpx.get(f"{lone}/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("gradcam_http_open"))

    wait_for(lambda: open_requests() == 0, "the end of those of other tests", 10)
    with httpx.Client() as http:
        job_id = http.post(f"{lone}/v1/jobs", json=JOB).json()["id"]
        with http.stream("GET", f"{lone}/v1/jobs/{job_id}/events") as events:
            chunks = events.iter_text()  # which is kept: the stream is closed with it
            next(chunks)
            assert open_requests() == 1
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{lone}/v1/jobs", json=JOB, headers={"Prefer": "wait=60"}, timeout=1)
    wait_for(lambda: open_requests() == 0, "the end of both", 10)
    assert httpx.get(f"{lone}/ready").status_code == 200


def test_nothing_is_lost_when_the_gateway_is_killed_and_the_next_is_stopped_while_somebody_waits(
    place: Any,
) -> None:
    key = {"Idempotency-Key": new_id()}
    with serving(place, "killed") as (api, process):
        accepted = threading.Event()

        def submit() -> None:
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{api}/v1/jobs", json=JOB, headers={**key, "Prefer": "wait=60"}, timeout=60)
            accepted.set()

        threading.Thread(target=submit, daemon=True).start()
        wait_for(lambda: b"idempotency" in b"".join(_keys(place)), "the job in the ledger")
        process.kill()
        process.wait(10)
        assert accepted.wait(10)
    with serving(place, "again") as (api, process):
        again = httpx.post(f"{api}/v1/jobs", json=JOB, headers=key)
        assert again.status_code == 202
        jobs = [key for key in _keys(place) if key.endswith(again.json()["id"].encode())]
        assert jobs, "it is the job of the first time"
        is_stopped_while_somebody_waits(api, process)
    assert "exceeded" not in place.log("again")


def is_stopped_while_somebody_waits(api: str, process: "subprocess.Popen[bytes]") -> None:
    """Streams and waits end at once."""
    with httpx.Client() as http:
        job_id = http.post(f"{api}/v1/jobs", json=JOB).json()["id"]
        answers: list[int] = []

        def wait() -> None:
            answer = httpx.post(f"{api}/v1/jobs", json=JOB, headers={"Prefer": "wait=60"}, timeout=60)
            answers.append(answer.status_code)

        waiting = threading.Thread(target=wait)
        waiting.start()
        with http.stream("GET", f"{api}/v1/jobs/{job_id}/events") as events:
            chunks = events.iter_text()
            next(chunks)
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            assert "queued" in "".join(chunks), "it is whole, and ends"
        waiting.join(30)
        assert answers == [202]
        assert process.wait(30) == 0


def _keys(stage: Any) -> list[bytes]:
    with redis.Redis.from_url(stage.settings.broker_url) as server:
        return [key for key in server.scan_iter(count=1000) if isinstance(key, bytes)]
