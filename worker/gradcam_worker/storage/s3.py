"""S3, with two libraries: obstore for speed, boto3 for everything else.

Images are read and artifacts written with obstore first: a put takes a sixth of boto3's CPU time, without the
interpreter lock. If that fails, boto3 does it again at once: it follows a bucket to its region, and reports
what is wrong. Temporary errors are retried as long as `gradcam_worker.resilience.retry` allows; neither
library retries by itself.
"""

import base64
import contextlib
import hashlib
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

import boto3
import obstore.store
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from obstore.auth.boto3 import Boto3CredentialProvider

from gradcam_worker.errors import ImageTooLarge, InvalidSettings, WeightsUnavailable
from gradcam_worker.gradcam.files.weights import Sink
from gradcam_worker.observability.logs import ContextThreadPool
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.retry import HALF_OR_MORE, Retries, RetryPolicy
from gradcam_worker.resilience.server_activity import ServerActivity
from gradcam_worker.schemas import bucket_names
from gradcam_worker.schemas.bucket_names import MAX_CHARACTERS
from gradcam_worker.schemas.model import MAX_KEY_BYTES
from gradcam_worker.schemas.shard import READERS
from gradcam_worker.settings import Settings
from gradcam_worker.storage import credentials
from gradcam_worker.storage.s3_errors import (
    S3_ERRORS,
    ForeignAnswer,
    InvalidBucket,
    InvalidListing,
    check_answer,
    check_page,
    is_answer,
    is_permanent,
    is_s3_etag,
    read_error,
    requires_checksum,
)
from gradcam_worker.text.log_events import EventLogger
from gradcam_worker.text.visible import visible

log = EventLogger("gradcam")

CHUNK_BYTES = 32 * 1024  # small, so that limits are noticed early, even with a slow server
READ_AT_ONCE_BYTES = 128 * 1024  # objects so small are not read in chunks
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 3, 10
MAX_CACHED_BUCKETS = 32  # whose connections are kept
PLAIN_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
PANIC_MODULE = "pyo3_runtime"  # of the BaseException that a panic in Rust becomes
T = TypeVar("T")
Chunk = bytes | obstore.Bytes
NO_DEADLINE = Deadline(math.inf)
RANGE_REFUSED = 416
PAYER_HEADER = "x-amz-request-payer"
MAX_EMPTY_PAGES = 100  # of a listing, in a row: a server may need some to pass over deleted objects


class ObstorePanicked(Exception):
    """Obstore panicked, and did not do what it was called for."""


OBSTORE_ERRORS = (obstore.exceptions.BaseError, ForeignAnswer, ObstorePanicked, OSError, ValueError)
# A store that is restarted is available again within `total_s`. After that the job is requeued, which frees
# its thread.
STORAGE = RetryPolicy(
    first_s=0.25, max_s=5.0, jitter=HALF_OR_MORE, total_s=30.0, errors=S3_ERRORS, hopeless=is_permanent
)
REQUEST = replace(STORAGE, total_s=15.0)  # a page of a listing, or a deletion: there may be many
DOWNLOAD = replace(STORAGE, total_s=3.0)  # until the first byte of a model's file: a job waits for it


@dataclass(frozen=True)
class S3Object:
    """An object in a listing."""

    key: str
    size: int  # bytes
    etag: str  # changes with its contents


