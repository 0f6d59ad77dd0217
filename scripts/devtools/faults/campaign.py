"""Attacks what the worker promises: `scripts/faults [--short | --full] [--json] [--seed N] [attack ...]`.

Each attack is a module of this package, with `attack(count, seed) -> Verdict`. The same seed makes the
same attack. Exit code 1: a promise broke.
"""

import argparse
import contextlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.table import Table

from devtools.faults.verdict import PROMISES, Verdict
from gradcam_worker.operations.signals import exit_on_sigterm


@dataclass(frozen=True)
class Attack:
    """How much of it the short and the full form are."""

    short: int
    full: int
    unit: str


ATTACKS = {
    "kill": Attack(8, 60, "kills"),
    "engine": Attack(1, 4, "faults of each kind"),
    "recovery": Attack(1, 3, "kills, with the default settings"),
    "failover": Attack(2, 5, "failovers"),
    "sentinel": Attack(1, 2, "faults of each kind, in each of three modes"),
    "servers": Attack(1, 15, "seconds of each fault"),
    "mixed_fleet": Attack(5, 25, "faults in a fleet with each of the earlier releases"),
    "images": Attack(400, 4000, "mutated images"),
    "status": Attack(100, 1000, "jobs"),
    "soak": Attack(15, 300, "seconds"),
}
WIDTH = 130  # characters that the table needs; what is no terminal has as many
KEYS = ("jobs", "faults", *PROMISES, "recovery_s_max", "seconds")


def run(name: str, count: int, seed: int) -> dict[str, Any]:
    """Run one attack; one that cannot be run has broken a promise, too."""
    print(f"{name}: {count} {ATTACKS[name].unit} ...", file=sys.stderr, flush=True)
    begun = time.monotonic()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
            verdict: Verdict = import_module(f"devtools.faults.{name}").attack(count, seed)
    except Exception:  # noqa: BLE001  # the other attacks are made all the same
        verdict = Verdict(broken=[f"The attack did not finish: {traceback.format_exc()}"])
    verdict.figures |= {"seed": seed, "count": count}
    seconds = round(time.monotonic() - begun, 1)
    return {"attack": name, "kept": verdict.kept, **verdict.to_dict(), "seconds": seconds}


def show(results: Sequence[dict[str, Any]]) -> None:
    """A line for each attack, and a sentence for each promise that broke."""
    console = Console()
    console.width = max(console.width, WIDTH)
    table = Table("attack", *(key.replace("_", " ") for key in KEYS), "kept")
    for result in results:
        kept, style = ("yes", None) if result["kept"] else ("NO", "red")
        table.add_row(result["attack"], *(f"{result[key]:g}" for key in KEYS), kept, style=style)
    console.print(table)
    for result in results:
        for sentence in result["broken"]:
            console.print(f"{result['attack']}: {sentence}", markup=False)


def main(arguments: list[str] | None = None) -> int:
    """Make the attacks that are named, or all; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("attacks", nargs="*", metavar="attack", help=f"{', '.join(ATTACKS)}; none: all")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", action="store_true", help="minutes (default)")
    size.add_argument("--full", action="store_true", help="about 40 minutes on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
    parser.add_argument("--seed", type=int, default=0, help="of all that is left to chance")
    parser.add_argument("--count", type=int, help="another size, for the attacks that are named")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.attacks if name not in ATTACKS]
    if unknown:
        parser.error(f"there is no attack {', '.join(unknown)}; there are {', '.join(ATTACKS)}")
    sizes = {name: asked.count or (form.full if asked.full else form.short) for name, form in ATTACKS.items()}
    results = [run(name, sizes[name], asked.seed) for name in asked.attacks or ATTACKS]
    if asked.json:
        print(json.dumps({"full": asked.full, "seed": asked.seed, "attacks": results}, indent=1))
    else:
        show(results)
    return 0 if all(result["kept"] for result in results) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, exit_on_sigterm)  # an attack's servers and workers stop with it
    sys.exit(main())
