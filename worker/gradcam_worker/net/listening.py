"""Which addresses a server listens at."""

import socket

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
