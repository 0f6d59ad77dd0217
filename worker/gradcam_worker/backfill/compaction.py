"""Merges the small files of a complete dataset into larger ones: `gradcam backfill compact`.

    dataset.json -> compacting.json -> for each merged file: written, then the files in it are removed
                 -> dataset.json with the new number of files

While it runs there is no dataset.json. Whoever reads data/*.parquet meanwhile never misses a row, but may see
those of one merged file twice, or find that a listed file is gone. After a kill, the same command goes on.
The files of rows that failed, failed/<key>.jsonl, stay as they are.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradcam_worker.backfill.output import (
    REQUESTS_AT_ONCE,
    STORE_TIMEOUT_S,
    DataFiles,
    DatasetDir,
)
from gradcam_worker.backfill.plan import Plan
from gradcam_worker.backfill.progress import Progress
from gradcam_worker.errors import StorageUnavailable
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.shard import data_key

if TYPE_CHECKING:
    from gradcam_worker.artifacts.merged_files import Part

DEFAULT_TARGET_BYTES = 64 * 1024 * 1024  # large enough for few requests, and held in memory as a whole
READ_AHEAD_FILES = 16


@dataclass(frozen=True)
class Compaction:
    """What was merged."""

    files_before: int
    files: int
    rows: int

    def facts(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return dict(vars(self))


class Compactor:
    """Merges the files of one dataset. Hold the lease on the output meanwhile."""

    def __init__(
        self,
        output: DatasetDir,
        *,
        target_bytes: int = DEFAULT_TARGET_BYTES,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        """Nothing is read yet.

        Args:
            output: The dataset.
            target_bytes: About the size of a merged file. Files of at least half of it stay as they are.
            check: Called between files. What it raises ends the merging, which can be continued.
        """
        self._output, self._target_bytes = output, target_bytes
        self._check = check

    def run(self) -> Compaction:
        """Merge the files.

        Returns:
            How many there were and are.

        Raises:
            BackfillConflict: The dataset is not complete, or holds files that no backfill wrote.
            StorageUnavailable: The storage failed.
        """
        summary = self._output.begin_compaction()
        files = self._settle(self._output.files())
        before = len(files.keys) + len(files.merged)
        for group in self._groups(self._small(files)):
            self._replace(group)
        files = self._output.files()
        after = len(files.keys) + len(files.merged)
        self._output.end_compaction({**summary, "files": after, "compacted_at": utc_now().isoformat()})
        return Compaction(before, after, int(summary["rows"]))

    def _settle(self, files: DataFiles) -> DataFiles:
        """Remove files that a merge which was killed has merged already, and return what is there then."""
        twice = (*sorted(files.keys & files.merged_keys), *files.repeated)
        self._output.remove(map(data_key, twice))
        merged = {name: shards for name, shards in files.merged.items() if name not in twice}
        return DataFiles(files.keys - files.merged_keys, merged)

    def _small(self, files: DataFiles) -> list[str]:
        """The names of the files to merge, in the order of their rows."""
        sizes = {name: self._output.store.get_part(data_key(name), -1, 1)[1] for name in files.merged}
        small = [name for name, size in sizes.items() if 2 * size < self._target_bytes]
        by_index = {name: files.merged[name][0].key for name in small} | {key: key for key in files.keys}
        return sorted(by_index, key=by_index.__getitem__)

    def _groups(self, names: list[str]) -> Iterator["list[tuple[str, list[Part]]]"]:
        """Files that become one, each with the shards in it."""
        group: list[tuple[str, list[Part]]] = []
        size = 0
        for name, size_bytes, parts in self._read(names):
            is_full = size + size_bytes > self._target_bytes
            if group and (is_full or not parts[0].fits(group[0][1][0])):
                yield group
                group, size = [], 0
            group.append((name, parts))
            size += size_bytes
        if group:
            yield group

    def _read(self, names: list[str]) -> Iterator["tuple[str, int, list[Part]]"]:
        """Read files, some ahead: each with its name, its size, and the shards in it."""
        from gradcam_worker.artifacts.merged_files import read_parts, size_of_records  # slow to import

        def read(name: str) -> bytes:
            data = self._output.store.find(data_key(name), Deadline(STORE_TIMEOUT_S))
            if data is None:
                message = f"{self._output.store.uri(data_key(name))} is gone: did something else remove it?"
                raise StorageUnavailable(message)
            return data

        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="compact-read") as pool:
            for start in range(0, len(names), READ_AHEAD_FILES):
                some = names[start : start + READ_AHEAD_FILES]
                for name, data in zip(some, pool.map(read, some), strict=True):
                    self._check()
                    yield name, size_of_records(data), read_parts(data, name)

    def _replace(self, group: "list[tuple[str, list[Part]]]") -> None:
        """Write the merged file of a group, then remove the files in it. One that is alone stays."""
        from gradcam_worker.artifacts.merged_files import merge

        if len(group) > 1:
            parts = sorted((part for _, of_file in group for part in of_file), key=lambda part: part.first)
            self._output.put_data(*merge(parts))
            self._output.remove(data_key(name) for name, _ in group)


def lease_facts(plan: Plan, summary: dict[str, Any]) -> dict[str, Any]:
    """The facts of a dataset whose files are being merged, for the registry of backfills."""
    rows = int(summary["rows"])
    progress = Progress(planned=rows, whole=True, before=rows)
    about = {"backfill": plan.id, "input": plan.input, "output": plan.output, "network": plan.network}
    return {**about, **progress.facts()}
