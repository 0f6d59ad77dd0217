"""One job from queue to bucket to status, real at every step."""

import base64
import hashlib
import io
import json
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
import redis
from celery import Celery

from gradcam_worker.broker import app as broker
from gradcam_worker.broker import publisher
from gradcam_worker.gradcam.decoding.decode import decode
from gradcam_worker.operations.doctor import run_checks
from gradcam_worker.schemas.ids import new_id
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.status import StatusDocument

pytestmark = [pytest.mark.live, pytest.mark.tensorflow]

NETWORK = "efficientnet_lite0"
WAIT_S = 90  # the first test also waits for TensorFlow to load


def submit_and_wait(stage: Any, **fields: Any) -> StatusDocument:
    fields = {"network": NETWORK, "target": {"top_n": 1}, **fields}
    document: StatusDocument = stage.client.wait(stage.client.submit(**fields), WAIT_S)
    return document


def test_a_photo_is_explained(stage: Any) -> None:
    document = submit_and_wait(
        stage, image="s3://photos/astronaut.jpg", target={"classes": [812, "football_helmet"]}
    )
    assert document.status == "succeeded", document.error
    assert document.result is not None
    text = stage.store.get(f"{document.id}/manifest.json")
    assert hashlib.sha256(text).hexdigest() == document.result.manifest_sha256
    manifest = Manifest.model_validate_json(text)
    assert [seen.class_.id for seen in manifest.explanations] == [812, 560]
    for seen in manifest.explanations:
        for record in seen.artifacts:
            data = stage.store.get(record.uri.removeprefix("s3://results/cams/"))
            assert hashlib.sha256(data).hexdigest() == record.sha256
    overlay = stage.store.get(f"{document.id}/overlay-2-560-football_helmet.jpg")
    assert decode(overlay).pixels.shape == (512, 512, 3)
    arrays = np.load(io.BytesIO(stage.store.get(f"{document.id}/heatmaps.npz")))
    assert arrays["heatmaps"].shape == (2, 7, 7)
    x, y = manifest.explanations[0].peak_xy or (0, 0)
    assert x > 340, "the shuttle stands on the right"
    assert y < 240


def test_the_same_job_again_leaves_the_same_bytes(stage: Any) -> None:
    first = submit_and_wait(stage, image="s3://photos/coffee.jpg")
    second = submit_and_wait(stage, image="s3://photos/coffee.jpg")
    for name in ("heatmaps.npz", "overlay-1-967-espresso.jpg"):
        assert stage.store.get(f"{first.id}/{name}") == stage.store.get(f"{second.id}/{name}")


def test_webhooks_hear_of_the_start_and_of_the_end(stage: Any, public_server: Any, answer: Any) -> None:
    url = public_server.url("/heard", answer(204))
    hook = {"url": url, "events": ["job.started", "job.succeeded"]}
    document = submit_and_wait(stage, image="s3://photos/camera.jpg", webhooks=[hook])
    end = time.monotonic() + WAIT_S
    while len(heard := [json.loads(body) for path, body in public_server.received if path == "/heard"]) < 2:
        assert time.monotonic() < end, "the webhook was not told"
        time.sleep(0.05)
    by_type = {event["type"]: event["data"] for event in heard}
    assert by_type["gradcam.job.started"]["status"] == "running"
    assert by_type["gradcam.job.succeeded"] == document.model_dump(mode="json")


def test_a_strangers_celery_enqueues_by_name_with_plain_json(stage: Any) -> None:
    stranger = Celery(broker=stage.settings.broker_url, set_as_current=False)
    stranger.conf.broker_transport_options = {"global_keyprefix": stage.settings.key_prefix}
    message_id = new_id()
    job = {"image": "s3://photos/chelsea.jpg", "network": NETWORK, "target": {"top_n": 1}}
    stranger.send_task("gradcam.explain", args=[job], task_id=message_id, queue="gradcam.interactive")
    end = time.monotonic() + WAIT_S
    while not stage.client.statuses([message_id]):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert stage.client.wait(message_id, WAIT_S).predictions[0].name == "Egyptian_cat"


def png(width: int, height: int, *, claimed: int | None = None) -> bytes:
    """A grey PNG; with `claimed`, its data chunk claims to be that long."""

    def chunk(kind: bytes, data: bytes, length: int | None = None) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", length or len(data)) + kind + data + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = zlib.compress(bytes(min(width * height, 10_000)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels, claimed) + chunk(b"IEND", b"")


