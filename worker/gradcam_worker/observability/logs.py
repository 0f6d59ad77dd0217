"""How a process says what it does: a line for a person, or a JSON object for whoever collects logs.

What is said while a job runs carries the job's id, whoever says it: the fields are bound to the context, and
the pools of threads that work for a job (`WaitingPool`) take the context along.
"""

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
from gradcam_worker.text.log_events import EventMessage
from gradcam_worker.text.urls import redacted
from gradcam_worker.text.visible import visible

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger("gradcam")

_bound: ContextVar[Mapping[str, object]] = ContextVar("gradcam_log_fields", default={})  # noqa: B039  # never changed


@contextmanager
def about(**fields: object) -> Iterator[None]:
    """Within it, each JSON line of this thread, and of the pools that work for it, has these fields; not
    those that are None.
    """
    more = {name: value for name, value in fields.items() if value is not None}
    token = _bound.set({**_bound.get(), **more})
    try:
        yield
    finally:
        _bound.reset(token)


class Pool(ThreadPoolExecutor):
    """Threads that work in the context of whoever asks them to."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """See `ThreadPoolExecutor.submit`."""
        return super().submit(partial(copy_context().run, fn, *args, **kwargs))


class JsonFormatter(logging.Formatter):
    r"""One JSON object a line, in ASCII: what would act on a terminal or begin a line is an escape in it.

    time (RFC 3339, UTC), level, logger, message, event and its fields where it is one of ours, job_id,
    attempt and trace_id where a job is spoken of, worker (host:pid), and exception (type, message, stack)
    where there is one.
    """

    def __init__(self, worker: str) -> None:
        """`worker` is who speaks."""
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        said: dict[str, object] = {
            "time": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _said(record),
            **_bound.get(),
            "worker": self._worker,
        }
        said = {**said, **_event(record), **said}  # no field takes the place of one of these
        if record.exc_info and record.exc_info[0]:
            kind, error, _ = record.exc_info
            stack = redacted(super().formatException(record.exc_info))
            said["exception"] = {"type": kind.__name__, "message": redacted(str(error)), "stack": stack}
        if record.stack_info:
            said["stack"] = record.stack_info
        return json.dumps(_whole(said), default=str)


def _said(record: logging.LogRecord) -> str:
    try:
        return redacted(record.getMessage())
    except Exception:  # noqa: BLE001  # a library's own mistake: logging would print it, in many lines
        return f"{record.msg} {record.args}"


def _event(record: logging.LogRecord) -> dict[str, object]:
    """The name and the fields of an event, beside the message that has them as text."""
    if not isinstance(record.msg, EventMessage):
        return {}
    values = record.msg.values()
    fields = {name: redacted(one) if isinstance(one, str) else one for name, one in values.items()}
    return {"event": record.msg.event, **fields}


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _whole(value: Any) -> Any:
    """Half a character is no text to a strict reader: it is written out."""
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def log_lines(form: str, level: str) -> None:
    """Log to standard error from here on: `form` is text or json, `level` debug, info, warning or error.

    Debug is for our own lines: what libraries say there may hold a secret.
    """
    handler = logging.StreamHandler()
    least = logging.getLevelNamesMapping()[level.upper()]
    if form == "json":
        handler.setFormatter(JsonFormatter(process_name()))
        logging.captureWarnings(capture=True)
        sys.excepthook = _died
        sys.unraisablehook = lambda it: _died(it.exc_type, it.exc_value, it.exc_traceback)
        threading.excepthook = lambda died: _died(died.exc_type, died.exc_value, died.exc_traceback)
    else:
        handler.setFormatter(LineFormatter(FORMAT))
    logging.basicConfig(level=max(least, logging.INFO), handlers=[handler])
    log.setLevel(least)


def _died(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
    """What nobody caught, as a line like all others."""
    if not issubclass(kind, KeyboardInterrupt | SystemExit):
        log.critical("nobody caught what was raised", exc_info=(kind, error or kind(), trace))


FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


BELOW = "    "  # before each line that belongs to the one above it: no line of its own begins so


class LineFormatter(logging.Formatter):
    """One line for each message, and tracebacks below it, set in."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the name is the library's
        """The line itself."""
        line = super().formatMessage(record)
        if isinstance(record.msg, EventMessage):  # a sentence of a library stays as it is
            bound = {name: one for name, one in _bound.get().items() if name not in record.msg.fields}
            line += str(EventMessage("", bound))
        return visible(redacted(line))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """A traceback, whose last lines hold what the error said."""
        return _set_in(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """A stack, where one was asked for."""
        return _set_in(super().formatStack(stack_info))


def _set_in(text: str) -> str:
    return "\n".join(BELOW + visible(redacted(one)) for one in text.splitlines())
