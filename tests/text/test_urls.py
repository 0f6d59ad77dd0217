"""URLs with credentials: what is read of them, what is shown, and that nothing of a user is."""

import itertools
import json
import logging

import pytest
from pydantic import ValidationError

from gradcam_worker.backfill.inputs.rows import RowParser, displayable
from gradcam_worker.errors import GradcamError, InternalError, InvalidJob, InvalidSettings
from gradcam_worker.observability.logs import TEXT_FORMAT, JsonFormatter, LineFormatter
from gradcam_worker.schemas.job import ImageRef, Job, Webhook
from gradcam_worker.schemas.status import Problem
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import (
    has_credentials,
    parse,
    redacted,
    without_secrets,
    without_user,
)

SECRET = "S3cretHash"
# Passwords as people set them, into URLs as people write them.
PASSWORDS = [
    f"{before}{sign}{after}"
    for sign in ("#", "?", "/", "@", ":", "%", "\\", "[", " ", "")
    for before, after in ((SECRET, SECRET), ("", SECRET), (SECRET, ""), ("12", SECRET))
    if SECRET in before + after
]
ACCESS_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint:photos"
OUTPOST = "arn:aws:s3-outposts:us-west-2:123456789012:outpost:op-01ac5d28a6a232904:accesspoint:photos"
USERS = ["", "user", SECRET]
HOSTS = ["h", "h:6379", "[fd00::1]:6379", "10.0.0.1"]


def urls(scheme: str, path: str = "/0") -> list[str]:
    return [
        f"{scheme}://{user}:{password}@{host}{path}"
        for user, password, host in itertools.product(USERS, PASSWORDS, HOSTS)
    ]


def is_host_and_port(text: str) -> bool:
    """Digits and a slash behind a colon are a port and a path in http, by every parser."""
    return text.startswith("https") and "12/" in text


EVERY_SCHEME = [
    one
    for scheme in ("redis", "https", "postgresql", "s3", "ftp")
    for one in urls(scheme)
    if not is_host_and_port(one)
]


def test_nothing_of_a_user_or_a_password_is_shown() -> None:
    for text in EVERY_SCHEME:
        for left in (without_secrets(text), without_user(text)):
            assert SECRET not in left, text
            assert left.startswith(text.partition(":")[0])


def test_what_holds_a_user_is_known_whether_or_not_it_can_be_read() -> None:
    for text in EVERY_SCHEME:
        assert has_credentials(text), text
        found = parse(text)
        assert found is None or found.has_user, text


@pytest.mark.parametrize(
    "text",
    [
        "https://host/icon@2x.png",
        "https://host:8080/a.jpg?X-Amz-Signature=abc",
        "https://host/a.jpg?mail=a@b",
        "https://host:8080/icon@2x.png",
        "https://cdn.example.com:8443/icon@2x.png",
        "https://cdn.example.com/a.png#x@y",
        "https://[fd00::1]:8443/a@b",
        f"s3://{ACCESS_POINT}/icon@2x.png",
        f"s3://{OUTPOST}/a@b:c@d#e?f",
        "s3://bucket/a@b#c?d.jpg",
        "s3://bucket/a:b@c",
        "file:///photos/a@b.jpg",
        "data:text/plain,a:b@c",
        "cat.jpg",
        "me@home.jpg",
    ],
)
def test_an_at_sign_elsewhere_is_no_user(text: str) -> None:
    assert not has_credentials(text)
    assert redacted(f"read {text}, then more") == f"read {text}, then more"
    found = parse(text)
    assert bool(found) == ("://" in text)
    assert not (found and found.has_user)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("redis://user:pw@queue:6379/0?password=pw", "redis://queue:6379/0"),
        ("https://u:p@[fd00::1]:8443/a/b?x#y", "https://[fd00::1]:8443/a/b"),
        ("https://host:8080/icon@2x.png", "https://host:8080/icon@2x.png"),
        ("https://cdn.example.com:8443/icon@2x.png?sign=x", "https://cdn.example.com:8443/icon@2x.png"),
        ("https://cdn.example.com/a.png#x@y", "https://cdn.example.com/a.png"),
        (f"s3://{ACCESS_POINT}/icon@2x.png", f"s3://{ACCESS_POINT}/icon@2x.png"),
        (f"s3://user:pw@{ACCESS_POINT}/icon@2x.png", "s3://..."),
        (f"s3://{ACCESS_POINT}:pw/x@bucket/a.png", "s3://..."),
        ("https://u:p@s/secret@h/x", "https://..."),
        ("https://:12/secret@h/x", "https://..."),
        ("https://token#x@host/a", "https://..."),
        ("https://token?x@host/a", "https://..."),
        ("redis://user:12345/secret@h/0", "redis://..."),
        ("https://host/icon@2x.png?sign=x", "https://host/icon@2x.png"),
        ("redis://:S3cretHash#tail@h/0", "redis://..."),
        ("redis://user:12#tail@h/0", "redis://..."),
        ("redis://user?tail@h/0", "redis://..."),
        ("redis://:password", "redis://..."),
        ("http://[planted", "http://..."),
        ("foo", "foo"),
        ("user:pw@host/x", "..."),
        ("", ""),
    ],
)
def test_what_is_shown_of_a_url(text: str, left: str) -> None:
    assert without_secrets(text) == left


