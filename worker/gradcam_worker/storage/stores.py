"""Where artifacts are stored: below a prefix of a bucket, or in a folder."""

import re
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from gradcam_worker.errors import OutputNotAllowed, StorageUnavailable
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.resilience.retry import Retries, RetryPolicy
from gradcam_worker.resilience.server_activity import ServerActivity
from gradcam_worker.settings import Settings
from gradcam_worker.storage.filesystem import FolderStore, Object
from gradcam_worker.storage.s3 import NO_DEADLINE, S3, STORAGE
from gradcam_worker.storage.s3_errors import S3_ERRORS, describe, is_location_error, is_missing_object
from gradcam_worker.storage.store import Store
from gradcam_worker.text.urls import without_secrets

__all__ = ["FolderStore", "Object", "S3Store", "Store", "Stores", "probe"]

PROBE_KEY = "health/probe.txt"
PROBE_CONTENT = re.compile(rb"[0-9a-f]{32}")
SINGLE_TRY = replace(STORAGE, total_s=15.0, max_tries=1)
PROBE = replace(SINGLE_TRY, total_s=5.0)  # a worker is to say within 10 s that storage does not answer
# In UTF-8. S3 allows keys of 1024 bytes, most file systems names of 255; the rest is left for a job's id and
# the name of an artifact.
MAX_OUTPUT_BYTES, MAX_NAME_BYTES = 640, 200


