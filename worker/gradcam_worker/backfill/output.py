"""A backfill's output folder: the files beside those of its shards.

    backfill.json    the plan, written first: whose output this is
    network.json     the weights and the layer that the first shard was explained with
    failed.jsonl     all rows that failed; where they are many, failed-2.jsonl and so on too
    dataset.json     the summary, written last and removed before anything changes: with it, no row is
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
from gradcam_worker.storage.stores import Store
from gradcam_worker.text.visible import counted

PLAN, NETWORK, SUMMARY = "backfill.json", "network.json", "dataset.json"
JSON, LINES = "application/json", "application/x-ndjson"
STORE_TIMEOUT_S = 120.0
PART_BYTES = 32 * 1024 * 1024  # of one file of failed rows
OWN_FILES = re.compile(r"failed(?:-[0-9]+)?\.jsonl\Z|overlays/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/")
MAX_NAMED = 3  # keys, in an error message


class OwnFileFilter:
    """Tells files of an input that backfills have written there: they are no part of it.

    Call it with each name, a key of a bucket or a path, in sorted order. A file is a backfill's own where it
    lies in an output, of this backfill or of another one, under a name that a backfill gives. Other outputs
    are known by their plans, which sort before their files.
    """

    def __init__(self, output: str | None = None) -> None:
        """`output`: as a prefix of names, '' for a whole bucket; None where it is not inside the input."""
        self._output = output
        self._others: list[str] = []  # prefixes of other outputs, each inside the one before
        self.count = 0  # of own files so far

    def __call__(self, name: str) -> bool:
        """Whether this file is a backfill's own."""
        while self._others and not name.startswith(self._others[-1]):
            self._others.pop()
        if name.rpartition("/")[2] == PLAN:
            self._others.append(name.removesuffix(PLAN))
        if self._output is None and not self._others:
            return False
        outputs = [one for one in (self._output, *self._others) if one is not None and name.startswith(one)]
        is_own = any(_is_own_file(name.removeprefix(one)) for one in outputs)
        self.count += is_own
        return is_own


def _is_own_file(name: str) -> bool:
    """Whether a name in an output is one that a backfill gives."""
    return name in {PLAN, NETWORK, SUMMARY} or key_of(name) is not None or OWN_FILES.match(name) is not None


