"""Writes docs/explanation/performance.md and its plots: `scripts/performance [--measure [NAME ...]]`.

What it says comes from the benches' own documents, NAME.json in docs/explanation/performance; remarks on a
bench, where there are any, from NAME.md there. `--measure` first runs the benches that are named, or all, one
after the other, and keeps what they print: leave the machine alone meanwhile. The same documents give the
same page and, with the same version of matplotlib, the same plots.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from devtools import IMPORT_PATH, ROOT, command
from devtools.docs.performance_figures import Hole, read
from devtools.docs.performance_page import page
from devtools.docs.performance_plots import draw
from devtools.docs.performance_sections import SECTIONS

DOCS = ROOT / "docs" / "explanation"
FOLDER = "performance"  # in docs/explanation: documents, remarks and plots
BENCH = command("bench")


def measure(name: str, folder: Path) -> None:
    """Run one bench, all of it, and keep its document. Where it measures nothing, say what it says."""
    print(f"Measuring: {name} ...", flush=True)
    done = subprocess.run(
        [*BENCH, name, "--json"],
        env={**os.environ, **IMPORT_PATH},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    try:
        document = json.loads(done.stdout)
    except ValueError:
        sys.exit(f"scripts/bench {name} ended with {done.returncode} and without a document: see above.")
    if "why" in document:
        print(document["why"])
        return
    print(f"  {document.get('took_s', 0):.0f} s; {'passed' if done.returncode == 0 else 'MISSED'}")
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write(docs: Path) -> None:
    """The page and its plots, from the documents below `docs`. Raises Hole; then nothing is written."""
    folder = docs / FOLDER
    found = {name: figures for name in SECTIONS if (figures := read(folder / f"{name}.json"))}
    remarks = {name: _remarks(folder / f"{name}.md") for name in SECTIONS}
    text = page(found, remarks, FOLDER)
    with tempfile.TemporaryDirectory() as drawn:
        draw(found, Path(drawn))
        for plot in Path(drawn).iterdir():
            (folder / plot.name).write_bytes(plot.read_bytes())
    (docs / "performance.md").write_text(text, encoding="utf-8")


def _remarks(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def main() -> int:
    """Measure where asked to, then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--measure", nargs="*", metavar="NAME", help=f"of {', '.join(SECTIONS)}")
    asked = parser.parse_args()
    names = list(SECTIONS) if asked.measure == [] else asked.measure or []
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"there is no bench {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}.")
    for name in names:
        measure(name, DOCS / FOLDER)
    try:
        write(DOCS)
    except Hole as hole:
        print(hole, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
