"""Parses and checks queue items before kombu and Celery read them.

The items of a queue are untrusted, but kombu and Celery let an item choose its own delivery tag, the queue to
which it returns, the tasks that follow, its compression and when it runs. Therefore only what a job needs is
copied from an item's envelope; everything else is written here.
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

MAX_HEADER_BYTES = 64 * 1024  # headers and properties together; Celery's have 1,000
MAX_BODY_OVERHEAD_BYTES = 1024  # the body without its job; Celery's has 100
MAX_ID_CHARS = 256
MAX_REASON_CHARS = 500
# The remote commands that only read. Other `inspect` commands of Celery change something, or are slow.
INSPECTIONS = frozenset(
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
REPLY_EXCHANGE = "reply.celery.pidbox"  # of the replies to remote commands
# Headers of ours.
ENTERED_AT = "gradcam_entered_at"  # when the job was entered in the ledger
REFUSED = "gradcam_refused"  # why this message is no task

_ID = re.compile(
    rb'"id": ?"((?:[ !#-\[\]-~]|\\[^u]|\\u[0-9a-fA-F]{4}){1,%d})"' % MAX_ID_CHARS
)  # a JSON string in ASCII
# Error messages quote only names of this form: any other text may be a secret.
_TASK = re.compile(r"(?=.{1,60}$)[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", re.ASCII)
_METHOD = re.compile("[a-z_]{1,40}")
# An entry of kombu's unacknowledged messages: the item as it was received, its exchange, its queue.
_UNACKNOWLEDGED = re.compile(
    rb'\[(?P<item>.*), ?"(?:[^"\\]|\\.)*", ?(?P<queue>"(?:[^"\\]|\\.)+")\]', re.DOTALL
)
_CORRELATION_ID = re.compile(_ID.pattern.replace(b"id", b"correlation_id"))


def max_item_bytes(max_job_bytes: int) -> int:
    """The size limit of an item whose job may have `max_job_bytes`: its body is in base64."""
    return (max_job_bytes + MAX_BODY_OVERHEAD_BYTES) * 4 // 3 + MAX_HEADER_BYTES


def parse_message(item: bytes, queue: str, max_job_bytes: int, task: str) -> dict[str, Any]:
    """Parse an item of a queue.

    Args:
        item: The item as it was received.
        queue: The queue that it was in.
        max_job_bytes: The size limit of the job in it, as JSON.
        task: The only task that this queue accepts.

    Returns:
        The message, as kombu expects it.

    Raises:
        Unreadable: The item is no message of this task. The error is the reason, as part of a sentence.
    """
    if len(item) > max_item_bytes(max_job_bytes):
        raise Unreadable(_too_large(len(item), max_item_bytes(max_job_bytes), "it"))
    envelope = loads(item, "its envelope")
    if not isinstance(envelope, dict):
        message = "its envelope must be an object with headers, properties and body"
        raise Unreadable(message)
    headers, properties = envelope.get("headers"), envelope.get("properties")
    if not isinstance(headers, dict) or not isinstance(properties, dict):
        message = "headers and properties of its envelope must be objects"
        raise Unreadable(message)
    if not isinstance(headers.get("id"), str) or len(headers["id"]) > MAX_ID_CHARS:
        message = f"its header id must be a text of at most {MAX_ID_CHARS} characters"
        raise Unreadable(message)
    if isinstance(headers.get(REFUSED), str):  # refused before, when the ledger could not record it
        return refused_message(headers["id"], queue, headers[REFUSED])
    _check_headers(headers, queue, task)
    body, encoding = _checked_body(envelope, properties, max_job_bytes)
    info = properties.get("delivery_info")
    return {
        "body": body,
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": task,
            "id": headers["id"],
            "argsrepr": "",  # Celery logs these
            "kwargsrepr": "",
            ENTERED_AT: headers.get(ENTERED_AT),
        },
        "properties": {
            **_route(queue, redelivered=isinstance(info, dict) and bool(info.get("redelivered"))),
            "body_encoding": encoding,
            "priority": _priority(properties.get("priority")),
        },
    }


def parse_inspection(item: bytes) -> bytes:
    """Parse a remote command that only reads the worker's state.

    Any other command could stop this worker, or its work, without a trace. An inspection has no arguments and
    no pattern of workers, and its reply goes to the caller.

    Args:
        item: The item as it was received.

    Returns:
        The command, as kombu expects it.

    Raises:
        Unreadable: The item is no such command.
    """
    if len(item) > MAX_HEADER_BYTES:
        message = f"it has {len(item):,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
        raise Unreadable(message)
    envelope = loads(item, "its envelope")
    properties = envelope.get("properties") if isinstance(envelope, dict) else None
    if not isinstance(properties, dict):
        message = "its envelope must be an object with properties and a body"
        raise Unreadable(message)
    command = loads(_decoded_body(envelope, properties), "its body")
    method = command.get("method") if isinstance(command, dict) else None
    if not isinstance(method, str) or method not in INSPECTIONS:
        name = method if isinstance(method, str) and _METHOD.fullmatch(method) else "its method"
        message = f"{name} is none of those that are answered: {', '.join(sorted(INSPECTIONS))}"
        raise Unreadable(message)
    match command:
        case {
            "destination": list() | None as destination,
            "reply_to": {"exchange": exchange, "routing_key": str() as key},
            "ticket": str() as ticket,
        }:
            if exchange == REPLY_EXCHANGE and not command.get("pattern"):
                body = {
                    "method": method,
                    "destination": destination,
                    "reply_to": {"exchange": REPLY_EXCHANGE, "routing_key": key},
                    "ticket": ticket,
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
        f"{method} must have a ticket, a reply_to of {REPLY_EXCHANGE}, a list of workers or none, "
        "and no pattern"
    )
    raise Unreadable(message)


def check_job(text: bytes, max_job_bytes: int) -> None:
    """Check, before a job is published, that a worker will read it.

    Args:
        text: The job as JSON.
        max_job_bytes: The size limit of the job.

    Raises:
        InvalidJob: No worker would read it.
    """
    if len(text) > max_job_bytes:
        message = f"No worker would take this job: {_too_large(len(text), max_job_bytes, 'it')}."
        raise InvalidJob(message)
    try:
        loads(text, "it")
    except Unreadable as error:
        message = f"No worker would take this job: {error}."
        raise InvalidJob(message) from error


def refused_message(message_id: str, queue: str, reason: str) -> dict[str, Any]:
    """A message that replaces an unreadable item: it carries only its id and the reason."""
    return {
        "body": "",
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"id": message_id, REFUSED: reason[:MAX_REASON_CHARS]},
        "properties": _route(queue, redelivered=False),
    }


def find_id(item: bytes) -> str | None:
    """Search an unreadable item for its id, without parsing it as a whole."""
    for pattern in (_ID, _CORRELATION_ID):
        for part in (item[-MAX_HEADER_BYTES:], item[:MAX_HEADER_BYTES]):
            if (match := pattern.search(part)) and (message_id := _unescape(match[1])):
                return message_id
    return None


def _unescape(quoted: bytes) -> str | None:
    """The text of a JSON string without its quotes. Half of a surrogate pair is kept as an escape."""
    try:
        return str(json.loads(b'"%s"' % quoted)).encode(errors="backslashreplace").decode()
    except ValueError:
        return None


def parse_unacknowledged(
    entry: bytes, max_job_bytes: int, tasks: Mapping[str, str]
) -> tuple[dict[str, Any], str, str] | None:
    """Parse an entry of kombu's unacknowledged messages, so that it can be put back.

    It may hold an item that was never checked: the process that took it may have died before.

    Args:
        entry: The entry as kombu or the script `receive` wrote it.
        max_job_bytes: The size limit of a job, as JSON.
        tasks: The only task of each queue.

    Returns:
        The message, its exchange and its queue; None where the entry is no message.
    """
    match = _UNACKNOWLEDGED.fullmatch(entry)
    if not match:
        return None
    item = match["item"]
    try:
        queue = str(json.loads(match["queue"]))
        message = parse_message(item, queue, max_job_bytes, tasks.get(queue, ""))
    except ValueError as error:
        if not isinstance(error, Unreadable) or not (message_id := find_id(item)):
            return None
        message = refused_message(message_id, queue, str(error))
    return message, "", queue


def _too_large(size: int, limit: int, subject: str) -> str:
    return f"{subject} has {size:,} bytes; at most {limit:,} are allowed (GRADCAM_MAX_MESSAGE_BYTES)"


def _check_headers(headers: dict[str, Any], queue: str, task: str) -> None:
    name = headers.get("task")
    if not isinstance(name, str) or not name:
        message = f"it names no task: in the queue {queue}, headers.task must be {task}"
        raise Unreadable(message)
    if name != task:  # Celery's own tasks publish messages that their arguments name
        quoted = f" {name!r}" if _TASK.fullmatch(name) else " of that name"
        message = f"there is no task{quoted} in the queue {queue}, only {task}"
        raise Unreadable(message)
    if headers.get("compression"):
        message = "it is compressed, and only plain JSON is read"
        raise Unreadable(message)
    for header, instead in {
        "eta": "submit the job when it is to run",
        "expires": "say expires_at in the job",
    }.items():
        if headers.get(header):
            message = f"its header {header} is not allowed: {instead}"
            raise Unreadable(message)


def _checked_body(
    envelope: dict[str, Any], properties: dict[str, Any], max_job_bytes: int
) -> tuple[str, str | None]:
    """The body and its encoding. Named arguments lose their names, which could be names that Celery uses."""
    data = _decoded_body(envelope, properties)
    limit = max_job_bytes + MAX_BODY_OVERHEAD_BYTES
    if len(data) > limit:
        raise Unreadable(_too_large(len(data), limit, "its body"))
    match loads(data, "its body"):
        case [list() as args, dict() as kwargs, dict() as following]:
            if any(following.values()):
                message = "it names tasks that are to follow, and none may"
                raise Unreadable(message)
            if kwargs:
                return json.dumps([[*args, *kwargs.values()], {}, {}]), None
            return envelope["body"], properties.get("body_encoding")
    message = "its body must be a list of arguments, named arguments, and an object"
    raise Unreadable(message)


def _decoded_body(envelope: dict[str, Any], properties: dict[str, Any]) -> bytes:
    """The body without its base64, as JSON."""
    body, encoding = envelope.get("body"), properties.get("body_encoding")
    if envelope.get("content-type") != "application/json" or envelope.get("content-encoding") not in {
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
    """Its delivery tag and queue. Those that an untrusted item names could displace another message."""
    return {
        "delivery_tag": str(uuid.uuid4()),
        "delivery_info": {"exchange": "", "routing_key": queue, "redelivered": redelivered},
    }


def _priority(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value <= 9 else 0  # noqa: PLR2004  # Celery's range
