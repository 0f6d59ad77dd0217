"""S3 and everything that speaks it, in two libraries.

What is done for every job, reading an image and writing artifacts, is tried with obstore first: a put
costs it a sixth of boto3's CPU time, none of it under the interpreter's lock. Whatever does not go well
there is done again by boto3, at once: it follows a bucket to its region, and says what is wrong. What may go
well later it tries again, as long as `gradcam_worker.resilience.retry` allows; neither library retries
anything by itself.
"""

import base64
import contextlib
import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import obstore.store
from botocore.config import Config
from botocore.exceptions import ClientError
from obstore.auth.boto3 import Boto3CredentialProvider

from gradcam_worker.errors import ImageTooLarge, WeightsUnavailable
from gradcam_worker.gradcam.models.weights import Sink
from gradcam_worker.observability.logs import ContextThreadPool
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.retry import HALF_OR_MORE, Retries, RetryPolicy
from gradcam_worker.schemas import bucket_names
from gradcam_worker.schemas.bucket_names import LONGEST
from gradcam_worker.schemas.model import MAX_KEY_BYTES
from gradcam_worker.schemas.shard import READERS
from gradcam_worker.settings import Settings
from gradcam_worker.storage import credentials
from gradcam_worker.storage.s3_errors import (
    FAILED,
    InvalidBucket,
    InvalidListing,
    hopeless,
    unreadable,
    wants_checksum,
)

log = logging.getLogger("gradcam")

CHUNK = 32 * 1024  # bytes read at a time, so that limits are noticed early, of a slow server too
CONNECT_S, READ_S = 3, 10
BUCKETS = 32  # that connections are kept for
PLAIN_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
PANICS = "pyo3_runtime"  # the module of what a library in Rust raises when it panics: a BaseException
T = TypeVar("T")
Chunk = bytes | obstore.Bytes
NEVER = Deadline(math.inf)
EMPTY_PAGES = 100  # of a listing, one after the other, that a server may need to pass over what is deleted


class Panicked(Exception):
    """Obstore has met what it takes for impossible. What it was doing was not done."""


