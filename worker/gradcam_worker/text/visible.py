"""Make untrusted text safe for logs and terminals: one line of printable characters.

A newline in an image's name must not forge a log line, an escape sequence must not reach a terminal, and
characters that change the direction of writing must not make one name look like another.
"""

import re

COLOR_CODES = re.compile(r"\x1b\[[0-9;]*m")  # libraries put them into their messages
ELLIPSIS = " [...] "


def visible(text: str) -> str:
    r"""Return the text with unprintable characters escaped as in Python: `\n`, `\x1b`, `\u202e`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun: 1 shard, 2 shards; or with `plural`: 1 shard is, 2 shards are."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def abridged(text: str, limit: int = 600) -> str:
    """Return the text on one line; a longer one with its beginning and its end, where causes are named."""
    text = " ".join(COLOR_CODES.sub("", text).split())
    if len(text) <= limit:
        return text
    head = (limit - len(ELLIPSIS)) // 2
    return text[:head] + ELLIPSIS + text[len(text) - (limit - head - len(ELLIPSIS)) :]


def ending(text: str, limit: int = 400) -> str:
    """Return the text on one line; of a longer one the end, from the beginning of a word on."""
    text = " ".join(COLOR_CODES.sub("", text).split())
    if len(text) <= limit:
        return text
    return f"{ELLIPSIS.strip()} {text[len(text) - limit :].partition(' ')[2]}"