def bad_images(photo: bytes) -> dict[str, tuple[bytes, str]]:
    frame = photo.index(b"\xff\xc0")  # the JPEG's start of frame holds its size
    gif = (
        b"GIF89a"
        + struct.pack("<HHBBB", 30_000, 30_000, 0x80, 0, 0)
        + bytes(6)
        + b"\x2c"
        + bytes(9)
        + b"\x02\x00\x3b"
    )
    return {
        "empty": (b"", "unsupported_media_type"),
        "page.html": (b"<!doctype html><title>Not found</title>", "unsupported_media_type"),
        "cut.jpg": (photo[: len(photo) // 2], "image_decode_failed"),
        "large.jpg": (photo + bytes(1_000_000), "image_too_large"),
        "bomb.gif": (gif, "image_pixels_exceeded"),
        "bomb.png": (png(45_000, 45_000), "image_pixels_exceeded"),
        "bomb.jpg": (
            photo[: frame + 5] + struct.pack(">HH", 65_000, 65_000) + photo[frame + 9 :],
            "image_pixels_exceeded",
        ),
        "lie.png": (png(10, 10, claimed=2**31 - 1), "image_decode_failed"),
    }


def bad_messages(server: Any, answer: Any) -> list[tuple[object, str]]:
    """Messages as a stranger may put them into the queue, and the code each must end with."""
    good = {"image": "s3://photos/coffee.jpg", "network": NETWORK, "target": {"top_n": 1}}
    forbidden = server.url("/forbidden", answer(403))
    broken = server.url("/broken", answer(500))
    page = server.url("/page", answer(200, b"<html>Please log in</html>"))
    return [
        ({**good, "network": "vgg61"}, "unknown_network"),
        ({**good, "target": {"classes": ["expresso"]}}, "unknown_class"),
        ({**good, "target": {"classes": [1000]}}, "unknown_class"),
        ({**good, "target": {"classes": ["crane"]}}, "ambiguous_class"),
        ({**good, "method": {"layer": "block5_conv3"}}, "unknown_layer"),
        ({**good, "method": {"layer": "avg_pool"}}, "unknown_layer"),
        ({**good, "image": "ftp://host/a.jpg"}, "uri_not_allowed"),
        ({**good, "image": "file:///etc/passwd"}, "uri_not_allowed"),
        ({**good, "image": "s3://private/a.jpg"}, "uri_not_allowed"),
        ({**good, "image": "http://169.254.169.254/latest"}, "uri_not_allowed"),
        ({**good, "image": "s3://photos/none.jpg"}, "image_not_found"),
        ({**good, "image": f"http://{server.host}/none.jpg"}, "image_not_found"),
        ({**good, "image": forbidden}, "image_forbidden"),
        ({**good, "image": broken, "max_attempts": 2}, "image_fetch_failed"),
        ({**good, "image": page}, "unsupported_media_type"),
        ({**good, "image": "data:image/png;base64,!"}, "image_decode_failed"),
        ({**good, "image": {"uri": good["image"], "sha256": "0" * 64}}, "checksum_mismatch"),
        ({**good, "target": {"top_n": 0}}, "invalid_job"),
        ({**good, "target": {"top_n": 5000}}, "invalid_job"),
        ({**good, "target": {"top_n": 51}}, "invalid_job"),
        ({**good, "target": {"top_n": 1, "classes": [1]}}, "invalid_job"),
        ({**good, "target": {}}, "invalid_job"),
        ({**good, "colour": "red"}, "invalid_job"),
        ({**good, "output": "s3://private/x"}, "output_not_allowed"),
        ({**good, "webhooks": [{"url": "http://169.254.169.254/"}]}, "uri_not_allowed"),
        ({**good, "timeout_s": 1e-6}, "timeout"),
        ({**good, "expires_at": "2020-01-01T00:00:00Z"}, "expired"),
        ("a message that is no job at all", "invalid_job"),
        ([1, 2, 3], "invalid_job"),
        (None, "invalid_job"),
    ]


def test_whatever_is_wrong_ends_with_its_own_code_and_a_sentence(
    stage: Any, photos: Any, public_server: Any, answer: Any
) -> None:
    messages = bad_messages(public_server, answer)
    for name, (data, code) in bad_images((photos / "coffee.jpg").read_bytes()).items():
        job = {"image": stage.put(name, data), "network": NETWORK, "target": {"top_n": 1}}
        messages.append((job, code))
    app = broker.make_app(stage.settings)
    sent = {new_id(): (message, code) for message, code in messages}
    for message_id, (message, _) in sent.items():
        app.send_task(publisher.EXPLAIN, args=[message], task_id=message_id, queue=publisher.INTERACTIVE)
    end = time.monotonic() + WAIT_S
    while True:
        documents = stage.client.statuses(sent)
        if len(documents) == len(sent) and all(document.final for document in documents.values()):
            break
        assert time.monotonic() < end, [sent[one] for one in sent if one not in documents]
        time.sleep(0.1)
    wrong = {}
    for message_id, (message, code) in sent.items():
        error = documents[message_id].error
        if error is None or error.code != code or error.detail[-1:] not in ".?)":
            wrong[str(message)[:100]] = (code, error)
    assert not wrong
    assert submit_and_wait(stage, image="s3://photos/coffee.jpg").status == "succeeded", "the worker goes on"


def malformed(envelope: dict[str, Any], change: str) -> str:
    """A task message as Celery writes it, with one thing wrong."""
    broken: dict[str, Any] = json.loads(json.dumps(envelope))
    bodies = {"short": b"[1]", "object": b"{}", "text": b"garbage", "deep": b"[" * 5000, "bytes": b"\xff\xfe"}
    if change in bodies:
        broken["body"] = base64.b64encode(bodies[change]).decode()
    elif change == "unknown task":
        broken["headers"]["task"] = "gradcam.explain_everything"
    elif change == "pickle":
        broken["content-type"] = "application/x-python-serialize"
    else:
        broken["headers"][change] = {"timelimit": "x", "task": ["a"], "eta": "soon", "id": ["x"]}[change]
    return json.dumps(broken)


CHANGES = [
    "short",
    "object",
    "text",
    "deep",
    "bytes",
    "unknown task",
    "pickle",
    "timelimit",
    "task",
    "eta",
    "id",
]


def test_a_message_that_is_no_task_message_ends_with_a_document_and_the_worker_goes_on(stage: Any) -> None:
    queue, said = redis.Redis.from_url(stage.settings.broker_url), len(stage.log("worker"))
    sent = {}
    for change in CHANGES:
        app = broker.make_app(stage.settings)
        app.conf.task_queues = None
        message_id = new_id()
        app.send_task(publisher.EXPLAIN, args=[{}], task_id=message_id, queue="template")
        _, text = queue.brpop([f"{stage.settings.key_prefix}template"], timeout=5)  # type: ignore[misc]
        queue.lpush(
            f"{stage.settings.key_prefix}{publisher.INTERACTIVE}", malformed(json.loads(text), change)
        )
        sent[message_id] = change
    assert submit_and_wait(stage, image="s3://photos/coffee.jpg").status == "succeeded"
    end = time.monotonic() + WAIT_S
    expected = {one for one, change in sent.items() if change != "id"}  # that one has no id to be found by
    while len(documents := stage.client.statuses(expected)) < len(expected):
        assert time.monotonic() < end, [sent[one] for one in expected - documents.keys()]
        time.sleep(0.1)
    codes = {document.error.code for document in documents.values() if document.error}
    assert codes == {"invalid_job"}
    assert "worker_process_ended" not in stage.log("worker")[said:]


def test_a_job_may_be_given_by_the_name_of_the_argument(stage: Any) -> None:
    message_id = new_id()
    job = {"image": "s3://photos/coffee.jpg", "network": NETWORK, "target": {"top_n": 1}}
    app = broker.make_app(stage.settings)
    app.send_task(publisher.EXPLAIN, kwargs={"job": job}, task_id=message_id, queue=publisher.INTERACTIVE)
    end = time.monotonic() + WAIT_S
    while not stage.client.statuses([message_id]):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert stage.client.wait(message_id, WAIT_S).status == "succeeded"


def test_submitting_again_and_again_runs_a_job_once(
    stage: Any, public_server: Any, answer: Any, photos: Any
) -> None:
    photo = (photos / "coffee.jpg").read_bytes()
    slow = public_server.url("/slow-once", answer(200, photo, before=lambda: time.sleep(1.5)))
    fields = {"image": slow, "idempotency_key": "again", "max_attempts": 1}
    ids = {stage.client.submit(network=NETWORK, target={"top_n": 1}, **fields) for _ in range(4)}
    assert len(ids) == 1
    document = stage.client.wait(ids.pop(), WAIT_S)
    assert (document.status, document.attempt) == ("succeeded", 1)
    assert [path for path, _ in public_server.received].count("/slow-once") == 1


def test_nothing_is_left_in_the_queue_or_open_in_the_ledger(stage: Any) -> None:
    submit_and_wait(stage, image="s3://photos/rocket.jpg")
    findings = {finding.what: finding for finding in run_checks(stage.settings)}
    assert findings["ledger"].detail.endswith("0 queued, 0 running")
    assert all(finding.well for finding in findings.values())
