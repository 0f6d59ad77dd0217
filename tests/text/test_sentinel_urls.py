"""URLs that name Sentinels: their parts, and what is shown of them."""

import pytest

from gradcam_worker.text import sentinel_urls
from gradcam_worker.text.urls import redacted, without_secrets


@pytest.mark.parametrize(
    ("url", "sentinels", "master", "server_url"),
    [
        ("sentinel://a/mymaster", [("a", 26379)], "mymaster", "redis://a/0"),
        ("sentinel://a:1,b:2/m-1.x/3", [("a", 1), ("b", 2)], "m-1.x", "redis://a:1/3"),
        ("sentinels://u:p%40@[::1]:1,b/m/3/", [("::1", 1), ("b", 26379)], "m", "rediss://u:p%40@[::1]:1/3"),
        ("SENTINEL://:p,w@a:1/m/", [("a", 1)], "m", "redis://:p,w@a:1/0"),
    ],
)
def test_its_parts_are_the_sentinels_the_master_and_what_redis_py_needs(
    url: str, sentinels: list[tuple[str, int]], master: str, server_url: str
) -> None:
    parts = sentinel_urls.parse(url)
    assert (parts.sentinels, parts.master) == (tuple(sentinels), master)
    assert (parts.server_url, parts.tls) == (server_url, url.startswith("sentinels"))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("sentinel://a:1,b:2", "names no master"),
        ("sentinel://a:1,b:2/0/1/2", "has the path"),
        ("sentinel://a:1,/m", "cannot be read"),
        ("sentinel://a:66000/m", "cannot be read"),
        ("sentinel://a:1,b:0/m", "a Sentinel at port 0"),
        ("sentinel://u:p/w@a/m", "cannot be read"),
        ("sentinel://a/m?x=1", "a part behind"),
    ],
)
def test_what_is_wrong_is_said(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        sentinel_urls.parse(url)


@pytest.mark.parametrize(
    "password", ["planted", "pla,nted", "pla%40nted", "pla/nted", "pla@nted", "pla?nted"]
)
def test_nothing_of_a_password_is_shown(password: str) -> None:
    url = f"sentinel://user:{password}@a:1,b:2/m/0"
    shown = without_secrets(url) + redacted(f"see {url} now")
    assert "nted" not in shown
    assert "user" not in shown
