"""Runs a bench and judges what it found."""

import contextlib
import sys
import time
from importlib import import_module
from typing import Any, cast

from devtools.bench.report import Bench, machine, versions

BENCHES = ("engine", "peers", "host", "service", "latency", "memory", "backfill", "scale", "submit", "gpu")


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
