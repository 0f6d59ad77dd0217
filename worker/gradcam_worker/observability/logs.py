"""How a process logs: text lines for a person, or JSON objects for a log collector.

Lines that are logged while a job runs carry the job's id, whichever module logs them: `log_context` binds
fields to the context, and a `ContextThreadPool` takes the context along to its threads.
"""

import copy
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from datetime import UTC, datetime
from functools import partial
from typing import Any, ParamSpec, TypeVar

from gradcam_worker.schemas.ids import process_name
from gradcam_worker.text.log_events import EventLogger, EventMessage, safe_str
from gradcam_worker.text.urls import redacted
from gradcam_worker.text.visible import visible

TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
INDENT = "    "  # of a traceback below its line: no line of its own begins with it
P = ParamSpec("P")
T = TypeVar("T")

log = EventLogger("gradcam")

_context_fields: ContextVar[Mapping[str, object]] = ContextVar("gradcam_log_fields", default={})  # noqa: B039  # never changed


@contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Add fields to each event and JSON line that is logged within the block.

    They hold in this thread, and in the threads of a `ContextThreadPool` for calls submitted in the block.

    Args:
        **fields: Added to those of an outer block. Those that are None are left out.
    """
    present = {name: value for name, value in fields.items() if value is not None}
    token = _context_fields.set({**_context_fields.get(), **present})
    try:
        yield
    finally:
        _context_fields.reset(token)


def context_fields() -> Mapping[str, object]:
    """Return the fields of the log context: see `log_context`."""
    return _context_fields.get()


class ContextThreadPool(ThreadPoolExecutor):
    """A thread pool that runs each call in the context of the code that submitted it."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `ThreadPoolExecutor.submit`."""
        return super().submit(partial(copy_context().run, fn, *args, **kwargs))


class JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII: control characters and line breaks are escaped.

    Keys: time (RFC 3339, UTC), level, logger, message; for an event also `event` and its fields; job_id,
    attempt and trace_id from the log context; worker (host:pid); exception (type, message, stack) and stack
    where the record has one.
    """

    def __init__(self, worker: str) -> None:
        """`worker` is the name of this process, host:pid."""
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_json_fields(_context_fields.get()),
            "worker": self._worker,
        }
        line = {**line, **_event_fields(record), **line}  # an event's field replaces none of the keys above
        if record.exc_info and record.exc_info[0]:
            kind, error, _ = record.exc_info
            stack = redacted(super().formatException(record.exc_info))
            line["exception"] = {"type": kind.__name__, "message": redacted(safe_str(error)), "stack": stack}
        if record.stack_info:
            line["stack"] = redacted(record.stack_info)
        return json.dumps(_escape_surrogates(line))


class LineFormatter(logging.Formatter):
    """One text line for each record; tracebacks are indented below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        try:
            return super().format(record)
        except Exception:  # noqa: BLE001  # see `_message`
            readable = copy.copy(record)
            readable.msg, readable.args = _message(record), None
            return super().format(readable)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the name is the library's
        """Return the line without a traceback; events get the fields of the log context."""
        line = super().formatMessage(record)
        if isinstance(record.msg, EventMessage):  # other libraries' messages stay unchanged
            own = record.msg.fields
            line += str(
                EventMessage(
                    "", {key: value for key, value in _context_fields.get().items() if key not in own}
                )
            )
        return visible(redacted(line))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """Return an indented traceback, without secrets."""
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """Return an indented stack, without secrets."""
        return _indented(super().formatStack(stack_info))


def configure_logging(log_format: str, level: str) -> None:
    """Log to standard error.

    Debug lines are logged for our own logger only: those of other libraries may hold secrets.

    Args:
        log_format: text or json.
        level: debug, info, warning or error.
    """
    handler = logging.StreamHandler()
    threshold = logging.getLevelNamesMapping()[level.upper()]
    if log_format == "json":
        handler.setFormatter(JsonFormatter(process_name()))
    else:
        handler.setFormatter(LineFormatter(TEXT_FORMAT))
    # Their texts may come from a job: none of them is written as it is.
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    sys.unraisablehook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    threading.excepthook = lambda args: _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    logging.basicConfig(level=max(threshold, logging.INFO), handlers=[handler])
    logging.getLogger("gradcam").setLevel(threshold)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: Any) -> None:
    """Log an uncaught exception as one line, as everything else."""
    if not issubclass(kind, KeyboardInterrupt | SystemExit):
        log.critical("uncaught_exception", exception=(error or kind()).with_traceback(traceback))


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except Exception:  # noqa: BLE001  # arguments that do not fit: logging would print many lines, and secrets
        text = f"{safe_str(record.msg)} {safe_str(record.args)}"
    return redacted(text)


def _event_fields(record: logging.LogRecord) -> dict[str, object]:
    """The name and the fields of an event; empty for other records."""
    if not isinstance(record.msg, EventMessage):
        return {}
    return {"event": record.msg.event, **_json_fields(record.msg.fields)}


def _json_fields(fields: Mapping[str, object]) -> dict[str, object]:
    """Fields as values of JSON, without secrets."""
    values = EventMessage("", fields).values()
    return {name: redacted(value) if isinstance(value, str) else value for name, value in values.items()}


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _escape_surrogates(value: Any) -> Any:
    """Replace lone surrogates, which strict JSON readers refuse, by their escapes."""
    if isinstance(value, dict):
        return {name: _escape_surrogates(inner) for name, inner in value.items()}
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _indented(text: str) -> str:
    return "\n".join(INDENT + visible(redacted(line)) for line in text.splitlines())
