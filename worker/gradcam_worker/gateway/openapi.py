"""The OpenAPI 3.1 document of the HTTP API.

Paths and parameters are FastAPI's; bodies, answers and their schemas are listed here. The schemas are the
pydantic models of the wire, as in `deploy/schemas`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, get_args

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from gradcam_worker import __version__
from gradcam_worker.gateway.examples import (
    BACKFILL,
    JOB,
    NETWORKS,
    PROBLEM,
    SUCCEEDED,
    UPLOAD,
    UPLOAD_TARGET,
    WORKERS,
)
from gradcam_worker.gateway.http import problems
from gradcam_worker.gateway.http.answers import JSON
from gradcam_worker.gateway.routes.artifacts import JobResource, JobResult, ViewerDocument
from gradcam_worker.gateway.routes.backfills import BackfillEnd, BackfillList, BackfillRequest, BackfillStatus
from gradcam_worker.gateway.routes.uploads import UploadRequest, UploadTarget
from gradcam_worker.gateway.routes.workers import NetworkList, WorkerList
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.listing import JobPage
from gradcam_worker.schemas.model import ResponseModel
from gradcam_worker.schemas.options import ArtifactKind, MethodName

REFERENCE = "#/components/schemas/{model}"
FORM, EVENTS, TEXT = "multipart/form-data", "text/event-stream", "text/plain"
DESCRIPTION = """\
Explain image classifiers with Grad-CAM: submit a job, wait for it or follow its events, read its result.

Errors are problem details (RFC 9457) with the media type `application/problem+json`. Their `type` is
`urn:gradcam:problem:` and a code whose meaning is stable. A repeated request with the same `Idempotency-Key`
is the same job.
"""


class Finding(ResponseModel):
    """What is wrong in one place of a request: of its body (`pointer`), a `parameter` or a `header`."""

    detail: str
    pointer: str | None = None
    parameter: str | None = None
    header: str | None = None


class RequestProblem(ResponseModel):
    """Problem details (RFC 9457): why a request was refused, or failed. End users may be shown `detail`."""

    type: str
    title: str
    status: int
    detail: str
    public_message: str
    """the same, under the name that it has in status documents"""
    code: str
    retryable: bool
    errors: tuple[Finding, ...] = ()


class State(ResponseModel):
    """Whether the process is well."""

    status: str
    why: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A successful answer."""

    description: str
    model: type[BaseModel] | None = None
    media_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)  # name -> description
    example: Any = None


@dataclass(frozen=True)
class Operation:
    """What FastAPI does not know of an operation."""

    summary: str
    answers: Mapping[int, Answer]
    problems: Sequence[int] = ()  # besides those of every operation
    body: Mapping[str, Any] | None = None


