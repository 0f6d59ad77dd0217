"""Searchable log lines: the name of an event, then its fields as key=value.

    log = EventLogger("gradcam")
    log.warning("job_retry_scheduled", delay_s=1.5, error=error)

writes `job_retry_scheduled delay_s=1.5 error="The image cannot be fetched."` as text, and as JSON an object
with `event` and each field beside `message`. The names are listed in docs/reference/log-events.md.
"""

import json
import logging
import math
import re
import time
from collections.abc import Mapping

from gradcam_worker.text.visible import visible

MAX_INTEGER = 2**63  # many readers of JSON have 64 bits
UNQUOTED = re.compile(r"[^\s\"'=\\]+")  # values that need no quotes


class EventMessage:
    """The `msg` of a log record: an event and its fields. It becomes text only when a handler writes it."""

    def __init__(self, event: str, fields: Mapping[str, object]) -> None:
        """Take the event's name and its fields; those that are None are left out."""
        self.event = event
        self.fields = {name: value for name, value in fields.items() if value is not None}

    def __str__(self) -> str:
        """Return the line: `event key=value`."""
        return " ".join(
            [self.event, *(f"{name}={_field_text(value)}" for name, value in self.fields.items())]
        )

    def values(self) -> dict[str, object]:
        """Return the fields for JSON: booleans and the numbers of JSON unchanged, everything else as text."""
        return {
            name: value if _is_json_number(value) else _text(value) for name, value in self.fields.items()
        }


class RateLimitedCount:
    """Counts events that are logged at most once per interval."""

    def __init__(self, interval_s: float) -> None:
        """The first event is logged at once."""
        self.interval_s, self._count, self._logged_s = interval_s, 0, -math.inf

    def __call__(self) -> int:
        """Count one event.

        Returns:
            How many events are to be logged now: this one and those since the last log line; 0: none yet.
        """
        self._count += 1
        now_s = time.monotonic()
        if now_s - self._logged_s < self.interval_s:
            return 0
        count, self._count, self._logged_s = self._count, 0, now_s
        return count


class EventLogger:
    """Logs events through a standard logger: a name and fields instead of a sentence."""

    def __init__(self, name: str) -> None:
        """`name` of the standard logger."""
        self._logger = logging.getLogger(name)

    def debug(self, event: str, /, **fields: object) -> None:
        """A detail that helps to find a fault."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: object) -> None:
        """Something went as expected."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: object) -> None:
        """Something failed, and the process handles it."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: object) -> None:
        """Something is lost, or an operator has to act."""
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: object) -> None:
        """An unexpected error, logged with its traceback; to be called in its `except` block."""
        self._log(logging.ERROR, event, fields, exc_info=True)

    def critical(self, event: str, /, *, exception: BaseException, **fields: object) -> None:
        """An error ended a thread or the process; logged with its traceback."""
        self._log(logging.CRITICAL, event, fields, exc_info=exception)

    def _log(
        self, level: int, event: str, fields: Mapping[str, object], *, exc_info: bool | BaseException = False
    ) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, EventMessage(event, fields), exc_info=exc_info, stacklevel=3)


def safe_str(value: object) -> str:
    """Return `str(value)`, also of a value whose `str` raises: a line about an error must not be lost."""
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001  # a class of anybody's
        return f"<{type(value).__name__}: its str() raises {type(error).__name__}>"


def _field_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = _text(value)
    # Visible here, too: a program that does not configure its logs writes the line as it is.
    return visible(text if UNQUOTED.fullmatch(text) else json.dumps(text, ensure_ascii=False))


def _is_json_number(value: object) -> bool:
    """Whether every reader of JSON takes the value as it is: JSON has no NaN."""
    if isinstance(value, int):  # or bool
        return abs(value) < MAX_INTEGER
    return isinstance(value, float) and math.isfinite(value)


def _text(value: object) -> str:
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(map(_text, value))
    text = safe_str(value)
    return text or type(value).__name__ if isinstance(value, BaseException) else text
