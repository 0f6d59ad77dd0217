"""Hostile characters in every text of a job, an image, an answer and a network: where do they come out?

A line of a log, a terminal, a document or a page must not be forged by them: no line begins where ours does
not, and nothing that does not print is written as it is.
"""

import base64
import hashlib
import io
import json
import re
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import redis
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from devtools import import_path
from devtools.faults import tiny_network, tiny_worker
from gradcam_worker.broker import publisher
from gradcam_worker.cli.main import main
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.errors import InvalidJob
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.operations import servers
from gradcam_worker.runtime import parent_watch
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import ID_PATTERN, Job
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

pytestmark = [pytest.mark.live]

FORGED_JSON = '{"level": "critical", "message": "all is lost"}'
HOSTILE = (
    f"a\n{FORGED_JSON}\r\n2026-01-01 00:00:00,000 CRITICAL gradcam: all is lost"
    "\v\x85\u2028b\x1b[2J\x1b]0;title\x07\x9b31m\b\u202egnp.exe\u2066\u200b"
    "</script><script>alert(1)</script>[red]{0} %s ${x}"
)
TEXTS = (HOSTILE, "nul\0", "half \ud800 a sign", "x" * 70_000)
WAIT_S = 60
TAG = "<script>alert(1)"
TEXT_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+: |    )")


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def saved(kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 200, 9)).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4) + name + body + zlib.crc32(name + body).to_bytes(4)


def images() -> dict[str, str]:
    """Images with hostile texts, and two that decoders complain about."""
    text, raw = PngInfo(), HOSTILE.encode()
    text.add_itxt("Comment", HOSTILE, "en", HOSTILE)
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    place = profile.index(b"s\0R\0G\0B") - 1
    profile[place : place + 8] = "\x1b[2\n".encode("utf-16-be")
    exif = Image.Exif()
    exif[0x010E] = HOSTILE.replace("\0", "")
    png = saved("PNG")
    named = chunk(
        b"iCCP", b"evil\x1b[31m\n" + FORGED_JSON.encode()[:40] + b"\0\0" + zlib.compress(bytes(200))
    )
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    odd = bytearray(cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111])[1].tobytes())
    odd[odd.index(b"\xff\xc0") + 14] = 0x12  # sampled as no program does: libjpeg complains to standard error
    return {
        "text of a PNG": data_uri(saved("PNG", pnginfo=text)),
        "name of a profile": data_uri(png[:33] + named + png[33:]),
        "description of a profile": data_uri(saved("JPEG", icc_profile=bytes(profile)), "image/jpeg"),
        "EXIF": data_uri(saved("JPEG", exif=exif), "image/jpeg"),
        "comment of a JPEG": data_uri(saved("JPEG", comment=raw), "image/jpeg"),
        "odd JPEG": data_uri(bytes(odd), "image/jpeg"),
        "no image": data_uri(b"\x1b[2J" + raw),
        "half a PNG": data_uri(png[:60]),
    }


def template(output: str) -> dict[str, Any]:
    """A job that succeeds, and has most of the texts that a job can have."""
    picture = saved("PNG")
    return {
        "schema": "gradcam.job/v1",
        "id": new_id(),
        "idempotency_key": "key",
        "image": {"uri": data_uri(picture), "sha256": hashlib.sha256(picture).hexdigest()},
        "network": tiny_network.NETWORK,
        "target": {"classes": ["green"]},
        "annotations": {
            "labels": ["green"],
            "boxes": [{"xyxy": [1, 1, 9, 9], "label": "green"}],
            "mask": {"uri": data_uri(picture)},
        },
        "method": {"name": "gradcam", "layer": "blocks"},
        "artifacts": [{"kind": "overlay", "format": "png"}],
        "output": output,
        "priority": "normal",
        "expires_at": "2100-01-01T00:00:00Z",
        "metadata": {"key": "value"},
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }


# What no job that succeeds here has.
OTHERS = {
    "inputs": {"age": "4"},
    "webhooks": [{"url": "https://example.org/x", "events": ["job.succeeded"], "secret_ref": "name"}],
}


def replaced(value: Any, text: str) -> Iterator[Any]:
    """A copy for each text in a document, and each name, in which it is replaced."""
    if isinstance(value, str):
        yield f"{value}{text}"
    elif isinstance(value, list):
        for at, inner in enumerate(value):
            yield from ([*value[:at], changed, *value[at + 1 :]] for changed in replaced(inner, text))
    elif isinstance(value, dict):
        yield {**value, text: "x"}
        for name, inner in value.items():
            yield from ({**value, name: changed} for changed in replaced(inner, text))


def texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from (name, *texts_of(inner))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner)


