"""URLs that may hold a user and a password: taken apart in one way, and shown without what may be secret.

A password with `#`, `?` or `/` in it that is not percent-encoded ends the host for every parser (RFC 3986,
section 3.2), and half of it then looks like a host, a path or a fragment. Such a URL is refused where one is
read, and where one is shown nothing of it is left but its scheme.
"""

import re
from dataclasses import dataclass

ENCODE = "in a user or a password # is written as %23, ? as %3F, / as %2F, @ as %40, : as %3A and % as %25"
LARGEST_PORT = 65_535
KEYED = {"s3", "file"}  # schemes of stores: what follows the first slash is a name, which may hold ? # and @
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)"
    r"(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?:#(?P<fragment>.*))?",
    re.DOTALL,
)
_PLACE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+(?:%[\w.~-]+)?\]|[^\s:\[\]\\]*)(?::(?P<port>[0-9]{1,5}))?")
# In text: what stands between :// and an @, unless a host with a path does.
_CREDENTIALS = re.compile(r"://(?:[^\s/?#\"'<>]*|[^\s/?#\"'<>:]*:(?![0-9]{1,5}/)[^\s\"'<>]*)@")


@dataclass(frozen=True)
class Url:
    """A URL with a host, in its parts. Its user and password are not among them."""

    scheme: str  # in lower case
    has_user: bool  # or a password
    host: str
    port: int | None
    path: str
    query: str | None  # None: there is no ?
    fragment: str | None

    @property
    def place(self) -> str:
        """Host and port."""
        return self.host if self.port is None else f"{self.host}:{self.port}"


def parse(text: str) -> Url | None:
    """The parts of a URL; None for what is none, or may be a password that is not percent-encoded."""
    found = _URL.fullmatch(text)
    if not found or hides_password(text) or "\\" in found["authority"]:  # which some take for a slash
        return None
    user, at, place = found["authority"].rpartition("@")
    split = _PLACE.fullmatch(place)
    port = int(split["port"]) if split and split["port"] else None
    if not split or (port is not None and port > LARGEST_PORT):
        return None
    return Url(
        found["scheme"].lower(),
        bool(at or user),
        split["host"],
        port,
        found["path"],
        found["query"],
        found["fragment"],
    )


def hides_password(text: str) -> bool:
    """Whether a part of a user or a password may stand where a parser sees a host, a path or a fragment.

    That is so where an @ follows after the host has ended. It is none where it can only belong to a path: in
    the name of an object or of a photo (`icon@2x.png`), behind a host without a colon.
    """
    found = _URL.fullmatch(text)
    if not found:
        return False
    if found["scheme"].lower() in KEYED:  # neither a query nor a fragment, and no port
        bucket, _, key = text.partition("://")[2].partition("/")
        return ("@" in key and ":" in bucket) or ("@" in bucket and bool({"?", "#"} & set(bucket)))
    later = f"{found['query'] or ''}{found['fragment'] or ''}"
    in_path = "@" in found["path"] and (":" in found["authority"] or not found["scheme"].startswith("http"))
    return "@" in later or in_path


def has_credentials(text: str) -> bool:
    """Whether a user or a password stands in a URL, or may do so; also where the scheme is left out."""
    if text[:5].casefold() == "data:":
        return False
    found = _URL.fullmatch(text)
    if not found:
        return bool(re.match(r"[^/?#\s]*:[^\s]*@", text) or re.match(r"[\w+.-]+:/*[^/?#]*@", text))
    if found["scheme"].lower() in KEYED:
        return "@" in text.partition("://")[2].partition("/")[0] or hides_password(text)
    unreadable = not _PLACE.fullmatch(found["authority"])
    return "@" in found["authority"] or (unreadable and "@" in text) or "@" in (found["fragment"] or "")


def without_secrets(text: str) -> str:
    """A URL that may be shown: user, password, query and fragment are gone.

    Of one that may hold a password where none belongs, only the scheme is left.
    """
    scheme, slashes, _ = text.partition("://")
    if not slashes:
        return "..." if "@" in text else re.split("[?#]", text)[0]
    found = parse(text)
    if not found:
        return f"{scheme}://..." if re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme) else "..."
    return f"{scheme}://{found.place}{found.path}"


def without_user(text: str) -> str:
    """As `without_secrets`; but of a store's URI the whole name, which may hold ? and #."""
    scheme, slashes, rest = text.partition("://")
    if not slashes or scheme.lower() not in KEYED:
        return without_secrets(text)
    bucket, slash, key = rest.partition("/")
    return (
        f"{scheme}://..." if hides_password(text) else f"{scheme}://{bucket.rpartition('@')[2]}{slash}{key}"
    )


def redacted(text: str) -> str:
    """Text of others, in which no URL holds a user and a password any more."""
    return _CREDENTIALS.sub("://...@", text) if "://" in text and "@" in text else text
