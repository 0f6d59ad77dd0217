"""Where artifacts go: a prefix of a bucket, or a folder."""

import tempfile
import uuid
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from worker.deadline import Deadline
from worker.errors import OutputNotAllowed, StorageUnavailable
from worker.s3 import FAILED, NEVER, NOT_FOUND, S3
from worker.settings import Settings

PROBE = "health/probe.txt"
Object = tuple[str, bytes, str]  # key, data, media type


class Store(Protocol):
    """A place for artifacts, below one prefix."""

    def uri(self, key: str) -> str:
        """Where an object is, or would be."""
        ...

    def put(self, key: str, data: bytes, media_type: str) -> str:
        """Write an object, whole or not at all; return its URI. Raises StorageUnavailable."""
        ...

    def put_many(self, objects: Sequence[Object], deadline: Deadline) -> list[str]:
        """Write objects, whichever first; return their URIs in the order given.

        After a failure no other is begun; it is raised when those under way have ended.
        Raises StorageUnavailable, JobTimeout.
        """
        ...

    def find(self, key: str) -> bytes | None:
        """Read an object back; none where there is no such. Raises StorageUnavailable."""
        ...

    def get(self, key: str) -> bytes:
        """Read an object back. Raises StorageUnavailable."""
        ...


class S3Store:
    """A prefix of a bucket."""

    def __init__(self, s3: S3, bucket: str, prefix: str) -> None:
        """`prefix` has no slash at either end."""
        self._s3, self._bucket, self._prefix = s3, bucket, f"{prefix}/" if prefix else ""

    def uri(self, key: str) -> str:
        """See `Store.uri`."""
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def put(self, key: str, data: bytes, media_type: str) -> str:
        """See `Store.put`."""
        return self._put((key, data, media_type), NEVER)

    def _put(self, one: Object, deadline: Deadline) -> str:
        key, data, media_type = one
        name, uri = self._prefix + key, self.uri(key)
        try:
            self._s3.put(self._bucket, name, data, media_type, deadline)
        except FAILED as error:
            message = f"{uri} could not be written: {error}"
            raise StorageUnavailable(message) from error
        return uri

    def put_many(self, objects: Sequence[Object], deadline: Deadline) -> list[str]:
        """See `Store.put_many`: in parallel."""

        def put(one: Object) -> str:
            deadline.check("upload")
            return self._put(one, deadline)

        begun = [self._s3.pool.submit(put, one) for one in objects]
        wait(begun, return_when=FIRST_EXCEPTION)
        for one in begun:
            one.cancel()  # nothing, unless one has failed
        wait(begun)
        return [one.result() for one in begun if not one.cancelled()]

    def find(self, key: str) -> bytes | None:
        """See `Store.find`."""
        try:
            return self.get(key)
        except StorageUnavailable as error:
            cause = error.__cause__
            status = getattr(cause, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status == NOT_FOUND:
                return None
            raise

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        name = self._prefix + key
        try:
            body = self._s3.client.get_object(Bucket=self._bucket, Key=name)["Body"].read()
        except FAILED as error:
            message = f"s3://{self._bucket}/{name} could not be read: {error}"
            raise StorageUnavailable(message) from error
        return bytes(body)


def put_each(store: Store, objects: Sequence[Object], deadline: Deadline) -> list[str]:
    """Put one object after the other."""
    uris = []
    for one in objects:
        deadline.check("upload")
        uris.append(store.put(*one))
    return uris


class FolderStore:
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        """Folders are made as they are needed."""
        self._root = root.absolute()

    def uri(self, key: str) -> str:
        """See `Store.uri`."""
        return (self._root / key).as_uri()

    def put(self, key: str, data: bytes, media_type: str) -> str:  # noqa: ARG002  # files have no type
        """See `Store.put`: written beside its place, then moved there in one step."""
        path = self._root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(data)
            Path(file.name).chmod(0o644)  # a temporary file is its maker's alone
            Path(file.name).replace(path)
        except OSError as error:
            message = f"{path} could not be written: {error}"
            raise StorageUnavailable(message) from error
        return self.uri(key)

    def put_many(self, objects: Sequence[Object], deadline: Deadline) -> list[str]:
        """See `Store.put_many`: one after the other, for a disk is waited for but little."""
        return put_each(self, objects, deadline)

    def find(self, key: str) -> bytes | None:
        """See `Store.find`."""
        return self.get(key) if (self._root / key).exists() else None

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        try:
            return (self._root / key).read_bytes()
        except OSError as error:
            message = f"{self._root / key} could not be read: {error}"
            raise StorageUnavailable(message) from error


class Stores:
    """Opens the places that the operator allows, and no others."""

    def __init__(self, settings: Settings, s3: S3) -> None:
        """The default output and every prefix in `output_prefixes` are allowed."""
        self._default = settings.output
        self._allowed = (settings.output, *settings.output_prefixes)
        self._s3 = s3

    def open(self, uri: str | None = None) -> Store:
        """The store at `uri`, or the default one. Raises OutputNotAllowed."""
        wanted = (uri or self._default).rstrip("/")
        scheme, _, rest = wanted.partition("://")
        plain = unquote(rest)
        steps = plain.replace("\\", "/").split("/")
        below = any(
            wanted == allowed.rstrip("/") or wanted.startswith(allowed.rstrip("/") + "/")
            for allowed in self._allowed
        )
        # Nothing that a URL parser or a file system would read in another way than it is written.
        odd = (
            {".", ".."} & set(steps) or "" in steps[1:] or {"?", "#"} & set(plain) or not plain.isprintable()
        )
        if not below or odd:
            message = f"Output {uri!r} is not allowed: it must be below {' or '.join(self._allowed)}."
            raise OutputNotAllowed(message)
        if scheme == "file":
            return FolderStore(Path(plain))
        bucket, _, prefix = rest.partition("/")
        return S3Store(self._s3, bucket, prefix)


def probe(store: Store) -> str:
    """Write and read something as a job does; return where. Raises StorageUnavailable."""
    written = uuid.uuid4().hex.encode()
    uri = store.put(PROBE, written, "text/plain")
    if store.get(PROBE) != written:
        message = f"{uri} was written but reads back differently."
        raise StorageUnavailable(message)
    return uri
