from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradcam_worker.net.ip_policy import GLOBAL_UNICAST, objection, parse_networks
from tests.net.ssrf_urls import forbidden_answers


@pytest.mark.parametrize(
    "address",
    [
        "1.1.1.1",
        "8.8.8.8",
        "9.255.255.255",
        "11.0.0.0",
        "100.63.255.255",
        "100.128.0.0",
        "128.0.0.1",
        "168.63.129.15",
        "169.253.255.255",
        "172.15.255.255",
        "172.32.0.0",
        "192.0.3.1",
        "192.167.255.255",
        "192.169.0.0",
        "198.17.255.255",
        "198.20.0.0",
        "223.255.255.255",
        "2001:4860:4860::8888",
        "2606:4700:4700::1111",
        "2a00:1450:4001:80b::200e",
    ],
)
def test_a_public_address_may_be_dialled(address: str) -> None:
    assert objection(ip_address(address)) is None


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1", "loopback"),
        ("169.254.169.254", "link-local, where clouds keep their metadata"),
        ("224.0.0.1", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("::1", "loopback"),
        ("::", "unspecified"),
        ("::ffff:127.0.0.1", "IPv4-mapped of 127.0.0.1, which is loopback"),
        ("::127.0.0.1", "IPv4-compatible of 127.0.0.1, which is loopback"),
        ("64:ff9b::7f00:1", "NAT64 of 127.0.0.1, which is loopback"),
        (
            "2002:a9fe:a9fe::",
            "6to4 of 169.254.169.254, which is link-local, where clouds keep their metadata",
        ),
        ("2001::80ff:fffe", "Teredo of 127.0.0.1, which is loopback"),
        ("2a00::5efe:7f00:1", "ISATAP of 127.0.0.1, which is loopback"),
        ("fec0::1", "site-local"),
        ("fe80::1%eth0", "bound to one interface by a scope id"),
        ("4000::1", "not global unicast"),
        ("fd00:ec2::254", "private"),
    ],
)
def test_an_objection_says_what_the_address_is(address: str, why: str) -> None:
    assert objection(ip_address(address)) == why


@pytest.mark.parametrize(
    "address", ["::ffff:8.8.8.8", "::8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1", "2a00::5efe:808:808"]
)
def test_a_public_address_in_disguise_is_refused_too(address: str) -> None:
    assert objection(ip_address(address)), "no public host has such an address of its own"


@pytest.mark.parametrize(("found", "why"), list(forbidden_answers()))
def test_no_answer_of_the_table_is_without_an_objection(found: tuple[str, ...], why: str) -> None:
    assert any(objection(ip_address(address)) for address in found)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_disguise_never_makes_an_ipv4_address_acceptable(bits: int) -> None:
    address = IPv4Address(bits)
    admitted = parse_networks(["::/0"])  # as careless as can be with IPv6
    for disguise in (
        f"::ffff:{address}",
        f"::ffff:0:{address}",
        f"64:ff9b::{address}",
        f"64:ff9b:1::{address}",
        f"2a00:1450::5efe:{address}",
        f"2a00:1450::200:5efe:{address}",
        str(IPv6Address(0x2002 << 112 | bits << 80)),
        str(IPv6Address(0x2001 << 112 | bits ^ 0xFFFF_FFFF)),
    ):
        assert objection(ip_address(disguise))
        assert bool(objection(ip_address(disguise), admitted)) == bool(objection(address))


@settings(deadline=None)
@given(st.integers(0, 2**128 - 1))
def test_beyond_global_unicast_there_is_no_address_to_dial(bits: int) -> None:
    address = IPv6Address(bits)
    assert address in GLOBAL_UNICAST or objection(address)


class TestAdmitted:
    def test_a_listed_network_lets_its_addresses_in_and_no_others(self) -> None:
        admitted = parse_networks(["10.1.0.0/16", "127.0.0.1", "fd12::/16"])
        for address in ("10.1.2.3", "127.0.0.1", "fd12::1", "8.8.8.8"):
            assert objection(ip_address(address), admitted) is None
        for address in ("10.2.0.1", "127.0.0.2", "fd13::1", "::1", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3"):
            assert objection(ip_address(address), admitted)

    def test_nat64_is_let_in_for_public_addresses_and_for_listed_ones(self) -> None:
        admitted = parse_networks(["64:ff9b::/96", "10.0.0.0/8"])
        assert objection(ip_address("64:ff9b::8.8.8.8"), admitted) is None
        assert objection(ip_address("64:ff9b::10.0.0.1"), admitted) is None
        assert objection(ip_address("64:ff9b::127.0.0.1"), admitted)

    def test_a_scope_id_is_never_let_in(self) -> None:
        assert objection(ip_address("fe80::1%lo"), parse_networks(["fe80::/10"]))

    @pytest.mark.parametrize("text", ["10.0.0.1/8", "ten", "10.0.0.0/33", "", "127.1/8", "::/129", "*"])
    def test_what_is_no_network_is_named(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"is not a network.*write it as 10\.0\.0\.0/8"):
            parse_networks([text])
