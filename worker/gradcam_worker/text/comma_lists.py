"""Lists that are written with commas: on a command line, and in settings.

A name that holds a comma stands in double quotes, and a quote in it is written twice, as in CSV.
"""

import csv
import io
from collections.abc import Iterable

QUOTED = "a name that holds a comma stands in double quotes, as in '\"crane, bird\",pier'"


def parse(text: str) -> tuple[str, ...]:
    """`a, "b, c"` -> a and `b, c`; what is empty is left out. Raises ValueError with a sentence."""
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True))
    except csv.Error as error:
        message = f"it is no list with commas ({error}): {QUOTED}"
        raise ValueError(message) from error
    return tuple(part.strip() for row in rows for part in row if part.strip())


def join(values: Iterable[str]) -> str:
    """The list that `parse` reads again."""
    made = io.StringIO()
    csv.writer(made, lineterminator="").writerow(values)
    return made.getvalue()
