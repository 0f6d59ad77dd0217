"""Runs a bench; requirements, and figures in Markdown for the terminal and for the pages of docs/."""

import contextlib
import os
import platform
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, cast

BENCHES = (
    "engine",
    "forward",
    "peers",
    "feed",
    "job_cpu",
    "service",
    "latency",
    "fairness",
    "memory",
    "backfill",
    "increments",
    "gateway",
    "async_client",
    "audit",
    "audit_page",
    "lists",
    "gpu",
)
WIDTH = 110  # characters of a line
NUMBER = re.compile(r"[+-]?[\d.,]+(e[+-]?\d+)?%?$")
FIGURES = re.compile(r"^(?:\| .*?^)?\*Measured .*?\*$", re.MULTILINE | re.DOTALL)  # of a section
Figures = Mapping[str, Any]  # a bench's JSON document


@dataclass(frozen=True)
class Requirement:
    """Something that is required, and what was measured."""

    what: str
    required: str
    measured: str
    met: bool

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Its cells in a table."""
        return self.what, self.required, self.measured, "met" if self.met else "**missed**"


class Bench(Protocol):
    """What each module of a bench has."""

    TITLE: str  # of its section in docs/explanation/performance.md
    PACKAGES: Sequence[str]  # whose versions the figures depend on

    def measure(self, *, quick: bool) -> dict[str, Any]:
        """The figures, as a JSON document. `device` in it is the device that was measured."""

    def requirements(self, figures: Figures) -> Iterator[Requirement]:
        """What is required of them."""

    def blocks(self, figures: Figures) -> Iterator[str]:
        """The figures in Markdown: paragraphs and tables."""


class NothingToMeasure(Exception):
    """This machine has not what the bench measures; the message says what that is."""


def by_figure(cases: Mapping[str, Figures]) -> dict[str, dict[str, Any]]:
    """Case -> figure -> value, as figure -> case -> value."""
    names = next(iter(cases.values()))
    return {name: {case: figures[name] for case, figures in cases.items()} for name in names}


def at_least(what: str, least: float, measured: float) -> Requirement:
    """More is better."""
    return Requirement(what, f"at least {plain(least)}", plain(measured), measured >= least)


def at_most(what: str, most: float, measured: float, unit: str) -> Requirement:
    """Less is better."""
    return Requirement(what, f"at most {plain(most)}{unit}", f"{plain(measured)}{unit}", measured <= most)


def plain(value: float) -> str:
    """A figure with two significant digits behind the first one: 0.07, 0.95, 12.3, 281."""
    places = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0  # noqa: PLR2004
    return f"{value:.{places}f}"


def tiny(value: float) -> str:
    """A difference, as a power of ten."""
    return f"{value:.0e}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; columns of figures are aligned right."""
    columns = [*zip(headings, *rows, strict=True)]
    lines: list[list[str]] = []
    for heading, *cells in columns:
        width = max(map(len, (heading, *cells)))
        filled = [cell for cell in cells if cell]
        right = bool(filled) and all(map(NUMBER.match, filled))
        rule = "-" * (width - 1) + ":" if right else "-" * width
        lines.append([cell.rjust(width) if right else cell.ljust(width) for cell in (heading, rule, *cells)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*lines, strict=True))


def write(page: Path, title: str, figures: str) -> None:
    """Replace the figures in one section of a page: its text above them and remarks below them stay.

    Args:
        page: A page in Markdown.
        title: The section's.
        figures: Tables and paragraphs, the last of which is `*Measured ...*`, as in those before.

    Raises:
        LookupError: The page has no such section, or there are no figures in it.
    """
    before, heading, rest = page.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    section, next_heading, after = rest.partition("\n## ")
    section, replaced = FIGURES.subn(lambda _: figures, section, count=1)
    if not replaced:
        message = (
            f"{page} has no section {title!r} with figures, or a paragraph *Measured ...* in their place."
        )
        raise LookupError(message)
    page.write_text(before + heading + section + next_heading + after, encoding="utf-8")


def machine() -> dict[str, Any]:
    """What it runs on, and how busy that is."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text(encoding="utf-8").splitlines() if cpu_info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu_count": os.cpu_count(),
        "cpu_model": names[0] if names else platform.processor() or platform.machine(),
        "device": "cpu",
        "load_before": round(os.getloadavg()[0], 2),  # processes that want to run, last minute
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions that the figures depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def written(packages: Mapping[str, str]) -> str:
    """Versions in a sentence."""
    return ", ".join(f"{name} {number}" for name, number in packages.items())


def measured(how: str) -> str:
    """The paragraph below figures."""
    return textwrap.fill(f"*Measured {how}.*", WIDTH)


def in_markdown(name: str, figures: Figures) -> str:
    """A bench's figures: what was required, all else, and what it ran on."""
    bench, on, with_versions = load(name), figures["machine"], written(figures["versions"])
    rows = [requirement.row for requirement in bench.requirements(figures)]
    verdict = [table(("required", "how much", "measured", ""), rows)] if rows else []
    ran_on = (
        f"on {on['cpu_count']} cores of {on['cpu_model']}, device: {on['device']}; "
        f"{on['load_before']} processes wanted to run beforehand. {with_versions}. "
        f"It took {figures['took_s']:.0f} s"
    )
    return "\n\n".join([*verdict, *bench.blocks(figures), measured(ran_on)])


def load(name: str) -> Bench:
    """The module of a bench."""
    return cast("Bench", import_module(f"devtools.bench.{name}"))


def run(name: str, *, quick: bool) -> dict[str, Any]:
    """All of a bench: its figures, whether what is required was reached, and what it ran on.

    Raises NothingToMeasure.
    """
    bench, about, begun = load(name), machine(), time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
        figures = bench.measure(quick=quick)
    about["device"] = figures.get("device", about["device"])
    figures |= {"quick": quick, "took_s": time.perf_counter() - begun, "machine": about}
    figures.setdefault("versions", versions(bench.PACKAGES))
    missed = [
        f"{requirement.what}: {requirement.measured}, {requirement.required}"
        for requirement in bench.requirements(figures)
        if not requirement.met
    ]
    return {**figures, "missed": missed, "passed": not missed}
