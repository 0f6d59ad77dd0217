"""A bench's document, looked at with care; and how its figures are written."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURE = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?%?( \(\d+ KB\))?$")


class Hole(LookupError):
    """A document lacks what the page needs; the message names the file and the place."""


@dataclass(frozen=True)
class Figures:
    """One bench's document."""

    path: Path
    data: dict[str, Any]

    def at(self, *keys: str | int) -> Any:
        """What stands there. Raises Hole."""
        value: Any = self.data
        for depth, key in enumerate(keys):
            try:
                value = value[key if isinstance(value, list) else str(key)]
            except (KeyError, IndexError, TypeError):
                place = " > ".join(map(str, keys[: depth + 1]))
                again = f"scripts/performance --measure {self.path.stem}"
                message = f"{self.path} has no {place}. Measure it again: {again}"
                raise Hole(message) from None
        return value

    def number(self, *keys: str | int) -> float:
        """The number that stands there. Raises Hole."""
        value = self.at(*keys)
        if isinstance(value, bool) or not isinstance(value, int | float):
            message = f"{self.path} has {value!r} at {' > '.join(map(str, keys))}, where a number belongs."
            raise Hole(message)
        return value

    def part(self, name: str) -> "Figures":
        """A document within the document. Raises Hole."""
        return Figures(self.path, self.at(name))


def read(path: Path) -> Figures | None:
    """A document, where there is one. Raises Hole where it is no document."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{path} is no JSON document: {error}"
        raise Hole(message) from error
    if not isinstance(data, dict):
        message = f"{path} holds a {type(data).__name__}, where a document belongs."
        raise Hole(message)
    return Figures(path, data)


@dataclass(frozen=True)
class Target:
    """Something that is required, and what was found."""

    what: str
    required: str
    found: str
    met: bool


def at_least(what: str, least: float, found: float, unit: str = "") -> Target:
    """More is better."""
    return Target(what, f"at least {plain(least)}{unit}", f"{plain(found)}{unit}", found >= least)


def at_most(what: str, most: float, found: float, unit: str = "") -> Target:
    """Less is better."""
    return Target(what, f"at most {plain(most)}{unit}", f"{plain(found)}{unit}", found <= most)


def plain(value: float) -> str:
    """A figure with as many digits as it deserves: 0.07, 0.95, 12.3, 281."""
    places = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0  # noqa: PLR2004
    return f"{value:.{places}f}"


def tiny(value: float) -> str:
    """A difference, as a power of ten."""
    return f"{value:.0e}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown; columns of figures stand right."""
    rows = [*rows]
    columns = [[row[place] for row in rows if row[place]] for place in range(len(headings))]
    figures = [bool(column) and all(map(FIGURE.match, column)) for column in columns]
    yield f"| {' | '.join(headings)} |"
    yield "".join(["|", *("---:|" if right else "---|" for right in figures)])
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
