"""Writes docs/explanation/performance.md: `scripts/performance [--measure [NAME ...]]`.

What it says comes from the benches' own documents, NAME.json in docs/explanation/performance; remarks on a
bench, where there are any, from NAME.md there, and settled.md has what is measured no more. `--measure` first
runs the benches that are named, or all, one after the other: leave the machine alone meanwhile.
"""

import argparse
import inspect
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from devtools import ROOT
from devtools.bench.report import BENCHES, NothingToMeasure, load, ran_on, run, table

DOCS = ROOT / "docs" / "explanation"
FOLDER = "performance"  # in docs/explanation
ON_PAGE = tuple(name for name in BENCHES if name not in {"scale", "submit"})
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


class Incomplete(LookupError):
    """A document lacks what the page needs; the message names the file and the place."""


def measure(name: str, folder: Path) -> None:
    """Run one bench, all of it, and keep its document; where there is nothing to measure, say so."""
    print(f"Measuring: {name} ...", flush=True)
    try:
        found = run(name, quick=False)
    except NothingToMeasure as error:
        print(error)
        return
    print(f"  {found['took_s']:.0f} s; {'passed' if found['passed'] else 'MISSED'}")
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def write(docs: Path) -> None:
    """The page, from what lies below `docs`. Raises Incomplete; then nothing is written."""
    folder = docs / FOLDER
    found = {name: _read(folder / f"{name}.json") for name in ON_PAGE if (folder / f"{name}.json").is_file()}
    took_s = sum(one.get("took_s", 0.0) for one in found.values())
    lines = [
        INTRODUCTION.format(
            others=", ".join(name for name in BENCHES if name != "engine"),
            minutes=f"about {took_s / 60:.0f} minutes, " if took_s else "",
        )
    ]
    try:
        name, rows = "", list[tuple[str, ...]]()
        for name, figures in found.items():
            rows += _glance(name, figures)
        lines += (
            table(("", "what", "required", "found", ""), rows) if rows else ["Nothing was measured yet.", ""]
        )
        missed = sum(row[-1] != "met" for row in rows)
        lines += [f"Required: {len(rows)}; reached: {len(rows) - missed}.", ""]
        for name in ON_PAGE:
            lines += _section(name, found.get(name), folder)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        message = f"{folder / name}.json is not what the page needs ({error!r}). Measure it again: "
        raise Incomplete(message + f"scripts/performance --measure {name}") from error
    settled = folder / "settled.md"
    if settled.is_file():
        lines += [settled.read_text(encoding="utf-8")]
    (docs / "performance.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _glance(name: str, found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    bench = load(name)
    link = f"[{bench.TITLE}](#{bench.TITLE.lower().replace(' ', '-')})"
    for one in bench.requirements(found):
        yield link, one.what, one.required, one.found, "met" if one.met else "**missed**"


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{path} is no JSON document: {error}"
        raise Incomplete(message) from error
    if not isinstance(data, dict):
        message = f"{path} holds a {type(data).__name__}, not the document of a bench."
        raise Incomplete(message)
    return data


def _section(name: str, found: dict[str, Any] | None, folder: Path) -> Iterator[str]:
    bench, remarks = load(name), folder / f"{name}.md"
    yield from (f"## {bench.TITLE}", "", inspect.getdoc(bench) or "", "", f"    scripts/bench {name}", "")
    if found is None:
        yield from ("It has not been run on a machine that has what it needs.", "")
        return
    yield from bench.tables(found)
    if remarks.is_file():
        yield from (remarks.read_text(encoding="utf-8").strip(), "")
    on = found if "machine" in found else found["engine"]
    yield from (*textwrap.wrap(ran_on(on), 110), "")


def main() -> int:
    """Measure where asked to, then write."""
    parser = argparse.ArgumentParser(
        prog="scripts/performance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--measure", nargs="*", metavar="NAME", help=f"of {', '.join(ON_PAGE)}")
    asked = parser.parse_args()
    names = list(ON_PAGE) if asked.measure == [] else asked.measure or []
    if unknown := set(names) - set(ON_PAGE):
        parser.error(f"there is no bench {', '.join(sorted(unknown))}; there are {', '.join(ON_PAGE)}.")
    for name in names:
        measure(name, DOCS / FOLDER)
    try:
        write(DOCS)
    except Incomplete as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
