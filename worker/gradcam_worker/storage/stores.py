"""Where artifacts go: a prefix of a bucket, or a folder."""

import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from gradcam_worker.errors import OutputNotAllowed, StorageUnavailable
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.retry import Retries
from gradcam_worker.settings import Settings
from gradcam_worker.storage.filesystem import FolderStore, Object
from gradcam_worker.storage.s3 import NEVER, S3, STORAGE
from gradcam_worker.storage.s3_errors import FAILED, absent, reason, refused
from gradcam_worker.text.urls import without_secrets

__all__ = ["FolderStore", "Object", "S3Store", "Store", "Stores", "probe"]

PROBE = "health/probe.txt"
MARK = re.compile(rb"[0-9a-f]{32}")  # what a probe writes
SINGLE_TRY = replace(STORAGE, total_s=15.0, max_tries=1)  # for a probe: that it fails is an answer, too
# Of bytes as they are written in UTF-8: S3 takes a key of 1024 in all, file systems mostly names of 255. What
# is left is for a job's id and the name of an artifact.
LONGEST_PLACE, LONGEST_STEP = 640, 200


class Store(Protocol):
    """A place for artifacts, below one prefix.

    Storage that fails is StorageUnavailable, which another attempt at the job may find well again. A place
    that the job has named and that cannot be written is OutputNotAllowed. The operator's own place is the
    worker's affair: it is StorageUnavailable too, so that jobs wait until somebody has put it right.
    """

    def uri(self, key: str) -> str:
        """Where an object is, or would be."""
        ...

    def put(self, key: str, data: bytes, media_type: str) -> str:
        """Write an object, whole or not at all, without insisting; return its URI.

        Raises StorageUnavailable, OutputNotAllowed.
        """
        ...

    def put_many(self, objects: Sequence[Object], deadline: Deadline) -> list[str]:
        """Write objects, whichever first; return their URIs in the order given.

        What fails is tried again, as `gradcam_worker.resilience.retry` says. When that is over no
        other is begun, and it is
        raised when those under way have ended, or when the deadline is over. None begins after that, or
        after the deadline was cancelled; what was under way may still arrive, the same bytes under the same
        key but for their last digits (see `gradcam_worker.artifacts.artifacts`).
        Raises StorageUnavailable, OutputNotAllowed, JobTimeout, and what the deadline was cancelled with.
        """
        ...

    def find(self, key: str, deadline: Deadline) -> bytes | None:
        """Read an object back; none where there is no such, as far as the worker may know.

        Raises StorageUnavailable, JobTimeout, and what the deadline was cancelled with.
        """
        ...

    def get(self, key: str) -> bytes:
        """Read an object back, without insisting. Raises StorageUnavailable."""
        ...

    def names(self, folder: str) -> Iterator[str]:
        """The keys of all objects below a folder, in order. Raises StorageUnavailable."""
        ...

    def remove(self, key: str) -> None:
        """Have an object no more, if there is one. Raises StorageUnavailable."""
        ...


class S3Store:
    """A prefix of a bucket."""

    def __init__(
        self, s3: S3, bucket: str, prefix: str, *, own: bool = True, observer: Observer = NULL_OBSERVER
    ) -> None:
        """`prefix` has no slash at either end. `own`: the operator has chosen this place, not a job."""
        self._s3, self._bucket, self._prefix, self._own = s3, bucket, f"{prefix}/" if prefix else "", own
        self._observer = observer

    def uri(self, key: str) -> str:
        """See `Store.uri`."""
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def put(self, key: str, data: bytes, media_type: str) -> str:
        """See `Store.put`."""
        return self._put_all([(key, data, media_type)], NEVER, SINGLE_TRY.start())[0]

    def put_many(self, objects: Sequence[Object], deadline: Deadline) -> list[str]:
        """See `Store.put_many`: in parallel."""
        return self._put_all(objects, deadline, STORAGE.start(deadline))

    def _put_all(self, objects: Sequence[Object], deadline: Deadline, retries: Retries) -> list[str]:

        def put(one: Object) -> str:
            deadline.check("upload")
            return self._put(one, retries)

        begun = [self._s3.pool.submit(put, one) for one in objects]
        try:
            return retries.wait_for(begun, "upload")
        except FAILED as error:
            message = f"{self.uri('')} could not be written: {reason(error)}"
            raise StorageUnavailable(message) from error

    def _put(self, one: Object, retries: Retries) -> str:
        key, data, media_type = one
        uri = self.uri(key)
        try:
            self._s3.put(self._bucket, self._prefix + key, data, media_type, retries)
        except FAILED as error:
            message = f"{uri} could not be written: {reason(error)}"
            here = refused(error) and not self._own
            raise (OutputNotAllowed if here else StorageUnavailable)(message) from error
        self._observer.artifact_written(len(data))
        return uri

    def find(self, key: str, deadline: Deadline) -> bytes | None:
        """See `Store.find`."""
        try:
            return self._read(key, STORAGE.start(deadline))
        except StorageUnavailable as error:
            if absent(error.__cause__):
                return None
            raise

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        return self._read(key, SINGLE_TRY.start())

    def names(self, folder: str) -> Iterator[str]:
        """See `Store.names`."""
        try:
            for found in self._s3.listed(self._bucket, f"{self._prefix}{folder}/"):
                yield found.key.removeprefix(self._prefix)
        except FAILED as error:
            message = f"{self.uri(folder)} could not be listed: {reason(error)}"
            raise StorageUnavailable(message) from error

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        try:
            self._s3.remove(self._bucket, self._prefix + key)
        except FAILED as error:
            message = f"{self.uri(key)} could not be removed: {reason(error)}"
            raise StorageUnavailable(message) from error

    def presigned(self, key: str, expires_s: int) -> str:
        """Where a browser can read an object, for so many seconds. Raises StorageUnavailable."""
        try:
            return self._s3.presigned(self._bucket, self._prefix + key, expires_s)
        except FAILED as error:
            message = f"{self.uri(key)} cannot be given a URL: {reason(error)}"
            raise StorageUnavailable(message) from error

    def _read(self, key: str, retries: Retries) -> bytes:
        try:
            return self._s3.read(self._bucket, self._prefix + key, retries)
        except FAILED as error:
            message = f"{self.uri(key)} could not be read: {reason(error)}"
            raise StorageUnavailable(message) from error


