"""What a job that succeeded has left: artifacts, presigned URLs, the document of the viewer."""

import asyncio
import gzip
import json
from datetime import datetime, timedelta
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field, TypeAdapter
from starlette.responses import Response

from gradcam_worker.artifacts.viewer import heatmaps_record, viewer_document
from gradcam_worker.client import results
from gradcam_worker.errors import GradcamError
from gradcam_worker.gateway.access.caller import Caller
from gradcam_worker.gateway.context import Gateway, GatewayOf, JobIdOf, Reader
from gradcam_worker.gateway.http.answers import JSON, NOT_KEPT, json_answer
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.manifest import ArtifactRecord, Manifest
from gradcam_worker.schemas.model import ResponseModel
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.text.log_events import EventLogger
from gradcam_worker.text.urls import signed_until

log = EventLogger("gradcam")

READ_TIMEOUT_S = 3.0  # for a manifest, beside a status that is known: then it is answered without artifacts
EXPIRES_S = 3600
# In a viewer's document; larger ones the browser reads from the bucket. JSON of 16 MB would hold up everybody
# for a fifth of a second.
MAX_HEATMAP_BYTES = 4 * 1024**2
GZIP_LEVEL = 5

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


class JobArtifact(ResponseModel):
    """An artifact of a job. `class_id`: of the class that it explains; none: it is of the whole job."""

    kind: str
    uri: str
    media_type: str
    class_id: int | None = None
    class_name: str | None = None
    url: str | None = None
    """where a browser can read it, in the answer that was waited for: valid for an hour"""


class JobResource(StatusDocument):
    """A job: its status document and, of one that succeeded, its artifacts."""

    artifacts: tuple[JobArtifact, ...] = ()


class JobResult(ResponseModel):
    """The result of a job that succeeded: its manifest, and a URL for each artifact."""

    manifest: Manifest
    urls: dict[str, str]
    """a presigned URL for each artifact, by the artifact's URI"""
    expires_at: datetime
    """until when the URLs are valid"""


class ViewerDocument(ResponseModel):
    """What the element `<gradcam-viewer>` shows. Fields may be absent."""

    manifest: Manifest
    urls: dict[str, str] = Field(default_factory=dict)
    heatmaps: str | None = None
    """the bytes of the array of heatmaps, in base64"""
    photo: str | None = None
    """where the photo is"""


_artifacts = TypeAdapter(tuple[JobArtifact, ...])


async def artifacts_json(
    gateway: Gateway, caller: Caller, document: StatusDocument, *, with_urls: bool = False
) -> bytes | None:
    """The artifacts of a job that succeeded, as JSON; None for any other, and where they cannot be read."""
    if document.status != "succeeded" or not document.result:
        return None
    key = f"{document.id} {document.result.manifest_sha256}"
    found = None if with_urls else gateway.artifact_lists.find(key)
    if found is None:
        client = gateway.client_of(caller)
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                result = await client.result(document.id, manifest_uri=document.result.manifest_uri)
        except (GradcamError, TimeoutError) as error:
            log.warning("artifacts_not_read", job_id=document.id, error=error)
            return None
        listed = _list(result.manifest)
        found = _artifacts.dump_json(tuple(listed), exclude_none=True)
        gateway.artifact_lists.keep(key, found)
        if with_urls:
            addressed = (one.model_copy(update={"url": result.urls.get(one.uri)}) for one in listed)
            return _artifacts.dump_json(tuple(addressed), exclude_none=True)
    return found


def _list(manifest: Manifest) -> list[JobArtifact]:
    listed = [_describe(artifact) for artifact in manifest.artifacts]
    for one in manifest.explanations:
        listed += [_describe(artifact, one.class_.id, one.class_.name) for artifact in one.artifacts]
    return listed


def _describe(artifact: ArtifactRecord, class_id: int | None = None, name: str | None = None) -> JobArtifact:
    return JobArtifact(
        kind=artifact.kind,
        uri=artifact.uri,
        media_type=artifact.media_type,
        class_id=class_id,
        class_name=name,
    )


@router.get("/{job_id}/result", operation_id="job_result")
async def result(
    gateway: GatewayOf,
    caller: Reader,
    job_id: JobIdOf,
    expires_s: Annotated[
        int, Query(ge=1, le=results.MAX_EXPIRES_S, description="How long the URLs are valid, in seconds.")
    ] = EXPIRES_S,
) -> Response:
    """Read the result of a job that succeeded: its manifest, and a fresh presigned URL for each artifact.

    Whoever has a URL can read that one object, until it expires. 409: the job has no result, or not yet.
    """
    until = utc_now() + timedelta(seconds=expires_s)
    found = await gateway.client_of(caller).result(job_id, expires_s=expires_s)
    until = min([until, *filter(None, map(signed_until, found.urls.values()))])
    answer = JobResult(manifest=found.manifest, urls=found.urls, expires_at=until)
    return json_answer(answer)


@router.get("/{job_id}/viewer", operation_id="job_viewer")
async def viewer(request: Request, gateway: GatewayOf, caller: Reader, job_id: JobIdOf) -> Response:
    """Read what the element `<gradcam-viewer>` shows: manifest, heatmaps, URLs, and where the photo is.

    The heatmaps are in the answer, so that the bucket need not allow the page's origin to read (CORS). The
    photo is the job's image where the caller may read it. 409: the job has no result, or not yet.
    """
    found = await gateway.client_of(caller).result(job_id, expires_s=EXPIRES_S)
    record = heatmaps_record(found.manifest)
    fits = record is not None and record.bytes <= MAX_HEATMAP_BYTES
    heatmaps = await gateway.objects.read(record.uri) if record and fits else None
    photo = await _photo_url(gateway, caller, found.manifest.input.uri)
    document = viewer_document(found.manifest, heatmaps, found.urls, photo)
    headers = {**NOT_KEPT, "Vary": "Accept-Encoding"}
    takes_gzip = "gzip" in request.headers.get("accept-encoding", "")
    if takes_gzip:
        headers["Content-Encoding"] = "gzip"
    body = await gateway.objects.call(partial(_encode, document, takes_gzip))
    return Response(body, headers=headers, media_type=JSON)


def _encode(document: dict[str, Any], takes_gzip: bool) -> bytes:
    """A viewer's document as JSON, which takes too long for the event loop."""
    text = json.dumps(document, separators=(",", ":")).encode()
    return gzip.compress(text, GZIP_LEVEL) if takes_gzip else text


async def _photo_url(gateway: Gateway, caller: Caller, uri: str) -> str | None:
    """A URL of the image that a job has explained, which so is an image, where the caller may read it."""
    if not uri.startswith("s3://"):
        return None  # the viewer uses a web address itself; a file cannot be read by a browser
    try:
        caller.check_image(uri)
        return await gateway.objects.url(uri, EXPIRES_S)
    except GradcamError as error:
        log.debug("photo_not_shown", error=error)
        return None
