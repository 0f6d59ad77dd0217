"""Hostile messages: jobs made from the wire's own schema, whole, mutated and broken, as in a queue.

Each is opened as the worker's channel opens it, and handled by a `JobHandler` with doubles all around it.
Whatever it is, it has to come to an end that has a name. Besides: tasks that are not ours and shards that
no client submitted, in each queue, which all have to be refused.
"""

import base64
import copy
import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cv2
import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from devtools import ROOT
from devtools.faults.observer import codes
from devtools.faults.schema_strategies import allowed
from devtools.faults.verdict import Verdict
from gradcam_worker.broker import envelope, publisher
from gradcam_worker.errors import ImageFetchFailed, ImageForbidden, InvalidJob
from gradcam_worker.execution.handler import JobHandler
from gradcam_worker.execution.leases import LeaseManager
from gradcam_worker.resilience.circuit_breaker import CircuitBreaker
from gradcam_worker.runtime import worker_process
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.status import StatusDocument, WorkerRef
from gradcam_worker.schemas.strict_json import Unreadable
from gradcam_worker.settings import Settings
from gradcam_worker.testing import MemoryLedger, fake_services

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
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    10**39,
    1e308,
    -0.0,
    "",
    " ",
    "\x00",
    "a\nb\r\x1b[2J",
    "\u202e\ufeff\u2028",
    "../../etc/passwd",
    "<script>alert(1)</script>",
    "s3://in/a.png\x00.jpg",
    "http://169.254.169.254/",
    "data:,",
    "\ud800",
    "\U0001f4a9" * 300,
    "x" * 70_000,
    [],
    [[]],
    {},
    {"": ""},
    {"__type__": "bytes", "__value__": "x"},
    {"__proto__": {"a": 1}},
    json.loads("[" * 12 + "]" * 12),
    list(range(2000)),
)
TEXTS = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"9" * 5000,
    b'{"a": 1, "a": 2}',
    b"[" * 3000,
    b"\xff",
    b'"\\ud800"',
    b'{"image": "s3://in/a.png"',
)
FOREIGN = (
    "celery.accumulate",
    "celery.backend_cleanup",
    "celery.chain",
    "celery.chord",
    "celery.chord_unlock",
    "celery.chunks",
    "celery.group",
    "celery.map",
    "celery.starmap",
    "gradcam.explain ",
    "Gradcam.explain",
)
KNOWN = "known"  # the token of the only backfill that there is
REFUSED = {"failed: invalid_job", "failed: unknown_backfill"}
FORGED: dict[str, Any] = {
    "schema": "gradcam.shard/v1",
    "backfill": "01a216d4-0523-773f-a799-60224947ae4d",
    "index": 0,
    "key": "00000000-0123456789abcdef",
    "first": 0,
    "rows": [{"uri": "s3://in/a.png"}] * 1500,
    "network": "efficientnet_lite0",
    "target": {"top_n": 1},
    "output": "s3://out",
    "keep": True,
}


def attack(count: int, seed: int) -> Verdict:
    """Handle `count` messages; the figures count their outcomes."""
    found: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()

    def counted(item: bytes, queue: str = publisher.INTERACTIVE) -> str:
        what, outcome = judge(item, queue)
        found["jobs"] += 1
        found[what] += 1
        outcomes[outcome] += 1
        return outcome

    def one(item: bytes) -> None:
        counted(item)

    with_messages = given(items(allowed(json.loads(SCHEMA.read_text()))))
    log = logging.getLogger("gradcam")
    before = log.level
    log.setLevel(logging.CRITICAL)  # a line for each of them would say nothing
    try:
        hypothesis.seed(seed)(profile(count)(with_messages(one)))()
        broken = [
            f"{what} in {queue} was not refused: {outcome}"
            for what, queue, item in forbidden_messages()
            if (outcome := counted(item, queue)) not in REFUSED
        ]
    finally:
        log.setLevel(before)
    return Verdict(
        jobs=found["jobs"],
        faults=found["jobs"] - outcomes["succeeded"],
        untyped=found["untyped"],
        without_final_state=found["without_final_state"],
        figures={"outcomes": dict(sorted(outcomes.items()))},
        broken=broken,
    )


