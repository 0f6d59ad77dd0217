import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gradcam_worker.errors import ImageNotFound, InvalidJob
from gradcam_worker.schemas import ids
from gradcam_worker.schemas.ids import new_id, process_name
from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.manifest import Manifest
from gradcam_worker.schemas.options import MethodSpec
from gradcam_worker.schemas.status import Problem, StatusDocument, StatusEvent

LEAST: dict[str, Any] = {"image": "s3://in/pier.jpg", "network": "vgg16", "target": {"top_n": 5}}


def test_image_network_and_target_are_enough() -> None:
    job = Job.parse(LEAST)
    assert job.image.uri == "s3://in/pier.jpg"
    assert [wish.kind for wish in job.artifacts] == ["overlay", "heatmap"]
    assert (job.priority, job.timeout_s, job.max_attempts) == ("normal", 60, 3)


def test_a_job_survives_the_wire() -> None:
    job = Job.parse({**LEAST, "target": {"classes": [718, "n03216828", "dock"]}, "metadata": {"a": "b"}})
    assert Job.model_validate_json(job.to_json()) == job
    assert Job.parse(job.model_dump(mode="json")) == job
    assert job.model_dump(mode="json")["schema"] == "gradcam.job/v1"


def test_what_is_new_is_sent_only_where_it_is_asked_for_so_that_earlier_workers_take_the_job() -> None:
    plain = Job.parse(LEAST)
    assert set(json.loads(plain.to_json())["target"]) == {"top_n", "classes"}
    contrast = Job.parse({**LEAST, "target": {"top_n": 5, "against": ["pier", 7]}})
    assert Job.model_validate_json(contrast.to_json()) == contrast
    assert contrast.target.against == ("pier", 7)
    assert contrast.fingerprint() != plain.fingerprint()
    assert "against" not in plain.fingerprint()


def test_inputs_of_the_network_survive_the_wire_and_change_the_fingerprint() -> None:
    inputs = {"age": 61, "weight": 70.5, "sex": "f", "blood": [1, 2.5]}
    job = Job.parse({**LEAST, "inputs": inputs})
    assert Job.model_validate_json(job.to_json()) == job
    assert job.model_dump(mode="json")["inputs"] == inputs
    assert job.fingerprint() != Job.parse(LEAST).fingerprint()


