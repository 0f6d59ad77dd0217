import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
import standardwebhooks
from pydantic import SecretStr
from standardwebhooks.webhooks import WebhookVerificationError

from gradcam_worker.delivery.webhooks import MAX_BODY_BYTES, Webhooks, make_body, message_id
from gradcam_worker.errors import (
    DeliveryRefused,
    EndpointGone,
    ImageDecodeFailed,
    InvalidJob,
    InvalidSettings,
    StatusUnavailable,
    UriNotAllowed,
)
from gradcam_worker.net.webhook_signing import parse_secrets
from gradcam_worker.schemas.ids import new_id, utc_now
from gradcam_worker.schemas.job import Webhook
from gradcam_worker.schemas.status import ClassScore, Problem, ResultWarning, StatusDocument, StatusEvent
from gradcam_worker.settings import Settings

NEW = "whsec_" + "bmV3" * 8  # 24 bytes, as short as the standard allows
OLD = "whsec_" + "b2xk" * 8
OTHER = "whsec_" + "b3RoZXIu" * 10 + "b3RoLg=="  # 64, as long as it allows
SECRETS = f"app1={NEW} {OLD}, app2={OTHER}"


def event(status: str = "succeeded", **more: Any) -> StatusEvent:
    now = utc_now()
    times = {"created_at": now, "queued_at": now, "updated_at": now}
    document = StatusDocument.model_validate(
        {"id": new_id(), "status": status, "max_attempts": 3, **times, **more}
    )
    return StatusEvent(type=f"gradcam.job.{status}", timestamp=now, data=document)


def webhooks(server: Any, **more: Any) -> Webhooks:
    return Webhooks(Settings(webhook_hosts=(server.host,), private_networks=("127.0.0.0/8",), **more))


def send(
    server: Any, url: str, sent: StatusEvent, *, ref: str | None = None, secrets: str = SECRETS, **more: Any
) -> None:
    hooks = webhooks(server, webhook_secrets=SecretStr(secrets), **more)
    hooks.send(url, ref, sent, message_id(sent.data))


def test_an_event_arrives_as_json_with_the_status_document_as_it_is_everywhere(
    http_server: Any, answer: Any
) -> None:
    sent = event()
    send(http_server, http_server.url("/hook", answer(204)), sent)
    [(path, body)], [headers] = http_server.received, http_server.headers
    assert path == "/hook"
    assert json.loads(body) == sent.model_dump(mode="json")
    assert f'"data":{sent.data.to_json()}' in body.decode()
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == f"msg_{sent.data.id}_1"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert not {"webhook-signature", "gradcam-shortened"} & headers.keys(), "nobody asked for a signature"


def test_a_signature_is_what_the_standards_own_library_verifies(http_server: Any, answer: Any) -> None:
    sent = event(metadata={"patient": "Zoë 𝄞"})
    send(http_server, http_server.url("/hook", answer()), sent, ref="app2")
    [(_, body)], [headers] = http_server.received, http_server.headers
    assert standardwebhooks.Webhook(OTHER).verify(body, headers) == sent.model_dump(mode="json")
    with pytest.raises(WebhookVerificationError):
        standardwebhooks.Webhook(NEW).verify(body, headers)


def test_while_a_secret_is_replaced_the_old_and_the_new_one_both_verify(
    http_server: Any, answer: Any
) -> None:
    send(http_server, http_server.url("/hook", answer()), event(), ref="app1")
    [(_, body)], [headers] = http_server.received, http_server.headers
    assert len(headers["webhook-signature"].split(" ")) == 2
    for secret in (NEW, OLD):
        standardwebhooks.Webhook(secret).verify(body, headers)
    with pytest.raises(WebhookVerificationError):
        standardwebhooks.Webhook(OTHER).verify(body, headers)


@pytest.mark.parametrize("changed", ["body", "webhook-id", "webhook-timestamp"])
def test_whatever_is_tampered_with_no_longer_verifies(changed: str, http_server: Any, answer: Any) -> None:
    send(http_server, http_server.url("/hook", answer()), event(), ref="app1")
    [(_, body)], [headers] = http_server.received, http_server.headers
    if changed == "body":
        body = body.replace(b"succeeded", b"canceled!")
    elif changed == "webhook-id":
        headers[changed] = headers[changed].replace("_1", "_2")
    else:
        headers[changed] = str(int(headers[changed]) - 1)
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        standardwebhooks.Webhook(NEW).verify(body, headers)