class DatasetDir:
    """A backfill's output. Every method raises StorageUnavailable, or OutputNotAllowed."""

    def __init__(self, store: Store) -> None:
        """`store` is opened at the output itself."""
        self._store = store
        self.uri = store.uri(PLAN).removesuffix(f"/{PLAN}")

    def read_plan(self) -> Plan | None:
        """The plan stored here. Raises BackfillConflict where it cannot be read."""
        text = self._find(PLAN)
        try:
            return Plan.model_validate_json(text) if text is not None else None
        except ValidationError as error:
            message = f"{self._store.uri(PLAN)} is there, and is no plan that this version can read."
            raise BackfillConflict(message) from error

    def require_plan(self) -> Plan:
        """The plan stored here. Raises BackfillConflict where there is none."""
        plan = self.read_plan()
        if plan is None:
            message = f"{self.uri} holds no backfill: there is no {PLAN}."
            raise BackfillConflict(message)
        return plan

    def resolve(self, asked: Plan, *, resume: bool, changed: bool) -> Plan:
        """The plan to run: `asked`, under the id of the backfill that is here already, if one is.

        A backfill that is here and has no shard done is replaced.

        Args:
            asked: What is asked for.
            resume: The backfill that is here may be this one.
            changed: ... and its weights may be others.

        Raises:
            BackfillConflict: Another backfill is here, or this one and `resume` is False.
        """
        stored, done = self.read_plan(), self.done_keys()
        if stored is None:
            if done:
                message = (
                    f"{self.uri} holds a dataset, and no {PLAN} that says of what: choose another output."
                )
                raise BackfillConflict(message)
            return asked
        # A list may lie elsewhere by now: the keys of its shards tell whether its rows are the same.
        same_input = asked.model_copy(update={"input": stored.input}) if resume else asked
        same_weights = same_input.model_copy(update={"weights_sha256": stored.weights_sha256})
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
        """Write the plan. Raises BackfillConflict where another backfill has claimed the output meanwhile."""
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
        """Make what is here impossible to resume: it is no dataset."""
        self._store.remove(PLAN)

    def read_network(self) -> NetworkRef | None:
        """The network that the shards so far were explained with."""
        text = self._find(NETWORK)
        return NetworkRef.model_validate_json(text) if text is not None else None

    def write_network(self, network: NetworkRef) -> None:
        """Store it, for `read_network`."""
        self._put(NETWORK, network.to_json().encode(), JSON)

    def done_keys(self) -> dict[int, tuple[str, ...]]:
        """Keys of the shards that are done, by index: several where the input has changed meanwhile.

        Raises BackfillConflict where there is a Parquet file that no backfill has written.
        """
        found: dict[int, tuple[str, ...]] = {}
        foreign = []
        for name in self._store.names("data"):
            if key := key_of(name):
                index = int(key.partition("-")[0])
                found[index] = (*found.get(index, ()), key)
            elif name.endswith(".parquet") and name.count("/") == 1:
                foreign.append(name.removeprefix("data/"))
        if foreign:
            message = (
                f"{self._store.uri('data')} holds {_names(foreign)}, which no backfill has written: whoever "
                "reads data/*.parquet would read that, too. Move it elsewhere."
            )
            raise BackfillConflict(message)
        return found

    def has_shard(self, key: str) -> bool:
        """Whether a shard is done."""
        return self._find(data_key(key)) is not None

    def keys_with_failures(self) -> frozenset[str]:
        """Keys of the shards of which rows failed."""
        return frozenset(filter(None, map(key_of, self._store.names("failed"))))

    def remove_shard(self, key: str) -> None:
        """Remove the files of a shard that is no part of the input any more."""
        self._store.remove(data_key(key))
        self._store.remove(failed_key(key))

    def read_summary(self) -> dict[str, Any] | None:
        """The content of dataset.json; None where the dataset is not complete."""
        text = self._find(SUMMARY)
        return dict(json.loads(text)) if text is not None else None

    def uncommit(self) -> None:
        """Remove dataset.json, before anything changes."""
        self._store.remove(SUMMARY)

    def commit(
        self, plan: Plan, keys: Sequence[str], rows: int, network: NetworkRef | None, *, changed: bool
    ) -> dict[str, Any]:
        """Check that the shards are there and no others, write failed.jsonl and then dataset.json.

        Args:
            plan: The backfill's.
            keys: Of all shards of the input, in its order.
            rows: How many rows the input has.
            network: What they were explained with.
            changed: Remove shards that are no part of the input any more.

        Returns:
            The content of dataset.json.

        Raises:
            BackfillConflict: A shard is missing, or one is there and should not be.
        """
        expected = frozenset(keys)
        there = {key for some in self.done_keys().values() for key in some}
        if missing := sorted(expected - there):
            many = counted(len(missing), "shard is", "shards are")
            message = f"{many} done and not there: {_names(missing)}. Use --resume."
            raise BackfillConflict(message)
        extra = sorted(there - expected)
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
        """Write the failed rows of all shards, in files that fit into memory; return their names."""
        expected, files = frozenset(keys), []
        for number, part in enumerate(_joined(self._failed_lines(expected, codes)), 1):
            files.append(_failed_name(number))
            self._put(files[-1], part, LINES)
        number = len(files) + 1
        while self._find(_failed_name(number)) is not None:  # of an earlier run, when more had failed
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
        """Read what the first shard was explained with, if one has ended."""
        self._output, self.network = output, output.read_network()

    def pin(self, shard: Shard) -> Shard:
        """The same shard, which a worker with other weights refuses."""
        known = self.network and self.network.weights_sha256
        return shard.model_copy(update={"weights_sha256": known}) if known else shard

    def mismatch(self, document: StatusDocument) -> str | None:
        """What a shard was explained with, where that differs from the first one; store that of the first."""
        if document.network and not self.network:
            self._output.write_network(document.network)
            self.network = document.network
        both = document.network or self.network, self.network
        one, first = (found and f"weights {found.weights_sha256}, layer {found.layer}" for found in both)
        return None if one == first else f"{one}, those before with {first}"


def _joined(texts: Iterable[bytes]) -> Iterator[bytes]:
    """Texts joined, as many as fit into PART_BYTES."""
    stored: list[bytes] = []
    size = 0
    for text in texts:
        if stored and size + len(text) > PART_BYTES:
            yield b"".join(stored)
            stored, size = [], 0
        stored.append(text)
        size += len(text)
    if stored:
        yield b"".join(stored)


def _code(line: Mapping[str, Any]) -> str:
    return str(line["error"]["code"])


def _names(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - MAX_NAMED:,} more" if len(keys) > MAX_NAMED else ""
    return ", ".join(keys[:MAX_NAMED]) + more


def _failed_name(number: int) -> str:
    return "failed.jsonl" if number == 1 else f"failed-{number}.jsonl"
