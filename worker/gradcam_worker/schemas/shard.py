"""The wire format of a shard, `gradcam.shard/v1`: a part of a backfill, with many images in one message."""

import hashlib
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
MERGED_PREFIX = "merged-"
MERGED = rf"{MERGED_PREFIX}{KEY}"  # a file with many shards, see `gradcam_worker.artifacts.merged_files`
PLACE = rf"{KEY}|{MERGED}/[0-9]{{1,9}}"  # of rows: the file of a shard, or a row group of a merged one
# What of a row, and of a shard, decides what the result of the row is. Weights are in the metadata of files.
ROW_IDENTITY = {"uri", "version", "sha256", "inputs", "classes", "annotations"}
WISH = {"network", "target", "inputs", "method", "metrics", "artifacts", "features"}


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
    # Where rows may be found that were explained already: see `row_digests`. Their results are taken over.
    reuse: Annotated[
        tuple[Annotated[str, StringConstraints(pattern=f"^({PLACE})$")], ...], Field(max_length=MAX_ROWS)
    ] = ()
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 7200
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 8

    def to_json(self) -> str:
        """Serialize as JSON, without defaults: a shard has many rows."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        if self.method.is_named:  # a name that was left open is not gradcam for every network
            fields["method"] = {"name": self.method.name, **fields.get("method", {})}
        return json.dumps({"schema": self.schema_, **fields}, separators=(",", ":"))

    def row_digests(self) -> tuple[str | None, ...]:
        """Digest what each row is and what is asked of it; of rows with equal digests one is computed.

        Returns:
            16 hexadecimal digits for each row; None for a row with a problem, which has no result.
        """
        wish = self.model_dump(mode="json", include=WISH, exclude_defaults=True)
        wish["method"] = {"name": self.method.name, **wish.get("method", {})}
        start = hashlib.blake2b(json.dumps(wish, sort_keys=True).encode(), digest_size=8)
        return tuple(None if row.problem else _row_digest(start.copy(), row) for row in self.rows)

    def fingerprint(self) -> str:
        """Get a text that is equal for equal shards."""
        return f"{self.backfill} {self.key} {self.keep}"


def _row_digest(digest: hashlib.blake2b, row: Row) -> str:
    text = row.model_dump_json(include=ROW_IDENTITY, exclude_none=True)
    digest.update(text.encode(errors="surrogatepass"))
    return digest.hexdigest()


def data_key(name: str) -> str:
    """The name of a Parquet file, by the shard's key, or by the name of a merged file."""
    return f"data/{name}.parquet"


def failed_key(key: str) -> str:
    """The name of the file with a shard's failed rows, by the shard's key."""
    return f"failed/{key}.jsonl"


def key_of(name: str) -> str | None:
    """The key of the shard that wrote an object with this name; None for other names."""
    key = name.partition("/")[2].partition(".")[0]
    return key if re.fullmatch(KEY, key) and name in {data_key(key), failed_key(key)} else None


def merged_name_of(name: str) -> str | None:
    """The name of a merged file without folder and ending, by the name of its object; None for others."""
    merged = name.partition("/")[2].partition(".")[0]
    return merged if re.fullmatch(MERGED, merged) and name == data_key(merged) else None


def place_in(merged: str, group: int) -> str:
    """The place of a row group of a merged file, for `Shard.reuse`."""
    return f"{merged}/{group}"


def split_place(place: str) -> tuple[str, int | None]:
    """The file of a place, and the row group if it is a merged file."""
    name, _, group = place.partition("/")
    return name, int(group) if group else None