class Stores:
    """Opens the places that the operator allows, and no others."""

    def __init__(self, settings: Settings, s3: S3, observer: Observer = NULL_OBSERVER) -> None:
        """The default output and every prefix in `output_prefixes` are allowed."""
        self._default = settings.output.rstrip("/")
        self._allowed = (self._default, *(one.rstrip("/") for one in settings.output_prefixes))
        self._s3, self._observer = s3, observer
        self._reads_s3 = "s3" in settings.image_schemes

    def open(self, uri: str | None = None) -> Store:
        """The store at `uri`, or the default one. Raises OutputNotAllowed."""
        wanted = self._default if uri is None else uri.rstrip("/")
        base = max((one for one in self._allowed if _below(wanted, one)), key=len, default=None)
        if base is None or _odd(wanted):
            shown, places = without_secrets(wanted)[:200], " or ".join(self._allowed)
            message = (
                f"Output {shown!r} is not allowed: it must be below {places}, in at most {LONGEST_PLACE} "
                f"bytes, {LONGEST_STEP} between two slashes, and without ?, #, .. or what cannot be printed."
            )
            raise OutputNotAllowed(message)
        own = _below(wanted, self._default)
        scheme, _, rest = wanted.partition("://")
        if scheme == "file":
            root = unquote(base.partition("://")[2])
            return FolderStore(Path(root), unquote(rest)[len(root) :], own=own, observer=self._observer)
        bucket, _, prefix = rest.partition("/")
        return S3Store(self._s3, bucket, prefix, own=own, observer=self._observer)

    def check_identity(self) -> None:
        """Raise StorageUnavailable where images are read from S3 and the worker has no keys for it."""
        try:
            if self._reads_s3:
                self._s3.check_identity()
        except FAILED as error:
            message = f"Images cannot be read from S3: {reason(error)}"
            raise StorageUnavailable(message) from error


def _below(wanted: str, allowed: str) -> bool:
    return wanted == allowed or wanted.startswith(allowed + "/")


def _odd(uri: str) -> bool:
    """Whether a URL parser, a file system or a store would read it in another way than it is written."""
    scheme, _, rest = uri.partition("://")
    plain = unquote(rest)
    if not plain.isprintable():
        return True  # half a character, too, which has no bytes
    steps = plain.replace("\\", "/").split("/")
    long = len(plain.encode()) > LONGEST_PLACE or any(len(one.encode()) > LONGEST_STEP for one in steps)
    elsewhere = {".", ".."} & set(steps) or "" in steps[1:] or {"?", "#"} & set(plain)
    return long or bool(elsewhere) or (scheme == "file" and not plain.startswith("/"))


def probe(store: Store) -> str:
    """Write and read something as a job does; return where. Raises StorageUnavailable."""
    written = uuid.uuid4().hex.encode()
    uri = store.put(PROBE, written, "text/plain")
    found = store.get(PROBE)
    if found != written and not MARK.fullmatch(found):  # another worker's, which begins at the same time
        message = f"{uri} was written but reads back differently."
        raise StorageUnavailable(message)
    return uri
