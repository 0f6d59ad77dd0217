"""Text from strangers, made fit for a log and for a terminal: one line, in which nothing acts or hides.

A newline in an image's name must not begin a line of the log that nobody wrote, an escape sequence must not
reach a terminal, and signs that turn the direction of writing must not make one name look like another.
"""

import logging
import re
from typing import Any

from gradcam_worker.text.urls import redacted

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, in which libraries dress what they say
LEFT_OUT = " [...] "
BELOW = "    "  # before each line that belongs to the one above it: no line of its own begins so


def visible(text: str) -> str:
    r"""Text in which all that does not print is written as Python writes it: `\n`, `\x1b`, `\u202e`."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def counted(number: int, one: str, more: str | None = None) -> str:
    """So many of something, for a person: 1 shard, 2 shards; 1 shard is, 2 shards are."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def abridged(text: str, most: int = 600) -> str:
    """Text on one line; where it is longer, its beginning and its end, which is where a cause is told."""
    text = " ".join(COLOURS.sub("", text).split())
    if len(text) <= most:
        return text
    head = (most - len(LEFT_OUT)) // 2
    return text[:head] + LEFT_OUT + text[len(text) - (most - head - len(LEFT_OUT)) :]


class LineFormatter(logging.Formatter):
    """One line for each message, and tracebacks below it, set in."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the name is the library's
        """The line itself."""
        return visible(redacted(super().formatMessage(record)))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        """A traceback, whose last lines hold what the error said."""
        return _set_in(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        """A stack, where one was asked for."""
        return _set_in(super().formatStack(stack_info))


def _set_in(text: str) -> str:
    return "\n".join(BELOW + visible(redacted(one)) for one in text.splitlines())
