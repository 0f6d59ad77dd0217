"""Backfills to measure or to attack: the real command, its input, and how to count its rows."""

import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.storage.stores import Stores

PATIENCE_S = 60  # for one file of a dataset


def write_input(path: Path, uris: Iterable[str]) -> Path:
    """An inventory, in which each row is another version: equal rows would be computed once."""
    with path.open("w", encoding="utf-8") as file:
        for number, uri in enumerate(uris):
            bucket, _, key = uri.removeprefix("s3://").partition("/")
            file.write(f'"{bucket}","{key}","version-{number}","true","false"\n')
    return path


def command(source: Path, output: str, network: str, *options: str) -> list[str]:
    """The words of its command line."""
    words = ["backfill", str(source), "--format", "inventory", "--network", network, "--top-n", "3"]
    return [sys.executable, "-P", "-m", "gradcam_worker", *words, "--output", output, "--json", *options]


@dataclass(frozen=True)
class Counted:
    """What a dataset holds of the rows that it should hold."""

    lost: int
    doubled: int


def counted(settings: Settings, output: str, rows: int) -> Counted:
    """Read every file of a dataset, and count how often each row is there: once is right.

    A row that was explained for three classes is there once for each of them.
    """
    store = Stores(settings, S3(settings)).open(output)
    times = dict.fromkeys(range(rows), 0)
    doubled = 0
    for name in store.names("data"):
        data = store.find(name, Deadline(PATIENCE_S))
        columns = pq.read_table(io.BytesIO(data or b""), columns=["row", "index"])
        places = list(zip(columns["row"].to_pylist(), columns["index"].to_pylist(), strict=True))
        doubled += len(places) - len(set(places))
        for row in {row for row, _ in places}:
            times[row] = times.get(row, 0) + 1
    doubled += sum(count - 1 for count in times.values() if count > 1)
    return Counted(sum(count == 0 for count in times.values()), doubled)
