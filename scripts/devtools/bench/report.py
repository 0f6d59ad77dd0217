"""Runs a bench; what it reports: requirements, and tables in Markdown for terminal and page alike."""

import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

BENCHES = ("engine", "peers", "host", "service", "latency", "memory", "backfill", "scale", "submit", "gpu")
FIGURE = re.compile(r"[+-]?[\d.,]+(e[+-]?\d+)?%?$")
Figures = Mapping[str, Any]  # a bench's JSON document


@dataclass(frozen=True)
class Requirement:
    """Something that is required, and what was found."""

    what: str
    required: str
    found: str
    met: bool


class Bench(Protocol):
    """What each module of a bench has. Its docstring is its section of the page on performance."""

    TITLE: str
    PACKAGES: Sequence[str]  # whose versions the figures depend on

    def measure(self, *, quick: bool) -> dict[str, Any]:
        """The figures, as a JSON document. `device` in it is the device that was measured."""

    def requirements(self, found: Figures) -> Iterator[Requirement]:
        """What is required of them."""

    def tables(self, found: Figures) -> Iterator[str]:
        """The figures in Markdown, line by line."""


def by_figure(cases: Mapping[str, Figures]) -> dict[str, dict[str, Any]]:
    """Case -> figure -> value, as figure -> case -> value."""
    return {key: {case: found[key] for case, found in cases.items()} for key in next(iter(cases.values()))}


class NothingToMeasure(Exception):
    """This machine has not what the bench measures; the message says what that is."""


def at_least(what: str, least: float, found: float, unit: str = "") -> Requirement:
    """More is better."""
    return Requirement(what, f"at least {plain(least)}{unit}", f"{plain(found)}{unit}", found >= least)


def at_most(what: str, most: float, found: float, unit: str = "") -> Requirement:
    """Less is better."""
    return Requirement(what, f"at most {plain(most)}{unit}", f"{plain(found)}{unit}", found <= most)


def plain(value: float) -> str:
    """A figure with two significant digits behind the first one: 0.07, 0.95, 12.3, 281."""
    places = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0  # noqa: PLR2004
    return f"{value:.{places}f}"


def tiny(value: float) -> str:
    """A difference, as a power of ten."""
    return f"{value:.0e}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown; columns of figures are aligned right."""
    rows = [*rows]
    columns = [[row[place] for row in rows if row[place]] for place in range(len(headings))]
    figures = [bool(column) and all(map(FIGURE.match, column)) for column in columns]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, None, *rows):
        cells = row or [
            "-" * (width - right) + ":" * right for width, right in zip(widths, figures, strict=True)
        ]
        lined = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, figures, strict=True)
        )
        yield f"| {' | '.join(lined)} |"
    yield ""


def verdict(requirements: Iterable[Requirement]) -> Iterator[str]:
    """Requirements as a table."""
    rows = [(one.what, one.required, one.found, "met" if one.met else "**missed**") for one in requirements]
    if rows:
        yield from table(("required", "how much", "found", ""), rows)


def machine() -> dict[str, Any]:
    """What it runs on, and how busy that is."""
    return {
        "cpu_count": os.cpu_count(),
        "cpu_model": _cpu_model(),
        "device": "cpu",
        "load_before": round(os.getloadavg()[0], 2),  # processes that want to run, last minute
    }


def _cpu_model() -> str:
    """The processor as the kernel names it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions that the figures depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def ran_on(found: Figures) -> str:
    """What it ran on, and with."""
    on = found["machine"]
    with_versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"*Measured on {on['cpu_count']} cores of {on['cpu_model']}, device: {on['device']}; "
        f"{on['load_before']} processes wanted to run beforehand. {with_versions}. "
        f"It took {found['took_s']:.0f} s.*"
    )


def load(name: str) -> Bench:
    """The module of a bench."""
    return cast("Bench", import_module(f"devtools.bench.{name}"))


def run(name: str, *, quick: bool) -> dict[str, Any]:
    """All of a bench: its figures, whether what is required was reached, and what it ran on.

    Raises NothingToMeasure.
    """
    bench, about, begun = load(name), machine(), time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
        found = bench.measure(quick=quick)
    about["device"] = found.get("device", about["device"])
    found |= {"quick": quick, "took_s": time.perf_counter() - begun, "machine": about}
    found.setdefault("versions", versions(bench.PACKAGES))
    missed = [f"{one.what}: {one.found}, {one.required}" for one in bench.requirements(found) if not one.met]
    return {**found, "missed": missed, "passed": not missed}
