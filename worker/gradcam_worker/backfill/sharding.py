"""Cuts the rows of an input into shards, one at a time.

The key of a shard is its index and a digest of its rows and of the plan's spec, weights included. The same
input gives the same keys, and the shard's files are named after them. So the names of the files in the output
tell which shards of a resumed backfill, or of a changed input, are still to be done.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator

from gradcam_worker.backfill.plan import Plan
from gradcam_worker.errors import InvalidRow
from gradcam_worker.schemas.shard import Row, Shard
from gradcam_worker.schemas.status import Problem
from gradcam_worker.text.visible import visible

MAX_ROWS_BYTES = 512 * 1024  # of a shard's rows as JSON: half of the default GRADCAM_MAX_MESSAGE_BYTES
LARGE_FIELDS = ("inputs", "annotations", "classes", "carried")  # of a row
MAX_SHOWN_URI = 1000  # characters that are kept of a URI that is too long to be sent


def cut_shards(rows: Iterable[Row], plan: Plan, *, max_bytes: int = MAX_ROWS_BYTES) -> Iterator[Shard]:
    """Cut rows into shards lazily; no more than one is in memory.

    Args:
        rows: The rows of the input, in order.
        plan: The backfill's.
        max_bytes: Of a shard's rows as JSON. A row that is larger by itself becomes one with a problem.

    Yields:
        Shards of `plan.shard_rows` rows, or fewer if they would exceed `max_bytes`.
    """
    spec_digest = hashlib.sha256(json.dumps(plan.spec(), sort_keys=True).encode())
    index = first = size = 0
    held: list[Row] = []
    texts: list[str] = []

    def make_shard() -> Shard:
        digest = spec_digest.copy()
        digest.update(f"\n{first}\n".encode())
        digest.update("\n".join(texts).encode())
        key = f"{index:08d}-{digest.hexdigest()[:16]}"
        return Shard(
            id=str(uuid.uuid5(uuid.UUID(plan.id), key)),
            backfill=plan.id,
            index=index,
            key=key,
            first=first,
            rows=tuple(held),
            network=plan.network,
            weights_sha256=plan.weights_sha256,
            target=plan.target,
            inputs=plan.inputs,
            method=plan.method,
            metrics=plan.metrics,
            artifacts=plan.artifacts,
            annotated=plan.annotated,
            features=plan.features,
            carried=plan.carried,
            output=plan.output,
        )

    for row in rows:
        fitting, text, row_bytes = _fit(row, max_bytes)
        if held and (len(held) == plan.shard_rows or size + row_bytes > max_bytes):
            yield make_shard()
            index, first, size = index + 1, first + len(held), 0
            held.clear()
            texts.clear()
        held.append(fitting)
        texts.append(text)
        size += row_bytes
    if held:
        yield make_shard()


def _fit(row: Row, max_bytes: int) -> tuple[Row, str, int]:
    """The row, or one with a problem if a message cannot hold it; its JSON; its bytes in a message."""
    text = _digest_text(row)
    size = _message_bytes(text)
    if size <= max_bytes:
        return row, text, size
    detail = f"The row has {size:,} bytes as JSON; at most {max_bytes:,} fit into a message."
    problem = Problem.of(InvalidRow(detail), stage="plan", attempt=0)
    uri = visible(row.uri[:MAX_SHOWN_URI])
    refused = row.model_copy(update={**dict.fromkeys(LARGE_FIELDS), "uri": uri, "problem": problem})
    text = _digest_text(refused)
    return refused, text, _message_bytes(text)


def _digest_text(row: Row) -> str:
    """The JSON of a row for the digest, which must stay as earlier versions wrote it."""
    return row.model_dump_json(exclude_none=True, exclude={"problem": {"public_message"}})


def _message_bytes(text: str) -> int:
    """The bytes that a row's JSON needs in a message, at most: characters beyond ASCII are escaped there."""
    return 1 + (len(text) if text.isascii() else len(json.dumps(text)))
