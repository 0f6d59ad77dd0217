import json
import time
from typing import Any

import pytest

from worker.contract import Delivery, StatusDocument, StatusEvent
from worker.errors import DeliveryRefused, StatusUnavailable, UriNotAllowed
from worker.settings import Settings
from worker.status import Webhooks
from worker.wire import new_id, utc_now


def event() -> StatusEvent:
    now = utc_now()
    document = StatusDocument(
        id=new_id(), status="succeeded", max_attempts=3, created_at=now, queued_at=now, updated_at=now
    )
    return StatusEvent(type="gradcam.job.succeeded", timestamp=now, data=document)


def webhooks(server: Any, **more: Any) -> Webhooks:
    return Webhooks(Settings(webhook_hosts=(server.host,), **more))


def test_an_event_arrives_as_json(http_server: Any, answer: Any) -> None:
    sent = event()
    webhooks(http_server).send(Delivery(url=http_server.url("/hook", answer(204)), event=sent))
    [(path, body)] = http_server.received
    assert path == "/hook"
    assert json.loads(body) == sent.model_dump(mode="json")
    assert json.loads(body)["data"]["schema"] == "gradcam.status/v1"


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (500, StatusUnavailable),
        (503, StatusUnavailable),
        (429, StatusUnavailable),
        (400, DeliveryRefused),
        (410, DeliveryRefused),
        (302, DeliveryRefused),
    ],
)
def test_an_answer_that_may_change_is_tried_again_and_one_that_will_not_is_not(
    http_server: Any, answer: Any, status: int, error: type[Exception]
) -> None:
    url = http_server.url("/hook", answer(status, headers={"location": "/elsewhere"}))
    with pytest.raises(error, match=str(status)):
        webhooks(http_server).send(Delivery(url=url, event=event()))
    assert [path for path, _ in http_server.received] == ["/hook"], "redirects are not followed"


def test_a_receiver_that_does_not_answer_is_tried_again(http_server: Any, answer: Any) -> None:
    url = http_server.url("/hook", answer(200, before=lambda: time.sleep(0.5)))
    with pytest.raises(StatusUnavailable, match="timed out"):
        webhooks(http_server, webhook_timeout_s=0.1).send(Delivery(url=url, event=event()))


@pytest.mark.parametrize(
    "url",
    ["http://elsewhere.test/hook", "ftp://{host}/hook", "http://user:planted@{host}/hook", "http://[", ""],
)
def test_only_allowed_hosts_are_told(http_server: Any, url: str) -> None:
    with pytest.raises(UriNotAllowed) as caught:
        webhooks(http_server).send(Delivery(url=url.format(host=http_server.host), event=event()))
    assert "planted" not in str(caught.value)
    assert not http_server.received
