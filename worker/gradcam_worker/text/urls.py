"""Parse URLs that may contain a user and a password, and show them without secrets.

An unencoded `#`, `?` or `/` in a password ends the host for every parser (RFC 3986, section 3.2), and a part
of the password then looks like a host, a path or a fragment. `parse` refuses such a URL, and of one that is
shown only the scheme is left.

An @ after the host is taken as a sign of such a password, with two exceptions: in http and https after a
host, or a host and a port, and a slash (`https://cdn.example.com:8443/icon@2x.png`), and in the key of an
object.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

ENCODE = (
    "in a user or a password # is written as %23, ? as %3F, / as %2F, @ as %40, : as %3A, [ as %5B, ] as %5D "
    "and % as %25"
)
MAX_PORT = 65_535
MAX_SHOWN_LENGTH = 2000  # characters of a URL within a text; a longer one with an @ is not shown
WEB_SCHEMES = {"http", "https"}
STORE_SCHEMES = {"s3", "file"}  # after the first slash there is a name, which may contain ? # and @
SENTINEL_SCHEMES = ("sentinel", "sentinels")  # the second one by TLS; they name several hosts
# The form with colons only: in others the key would begin within the ARN.
ACCESS_POINT = re.compile(
    r"arn:aws[a-z-]*:s3[a-z-]*:[a-z0-9-]*:[0-9]{12}:"
    r"(?:accesspoint:[A-Za-z0-9.-]+|outpost:op-[0-9a-z]+:accesspoint:[A-Za-z0-9-]+)"
)
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*"
_SCHEME_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+.-"
_URL = re.compile(
    rf"(?P<scheme>{_SCHEME})://(?P<authority>[^/?#]*)"
    r"(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?:#(?P<fragment>.*))?",
    re.DOTALL,
)
_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+(?:%[\w.~-]+)?\]|[^\s:\[\]\\]*)(?::(?P<port>[0-9]{1,5}))?")
# Of one word, or of several with dots, nobody can tell whether it is a password.
_ADDRESS = re.compile(
    r"(?:[\w.-]+:[0-9]{1,5}|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?|localhost|[0-9]+(?:\.[0-9]+){3})"
)
_TRAILING = "'\"`,.;:!)]}>"  # punctuation after a URL in a text


@dataclass(frozen=True)
class Url:
    """The parts of a URL, without user and password."""

    scheme: str  # in lower case
    has_user: bool  # has a user or a password
    host: str  # of Sentinels: all of them with their ports, with commas between
    port: int | None
    path: str
    query: str | None  # None: without a ?
    fragment: str | None

    @property
    def host_port(self) -> str:
        """Host and port."""
        return self.host if self.port is None else f"{self.host}:{self.port}"


def parse(text: str) -> Url | None:
    """Return the parts of a URL; None if it is not a URL, or may contain an unencoded password."""
    return _read(text)[0]


def is_readable(text: str) -> bool:
    """Return whether Python's own parser, which other libraries use, can read a URL: not every password."""
    try:
        urlsplit(text)
    except ValueError:
        return False
    return True


