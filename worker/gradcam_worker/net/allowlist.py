"""A list of hosts that may be asked: exact ones, and all below a domain."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from gradcam_worker.text.urls import MAX_PORT, without_secrets

_LABEL = r"[a-z0-9_-]{1,63}"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.[a-z][a-z0-9-]{{1,62}}")  # ends as no IPv4 address does
_LABELS = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_ENTRY = re.compile(r"(?P<star>\*\.)?(?P<host>\[[0-9a-f:.]+\]|[^:\[\]*]+)(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class _Entry:
    host: str
    port: int | None  # none: the scheme's own
    below: bool = False  # not the host itself, but every name that ends in it

    def admits(self, host: str, port: int, usual_port: int) -> bool:
        if port != (usual_port if self.port is None else self.port):
            return False
        if not self.below:
            return host == self.host
        first = host.removesuffix(self.host)
        return first != host and bool(_LABELS.fullmatch(first))


class Hosts:
    """Knows which hosts an operator allows."""

    def __init__(self, entries: Sequence[str]) -> None:
        """Entries as in `listed`. Raises ValueError with a sentence."""
        self._entries = [_parsed(entry) for entry in entries]

    def admit(self, host: str, port: int, usual_port: int) -> bool:
        """Whether a host may be asked: a name in lower-case ASCII, or an address without brackets.

        `usual_port` is the scheme's, for entries that name none.
        """
        host = _shortest(host)
        return any(entry.admits(host, port, usual_port) for entry in self._entries)


def listed(entries: Sequence[str]) -> tuple[str, ...]:
    """The entries of a list, in lower case: `host`, `host:port`, `[IPv6 address]:port` or `*.example.com`.

    Raises ValueError, with a sentence, for what could never match or would match too much.
    """
    lowered = tuple(entry.lower() for entry in entries)
    Hosts(lowered)
    return lowered


def _parsed(entry: str) -> _Entry:
    found = _ENTRY.fullmatch(entry)
    host, port = (found["host"], found["port"]) if found else ("", None)
    below = bool(found and found["star"])
    if below and not _DOMAIN.fullmatch(host):
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
    return _Entry(f".{host}" if below else host, int(port) if port else None, below)


def _shortest(host: str) -> str:
    """An address in the one form that Python writes it in; names as they are."""
    try:
        address: IPv4Address | IPv6Address = ip_address(host)
    except ValueError:
        return host
    return str(address)