def profile(count: int) -> settings:
    """Hypothesis's settings for `count` examples, which are not stored and may take any time."""
    return settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def forbidden_messages() -> Iterator[tuple[str, str, bytes]]:
    """Yield messages that have to be refused: what each is, its queue, and the item."""
    for queue, ours in publisher.TASKS.items():
        for task in FOREIGN:
            yield task, queue, message(json.dumps([[GOOD], {}, {}]).encode(), task)
        for task in {*publisher.TASKS.values()} - {ours}:
            yield f"{task} with a job", queue, message(json.dumps([[GOOD], {}, {}]).encode(), task)
        for token in ("", "guessed"):
            body = json.dumps([[{**FORGED, "id": new_id(), "token": token}], {}, {}]).encode()
            yield f"a shard with the token {token!r}", queue, message(body, ours)
            yield (
                f"a shard with the token {token!r} by its task",
                queue,
                message(body, publisher.EXPLAIN_SHARD),
            )
    yield "a job", publisher.SHARDS, message(json.dumps([[GOOD], {}, {}]).encode(), publisher.EXPLAIN_SHARD)


def judge(item: bytes, queue: str = publisher.INTERACTIVE) -> tuple[str, str]:
    """Handle an item as a worker does: whether its end is `typed`, and which it is."""
    ledger = MemoryLedger()
    try:
        message_id = handle(item, ledger, queue)
    except Exception as error:  # noqa: BLE001  # that none comes is what is being tried
        return "untyped", f"raised {type(error).__name__}"
    if message_id is None:
        return "typed", "set aside"
    document = the_document(ledger)
    if not document.final and document.status != "retrying":
        return "without_final_state", document.status
    code = document.error.code if document.error else None
    if code not in codes() | {None}:
        return "untyped", f"{document.status}: {document.error and document.error.detail}"
    if document.error and not document.error.detail.isprintable():
        return "untyped", "an error that could forge a line of a log"
    return "typed", f"{document.status}: {code}" if code else document.status


def handle(item: bytes, ledger: MemoryLedger, queue: str) -> str | None:
    """Open an item and do with it what a worker does; return the id that it goes by, if it has one."""
    one = handler(ledger)
    try:
        opened = envelope.parse_message(item, queue, MAX_BYTES, publisher.TASKS[queue])
    except Unreadable as error:
        message_id = envelope.find_id(item)
        if message_id:
            one.refuse(message_id, None, InvalidJob(f"The message is not a job: {error}."))
        return message_id
    headers, properties = opened["headers"], opened["properties"]
    body = opened["body"]
    args, _, _ = json.loads(base64.b64decode(body) if properties["body_encoding"] == "base64" else body)
    kind = worker_process.PAYLOADS[headers["task"]]
    entered_at = headers[envelope.ENTERED_AT]
    one.handle(worker_process._single_argument(tuple(args)), headers["id"], entered_at=entered_at, kind=kind)  # noqa: SLF001  # as it does
    return str(headers["id"])


def handler(ledger: MemoryLedger) -> JobHandler:
    """A handler in memory."""
    return JobHandler(
        Settings(),
        ledger,
        fake_services(IMAGES),
        WorkerRef(id="w", device="cpu"),
        LeaseManager(ledger, "w", 15),
        CircuitBreaker(lambda: None),
        admits=lambda shard: shard.token == KNOWN,
    )


def the_document(ledger: MemoryLedger) -> StatusDocument:
    """The only one."""
    (entry,) = ledger._entries.values()  # noqa: SLF001  # it is looked at from outside
    return entry.document


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
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"task": task, "id": message_id or new_id()},
            "properties": {"body_encoding": "base64", "delivery_info": {}},
        }
    ).encode()


@st.composite
def mutated(draw: st.DrawFn, job: dict[str, Any]) -> dict[str, Any]:
    """The same job with one thing in it gone, added, or something hostile."""
    job = copy.deepcopy(job)
    place: Any = job
    while True:
        inner = [
            one for one in (place.values() if isinstance(place, dict) else place) if one and is_inner(one)
        ]
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


def is_inner(value: object) -> bool:
    """Whether there is anything in it to be changed."""
    return isinstance(value, dict | list)


@st.composite
def spoiled(draw: st.DrawFn, text: bytes) -> bytes:
    """The same bytes with some of them lost, changed, or others in between."""
    at, end = draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))
    between = draw(st.one_of(st.sampled_from(TEXTS), st.binary(max_size=8)))
    return text[: min(at, end)] + between + text[draw(st.sampled_from([min(at, end), max(at, end)])) :]
