"""The envelope a message comes in: opened, and held to limits, before anything else reads it.

What lies in a queue was put there by strangers, and kombu and Celery trust it: with the tag under which
they keep it, the list to which they give it back, what is to follow the task, how it is compressed and when
it is to run. So of an envelope only what a job needs is taken over; the rest is made here.
"""

import base64
import binascii
import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

from gradcam_worker.errors import InvalidJob
from gradcam_worker.schemas.strict_json import Unreadable, loads

HEAD_BYTES = 64 * 1024  # that headers and properties may have; Celery's have 1,000
AROUND_BYTES = 1024  # that a message's body may have beside its job; Celery's has 100
MAX_ID = 256  # characters
MAX_WHY = 500  # characters
# The remote commands that only ask. Others that Celery calls `inspect` change something, or take their time.
QUESTIONS = frozenset(
    {
        "active",
        "active_queues",
        "clock",
        "conf",
        "ping",
        "registered",
        "report",
        "reserved",
        "revoked",
        "scheduled",
        "stats",
    }
)
REPLIES = "reply.celery.pidbox"  # the exchange by which whoever asks hears
ENTERED_AT = "gradcam_entered_at"  # a header: when the job was entered in the ledger
REFUSED = "gradcam_refused"  # a header: why this message is no task

_ID = re.compile(
    rb'"id": ?"((?:[ !#-\[\]-~]|\\[^u]|\\u[0-9a-fA-F]{4}){1,%d})"' % MAX_ID
)  # of ASCII, as JSON has it
# Names that are shown: a text of another kind may be a secret.
_TASK = re.compile(r"(?=.{1,60}$)[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", re.ASCII)
_METHOD = re.compile("[a-z_]{1,40}")
# The item as it was received, its exchange and its queue.
_KEPT = re.compile(rb'\[(?P<item>.*), ?"(?:[^"\\]|\\.)*", ?(?P<queue>"(?:[^"\\]|\\.)+")\]', re.DOTALL)
_CORRELATION_ID = re.compile(_ID.pattern.replace(b"id", b"correlation_id"))


def largest_item(max_bytes: int) -> int:
    """How many bytes an item may have whose job may have `max_bytes`: a body is written in base64."""
    return (max_bytes + AROUND_BYTES) * 4 // 3 + HEAD_BYTES


def read(item: bytes, queue: str, max_bytes: int, task: str) -> dict[str, Any]:
    """An item of a queue -> a message as kombu expects it. Raises Unreadable.

    `max_bytes` is how large the job in it may be, as JSON; `task` is the only task that this queue is for.
    """
    if len(item) > largest_item(max_bytes):
        raise Unreadable(too_large(len(item), largest_item(max_bytes), "it"))
    found = loads(item, "its envelope")
    if not isinstance(found, dict):
        what = "its envelope must be an object with headers, properties and body"
        raise Unreadable(what)
    headers, properties = found.get("headers"), found.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        what = "headers and properties of its envelope must be objects"
        raise Unreadable(what)
    if not isinstance(headers.get("id"), str) or len(headers["id"]) > MAX_ID:
        what = f"its header id must be a text of at most {MAX_ID} characters"
        raise Unreadable(what)
    if isinstance(headers.get(REFUSED), str):  # it was refused before, and could not be written down then
        return stand_in(headers["id"], queue, headers[REFUSED])
    _check_headers(headers, queue, task)
    body, encoding = _body(found, properties, max_bytes)
    info = properties.get("delivery_info")
    return {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": task,
            "id": headers["id"],
            "argsrepr": "",  # logs repeat these
            "kwargsrepr": "",
            ENTERED_AT: headers.get(ENTERED_AT),
        },
        "properties": {
            **_route(queue, redelivered=isinstance(info, dict) and bool(info.get("redelivered"))),
            "body_encoding": encoding,
            "priority": _priority(properties.get("priority")),
        },
    }


def question(item: bytes) -> bytes:
    """A remote command that does no more than ask -> the same, as kombu expects it. Raises Unreadable.

    Of the others each could stop this worker, or its work, without a trace. A question has no arguments and
    no pattern of workers, and its answer goes to whoever asks.
    """
    if len(item) > HEAD_BYTES:
        message = f"it has {len(item):,} bytes; at most {HEAD_BYTES:,} are allowed"
        raise Unreadable(message)
    found = loads(item, "its envelope")
    properties = found.get("properties") if isinstance(found, dict) else None
    if not isinstance(properties, dict):
        message = "its envelope must be an object with properties and a body"
        raise Unreadable(message)
    asked = loads(_content(found, properties), "its body")
    method = asked.get("method") if isinstance(asked, dict) else None
    if not isinstance(method, str) or method not in QUESTIONS:
        shown = method if isinstance(method, str) and _METHOD.fullmatch(method) else "its method"
        message = f"{shown} is none of those that are answered: {', '.join(sorted(QUESTIONS))}"
        raise Unreadable(message)
    match asked:
        case {
            "destination": list() | None as destination,
            "reply_to": {"exchange": exchange, "routing_key": str() as key},
            "ticket": str() as slot,
        }:
            if exchange == REPLIES and not asked.get("pattern"):
                body = {
                    "method": method,
                    "destination": destination,
                    "reply_to": {"exchange": REPLIES, "routing_key": key},
                    "ticket": slot,
                }
                return json.dumps(
                    {
                        "body": json.dumps(body),
                        "content-encoding": "utf-8",
                        "content-type": "application/json",
                        "headers": {},
                        "properties": {"delivery_tag": str(uuid.uuid4())},
                    }
                ).encode()
    message = (
        f"{method} must have a ticket, a reply_to of {REPLIES}, a list of workers or none, and no pattern"
    )
    raise Unreadable(message)