class S3:
    """A client for one S3 server. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        """Connect to nothing yet. Without keys in the settings, boto3 searches where AWS programs do.

        Raises:
            InvalidSettings: What the environment says of S3 cannot be used.
        """
        connections = 4 * settings.threads  # a job writes several objects at a time
        self.pool = ContextThreadPool(connections, thread_name_prefix="upload")
        # Its own pool, so that no read waits for uploads; larger than the number of jobs: reads may hang.
        max_reads = 2 * (settings.threads + READERS * settings.shards)
        self._readers = ContextThreadPool(max_reads, thread_name_prefix="read")
        self._uploads, self._lock = 0, threading.Lock()
        # A server may still be read while it takes no object: its disk is full, perhaps.
        self.reads, self.writes = ServerActivity(is_answer), ServerActivity(is_answer)
        self._fetch_s = settings.fetch_timeout_s
        key, secret = settings.s3_access_key_id, settings.s3_secret_access_key.get_secret_value()
        with _reading_the_environment():
            core = credentials.create_session(settings.region)
            self._session: Any = boto3.session.Session(key or None, secret or None, botocore_session=core)
            endpoint = settings.s3_endpoint_url or credentials.configured_endpoint(core)
        self._region = settings.region
        self._reading, self._writing, self._obstore_options = _request_options(settings)
        self._always_checksum = settings.s3_checksum == "sha256"
        self._tags = settings.s3_tags_by_name
        self._storage_class = settings.s3_storage_class
        self._is_amazon = not endpoint
        self._checksum_buckets: set[str] = set()  # that require a checksum of each object
        self._obstore_bucket = lru_cache(MAX_CACHED_BUCKETS)(self._open_obstore)
        self._max_connections = connections
        with _reading_the_environment():
            self.client = self._boto3_client(endpoint)
            # Browsers may reach the server under another host name, which is part of what is signed.
            public = settings.s3_public_url
            self._signing_client = self._boto3_client(public) if public else self.client

    def _boto3_client(self, endpoint: str) -> Any:
        """Boto3's client of a server; empty: Amazon's."""
        client = self._session.client(
            "s3",
            endpoint_url=endpoint or None,
            region_name=self._region,
            config=Config(
                signature_version="s3v4",
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=READ_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": 1},  # see gradcam_worker.resilience.retry
                max_pool_connections=self._max_connections,
                s3={"addressing_style": "path" if endpoint else "auto"},
                # Not every S3 server supports the newer checksums. The manifest has SHA-256.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        client.meta.events.register("before-sign.s3", _payer_into_query)
        if endpoint:
            client.meta.events.register("before-send.s3", partial(_check_host, endpoint))
        return client

    def _open_obstore(self, bucket: str, with_checksum: bool = False) -> obstore.store.S3Store:
        """The bucket in obstore, at boto3's URL and with boto3's keys."""
        if not PLAIN_BUCKET.fullmatch(bucket):
            message = f"Bucket {bucket!r} cannot be part of a URL as it is."
            raise ValueError(message)
        scheme, _, host = self.client.meta.endpoint_url.partition("://")
        in_host = ".amazonaws.com" in host and "." not in bucket  # no certificate covers a name with dots
        url = f"{scheme}://{bucket}.{host}" if in_host else f"{scheme}://{host.rstrip('/')}/{bucket}"
        ca_file = self._session._session.get_config_variable("ca_bundle")  # noqa: SLF001  # boto3 has no other way
        return obstore.store.S3Store(
            bucket,
            # Both, because either could be set in the environment and would then override the other.
            endpoint=url,
            aws_endpoint_url_s3=url,
            virtual_hosted_style_request=True,  # the URL names the bucket already
            region=self._region,
            skip_signature=False,
            config=self._obstore_options | ({"checksum_algorithm": "SHA256"} if with_checksum else {}),
            # Shorter than the 10 minutes before their expiry in which boto3 renews keys.
            credential_provider=Boto3CredentialProvider(self._session, ttl=timedelta(minutes=5)),
            retry_config={"max_retries": 0},
            client_options={
                "allow_http": scheme == "http",
                "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
                "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
                "timeout": timedelta(seconds=max(STORAGE.total_s, self._fetch_s)),  # of a whole request
                **({"root_certificate": Path(ca_file).read_bytes()} if ca_file else {}),
            },
        )

    def _for_obstore(self, bucket: str, key: str) -> obstore.store.S3Store:
        """The bucket in obstore. Raises ValueError for keys that obstore would change or cannot request."""
        if key.startswith("/") or key.endswith("/"):
            message = f"Key {key!r} would lose a slash."
            raise ValueError(message)
        if len(key.encode(errors="surrogatepass")) > MAX_KEY_BYTES:
            message = f"Key {key[:100]!r}... has more than {MAX_KEY_BYTES:,} bytes."
            raise ValueError(message)
        return self._obstore_bucket(bucket, self._always_checksum or bucket in self._checksum_buckets)

    def _check(self, bucket: str) -> None:
        """Raise InvalidBucket for a name that is not valid on this server."""
        if problem := bucket_names.describe_problem(bucket, own_server=not self._is_amazon):
            message = f"{bucket[:MAX_CHARACTERS]!r} {problem}"
            raise InvalidBucket(message)

    @contextmanager
    def uploading(self) -> Iterator[int]:
        """Count an upload of one or several objects while the block lasts; yields how many there are."""
        with self._lock:
            self._uploads += 1
            uploads = self._uploads
        try:
            yield uploads
        finally:
            with self._lock:
                self._uploads -= 1

    def check_identity(self) -> None:
        """Raise IdentityFailed if there are no valid keys at the moment."""
        self._session.get_credentials().get_frozen_credentials()

    def put(
        self, bucket: str, key: str, data: bytes, media_type: str, retries: Retries | None = None
    ) -> None:
        """Write an object, completely or not at all.

        Args:
            bucket: Its name.
            key: The object's.
            data: Its bytes.
            media_type: Its Content-Type.
            retries: How long to retry; None: as STORAGE.

        Raises:
            S3_ERRORS: It was not written.
            Exception: The deadline of `retries` is over, or the error that it was cancelled with.
        """
        self._check(bucket)

        def with_obstore() -> None:
            attributes: obstore.Attributes = {"Content-Type": media_type}
            if self._storage_class:
                attributes["Storage-Class"] = self._storage_class
            store, tags = self._for_obstore(bucket, key), self._tags or None
            etag = store.put(key, data, attributes=attributes, tags=tags, use_multipart=False)["e_tag"]
            if not is_s3_etag(etag):
                message = f"the ETag {etag} is not as S3's: boto3 shows the answer's type"
                raise ForeignAnswer(message)

        def with_boto3() -> None:
            request = {"Bucket": bucket, "Key": key, "Body": data, "ContentType": media_type, **self._writing}
            if bucket not in self._checksum_buckets:
                try:
                    check_answer(self.client.put_object(**request))
                except ClientError as error:
                    if not requires_checksum(error):
                        raise
                    self._checksum_buckets.add(bucket)
                else:
                    return
            check_answer(self.client.put_object(**request, ContentMD5=_md5(data)))

        uri = f"s3://{bucket}/{key}"
        _try_both(uri, with_obstore, with_boto3, retries or STORAGE.start(), self.writes)

    def read(
        self, bucket: str, key: str, retries: Retries, check_size: Callable[[int], None] = lambda _: None
    ) -> bytes:
        """Read an object.

        Args:
            bucket: Its name.
            key: The object's.
            retries: How long to wait and retry.
            check_size: Called with the number of bytes before and while they are read. It may raise.

        Returns:
            The object's bytes.

        Raises:
            S3_ERRORS: It was not read.
            Exception: An error of `check_size`; the deadline of `retries` is over, or the error that it was
                cancelled with.
        """
        uri = f"s3://{bucket}/{key}"
        self._check(bucket)

        def check(size: int) -> None:
            self.reads.answered()
            check_size(size)
            retries.check(f"reading {uri}")

        def with_obstore() -> bytes:
            response = self._for_obstore(bucket, key).get(key)
            size = response.meta["size"]
            check_page(response.attributes.get("Content-Type"), response.meta["e_tag"])
            check(size)
            if size <= READ_AT_ONCE_BYTES:
                return bytes(response.bytes())
            return _read_all(response.stream(CHUNK_BYTES), check)

        def with_boto3() -> bytes:
            body = self._get(bucket, key)["Body"]
            with contextlib.closing(body):
                return _read_all(iter(partial(body.read, CHUNK_BYTES), b""), check)

        reading = self._readers.submit(_try_both, uri, with_obstore, with_boto3, retries, self.reads)
        return retries.wait_for([reading], f"reading {uri}")[0]

    def _get(self, bucket: str, key: str, **part: str) -> Any:
        """Boto3's answer to a request for an object. Raises one of S3_ERRORS."""
        answer = self.client.get_object(Bucket=bucket, Key=key, **self._reading, **part)
        try:
            check_answer(answer)
        except ForeignAnswer:
            answer["Body"].close()
            raise
        return answer

    def read_part(self, bucket: str, key: str, start: int, size: int) -> tuple[bytes, int]:
        """Read a part of an object.

        Args:
            bucket: Its name.
            key: The object's.
            start: The first byte; if it is negative, it counts from the end.
            size: The number of bytes, at most.

        Returns:
            The part, and the size of the whole object.

        Raises:
            S3_ERRORS: It was not read.
        """
        self._check(bucket)
        wanted = f"bytes={start}" if start < 0 else f"bytes={start}-{start + size - 1}"

        def request() -> tuple[bytes, int]:
            try:
                answer = self._get(bucket, key, Range=wanted)
            except ClientError as error:
                if start >= 0 or error.response["ResponseMetadata"].get("HTTPStatusCode") != RANGE_REFUSED:
                    raise
                answer = self._get(bucket, key)  # it has fewer bytes, which not every server allows
            with contextlib.closing(answer["Body"]) as body:
                data = body.read()
            if "ContentRange" not in answer:  # the server sent all of it
                first = max(len(data) + start, 0) if start < 0 else start
                return data[first : first + size], len(data)
            return data[:size], int(answer["ContentRange"].rpartition("/")[2])

        return REQUEST.call(request)

    def presigned_url(self, bucket: str, key: str, expires_s: int) -> str:
        """Return a URL with which anyone can read an object for `expires_s`.

        Or for as long as the keys are valid that sign it, if that is shorter: S3 refuses it afterwards. See
        `text.urls.signed_until`. Raises one of S3_ERRORS.
        """
        self._check(bucket)
        return self._signed("get_object", {"Bucket": bucket, "Key": key, **self._reading}, expires_s)

    def _signed(self, operation: str, request: dict[str, Any], expires_s: int) -> str:
        keys = self._session.get_credentials()
        if isinstance(keys, credentials.Identity):
            expires_s = max(int(min(expires_s, keys.lifetime_s())), 1)
        return str(
            self._signing_client.generate_presigned_url(operation, Params=request, ExpiresIn=expires_s)
        )

    def presigned_upload(self, bucket: str, key: str, media_type: str, size: int, expires_s: int) -> str:
        """Return a URL to which anyone can put an object of this type and size: see `presigned_url`.

        The headers Content-Type and Content-Length are signed. A browser sends no others: the bucket's own
        encryption and storage class apply. Raises one of S3_ERRORS.
        """
        self._check(bucket)
        request = {"Bucket": bucket, "Key": key, "ContentType": media_type, "ContentLength": size}
        return self._signed("put_object", request | self._reading, expires_s)

    def list_objects(self, bucket: str, prefix: str) -> Iterator[S3Object]:
        """Yield all objects whose keys begin with `prefix`, in order. Raises one of S3_ERRORS."""
        self._check(bucket)
        token: dict[str, str] = {}
        seen: set[int] = set()  # hashes of tokens and of pages' first keys: a server may repeat its pages
        empty_pages = 0
        while True:
            listed = {"Bucket": bucket, "Prefix": prefix, **self._reading, **token}
            request = partial(self.client.list_objects_v2, **listed)
            page = REQUEST.call(partial(_list_page, request, prefix))
            yield from page.objects
            if not page.next_token:
                return
            marks = {
                hash(("token", page.next_token)),
                *(hash(("key", first.key)) for first in page.objects[:1]),
            }
            empty_pages = 0 if page.objects else empty_pages + 1
            if marks & seen or empty_pages > MAX_EMPTY_PAGES:
                message = "the server's listing does not end: the server sends the same pages again and again"
                raise InvalidListing(message)
            seen |= marks
            token = {"ContinuationToken": page.next_token}

    def remove(self, bucket: str, key: str) -> None:
        """Delete an object if it exists. Raises one of S3_ERRORS."""
        self._check(bucket)
        request = partial(self.client.delete_object, Bucket=bucket, Key=key, **self._reading)
        REQUEST.call(lambda: check_answer(request()))

    def read_image(self, bucket: str, key: str, max_bytes: int, deadline: Deadline) -> bytes:
        """Read an object; stop as soon as it turns out to be too large or too slow.

        Args:
            bucket: Its name.
            key: The object's.
            max_bytes: Limit of its size.
            deadline: The job's.

        Returns:
            The object's bytes.

        Raises:
            ImageNotFound: There is no such object.
            ImageForbidden: The worker may not read it.
            ImageTooLarge: It has more than `max_bytes`.
            ImageFetchFailed: The server failed.
            UriNotAllowed: The name of the bucket or the key is invalid.
            StorageUnavailable: The worker's own keys are missing or refused.
            JobTimeout: The deadline is over; or the error that it was cancelled with.
        """
        uri = f"s3://{bucket}/{key}"

        def check_size(size: int) -> None:
            if size > max_bytes:
                message = f"{uri} has more than {max_bytes:,} bytes, the most that is allowed."
                raise ImageTooLarge(message)

        try:
            retries = replace(STORAGE, total_s=self._fetch_s).start(deadline)
            return self.read(bucket, key, retries, check_size)
        except S3_ERRORS as error:
            raise read_error(uri, error) from error

    def download(self, uri: str, sink: Sink) -> None:
        """Write an operator's model file, of any size, into `sink`. Raises WeightsUnavailable."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")

        def request() -> Any:
            with self.reads.request():
                return self._get(bucket, key)

        try:
            self._check(bucket)
            response = DOWNLOAD.call(request)
            body = response["Body"]
            sink.expect(response["ContentLength"])
            while chunk := body.read(CHUNK_BYTES):
                sink.write(chunk)
        except S3_ERRORS as error:
            raise WeightsUnavailable(str(read_error(uri, error))) from error


@contextmanager
def _reading_the_environment() -> Iterator[None]:
    """Raise InvalidSettings for an unknown profile or region, or a file that cannot be read."""
    try:
        yield
    except (BotoCoreError, ValueError) as error:
        why = visible(str(error))
        message = f"GRADCAM_S3_ENDPOINT_URL, or what the environment says of S3, cannot be used: {why}."
        raise InvalidSettings(message) from error


def _try_both(
    uri: str,
    with_obstore: Callable[[], T],
    with_boto3: Callable[[], T],
    retries: Retries,
    activity: ServerActivity,
) -> T:
    """Try obstore once, then boto3 as often as `retries` allows."""
    retries.check(f"storage, {uri}")
    is_told = activity.has_failed  # since the last answer
    try:
        with activity.request():
            return _without_panic(with_obstore)
    except OBSTORE_ERRORS as error:
        if not isinstance(error, FileNotFoundError):  # it is common
            first_line = str(error).partition("\n")[0]
            if is_told:
                log.debug("call_failed_again", uri=uri, error=first_line)
            else:
                log.info("obstore_failed", uri=uri, error=first_line, reason="boto3 retries")
            if not isinstance(error, ValueError):  # raised before a request was sent
                retries.record_failure(error)
    if not retries.left_s():
        retries.give_up(f"storage, {uri}")

    def request() -> T:
        with activity.request():
            return with_boto3()

    return retries.call(request)


def _without_panic(with_obstore: Callable[[], T]) -> T:
    """Call obstore. Raises ObstorePanicked for a panic, which `except Exception` would not catch."""
    try:
        return with_obstore()
    except BaseException as error:
        if type(error).__module__ != PANIC_MODULE:
            raise
        message = f"obstore panicked: {error}"
        raise ObstorePanicked(message) from error


def _read_all(chunks: Iterable[Chunk], check: Callable[[int], None]) -> bytes:
    """Join chunks; `check` gets the size so far after each."""
    received, size = [], 0
    for chunk in chunks:
        received.append(chunk)
        size += len(chunk)
        check(size)
    return b"".join(received)


def _request_options(settings: Settings) -> tuple[dict[str, str], dict[str, str], Any]:
    """What each request tells S3, by the settings: boto3's for reading and for writing, and obstore's."""
    reading: dict[str, str] = {}
    writing: dict[str, str] = {
        "ServerSideEncryption": settings.s3_sse,
        "SSEKMSKeyId": settings.s3_sse_kms_key_id,
        "StorageClass": settings.s3_storage_class,
        "Tagging": urlencode(settings.s3_tags_by_name),
        "ChecksumAlgorithm": "SHA256" if settings.s3_checksum == "sha256" else "",
    }
    options: dict[str, Any] = {}
    if settings.s3_request_payer:
        reading["RequestPayer"] = settings.s3_request_payer
        options["request_payer"] = True
    if settings.s3_sse:
        options["server_side_encryption"] = settings.s3_sse
    if settings.s3_sse_kms_key_id:
        options["sse_kms_key_id"] = settings.s3_sse_kms_key_id
    return reading, reading | {name: value for name, value in writing.items() if value}, options


def _payer_into_query(request: Any, signature_version: str, **_: Any) -> None:
    """Before a URL is signed, name the payer in it: whoever opens the URL sends no such header."""
    if "query" in signature_version and (payer := request.headers.get(PAYER_HEADER)):
        del request.headers[PAYER_HEADER]
        request.params[PAYER_HEADER] = payer


def _md5(data: bytes) -> str:
    """The checksum that every server supports: it detects transmission errors, and is not for security."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _check_host(endpoint: str, request: Any, **_: Any) -> None:
    """Before boto3 sends a request, check that it goes to the configured server. Raises InvalidBucket."""
    if _host(request.url) != _host(endpoint):
        message = f"it leads to {urlsplit(request.url).hostname}, which is not the server that is configured"
        raise InvalidBucket(message)