@dataclass
class Desk:
    """A queue, and what has been put on it."""

    settings: Settings
    folder: Path

    def __post_init__(self) -> None:
        self.client, self.ledger = GradcamClient(settings=self.settings), RedisLedger(self.settings)
        self.queue, self.ids = redis.Redis.from_url(self.settings.broker_url), list[str]()
        self.refusals = list[str]()

    def put(self, payload: dict[str, Any]) -> None:
        """Put a job on the queue as a client does; what is no job, as a stranger may."""
        payload = {**payload, "id": new_id()} if len(payload["id"]) == len(new_id()) else payload
        if payload.get("idempotency_key") == "key":
            del payload["idempotency_key"]  # or it would be one job
        try:
            self.ids.append(self.client.submit(Job.parse(payload)))
        except InvalidJob as error:
            self.refusals.append(str(error))
            job_id = payload["id"] if re.fullmatch(ID_PATTERN, payload["id"]) else new_id()
            message = publisher._message(job_id, "normal", json.dumps(payload), None)
            self.queue.lpush(f"{self.settings.key_prefix}{publisher.ROUTES['normal'][0]}", message)
            self.ids.append(job_id)

    def final_documents(self) -> list[StatusDocument]:
        final, left = dict[str, StatusDocument](), set(self.ids)
        for _ in range(WAIT_S * 5):
            final |= {name: one for name, one in self.ledger.read_many([*left]).items() if one.final}
            left -= final.keys()
            if not left:
                return [*final.values()]
            time.sleep(0.2)
        known = {name: one.status for name, one in self.ledger.read_many([*left]).items()}
        return pytest.fail(f"not final: {known}; unknown: {left - known.keys()}")


def hostile_payloads(
    texts: tuple[str, ...], output: str, http_server: Any, answer: Any
) -> Iterator[dict[str, Any]]:
    base = template(output)
    for text in texts:
        yield from replaced(base, text)
        yield from ({**base, **changed} for changed in replaced(OTHERS, text))
        yield {**base, "image": {"uri": text}}
    plain = {"id": base["id"], "network": base["network"], "target": {"top_n": 3}, "output": output}
    plain["artifacts"] = [{"kind": "report", "format": "html"}]
    for uri in images().values():
        yield {**plain, "image": {"uri": uri}, "metadata": {"key": HOSTILE}}
    headers = {"Content-Type": "text/\x1b[2Jhtml", "X": "\x9b31m"}
    for number, status in enumerate((200, 302, 403, 500)):
        moved = {**headers, "Location": "http://\x1b[31mhost\u00ad/x"} if status == 302 else headers
        url = http_server.url(f"/{number}", answer(status, HOSTILE.encode(), moved))
        yield {**plain, "image": {"uri": url}, "max_attempts": 1}


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_text_of_anybody_forges_a_line_a_document_a_page_or_a_terminal(
    form: str,
    tmp_path: Path,
    http_server: Any,
    answer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = f"file://{tmp_path}/out"
    with servers.valkey(tmp_path) as server:
        settings = Settings(
            broker_url=f"redis://127.0.0.1:{server.port}/0",
            output=output,
            image_schemes=("data", "http"),
            image_hosts=(http_server.host,),
            private_networks=("127.0.0.0/8",),
            max_image_damage=1,
            job_processes=int(form == "json"),
            log_format=form,
        )
        desk, log = Desk(settings, tmp_path), tmp_path / "worker.log"
        worker = parent_watch.spawn(
            tiny_worker.command(Path(__file__).with_name("hostile_worker.py")),
            log=log,
            environment={**settings.to_environment(), **import_path(), "HOSTILE_TEXT": json.dumps(HOSTILE)},
        )
        try:
            for payload in hostile_payloads(
                TEXTS if form == "text" else TEXTS[:1], output, http_server, answer
            ):
                desk.put(payload)
            documents = desk.final_documents()
        finally:
            parent_watch.stop(worker)
        assert [text for text in desk.refusals if not text.isprintable()] == []
        check_documents(documents)
        check_log(log.read_bytes(), form)
        check_files(tmp_path / "out")
        for name, value in settings.to_environment().items():
            monkeypatch.setenv(name, value)
        refused = next(one for one in documents if one.status == "failed")
        for command in (["top", "--once"], ["replay", "--dry-run", "--all"], ["status", refused.id]):
            main(command)
            said = "".join(capsys.readouterr())
            assert said
            assert [line for line in said.splitlines() if not line.isprintable()] == []


def check_documents(documents: list[StatusDocument]) -> None:
    states = {one.status for one in documents}
    assert states == {"succeeded", "failed"}
    for one in documents:
        if one.error:
            assert one.error.detail.isprintable(), one.error.detail
            assert one.error.public_message.isprintable()


def check_log(log: bytes, form: str) -> None:
    lines = log.decode().split("\n")
    assert lines.pop() == ""
    assert len(lines) > 50
    complaints = 0
    for line in lines:
        if form == "json":
            assert line.isascii()
            event = json.loads(line)
            assert event["level"] != "critical"
            assert [
                text for text in texts_of(event) if "\x1b" in text and event.get("event") == "native_output"
            ] == []
            complaints += event.get("event") == "native_output" and "job_id" in event
        else:
            assert line.isprintable(), line
            assert TEXT_LINE.match(line), line
            assert " CRITICAL " not in line[:40]
            complaints += "native_output text=" in line and " job_id=" in line
    assert complaints == 1, "of libjpeg, about one image"


def check_files(folder: Path) -> None:
    pages, manifests = 0, 0
    for file in folder.rglob("*"):
        assert str(file).isprintable()
        if file.suffix == ".html":
            pages += 1
            assert TAG not in file.read_text(), "a text ended a script of ours"
        if file.name == "manifest.json":
            manifests += 1
            source = json.loads(file.read_text())["input"]["converted_from"]
            assert not source or source["name"].isprintable()
    assert pages >= len(images()) - 2
    assert manifests >= pages
