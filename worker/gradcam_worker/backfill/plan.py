"""The plan of a backfill, `gradcam.backfill/v1`: stored in its output as backfill.json."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    ValidationError,
    model_serializer,
    model_validator,
)

from gradcam_worker.schemas.ids import new_id, utc_now
from gradcam_worker.schemas.job import Job, Sha256
from gradcam_worker.schemas.model import RequestModel, describe, without_defaults
from gradcam_worker.schemas.options import (
    WITHOUT_LAYER,
    Inputs,
    MethodSpec,
    Metric,
    Name,
    OverlaySpec,
    Target,
)
from gradcam_worker.schemas.shard import MAX_ROWS, CarriedColumns

MAX_SPEC_BYTES = 256 * 1024  # of `Plan.spec` as JSON
UUID_PATTERN = r"^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
LATER_FIELDS = ("inputs", "annotated", "features", "carried")  # which earlier versions do not know
SPEC_FIELDS = (
    "network",
    "weights_sha256",
    "target",
    "inputs",
    "method",
    "metrics",
    "artifacts",
    "annotated",
    "features",
    "carried",
)


class Plan(RequestModel):
    """`gradcam.backfill/v1`: what is asked of each row of the input."""

    schema_: Literal["gradcam.backfill/v1"] = Field(default="gradcam.backfill/v1", alias="schema")
    # A UUID, because the ids of the shards are derived from it (uuid5).
    id: Annotated[str, StringConstraints(pattern=UUID_PATTERN)] = Field(default_factory=new_id)
    input: Annotated[str, StringConstraints(min_length=1, max_length=4096)]  # without secrets
    output: Annotated[str, StringConstraints(min_length=1, max_length=1024)]
    network: Name
    weights_sha256: Sha256 | None = None  # which the workers must have; None: any, the same for all shards
    target: Target
    inputs: Inputs = Field(default_factory=dict)  # of the network, the same for all rows
    method: MethodSpec = MethodSpec()
    metrics: Annotated[tuple[Metric, ...], Field(max_length=4)] = ()
    artifacts: Annotated[tuple[OverlaySpec, ...], Field(max_length=3)] = ()
    annotated: bool = False  # rows come with labels, boxes or masks
    features: bool = False  # what the network looks at, as a vector
    carried: CarriedColumns = Field(default_factory=dict)  # further columns of the input
    shard_rows: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 256
    created_at: AwareDatetime = Field(default_factory=utc_now)
    # Input and options of the command that began it, by the names of their parameters; they are used where a
    # command that continues it omits them. Text, yes or no, and lists of these; paths are absolute.
    given: dict[str, str | bool | tuple[str, ...]] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, serialize(self), [*LATER_FIELDS, "given"])

    @model_validator(mode="after")
    def _valid_as_job(self) -> Self:
        """A row may ask for what a job may ask for, and nothing else."""
        artifacts = {"artifacts": self.artifacts} if self.artifacts else {}
        try:
            Job.model_validate(
                {
                    "image": "s3://bucket/key",
                    "network": self.network,
                    "target": self.target,
                    "inputs": self.inputs,
                    "method": self.method,
                    "metrics": self.metrics,
                    **artifacts,
                }
            )
        except ValidationError as error:
            raise ValueError(describe(error).removeprefix("the message: ")) from error
        if self.features and self.method.is_named and self.method.name in WITHOUT_LAYER:
            message = f"features are of a target layer, which the method {self.method.name} does not have"
            raise ValueError(message)
        if len(json.dumps(self.spec())) > MAX_SPEC_BYTES:
            limit = f"{MAX_SPEC_BYTES:,} bytes as JSON"
            message = f"what is asked of each row is longer than {limit}: name fewer classes"
            raise ValueError(message)
        return self

    def spec(self) -> dict[str, object]:
        """Return the fields that apply to each row, as JSON."""
        return self.model_dump(mode="json", include=set(SPEC_FIELDS), exclude_defaults=True)

    def difference_from(self, other: "Plan") -> str | None:
        """Return how this plan differs from a stored one, in a sentence; None if it does not.

        Ids, times and outputs are not compared.
        """
        for name in ("input", *SPEC_FIELDS, "shard_rows"):
            # Not as JSON: earlier versions wrote the name of the default method, too.
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"Its {name} is {_as_text(theirs)}, and now {_as_text(ours)} is asked for."
        return None


def _as_text(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_as_text, value))}]"
    if isinstance(value, RequestModel):
        return json.dumps(value.model_dump(mode="json", exclude_none=True))
    return json.dumps(value) if value is not None else "any"