class S3Upload:
    """See `gradcam_worker.storage.store.Upload`: in parallel, from the first object on.

    Each thread that takes part writes the next objects until none is left. Each costs time, and with many
    uploads at once none becomes faster: so they share the threads that one alone would have.
    """

    def __init__(
        self,
        uri: str,
        put: Callable[[Object], None],
        start: Callable[[Callable[[], None]], "Future[None]"],
        retries: Retries,
        uploads: int,
    ) -> None:
        """Nothing is written yet.

        Args:
            uri: Where it writes to.
            put: Writes one object.
            start: Runs a function in a thread.
            retries: How long to try.
            uploads: How many there are at once, this one included.
        """
        self._uri, self._put, self._start_thread = uri, put, start
        retries.stop_clock()  # until `finish`: to make the objects may take longer than all tries
        self._retries, self._uploads = retries, uploads
        self._waiting = deque[Object]()
        self._last: Object | None = None
        self._count = self._unwritten = self._threads = 0  # objects, those not yet written, threads that run
        self.ended = False  # no further write is started
        self._calls: list[Future[None]] = []
        self._lock = threading.Lock()

    def add(self, item: Object) -> None:
        """See `Upload.add`."""
        with self._lock:
            self._waiting.append(item)
            self._count += 1
            self._unwritten += 1
            self._start_threads(self._count // self._uploads)

    def finish(self, last: Object | None = None) -> None:
        """See `Upload.finish`."""
        self._retries.begin_again()
        with self._lock:
            self._last = last
            self._start_threads(max(self._count // self._uploads, 1), at_least=1 if last else 0)
        try:
            self._retries.wait_for(self._calls, "upload")
        except S3_ERRORS as error:
            message = f"{self._uri} could not be written: {describe(error)}"
            raise StorageUnavailable(message) from error

    def end(self) -> None:
        """Start no further write, and repeat none."""
        self.ended = True
        self._retries.end()

    def _start_threads(self, most: int, *, at_least: int = 0) -> None:
        """Start threads until there are `most`, or one for each object. The lock is held."""
        wanted = min(most, max(self._unwritten, at_least))
        while self._threads < wanted and not self.ended:
            self._threads += 1
            self._calls.append(self._start_thread(self._run))

    def _run(self) -> None:
        """Write objects until none is left, or until one has failed, also in another thread."""
        written = 0
        try:
            while item := self._next(written):
                self._put(item)
                written = 1
        except BaseException:
            self.end()
            raise

    def _next(self, written: int) -> Object | None:
        """The next object for a thread that has just written so many."""
        with self._lock:
            self._unwritten -= written
            item = None
            if self._waiting and not self.ended:
                item = self._waiting.popleft()
            elif self._last and not self._unwritten and not self.ended:
                self._unwritten, item, self._last = 1, self._last, None
            # else another thread goes on with the last one
            if item is None:
                self._threads -= 1
            return item


class S3Store:
    """A prefix of a bucket."""

    def __init__(
        self,
        s3: S3,
        bucket: str,
        prefix: str,
        *,
        by_operator: bool = True,
        observer: Observer = NULL_OBSERVER,
        single_try: RetryPolicy = SINGLE_TRY,
    ) -> None:
        """Nothing is requested yet.

        Args:
            s3: The client.
            bucket: Its name.
            prefix: Without a slash at either end.
            by_operator: Whether the operator chose the location, not a job.
            observer: Is told of each object that is written.
            single_try: How long `put` and `get` try.
        """
        self._s3, self._bucket, self._prefix = s3, bucket, f"{prefix}/" if prefix else ""
        self._by_operator, self._observer, self._single_try = by_operator, observer, single_try

    def uri(self, key: str) -> str:
        """See `Store.uri`."""
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def put(self, key: str, data: bytes, media_type: str) -> str:
        """See `Store.put`."""
        with self._upload(NO_DEADLINE, self._single_try.start()) as upload:
            upload.finish((key, data, media_type))
        return self.uri(key)

    def put_many(
        self, objects: Sequence[Object], deadline: Deadline, last: Object | None = None
    ) -> list[str]:
        """See `Store.put_many`: in parallel."""
        with self.upload(deadline) as upload:
            for item in objects:
                upload.add(item)
            upload.finish(last)
        return [self.uri(key) for key, _, _ in (*objects, *([last] if last else []))]

    def upload(self, deadline: Deadline) -> AbstractContextManager[S3Upload]:
        """See `Store.upload`."""
        return self._upload(deadline, STORAGE.start(deadline))

    @contextmanager
    def _upload(self, deadline: Deadline, retries: Retries) -> Iterator[S3Upload]:
        def put(item: Object) -> None:
            deadline.check("upload")
            if not upload.ended:  # the check may have waited for the lease
                self._put(item, retries)

        with self._s3.uploading() as uploads:
            upload = S3Upload(self.uri(""), put, self._s3.pool.submit, retries, uploads)
            try:
                yield upload
            finally:
                upload.end()

    def _put(self, item: Object, retries: Retries) -> None:
        key, data, media_type = item
        uri = self.uri(key)
        try:
            self._s3.put(self._bucket, self._prefix + key, data, media_type, retries)
        except S3_ERRORS as error:
            message = f"{uri} could not be written: {describe(error)}"
            jobs_fault = is_location_error(error) and not self._by_operator
            raise (OutputNotAllowed if jobs_fault else StorageUnavailable)(message) from error
        self._observer.artifact_written(len(data))

    def find(self, key: str, deadline: Deadline) -> bytes | None:
        """See `Store.find`."""
        try:
            return self._read(key, STORAGE.start(deadline))
        except StorageUnavailable as error:
            if is_missing_object(error.__cause__):
                return None
            raise

    def get(self, key: str) -> bytes:
        """See `Store.get`."""
        return self._read(key, self._single_try.start())

    def get_part(self, key: str, start: int, size: int) -> tuple[bytes, int]:
        """See `Store.get_part`."""
        try:
            return self._s3.read_part(self._bucket, self._prefix + key, start, size)
        except S3_ERRORS as error:
            message = f"{self.uri(key)} could not be read: {describe(error)}"
            raise StorageUnavailable(message) from error

    def names(self, folder: str) -> Iterator[str]:
        """See `Store.names`."""
        try:
            for item in self._s3.list_objects(self._bucket, f"{self._prefix}{folder}/"):
                yield item.key.removeprefix(self._prefix)
        except S3_ERRORS as error:
            message = f"{self.uri(folder)} could not be listed: {describe(error)}"
            raise StorageUnavailable(message) from error

    def remove(self, key: str) -> None:
        """See `Store.remove`."""
        try:
            self._s3.remove(self._bucket, self._prefix + key)
        except S3_ERRORS as error:
            message = f"{self.uri(key)} could not be removed: {describe(error)}"
            raise StorageUnavailable(message) from error

    def presigned_url(self, key: str, expires_s: int) -> str:
        """Return a URL with which anyone can read an object for `expires_s`. Raises StorageUnavailable."""
        try:
            return self._s3.presigned_url(self._bucket, self._prefix + key, expires_s)
        except S3_ERRORS as error:
            message = f"{self.uri(key)} cannot be given a URL: {describe(error)}"
            raise StorageUnavailable(message) from error

    def presigned_upload(self, key: str, media_type: str, size: int, expires_s: int) -> str:
        """Return a URL to which anyone can put an object of this type and size for `expires_s`.

        Raises StorageUnavailable.
        """
        try:
            return self._s3.presigned_upload(self._bucket, self._prefix + key, media_type, size, expires_s)
        except S3_ERRORS as error:
            message = f"{self.uri(key)} cannot be given a URL: {describe(error)}"
            raise StorageUnavailable(message) from error

    def _read(self, key: str, retries: Retries) -> bytes:
        try:
            return self._s3.read(self._bucket, self._prefix + key, retries)
        except S3_ERRORS as error:
            message = f"{self.uri(key)} could not be read: {describe(error)}"
            raise StorageUnavailable(message) from error


class Stores:
    """Opens stores at locations that the operator allows."""

    def __init__(self, settings: Settings, s3: S3, observer: Observer = NULL_OBSERVER) -> None:
        """Allow `settings.output` and each of `settings.output_prefixes`."""
        self._default = settings.output.rstrip("/")
        self._allowed = (self._default, *(prefix.rstrip("/") for prefix in settings.output_prefixes))
        self._s3, self._observer = s3, observer
        self._reads_s3 = "s3" in settings.image_schemes

    def open(self, uri: str | None = None, *, single_try: RetryPolicy = SINGLE_TRY) -> Store:
        """Open a store.

        Args:
            uri: Where; None: at the default output.
            single_try: How long `put` and `get` of a store in S3 try.

        Raises:
            OutputNotAllowed: The operator does not allow this output.
        """
        wanted = self._default if uri is None else uri.rstrip("/")
        base = max((prefix for prefix in self._allowed if _is_below(wanted, prefix)), key=len, default=None)
        if base is None or _is_ambiguous(wanted):
            shown, allowed = without_secrets(wanted)[:200], " or ".join(self._allowed)
            message = (
                f"Output {shown!r} is not allowed: it must be below {allowed}, have at most "
                f"{MAX_OUTPUT_BYTES} bytes, {MAX_NAME_BYTES} between two slashes, and no ?, #, .. or "
                "unprintable character."
            )
            raise OutputNotAllowed(message)
        by_operator = _is_below(wanted, self._default)
        scheme, _, rest = wanted.partition("://")
        if scheme == "file":
            root = unquote(base.partition("://")[2])
            below = unquote(rest)[len(root) :]
            return FolderStore(Path(root), below, by_operator=by_operator, observer=self._observer)
        bucket, _, prefix = rest.partition("/")
        return S3Store(
            self._s3,
            bucket,
            prefix,
            by_operator=by_operator,
            observer=self._observer,
            single_try=single_try,
        )

    @property
    def activities(self) -> tuple[ServerActivity, ...]:
        """The requests to S3, by kind."""
        return self._s3.reads, self._s3.writes

    def check_identity(self) -> None:
        """Raise StorageUnavailable if images are read from S3 and the worker has no valid keys for it."""
        try:
            if self._reads_s3:
                self._s3.check_identity()
        except S3_ERRORS as error:
            message = f"Images cannot be read from S3: {describe(error)}"
            raise StorageUnavailable(message) from error


def _is_below(wanted: str, allowed: str) -> bool:
    return wanted == allowed or wanted.startswith(allowed + "/")


def _is_ambiguous(uri: str) -> bool:
    """Whether a URL parser, a file system or a store might read the URI differently, or refuse it."""
    scheme, _, rest = uri.partition("://")
    plain = unquote(rest)
    if not plain.isprintable():
        return True  # also for lone surrogates, which cannot be encoded
    names = plain.replace("\\", "/").split("/")
    too_long = len(plain.encode()) > MAX_OUTPUT_BYTES or any(
        len(name.encode()) > MAX_NAME_BYTES for name in names
    )
    unsafe = {".", ".."} & set(names) or "" in names[1:] or {"?", "#"} & set(plain)
    return too_long or bool(unsafe) or (scheme == "file" and not plain.startswith("/"))


def probe(store: Store) -> str:
    """Write and read an object as a job does; return its URI. Raises StorageUnavailable.

    A store in S3 is opened with PROBE as its `single_try`.
    """
    content = uuid.uuid4().hex.encode()
    uri = store.put(PROBE_KEY, content, "text/plain")
    received = store.get(PROBE_KEY)
    if received != content and not PROBE_CONTENT.fullmatch(received):  # another worker may probe, too
        message = f"{uri} was written but reads back differently."
        raise StorageUnavailable(message)
    return uri