EVENT = {  # of a stream of events, as OpenAPI 3.2 describes them
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("event", "id", "data")},
    "required": ["event", "data"],
}
LOCATION = {"Location": "Where the job is read."}
APPLIED = {**LOCATION, "Preference-Applied": "How long the server was willing to wait, as `wait=20`."}
JOB_STATE = Answer("The job.", JobResource, example=SUCCEEDED)
OF_A_KEY = (401, 403, 429)  # of every operation that needs a key
OF_ALL = (500, 503)
OPERATIONS: Mapping[str, Operation] = {
    "submit_job": Operation(
        "Submit a job",
        {
            200: Answer("With `Prefer: wait`: the final job.", JobResource, JSON, APPLIED, SUCCEEDED),
            202: Answer("The job is accepted, and not final yet.", JobResource, JSON, APPLIED),
        },
        (400, 409, 413, 415, 422, 501),
        {
            JSON: {
                "schema": {"$ref": REFERENCE.format(model="JobRequest")},
                "examples": {"job": {"summary": "An image in a bucket", "value": JOB}},
            },
            FORM: {"schema": {"$ref": REFERENCE.format(model="JobForm")}},
        },
    ),
    "list_jobs": Operation("List jobs", {200: Answer("A page of jobs.", JobPage)}, (400,)),
    "read_job": Operation(
        "Read a job",
        {
            200: Answer("The job.", JobResource, JSON, {"ETag": "Of a final job."}, SUCCEEDED),
            304: Answer("The final job is the one that the caller has.", None),
        },
        (400, 404),
    ),
    "cancel_job": Operation("Stop a job", {200: JOB_STATE}, (404,)),
    "retry_job": Operation("Try a failed job again", {200: JOB_STATE}, (404, 409)),
    "job_events": Operation(
        "Follow a job",
        {
            200: Answer("Server-sent events, named `status` or `problem`.", None, EVENTS),
            204: Answer("The final document was received before: there is nothing more to come."),
        },
        (400, 404),
    ),
    "job_result": Operation("Read a result", {200: Answer("The result.", JobResult)}, (400, 404, 409)),
    "job_viewer": Operation(
        "Read what the viewer shows",
        {200: Answer("The document of `<gradcam-viewer>`.", ViewerDocument)},
        (404, 409),
    ),
    "create_upload": Operation(
        "Get a URL to upload an image to",
        {201: Answer("Where to put the image.", UploadTarget, example=UPLOAD_TARGET)},
        (400, 413, 415, 501),
        {
            JSON: {
                "schema": {"$ref": REFERENCE.format(model="UploadRequest")},
                "examples": {"photo": {"summary": "A photo", "value": UPLOAD}},
            }
        },
    ),
    "list_networks": Operation(
        "List networks", {200: Answer("The networks that live workers offer.", NetworkList, example=NETWORKS)}
    ),
    "list_workers": Operation(
        "List workers", {200: Answer("The live workers.", WorkerList, example=WORKERS)}
    ),
    "submit_backfill": Operation(
        "Submit a backfill",
        {202: Answer("The backfill runs.", BackfillStatus, JSON, {"Location": "Where its state is read."})},
        (400, 409, 413, 415, 422, 501),
        {
            JSON: {
                "schema": {"$ref": REFERENCE.format(model="BackfillRequest")},
                "examples": {"list": {"summary": "A list of images", "value": BACKFILL}},
            }
        },
    ),
    "list_backfills": Operation(
        "List running backfills", {200: Answer("The running backfills.", BackfillList)}
    ),
    "read_backfill": Operation(
        "Read the state of a backfill", {200: Answer("The backfill.", BackfillStatus)}, (404,)
    ),
    "cancel_backfill": Operation("Stop a backfill", {200: Answer("What has ended.", BackfillEnd)}, (404,)),
    "live": Operation("Is the process alive?", {200: Answer("It is.", State)}),
    "ready": Operation("Can it work?", {200: Answer("It can.", State), 503: Answer("It cannot.", State)}),
    "metrics": Operation("Metrics for Prometheus", {200: Answer("The metrics.", None, TEXT)}),
}
MODELS: tuple[type[BaseModel], ...] = (Job, UploadRequest, BackfillRequest, RequestProblem)


def build(app: FastAPI) -> dict[str, Any]:
    """Build the OpenAPI document of an app.

    Args:
        app: The app, with all its routes.

    Returns:
        The document. The app keeps it: it is built once.
    """
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(
        title="gradcam-worker",
        version=__version__,
        openapi_version="3.1.0",
        description=DESCRIPTION,
        routes=app.routes,
        tags=[
            {"name": "jobs", "description": "One image to explain each."},
            {"name": "uploads", "description": "Images from browsers, straight into the bucket."},
            {"name": "workers", "description": "What live workers offer."},
            {"name": "backfills", "description": "Many images into one dataset."},
            {"name": "service", "description": "For operators."},
        ],
    )
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(operation, needs_key=path.startswith("/v1/") or path == "/metrics")
    document["components"] = {
        "schemas": _schemas(),
        "securitySchemes": {
            "key": {"type": "http", "scheme": "bearer", "description": "An API key: `gradcam keys create`."}
        },
    }
    app.openapi_schema = document
    return document


