"""Which addresses may be dialled: public ones, and the networks that the operator lists.

Everything that is not global unicast is refused, in whatever form it comes. `ipaddress.is_global` alone is no
guard: it takes multicast, site-local addresses, and IPv6 addresses that carry an internal IPv4 address.
"""

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

LOW_32 = 0xFFFF_FFFF  # the last 32 bits of an IPv6 address
ISATAP = {0x0000_5EFE, 0x0200_5EFE}  # the first half of an interface's id, under any prefix (RFC 5214)
GLOBAL_UNICAST = IPv6Network("2000::/3")  # all that IANA has given out for the public IPv6 internet

# IANA's registries of special-purpose addresses, and what clouds put elsewhere. The first that fits is named.
INTERNAL: tuple[tuple[str, Network], ...] = (
    ("unspecified", IPv4Network("0.0.0.0/8")),  # Linux takes 0.0.0.0 for itself
    ("private", IPv4Network("10.0.0.0/8")),
    ("shared, behind a carrier's NAT", IPv4Network("100.64.0.0/10")),  # Alibaba's metadata: 100.100.100.200
    ("loopback", IPv4Network("127.0.0.0/8")),
    ("cloud metadata", IPv4Network("168.63.129.16/32")),  # Azure's, though it looks public
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
    ("given back", IPv6Network("3ffe::/16")),  # the 6bone's
    ("for documentation", IPv6Network("3fff::/20")),
    ("for segment routing", IPv6Network("5f00::/16")),
    ("private", IPv6Network("fc00::/7")),  # AWS's metadata: fd00:ec2::254
    ("link-local", IPv6Network("fe80::/10")),
    ("site-local", IPv6Network("fec0::/10")),
    ("multicast", IPv6Network("ff00::/8")),
)


@dataclass(frozen=True)
class Carrier:
    """A form of IPv6 address that carries an IPv4 address, to which a router or the kernel may send it on."""

    name: str
    network: IPv6Network
    carried: Callable[[int], int]


CARRIERS = (
    Carrier("IPv4-mapped", IPv6Network("::ffff:0:0/96"), lambda bits: bits & LOW_32),
    Carrier("IPv4-translated", IPv6Network("::ffff:0:0:0/96"), lambda bits: bits & LOW_32),
    Carrier("IPv4-compatible", IPv6Network("::/96"), lambda bits: bits & LOW_32),
    Carrier("NAT64", IPv6Network("64:ff9b::/96"), lambda bits: bits & LOW_32),
    # Where a local prefix carries it, only its translator knows: read as with the usual prefix of 96 bits.
    Carrier("NAT64", IPv6Network("64:ff9b:1::/48"), lambda bits: bits & LOW_32),
    Carrier("6to4", IPv6Network("2002::/16"), lambda bits: bits >> 80 & LOW_32),
    Carrier("Teredo", IPv6Network("2001::/32"), lambda bits: ~bits & LOW_32),  # its bits are inverted
)
PLAIN = {IPv6Address("::"), IPv6Address("::1")}  # in the network of IPv4-compatible ones, and carry none


def networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """The networks that an operator wrote down, as 10.0.0.0/8. Raises ValueError with a sentence."""
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text))
        except ValueError as error:
            message = f"{text!r} is not a network: {error}; write it as 10.0.0.0/8 or fd00::/8"
            raise ValueError(message) from error
    return tuple(found)


def listed(texts: Sequence[str]) -> tuple[str, ...]:
    """The same networks as text, as Python writes them. Raises ValueError with a sentence."""
    return tuple(map(str, networks(texts)))


def objection(address: Address, admitted: Sequence[Network] = ()) -> str | None:
    """What speaks against dialling an address, as "loopback"; None where nothing does.

    A network in `admitted` lets its addresses in whatever they are. One that carries an IPv4 address is let
    in only if its own network is admitted and the IPv4 address would be as well: to admit 127.0.0.0/8 does
    not admit ::ffff:127.0.0.1, and to admit 64:ff9b::/96, the NAT64 of a network without IPv4, does not
    admit 64:ff9b::127.0.0.1. By default none is let in, not even with a public address in it: no public
    host has such an address of its own.
    """
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return "bound to one interface by a scope id"
    listed = any(address in network for network in admitted)
    form, carried = _carried(address)
    if carried:
        inner = objection(carried, admitted)
        about = f"{form} of {carried}" + (f", which is {inner}" if inner else "")
        return about if inner or not listed else None
    return None if listed else _internal(address)


def _internal(address: Address) -> str | None:
    for name, network in INTERNAL:
        if address in network:
            return name
    if isinstance(address, IPv6Address) and address not in GLOBAL_UNICAST:
        return "not global unicast"
    return None if address.is_global else "not global"  # what Python knows and the list above does not


def _carried(address: Address) -> tuple[str, IPv4Address | None]:
    """The form and the IPv4 address in an IPv6 address; None where it carries none."""
    if isinstance(address, IPv4Address) or address in PLAIN:
        return "", None
    bits = int(address)
    for carrier in CARRIERS:
        if address in carrier.network:
            return carrier.name, IPv4Address(carrier.carried(bits))
    if bits >> 32 & LOW_32 in ISATAP:
        return "ISATAP", IPv4Address(bits & LOW_32)
    return "", None
