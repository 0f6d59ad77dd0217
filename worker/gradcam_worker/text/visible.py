"""Text from strangers, made fit for a log and for a terminal: one line, in which nothing acts or hides.

A newline in an image's name must not begin a line of the log that nobody wrote, an escape sequence must not
reach a terminal, and signs that turn the direction of writing must not make one name look like another.
"""

import re

COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, in which libraries dress what they say
LEFT_OUT = " [...] "


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
