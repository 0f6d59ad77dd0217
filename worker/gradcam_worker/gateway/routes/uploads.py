"""The upload of an image: straight from a browser to the bucket, or in a request to the API."""

import uuid
from datetime import timedelta
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from gradcam_worker.client import results
from gradcam_worker.errors import ImageTooLarge, InvalidSettings
from gradcam_worker.gateway.access.caller import Caller
from gradcam_worker.gateway.context import Gateway, GatewayOf, Submitter
from gradcam_worker.gateway.http.answers import json_answer
from gradcam_worker.gateway.http.bodies import read_json
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.model import RequestModel, ResponseModel
from gradcam_worker.text.urls import signed_until

EXPIRES_S = 900  # of a URL to upload to: slow phones upload for minutes
SUFFIXES = {media_type: suffix for suffix, media_type in results.FORMATS.values()}
MAX_BODY_BYTES = 4096

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])


class UploadRequest(RequestModel):
    """The image that is to be uploaded. The URL takes exactly this type and this number of bytes."""

    media_type: Literal["image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp"]
    bytes: Annotated[int, Field(ge=1, strict=True)]


class UploadTarget(ResponseModel):
    """Where to put the image: one PUT with these headers. Then submit a job whose image is `uri`."""

    uri: str
    method: Literal["PUT"] = "PUT"
    url: str
    headers: dict[str, str]
    expires_at: str


@router.post("", operation_id="create_upload", status_code=HTTPStatus.CREATED)
async def create_upload(request: Request, gateway: GatewayOf, caller: Submitter) -> Response:
    """Get a URL to which a browser can put one image, straight into the bucket.

    The URL is valid for 15 minutes, for an image of exactly the type and size that were named. The bucket
    must allow the page's origin to PUT (CORS).
    """
    wanted = await read_json(request, UploadRequest, MAX_BODY_BYTES)
    check_size(wanted.bytes, gateway, "bytes")
    uri = f"{uploads_root(caller)}/{uuid.uuid4()}{SUFFIXES[wanted.media_type]}"
    url = await gateway.objects.upload_url(uri, wanted.media_type, wanted.bytes, EXPIRES_S)
    target = UploadTarget(
        uri=uri,
        url=url,
        headers={"Content-Type": wanted.media_type},
        expires_at=(signed_until(url) or utc_now() + timedelta(seconds=EXPIRES_S)).isoformat(
            timespec="seconds"
        ),
    )
    return json_answer(target, HTTPStatus.CREATED)


def uploads_root(caller: Caller) -> str:
    """The URI below which a caller's images are stored. Raises InvalidSettings."""
    if not caller.uploads:
        message = "GRADCAM_UPLOADS says where images go, as in s3://photos/uploads: set it."
        if name := caller.tenant_name:  # it was made where GRADCAM_UPLOADS was not set
            command = f"`gradcam tenants set {name} --uploads URI`"
            message = f"Tenant {name} has no place for uploads: {command} names one."
        raise InvalidSettings(message)
    return caller.uploads.rstrip("/")


def check_size(size: int, gateway: Gateway, field: str) -> None:
    """Raise ImageTooLarge for an image of too many bytes, which this field of the request has or tells."""
    if size > gateway.settings.max_image_bytes:
        allowed = f"at most {gateway.settings.max_image_bytes:,} are allowed"
        message = f"The image has {size:,} bytes; {allowed} (GRADCAM_MAX_IMAGE_BYTES)."
        refused = ImageTooLarge(message)
        refused.findings = ({"pointer": f"#/{field}", "detail": f"the image has {size:,} bytes; {allowed}"},)
        raise refused
