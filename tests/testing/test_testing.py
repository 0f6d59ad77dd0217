"""What `gradcam_worker.testing` gives to our users' unit tests."""

import doctest
import hashlib
from typing import Any

import cv2
import numpy as np
import pytest

from gradcam_worker import testing
from gradcam_worker.errors import ImageFetchFailed, ImageForbidden, InvalidJob, NoResult
from gradcam_worker.schemas.job import Job
from gradcam_worker.settings import Settings
from gradcam_worker.testing import TinyNetwork, eager_client

FIELDS: dict[str, Any] = {"image": "s3://in/green.png", "network": "xception", "target": {"top_n": 3}}
GREEN = cv2.imencode(".png", np.full((20, 30, 3), (0, 255, 0), np.uint8))[1].tobytes()


def test_the_example_in_its_docstring_runs() -> None:
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(eager_client, "eager_client", globs=dict(vars(testing)))
    assert len(example.examples) > 5
    assert doctest.DocTestRunner().run(example).failed == 0


def test_a_job_has_ended_when_submit_returns() -> None:
    client = eager_client({"s3://in/green.png": GREEN})
    ids = client.submit_many([FIELDS, Job.parse(FIELDS)])
    for job_id in ids:
        assert client.wait(job_id, timeout_s=0.1).status == "succeeded"
        assert [one.status for one in client.stream(job_id)] == ["succeeded"]
        assert client.cancel(job_id).status == "succeeded"
    document = client.statuses(ids)[ids[1]]
    assert document.predictions[0].name == "green"
    assert document.network
    assert document.network.name == "xception"


def test_an_uploaded_image_is_explained_and_its_result_can_be_shown() -> None:
    client = eager_client()
    result = client.result(client.upload_and_submit(GREEN, network="vgg16", target={"classes": ["blue"]}))
    assert result.manifest.input.uri == f"s3://uploads/{hashlib.sha256(GREEN).hexdigest()}.png"
    assert (result.manifest.input.width, result.manifest.input.height) == (30, 20)
    assert all(url.startswith("data:") for url in result.urls.values())


def test_the_classes_of_imagenet_are_known_by_their_names_and_numbers() -> None:
    client = eager_client({"s3://in/green.png": GREEN})
    job = client.submit(
        image="s3://in/green.png", network="resnet50", classes=["Egyptian cat", 281, "n02123159", "red"]
    )
    explained = job.result().manifest.explanations
    assert [(one.class_.id, one.class_.name) for one in explained] == [
        (285, "Egyptian_cat"),
        (281, "tabby"),
        (282, "tiger_cat"),
        (1000, "red"),
    ]
    assert all(one.raw_max > 0 for one in explained[:3])
    assert job.status().predictions[0].probability > 0.8
    ambiguous = client.submit(image="s3://in/green.png", network="resnet50", classes=["crane"]).status()
    assert ambiguous.error
    assert ambiguous.error.code == "ambiguous_class"


def test_a_retryable_failure_is_retried_as_often_as_a_worker_would() -> None:
    client = eager_client({"s3://in/green.png": ImageFetchFailed("The store is away.")})
    document = client.status(client.submit(**FIELDS, max_attempts=4))
    assert document.error
    assert (document.status, document.attempt, document.error.code) == ("failed", 4, "image_fetch_failed")


def test_a_permanent_failure_fails_at_once_and_has_no_result() -> None:
    client = eager_client({"s3://in/green.png": ImageForbidden("Not yours.")})
    job_id = client.submit(**FIELDS)
    assert client.status(job_id).attempt == 1
    with pytest.raises(NoResult, match=r"is failed \(image_forbidden: Not yours\.\)"):
        client.result(job_id)
    unknown = client.status(client.submit(**{**FIELDS, "network": "no_such_network"}))
    assert unknown.error
    assert unknown.error.code == "unknown_network"


def test_a_wrong_job_is_refused_as_the_real_client_refuses_it() -> None:
    client = eager_client(settings=Settings(max_message_bytes=1000))
    with pytest.raises(InvalidJob, match="unknown field"):
        client.submit(**FIELDS, top_m=1)  # type: ignore[call-overload]
    with pytest.raises(InvalidJob, match="1,000"):
        client.submit(**{**FIELDS, "image": f"data:image/png;base64,{'A' * 2000}"})


def test_the_same_key_runs_once_and_a_given_network_is_used() -> None:
    seen = []

    class Own(TinyNetwork):
        def compute(self, *given: Any) -> Any:
            seen.append(len(given[0]))
            return super().compute(*given)

    client = eager_client({"s3://in/green.png": GREEN}, network=Own())
    first = client.submit(**FIELDS, idempotency_key="k")
    ran = len(seen)
    assert client.submit(**FIELDS, idempotency_key="k") == first
    assert len(seen) == ran > 0
