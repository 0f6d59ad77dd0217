"""The wire format of a shard, `gradcam.shard/v1`: a part of a backfill, with many images in one message."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from gradcam_worker.schemas.annotations import Annotations
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.job import JobId, Sha256, ShortText
from gradcam_worker.schemas.model import RequestModel
from gradcam_worker.schemas.options import (
    Inputs,
    MethodSpec,
    Metric,
    Name,
    OverlaySpec,
    RequestedClass,
    Target,
)
from gradcam_worker.schemas.status import Problem

MAX_ROWS = 4096
READERS = 8  # simultaneous fetches of images of one shard
DATASET = "gradcam.dataset/v1"  # the schema of a backfill's output
MAX_COLUMNS = 1000  # that are carried from the input into the dataset
KEY = r"[0-9]{8}-[0-9a-f]{16}"  # of a shard: index and digest, see `gradcam_worker.backfill.sharding`


class Row(RequestModel):
    """One row of a backfill's input. With a `problem`, `uri` is what was received, if that can be shown."""

    uri: Annotated[str, StringConstraints(max_length=2_000_000)]
    id: ShortText | None = None  # the submitter's own id of the row
    sha256: Sha256 | None = None  # of the image
    version: ShortText | None = None  # changes with the content at the URI: an ETag, or size and time
    inputs: Inputs | None = None  # what the network takes beside this image
    problem: Problem | None = None
    annotations: Annotations | None = None  # what is known about the image
    classes: Annotated[tuple[RequestedClass, ...], Field(max_length=100)] | None = None  # beside the target's
    # Values of further columns of the input, in the order of `Shard.carried`, as JSON: times and decimals
    # are texts. What is missing at the end is null.
    carried: Annotated[tuple[Any, ...], Field(max_length=MAX_COLUMNS)] | None = None

    @property
    def uris(self) -> tuple[str, ...]:
        """What is fetched for it: its image, and the mask if that is a picture."""
        mask = self.annotations.mask if self.annotations else None
        return (self.uri, mask.uri) if mask and mask.uri else (self.uri,)


# Columns of the dataset that are the input's own: name -> Arrow type, see `gradcam_worker.artifacts.columns`.
CarriedColumns = Annotated[
    dict[
        Annotated[str, StringConstraints(min_length=1, max_length=256)],
        Annotated[str, StringConstraints(max_length=4096)],
    ],
    Field(max_length=MAX_COLUMNS),
]


class Shard(RequestModel):
    """`gradcam.shard/v1`: rows `first`, `first` + 1, ... of a backfill's input, and how to explain them.

    The result is the Parquet file `data/<key>.parquet` below `output`, which is written last: see
    `gradcam_worker.artifacts.dataset`.
    """

    schema_: Literal["gradcam.shard/v1"] = Field(default="gradcam.shard/v1", alias="schema")
    id: JobId = Field(default_factory=new_id)
    backfill: JobId
    index: Annotated[int, Field(ge=0)]  # the number of the shard, from 0
    key: Annotated[str, StringConstraints(pattern=f"^{KEY}$")]
    first: Annotated[int, Field(ge=0)]  # the number of its first row in the input, from 0
    rows: Annotated[tuple[Row, ...], Field(min_length=1, max_length=MAX_ROWS)]
    network: Name
    weights_sha256: Sha256 | None = None  # of the weights to use; None: those of the worker
    target: Target
    inputs: Inputs = Field(default_factory=dict)  # beside each image; a row's own come first
    method: MethodSpec = MethodSpec()
    metrics: Annotated[tuple[Metric, ...], Field(max_length=4)] = ()
    artifacts: Annotated[tuple[OverlaySpec, ...], Field(max_length=3)] = ()
    annotated: bool = False  # rows have annotations: the dataset has columns for what follows from them
    features: bool = False  # the dataset gets what the network looks at as a vector
    carried: CarriedColumns = Field(default_factory=dict)
    output: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    # The submitter's token from the registry of backfills: see `gradcam_worker.backfill.registry`. Empty: an
    # earlier version submitted the shard.
    token: Annotated[str, StringConstraints(max_length=64)] = Field(default="", repr=False)
    keep: bool = False  # take over the succeeded rows of an existing result
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 7200
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 8

    def to_json(self) -> str:
        """Serialize as JSON, without defaults: a shard has many rows."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        if self.method.is_named:  # a name that was left open is not gradcam for every network
            fields["method"] = {"name": self.method.name, **fields.get("method", {})}
        return json.dumps({"schema": self.schema_, **fields}, separators=(",", ":"))

    def fingerprint(self) -> str:
        """Get a text that is equal for equal shards."""
        return f"{self.backfill} {self.key} {self.keep}"


def data_key(key: str) -> str:
    """The name of a shard's Parquet file, by the shard's key."""
    return f"data/{key}.parquet"


def failed_key(key: str) -> str:
    """The name of the file with a shard's failed rows, by the shard's key."""
    return f"failed/{key}.jsonl"


def key_of(name: str) -> str | None:
    """The key of the shard that wrote an object with this name; None for other names."""
    key = name.partition("/")[2].partition(".")[0]
    return key if re.fullmatch(KEY, key) and name in {data_key(key), failed_key(key)} else None
