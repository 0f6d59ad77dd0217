"""URLs of a Redis or Valkey master that Sentinels know.

    sentinel://user:password@sentinel-1:26379,sentinel-2:26379,sentinel-3:26379/mymaster/0

User and password are those of the master; `mymaster` is what the Sentinels call it, and 0 the database. With
`sentinels://`, all connections are encrypted.
"""

import re
from dataclasses import dataclass

from gradcam_worker.text import urls

FORM = "must look like sentinel://host:26379,host:26379/mymaster/0, or sentinels:// for TLS"
DEFAULT_PORT = 26_379
_PATH = re.compile(r"/(?P<master>[\w.-]+)(?:/(?P<database>[0-9]{1,9})?)?/?", re.ASCII)


@dataclass(frozen=True)
class SentinelUrl:
    """The parts of such a URL."""

    sentinels: tuple[tuple[str, int], ...]  # host and port
    master: str  # its name
    tls: bool
    server_url: str  # redis:// or rediss:// with user, password and database; the host is that of a Sentinel


def is_sentinel_url(text: str) -> bool:
    """Whether the scheme is that of Sentinels."""
    return text.partition("://")[0].lower() in urls.SENTINEL_SCHEMES


def parse(text: str) -> SentinelUrl:
    """Return the parts of a URL. Raises ValueError with what is wrong with it, as a part of a sentence."""
    url = urls.parse(text)
    if not url:
        message = "has a host, a port, or an @ behind its hosts, that cannot be read"
        raise ValueError(message)
    sentinels = [urls.split_host(host) for host in url.host.split(",")]
    if any(split and split[1] == 0 for split in sentinels):
        message = "names a Sentinel at port 0"
        raise ValueError(message)
    path = _PATH.fullmatch(url.path)
    if not path:
        message = (
            "names no master behind the Sentinels" if url.path in {"", "/"} else f"has the path {url.path!r}"
        )
        raise ValueError(message)
    if url.query is not None or url.fragment is not None:
        message = "has a part behind a ? or a #"
        raise ValueError(message)
    tls = url.scheme == "sentinels"
    user = text.partition("://")[2].partition("/")[0].rpartition("@")
    found = tuple((host, DEFAULT_PORT if port is None else port) for host, port in filter(None, sentinels))
    shown_host = url.host.split(",")[0]
    server_url = f"redis{'s' * tls}://{user[0]}{user[1]}{shown_host}/{path['database'] or 0}"
    return SentinelUrl(found, path["master"], tls, server_url)
