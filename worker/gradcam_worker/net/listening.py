"""Which addresses a server listens at."""

import os
import socket
from pathlib import Path

EVERY_ADDRESS = "::"  # of IPv6 and of IPv4: Kubernetes asks a pod at either, by the cluster's first family


def family_and_host(host: str) -> tuple[socket.AddressFamily, str]:
    """Return how a host is listened at.

    Args:
        host: An address or a name. `::` is every address of both families.

    Returns:
        The family of the socket, and the host to bind it to: for `::` on a machine without IPv6, `0.0.0.0`.
    """
    if host == EVERY_ADDRESS and not socket.has_dualstack_ipv6():
        return socket.AF_INET, "0.0.0.0"  # noqa: S104  # it was asked for
    return (socket.AF_INET6 if ":" in host else socket.AF_INET), host


def bind_for_this_user(listener: socket.socket, path: Path) -> None:
    """Bind a Unix socket that only this user can open. A file that is there is replaced.

    Args:
        listener: Is not bound yet.
        path: Where.

    Raises:
        OSError: It cannot be made there.
    """
    path.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
