"""The result of a job for a web app, and the upload of an image before a job.

S3 is imported when it is first used: a client that only submits does not need it.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote

from pydantic import ValidationError

from gradcam_worker import extras
from gradcam_worker.artifacts.viewer import heatmaps_record
from gradcam_worker.errors import (
    ImageNotFound,
    ImageTooLarge,
    InvalidJob,
    InvalidSettings,
    NoResult,
    StorageUnavailable,
)
from gradcam_worker.schemas.manifest import ArtifactRecord, ExplainedClass, Manifest
from gradcam_worker.schemas.status import ClassScore, StatusDocument
from gradcam_worker.settings import STORAGE_URI_FORM, Settings, is_storage_uri
from gradcam_worker.storage.filesystem import FolderStore
from gradcam_worker.text.urls import without_secrets

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gradcam_worker.storage.s3 import S3
    from gradcam_worker.storage.stores import S3Store

MAX_EXPIRES_S = 7 * 86_400  # of a presigned URL (AWS Signature Version 4)
# How a file of each format begins: the key of an upload, with its suffix, depends on its bytes alone.
FORMATS = {
    b"\xff\xd8\xff": (".jpg", "image/jpeg"),
    b"\x89PNG": (".png", "image/png"),
    b"GIF8": (".gif", "image/gif"),
    b"BM": (".bmp", "image/bmp"),
    b"RIFF": (".webp", "image/webp"),
}


class Objects(Protocol):
    """Objects by URI. Methods raise StorageUnavailable."""

    def read(self, uri: str) -> bytes:
        """Read an object."""
        ...

    def put(self, uri: str, data: bytes, media_type: str) -> None:
        """Write an object, whole or not at all."""
        ...

    def url(self, uri: str, expires_s: int) -> str:
        """A URL from which a browser can read the object, valid for `expires_s` seconds."""
        ...


@dataclass(frozen=True)
class ResultFile:
    """One file of a result.

    Attributes:
        record: what the manifest says of it: `kind`, `uri`, `media_type`, `bytes`, `width` and so on.
        url: a presigned URL, with which a browser reads it without keys.
        explained: the class that it shows, with its probability; None: it shows all.
    """

    record: ArtifactRecord
    url: str
    explained: ExplainedClass | None
    _objects: Objects = field(compare=False)

    def __repr__(self) -> str:
        """Short, and without the URL, which grants access."""
        return f"ResultFile({self.name!r}, kind={self.kind!r}, class_name={self.class_name!r})"

    @property
    def kind(self) -> str:
        """What it is: overlay, heatmap, grid, animation or report."""
        return self.record.kind

    @property
    def name(self) -> str:
        """Its name in its folder."""
        return unquote(self.record.uri).replace("\\", "/").rpartition("/")[2]

    @property
    def class_name(self) -> str | None:
        """The name of the class that it shows; None: it shows all."""
        return self.explained.class_.name if self.explained else None

    def read(self) -> bytes:
        """Read it from the storage, with the client's settings.

        Returns:
            Its bytes.

        Raises:
            StorageUnavailable: It cannot be read.
        """
        return self._objects.read(self.record.uri)


@dataclass(frozen=True)
class Result:
    """The result of a job that succeeded.

    Attributes:
        manifest: the manifest, with every fact about the artifacts.
        urls: a presigned URL for each artifact, by the artifact's URI.

    Examples:
        >>> result = client.result(job_id)
        >>> [(overlay.class_name, overlay.url) for overlay in result.overlays]
        >>> result.heatmaps.shape  # with numpy
        (5, 14, 14)
        >>> result.save("explained")
    """

    manifest: Manifest
    urls: dict[str, str]
    _objects: Objects = field(compare=False)

    def __repr__(self) -> str:
        """Without the URLs, which grant access."""
        count = len(self.manifest.explanations)
        return f"Result(job_id={self.manifest.job_id!r}, explanations={count}, urls={len(self.urls)})"

    @property
    def predictions(self) -> tuple[ClassScore, ...]:
        """The most probable classes, whether or not they were explained."""
        return self.manifest.predictions

    @property
    def files(self) -> tuple[ResultFile, ...]:
        """Every file once: those of each explained class, in their order, then those that show all."""
        files: dict[str, ResultFile] = {}
        for explained in self.manifest.explanations:
            for record in explained.artifacts:
                shared = record.index is not None  # one file with the arrays of all classes
                file = ResultFile(record, self.urls[record.uri], None if shared else explained, self._objects)
                files.setdefault(record.uri, file)
        for record in self.manifest.artifacts:
            files[record.uri] = ResultFile(record, self.urls[record.uri], None, self._objects)
        return tuple(files.values())

    @property
    def overlays(self) -> tuple[ResultFile, ...]:
        """The heatmaps over the image, one for each explained class; empty where the job asked for none."""
        return self._of_kind("overlay")

    @property
    def report_url(self) -> str | None:
        """A presigned URL of the report; None where the job asked for none."""
        return next((file.url for file in self._of_kind("report")), None)

    @property
    def grid_url(self) -> str | None:
        """A presigned URL of the grid of all overlays; None where the job asked for none."""
        return next((file.url for file in self._of_kind("grid")), None)

    @property
    def animation_url(self) -> str | None:
        """A presigned URL of the animation; None where the job asked for none."""
        return next((file.url for file in self._of_kind("animation")), None)

    @cached_property
    def heatmaps(self) -> "NDArray[np.float32]":
        """The heatmaps as numbers, which are read from the storage the first time.

        Returns:
            An array `(classes, rows, columns)` on the grid of the target layer, in the order of
            `manifest.explanations`.

        Raises:
            NoResult: The job did not ask for the artifact heatmap as npz or npy.
            StorageUnavailable: It cannot be read.
            MissingExtra: numpy is not installed.
        """
        with extras.required("Result.heatmaps, for which numpy alone is enough,"):
            import numpy as np
        if (record := heatmaps_record(self.manifest)) is None:
            message = (
                f"Job {self.manifest.job_id} has left no heatmaps as numbers: its artifacts must contain "
                '"heatmap", as they do by default.'
            )
            raise NoResult(message)
        loaded = np.load(BytesIO(self._objects.read(record.uri)), allow_pickle=False)
        heatmaps: NDArray[np.float32] = loaded if isinstance(loaded, np.ndarray) else loaded["heatmaps"]
        return heatmaps

    def save(self, folder: Path | str) -> list[Path]:
        """Write all files of the result, and its manifest, into a folder of this machine.

        Args:
            folder: The folder. It is created where there is none; files of the same names are replaced.

        Returns:
            The paths, `manifest.json` last.

        Raises:
            StorageUnavailable: A file cannot be read from the storage.
            OSError: One cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for file in self.files:
            paths.append(folder / file.name)
            paths[-1].write_bytes(file.read())
        paths.append(folder / "manifest.json")
        paths[-1].write_text(self.manifest.to_json(), encoding="utf-8")
        return paths

    def _of_kind(self, kind: str) -> tuple[ResultFile, ...]:
        return tuple(file for file in self.files if file.kind == kind)


