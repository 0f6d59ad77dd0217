"""The routes of backfills. Each runs in a process of its own: `gradcam backfill`, with its refusals."""

import asyncio
import base64
import binascii
import tempfile
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Self

from fastapi import APIRouter, Request
from pydantic import Field, StringConstraints, ValidationError, model_validator
from starlette.responses import Response

from gradcam_worker import extras
from gradcam_worker.backfill.inputs.options import BoxFormat, is_coco
from gradcam_worker.backfill.plan import SPEC_FIELDS, Plan
from gradcam_worker.backfill.registry import RedisBackfillRegistry
from gradcam_worker.client.datasets import backfills
from gradcam_worker.client.datasets.submitted_backfills import command, wait_for_start
from gradcam_worker.errors import (
    BackfillConflict,
    InvalidRequest,
    MissingExtra,
    OutputNotAllowed,
    UnknownBackfill,
)
from gradcam_worker.gateway.access.caller import Caller
from gradcam_worker.gateway.context import CallerWith, Gateway, GatewayOf
from gradcam_worker.gateway.http import bodies
from gradcam_worker.gateway.http.answers import json_answer
from gradcam_worker.gateway.http.problems import findings_of
from gradcam_worker.ledger.redis.store import RedisLedger
from gradcam_worker.schemas.model import RequestModel, ResponseModel, describe
from gradcam_worker.schemas.options import Inputs, MethodSpec, Metric, Name, OverlaySpec, Target
from gradcam_worker.schemas.shard import MAX_ROWS
from gradcam_worker.text import comma_lists
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

MAX_BODY_BYTES = 512 * 1024
PAUSED = "Some workers, or all, take no work at present."  # why is for the operator: `gradcam top`

OPTIONS = (
    *("shard_rows", "max_failed", "window", "rate", "column"),
    *("resume", "only_failed", "changed", "format", "include", "exclude"),
    *("classes_from", "label", "label_map", "boxes", "boxes_format", "mask_column"),
)

router = APIRouter(prefix="/v1/backfills", tags=["backfills"])
Starter = Annotated[Caller, CallerWith("backfills")]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Texts = Annotated[tuple[Text, ...], Field(max_length=100)]
S3Uri = Annotated[str, StringConstraints(pattern=r"^s3://[^/?#\s]+(/[^?#]*)?$", max_length=1024)]


class BackfillRequest(RequestModel):
    """What to explain of each image of a list, or of a folder, in a bucket."""

    input: S3Uri
    """a list (JSON Lines, CSV, Parquet, ORC, or one URI per line), the manifest.json of an S3 inventory, or a
    folder, which ends with a slash"""
    output: S3Uri
    """where the dataset is written"""
    network: Name
    target: Target
    inputs: Inputs = Field(default_factory=dict)
    method: MethodSpec = MethodSpec()
    metrics: Annotated[tuple[Metric, ...], Field(max_length=4)] = ()
    artifacts: Annotated[tuple[OverlaySpec, ...], Field(max_length=3)] = ()
    features: bool = False
    """also store what the network looks at, as a vector of each explanation"""
    shard_rows: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 256
    """images in one shard"""
    window: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """shards in flight; none: it depends on the number of workers"""
    rate: Annotated[float, Field(gt=0)] | None = None
    """images submitted per second, at most"""
    max_failed: Annotated[float, Field(ge=0, le=1)] = 0.5
    """share of the rows: if more fail, it is stopped"""
    resume: bool = False
    """continue an existing one"""
    only_failed: bool = False
    """continue, and run the failed rows again"""
    changed: bool = False
    """continue, and run again what changed in the input or weights"""
    format: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,20}$")] = "auto"
    """format of the list, if its name does not show it"""
    column: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = None
    """column of the list that holds the URIs"""
    input_columns: Annotated[dict[Name, str], Field(max_length=16)] = Field(default_factory=dict)
    """columns with what the network takes beside the image, by its name"""
    include: Texts = ()
    """only images whose name or path matches one of these patterns"""
    exclude: Texts = ()
    """patterns of what is left out"""
    keep_columns: Texts | None = None
    """columns of the list that the dataset gets; none: all"""
    drop_columns: Texts = ()
    """columns of the list that it does not get"""
    classes_from: Text | None = None
    """column with classes that are explained for its row, beside the others"""
    label: Text | None = None
    """column with the true classes"""
    label_map: S3Uri | None = None
    """JSON or CSV that says which class of the network each label is"""
    boxes: Text | None = None
    """column with the boxes of the objects, or a COCO annotation file in a bucket"""
    boxes_format: BoxFormat = "xywh"
    """what the four numbers of a box are"""
    mask_column: Text | None = None
    """column with a mask of the object"""

    @model_validator(mode="after")
    def _check_boxes(self) -> Self:
        if self.boxes and is_coco(self.boxes) and not self.boxes.startswith("s3://"):
            message = f"a COCO annotation file is named as s3://bucket/key, not {self.boxes[:100]!r}"
            raise ValueError(message)
        return self

    @property
    def files(self) -> dict[str, str]:
        """What is read of buckets, by field."""
        coco = self.boxes if self.boxes and is_coco(self.boxes) else None
        files = {"input": self.input, "label_map": self.label_map, "boxes": coco}
        return {name: uri for name, uri in files.items() if uri}


class BackfillStatus(backfills.BackfillStatus):
    """The state of a backfill."""

    id: str
    """its name in this API; it stands for the output"""


class BackfillList(ResponseModel):
    """The running backfills."""

    backfills: tuple[dict[str, Any], ...]


class BackfillEnd(ResponseModel):
    """What has ended of a backfill."""

    id: str
    output: str
    was_running: bool
    ended: bool
    shards_canceled: int
    shards_unfinished: int


