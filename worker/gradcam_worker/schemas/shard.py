"""The wire: a shard of a backfill, `gradcam.shard/v1`: many images, one message, one file."""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal, get_args

from pydantic import Field, StringConstraints, ValidationError

from gradcam_worker.errors import InvalidJob
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import Job, JobId, Priority, Sha256, ShortText, Webhook
from gradcam_worker.schemas.model import RequestModel, describe
from gradcam_worker.schemas.options import MethodSpec, Metric, Name, OverlaySpec, Target
from gradcam_worker.schemas.status import Problem

ROUTE = "shard"  # shards wait in a queue of their own, behind everybody
ROUTES = (*get_args(Priority), ROUTE)
MAX_ROWS = 4096
READERS = 8  # images of one shard that are fetched at once
DATASET = "gradcam.dataset/v1"  # what all its files are together
KEY = r"[0-9]{8}-[0-9a-f]{16}"  # of a shard: its index and a digest, see `gradcam_worker.backfill.sharding`


class Row(RequestModel):
    """One line of the input. With a `problem` its `uri` is what was received, as far as that can be shown."""

    uri: Annotated[str, StringConstraints(max_length=2_000_000)]
    id: ShortText | None = None  # the reader's own name for it
    sha256: Sha256 | None = None  # which bytes it must be
    version: ShortText | None = None  # what tells another content at the same place: an ETag, size and time
    problem: Problem | None = None


class Shard(RequestModel):
    """`gradcam.shard/v1`: rows `first`, `first` + 1, ... of a backfill's input, and what it wants of each.

    It leaves one Parquet file below `output`: `data/<key>.parquet` (see
    `gradcam_worker.artifacts.dataset`), written last.
    """

    schema_: Literal["gradcam.shard/v1"] = Field(default="gradcam.shard/v1", alias="schema")
    id: JobId = Field(default_factory=new_id)
    backfill: JobId
    index: Annotated[int, Field(ge=0)]  # of the shard, from 0
    key: Annotated[str, StringConstraints(pattern=f"^{KEY}$")]
    first: Annotated[int, Field(ge=0)]  # number of its first row in the input, from 0
    rows: Annotated[tuple[Row, ...], Field(min_length=1, max_length=MAX_ROWS)]
    network: Name
    weights_sha256: Sha256 | None = None  # which weights it must be; None: whichever the worker has
    target: Target
    method: MethodSpec = MethodSpec()
    metrics: Annotated[tuple[Metric, ...], Field(max_length=2)] = ()
    artifacts: Annotated[tuple[OverlaySpec, ...], Field(max_length=3)] = ()
    output: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    # What its submitter got from the ledger: see `gradcam_worker.backfill.registry`. '': an older
    # version submitted it.
    token: Annotated[str, StringConstraints(max_length=64)] = Field(default="", repr=False)
    keep: bool = False  # rows that succeeded in the file that is there are taken over
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 7200
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 8

    def to_json(self) -> str:
        """Without defaults: there are many rows."""
        said = self.model_dump(mode="json", exclude_defaults=True)
        return json.dumps({"schema": self.schema_, **said}, separators=(",", ":"))

    def fingerprint(self) -> str:
        """What makes two shards the same."""
        return f"{self.backfill} {self.key} {self.keep}"


Work = Job | Shard


@dataclass(frozen=True)
class Terms:
    """On which terms the ledger keeps a job or a shard, and has it run."""

    route: str  # a job's priority, or `ROUTE`
    max_attempts: int
    metadata: dict[str, str]  # what its status document says beside the facts
    idempotency_key: str | None = None
    expires_at: datetime | None = None  # None: it waits for as long as it takes
    traceparent: str | None = None  # None: it begins a trace of its own, where there are traces
    webhooks: tuple[Webhook, ...] = ()


def terms_of(work: Work) -> Terms:
    """The terms of a job or a shard. A shard has no key, no end of waiting and no webhook."""
    if isinstance(work, Shard):
        return Terms(ROUTE, work.max_attempts, {"backfill": work.backfill, "shard": str(work.index)})
    return Terms(
        work.priority,
        work.max_attempts,
        work.metadata,
        work.idempotency_key,
        work.expires_at,
        work.traceparent,
        work.webhooks,
    )


def data_key(key: str) -> str:
    """Where a shard's file is."""
    return f"data/{key}.parquet"


def failed_key(key: str) -> str:
    """Where a shard's failed rows are."""
    return f"failed/{key}.jsonl"


def key_of(name: str) -> str | None:
    """The key of the shard that has left an object of this name; None where none has."""
    key = name.partition("/")[2].partition(".")[0]
    return key if re.fullmatch(KEY, key) and name in {data_key(key), failed_key(key)} else None


def parse(payload: object) -> Work:
    """JSON data -> a job or a shard. Raises InvalidJob with every field that is wrong and why."""
    if not isinstance(payload, dict) or payload.get("schema") != "gradcam.shard/v1":
        return Job.parse(payload)
    try:
        return Shard.model_validate(payload)
    except ValidationError as error:
        message = f"This is not a shard: {describe(error)}."
        raise InvalidJob(message) from error