@dataclass(frozen=True)
class Upload:
    """An image to be uploaded."""

    uri: str
    sha256: str
    data: bytes = field(repr=False)
    media_type: str


def manifest_uri(document: StatusDocument) -> str:
    """The URI of a job's manifest. Raises NoResult."""
    if document.status != "succeeded" or not document.result:
        why = f" ({document.error.code}: {document.error.detail})" if document.error else ""
        message = f"Job {document.id} is {document.status}{why}: only a job that succeeded has a result."
        if document.status == "failed":
            message += " It is tried again, under its id and idempotency key, by retry."
        raise NoResult(message)
    return document.result.manifest_uri


def read(job_id: str, uri: str, objects: Objects, expires_s: int) -> Result:
    """Read the manifest of a job at a URI. Raises NoResult, StorageUnavailable, InvalidSettings."""
    if not 1 <= expires_s <= MAX_EXPIRES_S:
        message = f"expires_s {expires_s} must be from 1 to {MAX_EXPIRES_S:,} seconds."
        raise InvalidSettings(message)
    try:
        manifest = Manifest.model_validate_json(objects.read(uri))
    except ValidationError as error:
        message = f"Job {job_id} has left {uri}, which is no manifest of one image."
        raise NoResult(message) from error
    artifacts = [*manifest.artifacts, *(one for each in manifest.explanations for one in each.artifacts)]
    folder = uri.rpartition("/")[0] + "/"
    # A presigned URL grants access: only to objects beside the manifest, whatever a manifest names.
    if manifest.job_id != job_id or not all(is_below(artifact.uri, folder) for artifact in artifacts):
        message = f"The manifest at {uri} is another's than job {job_id}'s."
        raise NoResult(message)
    urls = {artifact.uri: objects.url(artifact.uri, expires_s) for artifact in artifacts}
    return Result(manifest, urls, objects)


def is_below(uri: str, root: str) -> bool:
    """Whether a URI lies below a root, also after `..` and percent-encoding are resolved."""
    folder = root.rstrip("/") + "/"
    steps = unquote(uri.removeprefix(folder)).replace("\\", "/").split("/")
    return "://" in folder and uri.startswith(folder) and not {"", ".", ".."} & set(steps)


