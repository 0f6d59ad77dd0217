"""Every way we know to write an address that a stranger's URL must never lead to, for tests and attacks.

Each trick points at a port of this machine or at the inside of some network. None may cause a connection.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

PUBLIC_HOST = "images.example.com"  # what an operator would allow
PUBLIC_ADDRESS = "8.8.8.8"  # is never dialled: it stands beside one that is refused

# Hosts that a list of hosts can hold: they must be refused even where an operator lets them in by name.
HOSTS: tuple[tuple[str, str], ...] = (
    ("127.0.0.1", "loopback"),
    ("127.255.255.254", "the other end of loopback"),
    ("127.1", "loopback, the short way"),
    ("127.0.1", "loopback in three parts"),
    ("2130706433", "loopback as a decimal number"),
    ("0x7f000001", "loopback as a hexadecimal number"),
    ("0x7f.1", "loopback, hexadecimal and short"),
    ("0x7f.0x0.0x0.0x1", "loopback in hexadecimal parts"),
    ("017700000001", "loopback as an octal number"),
    ("0177.1", "loopback, octal and short"),
    ("127.0x0.1", "loopback in mixed bases"),
    ("localhost", "loopback by name"),
    ("0", "this host, as a number"),
    ("0x0", "this host, in hexadecimal"),
    ("0.0.0.0", "this host"),  # noqa: S104  # not bound to, refused
    ("0.1.2.3", "this network"),
    ("10.0.0.1", "private"),
    ("10.255.255.254", "the end of a private network"),
    ("167772161", "private, as a decimal number"),
    ("0xa.1", "private, hexadecimal and short"),
    ("012.1", "private, octal and short"),
    ("172.16.0.1", "private"),
    ("172.31.255.254", "the end of a private network"),
    ("192.168.0.1", "private"),
    ("0xc0a80001", "private, in hexadecimal"),
    ("100.64.0.1", "behind a carrier's NAT"),
    ("100.127.255.254", "the end of a carrier's NAT"),
    ("100.100.100.200", "Alibaba's metadata"),
    ("169.254.169.254", "the metadata of most clouds"),
    ("169.254.170.2", "the credentials of an ECS task"),
    ("2852039166", "metadata as a decimal number"),
    ("0xa9fea9fe", "metadata as a hexadecimal number"),
    ("0xa9.0xfe.0xa9.0xfe", "metadata in hexadecimal parts"),
    ("025177524776", "metadata as an octal number"),
    ("169.16689662", "metadata in two parts"),
    ("168.63.129.16", "Azure's metadata, which looks public"),
    ("192.0.0.192", "Oracle's metadata"),
    ("192.0.2.1", "documentation"),
    ("192.88.99.1", "6to4's relay"),
    ("198.18.0.1", "benchmarks"),
    ("198.19.255.254", "the end of the benchmarks"),
    ("198.51.100.1", "documentation"),
    ("203.0.113.1", "documentation"),
    ("224.0.0.1", "multicast"),
    ("239.255.255.250", "multicast of devices at home"),
    ("240.0.0.1", "reserved"),
    ("255.255.255.255", "broadcast"),
    ("[::]", "this host"),
    ("[::1]", "loopback"),
    ("[0:0:0:0:0:0:0:1]", "loopback, the long way"),
    ("[0000:0000:0000:0000:0000:0000:0000:0001]", "loopback, the longest way"),
    ("[::ffff:127.0.0.1]", "mapped loopback"),
    ("[::ffff:7f00:1]", "mapped loopback in hexadecimal"),
    ("[0:0:0:0:0:ffff:7f00:0001]", "mapped loopback, the long way"),
    ("[::ffff:169.254.169.254]", "mapped metadata"),
    ("[::ffff:10.0.0.1]", "mapped private"),
    ("[::ffff:0:127.0.0.1]", "translated loopback"),
    ("[::127.0.0.1]", "compatible loopback"),
    ("[::a00:1]", "compatible private"),
    ("[64:ff9b::127.0.0.1]", "NAT64 of loopback"),
    ("[64:ff9b::a9fe:a9fe]", "NAT64 of metadata"),
    ("[64:ff9b:1::7f00:1]", "local NAT64 of loopback"),
    ("[64:ff9b:1:a9fe:a9:fe00::]", "local NAT64 of metadata, with a prefix of 48 bits"),
    ("[2002:7f00:1::]", "6to4 of loopback"),
    ("[2002:a00:1::1]", "6to4 of private"),
    ("[2002:a9fe:a9fe::1]", "6to4 of metadata"),
    ("[2001:0:4136:e378:8000:63bf:80ff:fffe]", "Teredo of loopback"),
    ("[2001::f5ff:fffe]", "Teredo of private"),
    ("[fe80::5efe:7f00:1]", "ISATAP of loopback"),
    ("[2a00:1450:4001:80b:0:5efe:10.0.0.1]", "ISATAP of private, under a public prefix"),
    ("[2a00:1450:4001:80b:200:5efe:a9fe:a9fe]", "ISATAP of metadata, under a public prefix"),
    ("[fe80::1]", "link-local"),
    ("[febf::1]", "the end of link-local"),
    ("[fec0::1]", "site-local"),
    ("[fc00::1]", "private"),
    ("[fd12:3456:789a::1]", "private"),
    ("[fd00:ec2::254]", "Amazon's metadata"),
    ("[fd20:ce::254]", "Google's metadata"),
    ("[ff02::1]", "multicast to the link"),
    ("[ff0e::1]", "multicast to the world"),
    ("[100::1]", "discarded"),
    ("[2001:2::1]", "benchmarks"),
    ("[2001:10::1]", "ORCHID"),
    ("[2001:20::1]", "ORCHID, version 2"),
    ("[2001:db8::1]", "documentation"),
    ("[3ffe::1]", "given back"),
    ("[3fff::1]", "documentation"),
    ("[4000::1]", "given to nobody"),
    ("[5f00::1]", "segment routing"),
)

# URLs that hide where they lead. {port} is one that somebody listens on.
URLS: tuple[tuple[str, str], ...] = (
    (f"http://{PUBLIC_HOST}@127.0.0.1:{{port}}/a.jpg", "an allowed host as the user"),
    (f"http://{PUBLIC_HOST}:80@127.0.0.1:{{port}}/a.jpg", "an allowed host as user and password"),
    (f"http://{PUBLIC_HOST}%2f@127.0.0.1:{{port}}/a.jpg", "a slash in the user"),
    (f"http://{PUBLIC_HOST}\\@127.0.0.1:{{port}}/a.jpg", "a backslash, which browsers take for a slash"),
    (f"http://a@{PUBLIC_HOST}@127.0.0.1:{{port}}/a.jpg", "two users"),
    (f"http://user:pass@{PUBLIC_HOST}/a.jpg", "a user at an allowed host"),
    (f"http://127.0.0.1:{{port}}#@{PUBLIC_HOST}/a.jpg", "an allowed host behind a fragment"),
    (f"http://127.0.0.1:{{port}}?@{PUBLIC_HOST}/a.jpg", "an allowed host behind a question mark"),
    (f"http://127.0.0.1:{{port}}\\@{PUBLIC_HOST}/a.jpg", "an allowed host behind a backslash"),
    (f"http://127.0.0.1:{{port}};@{PUBLIC_HOST}/a.jpg", "an allowed host behind a semicolon"),
    (f"http://127.0.0.1:{{port}}/http://{PUBLIC_HOST}/a.jpg", "an allowed host in the path"),
    (f"http://127.0.0.1.{PUBLIC_HOST}/a.jpg", "an address as a name below an allowed one"),
    (f"http://127.0.0.1%00.{PUBLIC_HOST}:{{port}}/a.jpg", "a null byte"),
    (f"http://127.0.0.1%09.{PUBLIC_HOST}:{{port}}/a.jpg", "a tab, encoded"),
    (f"http://127.0.0.1\t.{PUBLIC_HOST}:{{port}}/a.jpg", "a tab"),
    (f"http://{PUBLIC_HOST}\r\nHost: 127.0.0.1:{{port}}/a.jpg", "a line of its own"),
    (f"http://{PUBLIC_HOST}%40127.0.0.1:{{port}}/a.jpg", "an encoded @"),
    (f"http://{PUBLIC_HOST}%23@127.0.0.1:{{port}}/a.jpg", "an encoded #"),
    (f"http://{PUBLIC_HOST}.:{{port}}/a.jpg", "a trailing dot, at another port"),
    (f"http://{PUBLIC_HOST}:{{port}}/a.jpg", "another port"),
    (f"http://{PUBLIC_HOST}:0/a.jpg", "port 0"),
    (f"http://{PUBLIC_HOST}:{{port}}:80/a.jpg", "two ports"),
    (f"http://[::1].{PUBLIC_HOST}:{{port}}/a.jpg", "brackets within a name"),
    ("http://127.0.0.1.:{port}/a.jpg", "loopback with a trailing dot"),
    ("http://localhost.:{port}/a.jpg", "localhost with a trailing dot"),
    ("http://localhost\u3002:{port}/a.jpg", "an ideographic full stop"),
    ("http://LOCALHOST.:{port}/a.jpg", "upper case"),
    ("http://0177.0.0.1:{port}/a.jpg", "loopback in octal parts"),
    ("http://127.000.000.001:{port}/a.jpg", "loopback with leading zeros"),
    ("http://0300.0250.0.1:{port}/a.jpg", "private in octal parts"),
    ("http://127\u30020\u30020\u30021:{port}/a.jpg", "ideographic full stops"),
    ("http://\u2460\u2461\u2466.0.0.1:{port}/a.jpg", "digits in circles"),
    ("http://\uff11\uff12\uff17.0.0.1:{port}/a.jpg", "digits of full width"),
    ("http://\u24dbocalhost:{port}/a.jpg", "a letter in a circle"),
    ("http://%31%32%37.0.0.1:{port}/a.jpg", "percent-encoded digits"),
    ("http://%6cocalhost:{port}/a.jpg", "a percent-encoded letter"),
    ("http://127.0.0.1.0:{port}/a.jpg", "five parts"),
    ("http://256.0.0.1:{port}/a.jpg", "a part above 255"),
    ("http://4294967297:{port}/a.jpg", "a number above 32 bits"),
    ("http://[::1%25lo]:{port}/a.jpg", "a scope id"),
    ("http://[::1%lo]:{port}/a.jpg", "a scope id, bare"),
    ("http://[fe80::1%25eth0]:{port}/a.jpg", "link-local with a scope id"),
    ("http://[::1:{port}/a.jpg", "a bracket that does not close"),
    ("http://::1:{port}/a.jpg", "IPv6 without brackets"),
    ("http://[v1.127.0.0.1]:{port}/a.jpg", "an address of the future"),
    ("http://[127.0.0.1]:{port}/a.jpg", "IPv4 in brackets"),
    ("http:127.0.0.1:{port}/a.jpg", "no slashes"),
    ("http:/127.0.0.1:{port}/a.jpg", "one slash"),
    ("http:///127.0.0.1:{port}/a.jpg", "three slashes"),
    ("http:\\\\127.0.0.1:{port}/a.jpg", "backslashes"),
    ("//127.0.0.1:{port}/a.jpg", "no scheme"),
    (" http://127.0.0.1:{port}/a.jpg", "a space before it"),
    ("ftp://127.0.0.1:{port}/a.jpg", "another scheme"),
    ("gopher://127.0.0.1:{port}/_GET", "a scheme that speaks whatever it is told"),
    ("dict://127.0.0.1:{port}/stat", "a scheme that speaks to memcached"),
    ("ws://127.0.0.1:{port}/", "a scheme that starts as HTTP"),
    ("http+unix://%2Fvar%2Frun%2Fdocker.sock/info", "a socket in the file system"),
    ("jar:http://127.0.0.1:{port}/a!/b", "a scheme around a scheme"),
    ("file://127.0.0.1:{port}/etc/passwd", "a file, with a host"),
    ("file:///etc/passwd", "a file"),
    ("file:///proc/self/environ", "a file with secrets"),
)

# What a name server may answer beside single bad addresses: one among good ones is one too many.
MIXED: tuple[tuple[tuple[str, ...], str], ...] = (
    ((PUBLIC_ADDRESS, "127.0.0.1"), "a public address, then loopback"),
    (("127.0.0.1", PUBLIC_ADDRESS), "loopback, then a public address"),
    ((PUBLIC_ADDRESS, "2a00:1450:4001:80b::200e", "::1"), "loopback last, of another family"),
    ((PUBLIC_ADDRESS, "::ffff:10.0.0.1"), "a public address, then mapped private"),
    (("fe80::1%lo",), "link-local with a scope id"),
    ((PUBLIC_ADDRESS, "2a00:1450:4001:80b::200e%lo"), "a public address with a scope id"),
)


def tricks(port: int) -> Iterator[tuple[str, str]]:
    """Every trick as (URL, why it is one), aimed at a port of this machine wherever one can be named."""
    for host, why in HOSTS:
        yield f"http://{host}:{port}/a.jpg", why
    for url, why in URLS:
        yield url.replace("{port}", str(port)), why


def answers() -> Iterator[tuple[tuple[str, ...], str]]:
    """What a name server may answer for an allowed name, as (addresses, why they must not be dialled)."""
    for host, why in HOSTS:
        with contextlib.suppress(ValueError):  # a number or a name: no name server answers that
            yield (str(ip_address(host.strip("[]"))),), why
    yield from MIXED


def careless(port: int) -> tuple[str, ...]:
    """A list of hosts that lets in whatever it can by name: only the addresses are left to be refused."""
    return (PUBLIC_HOST, *(f"{host}:{port}" for host, _ in HOSTS))


@dataclass
class Names:
    """A name server that changes its mind: each look-up takes the next answer, and the last one stays."""

    answers: Sequence[Sequence[str]]
    asked: list[str] = field(default_factory=list)

    def __call__(self, host: str, port: int) -> list[str]:  # noqa: ARG002  # the same at every port
        """The addresses of any host."""
        self.asked.append(host)
        return list(self.answers[min(len(self.asked), len(self.answers)) - 1])
