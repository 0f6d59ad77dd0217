"""Reads an image from its URI, within the sources and limits that the settings allow."""

import base64
import binascii
import errno
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote_to_bytes

from gradcam_worker.errors import (
    ChecksumMismatch,
    ImageDecodeFailed,
    ImageFetchFailed,
    ImageForbidden,
    ImageNotFound,
    ImageTooLarge,
    UriNotAllowed,
)
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef, describe_missing_scheme
from gradcam_worker.schemas.model import describe_excess_length
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import WEB_SCHEMES, has_credentials, without_secrets, without_user

if TYPE_CHECKING:
    from gradcam_worker.net.dialer import Resolve
    from gradcam_worker.net.http import HttpClient
    from gradcam_worker.storage.s3 import S3

OK = 200
NOT_FOUND_STATUSES = {404, 410}
FORBIDDEN_STATUSES = {400, 401, 403, 405, 406, 407, 451}  # permanent: the same request would fail again
OPEN_FOLDER = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)  # O_PATH needs no permission to list it


@dataclass(frozen=True)
class FetchedBytes:
    """The encoded bytes of an image."""

    data: bytes
    sha256: str
    uri: str  # redacted: see `redact_uri`


class UriFetcher:
    """Reads images from the places and within the limits that the settings allow."""

    def __init__(
        self,
        settings: Settings,
        s3: "S3",
        resolve: "Resolve | None" = None,
        observer: Observer = NULL_OBSERVER,
    ) -> None:
        """Open no connection yet. `resolve` finds the addresses of a host; None: the system does."""
        self._settings, self._resolve = settings, resolve
        self._s3, self._observer = s3, observer
        self._readers: dict[str, Callable[[str, Deadline, int], bytes]] = {
            "s3": self._read_s3,
            "file": self._read_file,
            "data": self._read_data,
        }

    @cached_property
    def _web(self) -> "HttpClient":
        """Imported and made for the first URL of the web: it takes 10 MB, and many processes read from S3."""
        from gradcam_worker.net.dialer import look_up
        from gradcam_worker.net.http import HttpClient

        return HttpClient(
            self._settings.image_hosts,
            self._settings.image_schemes,
            "GRADCAM_IMAGE_HOSTS",
            self._settings.private_networks,
            resolve=self._resolve or look_up,
        )

    def fetch(self, image: ImageRef, deadline: Deadline, max_bytes: int | None = None) -> FetchedBytes:
        """Read an image.

        Args:
            image: Its URI, and its SHA-256 if the bytes have to match one.
            deadline: The job's deadline.
            max_bytes: Refuse a larger image. The limit of the settings holds in any case.

        Raises:
            UriNotAllowed: The settings do not allow this URI.
            ImageNotFound: There is no such object.
            ImageForbidden: The worker has no access to it.
            ImageTooLarge: It has more bytes than are allowed.
            ImageFetchFailed: It cannot be read at present.
            ImageDecodeFailed: The data URI is malformed.
            ChecksumMismatch: Its SHA-256 is not the one in `image`.
            JobTimeout: The deadline passed.
        """
        if why := describe_excess_length(image.uri):
            message = f"{redact_uri(image.uri)[:200]!r}... is not allowed: {why}."
            raise UriNotAllowed(message)
        scheme = image.uri.partition(":")[0].casefold()
        allowed = self._settings.image_schemes
        if why := describe_missing_scheme(image.uri):
            message = f"{why}."
            raise UriNotAllowed(message)
        if scheme not in allowed or scheme not in {*self._readers, *WEB_SCHEMES}:
            shown, schemes = redact_uri(image.uri)[:200], " or ".join(allowed)
            message = f"{shown!r} is not allowed: its scheme must be {schemes} (GRADCAM_IMAGE_SCHEMES)."
            raise UriNotAllowed(message)
        limit = self._settings.max_image_bytes
        limit = limit if max_bytes is None else min(max_bytes, limit)
        if scheme in WEB_SCHEMES:
            data = self._read_http(image.uri, deadline, limit, redirects=image.redirects)
        else:
            data = self._readers[scheme](image.uri, deadline, limit)
        self._observer.image_read(len(data))
        return verified(image, data)

    def _check_size(self, size: int, uri: str, limit: int) -> None:
        if size > limit:
            message = f"{redact_uri(uri)} has more than {limit:,} bytes, the maximum that is allowed."
            raise ImageTooLarge(message)

    def presigned_url(self, uri: str, expires_s: int) -> str | None:
        """Return a URL with which anyone can read an image on S3 for `expires_s`.

        Args:
            uri: The image's.
            expires_s: Of seven days at most.

        Returns:
            The URL; None: the image is not on S3, or the settings do not allow it.

        Raises:
            ImageFetchFailed: There are no keys to sign it with.
        """
        from gradcam_worker.storage.s3_errors import S3_ERRORS, describe

        if not uri.startswith("s3:") or "s3" not in self._settings.image_schemes:
            return None
        try:
            return self._s3.presigned_url(*self._s3_object(uri), expires_s)
        except UriNotAllowed:
            return None
        except S3_ERRORS as error:
            message = f"{redact_uri(uri)} cannot be given a URL: {describe(error)}"
            raise ImageFetchFailed(message) from error

    def _read_s3(self, uri: str, deadline: Deadline, limit: int) -> bytes:
        return self._s3.read_image(*self._s3_object(uri), limit, deadline)

    def _s3_object(self, uri: str) -> tuple[str, str]:
        """The bucket and the key of an image that the settings allow. Raises UriNotAllowed."""
        # Not parsed as a URL: ? and # are ordinary characters in an S3 key.
        bucket, _, key = uri.partition("://")[2].partition("/")
        allowed = self._settings.image_buckets
        if has_credentials(uri):
            message = (
                f"A user or password in a URI ({redact_uri(uri)}) is not allowed: write s3://bucket/key."
            )
            raise UriNotAllowed(message)
        if not bucket or not key:
            message = f"{redact_uri(uri)!r} is not an S3 URI: write s3://bucket/key."
            raise UriNotAllowed(message)
        if "*" not in allowed and bucket not in allowed:
            names = ", ".join(allowed) or "none"
            message = (
                f"Bucket {bucket!r} is not allowed: images may come from {names} (GRADCAM_IMAGE_BUCKETS)."
            )
            raise UriNotAllowed(message)
        return bucket, key

    def _read_http(self, uri: str, deadline: Deadline, limit: int, *, redirects: bool) -> bytes:
        from gradcam_worker.net.http import HttpFailed

        shown = redact_uri(uri)
        seconds = min(self._settings.fetch_timeout_s, deadline.left_s())
        try:
            answer = self._web.get(
                uri, max_bytes=limit, seconds=seconds, deadline=deadline, redirects=redirects
            )
        except HttpFailed as error:
            deadline.check(f"reading {shown}")
            message = f"{shown} could not be read: {error}"
            raise ImageFetchFailed(message) from error
        failure = f"{shown} could not be read (HTTP {answer.status})."
        if answer.status in NOT_FOUND_STATUSES:
            raise ImageNotFound(failure)
        if answer.status in FORBIDDEN_STATUSES:
            raise ImageForbidden(failure)
        if answer.status != OK:
            raise ImageFetchFailed(failure)
        self._check_size(len(answer.body), uri, limit)
        return answer.body

    def _read_file(self, uri: str, deadline: Deadline, limit: int) -> bytes:  # noqa: ARG002  # a local disk needs no deadline
        host, _, name = uri.partition("://")[2].partition("/")
        try:
            # Symbolic links are resolved first, so that none leads out of the allowed folders.
            path = Path("/" + os.fsdecode(unquote_to_bytes(name))).resolve()
        except (
            OSError,
            RuntimeError,
            ValueError,
        ) as error:  # RuntimeError: a loop of links; ValueError: a null byte
            message = f"{redact_uri(uri)} is not a path: {error}"
            raise UriNotAllowed(message) from error
        roots = self._roots()
        root = next((root for root in roots if path.is_relative_to(root)), None)
        if host not in {"", "localhost"} or root is None:
            folders = ", ".join(map(str, roots)) or "none"
            allowed = f"images may come from these folders: {folders} (GRADCAM_IMAGE_ROOTS)"
            message = f"{redact_uri(uri)} is not allowed: {allowed}."
            raise UriNotAllowed(message)
        try:
            if not path.is_file():
                message = f"There is no file {path}."
                raise ImageNotFound(message)
            with open_below(root, path) as file:
                data = file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError) as error:  # it was removed meanwhile
            message = f"There is no file {path}."
            raise ImageNotFound(message) from error
        except PermissionError as error:
            message = f"The worker may not read {path}."
            raise ImageForbidden(message) from error
        except OSError as error:
            message = f"{redact_uri(uri)} could not be read: {error}"
            raise ImageFetchFailed(message) from error
        self._check_size(len(data), uri, limit)
        return data

    def _roots(self) -> list[Path]:
        """The resolved folders that images may come from. Raises UriNotAllowed."""
        try:
            return [Path(root).resolve() for root in self._settings.image_roots]
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            message = f"GRADCAM_IMAGE_ROOTS names a folder that cannot be reached: {error}."
            raise UriNotAllowed(message) from error

    def _read_data(self, uri: str, deadline: Deadline, limit: int) -> bytes:  # noqa: ARG002  # the URI holds the data
        max_chars = self._settings.max_data_uri_bytes
        if len(uri) > max_chars:
            message = f"The data URI has {len(uri):,} characters; at most {max_chars:,} are allowed."
            raise ImageTooLarge(message)
        head, comma, body = uri.partition(",")
        try:
            if head.casefold().endswith(";base64"):
                return base64.b64decode(unquote_to_bytes(body), validate=True)
        except binascii.Error as error:
            message = f"The data URI is not valid base64: {error}"
            raise ImageDecodeFailed(message) from error
        if not comma:
            message = "The data URI has no comma: write data:image/png;base64,..."
            raise ImageDecodeFailed(message)
        return unquote_to_bytes(body)


