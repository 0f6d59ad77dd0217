"""The wire: what crosses the queue and the status backend. JSON only, version 1.

Every model is frozen and refuses unknown fields by name. `deploy/schemas/` holds the JSON schemas
made from these models, and a test keeps both equal.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, Required, Self, TypedDict, Unpack

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from gradcam_worker.errors import InvalidJob
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.model import MAX_URI_BYTES, RequestModel, describe, too_long
from gradcam_worker.schemas.model import WEBHOOK_SECRET_PREFIX as SECRET
from gradcam_worker.schemas.options import (
    AnimationSpec,
    ArtifactSpec,
    GridSpec,
    HeatmapSpec,
    MethodSpec,
    Metric,
    Name,
    OverlaySpec,
    ReportSpec,
    Target,
)
from gradcam_worker.text.urls import has_credentials, without_secrets

__all__ = [
    "ID_PATTERN",
    "AnimationSpec",
    "ArtifactSpec",
    "Event",
    "GridSpec",
    "HeatmapSpec",
    "ImageRef",
    "Job",
    "JobDetails",
    "JobFields",
    "JobId",
    "MethodSpec",
    "Metric",
    "Name",
    "OverlaySpec",
    "Priority",
    "ReportSpec",
    "Sha256",
    "Target",
    "Webhook",
]

ID_PATTERN = (
    r"^(?:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"  # a UUID
    r"|[0-7][0-9A-HJKMNP-TV-Z]{25})$"  # or a ULID
)
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
        "file that workers can read"
    )


def _no_image_itself(value: Any) -> Any:
    if isinstance(value, str):
        return value
    message = (
        f"an image is named by its URI, as s3://bucket/key, and is no {type(value).__name__}: "
        "client.upload_and_submit takes bytes, or the path of a file of this machine"
    )
    raise ValueError(message)


class ImageRef(RequestModel):
    """Where the image is; with `sha256`, which bytes it must be."""

    uri: Annotated[Uri, BeforeValidator(_no_image_itself)]
    sha256: Sha256 | None = None


class Webhook(RequestModel):
    """Somebody to tell: unless it says otherwise, how the job ended. `secret_ref` names a signing secret."""

    url: ShortText
    events: Annotated[tuple[Event, ...], Field(min_length=1)] = (
        "job.succeeded",
        "job.failed",
        "job.canceled",
        "job.expired",
    )
    secret_ref: Name | None = None

    if TYPE_CHECKING:  # see `JobFields`

        def __init__(
            self, *, url: str, events: Sequence[Event] = ..., secret_ref: str | None = None
        ) -> None: ...


class JobDetails(TypedDict, total=False):
    """The fields of a job but its image, as they may be written: a list for a tuple, a dict for a model.

    Type checkers go by it; what a job then holds is said by `Job`.
    """

    schema: Literal["gradcam.job/v1"]
    id: str
    idempotency_key: str | None
    network: Required[str]
    target: Required[Target | dict[str, Any]]
    method: MethodSpec | dict[str, Any]
    artifacts: Sequence[ArtifactSpec | dict[str, Any]]
    metrics: Sequence[Metric]
    output: str | None
    priority: Priority
    expires_at: datetime | None
    timeout_s: float
    max_attempts: int
    webhooks: Sequence[Webhook | dict[str, Any]]
    metadata: dict[str, str]
    traceparent: str | None


class JobFields(JobDetails, total=False):
    """The fields of a job as they may be written: the image may be named by its URI alone."""

    image: Required[ImageRef | str | dict[str, Any]]


def _bare_uri(value: Any) -> Any:
    return value if isinstance(value, Mapping | ImageRef) else {"uri": value}


class Job(RequestModel):
    """`gradcam.job/v1`: one image to explain. Only image, network and target are required."""

    schema_: Literal["gradcam.job/v1"] = Field(default="gradcam.job/v1", alias="schema")
    id: JobId = Field(default_factory=new_id)
    idempotency_key: ShortText | None = None
    image: Annotated[ImageRef, BeforeValidator(_bare_uri)]
    network: Name
    target: Target
    method: MethodSpec = MethodSpec()
    artifacts: Annotated[tuple[ArtifactSpec, ...], Field(min_length=1, max_length=8)] = (
        OverlaySpec(),
        HeatmapSpec(),
    )
    metrics: Annotated[tuple[Metric, ...], Field(max_length=2)] = ()
    output: Annotated[str, StringConstraints(max_length=1024)] | None = None
    priority: Priority = "normal"
    expires_at: AwareDatetime | None = None
    timeout_s: Annotated[float, Field(gt=0, le=300)] = 60
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    webhooks: Annotated[tuple[Webhook, ...], Field(max_length=4)] = ()
    metadata: Annotated[dict[ShortText, ShortText], Field(max_length=16)] = Field(default_factory=dict)
    traceparent: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{55}$")] | None = None

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[JobFields]) -> None: ...

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