@router.post("", operation_id="submit_backfill", status_code=HTTPStatus.ACCEPTED)
async def submit(request: Request, gateway: GatewayOf, caller: Starter) -> Response:
    """Explain every image of a list or folder into one dataset.

    It runs in a process beside the gateway. If that ends, the backfill is stopped, and is continued by the
    same request with `resume`. What the command refuses is refused here, too.
    """
    wanted = await bodies.read_json(request, BackfillRequest, MAX_BODY_BYTES)
    if not extras.is_installed("pyarrow"):
        raise MissingExtra(extras.describe("pyarrow", "A backfill", "backfill", "serve"))
    for name, uri in wanted.files.items():
        caller.check_list(uri, name)
    caller.check_output(wanted.output)
    _check_plan(wanted)
    await asyncio.to_thread(partial(_start, gateway, caller, wanted))
    return await _status(gateway, wanted.output, HTTPStatus.ACCEPTED)


@router.get("", operation_id="list_backfills")
async def list_running(gateway: GatewayOf, caller: Starter) -> Response:
    """List the running backfills, with their progress."""
    registry = RedisBackfillRegistry(RedisLedger(gateway.settings).server)
    shown = [
        {"id": backfill_id(str(facts["output"])), **_public(facts)}
        for facts in await asyncio.to_thread(registry.running)
        if _may_see(caller, str(facts.get("output")))
    ]
    return json_answer(BackfillList(backfills=tuple(shown)))


@router.get("/{backfill_id}", operation_id="read_backfill")
async def read(gateway: GatewayOf, caller: Starter, backfill_id: str) -> Response:
    """Read the state of a backfill."""
    return await _status(gateway, _output_of(caller, backfill_id))


@router.post("/{backfill_id}/cancel", operation_id="cancel_backfill")
async def cancel(gateway: GatewayOf, caller: Starter, backfill_id: str) -> Response:
    """Stop a backfill, and cancel its shards in flight. What is done is kept, and it can be resumed."""
    output = _output_of(caller, backfill_id)
    try:
        end = await asyncio.to_thread(lambda: backfills.cancel(output, gateway.settings, gateway.s3))
    except (BackfillConflict, OutputNotAllowed) as error:
        raise _unknown() from error
    answer = BackfillEnd(
        id=backfill_id,
        output=end.output,
        was_running=end.was_running,
        ended=end.ended,
        shards_canceled=end.canceled,
        shards_unfinished=end.unfinished,
    )
    return json_answer(answer)


def backfill_id(output: str) -> str:
    """The name of a backfill in the API: its output, in characters that a path may have."""
    return base64.urlsafe_b64encode(output.rstrip("/").encode()).decode().rstrip("=")


def _output_of(caller: Caller, name: str) -> str:
    """The output of a backfill. Raises UnknownBackfill, also where it is not the caller's."""
    try:
        output = base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode()
    except (ValueError, binascii.Error) as error:
        raise _unknown() from error
    if not output.startswith("s3://") or backfill_id(output) != name or not _may_see(caller, output):
        raise _unknown()
    return output


def _unknown() -> UnknownBackfill:
    return UnknownBackfill("There is no backfill of this id.")


def _may_see(caller: Caller, output: str) -> bool:
    with suppress(OutputNotAllowed):
        caller.check_output(output)
        return True
    return False


async def _status(gateway: Gateway, output: str, status: HTTPStatus = HTTPStatus.OK) -> Response:
    try:
        facts = await asyncio.to_thread(lambda: backfills.read_status(output, gateway.settings, gateway.s3))
    except (BackfillConflict, OutputNotAllowed) as error:
        raise _unknown() from error
    last = _public(facts["last"]) if facts["last"] else None
    answer = BackfillStatus.model_validate({**facts, "id": backfill_id(output), "last": last})
    return json_answer(answer, status, {"Location": f"/v1/backfills/{answer.id}"})


def _public(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a run without the machine that it runs on, and without addresses of the storage."""
    public = {name: value for name, value in facts.items() if name not in {"host", "pid"}}
    return public | ({"trouble": PAUSED} if public.get("trouble") else {})


def _check_plan(wanted: BackfillRequest) -> None:
    """Raise InvalidRequest where no row could be explained so."""
    fields = wanted.model_dump(mode="json", include={"input", "output", "shard_rows", *SPEC_FIELDS})
    try:
        Plan.model_validate(fields)
    except ValidationError as error:
        message = f"This backfill is invalid: {describe(error)}."
        raise InvalidRequest(message, findings_of(error)) from error


def _start(gateway: Gateway, caller: Caller, wanted: BackfillRequest) -> None:
    """Start the process, and wait until it holds its lease. Raises what it was refused with."""
    with tempfile.TemporaryDirectory(prefix="gradcam-backfill-") as folder:
        log_file = Path(folder) / "log"
        process = gateway.backfills.start(
            command_of(wanted, caller), gateway.settings, log_file, caller.tenant_name
        )
        wait_for_start(process, lambda: log_file.read_text(errors="replace"), wanted.output)


def command_of(wanted: BackfillRequest, caller: Caller) -> list[str]:
    """The command that runs a backfill."""
    spec = wanted.model_dump(mode="json", include={*SPEC_FIELDS} - {"weights_sha256"})
    options = {name: getattr(wanted, name) for name in OPTIONS} | {"input_column": wanted.input_columns}
    for name in ("keep_columns", "drop_columns"):  # lists with commas
        columns: tuple[str, ...] | None = getattr(wanted, name)
        options[name] = None if columns is None else comma_lists.join(columns)
    return command(wanted.input, wanted.output, spec, options, caller.tenant_name)