def test_without_inputs_the_job_is_as_earlier_workers_know_it() -> None:
    job = Job.parse(LEAST)
    assert "inputs" not in job.to_json()
    assert "inputs" not in job.model_dump(mode="json")
    assert "inputs" not in job.fingerprint()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "inputs.age: it is True: it must be a number, a text or a list of numbers"),
        ({}, "inputs.age: it is {}: it must be"),
        (None, "inputs.age: it is None: it must be"),
        (float("inf"), "inputs.age: it is inf: it must be"),
        (10**400, "inputs.age: it is 1000"),
        ([-(10**400)], "inputs.age: it is a list with -1000"),
        ([1, "a"], "inputs.age: it is a list with 'a': it must hold numbers"),
        ("a" * 1025, "inputs.age: it is a text of 1,025 characters; at most 1,024 are allowed"),
    ],
)
def test_an_input_that_no_network_can_take_is_refused(value: Any, expected: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        Job.parse({**LEAST, "inputs": {"age": value}})
    assert expected in str(refused.value)


def test_the_example_of_the_contract_is_a_job() -> None:
    example = {
        **LEAST,
        "schema": "gradcam.job/v1",
        "id": new_id(),
        "idempotency_key": "crm-42:pier.jpg:vgg16",
        "image": {"uri": "s3://in/pier.jpg", "sha256": None},
        "method": {"name": "gradcam", "layer": None, "score": "logit", "normalize": "per_class"},
        "artifacts": [{"kind": "overlay", "format": "jpeg", "alpha": 0.4, "colormap": "jet"}],
        "output": None,
        "expires_at": "2030-01-01T00:00:00Z",
        "webhooks": [{"url": "https://app/hook", "events": ["job.succeeded"], "secret_ref": None}],
    }
    assert Job.parse(example).artifacts[0].kind == "overlay"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"target": {"top_n": 0}}, "target.top_n: Input should be greater than or equal to 1 (received 0)"),
        ({"target": {"top_n": 5000}}, "less than or equal to 1000 (received 5000)"),
        ({"target": {"top_n": 5, "classes": [1]}}, "exactly one of top_n and classes is needed, both given"),
        ({"target": {}}, "neither given"),
        ({"target": {"classes": []}}, "needs 1 or more entries"),
        ({"target": {"top_n": 1, "against": []}}, "needs 1 or more entries"),
        ({"target": {"top_n": 1, "against": "dog"}}, "target.against: against is a list, as in ['dog']"),
        (
            {"method": {"name": "gradcam", "steps": 64}},
            "steps is a parameter of integrated_gradients, not of gradcam",
        ),
        ({"method": {"name": "integrated_gradients", "layer": "top"}}, "which explains the pixels"),
        ({"method": {"name": "integrated_gradients", "steps": 7}}, "greater than or equal to 8"),
        ({"method": {"name": "integrated_gradients", "baseline": "red"}}, "'black', 'grey' or 'blurred'"),
        ({"target": {"classes": ["cat", 3], "against": [3]}}, "3 is both in classes and in against"),
        (
            {"target": {"top_n": 1, "against": [3]}, "method": {"name": "eigencam"}},
            "target.against has no meaning for the method eigencam",
        ),
        ({"colour": "red"}, "colour: unknown field"),
        (
            {"method": "rise"},
            'method: must be an object, a table of fields, as in {"name": "rise"} (received \'ri',
        ),
        ({"target": 3}, 'target: must be an object, a table of fields, as in {"top_n": 3} (received 3)'),
        ({"target": {"classes": {}}}, "target.classes: must be a list"),
        ({"artifacts": ["overlay"]}, "artifacts.0: must be an object, a table of fields, as in [{"),
        ({"artifacts": "overlay"}, 'artifacts: must be a list, as in [{"kind": "overlay"}] (received'),
        (
            {"artifacts": [{"kind": "poster"}]},
            "artifacts.0: kind is 'poster', which is none of 'overlay', 'heatmap'",
        ),
        ({"metrics": "deletion"}, "metrics: must be a list, as in [\"deletion\"] (received 'deletion')"),
        ({"target": {"top_n": True}}, "target.top_n"),
        ({"target": {"classes": [True]}}, "target.classes.0"),
        ({"target": {"classes": "tabby"}}, "target.classes: classes is a list, as in ['tabby']"),
        ({"method": {"layer": ""}}, "method.layer"),
        ({"image": ""}, "image.uri"),
        (
            {"image": f"s3://in/{'x' * 66_000}"},
            "image.uri: its URI has 66,008 bytes; at most 8,192 are allowed",
        ),
        (
            {"image": f"S3://in/{chr(0x2603) * 342}"},
            "image.uri: its S3 key has 1,026 bytes; at most 1,024 are allowed",
        ),
        (
            {"image": f"https://in/{'x' * 8_182}"},
            "image.uri: its URI has 8,193 bytes; at most 8,192 are allowed",
        ),
        ({"priority": 3}, "'high', 'normal', 'low' or 'bulk'"),
        (
            {"artifacts": [{"kind": "overlay"}, {"kind": "overlay"}]},
            "artifacts contains one kind and format twice",
        ),
        ({"artifacts": [{"kind": "hologram"}]}, "'hologram'"),
        ({"image": Path("cat.jpg")}, "not by PosixPath: client.upload_and_submit takes bytes, or the path"),
        (
            {"image": b"\xff\xd8"},
            "image.uri: an image is named by its URI, such as s3://bucket/key, not by bytes",
        ),
        ({"image": {"uri": Path("cat.jpg")}}, "not by PosixPath: client.upload_and_submit takes bytes"),
        ({"image": 7}, "not by int: client.upload_and_submit takes bytes"),
        ({"id": "../../etc/passwd"}, "id: String should match pattern"),
        ({"expires_at": "2030-01-01T00:00:00"}, "expires_at: Input should have timezone info"),
        ({"timeout_s": 1e9}, "timeout_s"),
        ({"webhooks": [{"url": "https://app", "secret_ref": ""}]}, "secret_ref"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_received(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        Job.parse({**LEAST, **change})
    assert expected in str(caught.value)


def test_as_long_as_anything_can_be_stored_there_an_address_may_be() -> None:
    for longest in (f"s3://in/{'x' * 1024}", f"https://in/{'x' * 8_181}", f"data:,{'x' * 100_000}"):
        assert Job.parse({**LEAST, "image": longest}).image.uri == longest


def test_one_mistake_is_one_finding() -> None:
    with pytest.raises(InvalidJob) as caught:
        Job.parse({**LEAST, "artifacts": [{"kind": "hologram"}]})
    assert str(caught.value).count(";") == 0, str(caught.value)


@pytest.mark.parametrize("payload", [None, "hello", 7, [1, 2], {}, {"image": None}])
def test_what_is_no_job_is_refused(payload: object) -> None:
    with pytest.raises(InvalidJob, match="This is not a job"):
        Job.parse(payload)


@pytest.mark.parametrize(
    "change",
    [
        {"image_uri": "https://user:planted@host/p.jpg?X-Amz-Signature=planted"},
        {"password": "planted"},
        {"webhooks": [{"url": "https://app/" + "planted" * 100}]},
        {"x" * 100_000: 1},
    ],
)
def test_what_may_be_secret_or_endless_is_not_repeated(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidJob) as caught:
        Job.parse({**LEAST, **change})
    assert "planted" not in str(caught.value)
    assert len(str(caught.value)) < 2100


def test_two_containers_of_one_host_name_and_process_number_are_two_workers() -> None:
    names = {process_name() for _ in range(3)}
    ids._random_part.cache_clear()  # as in another process
    names.add(process_name())
    assert len(names) == 2
    assert {name.rpartition(":")[2] for name in names} == {str(os.getpid())}


def test_ids_are_uuids_of_version_7_and_sort_by_time() -> None:
    ids = [new_id() for _ in range(100)]
    assert {uuid.UUID(one).version for one in ids} == {7}
    assert {uuid.UUID(one).variant for one in ids} == {uuid.RFC_4122}
    assert len(set(ids)) == 100
    prefixes = [one[:13] for one in ids]  # the milliseconds
    assert prefixes == sorted(prefixes)


def test_the_fingerprint_ignores_what_does_not_change_the_work() -> None:
    one = Job.parse({**LEAST, "idempotency_key": "a"})
    same = Job.parse({**LEAST, "idempotency_key": "b"})
    other = Job.parse({**LEAST, "target": {"top_n": 6}})
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_a_problem_carries_code_and_sentence_but_no_traceback() -> None:
    problem = Problem.of(ImageNotFound("There is no such object: s3://in/a.jpg."), stage="fetch", attempt=2)
    assert problem.model_dump() == {
        "type": "urn:gradcam:problem:image_not_found",
        "title": "Nothing is stored at this URI",
        "detail": "There is no such object: s3://in/a.jpg.",
        "public_message": "The image is not there, or may not be read. Please upload it first.",
        "code": "image_not_found",
        "retryable": False,
        "stage": "fetch",
        "attempt": 2,
    }


def test_a_problem_that_an_earlier_version_wrote_has_a_public_message_when_it_is_read() -> None:
    problem = Problem.of(ImageNotFound("There is no such object: s3://in/a.jpg."), stage="fetch", attempt=2)
    assert Problem.model_validate(problem.model_dump(exclude={"public_message"})) == problem


def test_documents_are_frozen() -> None:
    job = Job.parse(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        job.network = "xception"


def test_a_status_document_of_a_later_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gradcam\.status/v1"):
        StatusDocument.model_validate({"schema": "gradcam.status/v2"})


def test_jobs_that_wish_for_other_artifacts_are_other_jobs() -> None:
    fields = {"image": "s3://in/a.jpg", "network": "vgg16", "target": {"top_n": 1}}
    wishes = [{"kind": kind} for kind in ("overlay", "heatmap", "grid", "animation", "report")]
    made = {Job.parse({**fields, "artifacts": [wish]}).fingerprint() for wish in wishes}
    assert len(made) == 5
    again = [Job.parse({**fields, "artifacts": [{"kind": "grid"}]}).fingerprint() for _ in range(2)]
    assert again[0] == again[1]


def test_metrics_of_an_image_that_was_not_preprocessed_are_refused() -> None:
    fields = {"image": "s3://in/a.jpg", "network": "vgg16", "target": {"top_n": 1}, "metrics": ["deletion"]}
    assert Job.parse(fields).metrics == ("deletion",)
    with pytest.raises(InvalidJob, match="metrics cannot be computed for the method notebook"):
        Job.parse({**fields, "method": {"name": "notebook"}})


@pytest.mark.parametrize(
    "fields",
    [
        {"image": ["data:image/png;base64,planted"]},
        {"priority": "http://user:planted@host/"},
        {"webhooks": [{"url": "x", "secret_ref": "whsec_planted" * 30}]},
        {"webhooks": ["http://host/?token=planted"]},
        {"webhooks": [{"url": "http://host/?token=planted" * 20}]},
        {"image": {"uri": "s3://in/a.png", "token": "planted"}},
        {"api_key": "planted"},
    ],
)
def test_what_is_said_of_a_wrong_job_repeats_no_secret_nor_does_its_traceback(
    fields: dict[str, object],
) -> None:
    good = {"image": "s3://in/a.png", "network": "vgg16", "target": {"top_n": 1}}
    with pytest.raises(InvalidJob) as caught:
        Job.parse(good | fields)
    assert "planted" not in f"{caught.value} {caught.value.__cause__}"
    assert next(iter(fields)) in str(caught.value)


def _with_more(value: Any) -> Any:
    """The same, with something of tomorrow in each object that is no table of names."""
    if isinstance(value, list):
        return [_with_more(one) for one in value]
    if not isinstance(value, dict):
        return value
    free = {"metrics", "metadata", "generator"}
    return {"tomorrow": {"more": 1}} | {
        name: one if name in free else _with_more(one) for name, one in value.items()
    }


def test_what_a_later_version_adds_to_what_it_tells_is_passed_over() -> None:
    seen = {"rank": 1, "id": 7, "wnid": "n7", "name": "a", "probability": 0.5}
    problem = Problem.of(ImageNotFound("It is gone."), stage="fetch", attempt=1)
    now, digest = "2026-01-01T00:00:00Z", "0" * 64
    document = {
        "id": new_id(),
        "status": "failed",
        "max_attempts": 1,
        "predictions": [seen],
        **dict.fromkeys(("created_at", "queued_at", "updated_at"), now),
        "network": {"name": "vgg16", "layer": "l", "weights_sha256": digest},
        "worker": {"id": "me", "device": "cpu"},
        "result": {"manifest_uri": "s3://a/b", "manifest_sha256": digest},
        "warnings": [{"code": "zero_heatmap", "class_id": 7}],
        "error": problem.model_dump(),
    }
    event = {"type": "gradcam.job.failed", "timestamp": now, "data": document}
    record = {"kind": "overlay", "uri": "s3://a/c", "media_type": "image/png", "bytes": 1, "sha256": digest}
    explained = {
        "class": {"id": 7, "wnid": "n7", "name": "a"},
        "hot": {"threshold": 0.5, "box_xyxy": [0, 0, 1, 1]},
        "rank": 1,
        "probability": 0.5,
        "raw_min": 0,
        "raw_max": 1,
        "peak_xy": [0, 0],
        "artifacts": [record],
    }
    manifest = {
        "job_id": document["id"],
        "generator": {"name": "gradcam-worker"},
        "input": {"uri": "s3://a/d", "sha256": digest, "bytes": 1, "media_type": "image/png"}
        | {"width": 1, "height": 1},
        "network": {"name": "vgg16", "layer": "l", "input_size": [1, 1], "preprocessing": "none"}
        | {"weights_sha256": None, "backend": "numpy", "dtype": "float32"},
        "method": {"name": "gradcam", "layer": "l"},
        "predictions": [seen],
        "explanations": [explained],
        "artifacts": [record],
        "warnings": document["warnings"],
    }
    for model, told in ((StatusDocument, document), (StatusEvent, event), (Manifest, manifest)):
        more = _with_more(told)
        assert more != told
        assert model.model_validate(more) == model.model_validate(told)
        assert "tomorrow" not in model.model_validate(more).to_json()
    warned = {**document, "warnings": [{"code": "code_of_tomorrow", "class_id": 7}]}
    assert StatusDocument.model_validate(warned).warnings[0].code == "code_of_tomorrow"
    with pytest.raises(InvalidJob, match="tomorrow: unknown field"):
        Job.parse({**LEAST, "tomorrow": 1})
    with pytest.raises(ValidationError, match="tomorrow"):
        MethodSpec.model_validate({"tomorrow": 1})
