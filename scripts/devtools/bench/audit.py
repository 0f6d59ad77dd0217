"""A million images in 3,907 files of a dataset, two explained classes each, of 1000 classes; labels, boxes of
half of them, two columns of the input: `gradcam audit` in a process of its own, without shortcuts and a page.
Beside it, in the same run, Arrow alone reads every column of the same files. Then the same of a dataset of
the previous version, which has neither labels nor boxes.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from devtools.bench.report import Figures, Requirement, at_most, table
from devtools.synthetic_dataset import SyntheticImages, write_folder

TITLE = "Audit"
PACKAGES = ("numpy", "pyarrow")
IMAGES, QUICK_IMAGES = 1_000_000, 20_000
CLASSES = 1000
SHARD_ROWS = 256
WRONG, IN_CORNER, UNBOXED = 0.1, 0.05, 0.5  # shares of the images
REQUIRED_S, REQUIRED_GB = 600.0, 2.0
READ_ALL = """
import sys
from pathlib import Path
import pyarrow.parquet as pq
print(sum(len(pq.read_table(file)) for file in sorted(Path(sys.argv[1]).glob("data/*.parquet"))))
"""
AUDIT = "import sys; from gradcam_worker.cli.main import main; sys.exit(main(sys.argv[1:]))"


def images(count: int, seed: int = 0) -> SyntheticImages:
    """Images of many classes: one in ten is taken for the next class, one in twenty looks at a corner."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, CLASSES, count).astype(np.int32)
    is_wrong = rng.random(count) < WRONG
    predicted = np.where(is_wrong, (truth + 1) % CLASSES, truth).astype(np.int32)
    middle = np.clip(rng.normal(0.5, 0.12, (count, 2)), 0.15, 0.85)
    half = rng.uniform(0.1, 0.25, (count, 2))
    boxes = np.clip(np.c_[middle - half, middle + half], 0, 1).astype(np.float32)
    boxes[rng.random(count) < UNBOXED] = np.nan
    in_corner = rng.random(count) < IN_CORNER
    heat = np.where(in_corner[:, None], 0.05, middle + rng.normal(0, 0.05, (count, 2)))
    return SyntheticImages(
        predicted=predicted,
        truth=truth,
        heat_xy=heat.astype(np.float32),
        probability=rng.uniform(0.2, 1, count).astype(np.float32),
        boxes=boxes,
        second=((predicted + 7) % CLASSES).astype(np.int32),
        carried={"split": np.array(["train", "val"])[np.arange(count) % 2], "price": rng.random(count)},
    )


def measure(*, quick: bool) -> dict[str, Any]:
    """Audit both datasets."""
    count = QUICK_IMAGES if quick else IMAGES
    cases = {}
    for name, is_previous in (("labels and boxes", False), ("previous version", True)):
        with tempfile.TemporaryDirectory(prefix="gradcam-bench-") as folder:
            dataset = write_folder(
                images(count), Path(folder) / "cams", shard_rows=SHARD_ROWS, previous_version=is_previous
            )
            files = list(dataset.glob("data/*.parquet"))
            read = _run([sys.executable, "-c", READ_ALL, str(dataset)])
            audit = _run([sys.executable, "-c", AUDIT, "audit", str(dataset), "--no-page", "--no-shortcuts"])
            report = json.loads((dataset / "audit" / "report.json").read_text(encoding="utf-8"))
            cases[name] = {
                "dataset_mb": sum(file.stat().st_size for file in files) / 1e6,
                "files": len(files),
                "read": read,
                "audit": audit,
                "audited": report["dataset"]["explained"],
                "report_mb": (dataset / "audit" / "report.json").stat().st_size / 1e6,
                "rows_mb": (dataset / "audit" / "rows.parquet").stat().st_size / 1e6,
            }
    return {"images": count, "cases": cases}


def _run(command: list[str]) -> Mapping[str, float]:
    """Time, CPU time and most memory of a process. Raises CalledProcessError."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {
        "s": time.perf_counter() - begun,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
    }


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Time and memory, for a million images."""
    for name, case in figures["cases"].items():
        yield at_most(f"{name}: time", REQUIRED_S, case["audit"]["s"], " s")
        yield at_most(f"{name}: most memory", REQUIRED_GB, case["audit"]["peak_gb"], " GB")


def blocks(figures: Figures) -> Iterator[str]:
    """A table of both datasets."""
    headings = (
        "dataset",
        "images",
        "MB",
        "s",
        "CPU, s",
        "times reading it",
        "peak, GB",
        "report, MB",
        "rows, MB",
    )
    rows = [
        (
            name,
            f"{case['audited']}",
            f"{case['dataset_mb']:.0f}",
            f"{case['audit']['s']:.1f}",
            f"{case['audit']['cpu_s']:.1f}",
            f"{case['audit']['cpu_s'] / case['read']['cpu_s']:.1f}",
            f"{case['audit']['peak_gb']:.2f}",
            f"{case['report_mb']:.1f}",
            f"{case['rows_mb']:.1f}",
        )
        for name, case in figures["cases"].items()
    ]
    yield table(headings, rows)
