"""The wire: what crosses the queue and the status backend. JSON only, version 1.

Every model is frozen and refuses unknown fields by name. `deploy/schemas/` holds the JSON schemas
made from these models, and a test keeps both equal.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from gradcam_worker.errors import GradcamError, InvalidJob, public_message
from gradcam_worker.net.webhook_signing import PREFIX as SECRET
from gradcam_worker.schemas.model import MAX_URI_BYTES, Told, Wire, describe, new_id, too_long
from gradcam_worker.schemas.options import (
    AnimationWish,
    ArtifactWish,
    GridWish,
    HeatmapWish,
    Method,
    Metric,
    Name,
    OverlayWish,
    ReportWish,
    Target,
)
from gradcam_worker.text.urls import has_credentials, redacted, without_secrets
from gradcam_worker.text.visible import visible

__all__ = [  # what a job is made of is found here, wherever it is written down
    "FINAL",
    "ID_PATTERN",
    "AnimationWish",
    "ArtifactWish",
    "Event",
    "GridWish",
    "HeatmapWish",
    "ImageRef",
    "Job",
    "JobId",
    "ManifestRef",
    "Method",
    "Metric",
    "Name",
    "NetworkRef",
    "OverlayWish",
    "Priority",
    "Problem",
    "ReportWish",
    "SeenClass",
    "Sha256",
    "Status",
    "StatusDocument",
    "StatusEvent",
    "Target",
    "Warned",
    "Webhook",
    "WorkerRef",
]

ID_PATTERN = (
    r"^(?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"  # a UUID
    r"|[0-7][0-9A-HJKMNP-TV-Z]{25})$"  # or a ULID
)
Status = Literal["queued", "running", "retrying", "succeeded", "failed", "canceled", "expired"]
FINAL: frozenset[str] = frozenset({"succeeded", "failed", "canceled", "expired"})
HOW_ELSE = {
    "image.uri": "The worker reads s3:// with its own credentials, and https:// with a presigned URL."
}
Priority = Literal["high", "normal", "low", "bulk"]
Event = Literal[
    "job.queued",
    "job.started",
    "job.progress",
    "job.retrying",
    "job.succeeded",
    "job.failed",
    "job.canceled",
    "job.expired",
]
JobId = Annotated[str, StringConstraints(pattern=ID_PATTERN)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _not_too_long(uri: str) -> str:
    if why := too_long(uri):
        raise ValueError(why)
    return uri


Uri = Annotated[
    str,
    StringConstraints(min_length=1, max_length=2_000_000),  # a data: URI is long
    AfterValidator(_not_too_long),
    Field(json_schema_extra={"anyOf": [{"pattern": "^[Dd][Aa][Tt][Aa]:"}, {"maxLength": MAX_URI_BYTES}]}),
]
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # of one letter it is a drive of Windows
ShortText = Annotated[str, StringConstraints(max_length=256)]


def why_no_uri(uri: str) -> str | None:
    """Why a text names no image that a worker could fetch, and what would; None where it has a scheme."""
    if SCHEME.match(uri):
        return None
    shown = re.sub("[^/@]*@", "", uri.partition("?")[0])[:200]  # no user, no password, no query
    return (
        f"{shown!r} has no scheme: write s3://bucket/key, https://host/path, or file:///folder/name of a "
        "file that workers can read; upload_and_submit takes a file of this machine"
    )


def _no_image_itself(value: Any) -> Any:
    if isinstance(value, str):
        return value
    message = (
        f"an image is named by its URI, as s3://bucket/key, and is no {type(value).__name__}: "
        "client.upload_and_submit takes bytes, or the path of a file of this machine"
    )
    raise ValueError(message)


class ImageRef(Wire):
    """Where the image is; with `sha256`, which bytes it must be."""

    uri: Annotated[Uri, BeforeValidator(_no_image_itself)]
    sha256: Sha256 | None = None


class Webhook(Wire):
    """Somebody to tell: unless it says otherwise, how the job ended. `secret_ref` names a signing secret."""

    url: ShortText
    events: Annotated[tuple[Event, ...], Field(min_length=1)] = (
        "job.succeeded",
        "job.failed",
        "job.canceled",
        "job.expired",
    )
    secret_ref: Name | None = None


def _bare_uri(value: Any) -> Any:
    return value if isinstance(value, Mapping | ImageRef) else {"uri": value}


class Job(Wire):
    """`gradcam.job/v1`: one image to explain. Only image, network and target are required."""

    schema_: Literal["gradcam.job/v1"] = Field(default="gradcam.job/v1", alias="schema")
    id: JobId = Field(default_factory=new_id)
    idempotency_key: ShortText | None = None
    image: Annotated[ImageRef, BeforeValidator(_bare_uri)]
    network: Name
    target: Target
    method: Method = Method()
    artifacts: Annotated[tuple[ArtifactWish, ...], Field(min_length=1, max_length=8)] = (
        OverlayWish(),
        HeatmapWish(),
    )
    metrics: Annotated[tuple[Metric, ...], Field(max_length=2)] = ()
    output: Annotated[str, StringConstraints(max_length=1024)] | None = None
    priority: Priority = "normal"
    expires_at: AwareDatetime | None = None
    timeout_s: Annotated[float, Field(gt=0, le=300)] = 60
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    webhooks: Annotated[tuple[Webhook, ...], Field(max_length=4)] = ()
    metadata: Annotated[dict[ShortText, ShortText], Field(max_length=16, default_factory=dict)]
    traceparent: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{55}$")] | None = None

    @model_validator(mode="after")
    def _one_of_each_kind(self) -> Self:
        kinds = [f"{wish.kind} {wish.format}" for wish in self.artifacts]
        if len(set(kinds)) < len(kinds):
            message = f"artifacts holds one kind and format twice: {', '.join(kinds)}"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _without_credentials(self) -> Self:
        """What is refused anyway is refused before it is kept: the ledger holds a failed job as it came."""
        places = [("image.uri", self.image.uri), ("output", self.output or "")]
        places += [(f"webhooks.{index}.url", hook.url) for index, hook in enumerate(self.webhooks)]
        for name, uri in places:
            if has_credentials(uri):
                message = (
                    f"{name} holds a user or a password ({without_secrets(uri)[:200]}), which would be kept: "
                    f"give a URL without. {HOW_ELSE.get(name, '')}"
                )
                raise ValueError(message.rstrip(". "))
        for index, hook in enumerate(self.webhooks):
            if (hook.secret_ref or "").startswith(SECRET):
                message = f"webhooks.{index}.secret_ref must be the name of a webhook secret, and is one"
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.metrics and self.method.name == "notebook":
            message = "metrics cannot be had of the method notebook, whose image is not preprocessed"
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
        # Without defaults, so that a later version with one more field still knows its jobs.
        own = {"id", "idempotency_key", "traceparent"}
        kinds = [wish.kind for wish in self.artifacts]  # a default in each of them, and so not in the rest
        return f"{kinds} {self.model_dump_json(exclude=own, exclude_defaults=True)}"


class Problem(Told):
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
    def _of_before(cls, given: Any) -> Any:
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
            detail=_sentence(visible(redacted(str(error)[:2000]))),
            public_message=error.public_message,
            code=error.code,
            retryable=error.retryable,
            stage=stage,
            attempt=attempt,
        )


def _sentence(text: str) -> str:
    """What libraries say often lacks its full stop."""
    return text if text.endswith((".", "?", ")")) else f"{text}."


class SeenClass(Told):
    """A class, its place among all classes by score, and its probability."""

    rank: int
    id: int
    wnid: str
    name: str
    probability: float


class NetworkRef(Told):
    """The network that looked."""

    name: str
    layer: str
    weights_sha256: Sha256 | None


class WorkerRef(Told):
    """The worker that did it."""

    id: str
    device: str


class Warned(Told):
    """Something the reader of a result should know."""

    code: str  # zero_heatmap, image_damaged; a later version may know of more
    class_id: int = -1  # of zero_heatmap; -1: it is about the whole image
    missing: float | None = None  # of image_damaged: the share of the image that is not there, from 0 to 1
    detail: str | None = None  # in words


class ManifestRef(Told):
    """Where the manifest is: its presence means that everything it names is there."""

    manifest_uri: str
    manifest_sha256: Sha256


class StatusDocument(Told):
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
    predictions: tuple[SeenClass, ...] = ()
    result: ManifestRef | None = None
    warnings: tuple[Warned, ...] = ()
    error: Problem | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    traceparent: str | None = None  # W3C: in which trace it is to be found, where there is one

    @property
    def final(self) -> bool:
        """Whether nothing more will happen to this job."""
        return self.status in FINAL


class StatusEvent(Told):
    """What a webhook receives."""

    type: str  # gradcam.job.succeeded and so on
    timestamp: AwareDatetime
    data: StatusDocument
