"""What lies in a backfill's output beside what its shards leave there: its plan, and its seal.

    backfill.json    the plan, written first: whose output this is
    network.json     which weights and which layer the first shard was explained with
    failed.jsonl     all rows that failed; where they are many, failed-2.jsonl and so on too
    dataset.json     written last, and removed before anything changes: with it, every row is there

For the rest see `gradcam_worker.artifacts.dataset`. What is done is what is listed, and nothing else.
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

PLAN, NETWORK, SEAL = "backfill.json", "network.json", "dataset.json"
JSON, LINES = "application/json", "application/x-ndjson"
PATIENCE_S = 120.0  # with a store that does not answer
PART_BYTES = 32 * 1024 * 1024  # of one file of failed rows
LEFT = re.compile(r"failed(?:-[0-9]+)?\.jsonl\Z|overlays/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}/")
NAMED = 3  # of many, in a sentence


class LeftOut:
    """What is no part of an input because a backfill has written it: ask of each name, in order.

    Names are keys of a bucket, or paths. Left out is what lies in an output under a name that a backfill
    gives, and nothing else that lies there: in the backfill's own, and in others, whose plans are met first.
    """

    def __init__(self, place: str | None = None) -> None:
        """`place`: of the output, with a slash at its end unless it is a whole bucket; None: elsewhere."""
        self._place = place
        self._others: list[str] = []  # each inside the one before
        self.count = 0  # of names so far

    def __call__(self, name: str) -> bool:
        """Whether this name is left out."""
        while self._others and not name.startswith(self._others[-1]):
            self._others.pop()
        if name.rpartition("/")[2] == PLAN:
            self._others.append(name.removesuffix(PLAN))
        if self._place is None and not self._others:
            return False
        places = [one for one in (self._place, *self._others) if one is not None and name.startswith(one)]
        left = any(_is_left(name.removeprefix(one)) for one in places)
        self.count += left
        return left


def _is_left(name: str) -> bool:
    """Whether an object in an output is one that a backfill leaves there."""
    return name in {PLAN, NETWORK, SEAL} or key_of(name) is not None or LEFT.match(name) is not None


class DatasetDir:
    """A backfill's output. Raises StorageUnavailable, OutputNotAllowed where it cannot be used."""

    def __init__(self, store: Store) -> None:
        """`store` is opened at the output itself."""
        self._store = store
        self.uri = store.uri(PLAN).removesuffix(f"/{PLAN}")

    def plan(self) -> Plan | None:
        """Whose output this is. Raises BackfillConflict where nobody can tell."""
        text = self._find(PLAN)
        try:
            return Plan.model_validate_json(text) if text is not None else None
        except ValidationError as error:
            message = f"{self._store.uri(PLAN)} is there, and is no plan that this version can read."
            raise BackfillConflict(message) from error

    def held(self) -> Plan:
        """Whose output this is. Raises BackfillConflict where it is nobody's."""
        plan = self.plan()
        if plan is None:
            message = f"{self.uri} holds no backfill: there is no {PLAN}."
            raise BackfillConflict(message)
        return plan

    def agreed(self, asked: Plan, *, resume: bool, changed: bool) -> Plan:
        """The plan to be run: what is asked for, as the backfill that is here already, if one is.

        With `changed` its weights may be others. One of which nothing is done has no claim to the output.
        Raises BackfillConflict where another backfill is here, or, unless it is to `resume`, this one.
        """
        held, done = self.plan(), self.done()
        if held is None:
            if done:
                message = (
                    f"{self.uri} holds a dataset, and no {PLAN} that says of what: choose another output."
                )
                raise BackfillConflict(message)
            return asked
        # A list may have moved: whether its rows are the same, the keys of its shards tell.
        moved = asked.model_copy(update={"input": held.input}) if resume else asked
        meant = moved.model_copy(update={"weights_sha256": held.weights_sha256})
        differs = (meant if changed else moved).same_as(held)
        if differs and not done:
            return asked
        if differs:
            hint = "" if meant.same_as(held) else " To run again what that changes: --changed."
            message = f"{self.uri} holds another backfill. {differs}{hint} Or choose another output."
            raise BackfillConflict(message)
        if done and not resume:
            some = counted(len(done), "shard of it is", "shards of it are")
            far = "it is complete" if self.is_committed() else f"{some} done"
            message = f"{self.uri} holds this very backfill, and {far}: use --resume to go on with it."
            raise BackfillConflict(message)
        return asked.model_copy(update={"id": held.id, "created_at": held.created_at})

    def begin(self, plan: Plan) -> None:
        """Make it this backfill's. Raises BackfillConflict where it has become another's meanwhile."""
        held = self.plan()
        if held is not None and held.id != plan.id and self.done():
            message = (
                f"{self.uri} holds another backfill, of which a shard was done just now: "
                "choose another output."
            )
            raise BackfillConflict(message)
        if held == plan:
            return
        if held is not None and (held.id, held.weights_sha256) != (plan.id, plan.weights_sha256):
            self._store.remove(NETWORK)
        self._put(PLAN, plan.to_json().encode(), JSON)

    def discard_plan(self) -> None:
        """What lies here is no dataset, and nobody is to go on with it."""
        self._store.remove(PLAN)

    def network(self) -> NetworkRef | None:
        """What the shards so far were explained with."""
        text = self._find(NETWORK)
        return NetworkRef.model_validate_json(text) if text is not None else None

    def write_network(self, network: NetworkRef) -> None:
        """See `network`."""
        self._put(NETWORK, network.to_json().encode(), JSON)

    def done(self) -> dict[int, tuple[str, ...]]:
        """Keys of the shards that are done, by index: more than one where an input has changed meanwhile.

        Raises BackfillConflict where there is a table of somebody else's, too.
        """
        found: dict[int, tuple[str, ...]] = {}
        strange = []
        for name in self._store.names("data"):
            if key := key_of(name):
                index = int(key.partition("-")[0])
                found[index] = (*found.get(index, ()), key)
            elif name.endswith(".parquet") and name.count("/") == 1:
                strange.append(name.removeprefix("data/"))
        if strange:
            message = (
                f"{self._store.uri('data')} holds {_named(strange)}, which no backfill has written: whoever "
                "reads data/*.parquet would read that, too. Move it elsewhere."
            )
            raise BackfillConflict(message)
        return found

    def has(self, key: str) -> bool:
        """Whether a shard is done."""
        return self._find(data_key(key)) is not None

    def failed(self) -> frozenset[str]:
        """Keys of the shards of which rows failed."""
        return frozenset(filter(None, map(key_of, self._store.names("failed"))))

    def drop(self, key: str) -> None:
        """Remove what a shard has left: it is no part of the input any more."""
        self._store.remove(data_key(key))
        self._store.remove(failed_key(key))

    def is_committed(self) -> dict[str, Any] | None:
        """What the seal says, where all is there."""
        text = self._find(SEAL)
        return dict(json.loads(text)) if text is not None else None

    def uncommit(self) -> None:
        """Something is about to change."""
        self._store.remove(SEAL)

    def commit(
        self, plan: Plan, keys: Sequence[str], rows: int, network: NetworkRef | None, *, changed: bool
    ) -> dict[str, Any]:
        """Gather the failed rows, check that all is there and nothing else, and say so; return the seal.

        `keys` are all shards of the input, in its order. With `changed`, what is no part of the input any
        more is removed. Raises BackfillConflict where something is missing, or is there and should not be.
        """
        expected = frozenset(keys)
        there = {key for some in self.done().values() for key in some}
        if missing := sorted(expected - there):
            many = counted(len(missing), "shard is", "shards are")
            message = f"{many} done and not there: {_named(missing)}. Use --resume."
            raise BackfillConflict(message)
        extra = sorted(there - expected)
        if extra and not changed:
            message = (
                f"{self._store.uri('data')} holds {_named(extra)}, no part of the input: if that has become "
                "shorter, --changed removes them."
            )
            raise BackfillConflict(message)
        for key in sorted({*extra, *(self.failed() - expected)}):
            self.drop(key)
        codes: Counter[str] = Counter()
        files = self._gather(expected, codes)
        said = {
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
        self._put(SEAL, json.dumps(said, indent=2).encode(), JSON)
        return said

    def _gather(self, keys: Iterable[str], codes: Counter[str]) -> list[str]:
        """Write the failed rows of all shards, in parts that fit into memory; return the parts' names."""
        expected, files = frozenset(keys), []
        for number, part in enumerate(_parts(self._lines(expected, codes)), 1):
            files.append(_part(number))
            self._put(files[-1], part, LINES)
        number = len(files) + 1
        while self._find(_part(number)) is not None:  # of an earlier run, when more had failed
            self._store.remove(_part(number))
            number += 1
        return files

    def _lines(self, expected: frozenset[str], codes: Counter[str]) -> Iterator[bytes]:
        for key in sorted(self.failed() & expected):
            text = self._find(failed_key(key))
            if text is None:
                continue
            codes.update(_code(json.loads(line)) for line in text.splitlines())
            yield text

    def _find(self, key: str) -> bytes | None:
        return self._store.find(key, Deadline(PATIENCE_S))

    def _put(self, key: str, data: bytes, media_type: str) -> None:
        self._store.put_many([(key, data, media_type)], Deadline(PATIENCE_S))


class Weights:
    """With which weights, and at which layer, all shards of an output have to be explained."""

    def __init__(self, output: DatasetDir) -> None:
        """What the first shard was explained with, if that is known yet."""
        self._output, self.network = output, output.network()

    def pinned(self, shard: Shard) -> Shard:
        """The same shard, with which a worker that has other weights writes nothing."""
        known = self.network and self.network.weights_sha256
        return shard.model_copy(update={"weights_sha256": known}) if known else shard

    def differ(self, document: StatusDocument) -> str | None:
        """Take down what the first shard says that ended; what tells another one from it."""
        if document.network and not self.network:
            self._output.write_network(document.network)
            self.network = document.network
        both = document.network or self.network, self.network
        one, first = (found and f"weights {found.weights_sha256}, layer {found.layer}" for found in both)
        return None if one == first else f"{one}, those before with {first}"


def _parts(texts: Iterable[bytes]) -> Iterator[bytes]:
    """Texts joined, as many as fit into one part."""
    held: list[bytes] = []
    size = 0
    for text in texts:
        if held and size + len(text) > PART_BYTES:
            yield b"".join(held)
            held, size = [], 0
        held.append(text)
        size += len(text)
    if held:
        yield b"".join(held)


def _code(line: Mapping[str, Any]) -> str:
    return str(line["error"]["code"])


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMED:,} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def _part(number: int) -> str:
    return "failed.jsonl" if number == 1 else f"failed-{number}.jsonl"
