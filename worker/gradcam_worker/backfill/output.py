"""A backfill's output folder: the files besides those of its shards.

    backfill.json    the plan, written first: it tells to which backfill the output belongs
    network.json     the weights and the layer that the first shard was explained with
    failed.jsonl     all rows that failed; if they are many, also failed-2.jsonl and so on
    dataset.json     the summary, written last and removed before any change: if it exists, no row is
                     missing

The files of the shards: see `gradcam_worker.artifacts.dataset`. A shard is done when its file is listed.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from gradcam_worker.backfill.plan import Plan
from gradcam_worker.errors import BackfillConflict
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.shard import DATASET, Shard, data_key, failed_key, key_of
from gradcam_worker.schemas.status import NetworkRef, StatusDocument
from gradcam_worker.storage.store import Store
from gradcam_worker.text.visible import counted

PLAN, NETWORK, SUMMARY = "backfill.json", "network.json", "dataset.json"
JSON, LINES = "application/json", "application/x-ndjson"
STORE_TIMEOUT_S = 120.0
MAX_FAILED_FILE_BYTES = 32 * 1024 * 1024
OWN_FILES = re.compile(  # an audit and a gallery are written there, too
    r"failed(?:-[0-9]+)?\.jsonl\Z|overlays/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/"
    r"|data/[^/]+\.parquet\Z|gallery\.html\Z|audit/"
)
MAX_NAMED_KEYS = 3  # in an error message
AUDIT_FILES = re.compile(r"(?:^|/)audit/(?:index\.html|(?:report|page)\.json|(?:rows|map)[^/]*\.parquet)$")


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
    return name in {PLAN, NETWORK, SUMMARY} or key_of(name) is not None or OWN_FILES.match(name) is not None


class DatasetDir:
    """A backfill's output. Every method raises StorageUnavailable, or OutputNotAllowed."""

    def __init__(self, store: Store) -> None:
        """`store` is opened at the output."""
        self._store = store
        self.uri = store.uri(PLAN).removesuffix(f"/{PLAN}")

    def read_plan(self) -> Plan | None:
        """Return the stored plan, if any. Raises BackfillConflict if it is invalid."""
        text = self._find(PLAN)
        try:
            return Plan.model_validate_json(text) if text is not None else None
        except ValidationError as error:
            message = f"{self._store.uri(PLAN)} is there, and is no plan that this version can read."
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
                "" if same_weights.difference_from(stored) else " To run again what that changes: --changed."
            )
            message = f"{self.uri} holds another backfill. {difference}{hint} Or choose another output."
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
            self._store.remove(NETWORK)
        self._put(PLAN, plan.to_json().encode(), JSON)

    def discard_plan(self) -> None:
        """Remove the plan, so that an inconsistent output cannot be resumed."""
        self._store.remove(PLAN)

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
        keys: dict[int, tuple[str, ...]] = {}
        foreign = []
        for name in self._store.names("data"):
            if key := key_of(name):
                index = int(key.partition("-")[0])
                keys[index] = (*keys.get(index, ()), key)
            elif name.endswith(".parquet") and name.count("/") == 1:
                foreign.append(name.removeprefix("data/"))
        if foreign:
            message = (
                f"{self._store.uri('data')} holds {_names(foreign)}, which no backfill has written: whoever "
                "reads data/*.parquet would read that, too. Move it elsewhere."
            )
            raise BackfillConflict(message)
        return keys

    def has_shard(self, key: str) -> bool:
        """Return whether a shard is done."""
        return self._find(data_key(key)) is not None

    def keys_with_failures(self) -> frozenset[str]:
        """Return the keys of shards with failed rows."""
        return frozenset(filter(None, map(key_of, self._store.names("failed"))))

    def remove_shard(self, key: str) -> None:
        """Remove the files of a shard that is no longer part of the input."""
        self._store.remove(data_key(key))
        self._store.remove(failed_key(key))

    def read_summary(self) -> dict[str, Any] | None:
        """Return the content of dataset.json; None if the dataset is incomplete."""
        text = self._find(SUMMARY)
        return dict(json.loads(text)) if text is not None else None

    def uncommit(self) -> None:
        """Remove dataset.json, before any change."""
        self._store.remove(SUMMARY)

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
        expected = frozenset(keys)
        done = {key for same_index in self.done_keys().values() for key in same_index}
        if missing := sorted(expected - done):
            many = counted(len(missing), "shard is", "shards are")
            message = f"{many} done and not there: {_names(missing)}. Use --resume."
            raise BackfillConflict(message)
        extra = sorted(done - expected)
        if extra and not changed:
            message = (
                f"{self._store.uri('data')} holds {_names(extra)}, no part of the input: if that has become "
                "shorter, --changed removes them."
            )
            raise BackfillConflict(message)
        for key in sorted({*extra, *(self.keys_with_failures() - expected)}):
            self.remove_shard(key)
        codes: Counter[str] = Counter()
        files = self._write_failed(expected, codes)
        summary = {
            "schema": DATASET,
            "backfill": plan.id,
            "rows": rows,
            "failed": codes.total(),
            "codes": dict(sorted(codes.items())),
            "failed_files": files,
            "shards": len(keys),
            "network": network.model_dump(mode="json") if network else {"name": plan.network},
            "completed_at": utc_now().isoformat(),
        }
        self._put(SUMMARY, json.dumps(summary, indent=2).encode(), JSON)
        return summary

    def _write_failed(self, keys: Iterable[str], codes: Counter[str]) -> list[str]:
        """Write the failed rows of all shards, in files of limited size; return their names."""
        expected, files = frozenset(keys), []
        for number, part in enumerate(_joined(self._failed_lines(expected, codes)), 1):
            files.append(_failed_name(number))
            self._put(files[-1], part, LINES)
        number = len(files) + 1
        while self._find(_failed_name(number)) is not None:  # of an earlier run with more failures
            self._store.remove(_failed_name(number))
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
        return self._store.find(key, Deadline(STORE_TIMEOUT_S))

    def _put(self, key: str, data: bytes, media_type: str) -> None:
        self._store.put_many([(key, data, media_type)], Deadline(STORE_TIMEOUT_S))


class WeightsCheck:
    """Checks that all shards of an output are explained with the same weights, at the same layer."""

    def __init__(self, output: DatasetDir) -> None:
        """Read what the first shard was explained with, if it is known."""
        self._output, self.network = output, output.read_network()

    def pin(self, shard: Shard) -> Shard:
        """Return the shard with the known weights, so that a worker with others refuses it."""
        sha256 = self.network and self.network.weights_sha256
        return shard.model_copy(update={"weights_sha256": sha256}) if sha256 else shard

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