def signed_until(url: str) -> datetime | None:
    """Return when a presigned URL of S3 ceases to be valid, by its own text; None if that does not say."""
    try:
        asked = parse_qs(urlsplit(url).query)
        signed = datetime.strptime(asked["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return signed + timedelta(seconds=int(asked["X-Amz-Expires"][0]))
    except (KeyError, ValueError):
        return None


def has_credentials(text: str) -> bool:
    """Return whether a URL, even without a scheme, contains or may contain a user or a password."""
    return _read(text)[1]


def _read(text: str) -> tuple[Url | None, bool]:
    """The parts of a URL, or None if they are uncertain; and whether it may have a user or a password."""
    match = _URL.fullmatch(text)
    if not match:
        bare = text[:5].casefold() != "data:" and (
            re.match(r"[^/?#\s:]*:\S*@", text) or re.match(r"[\w+.-]+:/*[^/?#]*@", text)
        )
        return None, bool(bare)
    scheme = match["scheme"].lower()
    rest = text[match.end("scheme") + len("://") :]
    path, query, fragment = match["path"], match["query"], match["fragment"]
    if scheme in STORE_SCHEMES:
        bucket, _, key = rest.partition("/")
        _, at, host = bucket.rpartition("@")
        hidden = "@" in key and ":" in bucket and not ACCESS_POINT.fullmatch(bucket)
        if hidden or (at and {"?", "#"} & set(bucket)):
            return None, True
        host, port = re.split("[?#]", host)[0], None
    else:
        _, at, host_port = match["authority"].rpartition("@")
        # Some parsers read a backslash as a slash.
        if scheme in SENTINEL_SCHEMES:
            return _read_sentinels(match, at, host_port)
        split = None if "\\" in match["authority"] else _HOST_PORT.fullmatch(host_port)
        later = "@" in rest[len(match["authority"]) :]
        certain = scheme in WEB_SCHEMES and split and split["host"] and path and not at
        if not split or int(split["port"] or 0) > MAX_PORT or (later and not certain):
            return None, bool(at) or later
        host, port = split["host"], int(split["port"]) if split["port"] else None
    return Url(scheme, bool(at), host, port, path, query, fragment), bool(at)


def _read_sentinels(match: re.Match[str], at: str, hosts: str) -> tuple[Url | None, bool]:
    """As `_read`, of a URL that names Sentinels."""
    path, query, fragment = match["path"], match["query"], match["fragment"]
    later = "@" in match.string[match.end("authority") :]
    if later or not all(map(split_host, hosts.split(","))):
        return None, bool(at) or later
    return Url(match["scheme"].lower(), bool(at), hosts, None, path, query, fragment), bool(at)


def split_host(text: str) -> tuple[str, int | None] | None:
    """Return a host, without the brackets of IPv6, and its port, if it has one; None if it is neither."""
    split = None if "\\" in text else _HOST_PORT.fullmatch(text)
    if not split or not split["host"] or int(split["port"] or 0) > MAX_PORT:
        return None
    return split["host"].strip("[]"), int(split["port"]) if split["port"] else None


def is_address(text: str) -> bool:
    """Return whether a text without a scheme begins with a host and a port, an IP address or `localhost`."""
    return "@" not in text and bool(_ADDRESS.fullmatch(re.split("[/?#]", text)[0]))


def without_secrets(text: str) -> str:
    """Return a URL without user, password, query and fragment.

    Of one that may contain a password in another part, only the scheme is left.
    """
    scheme, slashes, _ = text.partition("://")
    if not slashes:
        return "..." if "@" in text else re.split("[?#]", text)[0]
    url = parse(text)
    if not url:
        return f"{scheme}://..." if re.fullmatch(_SCHEME, scheme) else "..."
    return f"{scheme}://{url.host_port}{url.path}"


def without_user(text: str) -> str:
    """As `without_secrets`, but with the whole name in a store's URI, which may contain ? and #."""
    scheme, slashes, rest = text.partition("://")
    if not slashes or scheme.lower() not in STORE_SCHEMES or not parse(text):
        return without_secrets(text)
    return f"{scheme}://{_without_user_part(rest)}"


def redacted(text: str) -> str:
    """Return a text with users and passwords removed from its URLs.

    Only white space ends a URL, because an unencoded password may contain everything else.
    """
    if "://" not in text or "@" not in text:
        return text
    before, *others = text.split("://")
    parts = [before]
    for part in others:
        scheme = before[len(before.rstrip(_SCHEME_CHARACTERS)) :].lstrip("0123456789+.-")
        parts += "://", _without_credentials(scheme or "unknown", part)
        before = part
    return "".join(parts)


def _without_credentials(scheme: str, part: str) -> str:
    """Text that begins after the :// of a URL, without its user and password."""
    word = (part.split(maxsplit=1) or [""])[0] if not part[:1].isspace() else ""
    url = word.rstrip(_TRAILING)
    if "@" not in url:
        return part
    parts, credentials = (None, True) if len(url) > MAX_SHOWN_LENGTH else _read(f"{scheme}://{url}")
    if not credentials:
        return part
    return (f"...@{_without_user_part(url)}" if parts else "...") + part[len(url) :]


def _without_user_part(rest: str) -> str:
    """The rest of a URL after ://, without user and password; its parts must be certain."""
    authority, slash, path = rest.partition("/")
    return f"{authority.rpartition('@')[2]}{slash}{path}"
