"""Every known way to write an address that an untrusted URL must never lead to, for tests and attacks.

Each URL points at a port of this machine or into some private network. None may cause a connection.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

PUBLIC_HOST = "images.example.com"  # what an operator would allow
PUBLIC_ADDRESS = "8.8.8.8"  # is never dialled: it stands beside one that is refused

# Hosts that an operator's list can name, by what they are, in all forms: decimal, octal, hexadecimal, short.
# They must be refused even where such a list lets them in.
_HOSTS = {
    "loopback": (
        "127.0.0.1 127.255.255.254 127.1 127.0.1 2130706433 0x7f000001 0x7f.1 0x7f.0x0.0x0.0x1 "
        "017700000001 0177.1 127.0x0.1 localhost"
    ),
    "this host": "0 0x0 0.0.0.0",
    "this network": "0.1.2.3",
    "private": (
        "10.0.0.1 10.255.255.254 167772161 0xa.1 012.1 172.16.0.1 172.31.255.254 192.168.0.1 0xc0a80001"
    ),
    "a carrier's NAT": "100.64.0.1 100.127.255.254",
    "the metadata of a cloud": (
        "100.100.100.200 169.254.169.254 169.254.170.2 2852039166 0xa9fea9fe 0xa9.0xfe.0xa9.0xfe "
        "025177524776 169.16689662 168.63.129.16 192.0.0.192"
    ),
    "documentation": "192.0.2.1 198.51.100.1 203.0.113.1",
    "6to4's relay": "192.88.99.1",
    "benchmarks": "198.18.0.1 198.19.255.254",
    "multicast": "224.0.0.1 239.255.255.250",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "this host, IPv6": "[::]",
    "loopback, IPv6": "[::1] [0:0:0:0:0:0:0:1] [0000:0000:0000:0000:0000:0000:0000:0001]",
    "IPv4-mapped loopback, metadata and private": (
        "[::ffff:127.0.0.1] [::ffff:7f00:1] [0:0:0:0:0:ffff:7f00:0001] [::ffff:169.254.169.254] "
        "[::ffff:10.0.0.1]"
    ),
    "IPv4-translated loopback": "[::ffff:0:127.0.0.1]",
    "IPv4-compatible loopback and private": "[::127.0.0.1] [::a00:1]",
    "NAT64 of loopback and metadata": (
        "[64:ff9b::127.0.0.1] [64:ff9b::a9fe:a9fe] [64:ff9b:1::7f00:1] [64:ff9b:1:a9fe:a9:fe00::]"
    ),
    "6to4 of loopback, private and metadata": "[2002:7f00:1::] [2002:a00:1::1] [2002:a9fe:a9fe::1]",
    "Teredo of loopback and private": "[2001:0:4136:e378:8000:63bf:80ff:fffe] [2001::f5ff:fffe]",
    "ISATAP of loopback, private and metadata": (
        "[fe80::5efe:7f00:1] [2a00:1450:4001:80b:0:5efe:10.0.0.1] [2a00:1450:4001:80b:200:5efe:a9fe:a9fe]"
    ),
    "link-local": "[fe80::1] [febf::1]",
    "site-local": "[fec0::1]",
    "private, IPv6": "[fc00::1] [fd12:3456:789a::1]",
    "the metadata of a cloud, IPv6": "[fd00:ec2::254] [fd20:ce::254]",
    "multicast, IPv6": "[ff02::1] [ff0e::1]",
    "discarded": "[100::1]",
    "benchmarks, IPv6": "[2001:2::1]",
    "ORCHID": "[2001:10::1] [2001:20::1]",
    "documentation, IPv6": "[2001:db8::1] [3fff::1]",
    "given back": "[3ffe::1]",
    "given to nobody": "[4000::1]",
    "segment routing": "[5f00::1]",
}
HOSTS = tuple((host, what) for what, hosts in _HOSTS.items() for host in hosts.split())

# URLs that hide where they lead. {port} is one that a test listens on.
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


def forbidden_urls(port: int) -> Iterator[tuple[str, str]]:
    """Yield every URL and what it is, aimed at a port of this machine where it can have one."""
    for host, why in HOSTS:
        yield f"http://{host}:{port}/a.jpg", why
    for url, why in URLS:
        yield url.replace("{port}", str(port)), why


def forbidden_answers() -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield what a name server may answer for an allowed name: addresses, and what they are."""
    for host, why in HOSTS:
        with contextlib.suppress(ValueError):  # a number or a name: no name server answers that
            yield (str(ip_address(host.strip("[]"))),), why
    yield from MIXED


def permissive_hosts(port: int) -> tuple[str, ...]:
    """Return a list of hosts that allows all that it can name: only the addresses can still be refused."""
    return (PUBLIC_HOST, *(f"{host}:{port}" for host, _ in HOSTS))


@dataclass
class Names:
    """A name server that changes its mind: each look-up takes the next answer, and the last one stays."""

    answers: Sequence[Sequence[str]]
    asked: list[str] = field(default_factory=list)

    def __call__(self, host: str, port: int) -> list[str]:
        """The addresses of any host."""
        self.asked.append(host)
        return list(self.answers[min(len(self.asked), len(self.answers)) - 1])
