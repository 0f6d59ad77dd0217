"""S3 and everything that speaks it, in two libraries.

What is done for every job, reading an image and writing artifacts, is tried with obstore first: a put
costs it a sixth of boto3's CPU time, none of it under the interpreter's lock. Whatever does not go well
there is done again by boto3, at once: it follows a bucket to its region, and says what is wrong. What may go
well later it tries again, as long as `worker.patience` allows; neither library retries anything by itself.
"""

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import boto3
import obstore.store
import urllib3.exceptions
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from botocore.parsers import ResponseParserError
from obstore.auth.boto3 import Boto3CredentialProvider

from worker.deadline import Deadline
from worker.errors import (
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    UriNotAllowed,
    WeightsUnavailable,
)
from worker.gradcam.weights import Sink
from worker.logs import Pool
from worker.patience import PATIENCE_S, Patience
from worker.settings import Settings
from worker.shard import READERS
from worker.wire import MAX_KEY_BYTES

log = logging.getLogger("gradcam")

NOT_FOUND, FORBIDDEN = 404, {401, 403}
BRIEF = {307, 408, 409, 423, 425, 429}  # of all that a client is to blame for, what may be gone next time
BRIEF_CODES = {"RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling", "OperationAborted"}
NOT_IMPLEMENTED = 501
# What a server says of the worker's own keys or clock, which no job is to blame for.
OWN_FAULTS = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
CHUNK = 32 * 1024  # bytes read at a time, so that limits are noticed early, of a slow server too
CONNECT_S, READ_S = 3, 10
BUCKETS = 32  # that connections are kept for
PLAIN_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
FAILED = (BotoCoreError, ClientError, ResponseParserError, urllib3.exceptions.HTTPError, OSError)
PANICS = "pyo3_runtime"  # the module of what a library in Rust raises when it panics: a BaseException
T = TypeVar("T")
Chunk = bytes | obstore.Bytes
NEVER = Deadline(math.inf)


class Panicked(Exception):
    """Obstore has met what it takes for impossible. What it was doing was not done."""


NOT_DIRECT = (obstore.exceptions.BaseError, Panicked, OSError, ValueError)
ASKED_S = 15  # that a page of a listing, or a deletion, is asked for
DOWNLOAD_S = 3  # that a model's file is asked for again, before a byte of it has come


@dataclass(frozen=True)
class Listed:
    """An object of a bucket, as a listing names it."""

    key: str
    size: int  # bytes
    etag: str  # changes with its contents


