"""Which URIs are below a prefix, and by which tricks none gets there."""

import posixpath
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradcam_worker.gateway.access.uri_prefixes import UriPrefix, is_below

BELOW = [
    ("s3://photos", "s3://photos/1.jpg"),
    ("s3://photos/acme", "s3://photos/acme/1.jpg"),
    ("s3://photos/acme/", "s3://photos/acme/2031/05/an image #1 (100%)?.jpg"),
    ("s3://photos/acme", "S3://photos/acme/1.jpg"),
    ("https://cdn.example.com", "https://cdn.example.com/a%2Fb.jpg?token=x#y"),
    ("https://cdn.example.com", "HTTPS://CDN.example.com:443/1.jpg"),
    ("https://cdn.example.com:8443/acme", "https://cdn.example.com:8443/acme/1.jpg?size=2"),
    ("https://*.example.com", "https://a.b.example.com/1.jpg"),
    ("https://[2001:db8::1]/acme", "https://[2001:DB8:0:0::1]/acme/1.jpg"),
    ("http://127.0.0.1:9000/photos", "http://127.0.0.1:9000/photos/1.jpg"),
    ("file:///srv/acme", "file:///srv/acme/1.jpg"),
    ("data:", "data:image/png;base64,AAAA"),
    ("*", "ftp://whatever"),
]


@pytest.mark.parametrize(("prefix", "uri"), BELOW)
def test_a_uri_below_a_prefix_is_found_there(prefix: str, uri: str) -> None:
    assert is_below(uri, ["s3://another", prefix])


