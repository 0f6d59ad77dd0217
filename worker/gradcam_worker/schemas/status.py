"""The wire format of a job's or shard's status, `gradcam.status/v1`, with its error."""

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
from gradcam_worker.schemas.model import ResponseModel, without_defaults
from gradcam_worker.text.urls import redacted
from gradcam_worker.text.visible import visible

Status = Literal["queued", "running", "retrying", "succeeded", "failed", "canceled", "expired"]


FINAL: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "expired"})


class Problem(ResponseModel):
    """The error of a job, as RFC 9457 problem details. The meaning of `code` is stable."""

    type: str
    title: str
    detail: str  # for operators: may contain settings, hosts, buckets and paths
    public_message: str = ""  # for end users: contains none of these; equal for equal codes
    code: str
    retryable: bool
    stage: str | None = None
    attempt: int

    @model_validator(mode="before")
    @classmethod
    def _fill_public_message(cls, fields: Any) -> Any:
        """Add the public message, which documents of earlier versions lack."""
        if isinstance(fields, dict) and "public_message" not in fields:
            return {**fields, "public_message": public_message(str(fields.get("code")))}
        return fields

    @classmethod
    def of(cls, error: GradcamError, *, stage: str | None, attempt: int) -> "Problem":
        """Describe an error, without traceback and secrets.

        Args:
            error: The error.
            stage: The stage of the job in which it occurred.
            attempt: The attempt.

        Returns:
            The problem.
        """
        return cls(
            type=f"urn:gradcam:problem:{error.code}",
            title=(type(error).__doc__ or error.code).split("\n")[0].rstrip("."),
            detail=_end_with_period(visible(redacted(str(error))[:2000])),
            public_message=error.public_message,
            code=error.code,
            retryable=error.retryable,
            stage=stage,
            attempt=attempt,
        )


def _end_with_period(text: str) -> str:
    """Add a period, which messages of libraries often lack."""
    return text if text.endswith((".", "?", ")")) else f"{text}."


class ClassScore(ResponseModel):
    """A class, its rank among all classes by score, and its probability."""

    rank: int
    id: int
    wnid: str
    name: str
    probability: float


class NetworkRef(ResponseModel):
    """The network that was explained."""

    name: str
    layer: str
    weights_sha256: Sha256 | None


class WorkerRef(ResponseModel):
    """The worker that ran the attempt."""

    id: str
    device: str


class ResultWarning(ResponseModel):
    """A warning about a result."""

    # zero_heatmap, incomplete_attributions, image_damaged; label_unknown, label_ambiguous, mask_unusable,
    # box_outside of annotations, class_unknown of a row's own classes; later versions may add others
    code: str
    class_id: int = -1  # for the first two; -1: it concerns the whole image
    missing: float | None = None  # for image_damaged: the missing share of the image, from 0 to 1
    detail: str | None = None  # a sentence


class ManifestRef(ResponseModel):
    """The URI of the manifest. If it exists, so does every object that it names."""

    manifest_uri: str
    manifest_sha256: Sha256


class RowSearch(ResponseModel):
    """The progress of the search for rows that kill their worker. Rows are numbered within the shard.

    After a worker has died while it ran a shard, the next attempt computes one group of rows at a time, and
    records the group before it computes it. After a worker has died in a group, the next attempt computes one
    row at a time. A row in which a worker has died is then left out.
    """

    group: tuple[int, int] | None = None  # the first and the last row of the current group
    row: int | None = None  # the current row, if computed alone
    left_out: tuple[int, ...] = ()  # rows in which a worker has died, the latest first

    @property
    def stage(self) -> str:
        """The stage for people and earlier versions: see `gradcam_worker.schemas.legacy_rows`."""
        if self.group:
            return "rows {} to {}".format(*self.group)
        left_out = f" but {','.join(map(str, self.left_out))}" if self.left_out else ""
        return f"row {self.row}{left_out}"


class RowState(ResponseModel):
    """The state of a shard's rows. Read it with `gradcam_worker.schemas.legacy_rows.row_state`."""

    done: int = 0  # rows that the running attempt has explained
    failed: dict[str, int] = Field(
        default_factory=dict
    )  # of a shard that succeeded: error code -> number of rows
    search: RowSearch | None = None  # after a worker has died while it ran the shard
    # Of a shard that succeeded: code of a warning about what is known of images -> number of rows.
    warnings: dict[str, int] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, serialize(self), ["warnings"])


class PassState(ResponseModel):
    """The passes of a job whose method only needs scores: each scores the image under some of the masks."""

    done: int
    total: int


class StatusDocument(ResponseModel):
    """`gradcam.status/v1`: the complete state of a job, the same in ledger, webhooks and SQL database."""

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
    traceparent: str | None = None  # W3C Trace Context: the trace of the job, if any
    rows: RowState | None = None  # of a shard; not in the JSON if None
    passes: PassState | None = None  # of a job by rise or occlusion; not in the JSON if None
    uncounted_attempts: int = 0  # by `device_occupied`, since the last replay; not in the JSON if 0

    @model_serializer(mode="wrap")
    def _without_empty_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what an earlier version does not write: the ledger compares its texts."""
        return without_defaults(self, serialize(self), ["rows", "passes", "uncounted_attempts"])

    def for_tenant(self) -> "StatusDocument":
        """The document as a tenant sees it.

        Returns:
            It without the worker's name, and with the public message in place of the error's detail, which
            may name settings, hosts, and the buckets of others.
        """
        problem = self.error
        error = problem and problem.model_copy(update={"detail": problem.public_message})
        return self.model_copy(update={"error": error, "worker": None})

    @property
    def final(self) -> bool:
        """Whether the job is finished: succeeded, failed, canceled or expired."""
        return self.status in FINAL


class StatusEvent(ResponseModel):
    """An event that a webhook receives."""

    type: str  # such as gradcam.job.succeeded
    timestamp: AwareDatetime
    data: StatusDocument