class S3:
    """One client for everything, in both libraries; may be shared between threads."""

    def __init__(self, settings: Settings) -> None:
        """Endpoint, region and keys as the settings say; without keys, the usual AWS places."""
        at_once = 4 * settings.threads  # a job waits for its objects, and each of them for the network
        self.pool = Pool(at_once, thread_name_prefix="upload")
        # Apart, so that no image waits for artifacts; more than jobs, should a server hold some of them.
        at_most = 2 * (settings.threads + READERS * settings.shards)
        self._readers = Pool(at_most, thread_name_prefix="read")
        self._fetch_s = settings.fetch_timeout_s
        self._session: Any = boto3.session.Session(
            settings.s3_access_key_id or None, settings.s3_secret_access_key.get_secret_value() or None
        )
        self._region = settings.s3_region
        self._bucket = lru_cache(BUCKETS)(self._open)
        self._at_once = at_once
        self.client = self._asking(settings.s3_endpoint_url)
        # Whom browsers ask is not always whom we ask: a signature holds the host's name.
        public = settings.s3_public_url
        self._signing = self._asking(public) if public else self.client

    def _asking(self, endpoint: str) -> Any:
        """Boto3's client of a server; Amazon's, where none is named."""
        return self._session.client(
            "s3",
            endpoint_url=endpoint or None,
            region_name=self._region,
            config=Config(
                signature_version="s3v4",
                connect_timeout=CONNECT_S,
                read_timeout=READ_S,
                retries={"mode": "standard", "total_max_attempts": 1},  # see worker.patience
                max_pool_connections=self._at_once,
                s3={"addressing_style": "path" if endpoint else "auto"},
                # Not every S3 server knows the newer checksums; sha256 is in the manifest.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def _open(self, bucket: str) -> obstore.store.S3Store:
        """A bucket where boto3 would find it, with the keys that boto3 has found."""
        if not PLAIN_BUCKET.fullmatch(bucket):
            message = f"Bucket {bucket!r} cannot be part of a URL as it is."
            raise ValueError(message)
        scheme, _, host = self.client.meta.endpoint_url.partition("://")
        virtual = ".amazonaws.com" in host and "." not in bucket  # which no certificate would cover
        url = f"{scheme}://{bucket}.{host}" if virtual else f"{scheme}://{host.rstrip('/')}/{bucket}"
        own = self._session._session.get_config_variable("ca_bundle")  # noqa: SLF001  # boto3 has no other way
        return obstore.store.S3Store(
            bucket,
            # Said twice: each of them could be set in the environment, and would go before the other.
            endpoint=url,
            aws_endpoint_url_s3=url,
            virtual_hosted_style_request=True,  # the URL names the bucket already
            region=self._region,
            skip_signature=False,
            # Asked again well before keys can run out, which boto3 renews 10 minutes early at the latest.
            credential_provider=Boto3CredentialProvider(self._session, ttl=timedelta(minutes=5)),
            retry_config={"max_retries": 0},
            client_options={
                "allow_http": scheme == "http",
                "connect_timeout": timedelta(seconds=CONNECT_S),
                "read_timeout": timedelta(seconds=READ_S),
                "timeout": timedelta(seconds=max(PATIENCE_S, self._fetch_s)),  # of a whole request
                **({"root_certificate": Path(own).read_bytes()} if own else {}),
            },
        )

    def _directly(self, bucket: str, key: str) -> obstore.store.S3Store:
        """The bucket in obstore. Raises ValueError for keys that it would change, or could not ask for."""
        if key.startswith("/") or key.endswith("/"):
            message = f"Key {key!r} would lose a slash."
            raise ValueError(message)
        if len(key.encode(errors="surrogatepass")) > MAX_KEY_BYTES:
            message = f"Key {key[:100]!r}... has more than {MAX_KEY_BYTES:,} bytes."
            raise ValueError(message)
        return self._bucket(bucket)

    def put(
        self, bucket: str, key: str, data: bytes, media_type: str, patience: Patience | None = None
    ) -> None:
        """Write an object, whole or not at all. Raises one of FAILED, or what ended the job."""

        def direct() -> None:
            attributes: obstore.Attributes = {"Content-Type": media_type}
            self._directly(bucket, key).put(key, data, attributes=attributes, use_multipart=False)

        def thorough() -> None:
            self.client.put_object(Bucket=bucket, Key=key, Body=data, ContentType=media_type)

        _both(f"s3://{bucket}/{key}", direct, thorough, patience or Patience(NEVER))

    def read(
        self, bucket: str, key: str, patience: Patience, most: Callable[[int], None] = lambda _: None
    ) -> bytes:
        """Read an object, waiting no longer than `patience` has. Raises one of FAILED, what ended the job,
        and what `most` raises, which is told how many bytes there are, before and while they come.
        """
        uri = f"s3://{bucket}/{key}"

        def check(size: int) -> None:
            most(size)
            patience.check(f"reading {uri}")

        def direct() -> bytes:
            found = self._directly(bucket, key).get(key)
            check(found.meta["size"])
            return _joined(found.stream(CHUNK), check)

        def thorough() -> bytes:
            body = self.client.get_object(Bucket=bucket, Key=key)["Body"]
            with contextlib.closing(body):
                return _joined(iter(partial(body.read, CHUNK), b""), check)

        reading = self._readers.submit(_both, uri, direct, thorough, patience)
        return patience.gather([reading], f"reading {uri}")[0]

    def presigned(self, bucket: str, key: str, expires_s: int) -> str:
        """A URL with which anybody may read an object, for so many seconds. Raises one of FAILED."""
        what = {"Bucket": bucket, "Key": key}
        return str(self._signing.generate_presigned_url("get_object", Params=what, ExpiresIn=expires_s))

    def listed(self, bucket: str, prefix: str) -> Iterator[Listed]:
        """All objects whose keys begin with `prefix`, in order, page by page. Raises one of FAILED."""
        token: dict[str, str] = {}
        while True:
            ask = partial(self.client.list_objects_v2, Bucket=bucket, Prefix=prefix, **token)
            page = Patience(NEVER, ASKED_S).insist(ask, FAILED, hopeless)
            for one in page.get("Contents", ()):
                yield Listed(one["Key"], one["Size"], one.get("ETag", "").strip('"'))
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def remove(self, bucket: str, key: str) -> None:
        """Delete an object, if there is one. Raises one of FAILED."""
        ask = partial(self.client.delete_object, Bucket=bucket, Key=key)
        Patience(NEVER, ASKED_S).insist(ask, FAILED, hopeless)

    def read_image(self, bucket: str, key: str, max_bytes: int, deadline: Deadline) -> bytes:
        """Read an object, giving up as soon as it proves too large or too slow.

        Raises ImageNotFound, ImageForbidden, ImageTooLarge, ImageFetchFailed, UriNotAllowed, JobTimeout.
        """
        uri = f"s3://{bucket}/{key}"

        def most(size: int) -> None:
            if size > max_bytes:
                message = f"{uri} has more than {max_bytes:,} bytes, the most that is allowed."
                raise ImageTooLarge(message)

        try:
            return self.read(bucket, key, Patience(deadline, self._fetch_s), most)
        except ClientError as error:
            raise _unreadable(uri, error) from error
        except ParamValidationError as error:
            message = f"{uri} is not the name of an object: {str(error).splitlines()[-1][:200]}"
            raise UriNotAllowed(message) from error
        except FAILED as error:
            message = f"{uri} could not be read: {reason(error)}"
            raise ImageFetchFailed(message) from error

    def download(self, uri: str, sink: Sink) -> None:
        """Write what a model's address holds into `sink`, however large. Raises WeightsUnavailable."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        asked = partial(self.client.get_object, Bucket=bucket, Key=key)
        try:
            found = Patience(NEVER, DOWNLOAD_S).insist(asked, FAILED, hopeless)
            body = found["Body"]
            sink.expect(found["ContentLength"])
            while chunk := body.read(CHUNK):
                sink.write(chunk)
        except ClientError as error:
            raise WeightsUnavailable(str(_unreadable(uri, error))) from error
        except FAILED as error:
            message = f"{uri} could not be read: {reason(error)}"
            raise WeightsUnavailable(message) from error


def hopeless(error: Exception) -> bool:
    """Whether asking again in the same way is of no use."""
    if not isinstance(error, ClientError):
        return isinstance(error, ParamValidationError | NoCredentialsError | PartialCredentialsError)
    status, code = told(error)
    final = 300 <= status < 500 or status == NOT_IMPLEMENTED  # noqa: PLR2004  # classes of HTTP
    return final and status not in BRIEF and code not in BRIEF_CODES


def refused(error: Exception) -> bool:
    """Whether this place is what cannot be used: not the server just now, not the worker's own keys."""
    return isinstance(error, ParamValidationError) or (
        isinstance(error, ClientError) and hopeless(error) and told(error)[1] not in OWN_FAULTS
    )


def absent(error: BaseException | None) -> bool:
    """Whether a server says, as far as it may, that there is no such object.

    Who may read an object but not list its bucket is told that a missing one is forbidden.
    """
    return isinstance(error, ClientError) and (
        told(error)[0] == NOT_FOUND or told(error) == (403, "AccessDenied")
    )


def told(error: ClientError) -> tuple[int, str]:
    """The HTTP status and the code of a server's answer."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(error.response.get("Error", {}).get("Code", ""))


def reason(error: Exception) -> str:
    """What went wrong, in the server's own words where it has said any."""
    if not isinstance(error, ClientError):
        return str(error).partition("\n")[0]
    words = error.response.get("Error", {}).get("Message", "")
    return " ".join(dict.fromkeys(("HTTP", *map(str, told(error)), words))).strip()


def _both(uri: str, direct: Callable[[], T], thorough: Callable[[], T], patience: Patience) -> T:
    """Obstore once, then boto3 until there is no more patience."""
    patience.check(f"storage, {uri}")
    try:
        return _without_panic(direct)
    except NOT_DIRECT as error:
        if not isinstance(error, FileNotFoundError):  # an everyday matter
            log.info("%r: boto3 tries again (%s)", uri, str(error).partition("\n")[0])
            if not isinstance(error, ValueError):  # it has asked nobody
                patience.blame(error)
    if not patience.left_s():
        patience.give_up(f"storage, {uri}")
    return patience.insist(thorough, FAILED, hopeless)


def _without_panic(direct: Callable[[], T]) -> T:
    """What obstore gives. Where it panics, Panicked, which `except Exception` does not pass over."""
    try:
        return direct()
    except BaseException as error:
        if type(error).__module__ != PANICS:
            raise
        message = f"obstore panicked: {error}"
        raise Panicked(message) from error


def _joined(chunks: Iterable[Chunk], check: Callable[[int], None]) -> bytes:
    """Chunks as they come, the size of all so far checked after each."""
    taken, size = [], 0
    for chunk in chunks:
        taken.append(chunk)
        size += len(chunk)
        check(size)
    return b"".join(taken)


def _unreadable(uri: str, error: ClientError) -> Exception:
    status, code = told(error)
    if status == NOT_FOUND:
        what = "bucket" if code == "NoSuchBucket" else "object"
        return ImageNotFound(f"There is no such {what}: {uri}.")
    if status in FORBIDDEN and code not in OWN_FAULTS:
        hidden = "Where it may not list the bucket, a missing object is forbidden, too."
        return ImageForbidden(
            f"The worker may not read {uri} ({code}): grant it s3:GetObject there. {hidden}"
        )
    return ImageFetchFailed(f"{uri} could not be read: {reason(error)}.")
