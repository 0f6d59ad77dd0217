"""Decides which addresses may be connected to: public ones, and networks that the operator lists.

Everything that is not global unicast is refused, in every notation. `ipaddress.is_global` alone does not
suffice: it accepts multicast, site-local addresses, and IPv6 addresses that embed an internal IPv4 address.
"""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

LOW_32 = 0xFFFF_FFFF  # the last 32 bits of an IPv6 address
ISATAP = {0x0000_5EFE, 0x0200_5EFE}  # the first half of an interface's id, under any prefix (RFC 5214)
GLOBAL_UNICAST = IPv6Network("2000::/3")  # what IANA has allocated to the public IPv6 internet

# IANA's registries of special-purpose addresses, and metadata services of clouds. The first match counts.
INTERNAL: tuple[tuple[str, Network], ...] = (
    ("unspecified", IPv4Network("0.0.0.0/8")),  # on Linux, 0.0.0.0 means this machine
    ("private", IPv4Network("10.0.0.0/8")),
    ("shared, behind a carrier's NAT", IPv4Network("100.64.0.0/10")),  # Alibaba's metadata: 100.100.100.200
    ("loopback", IPv4Network("127.0.0.0/8")),
    ("cloud metadata", IPv4Network("168.63.129.16/32")),  # Azure's, in a public range
    ("link-local, where clouds keep their metadata", IPv4Network("169.254.0.0/16")),
    ("private", IPv4Network("172.16.0.0/12")),
    ("reserved for protocols", IPv4Network("192.0.0.0/24")),  # Oracle's metadata: 192.0.0.192
    ("for documentation", IPv4Network("192.0.2.0/24")),
    ("6to4's relay", IPv4Network("192.88.99.0/24")),
    ("private", IPv4Network("192.168.0.0/16")),
    ("for benchmarks", IPv4Network("198.18.0.0/15")),
    ("for documentation", IPv4Network("198.51.100.0/24")),
    ("for documentation", IPv4Network("203.0.113.0/24")),
    ("multicast", IPv4Network("224.0.0.0/4")),
    ("broadcast", IPv4Network("255.255.255.255/32")),
    ("reserved", IPv4Network("240.0.0.0/4")),
    ("unspecified", IPv6Network("::/128")),
    ("loopback", IPv6Network("::1/128")),
    ("discarded", IPv6Network("100::/64")),
    ("reserved for protocols", IPv6Network("2001::/23")),  # Teredo, benchmarks, ORCHID and others
    ("for documentation", IPv6Network("2001:db8::/32")),
    ("given back", IPv6Network("3ffe::/16")),  # formerly the 6bone
    ("for documentation", IPv6Network("3fff::/20")),
    ("for segment routing", IPv6Network("5f00::/16")),
    ("private", IPv6Network("fc00::/7")),  # AWS's metadata: fd00:ec2::254
    ("link-local", IPv6Network("fe80::/10")),
    ("site-local", IPv6Network("fec0::/10")),
    ("multicast", IPv6Network("ff00::/8")),
)


@dataclass(frozen=True)
class EmbeddedForm:
    """A form of IPv6 address with an IPv4 address inside, to which a router or the kernel may forward."""

    name: str
    network: IPv6Network
    extract: Callable[[int], int]  # bits of the IPv6 address -> bits of the IPv4 address


EMBEDDED_FORMS = (
    EmbeddedForm("IPv4-mapped", IPv6Network("::ffff:0:0/96"), lambda bits: bits & LOW_32),
    EmbeddedForm("IPv4-translated", IPv6Network("::ffff:0:0:0/96"), lambda bits: bits & LOW_32),
    EmbeddedForm("IPv4-compatible", IPv6Network("::/96"), lambda bits: bits & LOW_32),
    EmbeddedForm("NAT64", IPv6Network("64:ff9b::/96"), lambda bits: bits & LOW_32),
    # Only the translator knows where a local prefix puts it: assume the usual prefix of 96 bits.
    EmbeddedForm("NAT64", IPv6Network("64:ff9b:1::/48"), lambda bits: bits & LOW_32),
    EmbeddedForm("6to4", IPv6Network("2002::/16"), lambda bits: bits >> 80 & LOW_32),
    EmbeddedForm("Teredo", IPv6Network("2001::/32"), lambda bits: ~bits & LOW_32),  # its bits are inverted
)
NOT_EMBEDDING = {IPv6Address("::"), IPv6Address("::1")}  # although in the IPv4-compatible network


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Parse networks such as 10.0.0.0/8. Raises ValueError."""
    networks = []
    for text in texts:
        try:
            networks.append(ipaddress.ip_network(text))
        except ValueError as error:
            message = f"{text!r} is not a network: {error}; write it as 10.0.0.0/8 or fd00::/8"
            raise ValueError(message) from error
    return tuple(networks)


def normalize(texts: Sequence[str]) -> tuple[str, ...]:
    """Return networks in Python's notation. Raises ValueError."""
    return tuple(map(str, parse_networks(texts)))


def objection(address: Address, admitted: Sequence[Network] = ()) -> str | None:
    """Return why an address must not be connected to, such as "loopback"; None if it may be.

    Addresses in an admitted network are allowed, whatever they are. An address with an IPv4 address inside is
    allowed only if its own network is admitted and the IPv4 address is allowed, too: admitting 127.0.0.0/8
    does not admit ::ffff:127.0.0.1, and admitting 64:ff9b::/96, the NAT64 of a network without IPv4, does not
    admit 64:ff9b::127.0.0.1. By default such addresses are refused even with a public IPv4 address inside,
    because no public host has one.

    Args:
        address: The address.
        admitted: Networks that are allowed besides public addresses.
    """
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return "bound to one interface by a scope id"
    is_admitted = any(address in network for network in admitted)
    form, embedded = _embedded(address)
    if embedded:
        inner = objection(embedded, admitted)
        description = f"{form} of {embedded}" + (f", which is {inner}" if inner else "")
        return description if inner or not is_admitted else None
    return None if is_admitted else _internal(address)


def _internal(address: Address) -> str | None:
    for name, network in INTERNAL:
        if address in network:
            return name
    if isinstance(address, IPv6Address) and address not in GLOBAL_UNICAST:
        return "not global unicast"
    return (
        None if address.is_global else "not global"
    )  # by Python's list, which may be newer than the one above


def _embedded(address: Address) -> tuple[str, IPv4Address | None]:
    """The form of an IPv6 address and the IPv4 address inside, if any."""
    if isinstance(address, IPv4Address) or address in NOT_EMBEDDING:
        return "", None
    bits = int(address)
    for form in EMBEDDED_FORMS:
        if address in form.network:
            return form.name, IPv4Address(form.extract(bits))
    if bits >> 32 & LOW_32 in ISATAP:
        return "ISATAP", IPv4Address(bits & LOW_32)
    return "", None