def check(text: bytes, max_bytes: int) -> None:
    """Whether a worker will read this job, as JSON, asked before it is sent. Raises InvalidJob."""
    if len(text) > max_bytes:
        message = f"No worker would take this job: {too_large(len(text), max_bytes, 'it')}."
        raise InvalidJob(message)
    try:
        loads(text, "it")
    except Unreadable as error:
        message = f"No worker would take this job: {error}."
        raise InvalidJob(message) from error


def stand_in(message_id: str, queue: str, why: str) -> dict[str, Any]:
    """A message in place of one that is none: it says under which id, and why."""
    return {
        "body": "",
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"id": message_id, REFUSED: why[:MAX_WHY]},
        "properties": _route(queue, redelivered=False),
    }


def identify(item: bytes) -> str | None:
    """The id that an item goes by, if it can be told without reading it whole."""
    for pattern in (_ID, _CORRELATION_ID):
        for part in (item[-HEAD_BYTES:], item[:HEAD_BYTES]):
            if (found := pattern.search(part)) and (name := _text(found[1])):
                return name
    return None


def _text(quoted: bytes) -> str | None:
    """What stands between the quotes of a JSON text; half a character in it is spelt out."""
    try:
        return str(json.loads(b'"%s"' % quoted)).encode(errors="backslashreplace").decode()
    except ValueError:
        return None


def reopened(held: bytes, max_bytes: int, tasks: Mapping[str, str]) -> tuple[dict[str, Any], str, str] | None:
    """What is kept of an unacknowledged message -> the message, fit to be put back; its exchange and queue.

    None where it is no message. It may be as a stranger wrote it: whoever took it may have died before he
    opened it.
    """
    kept = _KEPT.fullmatch(held)
    if not kept:
        return None
    item = kept["item"]
    try:
        queue = str(json.loads(kept["queue"]))
        message = read(item, queue, max_bytes, tasks.get(queue, ""))
    except ValueError as error:
        if not isinstance(error, Unreadable) or not (message_id := identify(item)):
            return None
        message = stand_in(message_id, queue, str(error))
    return message, "", queue


def too_large(size: int, limit: int, what: str) -> str:
    """The finding that something has too many bytes."""
    return f"{what} has {size:,} bytes; at most {limit:,} are allowed (GRADCAM_MAX_MESSAGE_BYTES)"


def _check_headers(headers: dict[str, Any], queue: str, task: str) -> None:
    named = headers.get("task")
    if not isinstance(named, str) or not named:
        message = f"it names no task: in the queue {queue}, headers.task must be {task}"
        raise Unreadable(message)
    if named != task:  # Celery has tasks of its own, which publish what they are told to
        shown = f" {named!r}" if _TASK.fullmatch(named) else " of that name"
        message = f"there is no task{shown} in the queue {queue}, only {task}"
        raise Unreadable(message)
    if headers.get("compression"):
        message = "it is compressed, and only plain JSON is read"
        raise Unreadable(message)
    for name, instead in {
        "eta": "submit the job when it is to run",
        "expires": "say expires_at in the job",
    }.items():
        if headers.get(name):
            message = f"its header {name} is not allowed: {instead}"
            raise Unreadable(message)


def _body(found: dict[str, Any], properties: dict[str, Any], max_bytes: int) -> tuple[str, str | None]:
    """The body, and its encoding. Its arguments have no names, which could be names that Celery uses."""
    data = _content(found, properties)
    if len(data) > max_bytes + AROUND_BYTES:
        raise Unreadable(too_large(len(data), max_bytes + AROUND_BYTES, "its body"))
    match loads(data, "its body"):
        case [list() as args, dict() as kwargs, dict() as follow]:
            if any(follow.values()):
                message = "it names tasks that are to follow, and none may"
                raise Unreadable(message)
            if kwargs:
                return json.dumps([[*args, *kwargs.values()], {}, {}]), None
            return found["body"], properties.get("body_encoding")
    message = "its body must be a list of arguments, named arguments, and an object"
    raise Unreadable(message)


def _content(found: dict[str, Any], properties: dict[str, Any]) -> bytes:
    """What the body says, still as JSON."""
    body, encoding = found.get("body"), properties.get("body_encoding")
    if found.get("content-type") != "application/json" or found.get("content-encoding") not in {
        "utf-8",
        "UTF-8",
    }:
        message = "it is not JSON in UTF-8 (content-type application/json, content-encoding utf-8)"
        raise Unreadable(message)
    if not isinstance(body, str) or encoding not in (None, "utf-8", "base64"):
        message = "its body must be text, plain or in base64"
        raise Unreadable(message)
    try:
        return base64.b64decode(body, validate=True) if encoding == "base64" else body.encode()
    except (binascii.Error, ValueError) as error:
        message = "its body is not base64, or not text"
        raise Unreadable(message) from error


def _route(queue: str, *, redelivered: bool) -> dict[str, Any]:
    """Where a message is kept and given back to: not as it says, or it would take another's place."""
    return {
        "delivery_tag": str(uuid.uuid4()),
        "delivery_info": {"exchange": "", "routing_key": queue, "redelivered": redelivered},
    }


def _priority(said: object) -> int:
    return said if isinstance(said, int) and 0 <= said <= 9 else 0  # noqa: PLR2004  # Celery's range
