"""Lists that are separated by commas, on the command line and in settings.

As in CSV, an item with a comma is written in double quotes, and a quote in it is doubled.
"""

import csv
import io
from collections.abc import Iterable

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
    """Return the text that `parse` reads as these values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow(values)  # it quotes the line breaks that it knows
    return text.getvalue().removesuffix("\r\n")
