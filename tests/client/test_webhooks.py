"""A receiver of webhooks verifies and reads them, as any implementation of Standard Webhooks would."""

import base64
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import standardwebhooks

from gradcam_worker.client import AsyncGradcamClient, GradcamClient, Webhooks
from gradcam_worker.delivery.webhooks import make_body, message_id
from gradcam_worker.errors import InvalidSettings, InvalidWebhook
from gradcam_worker.ledger import state_machine
from gradcam_worker.net import webhook_signing
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.status import StatusEvent

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(24)).decode()
DOCUMENT = state_machine.new_document(new_id()).model_copy(update={"status": "canceled", "max_attempts": 3})
EVENT = StatusEvent(type="gradcam.job.canceled", timestamp=datetime.now(UTC), data=DOCUMENT)
BODY = make_body(EVENT)[0]


def sent(*secrets: str, age_s: float = 0, body: str = BODY) -> dict[str, str]:
    """The headers with which a worker sends it."""
    at = datetime.fromtimestamp(time.time() - age_s, UTC)
    return webhook_signing.signed_headers(secrets, message_id(DOCUMENT), at, body)


@pytest.mark.parametrize("secrets", [SECRET, [SECRET], (OTHER, SECRET)])
def test_what_a_worker_signs_is_read(secrets: Any) -> None:
    assert Webhooks.unwrap(BODY.encode(), sent(SECRET), secrets) == EVENT
    assert GradcamClient.webhooks.unwrap(BODY, sent(OTHER, SECRET), secrets).data.status == "canceled"
    loud = {name.title(): value for name, value in sent(SECRET).items()}
    assert AsyncGradcamClient.webhooks.unwrap(BODY.encode(), loud, secrets) == EVENT


def test_it_agrees_with_the_library_of_the_standard() -> None:
    for body in (BODY, json.dumps({"type": "é"}, ensure_ascii=False)):
        headers = sent(SECRET, body=body)
        assert standardwebhooks.Webhook(SECRET).verify(body, headers)
        key = webhook_signing.secret_key(SECRET)
        assert key is not None
        identity = (headers["webhook-id"], headers["webhook-timestamp"], body.encode())
        assert webhook_signing.is_signed(headers["webhook-signature"], [key], *identity)


CHANGES: list[tuple[str, Callable[[], dict[str, Any]], str]] = [
    (
        "another secret",
        lambda: {"headers": sent(OTHER)},
        "No signature of the webhook was made with these secrets",
    ),
    ("a body written again", lambda: {"body": json.dumps(json.loads(BODY))}, "byte for byte"),
    ("one byte more", lambda: {"body": BODY.encode() + b" "}, "byte for byte"),
    ("no text", lambda: {"headers": {**sent(SECRET), "webhook-signature": "v1,\udce9"}}, "No signature"),
    (
        "no text anywhere",
        lambda: {"headers": {**sent(SECRET), "webhook-id": "\udce9"}, "body": "\udce9"},
        "No signature",
    ),
    (
        "no signature",
        lambda: {"headers": sent()},
        "no header webhook-signature: the job's webhook names no secret_ref",
    ),
    ("no headers", lambda: {"headers": {}}, "no header webhook-id, webhook-timestamp, webhook-signature"),
    ("another id", lambda: {"headers": {**sent(SECRET), "webhook-id": "msg_1"}}, "No signature"),
    (
        "another time",
        lambda: {"headers": {**sent(SECRET), "webhook-timestamp": str(int(time.time()) + 1)}},
        "No sign",
    ),
    (
        "no time",
        lambda: {"headers": {**sent(SECRET), "webhook-timestamp": "soon"}},
        "is 'soon', not seconds since",
    ),
    (
        "an old one",
        lambda: {"headers": sent(SECRET, age_s=400)},
        r"was sent 4\d\d s ago, and 300 s are allowed",
    ),
    ("an early one", lambda: {"headers": sent(SECRET, age_s=-900)}, "ahead of this machine's clock"),
    (
        "a later version",
        lambda: {"headers": {**sent(SECRET), "webhook-signature": "v2,AAAA"}},
        "No signature",
    ),
]


@pytest.mark.parametrize(("what", "change", "why"), CHANGES, ids=[what for what, _, _ in CHANGES])
def test_anything_else_is_refused_and_told_why(
    what: str, change: Callable[[], dict[str, Any]], why: str
) -> None:
    with pytest.raises(InvalidWebhook, match=why) as caught:
        Webhooks.unwrap(**{"body": BODY, "headers": sent(SECRET), "secrets": SECRET, **change()})
    assert SECRET.removeprefix("whsec_") not in str(caught.value), what


def test_a_longer_way_can_be_allowed_and_a_signed_text_that_is_no_event_is_told() -> None:
    assert Webhooks.unwrap(BODY, sent(SECRET, age_s=400), SECRET, tolerance_s=3600) == EVENT
    with pytest.raises(InvalidWebhook, match="is signed, but is no event of this version: "):
        Webhooks.unwrap("{}", sent(SECRET, body="{}"), SECRET)


@pytest.mark.parametrize("secret", [[], "app1=" + SECRET, "whsec_short", "topsecret"])
def test_a_secret_that_is_none_is_a_wrong_setting_and_is_not_shown(secret: Any) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Webhooks.unwrap(BODY, sent(SECRET), secret)
    assert not secret or str(secret) not in str(caught.value)
