"""How far our numbers are from the same by other ways: `scripts/agreement [SECTION ...] [--json] [--write]`.

Each section is a table of differences and shares, none of times. `--write` makes
docs/explanation/agreement.md again, for
which all are needed: some minutes. Whether they are small enough is for the tests to say, in tests/gradcam.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec

from devtools import ROOT
from devtools.agreement.comparisons import SECTIONS, Table

# isort: split
# Only now: the line above keeps TensorFlow quiet while it is loaded for the first time.
import keras

DOCUMENT = ROOT / "docs" / "explanation" / "agreement.md"
WIDTH = 110  # characters of a line
SMALL = 1e-2  # figures below are written as powers of ten
PACKAGES = ("keras", "tensorflow", "jax", "torch", "numpy")
INTRODUCTION = """\
# Agreement

How far our numbers are from the same by other ways. Each section is a table of differences and shares, none
of times; whether they are small enough is for the tests to say, in `tests/gradcam`.

    scripts/agreement            # some minutes
    scripts/agreement tape batch # some sections alone
    scripts/agreement --write    # makes this file again
    scripts/agreement --json     # for machines
"""


def written(value: str | float) -> str:
    """A cell."""
    if isinstance(value, str | int):
        return str(value)
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < SMALL else f"{value:.3f}"


def markdown(table: Table) -> Iterator[str]:
    """A section of the document, line by line."""
    yield from (f"## {table.title}", "", *textwrap.wrap(table.about, WIDTH), "")
    yield f"| {' | '.join(table.headings)} |"
    yield "|" + "---|" * len(table.headings)
    yield from (f"| {' | '.join(map(written, row))} |" for row in table.rows)
    yield ""


def versions() -> dict[str, str]:
    """What computed them."""
    return {name: version(name) for name in PACKAGES if find_spec(name)}


def main() -> int:
    """Measure the sections that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}: needs all sections")
    asked = parser.parse_args()
    if unknown := set(asked.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}.")
    if asked.write and asked.sections:
        parser.error("--write takes no sections: the document has them all.")
    tables = {}
    for name in asked.sections or SECTIONS:
        tables[name] = SECTIONS[name]()
        keras.utils.clear_session()
        if not asked.json:
            print("\n".join(markdown(tables[name])), flush=True)
    if asked.json:
        figures = {name: asdict(table) for name, table in tables.items()}
        print(json.dumps({"versions": versions(), "sections": figures}, indent=2))
    if asked.write:
        made = ", ".join(f"{name} {number}" for name, number in versions().items())
        lines = [line for table in tables.values() for line in markdown(table)]
        DOCUMENT.write_text("\n".join([INTRODUCTION, f"Made with {made}.", "", *lines]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