def _host(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


@dataclass(frozen=True)
class _Page:
    objects: list[S3Object]
    next_token: str | None  # None: this is the last page


def _field(entry: dict[str, Any], name: str) -> Any:
    """A field of an object in a listing. Raises InvalidListing where the server did not send it."""
    if name not in entry:
        which = f"of {entry['Key'][:MAX_CHARACTERS]!r}" if "Key" in entry else "of an object"
        message = f"the server's listing cannot be read: it has no {name} {which}"
        raise InvalidListing(message)
    return entry[name]


def _next_token(answer: dict[str, Any]) -> str | None:
    """What the next page is asked for with; None: this is the last. Raises InvalidListing."""
    if not answer.get("IsTruncated"):
        return None
    if not (token := answer.get("NextContinuationToken")):
        message = (
            "the server's listing cannot be gone through: it says that there are more objects, but sends no "
            "NextContinuationToken to ask for them"
        )
        raise InvalidListing(message)
    return str(token)


def _list_page(request: Callable[[], dict[str, Any]], prefix: str) -> _Page:
    """Read a page of a listing. Raises one of S3_ERRORS: InvalidListing for a malformed answer."""
    try:
        answer = request()
        check_answer(answer)
        objects = [
            S3Object(_field(entry, "Key"), _field(entry, "Size"), entry.get("ETag", "").strip('"'))
            for entry in answer.get("Contents", ())
        ]
        page = _Page(objects, _next_token(answer))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, S3_ERRORS):
            raise
        message = f"the server's listing cannot be read: {type(error).__name__} {error}"
        raise InvalidListing(message) from error
    if stray := next((entry.key for entry in objects if not entry.key.startswith(prefix)), None):
        message = (
            f"the server's listing names {stray[:MAX_CHARACTERS]!r}, which does not begin with {prefix!r}"
        )
        raise InvalidListing(message)
    return page
