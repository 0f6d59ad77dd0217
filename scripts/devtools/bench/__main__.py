"""Benchmarks: `scripts/bench NAME [--quick] [--json]`.

Exit code 1: what is required is missed; 2: there is nothing here to be measured.
"""

import argparse
import json
import sys

from devtools.bench.report import BENCHES, NothingToMeasure, load, ran_on, run, verdict


def main() -> int:
    """Run one bench and print what it found."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--quick", action="store_true", help="a first look: fewer repeats, fewer cases")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    asked = parser.parse_args()
    try:
        found = run(asked.bench, quick=asked.quick)
    except NothingToMeasure as error:
        print(json.dumps({"device": None, "why": str(error)}) if asked.json else error)
        return 2
    if asked.json:
        print(json.dumps(found, indent=2))
    else:
        bench = load(asked.bench)
        print("\n".join([*bench.tables(found), *verdict(bench.requirements(found)), ran_on(found)]))
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
