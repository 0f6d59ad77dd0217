"""Hostile messages: jobs made from the wire's own schema, whole, mutated and broken, as in a queue.

Each is opened as the worker's channel opens it, and handled by a `JobHandler` with doubles all around it.
"""

import base64
import copy
import json
from collections import Counter
from typing import Any

import cv2
import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from devtools import ROOT
from devtools.faults.observer import codes
from gradcam_worker.broker import envelope, publisher
from gradcam_worker.errors import ImageFetchFailed, ImageForbidden, InvalidJob
from gradcam_worker.execution.handler import JobHandler
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.runtime.processes import worker_process
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.status import WorkerRef
from gradcam_worker.schemas.strict_json import Unreadable
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, fake_services
from tests.faults.schema_strategies import allowed

SCHEMA = ROOT / "deploy" / "schemas" / "job.v1.json"
PHOTO = cv2.imencode(".png", np.full((20, 20, 3), (0, 0, 255), np.uint8))[1].tobytes()
IMAGES: dict[str, bytes | Exception] = {
    "s3://in/a.png": PHOTO,
    "s3://in/cut.png": PHOTO[:40],
    "s3://in/slow.png": ImageFetchFailed("HTTP 503"),
    "s3://in/shut.png": ImageForbidden("HTTP 403"),
    "s3://in/odd.png": PHOTO[::-1],
}
GOOD = {"image": "s3://in/a.png", "network": "efficientnet_lite0", "target": {"top_n": 2}}
MAX_BYTES = 100_000  # of a message
KINDS = ("whole",) * 4 + ("mutated",) * 4 + ("body", "item")  # what is spoiled of a message
NUMBERS = (-1, 0, 2**63, 10**39, 1e308, -0.0)
STRINGS = ("", " ", "\x00", "a\nb\r\x1b[2J", "\u202e\ufeff\u2028", "\ud800", "\U0001f4a9" * 300, "x" * 70_000)
PATHS = ("../../etc/passwd", "s3://in/a.png\x00.jpg", "http://169.254.169.254/", "data:,")
OBJECTS: tuple[Any, ...] = ({}, {"": ""}, {"__type__": "bytes", "__value__": "x"}, {"__proto__": {"a": 1}})
LISTS: tuple[Any, ...] = ([], [[]], json.loads("[" * 12 + "]" * 12), list(range(2000)))
SCRIPT = "<script>alert(1)</script>"
HOSTILE: tuple[Any, ...] = (None, True, *NUMBERS, *STRINGS, *PATHS, SCRIPT, *OBJECTS, *LISTS)
NO_NUMBERS = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000)
TEXTS = (*NO_NUMBERS, b'{"a": 1, "a": 2}', b"[" * 3000, b"\xff", b'"\\ud800"', b'{"image": "s3://in/a.png"')
KNOWN = "known"  # the token of the only backfill that there is


def judged(count: int, seed: int) -> Counter[tuple[str, str]]:
    """What `judge` says of `count` messages, and how often."""
    ends: Counter[tuple[str, str]] = Counter()
    profile = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    job = allowed(json.loads(SCHEMA.read_text()))
    hypothesis.seed(seed)(profile(given(items(job))(lambda item: ends.update([judge(item)]))))()
    return ends


def judge(item: bytes, queue: str = publisher.INTERACTIVE) -> tuple[str, str]:
    """Handle an item as a worker does: whether its end is `typed`, and which it is."""
    ledger = MemoryLedger()
    try:
        message_id = handle(item, ledger, queue)
    except Exception as raised:  # noqa: BLE001  # that none comes is what is being tried
        return "untyped", f"raised {type(raised).__name__}"
    if message_id is None:
        return "typed", "set aside"
    (entry,) = ledger._entries.values()
    document, error = entry.document, entry.document.error
    if not document.final and document.status != "retrying":
        return "without_final_state", document.status
    if error is None:
        return "typed", document.status
    if error.code not in codes() or not error.detail.isprintable():  # which could forge a line of a log
        return "untyped", f"{document.status}: {error.detail!r}"
    return "typed", f"{document.status}: {error.code}"


def handle(item: bytes, ledger: MemoryLedger, queue: str) -> str | None:
    """Open an item and do with it what a worker does; return the id that it goes by, if it has one."""
    handler = JobHandler(
        Settings(),
        ledger,
        fake_services(IMAGES),
        WorkerRef(id="w", device="cpu"),
        LeaseManager(ledger, "w", 15),
        CircuitBreaker(lambda: None),
        admits=lambda shard: shard.token == KNOWN,
    )
    try:
        opened = envelope.parse_message(item, queue, MAX_BYTES, publisher.TASKS[queue])
    except Unreadable as error:
        message_id = envelope.find_id(item)
        if message_id:
            handler.refuse(message_id, None, InvalidJob(f"The message is not a job: {error}."))
        return message_id
    headers, properties, body = opened["headers"], opened["properties"], opened["body"]
    args, _, _ = json.loads(base64.b64decode(body) if properties["body_encoding"] == "base64" else body)
    payload = worker_process._single_argument(tuple(args))  # as it does
    kind, entered_at = worker_process.PAYLOADS[headers["task"]], headers[envelope.ENTERED_AT]
    handler.handle(payload, headers["id"], entered_at=entered_at, kind=kind)
    return str(headers["id"])


@st.composite
def items(draw: st.DrawFn, jobs: st.SearchStrategy[dict[str, Any]]) -> bytes:
    """What may lie in a queue: good jobs, and worse and worse ones."""
    kind = draw(st.sampled_from(KINDS))
    fixed = draw(st.sampled_from((GOOD,) * 7 + ({},)))
    job = {**draw(jobs), **fixed, "image": draw(st.sampled_from([*IMAGES, "s3://in/none.png"]))}
    if kind == "mutated":
        for _ in range(draw(st.integers(1, 3))):
            job = draw(mutated(job))
    body = json.dumps([[job], {}, {}]).encode()
    if kind == "body":
        body = draw(spoiled(body))
    item = message(body)
    return draw(spoiled(item)) if kind == "item" else item


def message(body: bytes, task: str = publisher.EXPLAIN, message_id: str = "") -> bytes:
    """An item with this body."""
    item = {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"task": task, "id": message_id or new_id()},
        "properties": {"body_encoding": "base64", "delivery_info": {}},
    }
    return json.dumps(item).encode()


@st.composite
def mutated(draw: st.DrawFn, job: dict[str, Any]) -> dict[str, Any]:
    """The same job with one thing in it gone, added, or something hostile."""
    job = copy.deepcopy(job)
    place: Any = job
    while True:
        values = place.values() if isinstance(place, dict) else place
        inner = [value for value in values if value and isinstance(value, dict | list)]
        if not inner or draw(st.booleans()):
            break
        place = draw(st.sampled_from(inner))
    keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
    value = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
    if isinstance(place, dict):
        place[draw(st.sampled_from([*keys, "more", "\x00"]))] = value
    elif keys:
        place[draw(st.sampled_from(keys))] = value
    if isinstance(place, dict) and keys and draw(st.integers(0, 3)) == 0:
        del place[draw(st.sampled_from(keys))]
    return job


@st.composite
def spoiled(draw: st.DrawFn, text: bytes) -> bytes:
    """The same bytes with some of them lost, changed, or others in between."""
    at, end = draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))
    between = draw(st.one_of(st.sampled_from(TEXTS), st.binary(max_size=8)))
    return text[: min(at, end)] + between + text[draw(st.sampled_from([min(at, end), max(at, end)])) :]
