"""Where artifacts go: a prefix of a bucket, or a folder."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from worker.deadline import Deadline
from worker.errors import OutputNotAllowed, StorageUnavailable
from worker.s3 import FAILED, NEVER, S3
from worker.settings import Settings

Object = tuple[str, bytes, str]  # key, data, media type


class Store(Protocol):
    """A place for artifacts, below one prefix."""

    def put(self, key: str, data: bytes, media_type: str) -> str:
        """Write an object, whole or not at all; return its URI. Raises StorageUnavailable."""
        ...

    def put_many(self, objects: Sequence[Object], deadline: Deadline) -> list[str]:
        """Write objects, whichever first; return their URIs in the order given.

        After a failure no other is begun; it is raised when those under way have ended.
        Raises StorageUnavailable, JobTimeout.
        """
        ...

    def get(self, key: str) -> bytes:
        """Read an object back. Raises StorageUnavailable."""
        ...


class S3Store:
    """A prefix of a bucket."""

    def __init__(self, s3: S3, bucket: str, prefix: str) -> None:
        """`prefix` has no slash at either end."""
        self._s3, self._bucket, self._prefix = s3, bucket, f"{prefix}/" if prefix else ""

    def put(self, key: str, data: bytes, media_type: str) -> str:
        """See `Store.put`."""
        return self._put((key, data, media_type), NEVER)

    def _put(self, one: Object, deadline: Deadline) -> str:
        key, data, media_type = one
        name = self._prefix + key
        uri = f"s3://{self._bucket}/{name}"
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
        return path.as_uri()

    def put_many(self, objects: Sequence[Object], deadline: Deadline) -> list[str]:
        """See `Store.put_many`: one after the other, for a disk is waited for but little."""
        return put_each(self, objects, deadline)

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
