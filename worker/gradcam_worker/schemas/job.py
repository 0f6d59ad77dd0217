"""The wire format of a job, `gradcam.job/v1`.

The models are immutable and refuse unknown fields. `deploy/schemas/` contains JSON schemas that are generated
from them.
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
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from gradcam_worker.errors import InvalidJob
from gradcam_worker.schemas.annotations import Annotations
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.model import (
    MAX_URI_BYTES,
    RequestModel,
    describe,
    describe_excess_length,
    without_defaults,
)
from gradcam_worker.schemas.model import WEBHOOK_SECRET_PREFIX as SECRET
from gradcam_worker.schemas.options import (
    WITHOUT_CLASS,
    AnimationSpec,
    ArtifactSpec,
    GridSpec,
    HeatmapSpec,
    Inputs,
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
    "Annotations",
    "ArtifactSpec",
    "Event",
    "GridSpec",
    "HeatmapSpec",
    "ImageRef",
    "Inputs",
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
CREDENTIAL_HINTS = {
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


def _check_length(uri: str) -> str:
    if problem := describe_excess_length(uri):
        raise ValueError(problem)
    return uri


Uri = Annotated[
    str,
    StringConstraints(min_length=1, max_length=2_000_000),  # a data: URI contains the whole image
    AfterValidator(_check_length),
    Field(json_schema_extra={"anyOf": [{"pattern": "^[Dd][Aa][Tt][Aa]:"}, {"maxLength": MAX_URI_BYTES}]}),
]
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # a single letter is a drive of Windows
WEB_ADDRESS = re.compile("https?://[^/?#]", re.IGNORECASE)
ShortText = Annotated[str, StringConstraints(max_length=256)]


def describe_missing_scheme(uri: str) -> str | None:
    """Describe why a text without a scheme is no URI of an image.

    Args:
        uri: The text.

    Returns:
        A sentence that says what would be right; None if the text has a scheme.
    """
    if SCHEME.match(uri):
        return None
    shown = re.sub("[^/@]*@", "", uri.partition("?")[0])[:200]  # no user, no password, no query
    return (
        f"{shown!r} has no scheme: write s3://bucket/key, https://host/path, or file:///folder/name of a "
        "file that workers can read"
    )


def describe_wrong_webhook(url: str) -> str | None:
    """Describe why a text is no address of a webhook.

    Args:
        url: The text.

    Returns:
        A sentence that says what would be right; None if it is a web address.
    """
    if WEB_ADDRESS.match(url):
        return None
    return f"{without_secrets(url)[:200]!r} is no web address: write https://host/path"


def _refuse_image_data(value: Any) -> Any:
    if isinstance(value, str):
        return value
    message = (
        f"an image is named by its URI, such as s3://bucket/key, not by {type(value).__name__}: "
        "client.upload_and_submit takes bytes, or the path of a local file"
    )
    raise ValueError(message)


class ImageRef(RequestModel):
    """The URI of an image. With `sha256` the image must have this checksum.

    Without `redirects` a web server's redirect is refused, also one to a host that workers allow.
    """

    uri: Annotated[Uri, BeforeValidator(_refuse_image_data)]
    sha256: Sha256 | None = None
    redirects: bool = True

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, serialize(self), ["redirects"])


class Webhook(RequestModel):
    """A URL that receives events of the job; by default, the final one. `secret_ref` names a secret."""

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
    """The fields of a job except its image, for type checkers: lists and dicts are accepted too.

    `Job` declares the types that the fields have afterwards.
    """

    schema: Literal["gradcam.job/v1"]
    id: str
    idempotency_key: str | None
    network: Required[str]
    target: Required[Target | dict[str, Any]]
    inputs: Mapping[str, float | str | Sequence[float]]
    annotations: Annotations | dict[str, Any] | None
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
    """The fields of a job, for type checkers: the image can be given as its URI."""

    image: Required[ImageRef | str | dict[str, Any]]


def _wrap_uri(value: Any) -> Any:
    return value if isinstance(value, Mapping | ImageRef) else {"uri": value}


class Job(RequestModel):
    """`gradcam.job/v1`: one image to explain. Only image, network and target are required."""

    schema_: Literal["gradcam.job/v1"] = Field(default="gradcam.job/v1", alias="schema")
    """version of this format"""
    id: JobId = Field(default_factory=new_id)
    """submitting the same id twice runs it once"""
    idempotency_key: ShortText | None = None
    """your own name for the job; submitting it twice runs it once"""
    image: Annotated[ImageRef, BeforeValidator(_wrap_uri)]
    """a URI alone, or an object with `uri` and `sha256`"""
    network: Name
    """a name of the catalog, or one that the operator registered"""
    target: Target
    """which classes to explain"""
    inputs: Inputs = Field(default_factory=dict)
    """what the network takes beside the image, by name, as the operator registered it"""
    annotations: Annotations | None = None
    """what is known about the image: its true classes, boxes or a mask"""
    method: MethodSpec = MethodSpec()
    """how to compute the heatmaps"""
    artifacts: Annotated[tuple[ArtifactSpec, ...], Field(min_length=1, max_length=8)] = (
        OverlaySpec(),
        HeatmapSpec(),
    )
    """what to store; each kind and format once"""
    metrics: Annotated[tuple[Metric, ...], Field(max_length=4)] = ()
    """how faithful each heatmap is"""
    output: Annotated[str, StringConstraints(max_length=1024)] | None = None
    """where to store it, below what the operator allows; none: `GRADCAM_OUTPUT`"""
    priority: Priority = "normal"
    """`high` first; `bulk` has a queue of its own"""
    expires_at: AwareDatetime | None = None
    """if it was not started by then, it ends as `expired`"""
    timeout_s: Annotated[float, Field(gt=0, le=300)] = 60
    """for one attempt"""
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    """starts, before it fails as `max_attempts_exceeded` or with its last error"""
    webhooks: Annotated[tuple[Webhook, ...], Field(max_length=4)] = ()
    """receivers of events"""
    metadata: Annotated[dict[ShortText, ShortText], Field(max_length=16)] = Field(default_factory=dict)
    """your own names and values, at most 16; returned in the status document"""
    traceparent: Annotated[str, StringConstraints(pattern=r"^[0-9a-f-]{55}$")] | None = None
    """W3C Trace Context; filled from the current span"""

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[JobFields]) -> None: ...

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, serialize(self), ["inputs", "annotations"])

    @model_validator(mode="after")
    def _check_distinct_artifacts(self) -> Self:
        kinds = [f"{artifact.kind} {artifact.format}" for artifact in self.artifacts]
        if len(set(kinds)) < len(kinds):
            message = f"artifacts contains one kind and format twice: {', '.join(kinds)}"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _check_no_credentials(self) -> Self:
        """Refuse credentials before the ledger stores them: it keeps the content of failed jobs."""
        uris = [("image.uri", self.image.uri), ("output", self.output or "")]
        if self.annotations and self.annotations.mask:
            uris.append(("annotations.mask.uri", self.annotations.mask.uri or ""))
        uris += [(f"webhooks.{index}.url", hook.url) for index, hook in enumerate(self.webhooks)]
        for name, uri in uris:
            if has_credentials(uri):
                message = (
                    f"{name} contains a user or password ({without_secrets(uri)[:200]}), which would be "
                    f"stored: use a URL without. {CREDENTIAL_HINTS.get(name, '')}"
                )
                raise ValueError(message.rstrip(". "))
        for index, hook in enumerate(self.webhooks):
            if (hook.secret_ref or "").startswith(SECRET):
                message = f"webhooks.{index}.secret_ref must be the name of a webhook secret, not the secret"
                raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _check_metrics(self) -> Self:
        if self.metrics and self.method.name == "notebook":
            message = "metrics cannot be computed for the method notebook, whose image is not preprocessed"
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _check_contrast(self) -> Self:
        if self.target.against and self.method.name in WITHOUT_CLASS:
            message = (
                f"target.against has no meaning for the method {self.method.name}, which explains no class"
            )
            raise ValueError(message)
        return self

    @classmethod
    def parse(cls, payload: object) -> "Job":
        """Parse JSON data.

        Args:
            payload: The decoded JSON.

        Returns:
            The job.

        Raises:
            InvalidJob: It is not a job. The message names each wrong field, and why.
        """
        try:
            return cls.model_validate(payload)
        except ValidationError as error:
            message = f"This is not a job: {describe(error)}."
            raise InvalidJob(message) from error

    def fingerprint(self) -> str:
        """Get a text that is equal for equal jobs: all fields except id, idempotency key and trace."""
        # Without defaults, so that a later version with a new field computes the same text.
        own = {"id", "idempotency_key", "traceparent"}
        kinds = [artifact.kind for artifact in self.artifacts]  # `kind` is a default, and so not in the JSON
        return f"{kinds} {self.model_dump_json(exclude=own, exclude_defaults=True)}"