NOT_DIRECT = (obstore.exceptions.BaseError, Panicked, OSError, ValueError)
# A store that was restarted is back within `total_s`; then the job makes way for others, and its next attempt
# may fare better.
STORAGE = RetryPolicy(
    first_s=0.25, max_s=5.0, jitter=HALF_OR_MORE, total_s=30.0, errors=FAILED, hopeless=hopeless
)
REQUEST = replace(STORAGE, total_s=15.0)  # a page of a listing, or a deletion: there may be many
DOWNLOAD = replace(STORAGE, total_s=3.0)  # a model's file, before a byte of it has come: a job waits


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
        self.pool = ContextThreadPool(at_once, thread_name_prefix="upload")
        # Apart, so that no image waits for artifacts; more than jobs, should a server hold some of them.
        at_most = 2 * (settings.threads + READERS * settings.shards)
        self._readers = ContextThreadPool(at_most, thread_name_prefix="read")
        self._fetch_s = settings.fetch_timeout_s
        key, secret = settings.s3_access_key_id, settings.s3_secret_access_key.get_secret_value()
        core = credentials.session(settings.region)
        self._session: Any = boto3.session.Session(key or None, secret or None, botocore_session=core)
        self._region = settings.region
        endpoint = settings.s3_endpoint_url or credentials.endpoint(core)
        self._own_server = bool(endpoint)
        self._checksummed: set[str] = set()  # buckets that want a checksum of each object
        self._bucket = lru_cache(BUCKETS)(self._open)
        self._at_once = at_once
        self.client = self._asking(endpoint)
        # Whom browsers ask is not always whom we ask: a signature holds the host's name.
        public = settings.s3_public_url
        self._signing = self._asking(public) if public else self.client

    def _asking(self, endpoint: str) -> Any:
        """Boto3's client of a server; Amazon's, where none is named."""
        made = self._session.client(
            "s3",
            endpoint_url=endpoint or None,
            region_name=self._region,
            config=Config(
                signature_version="s3v4",
                connect_timeout=CONNECT_S,
                read_timeout=READ_S,
                retries={"mode": "standard", "total_max_attempts": 1},  # see gradcam_worker.resilience.retry
                max_pool_connections=self._at_once,
                s3={"addressing_style": "path" if endpoint else "auto"},
                # Not every S3 server knows the newer checksums; sha256 is in the manifest.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        if endpoint:
            made.meta.events.register("before-send.s3", partial(_check_host, endpoint))
        return made

    def _open(self, bucket: str, checksummed: bool = False) -> obstore.store.S3Store:
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
            config={"checksum_algorithm": "SHA256"} if checksummed else {},
            # Asked again well before keys can run out, which boto3 renews 10 minutes early at the latest.
            credential_provider=Boto3CredentialProvider(self._session, ttl=timedelta(minutes=5)),
            retry_config={"max_retries": 0},
            client_options={
                "allow_http": scheme == "http",
                "connect_timeout": timedelta(seconds=CONNECT_S),
                "read_timeout": timedelta(seconds=READ_S),
                "timeout": timedelta(seconds=max(STORAGE.total_s, self._fetch_s)),  # of a whole request
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
        return self._bucket(bucket, bucket in self._checksummed)

    def _check(self, bucket: str) -> None:
        """Raises InvalidBucket."""
        if why := bucket_names.objection(bucket, own_server=self._own_server):
            message = f"{bucket[:LONGEST]!r} {why}"
            raise InvalidBucket(message)

    def check_identity(self) -> None:
        """Raises IdentityFailed where there are no keys just now."""
        self._session.get_credentials().get_frozen_credentials()

    def put(
        self, bucket: str, key: str, data: bytes, media_type: str, retries: Retries | None = None
    ) -> None:
        """Write an object, whole or not at all. Raises one of FAILED, or what ended the job.

        A bucket that wants a checksum with each object, as with Object Lock, says so once.
        """
        self._check(bucket)

        def direct() -> None:
            attributes: obstore.Attributes = {"Content-Type": media_type}
            self._directly(bucket, key).put(key, data, attributes=attributes, use_multipart=False)

        def thorough() -> None:
            what = {"Bucket": bucket, "Key": key, "Body": data, "ContentType": media_type}
            if bucket not in self._checksummed:
                try:
                    self.client.put_object(**what)
                except ClientError as error:
                    if not wants_checksum(error):
                        raise
                    self._checksummed.add(bucket)
                else:
                    return
            self.client.put_object(**what, ContentMD5=_md5(data))

        _both(f"s3://{bucket}/{key}", direct, thorough, retries or STORAGE.start())

    def read(
        self, bucket: str, key: str, retries: Retries, most: Callable[[int], None] = lambda _: None
    ) -> bytes:
        """Read an object, waiting no longer than `retries` has. Raises one of FAILED, what ended the job,
        and what `most` raises, which is told how many bytes there are, before and while they come.
        """
        uri = f"s3://{bucket}/{key}"
        self._check(bucket)

        def check(size: int) -> None:
            most(size)
            retries.check(f"reading {uri}")

        def direct() -> bytes:
            found = self._directly(bucket, key).get(key)
            check(found.meta["size"])
            return _joined(found.stream(CHUNK), check)

        def thorough() -> bytes:
            body = self.client.get_object(Bucket=bucket, Key=key)["Body"]
            with contextlib.closing(body):
                return _joined(iter(partial(body.read, CHUNK), b""), check)

        reading = self._readers.submit(_both, uri, direct, thorough, retries)
        return retries.wait_for([reading], f"reading {uri}")[0]

    def presigned(self, bucket: str, key: str, expires_s: int) -> str:
        """A URL with which anybody may read an object, for so many seconds. Raises one of FAILED."""
        self._check(bucket)
        what = {"Bucket": bucket, "Key": key}
        return str(self._signing.generate_presigned_url("get_object", Params=what, ExpiresIn=expires_s))

    def listed(self, bucket: str, prefix: str) -> Iterator[Listed]:
        """All objects whose keys begin with `prefix`, in order, page by page. Raises one of FAILED."""
        self._check(bucket)
        token: dict[str, str] = {}
        seen: set[int] = set()  # tokens and first keys of pages: a server may go round in circles
        empty = 0
        while True:
            ask = partial(self.client.list_objects_v2, Bucket=bucket, Prefix=prefix, **token)
            page = REQUEST.call(partial(_page, ask, prefix))
            yield from page.objects
            if not page.more:
                return
            marks = {hash(("token", page.more)), *(hash(("key", one.key)) for one in page.objects[:1])}
            empty = 0 if page.objects else empty + 1
            if marks & seen or empty > EMPTY_PAGES:
                message = (
                    "the server's listing does not come to an end: it gives the same pages again and again"
                )
                raise InvalidListing(message)
            seen |= marks
            token = {"ContinuationToken": page.more}

    def remove(self, bucket: str, key: str) -> None:
        """Delete an object, if there is one. Raises one of FAILED."""
        self._check(bucket)
        ask = partial(self.client.delete_object, Bucket=bucket, Key=key)
        REQUEST.call(ask)

    def read_image(self, bucket: str, key: str, max_bytes: int, deadline: Deadline) -> bytes:
        """Read an object, giving up as soon as it proves too large or too slow.

        Raises ImageNotFound, ImageForbidden, ImageTooLarge, ImageFetchFailed, UriNotAllowed, JobTimeout, and
        StorageUnavailable where the worker itself is not let in, whatever it asks for.
        """
        uri = f"s3://{bucket}/{key}"

        def most(size: int) -> None:
            if size > max_bytes:
                message = f"{uri} has more than {max_bytes:,} bytes, the most that is allowed."
                raise ImageTooLarge(message)

        try:
            retries = replace(STORAGE, total_s=self._fetch_s).start(deadline)
            return self.read(bucket, key, retries, most)
        except FAILED as error:
            raise unreadable(uri, error) from error

    def download(self, uri: str, sink: Sink) -> None:
        """Write what a model's address holds into `sink`, however large. Raises WeightsUnavailable."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        asked = partial(self.client.get_object, Bucket=bucket, Key=key)
        try:
            self._check(bucket)
            found = DOWNLOAD.call(asked)
            body = found["Body"]
            sink.expect(found["ContentLength"])
            while chunk := body.read(CHUNK):
                sink.write(chunk)
        except FAILED as error:
            raise WeightsUnavailable(str(unreadable(uri, error))) from error


def _both(uri: str, direct: Callable[[], T], thorough: Callable[[], T], retries: Retries) -> T:
    """Obstore once, then boto3 as often as `retries` allows."""
    retries.check(f"storage, {uri}")
    try:
        return _without_panic(direct)
    except NOT_DIRECT as error:
        if not isinstance(error, FileNotFoundError):  # an everyday matter
            log.info("%r: boto3 tries again (%s)", uri, str(error).partition("\n")[0])
            if not isinstance(error, ValueError):  # it has asked nobody
                retries.record_failure(error)
    if not retries.left_s():
        retries.give_up(f"storage, {uri}")
    return retries.call(thorough)


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


def _md5(data: bytes) -> str:
    """As every server knows it, where it wants a checksum: against damage on the way, no guard of ours."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _check_host(endpoint: str, request: Any, **_: Any) -> None:
    """Before boto3 sends a request: whatever it made of a name, it goes to the server that is configured."""
    if _host(request.url) != _host(endpoint):
        message = f"it leads to {urlsplit(request.url).hostname}, which is not the server that is configured"
        raise InvalidBucket(message)


def _host(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


@dataclass(frozen=True)
class _Page:
    objects: list[Listed]
    more: str | None  # the token of the next page


def _page(ask: Callable[[], dict[str, Any]], prefix: str) -> _Page:
    """Read a page of a listing. Raises InvalidListing where it is none, and one of FAILED."""
    try:
        said = ask()
        found = [
            Listed(one["Key"], one["Size"], one.get("ETag", "").strip('"'))
            for one in said.get("Contents", ())
        ]
        page = _Page(found, said["NextContinuationToken"] if said.get("IsTruncated") else None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, FAILED):
            raise
        message = f"the server's listing cannot be read: {type(error).__name__} {error}"
        raise InvalidListing(message) from error
    if strange := next((one.key for one in found if not one.key.startswith(prefix)), None):
        message = f"the server's listing names {strange[:LONGEST]!r}, which does not begin with {prefix!r}"
        raise InvalidListing(message)
    return page
