"""Attacks what the worker promises: `scripts/faults [--short | --full] [--json] [--seed N] [attack ...]`.

Each attack is a module of this package, with `attack(count, seed) -> Verdict`. The same seed makes the
same attack. Exit code 1: a promise broke.
"""

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.table import Table

from devtools.faults.verdict import PROMISES, Verdict


@dataclass(frozen=True)
class Attack:
    """How much of it the short and the full form are."""

    short: int
    full: int
    unit: str


ATTACKS = {
    "kill": Attack(8, 200, "kills"),
    "recovery": Attack(1, 4, "kills, with the default settings"),
    "poison": Attack(30, 100, "healthy jobs"),
    "failover": Attack(2, 5, "failovers"),
    "servers": Attack(1, 15, "seconds of each fault"),
    "images": Attack(400, 4000, "mutated images"),
    "addresses": Attack(1, 3, "times each trick"),
    "messages": Attack(200, 2000, "messages"),
    "status": Attack(100, 1000, "jobs"),
    "stale": Attack(8, 200, "jobs of ids that were used before"),
    "soak": Attack(15, 300, "seconds"),
}
WIDTH = 130  # characters that the table needs; what is no terminal has as many
KEYS = ("jobs", "faults", *PROMISES, "recovery_s_max")


def run(name: str, count: int, seed: int) -> dict[str, Any]:
    """Run one attack; one that cannot be run has broken a promise, too."""
    begun = time.monotonic()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
            verdict: Verdict = import_module(f"devtools.faults.{name}").attack(count, seed)
    except Exception:  # noqa: BLE001  # the other attacks are made all the same
        verdict = Verdict(broken=[f"The attack did not finish: {traceback.format_exc()}"])
    verdict.figures |= {"seed": seed, "count": count}
    took = {"seconds": round(time.monotonic() - begun, 1)}
    return {"attack": name, "kept": verdict.kept, **verdict.to_dict(), **took}


def show(found: Iterable[dict[str, Any]]) -> None:
    """A line for each attack, and a sentence for each promise that broke."""
    found, console = list(found), Console()
    console.width = max(console.width, WIDTH)
    table = Table("attack", *(key.replace("_", " ") for key in KEYS), "seconds", "kept")
    for one in found:
        cells = [f"{one[key]:g}" for key in (*KEYS, "seconds")]
        table.add_row(
            one["attack"], *cells, "yes" if one["kept"] else "NO", style=None if one["kept"] else "red"
        )
    console.print(table)
    for one in found:
        for sentence in one["broken"]:
            console.print(f"{one['attack']}: {sentence}", markup=False)


def main(arguments: list[str] | None = None) -> int:
    """Make the attacks that are named, or all; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", metavar="attack", help=f"{', '.join(ATTACKS)}; none: all")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--short", action="store_true", help="what CI has time for: about three minutes (default)"
    )
    size.add_argument("--full", action="store_true", help="about half an hour")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.add_argument("--seed", type=int, default=0, help="of all that is left to chance")
    parser.add_argument("--count", type=int, help="another size, for the attacks that are named")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.attacks if name not in ATTACKS]
    if unknown:
        parser.error(f"there is no attack {', '.join(unknown)}; there are {', '.join(ATTACKS)}")
    found = []
    for name in asked.attacks or ATTACKS:
        count = asked.count or (ATTACKS[name].full if asked.full else ATTACKS[name].short)
        print(f"{name}: {count} {ATTACKS[name].unit} ...", file=sys.stderr, flush=True)
        found.append(run(name, count, asked.seed))
    if asked.json:
        print(json.dumps({"full": asked.full, "seed": asked.seed, "attacks": found}, indent=1))
    else:
        show(found)
    return 0 if all(one["kept"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
