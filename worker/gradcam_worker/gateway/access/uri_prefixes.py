"""Which URIs lie below a prefix, also for a parser or a server that reads them differently.

A prefix is one of

    s3://bucket/folder          also a bucket alone
    https://host:8443/folder    also a host alone, http://, and https://*.example.com
    file:///folder
    data:                       the URI contains the image
    *                           every URI

Prefixes end between two slashes: `s3://photos/acme` has `s3://photos/acme/1.jpg` below it, and not
`s3://photos/acme-2/1.jpg`. A URI that two programs may read differently is below no prefix that it could
leave: one with `..`, however it is encoded, with a backslash, a user, or a host in an unusual form.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote

from gradcam_worker.net.allowlist import HostAllowlist
from gradcam_worker.schemas import bucket_names
from gradcam_worker.text.urls import has_credentials, without_secrets

EVERYTHING, INLINE = "*", "data:"
DEFAULT_PORTS = {"http": 80, "https": 443}
STORES = ("s3", "file")
FORM = "write s3://bucket/folder, https://host/folder, file:///folder, data: or *"
# Without what any parser might take for a user, a port or the end of the host.
_AUTHORITY = re.compile(r"(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?")
_DOTS = {".", ".."}
MAX_DECODINGS = 4  # of a path whose percent signs are encoded themselves


@dataclass(frozen=True)
class UriPrefix:
    """One prefix: see the module."""

    text: str
    scheme: str = ""
    authority: str = ""  # the bucket, or the host and port; `*.` in front of a domain: every host below it
    folders: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a prefix.

        Args:
            text: As the module describes.

        Returns:
            The prefix.

        Raises:
            ValueError: It is none, or could be read in two ways.
        """
        if text in {EVERYTHING, INLINE}:
            return cls(text)
        scheme, slashes, rest = text.partition("://")
        authority, _, path = rest.rstrip("/").partition("/")
        problem = None
        if not slashes or scheme not in {*STORES, *DEFAULT_PORTS} or has_credentials(text):
            problem = FORM
        elif scheme == "s3":
            problem = bucket_names.describe_problem(authority)
        elif scheme == "file":
            problem = None if not authority and path else "it must look like file:///folder"
        else:
            HostAllowlist([authority.lower()])
        folders = tuple(path.split("/")) if path else ()
        if not problem and "*" in path:
            problem = "a prefix has no pattern, and names a whole folder"
        if problem or _is_ambiguous(path) or {"?", "#"} & set(rest) or "" in folders:
            message = f"{without_secrets(text)[:200]!r} is no prefix of URIs: {problem or FORM}"
            raise ValueError(message)
        return cls(text, scheme, authority if scheme in STORES else authority.lower(), folders)

    def contains(self, uri: str) -> bool:
        """Return whether a URI is below this prefix, whoever reads it."""
        if self.text == EVERYTHING:
            return True
        scheme = uri.partition(":")[0].lower()
        if self.text == INLINE:
            return scheme == "data"
        if scheme != self.scheme or not uri[len(scheme) :].startswith("://") or not uri.isprintable():
            return False
        authority, slash, path = uri[len(scheme) + len("://") :].partition("/")
        if scheme in STORES:
            names = tuple(path.split("/"))
            return (
                bool(slash)
                and authority == self.authority
                and not has_credentials(uri)
                and not _is_ambiguous(path)
                and "" not in names
                and len(names) > len(self.folders)
                and names[: len(self.folders)] == self.folders
            )
        return self._contains_address(uri)

    def _contains_address(self, uri: str) -> bool:
        """The same for http and https: host and port, then the folders."""
        rest = uri.partition("://")[2]
        end = min((at for mark in "/?#\\" if (at := rest.find(mark)) >= 0), default=len(rest))
        match = _AUTHORITY.fullmatch(rest[:end])
        if not match or not uri.isascii() or " " in uri or rest[end : end + 1] == "\\":
            return False
        default_port = DEFAULT_PORTS[self.scheme]
        host, port = match["host"].lower().strip("[]"), int(match["port"] or default_port)
        if not HostAllowlist([self.authority]).allows(host, port, default_port):
            return False
        if not self.folders:
            return True
        path = re.split("[?#]", rest[end:])[0].removeprefix("/")
        names = tuple(path.split("/"))
        plain = not _is_ambiguous(path) and not re.search("%2f|%5c|%25", path, re.IGNORECASE)
        return plain and len(names) > len(self.folders) and names[: len(self.folders)] == self.folders

    def overlaps(self, other: "UriPrefix") -> bool:
        """Return whether a URI can be below both prefixes. Hosts are compared by name alone."""
        if EVERYTHING in {self.text, other.text}:
            return True
        shared = min(len(self.folders), len(other.folders))
        same_folders = self.folders[:shared] == other.folders[:shared]
        return (self.scheme, self.authority) == (other.scheme, other.authority) and same_folders


def is_below(uri: str, prefixes: Sequence[str]) -> bool:
    """Return whether a URI is below one of these prefixes.

    Args:
        uri: The URI.
        prefixes: Valid ones: see `UriPrefix.parse`.
    """
    return any(UriPrefix.parse(prefix).contains(uri) for prefix in prefixes)


def _is_ambiguous(path: str) -> bool:
    """Whether a path may lead elsewhere: as it is, decoded once or several times, or in a similar script."""
    for _ in range(MAX_DECODINGS):
        names = unicodedata.normalize("NFKC", path).replace("\\", "/").split("/")
        # Some servers take what follows a semicolon for a parameter, and the name before it alone.
        if any(name.partition(";")[0].strip() in _DOTS for name in names) or not path.isprintable():
            return True
        if (decoded := unquote(path)) == path:
            return "\ufffd" in path
        path = decoded
    return True