OUTSIDE = [
    ("s3://photos/acme", uri)
    for uri in [
        "s3://photos",
        "s3://photos/",
        "s3://photos/acme",
        "s3://photos/acme/",
        "s3://photos/acme-2/1.jpg",
        "s3://photos/ACME/1.jpg",
        "s3://PHOTOS/acme/1.jpg",
        "s3://photos//acme/1.jpg",
        "s3://photos/acme//1.jpg",
        "s3:/photos/acme/1.jpg",
        "s3:photos/acme/1.jpg",
        "s3:///photos/acme/1.jpg",
        "s3://photos/acme/../globex/1.jpg",
        "s3://photos/acme/./1.jpg",
        "s3://photos/acme/%2e%2e/globex/1.jpg",
        "s3://photos/acme/.%2E/globex/1.jpg",
        "s3://photos/acme/%252e%252e/globex/1.jpg",
        "s3://photos/acme/%25252525252e%25252525252e/1.jpg",
        "s3://photos/acme/..%2fglobex/1.jpg",
        "s3://photos/acme/..\\globex/1.jpg",
        "s3://photos/acme/..%5cglobex/1.jpg",
        "s3://photos/acme/..;x/globex/1.jpg",
        "s3://photos/acme/.. /globex/1.jpg",
        "s3://photos/acme/\uff0e\uff0e/globex/1.jpg",
        "s3://photos/acme/%ef%bc%8e%ef%bc%8e/globex/1.jpg",
        "s3://photos/acme/%c0%ae%c0%ae/globex/1.jpg",
        "s3://photos/acme/1.jpg\n",
        "s3://photos/acme/\x00.jpg",
        "s3://user@photos/acme/1.jpg",
        "s3://user:planted@photos/acme/1.jpg",
        "s3://photos@evil/acme/1.jpg",
        "s3://evil/photos/acme/1.jpg",
        "https://photos/acme/1.jpg",
        " s3://photos/acme/1.jpg",
        "\ts3://photos/acme/1.jpg",
        "data:,s3://photos/acme/1.jpg",
        "",
    ]
]
OUTSIDE += [
    ("https://cdn.example.com/acme", uri)
    for uri in [
        "http://cdn.example.com/acme/1.jpg",
        "https://cdn.example.com",
        "https://cdn.example.com/acme",
        "https://cdn.example.com/acme-2/1.jpg",
        "https://cdn.example.com/Acme/1.jpg",
        "https://cdn.example.com?/acme/1.jpg",
        "https://cdn.example.com#/acme/1.jpg",
        "https://cdn.example.com//acme/1.jpg",
        "https://cdn.example.com:8443/acme/1.jpg",
        "https://cdn.example.com:/acme/1.jpg",
        "https://cdn.example.com:443:443/acme/1.jpg",
        "https://cdn.example.com./acme/1.jpg",
        "https://cdn.example.com.evil.example/acme/1.jpg",
        "https://evil.example/cdn.example.com/acme/1.jpg",
        "https://cdn.example.com@evil.example/acme/1.jpg",
        "https://evil.example\\@cdn.example.com/acme/1.jpg",
        "https://evil.example#@cdn.example.com/acme/1.jpg",
        "https://cdn.example.com\\@evil.example/acme/1.jpg",
        "https://cdn.example.com\\.evil.example/acme/1.jpg",
        "https://user:planted@cdn.example.com/acme/1.jpg",
        "https://cdn%2eexample.com/acme/1.jpg",
        "https://cdn.ex\u00e4mple.com/acme/1.jpg",
        "https://cdn\u3002example.com/acme/1.jpg",
        "https:/cdn.example.com/acme/1.jpg",
        "https:\\\\cdn.example.com/acme/1.jpg",
        "https:cdn.example.com/acme/1.jpg",
        "https:///cdn.example.com/acme/1.jpg",
        "//cdn.example.com/acme/1.jpg",
        "https://cdn.example.com/acme/../globex/1.jpg",
        "https://cdn.example.com/acme/..%2fglobex/1.jpg",
        "https://cdn.example.com/acme%2f..%2fglobex/1.jpg",
        "https://cdn.example.com/acme/%2e%2e/globex/1.jpg",
        "https://cdn.example.com/acme/.%2e;/globex/1.jpg",
        "https://cdn.example.com/acme/..;/globex/1.jpg",
        "https://cdn.example.com/acme/%5c..%5cglobex/1.jpg",
        "https://cdn.example.com/acme\\..\\globex/1.jpg",
        "https://cdn.example.com/acme/%252e%252e/globex/1.jpg",
        "https://cdn.example.com/acme/ 1.jpg",
        "https://cdn.example.com/acme/1.jpg\r\nHost: evil",
        "https://cdn.example.com/\tacme/1.jpg",
    ]
]
OUTSIDE += [
    ("https://*.example.com", "https://example.com/1.jpg"),
    ("https://*.example.com", "https://evilexample.com/1.jpg"),
    ("https://*.example.com", "https://a.example.com.evil.example/1.jpg"),
    ("https://*.example.com", "https://.example.com/1.jpg"),
    ("https://127.0.0.1", "https://2130706433/1.jpg"),
    ("https://127.0.0.1", "https://0x7f.1/1.jpg"),
    ("https://127.0.0.1", "https://[::ffff:127.0.0.1]/1.jpg"),
    ("https://[2001:db8::1]", "https://[2001:db8::2]/1.jpg"),
    ("https://[2001:db8::1]", "https://[2001:db8::1%25eth0]/1.jpg"),
    ("https://[2001:db8::1]", "https://2001:db8::1/1.jpg"),
    ("file:///srv/acme", "file://localhost/srv/acme/1.jpg"),
    ("file:///srv/acme", "file:///srv/acme/../globex/1.jpg"),
    ("file:///srv/acme", "file:///srv/acme/%2e%2e/globex/1.jpg"),
    ("file:///srv/acme", "file:/srv/acme/1.jpg"),
    ("data:", "s3://photos/1.jpg"),
    ("data:", "datax:,"),
]