def test_a_message_that_is_sent_again_keeps_its_id_and_says_when_it_was_sent_again(
    http_server: Any, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, url = event(), http_server.url("/hook", answer(503))
    for later in (0, 200):
        moment = utc_now() + timedelta(seconds=later)
        monkeypatch.setattr("gradcam_worker.delivery.webhooks.utc_now", lambda moment=moment: moment)
        with pytest.raises(StatusUnavailable):
            send(http_server, url, sent, ref="app1")
    first, second = http_server.headers
    assert first["webhook-id"] == second["webhook-id"]
    assert 190 < int(second["webhook-timestamp"]) - int(first["webhook-timestamp"]) < 260
    for headers, (_, body) in zip(http_server.headers, http_server.received, strict=True):
        standardwebhooks.Webhook(NEW).verify(body, headers)


@pytest.mark.parametrize(
    ("status", "to_the_end", "on_the_way"),
    [
        (500, StatusUnavailable, StatusUnavailable),
        (503, StatusUnavailable, StatusUnavailable),
        (408, StatusUnavailable, StatusUnavailable),
        (425, StatusUnavailable, StatusUnavailable),
        (429, StatusUnavailable, StatusUnavailable),
        (400, StatusUnavailable, DeliveryRefused),
        (404, StatusUnavailable, DeliveryRefused),
        (302, StatusUnavailable, DeliveryRefused),
        (307, StatusUnavailable, DeliveryRefused),
        (410, EndpointGone, EndpointGone),
    ],
)
def test_the_end_of_a_job_is_told_until_it_is_heard_and_what_comes_before_only_to_who_is_busy_or_broken(
    http_server: Any, answer: Any, status: int, to_the_end: type[Exception], on_the_way: type[Exception]
) -> None:
    url = http_server.url("/hook", answer(status, headers={"location": "/elsewhere"}))
    for sent, error in ((event(), to_the_end), (event("running"), on_the_way)):
        with pytest.raises(error, match=f"answered HTTP {status}"):
            send(http_server, url, sent)
    assert {path for path, _ in http_server.received} == {"/hook"}, "redirects are not followed"


def _date(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("status", [400, 429, 503])
@pytest.mark.parametrize(
    ("said", "low", "high"),
    [
        ("120", 120, 120),
        (" 7 ", 7, 7),
        ("86401", 86_400, 86_400),
        ("9" * 400, 86_400, 86_400),
        (3600, 3000, 3600),  # a date so far from now
        (1e6, 86_400, 86_400),
        ("Wednesday, 01-Jan-48 00:00:00 GMT", 86_400, 86_400),
    ],
)
def test_who_asks_to_be_left_alone_is_for_a_day_at_most(
    http_server: Any, answer: Any, status: int, said: str | float, low: float, high: float
) -> None:
    said = said if isinstance(said, str) else _date(said)
    url = http_server.url("/hook", answer(status, headers={"Retry-After": said}))
    with pytest.raises(StatusUnavailable) as caught:
        send(http_server, url, event())
    assert caught.value.retry_after_s is not None
    assert low <= caught.value.retry_after_s <= high


@pytest.mark.parametrize(
    "said", [None, "", "0", "-5", "soon", "1.5", "٣", "²", "Thu, 99 Foo 2030", -60, "x" * 5000]
)
def test_a_retry_after_that_says_nothing_is_not_heeded(http_server: Any, answer: Any, said: Any) -> None:
    from gradcam_worker.delivery.webhooks import _parse_retry_after

    said = _date(said) if isinstance(said, int) else said
    assert _parse_retry_after(said or "") is None
    if said is None or said.isascii():
        headers = {} if said is None else {"Retry-After": said}
        with pytest.raises(StatusUnavailable) as caught:
            send(http_server, http_server.url("/hook", answer(503, headers=headers)), event())
        assert caught.value.retry_after_s is None


def test_a_receiver_that_does_not_answer_is_tried_again(http_server: Any, answer: Any) -> None:
    url = http_server.url("/hook", answer(200, before=lambda: time.sleep(0.5)))
    with pytest.raises(StatusUnavailable, match="timed out"):
        send(http_server, url, event(), webhook_timeout_s=0.1)


@pytest.mark.parametrize(
    "url",
    ["http://elsewhere.test/hook", "ftp://{host}/hook", "http://user:planted@{host}/hook", "http://[", ""],
)
def test_only_allowed_hosts_are_told(http_server: Any, url: str) -> None:
    there, hooks = url.format(host=http_server.host), webhooks(http_server)
    with pytest.raises(UriNotAllowed) as caught:
        send(http_server, there, event())
    assert "planted" not in str(caught.value)
    if there:
        with pytest.raises(UriNotAllowed):
            hooks.check(Webhook(url=there))
    assert not http_server.received


def test_a_secret_that_nobody_knows_is_refused_by_name_when_the_job_is_admitted(http_server: Any) -> None:
    hooks = webhooks(http_server, webhook_secrets=SecretStr(SECRETS))
    there = f"http://{http_server.host}/hook"
    for ref in (None, "app1", "app2"):
        hooks.check(Webhook(url=there, secret_ref=ref))
    with pytest.raises(InvalidJob, match=r"no webhook secret 'app3'.*has app1, app2") as caught:
        hooks.check(Webhook(url=there, secret_ref="app3"))
    assert "whsec_" not in str(caught.value)


def test_nothing_is_sent_unsigned_where_a_signature_was_asked_for(http_server: Any, answer: Any) -> None:
    with pytest.raises(StatusUnavailable, match="for lack of a signature: There is no webhook secret 'app3'"):
        send(http_server, http_server.url("/hook", answer()), event(), ref="app3")
    assert not http_server.received


def seen(count: int, name: str = "n" * 40) -> list[ClassScore]:
    return [
        ClassScore(rank=rank, id=rank, wnid="n03933933", name=name, probability=0.1)
        for rank in range(1, count + 1)
    ]


def test_an_event_that_is_too_large_loses_first_what_the_manifest_has_too(
    http_server: Any, answer: Any
) -> None:
    sent = event(
        predictions=seen(1000),
        metadata={"batch": "7"},
        warnings=[ResultWarning(code="zero_heatmap", class_id=1)],
    )
    send(http_server, http_server.url("/hook", answer()), sent, ref="app1")
    [(_, body)], [headers] = http_server.received, http_server.headers
    assert len(body) <= MAX_BODY_BYTES
    assert headers["gradcam-shortened"] == "predictions"
    document = standardwebhooks.Webhook(NEW).verify(body, headers)["data"]
    assert document["predictions"] == [one.model_dump() for one in sent.data.predictions[:5]]
    assert document == {**sent.data.model_dump(mode="json"), "predictions": document["predictions"]}


def test_no_event_is_larger_than_20_kb() -> None:
    character = "𝄞"  # four bytes
    error = ImageDecodeFailed(character * 5000)
    worst = event(
        "failed",
        predictions=seen(1000),
        warnings=[ResultWarning(code="zero_heatmap", class_id=one) for one in range(1000)],
        error=Problem.of(error, stage="decode", attempt=1),
        network={"name": character * 256, "layer": character * 256, "weights_sha256": "0" * 64},
        result={"manifest_uri": "s3://b/" + character * 1024, "manifest_sha256": "0" * 64},
        metadata={f"{number:02}" + character * 254: character * 256 for number in range(16)},
    )
    body, shortened = make_body(worst)
    assert len(body.encode()) <= MAX_BODY_BYTES
    assert shortened == ("predictions", "warnings", "error.detail", "metadata")
    assert StatusEvent.model_validate_json(body).data.error is not None
    whole = event(predictions=seen(100), metadata={"batch": "7"})
    assert make_body(whole) == (whole.to_json(), ())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("planted", "entry 1 must look like name=whsec_"),
        (f"app1={NEW},planted", "entry 2 must look like name=whsec_"),
        ("whsec_plantedplantedplantedplantedpl=", "entry 1 must look like"),
        (f"={NEW}", "entry 1 must look like"),
        ("app1=", "'app1' has no secret: one must be whsec_ and the base64 of 24 to 64 random bytes"),
        ("app1=planted", "secret 1 of 'app1' must be whsec_"),
        (f"app1={NEW} whsec_planted", "secret 2 of 'app1' must be whsec_ and the base64 of 24 to 64"),
        (f"app1={NEW[:-4]}", "secret 1 of 'app1'"),
        (f"app1={OTHER[:-4]}AAAA", "secret 1 of 'app1'"),
        (f"app1={NEW[:-1]}-", "secret 1 of 'app1'"),
        (f"app1={NEW}é", "secret 1 of 'app1'"),
        (f"app1=whsk_{NEW[6:]}", "secret 1 of 'app1'"),
        (f"app1={NEW},app1={OLD}", "'app1' is there twice"),
    ],
)
def test_secrets_that_cannot_be_are_refused_without_being_shown(text: str, expected: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({"GRADCAM_WEBHOOK_SECRETS": text})
    told = f"{caught.value} {caught.value.__cause__}"
    assert f"GRADCAM_WEBHOOK_SECRETS: {expected}" in str(caught.value)
    assert "planted" not in told
    assert NEW[8:] not in told


def test_secrets_are_read_by_name_newest_first_and_do_not_show() -> None:
    settings = Settings.from_environment({"GRADCAM_WEBHOOK_SECRETS": f" {SECRETS} ,"})
    secrets = settings.webhook_secrets.get_secret_value()
    assert parse_secrets(secrets) == {"app1": (NEW, OLD), "app2": (OTHER,)}
    assert parse_secrets("") == {}
    assert NEW not in repr(settings)
    assert Settings.from_environment(settings.to_environment()) == settings
