"""URI -> bytes: which schemes, hosts, buckets and folders, how large, how long."""

import base64
import binascii
import errno
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
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
from gradcam_worker.net.dialer import Resolve, look_up
from gradcam_worker.net.http import HttpClient, HttpFailed
from gradcam_worker.observability.events import NULL_OBSERVER, Observer
from gradcam_worker.resilience.deadline import Deadline
from gradcam_worker.schemas.job import ImageRef, why_no_uri
from gradcam_worker.schemas.model import too_long
from gradcam_worker.settings import Settings
from gradcam_worker.storage.s3 import S3
from gradcam_worker.text.urls import has_credentials, without_secrets, without_user

OK = 200
NOT_FOUND = {404, 410}
SEARCH = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)  # a folder may be passed that cannot be listed
FORBIDDEN = {400, 401, 403, 405, 406, 407, 451}  # asking again in the same way is of no use


@dataclass(frozen=True)
class Fetched:
    """An image as it was stored."""

    data: bytes
    sha256: str
    uri: str  # fit to be shown: no user, no password, no query, no long data


class UriFetcher:
    """Reads what the operator allows to be read, within its limits."""

    def __init__(
        self, settings: Settings, s3: S3, resolve: Resolve = look_up, observer: Observer = NULL_OBSERVER
    ) -> None:
        """Nothing is opened until it is needed; `resolve` finds the addresses of hosts."""
        self._settings = settings
        self._s3, self._observer = s3, observer
        self._web = HttpClient(
            settings.image_hosts,
            settings.image_schemes,
            "GRADCAM_IMAGE_HOSTS",
            settings.private_networks,
            resolve=resolve,
        )
        self._readers: dict[str, Callable[[str, Deadline, int], bytes]] = {
            "s3": self._read_s3,
            "http": self._read_http,
            "https": self._read_http,
            "file": self._read_file,
            "data": self._read_data,
        }

    def fetch(self, image: ImageRef, deadline: Deadline, at_most: int | None = None) -> Fetched:
        """Read an image; `at_most` so many bytes of it, where that is less than is allowed.

        Raises UriNotAllowed, ImageNotFound, ImageForbidden, ImageTooLarge,
        ImageFetchFailed, ImageDecodeFailed (a broken data URI), ChecksumMismatch, JobTimeout.
        """
        if why := too_long(image.uri):
            message = f"{presentable(image.uri)[:200]!r}... is not allowed: {why}."
            raise UriNotAllowed(message)
        scheme = image.uri.partition(":")[0].casefold()
        allowed = self._settings.image_schemes
        if why := why_no_uri(image.uri):
            message = f"{why}."
            raise UriNotAllowed(message)
        if scheme not in allowed or scheme not in self._readers:
            shown, schemes = presentable(image.uri)[:200], " or ".join(allowed)
            message = f"{shown!r} is not allowed: its scheme must be {schemes} (GRADCAM_IMAGE_SCHEMES)."
            raise UriNotAllowed(message)
        most = self._settings.max_image_bytes
        data = self._readers[scheme](image.uri, deadline, most if at_most is None else min(at_most, most))
        self._observer.image_read(len(data))
        sha256 = hashlib.sha256(data).hexdigest()
        if image.sha256 not in {None, sha256}:
            message = f"The image has sha256 {sha256}; the job asked for {image.sha256}."
            raise ChecksumMismatch(message)
        return Fetched(data, sha256, presentable(image.uri))

    def _check_size(self, size: int, uri: str, limit: int) -> None:
        if size > limit:
            message = f"{presentable(uri)} has more than {limit:,} bytes, the most that is allowed."
            raise ImageTooLarge(message)

    def _read_s3(self, uri: str, deadline: Deadline, limit: int) -> bytes:
        # No URL parser: an S3 key may hold ? and #, which are not special there.
        bucket, _, key = uri.partition("://")[2].partition("/")
        allowed = self._settings.image_buckets
        if has_credentials(uri):
            message = (
                f"A user or password in a URI ({presentable(uri)}) is not allowed: write s3://bucket/key."
            )
            raise UriNotAllowed(message)
        if not bucket or not key:
            message = f"{presentable(uri)!r} is not an S3 URI: write s3://bucket/key."
            raise UriNotAllowed(message)
        if "*" not in allowed and bucket not in allowed:
            names = ", ".join(allowed) or "none"
            message = (
                f"Bucket {bucket!r} is not allowed: images may come from {names} (GRADCAM_IMAGE_BUCKETS)."
            )
            raise UriNotAllowed(message)
        return self._s3.read_image(bucket, key, limit, deadline)

    def _read_http(self, uri: str, deadline: Deadline, limit: int) -> bytes:
        shown = presentable(uri)
        seconds = min(self._settings.fetch_timeout_s, deadline.left_s())
        try:
            answer = self._web.get(uri, max_bytes=limit, seconds=seconds, deadline=deadline)
        except HttpFailed as error:
            deadline.check(f"reading {shown}")
            message = f"{shown} could not be read: {error}"
            raise ImageFetchFailed(message) from error
        what = f"{shown} could not be read (HTTP {answer.status})."
        if answer.status in NOT_FOUND:
            raise ImageNotFound(what)
        if answer.status in FORBIDDEN:
            raise ImageForbidden(what)
        if answer.status != OK:
            raise ImageFetchFailed(what)
        self._check_size(len(answer.body), uri, limit)
        return answer.body

    def _read_file(self, uri: str, deadline: Deadline, limit: int) -> bytes:  # noqa: ARG002  # a local disk answers
        host, _, name = uri.partition("://")[2].partition("/")
        try:
            # Resolved through symbolic links, so that none leads out.
            path = Path("/" + os.fsdecode(unquote_to_bytes(name))).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; a null byte
            message = f"{presentable(uri)} is not a path: {error}"
            raise UriNotAllowed(message) from error
        roots = self._roots()
        root = next((root for root in roots if path.is_relative_to(root)), None)
        if host not in {"", "localhost"} or root is None:
            folders = ", ".join(map(str, roots)) or "none"
            allowed = f"images may come from these folders: {folders} (GRADCAM_IMAGE_ROOTS)"
            message = f"{presentable(uri)} is not allowed: {allowed}."
            raise UriNotAllowed(message)
        try:
            if not path.is_file():
                message = f"There is no file {path}."
                raise ImageNotFound(message)
            with open_below(root, path) as file:
                data = file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError) as error:  # since it was looked for
            message = f"There is no file {path}."
            raise ImageNotFound(message) from error
        except PermissionError as error:
            message = f"The worker may not read {path}."
            raise ImageForbidden(message) from error
        except OSError as error:
            message = f"{presentable(uri)} could not be read: {error}"
            raise ImageFetchFailed(message) from error
        self._check_size(len(data), uri, limit)
        return data

    def _roots(self) -> list[Path]:
        """The folders that images may come from. Raises UriNotAllowed."""
        try:
            return [Path(root).resolve() for root in self._settings.image_roots]
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            message = f"GRADCAM_IMAGE_ROOTS names a folder that cannot be reached: {error}."
            raise UriNotAllowed(message) from error

    def _read_data(self, uri: str, deadline: Deadline, limit: int) -> bytes:  # noqa: ARG002  # already here
        limit = self._settings.max_data_uri_bytes
        if len(uri) > limit:
            message = f"The data URI has {len(uri):,} characters; at most {limit:,} are allowed."
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


def open_below(root: Path, path: Path) -> BinaryIO:
    """Open a file below a folder, and nothing that came to stand in its place since both were resolved.

    Folder by folder, none through a symbolic link: whoever can write below a root could put a link where
    the path was checked a moment ago. A pipe does not hold the open up; what is no file is not read.
    Raises OSError.
    """
    *folders, name = path.relative_to(root).parts or (".",)
    if ".." in folders:
        raise FileNotFoundError(errno.ENOENT, "Not resolved", str(path))
    place = os.open(root, SEARCH)
    try:
        for folder in folders:
            inner = os.open(folder, SEARCH | os.O_NOFOLLOW, dir_fd=place)
            os.close(place)
            place = inner
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=place)
    finally:
        os.close(place)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileNotFoundError(errno.ENOENT, "Not a file", str(path))
    return os.fdopen(file, "rb")


def presentable(uri: str) -> str:
    """A URI that may be shown and kept: no user, password or query, and no long data."""
    scheme, _, rest = uri.partition(":")
    if scheme.casefold() == "data":
        return f"data:{rest.partition(',')[0][:100]},..."
    return without_user(uri) if scheme.casefold() == "s3" else without_secrets(uri)
