"""What is known about a job or shard, and why one failed: `gradcam.status/v1` and what it is made of."""

from typing import Any, Literal

from pydantic import (
    AwareDatetime,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from gradcam_worker.errors import GradcamError, public_message
from gradcam_worker.schemas.job import JobId, Sha256
from gradcam_worker.schemas.model import ResponseModel
from gradcam_worker.text.urls import redacted
from gradcam_worker.text.visible import visible

Status = Literal["queued", "running", "retrying", "succeeded", "failed", "canceled", "expired"]


FINAL: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "expired"})


class Problem(ResponseModel):
    """Why a job failed: RFC 9457 problem details, with a code that is a promise."""

    type: str
    title: str
    detail: str  # for operators: it may name settings, hosts, buckets and paths
    public_message: str = ""  # for end users: it names none, and is the same for every problem of this code
    code: str
    retryable: bool
    stage: str | None = None
    attempt: int

    @model_validator(mode="before")
    @classmethod
    def _fill_public_message(cls, given: Any) -> Any:
        """What an earlier version wrote lacks its public message."""
        if isinstance(given, dict) and "public_message" not in given:
            return {**given, "public_message": public_message(str(given.get("code")))}
        return given

    @classmethod
    def of(cls, error: GradcamError, *, stage: str | None, attempt: int) -> "Problem":
        """An error of the tree -> what goes over the wire. No traceback, no secret."""
        return cls(
            type=f"urn:gradcam:problem:{error.code}",
            title=(type(error).__doc__ or error.code).split("\n")[0].rstrip("."),
            detail=_sentence(visible(redacted(str(error))[:2000])),
            public_message=error.public_message,
            code=error.code,
            retryable=error.retryable,
            stage=stage,
            attempt=attempt,
        )


def _sentence(text: str) -> str:
    """What libraries say often lacks its full stop."""
    return text if text.endswith((".", "?", ")")) else f"{text}."


class ClassScore(ResponseModel):
    """A class, its place among all classes by score, and its probability."""

    rank: int
    id: int
    wnid: str
    name: str
    probability: float


class NetworkRef(ResponseModel):
    """The network that looked."""

    name: str
    layer: str
    weights_sha256: Sha256 | None


class WorkerRef(ResponseModel):
    """The worker that did it."""

    id: str
    device: str


class ResultWarning(ResponseModel):
    """Something the reader of a result should know."""

    code: str  # zero_heatmap, image_damaged; a later version may know of more
    class_id: int = -1  # of zero_heatmap; -1: it is about the whole image
    missing: float | None = None  # of image_damaged: the share of the image that is not there, from 0 to 1
    detail: str | None = None  # in words


class ManifestRef(ResponseModel):
    """Where the manifest is: its presence means that everything it names is there."""

    manifest_uri: str
    manifest_sha256: Sha256


class RowSearch(ResponseModel):
    """How far the search for rows that end their worker process has come. A row is its place in the shard.

    After a worker died under a shard, the next attempt computes one group of rows at a time, and says before
    each which it is. After a worker died under a group, the next attempt computes one row at a time. A row
    under which a worker died is left out from then on.
    """

    group: tuple[int, int] | None = None  # the first and the last row of the group that is computed
    row: int | None = None  # the row that is computed by itself
    left_out: tuple[int, ...] = ()  # rows under which a worker died, the last one first

    @property
    def stage(self) -> str:
        """In words, for people, and for earlier workers: see `gradcam_worker.schemas.earlier`."""
        if self.group:
            return "rows {} to {}".format(*self.group)
        but = f" but {','.join(map(str, self.left_out))}" if self.left_out else ""
        return f"row {self.row}{but}"


class RowState(ResponseModel):
    """What a shard's document says of its rows. `gradcam_worker.schemas.earlier.row_state` reads it."""

    done: int = 0  # rows that the running attempt has explained
    failed: dict[str, int] = Field(default_factory=dict)  # of a shard that succeeded: code -> rows
    search: RowSearch | None = None  # after a worker died under the shard


class StatusDocument(ResponseModel):
    """`gradcam.status/v1`: the whole truth about a job, the same in every backend."""

    schema_: Literal["gradcam.status/v1"] = Field(default="gradcam.status/v1", alias="schema")
    id: JobId
    status: Status
    stage: str | None = None
    revision: int = 1
    attempt: int = 0
    max_attempts: int
    created_at: AwareDatetime
    queued_at: AwareDatetime
    started_at: AwareDatetime | None = None
    updated_at: AwareDatetime
    completed_at: AwareDatetime | None = None
    expires_at: AwareDatetime | None = None
    cancel_requested_at: AwareDatetime | None = None
    network: NetworkRef | None = None
    worker: WorkerRef | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    predictions: tuple[ClassScore, ...] = ()
    result: ManifestRef | None = None
    warnings: tuple[ResultWarning, ...] = ()
    error: Problem | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    traceparent: str | None = None  # W3C: in which trace it is to be found, where there is one
    rows: RowState | None = None  # of a shard; left out of the JSON where there is nothing to say

    @model_serializer(mode="wrap")
    def _without_empty_rows(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The ledger compares the text of a fresh document, which an earlier version may have written."""
        fields: dict[str, Any] = serialize(self)
        if self.rows is None:
            fields.pop("rows", None)
        return fields

    @property
    def final(self) -> bool:
        """Whether nothing more will happen to this job."""
        return self.status in FINAL


class StatusEvent(ResponseModel):
    """What a webhook receives."""

    type: str  # gradcam.job.succeeded and so on
    timestamp: AwareDatetime
    data: StatusDocument
