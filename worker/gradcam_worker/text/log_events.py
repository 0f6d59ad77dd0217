"""Log lines that can be searched for: the name of an event, then its fields as key=value.

    log = EventLogger("gradcam")
    log.warning("job_retry_scheduled", delay_s=1.5, error=error)

writes `job_retry_scheduled delay_s=1.5 error="The image cannot be fetched."` as text, and as JSON an object
with `event` and each field beside `message`. The names are listed in docs/reference/log-events.md.
"""

import json
import logging
import re
from collections.abc import Mapping

BARE = re.compile(r"[^\s\"'=\\]+")  # what needs no quotes


class EventMessage:
    """What a log record has for a message: the event and its fields, written when the record is."""

    def __init__(self, event: str, fields: Mapping[str, object]) -> None:
        """Fields that are None are left out."""
        self.event = event
        self.fields = {name: value for name, value in fields.items() if value is not None}

    def __str__(self) -> str:
        """The line: `event key=value`."""
        return " ".join([self.event, *(f"{name}={_written(value)}" for name, value in self.fields.items())])

    def values(self) -> dict[str, object]:
        """The fields as JSON has them: numbers as numbers, everything else as text."""
        return {
            name: value if isinstance(value, bool | int | float) else _text(value)
            for name, value in self.fields.items()
        }


class EventLogger:
    """A standard logger that is given an event's name and its fields instead of a sentence."""

    def __init__(self, name: str) -> None:
        """`name` of the standard logger below it."""
        self._logger = logging.getLogger(name)

    def debug(self, event: str, /, **fields: object) -> None:
        """For whoever looks for a fault."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        """Something went as it should."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        """Something went wrong, and the process deals with it."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        """Something is lost, or somebody has to act."""
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: object) -> None:
        """An error that nobody foresaw, with its traceback; to be called where it is handled."""
        self._log(logging.ERROR, event, fields, exc_info=True)

    def _log(self, level: int, event: str, fields: Mapping[str, object], *, exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, EventMessage(event, fields), exc_info=exc_info, stacklevel=3)


def _written(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = _text(value)
    return text if BARE.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _text(value: object) -> str:
    if isinstance(value, BaseException):
        return str(value) or type(value).__name__
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(map(_text, value))
    return str(value)