@pytest.mark.parametrize(("prefix", "uri"), OUTSIDE)
def test_no_trick_leads_below_a_prefix(prefix: str, uri: str) -> None:
    assert not is_below(uri, [prefix])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "photos",
        "s3://",
        "S3://photos",
        "s3://-photos",
        "s3://photos/../x",
        "s3://photos/a//b",
        "s3://photos/a?b",
        "s3://photos/*.jpg",
        "s3://user:planted@photos/acme",
        "https://",
        "https://*",
        "https://*.com",
        "https://user:planted@cdn.example.com",
        "https://cdn.example.com/acme/%2e%2e",
        "ftp://cdn.example.com",
        "file://host/folder",
        "file:///",
        "data:image",
        "**",
    ],
)
def test_what_is_no_prefix_is_refused_and_its_password_is_not_shown(text: str) -> None:
    with pytest.raises(ValueError, match=r"prefix|is not a host|let in too much") as caught:
        UriPrefix.parse(text)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("s3://photos/acme", "s3://photos/acme", True),
        ("s3://photos", "s3://photos/acme", True),
        ("s3://photos/acme/in", "s3://photos/acme", True),
        ("s3://photos/acme", "s3://photos/acme-2", False),
        ("s3://photos/acme", "s3://results/acme", False),
        ("https://a.example", "https://b.example", False),
        ("*", "s3://photos/acme", True),
        ("data:", "s3://photos/acme", False),
    ],
)
def test_prefixes_overlap_where_one_is_below_the_other(one: str, other: str, overlap: bool) -> None:
    first, second = UriPrefix.parse(one), UriPrefix.parse(other)
    assert first.overlaps(second) == second.overlaps(first) == overlap


TRICKS = [
    "https",
    "HTTP",
    "://",
    ":",
    "/",
    "//",
    "\\",
    "@",
    "#",
    "?",
    ";",
    "%2e",
    "%2F",
    "%5c",
    "%25",
    "..",
    ".",
]
TRICKS += [
    "cdn.example.com",
    "evil.example",
    "[::1]",
    "127.1",
    "acme",
    "globex",
    "a",
    "\t",
    "\n",
    " ",
    "\u3002",
    "\uff0f",
]
TRICKS += [":443", ":8443", "user:secret", "%00", "\u00e4", "xn--", "&", "=", "%", "~", "*", "\u2024"]


@settings(max_examples=100, deadline=None)
@example("cdn.example.com/acme/..%2f")
@given(st.lists(st.sampled_from(TRICKS), max_size=9).map("".join))
def test_what_is_below_a_prefix_is_there_for_the_parsers_that_the_workers_use(end: str) -> None:
    """Whatever is let in: httpx asks the allowed host, for a path below the folder."""
    prefix = "https://cdn.example.com/acme"
    for uri in (
        f"https://{end}",
        f"https://cdn.example.com{end}",
        f"https://cdn.example.com/acme/{end}",
        end,
    ):
        if not is_below(uri, [prefix]):
            continue
        for url in (httpx.URL(uri), httpx.URL(prefix).join(uri)):
            assert (url.scheme, url.host, url.port or 443, url.userinfo) == (
                "https",
                "cdn.example.com",
                443,
                b"",
            )
            path = unquote(unquote(url.raw_path.decode().partition("?")[0]))
            assert (posixpath.normpath(path.replace("\\", "/")) + "/").startswith("/acme/")
        parts = urlsplit(uri)
        assert (parts.hostname, parts.username) == ("cdn.example.com", None)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(TRICKS), max_size=9).map("".join))
def test_what_is_below_a_prefix_of_a_bucket_stays_there_for_a_client_that_resolves_dots(end: str) -> None:
    for uri in (f"s3://photos/acme/{end}", f"s3://photos{end}", f"s3://{end}"):
        if is_below(uri, ["s3://photos/acme"]):
            key = uri.removeprefix("s3://photos/")
            for read in (key, unquote(key), unquote(unquote(key))):
                assert (posixpath.normpath("/" + read.replace("\\", "/")) + "/").startswith("/acme/"), uri
