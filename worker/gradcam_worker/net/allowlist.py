"""Allowlists of hosts: exact names, and all names below a domain."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from gradcam_worker.text.urls import MAX_PORT, without_secrets

_LABEL = r"[a-z0-9_-]{1,63}"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_DOMAIN = re.compile(
    rf"{_LABEL}(?:\.{_LABEL})*\.[a-z][a-z0-9-]{{1,62}}"
)  # unlike an IPv4 address, ends with a label that begins with a letter
_LABELS = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_ENTRY = re.compile(r"(?P<star>\*\.)?(?P<host>\[[0-9a-f:.]+\]|[^:\[\]*]+)(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class _Entry:
    host: str
    port: int | None  # None: the default port of the scheme
    subdomains: bool = False  # not the host itself, but every name below it

    def allows(self, host: str, port: int, default_port: int) -> bool:
        if port != (default_port if self.port is None else self.port):
            return False
        if not self.subdomains:
            return host == self.host
        labels = host.removesuffix(self.host)
        return labels != host and bool(_LABELS.fullmatch(labels))


class HostAllowlist:
    """The hosts that an operator allows."""

    def __init__(self, entries: Sequence[str]) -> None:
        """Parse entries as in `normalize`. Raises ValueError."""
        self._entries = [_parse(entry) for entry in entries]

    def allows(self, host: str, port: int, default_port: int) -> bool:
        """Return whether requests to a host are allowed.

        Args:
            host: A name in lower-case ASCII, or an address without brackets.
            port: The port of the request.
            default_port: The scheme's, for entries without a port.
        """
        host = _canonical(host)
        return any(entry.allows(host, port, default_port) for entry in self._entries)


def normalize(entries: Sequence[str]) -> tuple[str, ...]:
    """Return the entries in lower case: `host`, `host:port`, `[IPv6 address]:port` or `*.example.com`.

    Raises ValueError for an entry that could never match or would match too much.
    """
    lowered = tuple(entry.lower() for entry in entries)
    HostAllowlist(lowered)
    return lowered


def _parse(entry: str) -> _Entry:
    match = _ENTRY.fullmatch(entry)
    host, port = (match["host"], match["port"]) if match else ("", None)
    subdomains = bool(match and match["star"])
    if subdomains and not _DOMAIN.fullmatch(host):
        message = (
            f"{entry!r} would let in too much: after *. come at least two labels of a domain name, "
            "as in *.example.com"
        )
        raise ValueError(message)
    if host.startswith("["):
        try:
            host = str(IPv6Address(host[1:-1]))
        except ValueError as error:
            message = f"{entry!r} is not a host: {error}"
            raise ValueError(message) from error
    elif not _NAME.fullmatch(host):
        message = (
            f"{without_secrets(entry)!r} is not a host: write host, host:port, [IPv6 address]:port or "
            "*.example.com, in ASCII (xn--...), without scheme, user or path"
        )
        raise ValueError(message)
    if port is not None and not 1 <= int(port) <= MAX_PORT:
        message = f"{entry!r} has no port: it must be from 1 to {MAX_PORT}"
        raise ValueError(message)
    return _Entry(f".{host}" if subdomains else host, int(port) if port else None, subdomains)


def _canonical(host: str) -> str:
    """An address in the form that Python writes; names are returned unchanged."""
    try:
        address: IPv4Address | IPv6Address = ip_address(host)
    except ValueError:
        return host
    return str(address)
