"""What a web app reads of a job that is done, and what it puts into storage before one begins.

Nothing heavy is imported before it is needed: whoever only submits needs no S3.
"""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote

from pydantic import ValidationError

from gradcam_worker.errors import (
    ImageNotFound,
    ImageTooLarge,
    InvalidJob,
    InvalidSettings,
    NoResult,
    StorageUnavailable,
)
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import STORAGE_URI_FORM, Settings, is_storage_uri
from gradcam_worker.storage.filesystem import FolderStore
from gradcam_worker.text.urls import without_secrets

if TYPE_CHECKING:
    from gradcam_worker.storage.s3 import S3
    from gradcam_worker.storage.stores import S3Store

LONGEST_S = 7 * 86_400  # that a presigned URL can be good for
# How a file of each format begins. A key, and so its suffix, depends on nothing but the bytes.
FORMATS = {
    b"\xff\xd8\xff": (".jpg", "image/jpeg"),
    b"\x89PNG": (".png", "image/png"),
    b"GIF8": (".gif", "image/gif"),
    b"BM": (".bmp", "image/bmp"),
    b"RIFF": (".webp", "image/webp"),
}


class Objects(Protocol):
    """Where objects are, by URI. Raises StorageUnavailable where they cannot be had just now."""

    def read(self, uri: str) -> bytes:
        """An object."""
        ...

    def put(self, uri: str, data: bytes, media_type: str) -> None:
        """Write an object, whole or not at all."""
        ...

    def url(self, uri: str, expires_s: int) -> str:
        """Where a browser finds the object, for so many seconds."""
        ...


@dataclass(frozen=True)
class Result:
    """What a job that succeeded has left.

    Attributes:
        manifest: every fact about its artifacts.
        urls: a presigned URL for each artifact, by the artifact's URI.
    """

    manifest: Manifest
    urls: dict[str, str]

    def __repr__(self) -> str:
        """Without the URLs: whoever has one can read the artifact."""
        count = len(self.manifest.explanations)
        return f"Result(job_id={self.manifest.job_id!r}, explanations={count}, urls={len(self.urls)})"


@dataclass(frozen=True)
class Upload:
    """An image on its way into storage."""

    uri: str
    sha256: str
    data: bytes = field(repr=False)
    media_type: str


def manifest_uri(document: StatusDocument) -> str:
    """Where the manifest of a job is. Raises NoResult."""
    if document.status != "succeeded" or not document.result:
        why = f" ({document.error.code}: {document.error.detail})" if document.error else ""
        message = f"Job {document.id} is {document.status}{why}: only a job that succeeded has a result."
        if document.status == "failed":
            message += " It is tried again, under its id and idempotency key, by retry."
        raise NoResult(message)
    return document.result.manifest_uri


def read(job_id: str, where: str, objects: Objects, expires_s: int) -> Result:
    """What the manifest at `where` says of a job. Raises NoResult, StorageUnavailable, InvalidSettings."""
    if not 1 <= expires_s <= LONGEST_S:
        message = f"expires_s {expires_s} must be from 1 to {LONGEST_S:,} seconds."
        raise InvalidSettings(message)
    try:
        manifest = Manifest.model_validate_json(objects.read(where))
    except ValidationError as error:
        message = f"Job {job_id} has left {where}, which is no manifest of one image."
        raise NoResult(message) from error
    every = [*manifest.artifacts, *(one for seen in manifest.explanations for one in seen.artifacts)]
    folder = where.rpartition("/")[0] + "/"
    # A URL lets everybody in: for what lies beside the manifest, and for nothing else of the same server.
    if manifest.job_id != job_id or not all(is_below(one.uri, folder) for one in every):
        message = f"The manifest at {where} is another's than job {job_id}'s."
        raise NoResult(message)
    return Result(manifest, {one.uri: objects.url(one.uri, expires_s) for one in every})