def test_a_url_is_taken_apart_once() -> None:
    found = parse("HTTPS://u:p%23@Host:443/a/b?x=1#y")
    assert found
    assert (found.scheme, found.has_user, found.host_port, found.path) == ("https", True, "Host:443", "/a/b")
    assert (found.query, found.fragment) == ("x=1", "y")
    assert "p%23" not in repr(found)
    assert parse("https://h:99999/") is None
    assert parse("https://h\\@x/") is None


@pytest.mark.parametrize(
    "setting", ["broker_url", "ledger_url", "status_sql_url", "traces", "s3_endpoint_url"]
)
def test_a_setting_with_a_password_is_refused_with_how_to_write_it_or_read_and_never_shown(
    setting: str,
) -> None:
    schemes = {"status_sql_url": "postgresql", "traces": "https", "s3_endpoint_url": "https"}
    refused = 0
    for text in urls(schemes.get(setting, "redis")):
        try:
            read = Settings.from_environment({f"GRADCAM_{setting.upper()}": text})
        except InvalidSettings as error:
            refused += 1
            said = str(error)
        else:
            assert SECRET not in repr(read)
            continue
        assert SECRET not in said, text
        assert "%23" in said or setting == "s3_endpoint_url", text
    assert refused


@pytest.mark.parametrize(
    "setting",
    [
        "output",
        "output_prefixes",
        "uploads",
        "image_buckets",
        "image_hosts",
        "webhook_hosts",
        "s3_public_url",
    ],
)
def test_a_place_with_a_user_is_refused_and_nothing_of_him_shown(setting: str) -> None:
    for text in (f"s3://user:{SECRET}@bucket/x", f"https://user:{SECRET}#x@host", f"user:{SECRET}@host"):
        with pytest.raises(InvalidSettings) as caught:
            Settings.from_environment({f"GRADCAM_{setting.upper()}": text})
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "field",
    [
        lambda uri: {"image": uri},
        lambda uri: {"image": {"uri": uri}},
        lambda uri: {"output": uri},
        lambda uri: {"webhooks": [{"url": "https://a.example/"}, {"url": uri}]},
        lambda uri: {uri: 1},
        lambda uri: {"metadata": {uri: 1}},
    ],
    ids=["image", "image.uri", "output", "webhook", "field", "metadata"],
)
def test_a_job_with_a_password_is_refused_before_it_is_kept_and_nothing_of_it_shown(field: object) -> None:
    assert callable(field)
    good = {"image": "s3://in/a.jpg", "network": "vgg16", "target": {"top_n": 1}}
    for text in (
        f"https://user:{SECRET}@host/",
        f"https://user:{SECRET}#x@host/",
        f"https://user:12#{SECRET}@host/",
        f"s3://user:{SECRET}@bucket/a.jpg",
        f"s3://user:{SECRET}/x@bucket/a.jpg",
        f"user:{SECRET}@host/a.jpg",
    ):
        with pytest.raises(InvalidJob) as caught:
            Job.parse({**good, **field(text)})
        assert SECRET not in str(caught.value), text


