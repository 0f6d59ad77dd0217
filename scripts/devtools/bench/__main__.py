"""Benchmarks: `scripts/bench NAME [--quick] [--json]`. Exit code 1: what is required is missed."""

import argparse
import sys
from importlib import import_module

BENCHES = (
    "engine",
    "peers",
    "host",
    "service",
    "latency",
    "memory",
    "gpu",
    "threads",
    "backfill",
    "submit",
    "telemetry",
    "scale",
)  # each a module of this package, with `main(*, quick, as_json)`

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("bench", choices=BENCHES)
parser.add_argument("--quick", action="store_true", help="a first look: fewer repeats, fewer cases")
parser.add_argument("--json", action="store_true", help="one JSON document on stdout, nothing else")
asked = parser.parse_args()
sys.exit(import_module(f"devtools.bench.{asked.bench}").main(quick=asked.quick, as_json=asked.json))
