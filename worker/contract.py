"""The wire: what crosses the queue and the status backend. JSON only, version 1.

Every model is frozen and refuses unknown fields by name. `deploy/schemas/` holds the JSON schemas
made from these models, and a test keeps both equal.
"""

import re
import secrets
import time
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from worker.errors import GradcamError, InvalidJob

ID_PATTERN = (
    r"^(?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"  # a UUID
    r"|[0-7][0-9A-HJKMNP-TV-Z]{25})$"  # or a ULID
)
Status = Literal["queued", "running", "retrying", "succeeded", "failed", "canceled", "expired"]
FINAL: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "expired"})
Priority = Literal["high", "normal", "low", "bulk"]
Event = Literal["job.started", "job.retrying", "job.succeeded", "job.failed", "job.expired"]
JobId = Annotated[str, StringConstraints(pattern=ID_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Uri = Annotated[str, StringConstraints(min_length=1, max_length=2_000_000)]  # a data: URI is long
ShortText = Annotated[str, StringConstraints(max_length=256)]
ClassWish = int | Annotated[str, StringConstraints(min_length=1, max_length=128)]


def utc_now() -> datetime:
    """The time now, aware, in UTC."""
    return datetime.now(UTC)


def new_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): ids sort by the millisecond in which they were made."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 7 << 76  # version 7
    return str(uuid.UUID(int=value & ~(3 << 62) | 2 << 62))  # variant of RFC 9562


class Wire(BaseModel):
    """What every model on the wire has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    def to_json(self) -> str:
        """The model as JSON text, always the same text for the same model."""
        return self.model_dump_json()


class ImageRef(Wire):
    """Where the image is; with `sha256`, which bytes it must be."""

    uri: Uri
    sha256: Sha256 | None = None


class Target(Wire):
    """Which classes to explain: exactly one of the two."""

    top_n: Annotated[int, Field(ge=1, le=1000)] | None = None
    classes: Annotated[tuple[ClassWish, ...], Field(min_length=1, max_length=1000)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.top_n is None) == (self.classes is None):
            given = "neither" if self.top_n is None else "both"
            message = f"exactly one of top_n and classes is needed, {given} given"
            raise ValueError(message)
        return self


class Method(Wire):
    """How to compute the heatmaps."""

    name: Literal["gradcam"] = "gradcam"
    layer: ShortText | None = None  # None: the network's own target layer
    score: Literal["logit"] = "logit"
    normalize: Literal["per_class"] = "per_class"


class OverlayWish(Wire):
    """One picture a class: the heatmap laid over the photo, at the photo's size."""

    kind: Literal["overlay"] = "overlay"
    format: Literal["jpeg"] = "jpeg"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.4
    colormap: Literal["jet", "turbo", "viridis", "inferno", "magma"] = "jet"


class HeatmapWish(Wire):
    """One array file: all heatmaps on the network's own grid, float32."""

    kind: Literal["heatmap"] = "heatmap"
    format: Literal["npz"] = "npz"


ArtifactWish = Annotated[OverlayWish | HeatmapWish, Field(discriminator="kind")]


class Webhook(Wire):
    """Somebody to tell. `secret_ref` names a signing secret; signing is not offered yet."""

    url: ShortText
    events: Annotated[tuple[Event, ...], Field(min_length=1)] = ("job.succeeded", "job.failed")
    secret_ref: None = None


def _bare_uri(value: Any) -> Any:
    return {"uri": value} if isinstance(value, str) else value


class Job(Wire):
    """`gradcam.job/v1`: one image to explain. Only image, network and target are required."""

    schema_: Literal["gradcam.job/v1"] = Field(default="gradcam.job/v1", alias="schema")
    id: JobId = Field(default_factory=new_id)
    idempotency_key: ShortText | None = None
    image: Annotated[ImageRef, BeforeValidator(_bare_uri)]
    network: ShortText
    target: Target
    method: Method = Method()
    artifacts: Annotated[tuple[ArtifactWish, ...], Field(min_length=1, max_length=8)] = (
        OverlayWish(),
        HeatmapWish(),
    )
    output: Annotated[str, StringConstraints(max_length=1024)] | None = None
    priority: Priority = "normal"
    expires_at: AwareDatetime | None = None
    timeout_s: Annotated[float, Field(gt=0, le=300)] = 60
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    webhooks: Annotated[tuple[Webhook, ...], Field(max_length=4)] = ()
    metadata: Annotated[dict[ShortText, ShortText], Field(max_length=16)] = {}
    traceparent: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{55}$")] | None = None

    @model_validator(mode="after")
    def _one_of_each_kind(self) -> Self:
        kinds = [wish.kind for wish in self.artifacts]
        if len(set(kinds)) < len(kinds):
            message = f"artifacts holds one kind twice: {', '.join(kinds)}"
            raise ValueError(message)
        return self

    @classmethod
    def parse(cls, payload: object) -> "Job":
        """JSON data -> a job. Raises InvalidJob with every field that is wrong and why."""
        try:
            return cls.model_validate(payload)
        except ValidationError as error:
            message = f"This is not a job: {describe(error)}."
            raise InvalidJob(message) from error

    def fingerprint(self) -> str:
        """What makes two jobs the same: everything but their ids, keys and trace."""
        return self.model_dump_json(exclude={"id", "idempotency_key", "traceparent"})


def describe(error: ValidationError) -> str:
    """Pydantic's findings as one sentence: `target.top_n: Input should be ... (received 0)`."""
    findings = []
    for found in error.errors(include_url=False):
        place = ".".join(str(step) for step in found["loc"]) or "the message"
        what = re.sub("^Value error, ", "", found["msg"])
        if found["type"] == "extra_forbidden":
            what = "unknown field"
        received = "" if isinstance(found["input"], dict | list) else f" (received {found['input']!r:.80})"
        findings.append(f"{place}: {what}{received if found['type'] != 'missing' else ''}")
    return "; ".join(findings[:8])


class Problem(Wire):
    """Why a job failed: RFC 9457 problem details, with a code that is a promise."""

    type: str
    title: str
    detail: str
    code: str
    retryable: bool
    stage: str | None = None
    attempt: int

    @classmethod
    def of(cls, error: GradcamError, *, stage: str | None, attempt: int) -> "Problem":
        """An error of the tree -> what goes over the wire. No traceback, no secret."""
        return cls(
            type=f"urn:gradcam:problem:{error.code}",
            title=(type(error).__doc__ or error.code).split("\n")[0].rstrip("."),
            detail=_sentence(str(error)[:2000]),
            code=error.code,
            retryable=error.retryable,
            stage=stage,
            attempt=attempt,
        )


def _sentence(text: str) -> str:
    """What libraries say often lacks its full stop."""
    return text if text.endswith((".", "?", ")")) else f"{text}."


class SeenClass(Wire):
    """A class, its place among all classes by score, and its probability."""

    rank: int
    id: int
    wnid: str
    name: str
    probability: float


class NetworkRef(Wire):
    """The network that looked."""

    name: str
    layer: str
    weights_sha256: Sha256 | None


class WorkerRef(Wire):
    """The worker that did it."""

    id: str
    device: str


class Warned(Wire):
    """Something the reader of a result should know."""

    code: Literal["zero_heatmap"]
    class_id: int


class ManifestRef(Wire):
    """Where the manifest is: its presence means that everything it names is there."""

    manifest_uri: str
    manifest_sha256: Sha256


class StatusDocument(Wire):
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
    metrics: dict[str, float] = {}
    predictions: tuple[SeenClass, ...] = ()
    result: ManifestRef | None = None
    warnings: tuple[Warned, ...] = ()
    error: Problem | None = None
    metadata: dict[str, str] = {}

    @property
    def final(self) -> bool:
        """Whether nothing more will happen to this job."""
        return self.status in FINAL


class StatusEvent(Wire):
    """What a webhook receives."""

    type: str  # gradcam.job.succeeded and so on
    timestamp: AwareDatetime
    data: StatusDocument


class Delivery(Wire):
    """`gradcam.deliver`: an event on its way to one webhook."""

    url: str
    event: StatusEvent
    attempt: int = 1
