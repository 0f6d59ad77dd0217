import pytest

from gradcam_worker.net.allowlist import HostAllowlist, normalize

HTTPS = 443


def admits(entry: str, host: str, port: int = HTTPS) -> bool:
    return HostAllowlist([entry]).allows(host, port, HTTPS)


@pytest.mark.parametrize(
    ("entry", "host", "port"),
    [
        ("a.example.com", "a.example.com", 443),
        ("a.example.com:443", "a.example.com", 443),
        ("a.example.com:8443", "a.example.com", 8443),
        ("localhost", "localhost", 443),
        ("10.0.0.1:80", "10.0.0.1", 80),
        ("[::1]", "::1", 443),
        ("[::1]", "0:0:0:0:0:0:0:1", 443),
        ("[0:0::1]:80", "::1", 80),
        ("*.example.com", "a.example.com", 443),
        ("*.example.com", "a.b.c.example.com", 443),
        ("*.example.com:8443", "a.example.com", 8443),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", 443),
        ("a_b.example.com", "a_b.example.com", 443),
    ],
)
def test_a_host_on_the_list_is_admitted(entry: str, host: str, port: int) -> None:
    assert admits(entry, host, port)


@pytest.mark.parametrize(
    ("entry", "host", "port"),
    [
        ("a.example.com", "b.example.com", 443),
        ("a.example.com", "a.example.com", 80),
        ("a.example.com", "a.example.com", 0),
        ("a.example.com:8443", "a.example.com", 443),
        ("a.example.com", "a.example.com.", 443),
        ("a.example.com", "x.a.example.com", 443),
        ("a.example.com", "aXexample.com", 443),
        ("*.example.com", "example.com", 443),
        ("*.example.com", ".example.com", 443),
        ("*.example.com", "..example.com", 443),
        ("*.example.com", "a..example.com", 443),
        ("*.example.com", "badexample.com", 443),
        ("*.example.com", "a.example.com.", 443),
        ("*.example.com", "a.example.com.evil.test", 443),
        ("*.example.com", "a%00.example.com", 443),
        ("*.example.com", "a.example.com", 8443),
        ("*.example.com", "*.example.com", 443),
        ("*.example.com", "", 443),
        ("[::1]", "::2", 443),
    ],
)
def test_a_host_off_the_list_is_not(entry: str, host: str, port: int) -> None:
    assert not admits(entry, host, port)


@pytest.mark.parametrize(
    "entry", ["*.com", "*.example.1", "*.0.0.1", "*.0.0.0x1", "*.example.com.", "*.a.b*"]
)
def test_an_odd_wildcard_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=r"too much: after \*\. come at least two labels|is not a host"):
        normalize([entry])


@pytest.mark.parametrize(
    "entry",
    [
        "*",
        "**.example.com",
        "a.*.example.com",
        "a*.example.com",
        "https://a.example.com",
        "a.example.com/",
        "a.example.com/path",
        "user@a.example.com",
        "a.example.com:",
        "a.example.com:0",
        "a.example.com:65536",
        "a.example.com:http",
        "a..example.com",
        ".example.com",
        "b\u00fccher.example",
        "a b",
        "::1",
        "[::1",
        "[::1%lo]",
        "[10.0.0.1]",
        "*.[::1]",
        "",
    ],
)
def test_what_could_never_match_is_refused_with_a_sentence(entry: str) -> None:
    with pytest.raises(ValueError, match=r"is not a host|has no port|too much"):
        normalize([entry])


def test_upper_case_is_taken_as_it_is_meant() -> None:
    assert normalize(["Images.Example.COM:443", "[::A]"]) == ("images.example.com:443", "[::a]")
