"""Text from strangers, made fit for a log and for a terminal: one line, in which nothing acts or hides.

A newline in an image's name must not begin a line of the log that nobody wrote, an escape sequence must not
reach a terminal, and signs that turn the direction of writing must not make one name look like another.
"""

import logging
from typing import Any

from worker.url import redacted

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
BELOW = "    "  # before each line that belongs to the one above it: no line of its own begins so


def visible(text: str) -> str:
    r"""Text in which all that does not print is written as Python writes it: `\n`, `\x1b`, `\u202e`."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def counted(number: int, one: str, more: str | None = None) -> str:
    """So many of something, for a person: 1 shard, 2 shards; 1 shard is, 2 shards are."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


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
