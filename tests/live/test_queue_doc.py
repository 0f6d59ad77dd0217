"""docs/how-to/other-languages.md: its programs run as they stand there, its messages by a real worker."""

import ast
import base64
import hashlib
import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.exceptions

from gradcam_worker.broker import publisher
from gradcam_worker.schemas import strict_json, work
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "other-languages.md").read_text()
PLAIN, CELERY = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
[RIGHTS] = re.findall(r"^user stranger (.*)$", PAGE, re.MULTILINE)
[CELERYS_RIGHTS] = re.findall(r"^(\+multi .*)$", PAGE, re.MULTILINE)
PASSWORD = "planted-of-a-stranger"
PRIORITIES = ["high", "normal", "low", "bulk"]


@pytest.fixture(scope="module")
def admin(stage: Any, photos: Path) -> Iterator[Any]:
    stage.put("cat.jpg", (photos / "chelsea.jpg").read_bytes())
    with redis.Redis.from_url(stage.settings.broker_url, decode_responses=True) as connection:
        yield connection


@pytest.fixture
def stranger(admin: Any, stage: Any) -> Iterator[Callable[..., str]]:
    """Makes the user that the page describes; its URL."""

    def allow(*more: str) -> str:
        digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
        rights = grouped(RIGHTS.replace("SHA256-OF-A-PASSWORD", digest))
        admin.execute_command("ACL", "SETUSER", "stranger", "reset", *rights, *more)
        return str(stage.settings.broker_url.replace("//", f"//stranger:{PASSWORD}@"))

    yield allow
    admin.execute_command("ACL", "DELUSER", "stranger")


def grouped(rights: str) -> list[str]:
    """Rules of an ACL, those in brackets each as one."""
    return re.findall(r"\([^)]*\)|\S+", rights)


def run(program: str, url: str, folder: Path) -> str:
    """What a program of the page prints, in an interpreter that knows nothing of this repository."""
    assert program.count("redis://127.0.0.1:6379/0") == 1
    program = program.replace("redis://127.0.0.1:6379/0", url)
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error:::__main__", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def body(*arguments: object, follow: object = None) -> str:
    return base64.b64encode(json.dumps([arguments, {}, follow or {}]).encode()).decode()


def test_nothing_but_redis_and_json_is_needed(stranger: Callable[..., str], tmp_path: Path) -> None:
    imported = set(re.findall(r"^(?:import|from) (\w+)", PLAIN, re.MULTILINE))
    assert imported - sys.stdlib_module_names == {"redis"}
    status, seen, manifest = run(PLAIN, stranger(), tmp_path).split()
    assert (status, seen) == ("succeeded", "Egyptian_cat")
    assert manifest.startswith("s3://results/")


def test_a_strangers_celery_sends_by_name(stranger: Callable[..., str], stage: Any, tmp_path: Path) -> None:
    job_id = run(CELERY, stranger(*grouped(CELERYS_RIGHTS)), tmp_path).strip()
    until(lambda: stage.client.statuses([job_id]))  # a worker enters it
    document = stage.client.wait(job_id)
    assert document.status == "succeeded", document.error


def test_a_stranger_can_harm_nobodys_job(stranger: Callable[..., str]) -> None:
    with redis.Redis.from_url(stranger()) as connection:
        assert connection.hget("gradcam:job:none", "document") is None
        for forbidden in (
            "HSET gradcam:job:none document x",
            "DEL gradcam:job:none",
            "RPOP gradcam:gradcam.interactive",
            "LRANGE gradcam:gradcam.interactive 0 -1",
            "LPUSH gradcam:gradcam.shards x",
            "PUBLISH gradcam:changed:none x",
            "SUBSCRIBE gradcam:/0.celery.pidbox",
            "KEYS *",
            "EVAL return(1) 0",
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                connection.execute_command(*forbidden.split())


def as_node_writes_it(message_id: str, job: dict[str, Any]) -> dict[str, Any]:
    """celery-node 0.5.9."""
    return {
        "body": body(job),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "js", "task": publisher.EXPLAIN, "id": message_id},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "gradcam:gradcam.interactive\x06\x163"},
            "delivery_mode": 2,
            "delivery_tag": str(uuid.uuid4()),
            "correlationId": message_id,
            "replyTo": "",
        },
    }


