"""Where artifacts go: S3 and everything that speaks it (boto3), or a folder. Also reads S3 images."""

import tempfile
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import boto3
import urllib3.exceptions
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

from worker.deadline import Deadline
from worker.errors import (
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    OutputNotAllowed,
    StorageUnavailable,
    UriNotAllowed,
    WeightsUnavailable,
)
from worker.gradcam.weights import Sink
from worker.settings import Settings

NOT_FOUND, FORBIDDEN = 404, {401, 403}
CHUNK = 256 * 1024  # bytes read at a time, so that limits are noticed early


class Store(Protocol):
    """A place for artifacts, below one prefix."""

    def put(self, key: str, data: bytes, media_type: str) -> str:
        """Write an object, whole or not at all; return its URI. Raises StorageUnavailable."""
        ...

    def get(self, key: str) -> bytes:
        """Read an object back. Raises StorageUnavailable."""
        ...


class S3:
    """One client for everything; boto3 clients may be shared between threads."""

    def __init__(self, settings: Settings) -> None:
        """Endpoint, region and keys as the settings say; without keys, the usual AWS places."""
        self.client: Any = boto3.session.Session().client(
            "s3",
            endpoint_url=settings.s3_endpoint_url or None,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key_id or None,
            aws_secret_access_key=settings.s3_secret_access_key.get_secret_value() or None,
            config=Config(
                signature_version="s3v4",
                connect_timeout=3,
                read_timeout=10,
                retries={"mode": "standard", "total_max_attempts": 3},
                max_pool_connections=2 * settings.threads,
                s3={"addressing_style": "path" if settings.s3_endpoint_url else "auto"},
                # Not every S3 server knows the newer checksums; sha256 is in the manifest.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def read_image(self, bucket: str, key: str, max_bytes: int, deadline: Deadline) -> bytes:
        """Read an object, giving up as soon as it proves too large or too slow.

        Raises ImageNotFound, ImageForbidden, ImageTooLarge, ImageFetchFailed, JobTimeout.
        """
        uri = f"s3://{bucket}/{key}"
        try:
            body = self.client.get_object(Bucket=bucket, Key=key)["Body"]
            data = bytearray()
            while chunk := body.read(CHUNK):
                data += chunk
                if len(data) > max_bytes:
                    body.close()
                    message = f"{uri} has more than {max_bytes:,} bytes, the most that is allowed."
                    raise ImageTooLarge(message)
                deadline.check(f"reading {uri}")
        except ClientError as error:
            raise _unreadable(uri, error) from error
        except ParamValidationError as error:
            message = f"{uri} is not the name of an object: {str(error).splitlines()[-1][:200]}"
            raise UriNotAllowed(message) from error
        except (BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
            deadline.check(f"reading {uri}")
            message = f"{uri} could not be read: {error}"
            raise ImageFetchFailed(message) from error
        return bytes(data)

    def download(self, uri: str, sink: Sink) -> None:
        """Write what a model's address holds into `sink`, however large. Raises WeightsUnavailable."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        try:
            body = self.client.get_object(Bucket=bucket, Key=key)["Body"]
            while chunk := body.read(CHUNK):
                sink.write(chunk)
        except ClientError as error:
            raise WeightsUnavailable(str(_unreadable(uri, error))) from error
        except (BotoCoreError, urllib3.exceptions.HTTPError, OSError) as error:
            message = f"{uri} could not be read: {error}"
            raise WeightsUnavailable(message) from error


def _unreadable(uri: str, error: ClientError) -> Exception:
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = error.response.get("Error", {}).get("Code", "")
    if status == NOT_FOUND:
        what = "bucket" if code == "NoSuchBucket" else "object"
        return ImageNotFound(f"There is no such {what}: {uri}.")
    if status in FORBIDDEN:
        return ImageForbidden(f"The worker may not read {uri} ({code}): grant it s3:GetObject there.")
    return ImageFetchFailed(f"{uri} could not be read: {code or status} ({error}).")


class S3Store:
    """A prefix of a bucket."""

    def __init__(self, s3: S3, bucket: str, prefix: str) -> None:
        """`prefix` has no slash at either end."""
        self._s3, self._bucket, self._prefix = s3, bucket, f"{prefix}/" if prefix else ""

    def put(self, key: str, data: bytes, media_type: str) -> str:
        """See `Store.put`."""
        name = self._prefix + key
        uri = f"s3://{self._bucket}/{name}"
        try:
            self._s3.client.put_object(Bucket=self._bucket, Key=name, Body=data, ContentType=media_type)
        except (BotoCoreError, ClientError, urllib3.exceptions.HTTPError, OSError) as error:
            message = f"{uri} could not be written: {error}"
            raise StorageUnavailable(message) from error
        return uri

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        name = self._prefix + key
        try:
            body = self._s3.client.get_object(Bucket=self._bucket, Key=name)["Body"].read()
        except (BotoCoreError, ClientError, urllib3.exceptions.HTTPError, OSError) as error:
            message = f"s3://{self._bucket}/{name} could not be read: {error}"
            raise StorageUnavailable(message) from error
        return bytes(body)


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