def prepare_upload(image: Path | str | bytes, root: str, max_bytes: int) -> Upload:
    """Read an image of this machine, to be stored below `root`. Nothing is decoded.

    Args:
        image: a path, or the bytes.
        root: the URI below which it is stored.
        max_bytes: the largest size allowed.

    Returns:
        The upload, whose key is made from the SHA-256 of the bytes.

    Raises:
        InvalidSettings: `root` is empty or no URI of a storage.
        ImageNotFound: the file cannot be read.
        ImageTooLarge: it has more than `max_bytes`.
        InvalidJob: it is empty, or a URI.
    """
    if not root:
        message = "GRADCAM_UPLOADS says where images go, as in s3://photos/uploads: set it, or say `to`."
        raise InvalidSettings(message)
    if not is_storage_uri(root):
        message = f"`to` {without_secrets(root)!r} {STORAGE_URI_FORM}."
        raise InvalidSettings(message)
    data = image if isinstance(image, bytes) else _file(image, max_bytes)
    if len(data) > max_bytes:
        raise _too_large(len(data), max_bytes)
    if not data:
        message = "There is nothing to upload: the image has no bytes."
        raise InvalidJob(message)
    sha256 = hashlib.sha256(data).hexdigest()
    formats = (form for begins, form in FORMATS.items() if data.startswith(begins))
    suffix, media_type = next(formats, ("", "application/octet-stream"))
    return Upload(f"{root.rstrip('/')}/{sha256}{suffix}", sha256, data, media_type)


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
            return file.read(max_bytes + 1)  # the size may be unknown, or grow
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        message = f"The image {str(image)!r} cannot be read: {error}."
        raise ImageNotFound(message) from error


def _too_large(size: int, max_bytes: int) -> ImageTooLarge:
    allowed = f"at most {max_bytes:,} are allowed (GRADCAM_MAX_IMAGE_BYTES)"
    return ImageTooLarge(f"The image has {size:,} bytes; {allowed}.")


class SettingsObjects:
    """Objects in S3, with the settings `GRADCAM_S3_*`, and in folders of this machine."""

    def __init__(self, settings: Settings) -> None:
        """Nothing is imported or connected yet."""
        self._settings = settings
        self._s3: dict[int, S3] = {}  # by process: threads do not survive a fork

    def read(self, uri: str) -> bytes:
        """See `Objects.read`."""
        store, key = self._store(uri)
        with _told_truly(store):
            return store.get(key)

    def put(self, uri: str, data: bytes, media_type: str) -> None:
        """See `Objects.put`."""
        store, key = self._store(uri)
        with _told_truly(store):
            store.put(key, data, media_type)

    def url(self, uri: str, expires_s: int) -> str:
        """See `Objects.url`. For a file it is the file's own URI."""
        store, key = self._store(uri)
        if isinstance(store, FolderStore):
            return uri
        with _told_truly(store):
            return store.presigned_url(key, expires_s)

    def upload_url(self, uri: str, media_type: str, size: int, expires_s: int) -> str:
        """A URL to which one object of this type and size can be put, within `expires_s` seconds.

        Raises StorageUnavailable; InvalidSettings where the URI is no object of S3.
        """
        store, key = self._store(uri)
        if isinstance(store, FolderStore):
            message = f"{uri} is in a folder: a browser uploads straight to S3 alone (GRADCAM_UPLOADS)."
            raise InvalidSettings(message)
        return store.presigned_upload(key, media_type, size, expires_s)

    def _store(self, uri: str) -> "tuple[FolderStore | S3Store, str]":
        """The store and the key of a URI."""
        scheme, _, rest = uri.partition("://")
        if scheme == "file":
            path = Path(unquote(rest))
            return FolderStore(path.parent), path.name
        if scheme != "s3":
            message = f"{without_secrets(uri)[:200]!r} is neither in S3 nor on this machine."
            raise StorageUnavailable(message)
        with extras.required("S3", raises=InvalidSettings):
            from gradcam_worker.storage.s3 import S3
            from gradcam_worker.storage.stores import S3Store
        pid = os.getpid()
        if pid not in self._s3:
            self._s3 = {pid: S3(self._settings)}
        bucket, _, key = rest.partition("/")
        return S3Store(self._s3[pid], bucket, ""), key


@contextmanager
def _told_truly(store: object) -> Iterator[None]:
    """Tell whether trying again may help, where S3 could not be used.

    Raises InvalidSettings where the client's own keys are refused or missing, StorageUnavailable otherwise.
    """
    try:
        yield
    except StorageUnavailable as error:
        if isinstance(store, FolderStore):
            raise
        from gradcam_worker.storage import s3_errors

        cause = error.__cause__
        if s3_errors.are_wrong_keys(cause):
            keys = "GRADCAM_S3_ACCESS_KEY_ID and GRADCAM_S3_SECRET_ACCESS_KEY, or AWS's own settings"
            message = f"{keys}: {error} They, the region and the endpoint must belong together."
            raise InvalidSettings(message) from error
        if s3_errors.is_location_error(cause):
            error.retryable = False
        raise
