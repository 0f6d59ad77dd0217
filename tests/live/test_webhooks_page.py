"""docs/how-to/webhooks.md: its receivers, in three languages, accept what a worker sends and nothing else."""

import base64
import http.client
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gradcam_worker.delivery.dispatcher import REDELIVERY
from gradcam_worker.delivery.webhooks import make_body, message_id
from gradcam_worker.ledger import state_machine
from gradcam_worker.net.webhook_signing import signed_headers
from gradcam_worker.operations.servers import accepts_connections, free_port
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.status import StatusEvent

pytestmark = pytest.mark.live

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "webhooks.md").read_text(encoding="utf-8")
SECRET, OTHER = ("whsec_" + base64.b64encode(bytes(range(n, n + 32))).decode() for n in (1, 2))
DOCUMENT = state_machine.new_document(new_id()).model_copy(
    update={"status": "canceled", "metadata": {"name": "Z\u00fcrich \U0001f408"}}
)
EVENT = StatusEvent(type="gradcam.job.canceled", timestamp=datetime.now(UTC), data=DOCUMENT)
BODY = make_body(EVENT)[0]
PROGRAMS = {"javascript": ("node", "receiver.js"), "java": ("java", "Receiver.java")}


def block(language: str) -> str:
    [text] = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(text)


def sent(*secrets: str, at: datetime | None = None) -> dict[str, str]:
    return signed_headers(secrets, message_id(DOCUMENT), at or datetime.now(UTC), BODY)


def messages() -> Iterator[tuple[dict[str, str], str, int]]:
    """Headers and body of what is sent to a receiver, and how it has to answer."""
    yield sent(SECRET), BODY, 204
    yield sent(OTHER, SECRET), BODY, 204
    yield sent(OTHER), BODY, 401
    yield sent(), BODY, 401
    yield sent(SECRET, at=datetime(2026, 1, 1, tzinfo=UTC)), BODY, 401
    yield sent(SECRET), BODY.replace("canceled", "succeeded"), 401
    yield {**sent(SECRET), "webhook-id": "msg_another"}, BODY, 401
    yield {**sent(SECRET), "webhook-timestamp": "soon"}, BODY, 401
    yield {}, BODY, 401


@contextmanager
def receiver(language: str, folder: Path) -> Iterator[tuple[int, Path]]:
    """The program of the page, started: its port, and the file that it prints to."""
    command, name = PROGRAMS[language]
    (folder / name).write_text(block(language), encoding="utf-8")
    port, printed = free_port(), folder / "printed"
    environment = {**os.environ, "PORT": str(port), "WEBHOOK_SECRET": SECRET}
    with printed.open("wb") as output:
        process = subprocess.Popen(
            [command, name], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + 60
            while not accepts_connections(port):
                assert process.poll() is None, printed.read_text()
                assert time.monotonic() < end, printed.read_text()
                time.sleep(0.05)
            yield port, printed
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.parametrize("language", PROGRAMS)
def test_a_receiver_accepts_what_a_worker_signs_and_nothing_else(language: str, tmp_path: Path) -> None:
    if not shutil.which(PROGRAMS[language][0]):
        missing = f"{PROGRAMS[language][0]} is not installed"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    with receiver(language, tmp_path) as (port, printed):
        for headers, body, status in messages():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("POST", "/gradcam/", body.encode(), headers)
            answer = connection.getresponse()
            answer.read()
            connection.close()
            assert answer.status == status, (headers, printed.read_text())
        said = printed.read_text(encoding="utf-8").splitlines()
    assert len(said) == 2
    assert all(DOCUMENT.id in line and "gradcam.job.canceled" in line for line in said)


def test_the_receiver_in_python_does_so_too(tmp_path: Path) -> None:
    calls = [[body, headers] for headers, body, _ in messages()]
    program = block("python") + f"for body, headers in {calls!r}:\n"
    program += f"    print('->', receive(body.encode(), headers, {SECRET!r}))\n"
    (tmp_path / "receiver.py").write_text(program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-P", "receiver.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert re.findall("-> (.*)", done.stdout) == [str(status) for _, _, status in messages()]
    assert done.stdout.startswith(f"gradcam.job.canceled {DOCUMENT.id} canceled\n")


def test_the_pauses_are_those_of_the_page() -> None:
    assert "after 2 s, 4 s, 8 s and so on, the pauses doubling up to 3 hours" in " ".join(PAGE.split())
    assert (REDELIVERY.first_s, REDELIVERY.factor, REDELIVERY.max_s, REDELIVERY.jitter) == (
        2.0,
        2.0,
        3 * 3600.0,
        (0.8, 1.2),
    )
