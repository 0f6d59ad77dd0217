"""What a backfill is, `gradcam.backfill/v1`, and its input cut into shards, one at a time.

A shard's key says what is in its file: the number of the shard and a digest of its rows, of what is wanted of
each, and of the weights. So the same input gives the same keys, and whoever goes on with a backfill, or runs
it again over an input that has changed, can tell from the names of the files what is still to be done.
"""

import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, StringConstraints, ValidationError, model_validator

from gradcam_worker.errors import InvalidRow
from gradcam_worker.schemas.ids import new_id, utc_now
from gradcam_worker.schemas.job import Job, Sha256
from gradcam_worker.schemas.model import RequestModel, describe
from gradcam_worker.schemas.options import MethodSpec, Metric, Name, OverlaySpec, Target
from gradcam_worker.schemas.shard import MAX_ROWS, Row, Shard
from gradcam_worker.schemas.status import Problem
from gradcam_worker.text.visible import visible

MAX_BYTES = (
    512 * 1024
)  # of a shard's rows as JSON: half of what a message may have, unless it is set otherwise
WISH_BYTES = 256 * 1024  # of everything else in a shard
UUID_PATTERN = r"^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
SHOWN = 1000  # characters of a URI that is only shown
WISH = ("network", "weights_sha256", "target", "method", "metrics", "artifacts")


class Plan(RequestModel):
    """`gradcam.backfill/v1`: what was asked for, of every row of the input; kept beside what came of it."""

    schema_: Literal["gradcam.backfill/v1"] = Field(default="gradcam.backfill/v1", alias="schema")
    # A UUID: those of its shards are made from it.
    id: Annotated[str, StringConstraints(pattern=UUID_PATTERN)] = Field(default_factory=new_id)
    input: Annotated[str, StringConstraints(min_length=1, max_length=4096)]  # fit to be shown
    output: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    network: Name
    weights_sha256: Sha256 | None = None  # which weights it must be; None: whichever the workers have
    target: Target
    method: MethodSpec = MethodSpec()
    metrics: Annotated[tuple[Metric, ...], Field(max_length=2)] = ()
    artifacts: Annotated[tuple[OverlaySpec, ...], Field(max_length=3)] = ()
    shard_rows: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 256
    created_at: AwareDatetime = Field(default_factory=utc_now)

    @model_validator(mode="after")
    def _as_jobs(self) -> Self:
        """What no job may ask for, no row can."""
        own = {"artifacts": self.artifacts} if self.artifacts else {}
        try:
            Job.model_validate(
                {
                    "image": "s3://bucket/key",
                    "network": self.network,
                    "target": self.target,
                    "method": self.method,
                    "metrics": self.metrics,
                    **own,
                }
            )
        except ValidationError as error:
            raise ValueError(describe(error).removeprefix("the message: ")) from error
        if len(json.dumps(self._wish())) > WISH_BYTES:
            message = f"the wish is longer than {WISH_BYTES:,} bytes as JSON: name fewer classes"
            raise ValueError(message)
        return self

    def _wish(self) -> dict[str, object]:
        return self.model_dump(mode="json", include=set(WISH), exclude_defaults=True)

    def same_as(self, other: "Plan") -> str | None:
        """None where `other`, which is there already, is the same backfill; else what tells them apart.

        That is one sentence, of the first difference. Ids, times and outputs tell nothing apart.
        """
        for name in ("input", *WISH, "shard_rows"):
            ours, theirs = (_said(getattr(one, name)) for one in (self, other))
            if ours != theirs:
                return f"Its {name} is {theirs}, and now {ours} is asked for."
        return None


def shards(
    rows: Iterable[Row], plan: Plan, *, keep: bool = False, max_bytes: int = MAX_BYTES
) -> Iterator[Shard]:
    """Cut rows into shards, each made when it is asked for; no more than one is held.

    A shard has `plan.shard_rows` rows, and fewer where they would exceed `max_bytes` as JSON. A row that
    alone is larger becomes a bad one: no message would take it.
    """
    wish = hashlib.sha256(json.dumps(plan._wish(), sort_keys=True).encode())  # noqa: SLF001  # of this module
    index = first = size = 0
    held: list[Row] = []
    texts: list[str] = []

    def cut() -> Shard:
        digest = wish.copy()
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
            method=plan.method,
            metrics=plan.metrics,
            artifacts=plan.artifacts,
            output=plan.output,
            keep=keep,
        )

    for given in rows:
        row, text = given, _text(given)
        needed = _sent(text)
        if needed > max_bytes:
            row = _too_long(given, needed, max_bytes)
            text = _text(row)
            needed = _sent(text)
        if held and (len(held) == plan.shard_rows or size + needed > max_bytes):
            yield cut()
            index, first, size = index + 1, first + len(held), 0
            held.clear()
            texts.clear()
        held.append(row)
        texts.append(text)
        size += needed
    if held:
        yield cut()


def _text(row: Row) -> str:
    """A row, as its shard's key is made from it: as earlier versions wrote it."""
    return row.model_dump_json(exclude_none=True, exclude={"problem": {"public_message"}})


def _sent(text: str) -> int:
    """How many bytes JSON needs in a message, at most: there, what is not ASCII is escaped."""
    return 1 + (len(text) if text.isascii() else len(json.dumps(text)))


def _too_long(row: Row, size: int, limit: int) -> Row:
    message = f"The row has {size:,} bytes as JSON; at most {limit:,} fit into a message."
    problem = Problem.of(InvalidRow(message), stage="plan", attempt=0)
    return row.model_copy(update={"uri": visible(row.uri[:SHOWN]), "problem": problem})


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_said, value))}]"
    if isinstance(value, RequestModel):
        return json.dumps(value.model_dump(mode="json", exclude_none=True))
    return json.dumps(value) if value is not None else "any"