def _complete(operation: dict[str, Any], *, needs_key: bool) -> None:
    """Add to an operation of FastAPI's document what stands in `OPERATIONS`."""
    facts = OPERATIONS[operation["operationId"]]
    operation["summary"] = facts.summary
    if needs_key:
        operation["security"] = [{"key": []}, {}]  # none is needed by the one user of a machine
    if facts.body:
        operation["requestBody"] = {"required": True, "content": dict(facts.body)}
    for parameter in operation.get("parameters", ()):
        parameter["schema"] = _without_null(parameter["schema"])
        if parameter["in"] == "header":
            parameter["name"] = parameter["name"].title().replace("-Id", "-ID")
    statuses = {*facts.problems, *(OF_A_KEY if needs_key else ()), *(OF_ALL if needs_key else ())}
    answers = {str(status): _answer(answer) for status, answer in facts.answers.items()}
    refusals = {str(status): _refusal(status) for status in sorted(statuses)}
    operation["responses"] = {**answers, **refusals}


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an optional parameter, which is absent rather than null."""
    parts = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    rest = {name: value for name, value in schema.items() if name not in {"anyOf", "description", "title"}}
    return {**rest, **parts[0]} if len(parts) == 1 else rest | ({"anyOf": parts} if parts else {})


def _answer(answer: Answer) -> dict[str, Any]:
    described: dict[str, Any] = {"description": answer.description}
    if answer.headers:
        described["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in answer.headers.items()
        }
    if answer.model or answer.media_type != JSON:
        plain = EVENT if answer.media_type == EVENTS else {"type": "string"}
        schema = {"$ref": REFERENCE.format(model=answer.model.__name__)} if answer.model else plain
        content: dict[str, Any] = {"schema": schema}
        if answer.example is not None:
            content["example"] = answer.example
        described["content"] = {answer.media_type: content}
    return described


def _refusal(status: int) -> dict[str, Any]:
    content: dict[str, Any] = {"schema": {"$ref": REFERENCE.format(model=RequestProblem.__name__)}}
    if status == HTTPStatus.UNPROCESSABLE_ENTITY:
        content["example"] = PROBLEM
    return {"description": HTTPStatus(status).phrase, "content": {problems.MEDIA_TYPE: content}}


def _schemas() -> dict[str, Any]:
    """The schemas of all bodies and answers, by name."""
    answers = [answer.model for one in OPERATIONS.values() for answer in one.answers.values()]
    models: list[type[BaseModel]] = [*dict.fromkeys([*MODELS, *filter(None, answers)])]
    _, generated = models_json_schema(
        [(model, "validation") for model in models], by_alias=True, ref_template=REFERENCE
    )
    schemas: dict[str, Any] = generated["$defs"]
    target = schemas["Target"]["properties"]
    short = {name: {**_without_null(target[name]), "description": "Short for `target`."} for name in SHORT}
    schemas["JobRequest"] = _job_request(schemas["Job"], short)
    schemas["JobForm"] = _job_form(schemas["Job"], short)
    return schemas


SHORT = ("top_n", "classes", "against")  # fields of a target


def _job_request(job: Mapping[str, Any], short: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a job in a request, with the short forms of `client.job_fields`."""
    properties = job["properties"]
    image = {"anyOf": [{"$ref": REFERENCE.format(model="ImageRef")}, {"type": "string", "minLength": 1}]}
    methods = {"enum": [*get_args(MethodName)]}
    kinds = {"enum": [*get_args(ArtifactKind)]}
    url = {"type": "string", "maxLength": 256}
    hook = {"anyOf": [{"$ref": REFERENCE.format(model="Webhook")}, url]}
    return {
        **job,
        "title": "JobRequest",
        "description": "A job, in which short forms are allowed.",
        "properties": {
            **properties,
            "image": image,
            "method": {"anyOf": [properties["method"], methods]},
            "artifacts": _with_items(properties["artifacts"], kinds),
            "webhooks": {**properties["webhooks"], "items": hook},
            "webhook": {**hook, "description": "Short for `webhooks`."},
            **short,
        },
        "required": ["image", "network"],
        "oneOf": [{"required": [name]} for name in ("target", "top_n", "classes")],
    }


def _with_items(schema: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a list whose items may also be others."""
    return {**schema, "items": {"anyOf": [schema["items"], *others]}}


def _job_form(job: Mapping[str, Any], short: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a form: the image as a file, short texts, and any other field of a job as JSON."""
    as_json = {"type": "string", "contentMediaType": JSON}
    properties = {name: as_json for name in job["properties"] if name not in {"schema", "id", "traceparent"}}
    texts = {name: job["properties"][name] for name in ("network", "priority", "output")}
    image = {"type": "string", "contentMediaType": "application/octet-stream", "description": "The image."}
    names = {"type": "string", "description": "Names or numbers of classes, with commas."}
    return {
        "title": "JobForm",
        "description": "A job with its image. Fields that are objects or lists in a job are written as JSON.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **properties,
            **texts,
            "image": image,
            "top_n": short["top_n"],
            "classes": names,
            "against": names,
        },
        "required": ["image", "network"],
    }
