"""The page: what is measured, how to run it, what is required and what was found."""

import textwrap
from collections.abc import Iterator, Mapping

from devtools.docs.performance_figures import Figures, Target, table
from devtools.docs.performance_sections import SECTIONS, Section

WIDTH = 110  # characters of a line
INTRODUCTION = """\
# Performance

A GPU hour is the price of this service. So an explanation should cost no more than the prediction that it
explains, and the device should never wait for a decoder, a socket or an object store. This page says how near
to that we are. It is made by a program from what the benches print; run them on your machine:

    scripts/bench engine            # a bench; the others: {others}
    scripts/bench engine --quick    # a first look
    scripts/bench engine --json     # for machines
    scripts/performance --measure   # all of them, {minutes}then this page again

Machines differ and are shared. So every figure that counts is a ratio within one run: what is compared takes
turns, and medians of the turns are divided. CPU time stands beside wall time, since what else a machine does
falls on the latter alone.

## At a glance
"""


def page(found: Mapping[str, Figures], remarks: Mapping[str, str], plots: str) -> str:
    """The whole page in Markdown; `plots`: where they lie, seen from the page. Raises Hole."""
    took = sum(figures.number("took_s") for figures in found.values() if "took_s" in figures.data)
    lines = [
        INTRODUCTION.format(
            others=", ".join(name for name in SECTIONS if name != "engine"),
            minutes=f"about {took / 60:.0f} minutes, " if took else "",
        ),
        *_glance(found),
    ]
    for name, section in SECTIONS.items():
        lines += _section(name, section, found.get(name), remarks.get(name, ""), plots)
    return "\n".join(lines).rstrip() + "\n"


def _glance(found: Mapping[str, Figures]) -> Iterator[str]:
    """All that is required."""
    rows = []
    for name, section in SECTIONS.items():
        if name in found:
            link = f"[{section.title}](#{section.title.lower().replace(' ', '-')})"
            rows += [(link, *_cells(target)) for target in section.targets(found[name])]
    yield from table(("", "what", "required", "found", ""), rows)
    unmet = sum(row[-1] == MISSED for row in rows)
    yield (
        f"Required: {len(rows)}; reached: {len(rows) - unmet}." if rows else "Nothing has been measured yet."
    )
    yield ""


MISSED = "**missed**"


def _cells(target: Target) -> tuple[str, ...]:
    return target.what, target.required, target.found, "met" if target.met else MISSED


def _section(name: str, section: Section, figures: Figures | None, remarks: str, plots: str) -> Iterator[str]:
    yield from (f"## {section.title}", "", *textwrap.wrap(section.about, WIDTH), "")
    yield from (f"    scripts/bench {name}", "")
    if figures is None:
        yield from (section.absent, "")
        return
    for file, shows in section.plots.items():
        yield from (f"![{shows}]({plots}/{file})", "")
    yield from section.tables(figures)
    if remarks:
        yield from (remarks, "")
    yield from (*textwrap.wrap(_ran(figures), WIDTH), "")


def _ran(figures: Figures) -> str:
    """What it ran on, and with."""
    if "machine" not in figures.data:  # made of others, each with its own
        figures = figures.part("engine")
    machine = figures.at("machine")
    versions = ", ".join(f"{name} {number}" for name, number in figures.at("versions").items())
    return (
        f"*Measured on {machine['cpu_count']} cores of {machine['cpu_model']}, device: {machine['device']}; "
        f"{machine['load_before']} processes wanted to run beforehand. {versions}. "
        f"It took {figures.number('took_s'):.0f} s.*"
    )