def test_a_webhook_secret_in_place_of_its_name_is_refused_before_it_is_kept() -> None:
    secret = "whsec_plantedinplaceofitsname"
    with pytest.raises(
        ValidationError, match="must be the name of a webhook secret, not the secret"
    ) as caught:
        Job(
            image=ImageRef(uri="s3://in/a.jpg"),
            network="vgg16",
            target={"top_n": 1},
            webhooks=(Webhook(url="https://a.example/", secret_ref=secret),),
            metadata={},
        )
    assert secret not in str(caught.value)


def test_a_row_with_a_password_is_a_bad_row_that_shows_nothing_of_it() -> None:
    parser = RowParser()
    for text in (f"https://u:{SECRET}@host/a.jpg", f"s3://u:{SECRET}@bucket/a", f"u:{SECRET}#x@h"):
        row = parser.parse(1, text)
        assert row.problem
        assert SECRET not in row.to_json()
    assert SECRET not in parser.bad_row(2, {"picture": f"https://u:{SECRET}@h/"}, "no image").to_json()


def test_what_others_say_shows_no_password_in_a_document_or_a_log() -> None:
    for text in urls("redis") + urls("https", "/x"):
        if " " in text or is_host_and_port(text):  # a space is where a URL ends
            continue
        said = f"Could not connect to '{text}' after 3 s"
        assert SECRET not in redacted(said), text
        error: GradcamError = InternalError(said)
        assert SECRET not in Problem.of(error, stage=None, attempt=1).to_json()
        record = logging.LogRecord("kombu", logging.ERROR, "", 0, "cannot reach %s", (text,), None)
        for form in (LineFormatter(TEXT_FORMAT), JsonFormatter("w")):
            assert SECRET not in form.format(record)
    assert json.loads(JsonFormatter("w").format(record))["message"].startswith("cannot reach https://")


def test_text_without_a_password_is_left_as_it_is() -> None:
    for text in ("read s3://photos/icon@2x.png", "http://h:9000/a@b.jpg", "me@example.com", "https://h/a"):
        assert redacted(text) == text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("http://proxyuser:pa'ss@proxy:3128", "http://...@proxy:3128"),
        ("see 'http://user:pw@proxy:3128'.", "see 'http://...@proxy:3128'."),
        ('https://user:secret"x@h/', "https://...@h/"),
        ("redis://user:12345/abc@h/0", "redis://..."),
        ("redis://:1/secretrest@h:6379/0", "redis://..."),
        ("https://token#x@host/a", "https://..."),
        ("redis://us#er:pw@h", "redis://..."),
        ("redis://a:1,redis://u:p@h/0 of 2", "redis://a:1,redis://...@h/0 of 2"),
        ("https://h/x?u=https://u:p@h/y", "https://h/x?u=https://...@h/y"),
        ("of url=redis://u:p@h\nand rediss://:p@i", "of url=redis://...@h\nand rediss://...@i"),
        ("://u:p@h", "://...@h"),
        ('{"url":"redis://u:p@h/0","b":1}', '{"url":"redis://...@h/0","b":1}'),
        ("redis:// me@example.com", "redis:// me@example.com"),
        (f"redis://u:{'p' * 3000}@h", "redis://..."),
        (f"http://h/{'p' * 3000}", f"http://h/{'p' * 3000}"),
    ],
)
def test_a_password_in_text_is_not_shown_whatever_signs_are_in_it(text: str, left: str) -> None:
    assert redacted(text) == left


def test_long_text_of_others_is_read_in_one_pass() -> None:
    for text in ("@ " + "://a:" * 400_000, "a" * 2_000_000 + "://@", "://" + "a:" * 1_000_000 + "@"):
        assert "://" in redacted(text)
    assert not has_credentials("a:" * 1_000_000)
    assert has_credentials("a:" * 1_000_000 + "@")


def test_a_password_is_not_half_shown_where_a_long_text_is_cut() -> None:
    for before in range(1950, 2000, 7):
        error = InternalError("x" * before + f" redis://user:{SECRET * 3}@h/0")
        assert SECRET[:4] not in Problem.of(error, stage=None, attempt=1).to_json()
    for before in range(950, 1000, 7):
        for received in ("x" * before + f" redis://user:{SECRET * 3}@h/0",):
            assert SECRET[:4] not in displayable(received)
            assert SECRET[:4] not in displayable(received.encode())