def is_below(uri: str, place: str) -> bool:
    """Whether a URI leads to something below a place, however whoever reads it may shorten its path."""
    folder = place.rstrip("/") + "/"
    steps = unquote(uri.removeprefix(folder)).replace("\\", "/").split("/")
    return "://" in folder and uri.startswith(folder) and not {"", ".", ".."} & set(steps)


def upload_of(image: Path | str | bytes, place: str, max_bytes: int) -> Upload:
    """An image of this machine, to be put below `place`. Nothing is decoded.

    Raises InvalidSettings, ImageNotFound, ImageTooLarge, InvalidJob.
    """
    if not place:
        message = "GRADCAM_UPLOADS says where images go, as in s3://photos/uploads: set it, or say `to`."
        raise InvalidSettings(message)
    if not is_storage_uri(place):
        message = f"`to` {without_secrets(place)!r} {STORAGE_URI_FORM}."
        raise InvalidSettings(message)
    data = image if isinstance(image, bytes) else _file(image, max_bytes)
    if len(data) > max_bytes:
        raise _too_large(len(data), max_bytes)
    if not data:
        message = "There is nothing to upload: the image has no bytes."
        raise InvalidJob(message)
    sha256 = hashlib.sha256(data).hexdigest()
    kinds = (kind for begins, kind in FORMATS.items() if data.startswith(begins))
    suffix, media_type = next(kinds, ("", "application/octet-stream"))
    return Upload(f"{place.rstrip('/')}/{sha256}{suffix}", sha256, data, media_type)


def _file(image: object, max_bytes: int) -> bytes:
    if not isinstance(image, Path | str):
        message = f"The image must be a path of this machine, or bytes; not {type(image).__name__}."
        raise InvalidJob(message)
    if "://" in str(image) or str(image).startswith("data:"):
        message = "That is a URI, and no file of this machine: submit(image=...) takes URIs."
        raise InvalidJob(message)
    try:
        with Path(image).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise _too_large(size, max_bytes)
            return file.read(max_bytes + 1)  # it may be growing, or have no size
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        message = f"The image {str(image)!r} cannot be read: {error}."
        raise ImageNotFound(message) from error


def _too_large(size: int, max_bytes: int) -> ImageTooLarge:
    allowed = f"at most {max_bytes:,} are allowed (GRADCAM_MAX_IMAGE_BYTES)"
    return ImageTooLarge(f"The image has {size:,} bytes; {allowed}.")


class Places:
    """Objects in S3, with the settings `GRADCAM_S3_*`, and in folders of this machine."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is imported or connected yet."""
        self._settings = settings
        self._s3: dict[int, S3] = {}  # by process: threads do not survive a fork

    def read(self, uri: str) -> bytes:
        """See `Objects.read`."""
        store, key = self._store(uri)
        return store.get(key)

    def put(self, uri: str, data: bytes, media_type: str) -> None:
        """See `Objects.put`."""
        store, key = self._store(uri)
        store.put(key, data, media_type)

    def url(self, uri: str, expires_s: int) -> str:
        """See `Objects.url`. A file has no other than its own."""
        store, key = self._store(uri)
        return uri if isinstance(store, FolderStore) else store.presigned(key, expires_s)

    def _store(self, uri: str) -> "tuple[FolderStore | S3Store, str]":
        """Where it is, and under which key."""
        scheme, _, rest = uri.partition("://")
        if scheme == "file":
            path = Path(unquote(rest))
            return FolderStore(path.parent), path.name
        if scheme != "s3":
            message = f"{without_secrets(uri)[:200]!r} is neither in S3 nor on this machine."
            raise StorageUnavailable(message)
        try:
            from gradcam_worker.storage.s3 import S3
            from gradcam_worker.storage.stores import S3Store
        except ModuleNotFoundError as error:
            message = f"S3 needs the package {error.name}: pip install 'gradcam-worker[s3]'."
            raise InvalidSettings(message) from error
        mine = os.getpid()
        if mine not in self._s3:
            self._s3 = {mine: S3(self._settings)}
        bucket, _, key = rest.partition("/")
        return S3Store(self._s3[mine], bucket, ""), key
