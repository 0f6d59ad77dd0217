"""A backfill's output folder: the files besides those of its shards.

    backfill.json    the plan, written first: it tells to which backfill the output belongs
    network.json     the weights and the layer that the first shard was explained with
    failed.jsonl     all rows that failed; if they are many, also failed-2.jsonl and so on
    dataset.json     the summary, written last and removed before any change: if it exists, no row is
                     missing, and none is there twice
    compacting.json  what dataset.json said, while files are merged: see `gradcam_worker.backfill.compaction`

The files of the shards: see `gradcam_worker.artifacts.dataset`. A shard is done when its file is listed, or a
merged file that holds it. Files of shards that are not part of the input any more are removed last, since
later shards take rows over from them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from pydantic import ValidationError

from gradcam_worker.backfill.plan import Plan
from gradcam_worker.errors import BackfillConflict
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.shard import (
    DATASET,
    Shard,
    data_key,
    failed_key,
    key_of,
    merged_name_of,
    place_in,
)
from gradcam_worker.schemas.status import NetworkRef, StatusDocument
from gradcam_worker.storage.ranged_file import RangedFile
from gradcam_worker.storage.store import Store
from gradcam_worker.text.visible import counted

if TYPE_CHECKING:
    from gradcam_worker.artifacts.merged_files import MergedShard

PLAN, NETWORK, SUMMARY, COMPACTING = "backfill.json", "network.json", "dataset.json", "compacting.json"
JSON, LINES = "application/json", "application/x-ndjson"
PARQUET = "application/vnd.apache.parquet"
STORE_TIMEOUT_S = 120.0
MAX_FAILED_FILE_BYTES = 32 * 1024 * 1024
OWN_FILES = re.compile(  # an audit and a gallery are written there, too
    r"failed(?:-[0-9]+)?\.jsonl\Z|overlays/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/"
    r"|data/[^/]+\.parquet\Z|gallery\.html\Z"
)
MAX_NAMED_KEYS = 3  # in an error message
REQUESTS_AT_ONCE = 16  # to read or remove many files
AUDIT_FILES = re.compile(
    r"(?:^|/)audit/(?:index\.html|(?:report|page)\.json|(?:rows|map|image-links)[^/]*\.parquet)$"
)


class OwnFileFilter:
    """Recognizes files that backfills wrote into an input's folder, so that they are left out.

    Call it with each name, a key of a bucket or a path, in sorted order. If this backfill's output is a
    folder below the input, all of it is left out. If it is the input itself, and of outputs of other
    backfills, what has a name that backfills give: there may be images beside it. Other outputs are
    recognized by their plans, which sort before their other files.
    """

    def __init__(self, output: str | None = None, *, below: bool = False) -> None:
        """Know this backfill's output.

        Args:
            output: The prefix of its names, '' for a whole bucket; None if it is outside the input.
            below: Whether it is a folder below the input.
        """
        self._output, self._below = output, below
        self._others: list[str] = []  # prefixes of other outputs, each inside the previous one

    def __call__(self, name: str) -> bool:
        """Return whether a backfill wrote this file."""
        while self._others and not name.startswith(self._others[-1]):
            self._others.pop()
        if name.rpartition("/")[2] == PLAN:
            self._others.append(name.removesuffix(PLAN))
        if AUDIT_FILES.search(name):  # they sort before the plan
            return True
        if self._output is None and not self._others:
            return False
        if self._below and name.startswith(self._output or ""):
            return True
        prefixes = (self._output, *self._others)
        outputs = [prefix for prefix in prefixes if prefix is not None and name.startswith(prefix)]
        return any(_is_own_file(name.removeprefix(prefix)) for prefix in outputs)


def _is_own_file(name: str) -> bool:
    """Whether a backfill gives files such a name in its output."""
    if name in {PLAN, NETWORK, SUMMARY, COMPACTING} or OWN_FILES.match(name):
        return True
    return key_of(name) is not None


@dataclass(frozen=True)
class DataFiles:
    """The files of finished shards."""

    keys: frozenset[str]  # of shards that have a file of their own
    merged: "Mapping[str, tuple[MergedShard, ...]]"  # merged files by name, with the shards in each

    @property
    def merged_keys(self) -> frozenset[str]:
        """The keys of the shards in merged files."""
        return frozenset(shard.key for shards in self.merged.values() for shard in shards)

    @property
    def repeated(self) -> tuple[str, ...]:
        """The merged files whose shards are all in larger ones: a merge of them was killed."""
        repeated: list[str] = []
        seen: set[str] = set()
        for name in sorted(self.merged, key=lambda name: (-len(self.merged[name]), name)):
            keys = {shard.key for shard in self.merged[name]}
            if keys <= seen:
                repeated.append(name)
            seen |= keys
        return tuple(repeated)

    def places(self) -> dict[str, tuple[str, ...]]:
        """Return where the rows of each shard in a merged file are, by its key: see `Shard.reuse`.

        A shard with a file of its own is not named: its place is its key.
        """
        return {
            shard.key: tuple(place_in(name, group) for group in range(*shard.groups))
            for name, shards in self.merged.items()
            for shard in shards
            if shard.key not in self.keys
        }


class DatasetDir:
    """A backfill's output. Every method raises StorageUnavailable, or OutputNotAllowed."""

    def __init__(self, store: Store) -> None:
        """`store` is opened at the output."""
        self.store = store
        self.uri = store.uri(PLAN).removesuffix(f"/{PLAN}")
        self._merged: dict[str, tuple[MergedShard, ...]] = {}  # by name: such a file never changes

    def read_plan(self) -> Plan | None:
        """Return the stored plan, if any. Raises BackfillConflict if it is invalid."""
        text = self._find(PLAN)
        try:
            return Plan.model_validate_json(text) if text is not None else None
        except ValidationError as error:
            message = f"{self.store.uri(PLAN)} is there, and is no plan that this version can read."
            raise BackfillConflict(message) from error

    def carried_before(self) -> dict[str, str] | None:
        """Return the columns that finished shards have from the input; None: no shard is finished."""
        stored = self.read_plan()
        return stored.carried if stored and self.done_keys() else None

    def require_plan(self) -> Plan:
        """Return the stored plan. Raises BackfillConflict if there is none."""
        plan = self.read_plan()
        if plan is None:
            message = f"{self.uri} holds no backfill: there is no {PLAN}."
            raise BackfillConflict(message)
        return plan

    def resolve(self, asked: Plan, *, resume: bool, changed: bool) -> Plan:
        """Return the plan to run: `asked`, with the id of the stored plan if that is of the same backfill.

        A stored plan without finished shards is replaced.

        Args:
            asked: The requested plan.
            resume: Continue the stored backfill if it is the same; its input may have moved.
            changed: Accept that its weights differ, or what is known of its images.

        Returns:
            The plan.

        Raises:
            BackfillConflict: The output holds another backfill, or the same one and `resume` is False.
        """
        stored, done = self.read_plan(), self.done_keys()
        if stored is None:
            if done:
                message = (
                    f"{self.uri} holds a dataset, and no {PLAN} that says of what: choose another output."
                )
                raise BackfillConflict(message)
            return asked
        # The list may have moved; the keys of its shards tell whether its rows are the same.
        same_input = asked.model_copy(update={"input": stored.input}) if resume else asked
        may_change = ("weights_sha256", "carried", "annotated")
        same_weights = same_input.model_copy(update={name: getattr(stored, name) for name in may_change})
        difference = (same_weights if changed else same_input).difference_from(stored)
        if difference and not done:
            return asked
        if difference:
            hint = (
                "Choose another output."
                if same_weights.difference_from(stored)
                else "To run again what that changes: --changed. Or choose another output."
            )
            message = f"{self.uri} holds another backfill. {difference} {hint}"
            raise BackfillConflict(message)
        if done and not resume:
            some = counted(len(done), "shard of it is", "shards of it are")
            far = "it is complete" if self.read_summary() else f"{some} done"
            message = f"{self.uri} holds this very backfill, and {far}: use --resume to go on with it."
            raise BackfillConflict(message)
        return asked.model_copy(update={"id": stored.id, "created_at": stored.created_at})

    def claim(self, plan: Plan) -> None:
        """Write the plan. Raises BackfillConflict if another backfill has claimed the output meanwhile."""
        stored = self.read_plan()
        if stored is not None and stored.id != plan.id and self.done_keys():
            message = (
                f"{self.uri} holds another backfill, of which a shard was done just now: "
                "choose another output."
            )
            raise BackfillConflict(message)
        if stored == plan:
            return
        if stored is not None and (stored.id, stored.weights_sha256) != (plan.id, plan.weights_sha256):
            self.store.remove(NETWORK)
        self._put(PLAN, plan.to_json().encode(), JSON)

    def discard_plan(self) -> None:
        """Remove the plan, so that an inconsistent output cannot be resumed."""
        self.store.remove(PLAN)

    def read_network(self) -> NetworkRef | None:
        """Return the network that the shards were explained with, if known."""
        text = self._find(NETWORK)
        return NetworkRef.model_validate_json(text) if text is not None else None

    def write_network(self, network: NetworkRef) -> None:
        """Store what `read_network` returns."""
        self._put(NETWORK, network.to_json().encode(), JSON)

    def done_keys(self) -> dict[int, tuple[str, ...]]:
        """Return the keys of finished shards, by index: several for an index if the input has changed.

        Raises BackfillConflict if there is a Parquet file that no backfill wrote.
        """
        files = self.files()
        keys: dict[int, tuple[str, ...]] = {}
        for key in sorted({*files.keys, *files.merged_keys}):
            index = int(key.partition("-")[0])
            keys[index] = (*keys.get(index, ()), key)
        return keys

    def files(self) -> "DataFiles":
        """List the files of finished shards. Raises BackfillConflict if no backfill wrote one of them."""
        keys, merged, foreign = [], [], []
        for name in self.store.names("data"):
            if key := key_of(name):
                keys.append(key)
            elif of_many := merged_name_of(name):
                merged.append(of_many)
            elif name.endswith(".parquet") and name.count("/") == 1:
                foreign.append(name.removeprefix("data/"))
        if foreign:
            message = (
                f"{self.store.uri('data')} holds {_names(foreign)}, which no backfill has written: whoever "
                "reads data/*.parquet would read that, too. Move it elsewhere."
            )
            raise BackfillConflict(message)
        return DataFiles(frozenset(keys), {name: self._merged_shards(name) for name in merged})

    def _merged_shards(self, name: str) -> "tuple[MergedShard, ...]":
        if name not in self._merged:
            from gradcam_worker.artifacts.merged_files import read_merged_shards  # it is slow to import

            file = cast("BinaryIO", RangedFile(self.store, data_key(name)))
            self._merged[name] = read_merged_shards(file)
        return self._merged[name]

    def has_shard(self, key: str) -> bool:
        """Return whether a shard is done."""
        if self._find(data_key(key)) is not None:
            return True
        return any(key == shard.key for shards in self._merged.values() for shard in shards)

    def keys_with_failures(self) -> frozenset[str]:
        """Return the keys of shards with failed rows."""
        return frozenset(filter(None, map(key_of, self.store.names("failed"))))

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, several at once."""
        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="remove") as pool:
            for _ in pool.map(self.store.remove, names):
                pass

    def read_summary(self) -> dict[str, Any] | None:
        """Return the content of dataset.json; None if the dataset is incomplete."""
        text = self._find(SUMMARY)
        return dict(json.loads(text)) if text is not None else None

    def uncommit(self) -> None:
        """Remove dataset.json, before any change."""
        self.store.remove(SUMMARY)
        self.store.remove(COMPACTING)  # the change settles what a merge that was interrupted left behind

    def begin_compaction(self, *, dry: bool = False) -> dict[str, Any]:
        """Set dataset.json aside, before files are merged, unless `dry`, and return its content.

        Raises BackfillConflict if the dataset is not complete.
        """
        summary = self.read_summary()
        text = self._find(COMPACTING) if summary is None else None
        if text is not None:  # an earlier merge was interrupted
            return dict(json.loads(text))
        if summary is None:
            message = f"{self.uri} is not complete: finish the backfill with --resume, then merge its files."
            raise BackfillConflict(message)
        if not dry:
            self._put(COMPACTING, json.dumps(summary, indent=2).encode(), JSON)
            self.store.remove(SUMMARY)
        return summary

    def end_compaction(self, summary: Mapping[str, Any]) -> None:
        """Write dataset.json again, with what has changed."""
        self._put(SUMMARY, json.dumps(summary, indent=2).encode(), JSON)
        self.store.remove(COMPACTING)

    def commit(
        self, plan: Plan, keys: Sequence[str], rows: int, network: NetworkRef | None, *, changed: bool
    ) -> dict[str, Any]:
        """Check that exactly these shards exist, then write failed.jsonl and dataset.json.

        Args:
            plan: The backfill's.
            keys: Of all shards of the input, in its order.
            rows: The number of rows of the input.
            network: The network that they were explained with.
            changed: Remove shards that are no longer part of the input.

        Returns:
            The content of dataset.json.

        Raises:
            BackfillConflict: A shard is missing, or there is one too many.
        """
        expected, files = frozenset(keys), self.files()
        done = files.keys | files.merged_keys
        if missing := sorted(expected - done):
            many = counted(len(missing), "shard is", "shards are")
            message = f"{many} done and not there: {_names(missing)}. Use --resume."
            raise BackfillConflict(message)
        extra = sorted(done - expected)
        if extra and not changed:
            message = (
                f"{self.store.uri('data')} holds {_names(extra)}, no part of the input: if that has become "
                "shorter, --changed removes them."
            )
            raise BackfillConflict(message)
        failed = sorted(self.keys_with_failures() - expected)
        self.remove([*map(data_key, sorted(files.keys - expected)), *map(failed_key, failed)])
        data_files = len(files.keys & expected) + self._prune_merged(files, expected)
        codes: Counter[str] = Counter()
        failed_files = self._write_failed(expected, codes)
        summary = {
            "schema": DATASET,
            "backfill": plan.id,
            "rows": rows,
            "failed": codes.total(),
            "codes": dict(sorted(codes.items())),
            "failed_files": failed_files,
            "shards": len(keys),
            "files": data_files,
            "network": network.model_dump(mode="json") if network else {"name": plan.network},
            "completed_at": utc_now().isoformat(),
        }
        self._put(SUMMARY, json.dumps(summary, indent=2).encode(), JSON)
        return summary

    def _prune_merged(self, files: "DataFiles", expected: frozenset[str]) -> int:
        """Leave shards in merged files that are part of the input and have no newer file of their own.

        A merged file that loses some of them is written anew, under another name, before it is removed.

        Args:
            files: What is there.
            expected: Keys of the shards of the input.

        Returns:
            The number of merged files afterwards.
        """
        self.remove(map(data_key, files.repeated))
        left = 0
        for name in sorted(files.merged.keys() - files.repeated):
            shards = files.merged[name]
            keep = {shard.key for shard in shards} & expected - files.keys
            left += bool(keep)
            if len(keep) == len(shards):
                continue
            if keep:
                from gradcam_worker.artifacts.merged_files import merge, read_parts  # slow to import

                parts = [
                    part for part in read_parts(self.store.get(data_key(name)), name) if part.key in keep
                ]
                self.put_data(*merge(parts))
            self.store.remove(data_key(name))
        return left

    def put_data(self, name: str, data: bytes) -> None:
        """Write a Parquet file of the dataset, by its name without folder and ending."""
        self._put(data_key(name), data, PARQUET)

    def _write_failed(self, keys: Iterable[str], codes: Counter[str]) -> list[str]:
        """Write the failed rows of all shards, in files of limited size; return their names."""
        expected, files = frozenset(keys), []
        for number, part in enumerate(_joined(self._failed_lines(expected, codes)), 1):
            files.append(_failed_name(number))
            self._put(files[-1], part, LINES)
        number = len(files) + 1
        while self._find(_failed_name(number)) is not None:  # of an earlier run with more failures
            self.store.remove(_failed_name(number))
            number += 1
        return files

    def _failed_lines(self, expected: frozenset[str], codes: Counter[str]) -> Iterator[bytes]:
        for key in sorted(self.keys_with_failures() & expected):
            text = self._find(failed_key(key))
            if text is None:
                continue
            codes.update(_code(json.loads(line)) for line in text.splitlines())
            yield text

    def _find(self, key: str) -> bytes | None:
        return self.store.find(key, Deadline(STORE_TIMEOUT_S))

    def _put(self, key: str, data: bytes, media_type: str) -> None:
        self.store.put_many([(key, data, media_type)], Deadline(STORE_TIMEOUT_S))


class WeightsCheck:
    """Checks that all shards of an output are explained with the same weights, at the same layer."""

    def __init__(self, output: DatasetDir, planned_sha256: str | None) -> None:
        """Read what the first shard was explained with, if it is known.

        Args:
            output: The dataset.
            planned_sha256: Of the weights, if the plan names some.
        """
        self._output, self.network = output, output.read_network()
        self._planned_sha256 = planned_sha256

    def pin(self, shard: Shard) -> Shard:
        """Return the shard with the known weights, so that a worker with others refuses it."""
        sha256 = self.network and self.network.weights_sha256
        return shard.model_copy(update={"weights_sha256": sha256}) if sha256 else shard

    def accepts(self, network: NetworkRef) -> bool:
        """Whether rows that a network has explained are part of the dataset."""
        if self.network:
            return network == self.network
        return self._planned_sha256 in {None, network.weights_sha256}

    def mismatch(self, document: StatusDocument) -> str | None:
        """Return how a shard's weights or layer differ from the first one's, which are stored; else None."""
        if document.network and not self.network:
            self._output.write_network(document.network)
            self.network = document.network
        networks = document.network or self.network, self.network
        this, first = (net and f"weights {net.weights_sha256}, layer {net.layer}" for net in networks)
        return None if this == first else f"{this}, those before with {first}"


def _joined(texts: Iterable[bytes]) -> Iterator[bytes]:
    """Join texts, as many as fit into MAX_FAILED_FILE_BYTES."""
    stored: list[bytes] = []
    size = 0
    for text in texts:
        if stored and size + len(text) > MAX_FAILED_FILE_BYTES:
            yield b"".join(stored)
            stored, size = [], 0
        stored.append(text)
        size += len(text)
    if stored:
        yield b"".join(stored)


def _code(line: Mapping[str, Any]) -> str:
    return str(line["error"]["code"])


def _names(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - MAX_NAMED_KEYS:,} more" if len(keys) > MAX_NAMED_KEYS else ""
    return ", ".join(keys[:MAX_NAMED_KEYS]) + more


def _failed_name(number: int) -> str:
    return "failed.jsonl" if number == 1 else f"failed-{number}.jsonl"