def verified(image: ImageRef, data: bytes) -> FetchedBytes:
    """Make what was read of an image. Raises ChecksumMismatch if it is another one than was asked for."""
    sha256 = hashlib.sha256(data).hexdigest()
    if image.sha256 not in {None, sha256}:
        message = f"The image has sha256 {sha256}; the job requires {image.sha256}."
        raise ChecksumMismatch(message)
    return FetchedBytes(data, sha256, redact_uri(image.uri))


def open_below(root: Path, path: Path) -> BinaryIO:
    """Open a regular file below a folder without following symbolic links.

    Each folder on the way is opened by itself. So nobody who can write below `root` can swap in a link
    between the check of a path and this call. Opening a pipe does not block, and is refused.

    Args:
        root: A resolved folder.
        path: A resolved path below it.

    Raises:
        OSError: It is not a regular file, or cannot be opened.
    """
    *folders, name = path.relative_to(root).parts or (".",)
    if ".." in folders:
        raise FileNotFoundError(errno.ENOENT, "Not resolved", str(path))
    folder_fd = os.open(root, OPEN_FOLDER)
    try:
        for folder in folders:
            inner_fd = os.open(folder, OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=folder_fd)
            os.close(folder_fd)
            folder_fd = inner_fd
        file_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=folder_fd)
    finally:
        os.close(folder_fd)
    if not stat.S_ISREG(os.fstat(file_fd).st_mode):
        os.close(file_fd)
        raise FileNotFoundError(errno.ENOENT, "Not a regular file", str(path))
    return os.fdopen(file_fd, "rb")


def redact_uri(uri: str) -> str:
    """Remove everything secret or long from a URI: user, password, query, inline data."""
    scheme, _, rest = uri.partition(":")
    if scheme.casefold() == "data":
        return f"data:{rest.partition(',')[0][:100]},..."
    return without_user(uri) if scheme.casefold() == "s3" else without_secrets(uri)
