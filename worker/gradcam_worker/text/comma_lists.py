"""Lists that are separated by commas, on the command line and in settings.

As in CSV, an item with a comma is written in double quotes, and a quote in it is doubled.
"""

import csv
import io
from collections.abc import Iterable
from typing import Literal

QUOTED = "a name that holds a comma stands in double quotes, as in '\"crane, bird\",pier'"


def parse(text: str) -> tuple[str, ...]:
    """Parse `a, "b, c"` into `a` and `b, c`; empty items are left out. Raises ValueError."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True))
    except csv.Error as error:
        message = f"it is no list with commas ({error}): {QUOTED}"
        raise ValueError(message) from error
    return tuple(item.strip() for row in rows for item in row if item.strip())


def join(values: Iterable[str]) -> str:
    """Return the text that `parse` reads as these values. It never looks like a list in JSON."""
    text, values = io.StringIO(), [*values]
    like_json = bool(values) and values[0].startswith("[")
    quoting: Literal[0, 1] = csv.QUOTE_ALL if like_json else csv.QUOTE_MINIMAL
    # The writer quotes the line breaks that it knows.
    csv.writer(text, quoting=quoting, lineterminator="\r\n").writerow(values)
    return text.getvalue().removesuffix("\r\n")