def as_go_writes_it(message_id: str, job: dict[str, Any]) -> dict[str, Any]:
    """The page's own, and what gopher-celery adds to it."""
    nothing = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
    return {
        "body": body(job, follow=nothing),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "go",
            "id": message_id,
            "root_id": message_id,
            "task": publisher.EXPLAIN,
            "origin": "1@host",
            "expires": None,
            "retries": 0,
        },
        "properties": {
            "delivery_info": {"exchange": "x", "routing_key": "x"},
            "correlation_id": message_id,
            "reply_to": str(uuid.uuid4()),
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
            "delivery_mode": 2,
            "priority": 0,
        },
    }


def as_protocol_1_has_it(message_id: str, job: dict[str, Any]) -> dict[str, Any]:
    """gocelery."""
    said = {
        "id": message_id,
        "task": publisher.EXPLAIN,
        "args": [job],
        "kwargs": {},
        "retries": 0,
        "eta": None,
    }
    return {
        "body": base64.b64encode(json.dumps(said).encode()).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {"body_encoding": "base64", "correlation_id": message_id, "delivery_tag": "x"},
    }


def test_other_languages_are_understood_and_what_is_refused_is_told(admin: Any, stage: Any) -> None:
    good = {"image": "s3://photos/cat.jpg", "network": "efficientnet_lite0", "target": {"top_n": 1}}

    def push(message: dict[str, Any]) -> None:
        admin.lpush("gradcam:gradcam.interactive\x06\x163", json.dumps(message))

    def ended(job_id: str) -> StatusDocument:
        def known() -> bool:
            return bool(admin.hexists(f"gradcam:job:{job_id}", "document"))

        until(known)
        found: StatusDocument = stage.client.wait(job_id)
        return found

    for write in (as_node_writes_it, as_go_writes_it):
        push(write(job_id := new_id(), good))
        first = ended(job_id)
        assert first.status == "succeeded", first.error
    push(as_go_writes_it(job_id, {**good, "target": {"top_n": 2}}))
    push(as_go_writes_it("order-42", good))
    assert ended(str(uuid.uuid5(uuid.NAMESPACE_URL, "gradcam:order-42"))).status == "succeeded"
    assert ended(job_id) == first, "twice is once"

    refused: dict[str, tuple[dict[str, Any], str]] = {
        "protocol 1": (as_protocol_1_has_it(new_id(), good), "headers"),
        "unknown task": (as_go_writes_it(new_id(), good), "only gradcam.explain"),
        "a field": (as_go_writes_it(new_id(), {**good, "clases": ["tabby"]}), "clases"),
        "eta": (as_go_writes_it(new_id(), good), "eta"),
        "forbidden": (as_go_writes_it(new_id(), {**good, "image": "s3://private/x.jpg"}), "private"),
    }
    refused["unknown task"][0]["headers"]["task"] = "gradcam.explian"
    refused["eta"][0]["headers"]["eta"] = "2030-01-01T00:00:00Z"
    for message, _ in refused.values():
        push(message)
    for what, (message, named) in refused.items():
        document = ended(message["properties"]["correlation_id"])
        assert document.status == "failed", what
        assert document.error, what
        assert document.error.code == ("uri_not_allowed" if what == "forbidden" else "invalid_job")
        assert named in document.error.detail, what


def until(met: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_lists_are_those_that_workers_look_into() -> None:
    [lists] = [one for one in ast.parse(PLAIN).body if ast.unparse(one).startswith("LISTS")]
    assert isinstance(lists, ast.Assign)
    found = ast.literal_eval(lists.value)
    routes = {name: route for name, route in publisher.ROUTES.items() if name != work.ROUTE}
    assert list(found) == PRIORITIES == list(routes)
    for name, (queue, number) in routes.items():
        assert found[name] == (f"{queue}{publisher.SEPARATOR}{number}" if number else queue, number)
        assert re.search(rf"^\| `{name}`.*`gradcam:{queue}`.*\| {number} \|$", PAGE, re.MULTILINE)


def test_what_the_page_names_exists() -> None:
    for link in re.findall(r"\]\((\.\.?/[^)#]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    for name in set(re.findall(r"GRADCAM_[A-Z_]+", PAGE)):
        assert name.removeprefix("GRADCAM_").lower() in Settings.model_fields
    assert f"{strict_json.MAX_DEPTH} levels, numbers of {strict_json.MAX_DIGITS} digits" in PAGE
