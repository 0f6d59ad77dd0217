"""URLs that may hold a user and a password: taken apart in one way, and shown without what may be secret.

A password with `#`, `?` or `/` in it that is not percent-encoded ends the host for every parser (RFC 3986,
section 3.2), and half of it then looks like a host, a path or a fragment. Such a URL is refused where one is
read, and where one is shown nothing of it is left but its scheme.

An @ behind the host is taken for such a password, with two exceptions: in http and https behind a host, or a
host and a port, and a slash (`https://cdn.example.com:8443/icon@2x.png`), and in the key of an object.
"""

import re
from dataclasses import dataclass

ENCODE = "in a user or a password # is written as %23, ? as %3F, / as %2F, @ as %40, : as %3A and % as %25"
MAX_PORT = 65_535
LONGEST_IN_TEXT = 2000  # characters of a URL in a text; of a longer one that holds an @ nothing is shown
WEB = {"http", "https"}
KEYED = {"s3", "file"}  # schemes of stores: what follows the first slash is a name, which may hold ? # and @
# Of access points: the key would begin behind the first slash, so it stands with colons alone.
ACCESS_POINT = re.compile(
    r"arn:aws[a-z-]*:s3[a-z-]*:[a-z0-9-]*:[0-9]{12}:"
    r"(?:accesspoint:[A-Za-z0-9.-]+|outpost:op-[0-9a-z]+:accesspoint:[A-Za-z0-9-]+)"
)
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_IN_SCHEMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+.-"
_URL = re.compile(
    rf"(?P<scheme>{_SCHEME})://(?P<authority>[^/?#]*)"
    r"(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?:#(?P<fragment>.*))?",
    re.DOTALL,
)
_PLACE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+(?:%[\w.~-]+)?\]|[^\s:\[\]\\]*)(?::(?P<port>[0-9]{1,5}))?")
_BEHIND = "'\"`,.;:!)]}>"  # a URL in a text


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
    return _read(text)[0]


def has_credentials(text: str) -> bool:
    """Whether a user or a password stands in a URL, or may do so; also where the scheme is left out."""
    return _read(text)[1]


def _read(text: str) -> tuple[Url | None, bool]:
    """The parts of a URL, None where they are not certain; and whether it may have a user or a password."""
    found = _URL.fullmatch(text)
    if not found:
        bare = text[:5].casefold() != "data:" and (
            re.match(r"[^/?#\s:]*:\S*@", text) or re.match(r"[\w+.-]+:/*[^/?#]*@", text)
        )
        return None, bool(bare)
    scheme = found["scheme"].lower()
    rest = text[found.end("scheme") + len("://") :]
    path, query, fragment = found["path"], found["query"], found["fragment"]
    if scheme in KEYED:
        bucket, _, key = rest.partition("/")
        _, at, host = bucket.rpartition("@")
        hidden = "@" in key and ":" in bucket and not ACCESS_POINT.fullmatch(bucket)
        if hidden or (at and {"?", "#"} & set(bucket)):
            return None, True
        host, port = re.split("[?#]", host)[0], None
    else:
        _, at, place = found["authority"].rpartition("@")
        split = None if "\\" in found["authority"] else _PLACE.fullmatch(place)  # which some take for a slash
        later = "@" in rest[len(found["authority"]) :]
        certain = scheme in WEB and split and split["host"] and path and not at
        if not split or int(split["port"] or 0) > MAX_PORT or (later and not certain):
            return None, bool(at) or later
        host, port = split["host"], int(split["port"]) if split["port"] else None
    return Url(scheme, bool(at), host, port, path, query, fragment), bool(at)


def without_secrets(text: str) -> str:
    """A URL that may be shown: user, password, query and fragment are gone.

    Of one that may hold a password where none belongs, only the scheme is left.
    """
    scheme, slashes, _ = text.partition("://")
    if not slashes:
        return "..." if "@" in text else re.split("[?#]", text)[0]
    found = parse(text)
    if not found:
        return f"{scheme}://..." if re.fullmatch(_SCHEME, scheme) else "..."
    return f"{scheme}://{found.place}{found.path}"


def without_user(text: str) -> str:
    """As `without_secrets`; but of a store's URI the whole name, which may hold ? and #."""
    scheme, slashes, rest = text.partition("://")
    if not slashes or scheme.lower() not in KEYED or not parse(text):
        return without_secrets(text)
    return f"{scheme}://{_behind_user(rest)}"


def redacted(text: str) -> str:
    """Text of others, in which no URL holds a user and a password any more.

    A URL ends at white space only: whatever else may stand in a password that is not percent-encoded.
    """
    if "://" not in text or "@" not in text:
        return text
    before, *others = text.split("://")
    parts = [before]
    for part in others:
        scheme = before[len(before.rstrip(_IN_SCHEMES)) :].lstrip("0123456789+.-")
        parts += "://", _without_credentials(scheme or "unknown", part)
        before = part
    return "".join(parts)


def _without_credentials(scheme: str, part: str) -> str:
    """Text that begins behind the :// of a URL, without its user and password."""
    word = (part.split(maxsplit=1) or [""])[0] if not part[:1].isspace() else ""
    url = word.rstrip(_BEHIND)
    if "@" not in url:
        return part
    found, credentials = (None, True) if len(url) > LONGEST_IN_TEXT else _read(f"{scheme}://{url}")
    if not credentials:
        return part
    return (f"...@{_behind_user(url)}" if found else "...") + part[len(url) :]


def _behind_user(rest: str) -> str:
    """What follows :// in a URL whose parts are certain, without user and password."""
    authority, slash, path = rest.partition("/")
    return f"{authority.rpartition('@')[2]}{slash}{path}"
