"""What calls take by name, for type checkers; and a job's fields with short forms, for `submit`.

The short forms are the client's: what is sent is a `gradcam_worker.schemas.job.Job`, which has none.

    top_n, classes, against    the fields of `target`, beside the others
    method="rise"              {"name": "rise"}
    artifacts=["report"]       [{"kind": "report"}]
    webhook="https://..."      webhooks=[{"url": "https://..."}], for one
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, Required, TypeAlias, TypedDict, TypeVar

from gradcam_worker.errors import InvalidJob, with_sentence
from gradcam_worker.schemas.annotations import Annotations
from gradcam_worker.schemas.job import ImageRef, Job, Priority, Webhook
from gradcam_worker.schemas.options import ArtifactKind, ArtifactSpec, MethodName, MethodSpec, Metric, Target
from gradcam_worker.schemas.status import Status
from gradcam_worker.text.similar_names import nearest

Image: TypeAlias = ImageRef | str | dict[str, Any]
F = TypeVar("F", bound=Callable[..., object])
OF_TARGET = ("top_n", "classes", "against")


class JobOptions(TypedDict, total=False):
    """The fields of a job that may be left out."""

    idempotency_key: str | None
    method: MethodSpec | MethodName | dict[str, Any]
    artifacts: Sequence[ArtifactSpec | ArtifactKind | dict[str, Any]]
    metrics: Sequence[Metric]
    priority: Priority
    webhook: Webhook | str | dict[str, Any]
    webhooks: Sequence[Webhook | str | dict[str, Any]]
    metadata: dict[str, str]
    inputs: Mapping[str, float | str | Sequence[float]]
    annotations: Annotations | dict[str, Any] | None
    output: str | None
    expires_at: datetime | None
    timeout_s: float
    max_attempts: int
    id: str
    schema: Literal["gradcam.job/v1"]
    traceparent: str | None


class TopN(JobOptions, total=False):
    """A job that explains the most probable classes."""

    top_n: Required[int]
    against: Sequence[int | str]


class Classes(JobOptions, total=False):
    """A job that explains these classes, by their names or numbers."""

    classes: Required[Sequence[int | str]]
    against: Sequence[int | str]


class WithTarget(JobOptions, total=False):
    """A job whose classes are given as it has them on the wire."""

    target: Required[Target | dict[str, Any]]


NAMES = ("image", "network", "target", *OF_TARGET, *JobOptions.__annotations__)


class ListConditions(TypedDict, total=False):
    """Which jobs are listed: see `GradcamClient.list`."""

    status: Status | None
    network: str | None
    label: str | None
    created_after: datetime | None


def naming_fields(method: F) -> F:
    """Show `**fields` by their names to `help`, `inspect` and notebooks, which do not read overloads.

    Args:
        method: `submit`, or another that takes the fields of a job. It is changed.

    Returns:
        The method.
    """
    signature = inspect.signature(method)
    own = [one for name, one in signature.parameters.items() if name != "fields"]
    kinds = {"image": Image, "network": str}
    for fields in (TopN, Classes, WithTarget):  # those of a target first
        kinds |= {
            name: kind for name, kind in fields.__annotations__.items() if name in (*OF_TARGET, "target")
        }
    kinds |= JobOptions.__annotations__
    named = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in kinds.items()
        if name not in signature.parameters
    ]
    method.__signature__ = signature.replace(parameters=[*own, *named])  # type: ignore[attr-defined]
    return method


def as_job(job: Job | Mapping[str, Any]) -> Job:
    """Make a job of its fields.

    Args:
        job: A job, which is returned, or its fields, in which short forms are allowed.

    Returns:
        The job.

    Raises:
        InvalidJob: They are not those of a job. The message names each field that is wrong.
    """
    if isinstance(job, Job):
        return job
    try:
        return Job.parse(without_short_forms(job))
    except InvalidJob as error:
        unknown = [str(name) for name in job if name not in NAMES] if isinstance(job, Mapping) else []
        meant = [nearest(name, NAMES, 1) for name in unknown]
        if not any(meant):
            raise
        names = ", ".join(name for found in meant for name in found)
        raise with_sentence(error, f"Did you mean {names}?") from error


def without_short_forms(fields: object) -> object:
    """Replace short forms by the fields of a job; anything else is left to `Job.parse`.

    Args:
        fields: The fields, by name.

    Returns:
        The fields of a job.

    Raises:
        InvalidJob: A short form and the field that it stands for are both there.
    """
    if not isinstance(fields, Mapping):
        return fields
    wire = dict(fields)
    target = {name: wire.pop(name) for name in OF_TARGET if name in wire}
    if target and "target" in wire:
        message = f"Give target, or {' and '.join(target)} beside the other fields, not both."
        raise InvalidJob(message)
    wire.setdefault("target", target)
    if "webhook" in wire:
        if "webhooks" in wire:
            message = "Give webhook, or a list of webhooks, not both."
            raise InvalidJob(message)
        wire["webhooks"] = [wire.pop("webhook")]
    if isinstance(wire.get("method"), str):
        wire["method"] = {"name": wire["method"]}
    for name, field in (("artifacts", "kind"), ("webhooks", "url")):
        if isinstance(wire.get(name), list | tuple):
            wire[name] = [{field: one} if isinstance(one, str) else one for one in wire[name]]
    return wire
